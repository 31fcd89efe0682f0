"""`LeptonForCausalLM`: a `Network` as transformers knows models."""

import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor
from transformers import GenerationMixin, PreTrainedModel
from transformers.utils import ModelOutput

from lepton.errors import InputError, nearest, shown
from lepton.hf.cache import LeptonCache
from lepton.hf.configuration import LeptonHFConfig
from lepton.hf.loss import training_loss
from lepton.hf.padding import Packed
from lepton.hf.precision import in_own_precision
from lepton.hf.remote_code import write_code
from lepton.model import Network, Output, State
from lepton.model.parameters import initialise
from lepton.ops.cross_entropy import IGNORE

CHUNK = 1024
"""Columns that a pass without gradients reads at once: bounds the memory of a long prompt."""
TAKEN = ("use_cache", "return_dict", "output_hidden_states", "num_items_in_batch", "past_key_values")
"""What `forward` takes beside its named arguments."""
READY = "_is_hf_initialized"
"""Mark of transformers on weights that were read from a file."""
LACKING = {
    "inputs_embeds": "the model reads token ids: give input_ids",
    "position_ids": "positions follow from the documents, which end at eos_token_id: leave it out",
    "output_attentions": "the weights of attention are never in memory: leave it out",
}
"""Arguments of other models, and why this one has none of them."""


@dataclass
class LeptonOutput(ModelOutput):
    """What a pass returns."""

    loss: Tensor | None = None
    """Scalar, if there were labels."""
    logits: Tensor | None = None
    """Next-token logits in fp32, [B, columns kept, vocab_size]."""
    cache: LeptonCache | None = None
    """What the model has read, to go on from."""
    hidden_states: tuple[Tensor, ...] | None = None
    """The last hidden states alone, normed [B, T, width], if they were asked for."""
    uncertainty: Tensor | None = None
    """The chance that the most likely token is wrong, [B, columns kept]; None without that idea."""
    opens: Tensor | None = None
    """The argument of that name."""


class Reading(NamedTuple):
    """A pass over all columns, or several over a part each."""

    hidden_BTD: Tensor
    signals_BT3: Tensor
    last: Output


