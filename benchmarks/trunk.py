"""Choices of the trunk at equal data: rates of the optimizers, the MLP, re-injection, value residuals, attention span.

One run trains one variant and prints a line of JSON; several may share a GPU. `--smoke` runs on a CPU in seconds.

    python -m benchmarks.trunk --data_dir D --size micro --variant base --lr 2e-3 --muon_lr 0.02 --tokens 16e6
"""

import argparse
import json
import math
import time

import torch
from torch import Tensor, nn

from lepton.data.shards import ShardedDataset
from lepton.model import block as block_module
from lepton.model.attention import Linear, Rotary, attend, norm
from lepton.model.factory import size_config
from lepton.model.lepton import Lepton
from lepton.model.output import Output
from lepton.model.timeline import Timeline, bands
from lepton.train.optimizer import Optimizers
from lepton.train.schedule import lr_scale


class SwiGLU(nn.Module):
    """Gated MLP of the same parameters: three matrices of two thirds the width (Shazeer, 2020)."""

    def __init__(self, config) -> None:
        super().__init__()
        hidden = round(config.ffn * 2 / 3 / 64) * 64
        self.up, self.gate = Linear(config.width, hidden), Linear(config.width, hidden)
        self.down = Linear(hidden, config.width)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(nn.functional.silu(self.gate(x_BTD)) * self.up(x_BTD))


class VariantTrunk(Lepton):
    """The trunk for training from a fresh past, with the open choices of the design as switches."""

    def __init__(self, config, *, reinject: bool, value_residual: bool) -> None:
        super().__init__(config)
        self.reinject = nn.Parameter(torch.zeros(config.layers)) if reinject else None
        self.value_mix = nn.Parameter(torch.zeros(config.layers)) if value_residual else None

    def trunk(self, tokens, state=None, *, lengths=None, depth=None, think=None) -> Output:
        past, lengths_B = self._check(tokens, state, lengths, depth, think)
        timeline = Timeline.read(tokens, past.position_B, self.config.eos_id)
        sight = bands(timeline, 0, self.config.window)
        rotary = Rotary(timeline.position_BT, self.config.head_dim, self.config.rope_base, self.dtype)
        x_BTD = embedded_BTD = norm(self.embed_up(self.embed(tokens).to(self.dtype)))
        first_v: Tensor | None = None
        for layer, block in enumerate([*self.stem, *self.blocks]):
            if self.reinject is not None:
                x_BTD = x_BTD + self.reinject[layer].to(x_BTD.dtype) * embedded_BTD
            attention, normed = block.attention, norm(x_BTD)
            q = rotary.rotate(norm(attention.q(normed).unflatten(-1, (attention.heads, attention.head_dim))))
            k = rotary.rotate(norm(attention.k(normed).unflatten(-1, (attention.kv_heads, attention.head_dim))))
            v = attention.v(normed).unflatten(-1, (attention.kv_heads, attention.head_dim))
            if self.value_mix is not None:
                first_v = v if first_v is None else first_v
                v = v + self.value_mix[layer].to(v.dtype) * first_v
            x_BTD = x_BTD + attention.out(attend(q, k, v, sight).flatten(2))
            x_BTD = x_BTD + block.mlp(norm(x_BTD))
        return Output(norm(x_BTD), None, lengths_B, lambda count_B: past)


def build(arguments: argparse.Namespace) -> Lepton:
    variant, overrides = arguments.variant, {}
    if variant == "swiglu":
        block_module.MLP = SwiGLU  # type: ignore[misc]
    if variant.startswith("cap"):
        overrides["logit_cap"] = float(variant[3:])
    if variant.startswith("window"):
        overrides["window"] = int(variant[6:])
    if variant == "dense":
        overrides["dense"] = True
    config = size_config(arguments.size, **overrides)
    if variant in ("reinject", "value_residual", "both"):
        return VariantTrunk(config, reinject=variant != "value_residual", value_residual=variant != "reinject")
    return Lepton(config)


@torch.no_grad()
def validate(loss, dataset: ShardedDataset, batch_size: int, device: str) -> float:
    nats = torch.zeros((), device=device, dtype=torch.float64)
    targets = 0
    for batch in dataset.batches(batch_size, limit=None):
        if len(batch.tokens) < batch_size:
            break
        count = int((batch.lengths - 1).sum())
        nats += count * loss(batch.tokens.to(device), lengths=batch.lengths.to(device)).parts["ce"].double()
        targets += count
    return nats.item() / targets


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", required=True)
    parser.add_argument("--size", default="micro")
    parser.add_argument("--variant", default="base")
    parser.add_argument("--optimizer", default="muon")
    parser.add_argument("--lr", type=float, default=6e-4)
    parser.add_argument("--muon_lr", type=float, default=0.02)
    parser.add_argument("--tokens", type=float, default=16e6)
    parser.add_argument("--batch_size", type=int, default=64)
    parser.add_argument("--seq_len", type=int, default=512)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--smoke", action="store_true")
    arguments = parser.parse_args()
    if arguments.smoke:
        arguments.size, arguments.batch_size, arguments.seq_len, arguments.tokens = "nano", 2, 64, 640
    device = "cuda" if torch.cuda.is_available() else "cpu"
    torch.manual_seed(arguments.seed)
    model = build(arguments).to(device)
    model.compute_dtype = torch.bfloat16
    loss = torch.compile(model.loss, dynamic=False) if device == "cuda" else model.loss
    common = {"seq_len": arguments.seq_len, "seed": arguments.seed, "vocab_size": model.config.vocab_size}
    data = ShardedDataset(arguments.data_dir, split="train", **common)
    optimizers = Optimizers(
        model, kind=arguments.optimizer, lr=arguments.lr, muon_lr=arguments.muon_lr, weight_decay=0.1
    )
    steps = int(arguments.tokens) // (arguments.batch_size * arguments.seq_len)
    begun, timed_from = time.perf_counter(), 10 if steps > 20 else 0
    for step in range(steps):
        if step == timed_from:
            if device == "cuda":
                torch.cuda.synchronize()
            timer = time.perf_counter()
            startup = timer - begun
        batch = data.batch(step, batch_size=arguments.batch_size)
        loss(batch.tokens.to(device), lengths=batch.lengths.to(device)).loss.backward()
        scale = lr_scale(step, max_steps=steps, warmup_steps=100, cooldown=0.4, min_lr_ratio=0.0)
        optimizers.step(scale, grad_clip=1.0)
    if device == "cuda":
        torch.cuda.synchronize()
    rate = (steps - timed_from) * arguments.batch_size * arguments.seq_len / (time.perf_counter() - timer)
    nats = validate(loss, ShardedDataset(arguments.data_dir, split="val", **common), arguments.batch_size, device)
    result = {
        **vars(arguments),
        "params": model.num_params(),
        "steps": steps,
        "val_loss": round(nats, 4) if math.isfinite(nats) else None,
        "tokens_per_s": round(rate),
        "startup_s": round(startup, 1),
        "peak_gb": round(torch.cuda.max_memory_allocated() / 1e9, 2) if device == "cuda" else None,
        "seconds": round(time.perf_counter() - begun, 1),
        "torch": torch.__version__,
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
    }
    print(json.dumps(result), flush=True)


if __name__ == "__main__":
    main()
