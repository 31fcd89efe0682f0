"""Optimizers: Muon for the matrices of blocks, AdamW for all other parameters.

Muon (Jordan et al. 2024, https://kellerjordan.github.io/posts/muon/) replaces a matrix's momentum by the nearest
orthogonal matrix. Its update has spectral norm of about sqrt(max(1, rows / columns)) x rate whatever the width, so one
rate serves all sizes. Each row of an update (each column of a wide one) is then divided by a running mean of its size,
and the norm of the whole is restored (NorMuon, arXiv 2510.05491).

A step of both is some hundred kernels, which a GPU's host takes longer to launch than the GPU to run. So on a GPU the
step is captured as a CUDA graph and replayed in one launch.
"""

import math
import warnings
from collections.abc import Callable, Hashable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard

from lepton.errors import InputError, naming, reason
from lepton.model.parameters import Declared, declared
from lepton.runtime.cuda_graphs import CudaGraphs
from lepton.tensors import compare
from lepton.train.sharding import like

BETAS = (0.8, 0.96)
EPS = 1e-10
"""Far below the gradients of rare tokens' embeddings, which a usual 1e-8 would slow down."""
MOMENTUM = 0.95
SECOND_MOMENT = 0.9
"""Share of the past in the running second moments of Muon's updates."""

STACKED = 2**25
"""Matrix elements that are orthogonalised at once; this bounds the memory of the copies."""

Parameters = list[tuple[str, nn.Parameter, Declared]]


def split_parameters(model: nn.Module) -> tuple[Parameters, Parameters]:
    """Return the trainable parameters of `model` that Muon takes, and the rest, each with its declaration."""
    entries = declared(model)
    trained = [(name, each, entries[name]) for name, each in model.named_parameters() if each.requires_grad]
    muon = [item for item in trained if item[2].optimizer == "muon"]
    return muon, [item for item in trained if item[2].optimizer != "muon"]


class BatchedMuon(torch.optim.Muon):
    """`torch.optim.Muon` in a few large kernels: matrices of one shape are orthogonalised together.

    One by one, their kernels take a GPU's host longer to launch than the GPU to run. Options are those of the base
    class, with its usual adjustment of the rate and Nesterov momentum; second moments are added to its state. Gradients
    are overwritten. A group's `lr` is a number, or a tensor without dimensions on the matrices' device, which is then
    read there.
    """

    dtype = torch.bfloat16
    """What matrices are orthogonalised in."""
    mesh: DeviceMesh | None = None
    """The processes that share the work: each orthogonalises its part of the matrices. Those are equal in all of them,
    or sharded by rows over the last dimension of the mesh."""

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Update the parameters."""
        assert closure is None
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            for matrices in _alike([matrix for matrix in group["params"] if matrix.grad is not None], self._sharers):
                for matrix in matrices:
                    if not self.state[matrix]:
                        self.state[matrix]["momentum_buffer"] = torch.zeros_like(matrix)
                        self.state[matrix]["row_moments"] = row_moments(matrix)
                gradients = [local(matrix.grad) for matrix in matrices if matrix.grad is not None]
                averages = [local(self.state[matrix]["momentum_buffer"]) for matrix in matrices]
                moments = [self.state[matrix]["row_moments"] for matrix in matrices]
                torch._foreach_lerp_(averages, gradients, 1 - momentum)
                torch._foreach_lerp_(gradients, averages, momentum)
                update = self._direction(torch.stack(gradients), moments, group, matrices[0])
                rows, columns = matrices[0].shape
                update.mul_(-lr * math.sqrt(max(1, rows / columns)))
                mine = [local(matrix) for matrix in matrices]
                torch._foreach_mul_(mine, 1 - lr * group["weight_decay"])
                torch._foreach_add_(mine, update.unbind())

    @property
    def _sharers(self) -> int:
        return 1 if self.mesh is None else self.mesh.size(-1)

    def _direction(self, stack: Tensor, moments: list[Tensor], group: dict[str, Any], like: Tensor) -> Tensor:
        """Return the updates of a stack of averages before the rate; `moments` take them up.

        With a mesh, `stack` is this process's part of matrices such as `like`: all of them, or some of their rows. It
        changes places so that each process has some matrices whole, and back.
        """
        options = self.dtype, group["ns_coefficients"], group["ns_steps"], group["eps"]
        if self.mesh is None:
            return evened(orthogonal(stack, *options), moments)
        shape = torch.Size([len(stack), *like.shape])
        whole = _spread(stack, self.mesh, Shard(1) if isinstance(like, DTensor) else Replicate(), shape)
        own = _mine(whole)
        all_moments = _spread(torch.stack(moments), self.mesh, Replicate())
        own_moments = _mine(all_moments).clone()
        if len(own):
            own = evened(orthogonal(own, *options), list(own_moments.unbind()))
        mixed = _spread(own_moments, self.mesh, Shard(0), all_moments.shape).redistribute(
            placements=all_moments.placements
        )
        torch._foreach_copy_(moments, mixed.to_local().unbind())
        return _spread(own, self.mesh, Shard(0), shape).redistribute(placements=whole.placements).to_local()


def local(tensor: Tensor) -> Tensor:
    """Return this process's part of a sharded tensor; any other is returned as it is."""
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def _spread(part: Tensor, mesh: DeviceMesh, placement: Placement, shape: torch.Size | None = None) -> DTensor:
    """Return the tensor of `shape` of which each process of the mesh's last dimension has a part."""
    placements = [*[Replicate()] * (mesh.ndim - 1), placement]
    shape = part.shape if shape is None else shape
    stride = torch.empty(shape, device="meta").stride()
    return DTensor.from_local(part.contiguous(), mesh, placements, run_check=False, shape=shape, stride=stride)


