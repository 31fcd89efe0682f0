"""nanochat's model in training, by its own recipe: model, optimizer, schedules and scaling rules are its own code.

Its code is not part of LEPTON (`git clone https://github.com/karpathy/nanochat`, MIT licence); the folder is named by
`NANOCHAT_DIR`. What its training script computes from flags is repeated here: rates, momentum and weight decay by step
(scripts/base_train.py of July 2026). Attention is full, by PyTorch's SDPA. Gradients are not clipped, as there.
"""

import importlib
import math
import os
import sys
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from benchmarks.peer import inputs_and_targets
from benchmarks.training import Training, nats_of
from lepton.data.shards import Batch
from lepton.errors import InputError

SHAPES = {"nanochat_d10": (10, False), "nanochat_d12": (12, False), "nanochat_d12_ve": (12, True)}
"""Depth (it is 64 times as wide), and whether there are value embeddings."""
WARMUP, COOLDOWN, FINAL = 40, 0.65, 0.05
TOKENS_PER_WEIGHT, BATCH, DECAY = 12, 2**19, 0.28
"""What its rates and its weight decay are tuned for: a depth of 12, so many tokens a weight and a step."""
RATES = {"unembedding_lr": 0.008, "embedding_lr": 0.3, "scalar_lr": 0.5, "matrix_lr": 0.02}


def load_nanochat() -> Any:
    """Return its module `gpt`.

    Raises:
        InputError: NANOCHAT_DIR names no folder that holds it.
    """
    folder = os.environ.get("NANOCHAT_DIR", "")
    if folder and folder not in sys.path:
        sys.path.append(folder)
    try:
        return importlib.import_module("nanochat.gpt")
    except ImportError as error:
        raise InputError(f"NANOCHAT_DIR={folder!r} must name a clone of karpathy/nanochat ({error})") from error


class NanochatTraining(Training):
    """A nanochat in training, at `rate` times its peak rates; by its own rule that is sqrt(tokens a step / 2^19)."""

    def __init__(self, name: str, vocabulary: int, length: int, device: torch.device, *, seed: int = 0) -> None:
        super().__init__(device, seed)
        gpt, self.on_gpu = load_nanochat(), device.type == "cuda"
        depth, with_values = SHAPES[name]
        gpt.has_ve = lambda layer, layers: with_values and layer % 2 == (layers - 1) % 2  # its own rule, or none
        heads = depth // 2
        config = gpt.GPTConfig(
            sequence_len=length, vocab_size=vocabulary, n_layer=depth, n_head=heads, n_kv_head=heads,
            n_embd=64 * depth, window_pattern="L",
        )  # fmt: skip
        torch.manual_seed(seed)
        self.model = gpt.GPT(config)
        self.model.init_weights()
        self.model.to(device).train()
        with torch.device("meta"):
            tuned = gpt.GPT(gpt.GPTConfig(vocab_size=vocabulary, n_layer=12, n_head=6, n_kv_head=6, n_embd=768))
        counts = tuned.num_scaling_params()
        self.tuned_tokens = TOKENS_PER_WEIGHT * (counts["transformer_matrices"] + counts["lm_head"])
        self.optimizer = self.model.setup_optimizer(**RATES)
        self.rate, self.rows, self.length = 1.0, 0, length

    @property
    def params(self) -> int:
        return sum(parameter.numel() for parameter in self.model.parameters())

    def flops_per_token(self, length: int) -> float:
        return self.model.estimate_flops()

    def compile(self, rows: int, length: int) -> None:
        self.rows = rows
        self.forward = torch.compile(self.model, dynamic=False) if self.on_gpu else self.model

    def schedule(self, step: int, steps: int) -> float:
        """Set momentum and weight decay of a step; return its share of the peak rates."""
        tokens = self.rows * self.length
        # Rate x decay x steps stays what it is tuned to be.
        decay = DECAY * (tokens / BATCH) / self.rate * self.tuned_tokens / (steps * tokens)
        cooldown = round(COOLDOWN * steps)
        done = max(0.0, (step - (steps - cooldown)) / cooldown)
        momentum = 0.97 - 0.07 * done if done or step >= 400 else 0.85 + 0.12 * step / 400
        for group in self.optimizer.param_groups:
            if group["kind"] == "muon":
                group["momentum"] = momentum
                group["weight_decay"] = decay * 0.5 * (1 + math.cos(math.pi * step / steps))
        return (step + 1) / WARMUP if step < WARMUP else 1 - done * (1 - FINAL)

    def step(self, batches: Sequence[Batch], index: int, scale: float) -> dict[str, Tensor]:
        """As in `Training`, of one micro-batch and without the gradient's norm, which nanochat does not compute."""
        (batch,) = batches
        tokens_BT, targets_BT = inputs_and_targets(batch)
        targets_BT = targets_BT.masked_fill(targets_BT < 0, -1)
        loss = self.forward(*(each.to(self.device, non_blocking=True) for each in (tokens_BT, targets_BT)))
        loss.backward()
        for group in self.optimizer.param_groups:
            group["lr"] = group["initial_lr"] * self.rate * scale
        self.optimizer.step()
        self.model.zero_grad(set_to_none=True)
        return {"loss": loss.detach()}

    def nats(self, batch: Batch) -> Tensor:
        """As in `Training`, without the compiler, a row at a time."""
        tokens_BX = batch.tokens.to(self.device)
        return torch.stack([
            nats_of(self.model(row[None, :-1])[0], row, length)
            for row, length in zip(tokens_BX, batch.lengths.tolist(), strict=True)
        ])  # fmt: skip

    def optimizer_states(self) -> Iterator[dict[str, Tensor]]:
        yield from ()

    def restart(self) -> None:
        super().restart()
        self.optimizer.state.clear()
