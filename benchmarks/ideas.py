"""The complete model and the dense one on equal data: loss, speed, memory, and what each idea does.

One run trains one variant once over the data and prints lines of JSON, one a finding, the last with all of them.
Variants: `complete`, `dense` (full attention), and `no_X`, which leaves one idea out; all have as many parameters as
`complete`, in wider MLPs. `--smoke` runs on a CPU.

    python -m benchmarks.ideas --data_dir D --size tiny --variant complete --tokens 49e6

Several runs on one GPU: with `--lock FILE` they train one after the other, and compile meanwhile.
"""

import argparse
import fcntl
import json
import math
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch

from benchmarks.training import LeptonTraining, change_ideas, held_out_nats, own_schedule
from lepton import checkpoint
from lepton.api import Lepton
from lepton.config import LeptonConfig
from lepton.data.shards import Batch, ShardedDataset
from lepton.data.tokenizer import load_tokenizer
from lepton.evals.ablation import ablate
from lepton.evals.calibration import calibrate, fit_temperature
from lepton.evals.positions import calibration_batches, evaluation_batches
from lepton.evals.reliability import measure_uncertainty
from lepton.evals.speculation import measure_speculation, prompts_of
from lepton.generate.generation import MOST_AT_ONCE
from lepton.model.parameters import FEED
from lepton.model.size_config import count_params, size_config, widened
from lepton.train.assembly import token_counts
from lepton.train.own_text import OwnText, learn, write

VARIANTS: dict[str, dict[str, Any]] = {
    "complete": {},
    "dense": {"dense": True},
    "no_thoughts": {"thoughts": 0},
    "no_memory": {"memory_heads": 0},
    "no_crystals": {"slots": 0},
    "no_peek": {"hint": 0},
    "no_router": {"router": False},
    "no_drafts": {"drafts": 0},
    "no_uncertainty": {"uncertainty": False},
    "no_ideas": {"thoughts": 0, "memory_heads": 0, "slots": 0, "hint": 0},
}

PROMPTS = 128
"""Prompts that drafts are measured on, spread over the validation split."""


def variant_config(size: str, variant: str, changes: list[str]) -> LeptonConfig:
    """Return the configuration of a variant; what its ideas leave of the parameters goes into the MLPs."""
    return widened(size_config(size, **VARIANTS[variant], **values_of(changes)), count_params(size_config(size)))


def values_of(changes: Sequence[str]) -> dict[str, Any]:
    """Return the fields of the configuration that FIELD=JSON words change."""
    return {name: json.loads(value) for name, value in (change.split("=") for change in changes)}