class LeptonForCausalLM(PreTrainedModel, GenerationMixin):
    """A LEPTON model behind the interface of transformers.

    `network` is the model itself. Logits, and texts of `generate` without sampling, are those of LEPTON.
    """

    config_class = LeptonHFConfig
    base_model_prefix = "network"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _no_split_modules = ["Network"]
    _is_stateful = True  # a state cannot go back: no assisted generation

    def __init__(self, config: LeptonHFConfig) -> None:
        super().__init__(config)
        self.network = Network(config.shape)
        precise = [name for name, value in self.network.named_buffers() if value.is_floating_point()]
        self._keep_in_fp32_modules_strict = precise  # what was calibrated, also in a file of bf16
        self.post_init()

    @in_own_precision
    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        cache: LeptonCache | None = None,
        labels: Tensor | None = None,
        logits_to_keep: int | Tensor = 0,
        depth: float | None = None,
        think: int | None = None,
        opens: Tensor | None = None,
        **others: Any,
    ) -> LeptonOutput | tuple[Any, ...]:
        """Predict the token after each column.

        Args:
            input_ids: token ids [B, T]. A document ends at `eos_token_id`; the next token starts anew.
            attention_mask: 1 for tokens, 0 for padding on either side, [B, T or more]: columns before the last T were
                read in earlier passes. None: all are tokens.
            cache: what was read before. It changes; None starts anew.
            labels: the tokens themselves [B, T], or -100 where a prediction does not count; the loss is that of
                predicting each from those before it. In training the small losses of the ideas are added.
            logits_to_keep: how many of the last columns get logits, or which (int64); 0: all.
            depth: share of the tokens allowed past the stem, in 0..1; None: all.
            think: rounds of thinking; None: the configuration's number.
            opens: bool [B, T], tokens at which new thoughts open; see `Network.forward`.
            others: `use_cache`, `return_dict`, `output_hidden_states`, `num_items_in_batch`, and `past_key_values`, an
                older name of `cache`.

        Raises:
            InputError: an argument that cannot be used.
        """
        asked = _checked(others, cache, self.config)
        cache = asked["cache"]
        if labels is not None and cache is not None and cache.state is not None:
            raise InputError("labels and a cache: a loss is that of a whole text; leave the cache out")
        packed = Packed.of(input_ids, attention_mask)
        tokens = packed.pack(input_ids, int(self.config.shape.eos_id == 0))  # the end itself would open a segment
        opening = None if opens is None else packed.pack(opens, False)
        past = None if cache is None else cache.state
        found = self._read(tokens, past, packed.lengths_B, {"depth": depth, "think": think, "opens": opening})
        if labels is not None:
            logits = self.network.head(found.hidden_BTD)
            marked = packed.pack(labels.to(input_ids.device), IGNORE)
            counts = {"num_items_in_batch": asked["num_items_in_batch"]}
            loss = training_loss(self.network, found.last, logits, marked, self.loss_function, **counts)
            logits = _columns(packed.unpack(logits), logits_to_keep)
        else:
            logits = self.network.head(_columns(packed.unpack(found.hidden_BTD), logits_to_keep))
        if labels is None and (cache is not None or asked["use_cache"]):
            cache = LeptonCache() if cache is None else cache
            cache.state, cache.columns = found.last.state, cache.columns + input_ids.shape[1]
        output = LeptonOutput(
            loss=loss if labels is not None else None,
            logits=logits,
            cache=cache,
            hidden_states=(packed.unpack(found.hidden_BTD),) if asked["output_hidden_states"] else None,
            uncertainty=self._uncertainty(found, packed, logits, logits_to_keep),
            opens=opens,
        )
        return output if asked["return_dict"] else output.to_tuple()

    def _read(self, tokens: Tensor, past: State | None, lengths: Tensor | None, call: dict[str, Any]) -> Reading:
        """Read all columns: in one pass where gradients are wanted, else `CHUNK` at a time."""
        width = tokens.shape[1] if torch.is_grad_enabled() else CHUNK
        parts, signals = [], []
        for start in range(0, tokens.shape[1], width):
            part = tokens[:, start : start + width]
            here = None if lengths is None else (lengths - start).clamp(0, part.shape[1])
            opens = None if call["opens"] is None else call["opens"][:, start : start + width]
            out = self.network.trunk(part, past, lengths=here, depth=call["depth"], think=call["think"], opens=opens)
            parts.append(out.hidden)
            signals.append(out.signals)
            if start + width < tokens.shape[1]:
                past = out.state
        return Reading(torch.cat(parts, 1), torch.cat(signals, 1), out)

    def _uncertainty(self, found: Reading, packed: Packed, logits: Tensor, keep: int | Tensor) -> Tensor | None:
        """Return the uncertainty of the columns that are kept; None in training, where nobody reads it."""
        doubt = self.network.idea("uncertainty")
        if doubt is None or self.training:
            return None
        hidden, signals = (_columns(packed.unpack(each), keep) for each in (found.hidden_BTD, found.signals_BT3))
        return doubt(hidden, logits, signals)

    def prepare_inputs_for_generation(
        self,
        input_ids: Tensor,
        next_sequence_length: int | None = None,
        attention_mask: Tensor | None = None,
        is_first_iteration: bool = False,
        opens: Tensor | None = None,
        **kwargs: Any,
    ) -> dict[str, Any]:
        """Return the arguments of `forward` for the next pass of `generate`.

        As in LEPTON's own `generate`, the last token of a prompt opens new thoughts, which have seen all of it; a
        prompt of one token opens none.
        """
        # The name `kwargs` tells transformers that `generate` takes whatever `forward` does.
        if next_sequence_length is not None:
            input_ids = input_ids[:, -next_sequence_length:]
        columns = input_ids.shape[1]
        if is_first_iteration and opens is None:
            holds = torch.ones_like(input_ids) if attention_mask is None else attention_mask[:, -columns:]
            opens = torch.zeros_like(input_ids, dtype=torch.bool)
            opens.scatter_(1, _last(holds), holds.sum(1, keepdim=True) > 1)
        elif opens is not None:  # what was opened in the prompt, where there is no cache and it is read again
            added = columns - opens.shape[1]
            opens = torch.nn.functional.pad(opens, (0, added)) if added >= 0 else None
        given = {name: value for name, value in kwargs.items() if name != "labels"}
        return {"input_ids": input_ids, "attention_mask": attention_mask, "opens": opens, **given}

    def _update_model_kwargs_for_generation(self, outputs: Any, model_kwargs: dict[str, Any], **options: Any) -> Any:
        """Hand on what was opened, for passes without a cache."""
        kwargs = super()._update_model_kwargs_for_generation(outputs, model_kwargs, **options)
        return kwargs if kwargs.get("opens") is not None else kwargs | {"opens": outputs.opens}

    def _prefill(self, input_ids: Tensor, generation_config: Any, *arguments: Any, **options: Any) -> Any:
        """Read a prompt in one call: `forward` reads long ones in parts, and only its last token opens thoughts."""
        in_one = copy.copy(generation_config)
        in_one.prefill_chunk_size = None
        return super()._prefill(input_ids, in_one, *arguments, **options)

    def _prepare_cache_for_generation(self, generation_config: Any, model_kwargs: dict[str, Any], *rest: Any) -> None:
        """Give `generate` a cache of this model where the caller gave none."""
        if generation_config.cache_implementation is not None:
            raise InputError(
                f"cache_implementation={shown(generation_config.cache_implementation)}: the model has a cache of its "
                "own; leave it out"
            )
        if model_kwargs.get("cache") is None and generation_config.use_cache is not False:
            model_kwargs["cache"] = LeptonCache()

    @torch.no_grad()
    def _init_weights(self, _: Any) -> None:
        """Give a model that is made from a configuration its first weights. A file that lacks some is refused.

        transformers calls it for every module; the first call does it for all.
        """
        weights = self.network.state_dict(keep_vars=True)
        lacking = [name for name, value in weights.items() if not getattr(value, READY, False)]
        if 0 < len(lacking) < len(weights):
            raise InputError(f"the weights lack '{lacking[0]}' ({len(lacking)} in all): export the checkpoint again")
        if lacking:
            initialise(self.network)
            for value in weights.values():
                setattr(value, READY, True)

    def save_pretrained(self, save_directory: str | Path, is_main_process: bool = True, **options: Any) -> None:
        """Write configuration, weights, and the code that reads them; as in transformers.

        Raises:
            InputError: `push_to_hub=True`, which would leave the code behind.
        """
        if options.get("push_to_hub"):
            raise InputError("push_to_hub=True: save first, then call model.push_to_hub(name): it takes the code")
        super().save_pretrained(save_directory, is_main_process, **options)
        if is_main_process and Path(save_directory).is_dir():
            write_code(save_directory)

    @classmethod
    def register_for_auto_class(cls, auto_class: str = "AutoModel") -> None:
        """Do nothing: `save_pretrained` writes the code by itself."""

    def get_input_embeddings(self) -> torch.nn.Module:
        """Return the embedding, which is also the head's matrix."""
        return self.network.embed

    def set_input_embeddings(self, value: Any) -> None:
        """Raise InputError: the vocabulary is part of the shape."""
        raise InputError("the embedding cannot be replaced: train a model with another tokenizer instead")

    def resize_token_embeddings(self, new_num_tokens: int | None = None, *_: Any, **__: Any) -> torch.nn.Module:
        """Return the embedding. Raises InputError for another number of tokens than the model has."""
        if new_num_tokens not in (None, self.config.vocab_size):
            raise InputError(
                f"resize_token_embeddings({new_num_tokens}): the model has {self.config.vocab_size} ids; "
                "train a model with another tokenizer instead"
            )
        return self.network.embed

    def _set_gradient_checkpointing(self, enable: bool = True, *_: Any, **__: Any) -> None:
        """Let a backward pass recompute the blocks, or not."""
        self.network.checkpoint_activations = enable


