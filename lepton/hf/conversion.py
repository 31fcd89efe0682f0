"""A model of LEPTON as one of transformers, and back."""

from pathlib import Path
from typing import Any

from transformers import PreTrainedTokenizerFast

from lepton import checkpoint
from lepton.api import Lepton
from lepton.data.tokenizer import Tokenizer
from lepton.hf.configuration import LeptonHFConfig
from lepton.hf.modeling import LeptonForCausalLM
from lepton.model import Network
from lepton.model.weights import on_meta_device


def from_lepton(model: Network, **fields: Any) -> LeptonForCausalLM:
    """Return `model` behind the interface of transformers, in eval mode. Both have the same tensors.

    `fields` are those of `LeptonHFConfig`, such as `pad_token_id`.
    """
    with on_meta_device():
        wrapped = LeptonForCausalLM(LeptonHFConfig(lepton=model.config.to_dict(), dtype=model.dtype, **fields))
    wrapped.network.load_state_dict(dict(model.state_dict(keep_vars=True)), assign=True)
    return wrapped.eval()


def to_lepton(wrapped: LeptonForCausalLM) -> Lepton:
    """Return the model of LEPTON inside `wrapped`, with the same tensors, in eval mode.

    It generates with drafts.
    """
    with on_meta_device():
        model = Lepton(wrapped.network.config)
    model.load_state_dict(dict(wrapped.network.state_dict(keep_vars=True)), assign=True)
    return model.eval()


def save_checkpoint(
    wrapped: LeptonForCausalLM, path: str | Path, tokenizer: PreTrainedTokenizerFast | None = None
) -> None:
    """Write a file that every command of LEPTON reads, such as after training by `Trainer`.

    Args:
        wrapped: the model.
        path: the file; weights alone, as .safetensors or .pt.
        tokenizer: that of the exported folder, so that the file carries it, too.

    Raises:
        InputError: the file cannot be written, or the tokenizer is not LEPTON's.
    """
    model = to_lepton(wrapped)
    text = None if tokenizer is None else Tokenizer.from_json(tokenizer.backend_tokenizer.to_str()).to_json()
    about = {"config": model.config.to_dict(), "size": None, "step": 0, "tokenizer": text}
    checkpoint.save(path, {"model": dict(model.state_dict()), **about})