class Run:
    """One model, its data, and the findings so far."""

    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments = arguments
        self.begun = time.perf_counter()
        self.device = "cuda" if torch.cuda.is_available() else "cpu"
        torch.manual_seed(arguments.seed)
        self.model = Lepton(self.config()).to(self.device)
        weights = {name: float(value) for name, value in (change.split("=") for change in arguments.weights)}
        change_ideas(self.model, weights, arguments.feeds_rate)
        self.training = self.in_training()
        self.train_set, self.held_out = (self.split(name, arguments.seq_len) for name in ("train", "val"))
        self.steps = int(arguments.tokens) // (arguments.batch_size * arguments.seq_len)
        self.findings: dict[str, Any] = {
            **{name: str(value) if isinstance(value, Path) else value for name, value in vars(arguments).items()},
            "params": self.model.num_params(),
            "steps": self.steps,
            "torch": torch.__version__,
            "device": torch.cuda.get_device_name() if self.device == "cuda" else "cpu",
        }

    def config(self) -> LeptonConfig:
        """Return the configuration of the model."""
        return variant_config(self.arguments.size, self.arguments.variant, self.arguments.change)

    def split(self, name: Any, seq_len: int) -> ShardedDataset:
        return ShardedDataset(
            self.arguments.data_dir, split=name, seq_len=seq_len, seed=self.arguments.seed, vocab_size=50257
        )

    def tell(self, **found: Any) -> None:
        """Add findings, and print them at once with the time."""
        self.findings |= found
        print(json.dumps({"variant": self.arguments.variant, "at_s": round(self.elapsed()), **found}), flush=True)

    def elapsed(self) -> float:
        return time.perf_counter() - self.begun

    def has_time(self, seconds: float) -> bool:
        """Whether `seconds` more fit before the deadline."""
        return self.elapsed() + seconds < self.arguments.deadline

    def in_training(self) -> LeptonTraining:
        chosen = self.arguments
        way = "plain" if self.device == "cpu" else "recorded" if chosen.no_compile else "compiled"
        rates = {"lr": chosen.lr, "muon_lr": chosen.muon_lr, "weight_decay": chosen.weight_decay}
        return LeptonTraining(self.model, way, seed=chosen.seed, **rates)

    def step(self, batch: Batch, step: int, steps: int) -> dict[str, torch.Tensor]:
        """One optimizer step; see `Training.step`."""
        return self.training.step([batch], step, own_schedule(step, steps))

    def synchronize(self) -> None:
        if self.device == "cuda":
            torch.cuda.synchronize()

    def prepare(self) -> None:
        """Compile and record, which is not part of the time of training."""
        self.training.prepare(self.arguments.batch_size, self.arguments.seq_len)
        self.synchronize()
        self.tell(prepare_s=round(self.elapsed(), 1))

    def train(self) -> None:
        """One pass; the clock runs from step 20 on."""
        for idea in self.model.ideas.values():
            idea.learn_frequencies(lambda: token_counts(self.train_set, 50257))
        curve, norms, clock, timed = [], [], 0.0, min(20, self.steps - 1)
        rows, length = self.arguments.batch_size, self.arguments.seq_len
        for step in range(self.steps):
            if step == timed:
                self.synchronize()
                clock = time.perf_counter()
            figures = self.step(self.train_set.batch(step, batch_size=rows), step, self.steps)
            norms.append(figures["grad_norm"])
            if step % 100 == 0 or step == self.steps - 1:
                nats = figures["loss"].item()
                curve.append([step, round(nats, 4)])
                print(f"{self.arguments.variant} step {step} {nats:.4f} {self.elapsed():.0f}s", flush=True)
        self.synchronize()
        speed = (self.steps - timed) * rows * length / (time.perf_counter() - clock)
        peak = torch.cuda.max_memory_allocated() / 1e9 if self.device == "cuda" else None
        spread = torch.stack(norms).float().quantile(torch.tensor([0.5, 0.9, 0.99, 1.0], device=self.device))
        norms_of_gradients = dict(zip(("50%", "90%", "99%", "100%"), spread.tolist(), strict=True))
        self.tell(curve=curve, grad_norm=norms_of_gradients, tokens_per_s=round(speed), peak_gb=peak and round(peak, 2))

    def held_out_loss(self, limit: int | None = None, **options: Any) -> float:
        """Nats a token on the validation split, or on `limit` batches spread over it."""
        measure = partial(self.training.nats, **options)
        nats, targets = held_out_nats(self.model, measure, self.held_out, self.arguments.batch_size, limit)
        self.quarters = (nats.view(4, -1).sum(1) / targets.view(4, -1).sum(1)).tolist()
        return (nats.sum() / targets.sum()).item()

    def judge(self) -> None:
        """Everything that is measured on the trained model."""
        self.model.eval()
        loss = self.held_out_loss(self.arguments.eval_batches)
        self.tell(val_loss=round(loss, 4), loss_of_quarters=[round(quarter, 4) for quarter in self.quarters])
        if self.arguments.drafts:
            self.drafts()
        if self.arguments.brief or self.arguments.drafts:
            return
        if self.model.idea("router") is not None:
            self.ideas()
        tokenizer = load_tokenizer(self.arguments.tokenizer)
        prompt = prompts_of(self.held_out.batches(1), 1)[0]
        self.tell(sample=tokenizer.decode(self.model.generate(prompt, max_new_tokens=100, seed=0)))

    def ideas(self) -> None:
        calibrate(self.model, calibration_batches(self.held_out, 16))
        temperature = fit_temperature(self.model, calibration_batches(self.held_out, 16))
        reliability = measure_uncertainty(self.model, evaluation_batches(self.held_out, 16), temperature=temperature)
        self.tell(reliability=reliability.to_dict())
        self.drafts()
        few = None if self.arguments.smoke else 4
        table = list(ablate(self.model, lambda **options: self.held_out_loss(few, **options)))
        self.tell(ablation={row.off: [round(row.nats_per_token, 4), round(row.change, 4)] for row in table})

    def drafts(self, name: str = "speculation") -> None:
        count = 2 if self.arguments.smoke else PROMPTS
        counts = measure_speculation(self.model, prompts_of(self.split("val", 512).batches(1, count), count))
        self.tell(**{name: {f"T={t:g}": stats.to_dict() for t, stats in counts.items()}})

    def tune(self) -> None:
        """Train the drafter on the model's own text, and say what it was before and how long that takes."""
        self.model.eval()
        self.drafts("speculation_before")
        begun = time.perf_counter()
        how = OwnText(steps=3 if self.arguments.smoke else self.arguments.tune_steps, share=self.arguments.tune_share)
        prompts = prompts_of(self.split("train", 512).batches(1, self.arguments.tune), self.arguments.tune)
        if self.device == "cuda":
            self.model.warm_up(min(len(prompts), MOST_AT_ONCE), speculative=False)
            self.tell(warm_up_s=round(time.perf_counter() - begun, 1))
        texts = write(self.model, prompts, how)
        self.tell(
            own_tokens=sum(len(row.tokens) - row.prompt for row in texts), write_s=round(time.perf_counter() - begun, 1)
        )
        learn(self.model, texts, how, lambda step, steps, nats: print(f"tune {step}/{steps} {nats:.4f}", flush=True))
        self.tell(tune_s=round(time.perf_counter() - begun, 1))

    def save(self, path: Path) -> None:
        """Write the model as a checkpoint that others read."""
        path.parent.mkdir(parents=True, exist_ok=True)
        weights, config = self.model.state_dict(), self.model.config.to_dict()
        checkpoint.save(path, {"model": weights, "config": config, "step": self.steps, "size": self.arguments.size})

    def canary(self) -> None:
        """Law 6 at this size: fresh weights, some steps on uniform random tokens, then fresh noise."""
        vocabulary, steps = self.model.config.vocab_size, self.arguments.canary
        self.training.restart()
        self.model.train()
        shape = (self.arguments.batch_size, self.arguments.seq_len + 1)
        lengths = torch.full((shape[0],), shape[1])
        for step in range(steps):
            self.step(Batch(torch.randint(1, vocabulary, shape), lengths), step, steps)
        with torch.no_grad():
            tokens = torch.randint(1, vocabulary, shape).to(self.device)
            hidden = self.model.trunk(tokens[:, :-1]).hidden
            nats = [
                torch.nn.functional.cross_entropy(self.model.head(row), target, reduction="none")
                for row, target in zip(hidden, tokens[:, 1:], strict=True)
            ]
        all_nats = torch.cat(nats).double()
        error = all_nats.std().item() / math.sqrt(len(all_nats))
        mean, chance = all_nats.mean().item(), math.log(vocabulary - 1)
        self.tell(canary={"nats": mean, "chance": chance, "error": error, "no_leak": mean >= chance - 4 * error})


