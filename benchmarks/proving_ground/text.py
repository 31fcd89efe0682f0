"""Text: the loss of a dense model, the complete one, and the complete one without each idea, by quarter of a row.

Every model has equal parameters, reads the same tokens of a prepared data set and is judged on its validation split.
At rows of 512 tokens hardly anything lies beyond the window; at 2,048 most does. All options that are not named here
are those of `benchmarks.ideas`, as `--size`, `--tokens` and `--tokenizer`. `--seconds` limits the training of each
model: then it takes as many steps as fit, with the whole schedule. Losses are comparable where steps are equal.

    python -m benchmarks.proving_ground.text --data_dir D --size tiny --tokens 49e6 --seeds 0 1 2
"""

import argparse
import json
import time
from collections.abc import Sequence
from typing import Any

import torch

from benchmarks.ideas import VARIANTS, Run, read_arguments
from benchmarks.proving_ground.clock import TIMED, Clock, fitted
from lepton.errors import InputError, nearest

ROW_TOKENS = 32_768
"""Tokens of a batch, whatever the length of its rows."""
MODELS = ("dense", *(name for name in VARIANTS if name != "dense"))


def train_and_judge(
    rest: Sequence[str], model: str, seq_len: int, seed: int, smoke: bool, seconds: float | None = None
) -> dict[str, Any]:
    """Train a model on rows of `seq_len` tokens; return its loss [nats a token], by quarter too, and what it cost.

    `seconds` are those of its training; None: no limit.
    """
    rows = 2 if smoke else max(1, ROW_TOKENS // seq_len)
    words = ["--variant", model, "--seed", str(seed), "--batch_size", str(rows), "--brief", *rest]
    arguments = read_arguments([*words, "--seq_len", str(seq_len)])
    if smoke:
        arguments.size, arguments.tokens, arguments.eval_batches = "nano", 3 * rows * seq_len, 1
    run = Run(arguments)
    run.prepare()
    if seconds is not None:
        run.steps = run.findings["steps"] = fitted(run.steps, seconds, seconds_a_step(run), 1)
    run.train()
    run.judge()
    kept = ("params", "steps", "val_loss", "loss_of_quarters", "tokens_per_s")
    flops = round(run.training.flops_per_token(seq_len))
    return {"name": model, "seq_len": seq_len, "seed": seed, "training_flops_per_token": flops} | {
        name: run.findings[name] for name in kept
    }


def seconds_a_step(run: Run) -> float:
    """Return the mean time of a step of a run; its weights are the initial ones afterwards."""
    run.synchronize()
    clock = Clock(0)
    for step in range(TIMED):
        run.step(run.train_set.batch(step, batch_size=run.arguments.batch_size), step, run.steps)
    run.synchronize()
    found = clock.spent / TIMED
    run.training.restart()
    return found


def line_of(row: dict[str, Any]) -> str:
    """Return a row of the table."""
    quarters = " ".join(f"{quarter:8.4f}" for quarter in row["loss_of_quarters"])
    return (
        f"{row['name']:16} {row['seq_len']:6} {row['seed']:4} {row['params'] / 1e6:7.1f} {row['steps']:6} "
        f"{row['val_loss']:8.4f} {quarters} {row['tokens_per_s']:9}"
    )


def main(words: Sequence[str] | None = None) -> None:
    """Train the models one after the other; print a row of the table as soon as it is known, and a line of JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=[*MODELS], metavar="NAME", help=", ".join(MODELS))
    parser.add_argument("--seq_lens", type=int, nargs="+", default=[512, 2048])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--seconds", type=float, help="of the training of each model (default: all of its tokens)")
    parser.add_argument("--smoke", action="store_true", help="the smallest size, rows of 64 tokens, three steps")
    chosen, rest = parser.parse_known_args(words)
    for name in chosen.models:
        if name not in VARIANTS:
            raise InputError(f"no model {name!r}{nearest(name, VARIANTS)}")
    if chosen.smoke:
        chosen.seq_lens = [64]
    table, begun = [], time.perf_counter()
    for seq_len in chosen.seq_lens:
        for seed in chosen.seeds:
            for name in chosen.models:
                table.append(train_and_judge(rest, name, seq_len, seed, chosen.smoke, chosen.seconds))
                print(line_of(table[-1]), flush=True)
                torch._dynamo.reset()  # beyond a number of programs a process the compiler goes on without, in silence
    head = f"{'model':16} {'length':>6} {'seed':>4} {'M par':>7} {'steps':>6} {'loss':>8}"
    print(f"{head} {'by quarter of the row':35} {'tokens/s':>9}")
    for row in table:
        print(line_of(row))
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    print(json.dumps({"task": "Text", **vars(chosen), "options": rest, "rows_of_table": table,
                      "took_s": round(time.perf_counter() - begun, 1), "torch": torch.__version__,
                      "device": device}), flush=True)  # fmt: skip


if __name__ == "__main__":
    main()
