"""Depth: what a token loses that skips the deep blocks, who should, and whether a smaller model does as well.

A trained model reads held-out text at some depths. Three rules choose the tokens that go deep: its router, a lot, and
an oracle that knows KL(deep || exit) of each token, the nats that depth is expected to save; no router that reads the
past can beat it by more than noise. The change of the loss is split: that of deep tokens comes from the keys and values
of others that did not go deep, and that of easy ones from the exit. Beside it stand dense models of fewer layers, which
are trained in the same call on the same text: the curve that routing must beat at equal FLOPs.

The model is trained with the options of `benchmarks.ideas`, or comes from a checkpoint. `--smoke` runs on a CPU.

    python -m benchmarks.proving_ground.depth --data_dir D --size tiny --tokens 49e6 --change router.into_stem=0.1
"""

import argparse
import itertools
import json
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.ideas import Run, alone, read_arguments, values_of
from benchmarks.training import nats_of
from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.data.shards import Batch, ShardedDataset
from lepton.errors import InputError
from lepton.evals.calibration import calibrate
from lepton.evals.positions import calibration_batches, evaluation_batches
from lepton.model.ideas.router import QUANTILES, Router
from lepton.model.layers import norm
from lepton.model.output import Output
from lepton.model.parameters import replaced
from lepton.model.size_config import size_config
from lepton.ops.divergence import linear_divergence
from lepton.presets import preset
from lepton.runtime.device import free_unused_memory, pick_dtype

DEPTHS = (0.75, 0.5, 0.25)
"""Shares of deep tokens that are tried with each rule; at 1 and 0 there is nothing to choose."""
RULES = ("router", "lot", "oracle")


class Shallow(Run):
    """A dense model of fewer layers, each as wide as those of the size."""

    def config(self) -> LeptonConfig:
        chosen, shape = self.arguments, preset(self.arguments.size)
        return size_config(chosen.size, dense=True, **{"ffn": shape.ffn, **values_of(chosen.change)})


@dataclass
class Sums:
    """What is summed over held-out text under one rule at one depth."""

    deep: float = 0.0
    """Tokens that went deep."""
    tokens: float = 0.0
    deep_change: float = 0.0
    """Nats that deep tokens lost, beside those at full depth."""
    easy_change: float = 0.0
    easy_kl: float = 0.0
    """KL(deep || exit) of the tokens that did not go deep: what they lose by expectation."""
    rows: list[tuple[float, float]] = field(default_factory=list)
    """Of each row of text: the nats lost, and the tokens."""

    def add(self, change_BT: Tensor, kl_BT: Tensor, deep_BT: Tensor, valid_BT: Tensor) -> None:
        """Add a batch: the nats that each token lost, its KL(deep || exit), and whether it went deep, and counts."""
        change_BT, deep_BT = change_BT.double() * valid_BT, deep_BT & valid_BT
        self.deep += deep_BT.sum().item()
        self.tokens += valid_BT.sum().item()
        self.deep_change += (change_BT * deep_BT).sum().item()
        self.easy_change += (change_BT * ~deep_BT).sum().item()
        self.easy_kl += (kl_BT.double() * (valid_BT & ~deep_BT)).sum().item()
        self.rows += zip(change_BT.sum(1).tolist(), valid_BT.sum(1).tolist(), strict=True)

    def to_dict(self) -> dict[str, float]:
        """Return means in nats a token; the error is that of the change, from its spread over rows."""
        change = (self.deep_change + self.easy_change) / self.tokens
        off = torch.tensor([nats - change * tokens for nats, tokens in self.rows], dtype=torch.float64)
        error = off.square().sum().sqrt().item() / self.tokens
        return {
            "share": self.deep / self.tokens,
            "change": change,
            "error": error,
            "deep_change": self.deep_change / max(1, self.deep),
            "easy_change": self.easy_change / max(1, self.tokens - self.deep),
            "expected": self.easy_kl / self.tokens,
        }


@contextmanager
def chosen_by(router: Router, score_BT: Tensor, quantiles: Tensor) -> Iterator[None]:
    """Let tokens go deep by given scores inside the block; `quantiles` are those of such scores."""
    router.score = lambda _: score_BT  # type: ignore[method-assign]
    try:
        with replaced(router.quantiles, quantiles.to(router.quantiles)):
            yield
    finally:
        del router.score


@torch.no_grad()
def nats_at(model: Lepton, hidden_BTD: Tensor, batch: Batch) -> Tensor:
    """Return the nats of each target [B, T], zero where a row has none."""
    tokens_BX = batch.tokens.to(model.device)
    rows = zip(hidden_BTD, tokens_BX, batch.lengths.tolist(), strict=True)
    return torch.stack([nats_of(model.head(hidden), row, length) for hidden, row, length in rows])