def read_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Read the options of a run; `words` are those of the command line by default."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add: Callable[..., Any] = parser.add_argument
    add("--data_dir", required=True)
    add("--tokenizer", help="the one that the data was made with")
    add("--size", default="micro")
    add("--variant", default="complete", choices=VARIANTS)
    add("--lr", type=float, default=6e-4)
    add("--muon_lr", type=float, default=0.02)
    add("--weight_decay", type=float, default=0.1)
    add(
        "--feeds_rate",
        type=float,
        default=FEED.rate,
        help="share of Muon's rate for the feeds of deep blocks",
    )
    add("--tokens", type=float, default=16e6)
    add("--batch_size", type=int, default=64)
    add("--seq_len", type=int, default=512)
    add("--change", nargs="+", default=[], metavar="FIELD=JSON", help="fields of the configuration to change")
    add("--weights", nargs="+", default=[], metavar="LOSS=W", help="weights of auxiliary losses to change")
    add("--seed", type=int, default=0)
    add("--eval_batches", type=int, help="validation batches (default: all)")
    add("--brief", action="store_true", help="measure the loss alone")
    add("--drafts", action="store_true", help="measure the loss and tokens a pass alone")
    add("--tune", type=int, metavar="N", help="train the drafter on the model's continuations of N training prompts")
    add("--tune_steps", type=int, default=OwnText.steps, help="steps of that")
    add("--tune_share", type=float, default=OwnText.share, help="share of training's rates that they begin with")
    add("--save", type=Path, metavar="FILE", help="write the trained model as a checkpoint")
    add("--lock", type=Path, metavar="FILE", help="train and measure while no other run with this file does")
    add("--canary", type=int, default=0, help="steps of the leak canary")
    add("--deadline", type=float, default=math.inf, help="seconds after which nothing more is begun")
    add("--no_compile", action="store_true", help="record the kernels without compiling them")
    add("--smoke", action="store_true")
    arguments = parser.parse_args(words)
    if arguments.smoke:
        arguments.size, arguments.batch_size, arguments.seq_len, arguments.tokens = "nano", 2, 64, 640
        arguments.eval_batches = 1
    return arguments


@contextmanager
def alone(lock: Path | None) -> Iterator[None]:
    """Wait until no other process is inside with the same file. So runs on one GPU compile while another one trains."""
    if lock is None:
        yield
        return
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def main() -> None:
    run = Run(read_arguments())
    run.prepare()
    with alone(run.arguments.lock):
        run.train()
        if run.arguments.tune:
            run.tune()
        if run.arguments.save:
            run.save(run.arguments.save)
        run.judge()
    if run.arguments.canary and run.has_time(60):
        run.canary()
    run.findings["seconds"] = round(run.elapsed(), 1)
    print(json.dumps(run.findings), flush=True)


if __name__ == "__main__":
    main()