def _checked(others: dict[str, Any], cache: Any, config: LeptonHFConfig) -> dict[str, Any]:
    """Return the arguments of `forward` without a name of their own in its signature, filled in."""
    for name, value in others.items():
        if name in LACKING and value is not None and value is not False:
            raise InputError(f"{name}: {LACKING[name]}")
        if name not in (*LACKING, *TAKEN):
            raise TypeError(f"forward() has no argument {name!r}{nearest(name, TAKEN)}")
    asked: dict[str, Any] = {
        name: getattr(config, name) for name in ("use_cache", "return_dict", "output_hidden_states")
    }
    asked |= {"num_items_in_batch": None, "cache": cache if cache is not None else others.get("past_key_values")}
    asked |= {name: value for name, value in others.items() if value is not None}
    if asked["cache"] is not None and not isinstance(asked["cache"], LeptonCache):
        raise InputError(f"cache of type {type(asked['cache']).__name__}: give the cache of an earlier pass")
    return asked


def _columns(value_BTX: Tensor, keep: int | Tensor) -> Tensor:
    """Return the last `keep` columns, or those with the indices `keep`; all for 0."""
    return value_BTX[:, -keep:] if isinstance(keep, int) else value_BTX[:, keep]


def _last(holds_BT: Tensor) -> Tensor:
    """Return the last column of each row that holds a token [B, 1]; 0 if none does."""
    index_T = torch.arange(holds_BT.shape[1], device=holds_BT.device)
    return (index_T * (holds_BT > 0)).amax(1, keepdim=True)