def _mine(stack: DTensor) -> Tensor:
    """Return those matrices of a stack that this process takes, whole."""
    return stack.redistribute(placements=[*stack.placements[:-1], Shard(0)]).to_local()


def orthogonal(
    stack: Tensor, dtype: torch.dtype, coefficients: tuple[float, float, float], steps: int, eps: float
) -> Tensor:
    """Return about the nearest orthogonal matrix of each of a stack, by Newton-Schulz iterations in `dtype`.

    Singular values come out between about 0.5 and 1.5, which serves as well as exactly 1.
    """
    a, b, c = coefficients
    wide = stack.shape[1] <= stack.shape[2]
    x = (stack if wide else stack.mT).to(dtype)
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp(min=eps)
    for _ in range(steps):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return (x if wide else x.mT).to(stack.dtype)


def row_moments(matrix: Tensor) -> Tensor:
    """Return zeros for the second moments of the rows of `matrix` [rows, 1], or of its columns where it is wide."""
    rows, columns = matrix.shape
    return local(matrix).new_zeros((rows, 1) if rows >= columns else (1, columns))


def evened(stack: Tensor, moments: list[Tensor]) -> Tensor:
    """Divide each row of the matrices of a stack (column, where they are wide) by a running mean of its size.

    The Frobenius norm of each matrix stays. `moments`, one of `row_moments` for each, take up those of the stack.
    """
    axis = -1 if moments[0].shape[1] == 1 else -2
    torch._foreach_lerp_(moments, stack.square().mean(axis, keepdim=True).unbind(), 1 - SECOND_MOMENT)
    divided = stack * torch.stack(moments).clamp_min(1e-10).rsqrt()
    before, after = (each.norm(dim=(-2, -1), keepdim=True) for each in (stack, divided))
    return divided * (before / after.clamp_min(1e-6))


