"""`config.json` of an exported model: the fields of `LeptonConfig`, and the names that transformers asks for."""

from typing import Any

from transformers import PreTrainedConfig

from lepton.config import LeptonConfig
from lepton.errors import InputError
from lepton.hf.remote_code import AUTO_MAP
from lepton.model import Network  # noqa: F401  (registers the ideas, which `LeptonConfig.from_dict` needs)


class LeptonHFConfig(PreTrainedConfig):
    """Configuration of `LeptonForCausalLM`.

    The shape of the model is the field `lepton`. What transformers knows by names of its own (`vocab_size`,
    `hidden_size` and so on) follows from it and is read only.
    """

    model_type = "lepton"
    keys_to_ignore_at_inference = ["cache", "uncertainty", "opens"]

    lepton: dict[str, Any] | None = None
    """Fields of `LeptonConfig`, as its `to_dict` gives them. None is no model: transformers makes such a configuration
    to compare others with."""
    bos_token_id: int | None = None
    """Begins a text that has no prompt; None is the id that ends a document."""
    eos_token_id: int | list[int] | None = None
    """Ends a text; None is the id that ends a document."""
    pad_token_id: int | None = None
    """Fills shorter rows of a batch; the model does not read it."""
    tie_word_embeddings: bool = True
    use_cache: bool = True

    def __post_init__(self, **kwargs: Any) -> None:
        for name in DERIVED:
            kwargs.pop(name, None)
        if self.lepton is not None:
            self.lepton = self.shape.to_dict()  # what is wrong is said here, with the name of the field
            self.bos_token_id = self.shape.eos_id if self.bos_token_id is None else self.bos_token_id
            self.eos_token_id = self.shape.eos_id if self.eos_token_id is None else self.eos_token_id
        super().__post_init__(**{"auto_map": dict(AUTO_MAP), **kwargs})

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoConfig") -> None:
        """Do nothing: a model writes the code of its configuration, too."""

    @property
    def shape(self) -> LeptonConfig:
        """The model's shape.

        Raises:
            InputError: there is none, or its values do not fit each other.
        """
        if self.lepton is None:
            raise InputError("the configuration has no shape: give LeptonHFConfig(lepton=model.config.to_dict())")
        return LeptonConfig.from_dict(self.lepton)

    @property
    def vocab_size(self) -> int:
        """Token ids that the model knows."""
        return self.shape.vocab_size

    @property
    def hidden_size(self) -> int:
        """Width of the residual stream."""
        return self.shape.width

    @property
    def intermediate_size(self) -> int:
        """Hidden width of a block's MLP."""
        return self.shape.ffn

    @property
    def num_hidden_layers(self) -> int:
        """Blocks in all."""
        return self.shape.layers

    @property
    def num_attention_heads(self) -> int:
        """Query heads of a block."""
        return self.shape.heads

    @property
    def num_key_value_heads(self) -> int:
        """Key/value heads of a block."""
        return self.shape.kv_heads

    @property
    def head_dim(self) -> int:
        """Width of a head."""
        return self.shape.head_dim


DERIVED = tuple(name for name, value in vars(LeptonHFConfig).items() if isinstance(value, property) and name != "shape")
"""Names that follow from the shape."""
