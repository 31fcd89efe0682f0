"""A model of LEPTON as one of transformers, and back."""

from typing import Any

from lepton.api import Lepton
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

    It generates with drafts, and `lepton.checkpoint.save` writes what every command of LEPTON reads.
    """
    with on_meta_device():
        model = Lepton(wrapped.network.config)
    model.load_state_dict(dict(wrapped.network.state_dict(keep_vars=True)), assign=True)
    return model.eval()
