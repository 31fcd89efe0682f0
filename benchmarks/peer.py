"""The dense peer of a size: a Llama of `transformers`, trained at that library's best setting.

Autocast to bf16 over fp32 weights, as the library's `Trainer` does with `bf16=True`: weights in bf16 would be faster
still, but small updates vanish in them. Attention by `sdpa`, tied embeddings, the loss of its own `labels=` path, fused
AdamW, and on a GPU `torch.compile`. Its vocabulary is padded as LEPTON's is, because matrix units like that.
"""

import importlib
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.training import DEFAULTS, Training, nats_of, shares
from lepton.config import LeptonConfig
from lepton.data.shards import Batch
from lepton.errors import InputError
from lepton.model.size_config import WIDTH_STEP, count_params, size_config
from lepton.ops.query_blocks import computed_pairs
from lepton.runtime.device import pick_dtype

VARIANTS = {
    "peer": "as wide and as deep as LEPTON, and of as many parameters",
    "wide_peer": "the same, but as if LEPTON's embedding were not factorised: blocks of as many parameters",
}
"""Where the embedding at full width leaves no parameters for an MLP (NANO), `peer` is as wide as LEPTON's embedding."""

MODES = {"plain": None, "compiled": "default", "recorded": "reduce-overhead"}
"""What `torch.compile` is told; the last records CUDA graphs."""


def load_transformers() -> Any:
    """Return the library, which nothing but the peer needs.

    Raises:
        InputError: it is not installed.
    """
    try:
        return importlib.import_module("transformers")
    except ImportError as error:
        raise InputError(f"a peer needs `pip install transformers` ({error})") from error


def peer_shape(size: str, variant: str) -> dict[str, int]:
    """Return the fields of a `LlamaConfig` that decide the parameters of the peer of a LEPTON size.

    Raises:
        InputError: an unknown size.
    """
    complete = size_config(size)
    target = count_params(complete)
    widths = [complete.width, complete.embed_rank or complete.width]
    if variant == "wide_peer":
        target += complete.padded_vocab_size * (widths[0] - widths[1])
    # The first width whose MLP would not be narrower than the residual stream.
    width = next((width for width in widths if _ffn(complete, width, target) >= width), widths[-1])
    heads, kv_heads = _heads(complete, width)
    return {
        "vocab_size": complete.padded_vocab_size,
        "hidden_size": width,
        "intermediate_size": max(WIDTH_STEP, _ffn(complete, width, target)),
        "num_hidden_layers": complete.layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": complete.head_dim,
    }


def _heads(complete: LeptonConfig, width: int) -> tuple[int, int]:
    """Query and key/value heads of LEPTON's head width that fill a width: LEPTON's own where that is its width."""
    heads = width // complete.head_dim
    return heads, math.gcd(heads, complete.kv_heads)


def _ffn(complete: LeptonConfig, width: int, target: int) -> int:
    """Hidden width of the gated MLPs that bring a Llama of this width to `target` parameters."""
    heads, kv_heads = _heads(complete, width)
    attention = width * complete.head_dim * 2 * (heads + kv_heads)
    norms = 2 * width
    missing = target - complete.padded_vocab_size * width - complete.layers * (attention + norms) - width
    return WIDTH_STEP * round(missing / (3 * width * complete.layers * WIDTH_STEP))


class PeerTraining(Training):
    """A Llama in training. Matrices decay by 0.1 x rate; gradients are clipped to norm 1."""

    def __init__(self, size: str, variant: str, way: str, device: torch.device, *, seed: int = 0) -> None:
        super().__init__(device, seed)
        transformers = load_transformers()
        self.shape, self.way = peer_shape(size, variant), way
        config = transformers.LlamaConfig(
            **self.shape, tie_word_embeddings=True, use_cache=False, bos_token_id=0, eos_token_id=0
        )
        torch.manual_seed(seed)
        model = transformers.AutoModelForCausalLM.from_config(
            config, attn_implementation="sdpa", dtype=torch.float32
        ).to(device)
        self.model: nn.Module = model.train()
        self.parameters = list(self.model.parameters())
        self.dtype = pick_dtype("auto", device)
        self.rate = DEFAULTS.lr
        """Peak rate; it may be changed before a step."""
        groups = [
            {"params": [each for each in self.parameters if each.ndim >= 2], "weight_decay": 0.1},
            {"params": [each for each in self.parameters if each.ndim < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=self.rate, betas=(0.9, 0.95), fused=True)

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.parameters)

    def flops_per_token(self, length: int) -> float:
        """As `training_flops_per_token` counts a dense model."""
        matrices = sum(parameter.numel() for parameter in self.parameters if parameter.ndim == 2)
        pairs = computed_pairs(length, None)
        heads = self.shape["num_hidden_layers"] * self.shape["num_attention_heads"] * self.shape["head_dim"]
        return 3 * 2 * (matrices + 2 * heads * pairs / length)

    def compile(self, rows: int, length: int) -> None:
        mode = MODES[self.way]
        if mode is not None:
            self.model.compile(mode=mode, dynamic=False)
        if self.way == "recorded":
            # A replay overwrites what it returned before, so gradients need a place of their own.
            for parameter in self.parameters:
                parameter.grad = torch.zeros_like(parameter)

    def step(self, batches: Sequence[Batch], index: int, scale: float) -> dict[str, Tensor]:
        total = torch.zeros((), device=self.device)
        for batch, share in zip(batches, shares(batches), strict=True):
            if self.way == "recorded":
                torch.compiler.cudagraph_mark_step_begin()
            tokens_BT, targets_BT = map(self._on_device, inputs_and_targets(batch))
            with self._autocast():  # `labels` only ask for a loss: those that are shifted already count
                loss = self.model(input_ids=tokens_BT, labels=targets_BT, shift_labels=targets_BT).loss
            (loss * share).backward()
            total += loss.detach() * share
        norm = nn.utils.clip_grad_norm_(self.parameters, 1.0)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate * scale
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=self.way != "recorded")
        return {"loss": total, "grad_norm": norm}

    def nats(self, batch: Batch) -> Tensor:
        """As in `Training`, without the compiler; logits are those of one row at a time."""
        tokens_BX = batch.tokens.to(self.device)
        head = self.model.get_output_embeddings()
        with self._autocast():
            hidden_BTD = self.model.base_model(input_ids=tokens_BX[:, :-1]).last_hidden_state
            return torch.stack([
                nats_of(head(hidden), row, length)
                for hidden, row, length in zip(hidden_BTD, tokens_BX, batch.lengths.tolist(), strict=True)
            ])  # fmt: skip

    def optimizer_states(self) -> Iterator[dict[str, Tensor]]:
        yield from self.optimizer.state.values()

    def _autocast(self) -> torch.autocast:
        return torch.autocast(self.device.type, self.dtype, enabled=self.dtype != torch.float32)

    def _on_device(self, value: Tensor) -> Tensor:
        if self.device.type == "cuda":
            return value.pin_memory().to(self.device, non_blocking=True)
        return value


def inputs_and_targets(batch: Batch) -> tuple[Tensor, Tensor]:
    """Return tokens [B, T] and what follows each [B, T]: -100, which no loss counts, beyond a row's valid tokens."""
    targets_BT = batch.tokens[:, 1:]
    beyond_BT = torch.arange(1, batch.tokens.shape[1]) >= batch.lengths[:, None]
    return batch.tokens[:, :-1].contiguous(), targets_BT.masked_fill(beyond_BT, -100)