class Optimizers:
    """The optimizers of one run behind one `step`; `kind` is 'muon' (with AdamW for the rest) or 'adamw' (only AdamW).

    A matrix shrinks by weight_decay x lr per step under either optimizer; embedding and vectors do not decay. On a GPU
    steps are captured and replayed, unless `captured` is False; their results are the same. The processes of `mesh`
    share Muon's work; parameters that are sharded over them are not captured.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        kind: str,
        lr: float,
        muon_lr: float,
        weight_decay: float,
        captured: bool = True,
        mesh: DeviceMesh | None = None,
    ) -> None:
        muon, rest = split_parameters(model)
        if kind == "adamw":
            muon, rest = [], muon + rest
        self.kind = kind
        both = muon + rest
        self._trunk = [parameter for _, parameter, entry in both if not entry.auxiliary]
        self._auxiliary = [parameter for _, parameter, entry in both if entry.auxiliary]
        self._device = both[0][1].device
        sharded = any(isinstance(parameter, DTensor) for parameter in self._trunk)
        on_gpu = self._device.type == "cuda" and not sharded
        self._members: dict[str, torch.optim.Optimizer] = {}
        if rest:
            self._members["adamw"] = torch.optim.AdamW(
                _groups(rest, weight_decay),
                lr=lr,
                betas=BETAS,
                eps=EPS,
                fused=on_gpu or self._device.type == "cpu" or sharded,
                capturable=on_gpu,
            )
        if muon:
            groups = _groups(muon, weight_decay * lr / muon_lr)
            batched = BatchedMuon(groups, lr=muon_lr, momentum=MOMENTUM, adjust_lr_fn="original")
            # A run in fp32 gets fp32 here too: bf16 would amplify the smallest differences between runs.
            own = getattr(model, "dtype", None)
            batched.dtype = own if own in (torch.float32, torch.float64) else torch.bfloat16
            batched.mesh = mesh
            self._members["muon"] = batched
        self._peak = {"adamw": lr, "muon": muon_lr}
        if on_gpu:  # rates lie there, captured or not, so that both ways round them alike
            for member in self._members.values():
                for group in member.param_groups:
                    group["lr"] = torch.zeros((), dtype=torch.float32, device=self._device)
        self._capture = captured and on_gpu
        self._own = CudaGraphs(self._device)
        self._state = object()
        """Changes when the state is replaced, so that graphs of the old state are not replayed."""
        self._asked: Hashable = None
        """Key of the last update: the clipping, and the addresses of state and gradients."""

    def step(self, scale: float, grad_clip: float, graphs: CudaGraphs | None = None) -> Tensor:
        """Update at `scale` times the peak rates and set the gradients to zero.

        Returns the norm of the trunk's gradients before clipping.

        Args:
            scale: what the schedule says.
            grad_clip: norm to which gradients are clipped, the trunk's and the others' each on their own.
            graphs: those whose memory the update shares, such as `MicroStep.graphs`; None takes memory of its own.
        """
        for name, member in self._members.items():
            for group in member.param_groups:
                rate = self._peak[name] * group["rate"] * scale
                if isinstance(group["lr"], Tensor):
                    group["lr"].fill_(rate)
                else:
                    group["lr"] = rate
        norm = self._replayed(grad_clip, graphs or self._own) if self._capture else None
        return self._update(grad_clip) if norm is None else norm

    @torch.no_grad()
    def _update(self, grad_clip: float) -> Tensor:
        """Update at the groups' rates; `step` captures this."""
        norm = nn.utils.clip_grad_norm_(self._trunk, grad_clip)
        apart = nn.utils.clip_grad_norm_(self._auxiliary, grad_clip)
        for member in self._members.values():
            member.step()
        if gradients := [each.grad for each in self._trunk + self._auxiliary if each.grad is not None]:
            torch._foreach_zero_([local(each) for each in gradients])
        norm, apart = (each.full_tensor() if isinstance(each, DTensor) else each for each in (norm, apart))
        # A norm that is not finite in either group makes the result not finite, and the run stops.
        return norm + 0 * apart

    def _replayed(self, grad_clip: float, graphs: CudaGraphs) -> Tensor | None:
        """Replay an update, capturing it first if it is the same as the last one; None if it has to run eagerly.

        It runs eagerly whenever it differs from the last one, in `grad_clip` or in where state and gradients lie: that
        creates state and loads kernels, which is impossible during a capture.
        """
        places = [None if each.grad is None else each.grad.data_ptr() for each in self._trunk + self._auxiliary]
        key = (self._state, grad_clip, *places)
        if key not in graphs:
            if key != self._asked:
                self._asked = key
                return None
            try:
                graphs.capture(key, lambda: self._update(grad_clip))
            except torch.OutOfMemoryError:
                raise
            except Exception as error:  # of many types; none should stop a run that works without
                warnings.warn(
                    f"cannot capture the optimizers' step here ({reason(error)}): going on without, which runs slower",
                    RuntimeWarning,
                    stacklevel=3,
                )
                self._capture = False
                return None
        norm: Tensor = graphs.replay(key).clone()
        return norm

    def state_dict(self) -> dict[str, Any]:
        """Return what resuming needs; rates and other hyperparameters are not part of it."""
        states = {name: member.state_dict()["state"] for name, member in self._members.items()}
        return {"kind": self.kind, "states": states}

    def load_state_dict(self, saved: Mapping[str, Any]) -> None:
        """Load the `state_dict` of an instance of the same kind on the same model.

        Raises:
            InputError: names, shapes, dtypes or numbers do not fit this model; then nothing is loaded.
        """
        assert saved["kind"] == self.kind
        if saved["states"].keys() != self._members.keys():
            raise InputError(f"the optimizer's state has {sorted(map(str, saved['states']))}, not {[*self._members]}")
        for name, member in self._members.items():
            with naming(f"state of {name}"):
                _check_states(saved["states"][name], member)
        for name, member in self._members.items():
            own = member.state_dict()["param_groups"]
            parameters = [parameter for group in member.param_groups for parameter in group["params"]]
            states = {
                number: {
                    key: value if key == "row_moments" else like(value, parameters[number])
                    for key, value in state.items()
                }
                for number, state in saved["states"][name].items()
            }
            member.load_state_dict({"state": states, "param_groups": own})
        self._state = object()