@torch.no_grad()
def exit_lacks(model: Lepton, out: Output) -> Tensor:
    """Return KL(deep || exit) of each token in nats [B, T]; `out` is of a pass at full depth."""
    left_MD = norm(model.idea("router").exit(out.flow.x_BTD.flatten(0, 1)))
    inputs = [model.head_down(each) for each in (left_MD, out.hidden.flatten(0, 1))]
    config, every_M = model.config, torch.ones(len(left_MD), dtype=torch.bool, device=left_MD.device)
    options: dict[str, Any] = {"vocab_size": config.vocab_size, "cap": config.logit_cap}
    _, nats_M = linear_divergence(*inputs, model.embed.weight, every_M, **options)
    return nats_M.view(out.hidden.shape[:2])


def passes(model: Lepton, batches: Iterator[Batch]) -> Iterator[tuple[Batch, Tensor, Output, Tensor]]:
    """Yield each batch, its tokens on the device, a pass over them at full depth, and the predictions that count."""
    for batch in batches:
        inputs_BT = batch.tokens[:, :-1].to(model.device)
        valid_BT = torch.arange(inputs_BT.shape[1]) < batch.lengths[:, None] - 1
        yield batch, inputs_BT, model.trunk(inputs_BT), valid_BT.to(model.device)


def ranks(values: Tensor) -> Tensor:
    """Return the rank of each of some values, fp64."""
    return values.argsort().argsort().double()


@torch.no_grad()
def judge(model: Lepton, data: ShardedDataset, rows: int, tokens: int) -> dict[str, Any]:
    """Return the loss at full depth, and what it changes by at each depth under each rule.

    Args:
        model: on its device, in eval mode.
        data: a validation split. The rules are calibrated on its first half, and judged on the second.
        rows: windows at a time.
        tokens: held-out targets, about, for either.
    """
    router, generator = model.idea("router"), torch.Generator(model.device).manual_seed(0)
    calibrate(model, calibration_batches(data, rows, tokens))
    seen = [exit_lacks(model, out)[valid] for *_, out, valid in passes(model, calibration_batches(data, rows, tokens))]
    places = torch.linspace(0, 1, QUANTILES, dtype=torch.float64)
    tables = {
        "router": router.quantiles.clone(),
        "lot": places,
        "oracle": torch.cat(seen).cpu().double().quantile(places),
    }
    settings = [(rule, depth) for depth in DEPTHS for rule in RULES] + [("exit", 0.0)]
    sums, full, scored = {setting: Sums() for setting in settings}, Sums(), []
    for batch, inputs_BT, out, valid_BT in passes(model, evaluation_batches(data, rows, tokens)):
        nats_BT, lacks_BT = nats_at(model, out.hidden, batch), exit_lacks(model, out)
        full.add(nats_BT, lacks_BT, out.flow.deep_BT, valid_BT)
        score_BT = out.flow.contributions["router"].signal_BT
        scored.append(torch.stack([score_BT[valid_BT].double().cpu(), lacks_BT[valid_BT].double().cpu()]))
        lot_BT = torch.rand(lacks_BT.shape, generator=generator, device=model.device, dtype=torch.float64)
        given = {"lot": lot_BT, "oracle": lacks_BT}
        for (rule, depth), found in sums.items():
            with chosen_by(router, given[rule], tables[rule]) if rule in given else nullcontext():
                less = model.trunk(inputs_BT, depth=depth)
            found.add(nats_at(model, less.hidden, batch) - nats_BT, lacks_BT, less.flow.deep_BT, valid_BT)
    scores_M, lacks_M = torch.cat(scored, 1)
    return {
        "loss": full.to_dict()["change"],
        "tokens": full.tokens,
        "kl": lacks_M.mean().item(),
        "rank_correlation": torch.corrcoef(torch.stack([ranks(scores_M), ranks(lacks_M)]))[0, 1].item(),
        "depths": [{"rule": rule, "depth": depth, **found.to_dict()} for (rule, depth), found in sums.items()],
    }


@torch.no_grad()
def loss_of(model: Lepton, data: ShardedDataset, rows: int, tokens: int) -> float:
    """Return the nats a token on what `judge` judges on."""
    nats, count = 0.0, 0
    for batch, _, out, valid_BT in passes(model, evaluation_batches(data, rows, tokens)):
        nats += nats_at(model, out.hidden, batch).double().sum().item()
        count += int(valid_BT.sum())
    return nats / count


def at_flops(curve: Sequence[tuple[float, float]], flops: float) -> float | None:
    """Return the loss on a curve of (FLOPs, loss), linear between its points; None: it does not reach there."""
    ordered = sorted(curve)
    for (left, high), (right, low) in itertools.pairwise(ordered):
        if left <= flops <= right:
            return high + (low - high) * (flops - left) / (right - left)
    return None


def trained(arguments: argparse.Namespace, kind: type[Run] = Run) -> Lepton:
    """Train a model as `benchmarks.ideas` does; return it in eval mode, without what training needed."""
    run = kind(arguments)
    run.prepare()
    with alone(arguments.lock):
        run.train()
    if arguments.save and kind is Run:
        run.save(arguments.save)
    model = run.model.eval()
    model.zero_grad(set_to_none=True)
    del run
    torch._dynamo.reset()  # beyond a number of programs a process the compiler goes on without, in silence
    free_unused_memory(model.device)
    return model


