"""Weights, gradients and optimizer state that several processes share, for models that one card cannot hold.

PyTorch's FSDP2 (https://docs.pytorch.org/docs/stable/distributed.fsdp.fully_shard.html), a block at a time. Each
process has an equal share of the rows of each matrix. A block's matrices are gathered before it runs, in the dtype of
the activations; its gradients are added up in fp32, and scattered, after its backward pass. What is in no block
(embedding, ideas, head) is gathered in fp32, once a pass. With several hosts, each host has all shares (HSDP).
"""

import warnings
from typing import Any

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard, register_fsdp_forward_method
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.utils import _pytree

from lepton.model import Network
from lepton.model.attention import Slots
from lepton.model.objective import Loss

SEEN_BY_HOOKS = (Slots, Loss)
"""What blocks take and the loss gives. Versions of FSDP that look into no dataclass find the tensors in these because
pytree knows them. Otherwise they may scatter a block's gradients before those that come through slots are there."""


def shard(model: Network, mesh: DeviceMesh) -> None:
    """Shard the parameters of `model`, in place; they move to the device of `mesh`, a block at a time.

    `Network.loss` then runs in all processes at once. Its gradients are the sums over the processes.
    """
    for each in SEEN_BY_HOOKS:
        if each not in _pytree.SUPPORTED_NODES:
            _pytree.register_dataclass(each)
    half = model.dtype if model.dtype.itemsize < torch.float32.itemsize else None
    policy = MixedPrecisionPolicy(half, torch.float32 if half else None, cast_forward_inputs=False)
    for block in [*model.stem, *model.blocks]:
        fully_shard(block, mesh=mesh, mp_policy=policy)
    fully_shard(model, mesh=mesh, mp_policy=MixedPrecisionPolicy(cast_forward_inputs=False))
    register_fsdp_forward_method(model, "loss")
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo knows no other
    # Keys and values, which blocks return, are views of products. Nothing changes them in place.
    warnings.filterwarnings("ignore", message="FSDP2-wrapped module .* returned a view")


def gathered(value: Any, *, keep: bool) -> Any:
    """Return nested dicts and lists with every sharded tensor whole and on the CPU. All processes call this together.

    `keep` says whether this process wants the result; one that does not gets empty tensors.
    """
    if isinstance(value, DTensor):
        whole = value.full_tensor()
        return whole.cpu() if keep else whole.new_empty(0, device="cpu")
    if isinstance(value, dict):
        return {key: gathered(item, keep=keep) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(gathered(item, keep=keep) for item in value)
    return value


def like(value: Tensor, parameter: Tensor) -> Tensor:
    """Return `value`, which all processes have whole, sharded as `parameter` is."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.shape:
        return value
    mesh = parameter.device_mesh
    return distribute_tensor(value.to(mesh.device_type), mesh, parameter.placements, src_data_rank=None)