def _check_states(states: Any, member: torch.optim.Optimizer) -> None:
    """Raise InputError unless `states` fit the parameters of `member` by number, or are empty (no step was done)."""
    parameters = [parameter for group in member.param_groups for parameter in group["params"]]
    if not isinstance(states, Mapping) or (states and states.keys() != set(range(len(parameters)))):
        raise InputError(f"it must be that of parameters 0..{len(parameters) - 1}")
    for number, state in states.items():
        parameter = parameters[number]
        wanted = {"momentum_buffer": parameter}
        if isinstance(member, BatchedMuon):
            wanted["row_moments"] = row_moments(parameter)
        if isinstance(member, torch.optim.AdamW):
            wanted = {"step": torch.zeros(()), "exp_avg": parameter, "exp_avg_sq": parameter}
        if not isinstance(state, Mapping):
            raise InputError(f"parameter {number} has {type(state).__name__} instead of named tensors")
        with naming(f"parameter {number}"):
            compare(state, wanted)
            for name in ("step", "exp_avg_sq", "row_moments"):  # they only ever add squares and ones
                if name in wanted and state[name].numel() and state[name].min() < 0:
                    raise InputError(f"'{name}' holds numbers below 0")


def _groups(parameters: Parameters, weight_decay: float) -> list[dict[str, Any]]:
    """Return groups of parameters that learn alike, the fastest first."""
    members: dict[tuple[float, bool, float | None], list[tuple[str, nn.Parameter]]] = {}
    for name, parameter, entry in sorted(parameters, key=lambda each: (-each[2].rate, not each[2].decays)):
        members.setdefault((entry.rate, entry.decays, entry.eps), []).append((name, parameter))
    return [
        {"params": each, "rate": rate, "weight_decay": decays * weight_decay} | ({} if eps is None else {"eps": eps})
        for (rate, decays, eps), each in members.items()
    ]


def _alike(matrices: list[Tensor], sharers: int) -> Iterator[list[Tensor]]:
    """Yield the matrices in groups of one shape, of at most STACKED numbers for each of the `sharers` of the work.

    That is at least one matrix for each.
    """
    shapes: dict[torch.Size, list[Tensor]] = {}
    for matrix in matrices:
        shapes.setdefault(matrix.shape, []).append(matrix)
    for shape, group in shapes.items():
        at_once = sharers * max(1, STACKED // shape.numel())
        for first in range(0, len(group), at_once):
            yield group[first : first + at_once]