def loaded(path: str) -> Lepton:
    """Return the model of a checkpoint, in eval mode and as it was trained."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    model = Lepton.from_checkpoint(path).to(device).eval()
    model.compute_dtype = pick_dtype("auto", device)
    return model


def show(found: dict[str, Any], dense: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    head = ("change", "+-", "ratio", "expected", "deep", "easy", "MFLOP", "loss", "- dense")
    print(f"{'depth':>5} {'by':8} {'share':>6} " + " ".join(f"{name:>8}" for name in head))
    for row in found["depths"]:
        beside = "" if row["beside_dense"] is None else f"{row['beside_dense']:+8.4f}"
        print(
            f"{row['depth']:5g} {row['rule']:8} {row['share']:6.3f} {row['change']:8.4f} {row['error']:8.4f} "
            f"{row['ratio']:8.3f} {row['expected']:8.4f} {row['deep_change']:8.4f} {row['easy_change']:8.4f} "
            f"{row['flops'] / 1e6:8.1f} {row['loss']:8.4f} {beside}"
        )
    print(f"full depth: loss {found['loss']:.4f}, {found['flops'] / 1e6:.1f} MFLOP a token; KL(deep || exit) "
          f"{found['kl']:.4f}; rank correlation with the score {found['rank_correlation']:.3f}")  # fmt: skip
    for row in dense:
        print(f"dense of {row['layers']} layers: loss {row['loss']:.4f}, {row['flops'] / 1e6:.1f} MFLOP a token")


def completed(
    found: dict[str, Any], model: Lepton, length: int, window: int, dense: Sequence[dict[str, Any]]
) -> dict[str, Any]:
    """Return what `judge` found, with FLOPs, losses, and the dense curve beside them."""
    alone = found["depths"][-1]["change"]
    curve = [(row["flops"], row["loss"]) for row in dense]
    for row in found["depths"]:
        flops, loss = model.flops_per_token(length, depth=row["share"]), found["loss"] + row["change"]
        expected = at_flops(curve, flops)
        # Of what a lot would lose if others' keys and values did no harm.
        ratio = row["change"] / ((1 - row["share"]) * alone) if alone and row["share"] < 1 else math.nan
        row |= {"flops": flops, "loss": loss, "ratio": ratio}
        row["beside_dense"] = None if expected is None else loss - expected
    return {**found, "flops": model.flops_per_token(length), "window": window}


def main(words: Sequence[str] | None = None) -> None:
    """Train or load the model, train the dense ones, print a table for each window, and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="a trained model (default: one is trained)")
    parser.add_argument("--dense_layers", type=int, nargs="*", default=[3, 5, 7], help="of the dense models beside it")
    parser.add_argument("--windows", type=int, nargs="*", default=[], help="windows of the router (default: its own)")
    parser.add_argument("--judged_tokens", type=int, default=1 << 18, help="held-out tokens that are judged, about")
    parser.add_argument("--smoke", action="store_true", help="the smallest size, rows of 64 tokens, ten steps")
    chosen, rest = parser.parse_known_args(words)
    arguments = read_arguments([*rest, *(["--smoke"] if chosen.smoke else [])])
    length, rows, begun = arguments.seq_len, arguments.batch_size, time.perf_counter()
    if chosen.smoke:
        chosen.judged_tokens, chosen.dense_layers = 4 * length, chosen.dense_layers[:1]
    data = ShardedDataset(arguments.data_dir, split="val", seq_len=length, seed=arguments.seed, vocab_size=50257)
    model = loaded(chosen.checkpoint) if chosen.checkpoint else trained(arguments)
    if model.idea("router") is None:
        raise InputError("this model has no router, so it has one depth; take one with a router")
    dense = []
    for layers in chosen.dense_layers:
        changes = {"variant": f"dense of {layers} layers", "change": [*arguments.change, f"layers={layers}"]}
        own = argparse.Namespace(**{**vars(arguments), **changes})
        small = trained(own, Shallow)
        flops, loss = small.flops_per_token(length), loss_of(small, data, rows, chosen.judged_tokens)
        dense.append({"layers": layers, "params": small.num_params(), "flops": flops, "loss": loss})
    tables = []
    for window in chosen.windows or [model.idea("router").window]:
        model.idea("router").window = window
        found = judge(model, data, rows, chosen.judged_tokens)
        tables.append(completed(found, model, length, window, dense))
        show(tables[-1], dense)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"task": "Depth", **vars(chosen), "options": vars(arguments), "tables": tables, "dense": dense,
                      "params": model.num_params(), "seconds": round(time.perf_counter() - begun, 1),
                      "torch": torch.__version__, "device": device}, default=str), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
