"""`python -m lepton tune`: train a checkpoint's drafter on the model's own text, so that more drafts are accepted."""

import argparse
import sys
from typing import TYPE_CHECKING, Any

from lepton.cli.arguments import add_json, print_json
from lepton.cli.data_set import add_data_set, check_counts, open_data_set
from lepton.cli.loading import add_loading, choose, load, rewrite, target
from lepton.cli.threads import share_the_cores
from lepton.errors import InputError

if TYPE_CHECKING:
    from lepton.data.tokenizer import Tokenizer
    from lepton.model import Network

PROMPTS, PROMPTS_CPU = 2048, 128
"""Prompts that the model continues by default, on a GPU and on a CPU."""
ROWS, ROWS_CPU = 64, 16
STEPS, STEPS_CPU = 300, 150
MEASURED = 64
"""Held-out prompts that drafts are measured on, before and after."""
MOST = 1 << 20


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_loading(parser)
    add_data_set(parser)
    parser.add_argument("--out", metavar="PATH", help="checkpoint to write (default: the one that --checkpoint names)")
    parser.add_argument(
        "--prompts",
        type=int,
        metavar="N",
        help=f"beginnings of training text that the model continues, each at temperatures 0, 0.8 and 1 (default: "
        f"{PROMPTS}, {PROMPTS_CPU} on a CPU)",
    )
    parser.add_argument(
        "--new_tokens", type=int, default=128, metavar="N", help="tokens of a continuation (default: %(default)s)"
    )
    parser.add_argument(
        "--steps",
        type=int,
        metavar="N",
        help=f"steps of training, {ROWS} continuations each (default: {STEPS}), on a CPU {ROWS_CPU} (default: "
        f"{STEPS_CPU})",
    )
    parser.add_argument("--force", action="store_true", help="write also what brings fewer tokens a pass")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Let the model write, train its drafter on that, and save if held-out prompts then take fewer passes.

    The predictions stay as they are; so the text of a seed does, and the loss.
    """
    from lepton.generate.generation import MOST_AT_ONCE
    from lepton.runtime.device import pick_dtype
    from lepton.train.own_text import OwnText, learn, learners, write

    share_the_cores()
    choose(args)
    check_counts(args, prompts=MOST, new_tokens=MOST, steps=MOST)
    wanted, args.dtype = args.dtype, "fp32"  # weights are learnt at the checkpoint's precision
    out = target(args)
    model, tokenizer, step = load(args)
    model.compute_dtype = pick_dtype(wanted, model.device)
    tuned = learners(model)
    on_gpu = model.device.type == "cuda"
    rows, steps, count = (ROWS, STEPS, PROMPTS) if on_gpu else (ROWS_CPU, STEPS_CPU, PROMPTS_CPU)
    how = OwnText(new_tokens=args.new_tokens, rows=rows, steps=args.steps or steps)
    count = args.prompts or count
    prompts = _prompts(args, model, tokenizer, "train", count)
    held_out = _prompts(args, model, tokenizer, "val", MEASURED)
    before = _tokens_per_pass(model, held_out)
    if on_gpu:
        model.warm_up(min(len(prompts), MOST_AT_ONCE), speculative=False, say=_note)
    _note(f"writing {len(how.temperatures) * len(prompts):,} texts of {how.new_tokens} tokens")
    texts = write(model, prompts, how)
    learn(model, texts, how, _say)
    after = _tokens_per_pass(model, held_out)
    faults = worse(before, after)
    written = args.force or not faults
    if written:
        values = {f"{idea.name}.{name}": each.cpu() for idea in tuned for name, each in idea.state_dict().items()}

        def change(content: dict[str, Any]) -> None:
            for name, value in values.items():
                content["model"][name] = value.to(content["model"][name].dtype)

        rewrite(args.checkpoint, out, step, change)
    report = {
        "checkpoint": args.checkpoint,
        "out": out,
        "written": written,
        "step": step,
        "texts": len(texts),
        "new_tokens": sum(len(row.tokens) - row.prompt for row in texts),
        "tokens_per_pass": {"before": before, "after": after},
    }
    if args.json:
        print_json(report)
    else:
        print(*lines(report), sep="\n", flush=True)
    if not written:
        raise InputError(
            f"fewer tokens a pass at {', '.join(faults)}, so nothing is written; let the model write more (--prompts), "
            "name the text that it was trained on with --data_dir, or write it all the same with --force"
        )
    return 0


def lines(report: dict[str, Any]) -> list[str]:
    """Return the report for people."""
    before, after = report["tokens_per_pass"].values()
    return [
        f"{report['checkpoint']} (step {report['step']}): its drafter learnt {report['new_tokens']:,} tokens of the "
        "model's own text",
        f"{'tokens per model pass when drafting':<36}  {'before':>6}  {'after':>6}",
        *(f"{name:<36}  {value:6.2f}  {after[name]:6.2f}" for name, value in before.items()),
        *([f"written to {report['out']}"] if report["written"] else []),
    ]


def worse(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """Return the names of the figures that fell."""
    return [name for name, value in after.items() if value < before[name]]


def _prompts(
    args: argparse.Namespace, model: "Network", tokenizer: "Tokenizer", split: Any, count: int
) -> list[list[int]]:
    from lepton.evals.speculation import prompts_of

    _, _, windows = open_data_set(args, model, tokenizer, split)
    return prompts_of(windows.batches(1, min(count, windows.windows)), count)


def _tokens_per_pass(model: "Network", prompts: list[list[int]]) -> dict[str, float]:
    from lepton.evals.speculation import measure_speculation

    found = measure_speculation(model, prompts)
    return {f"temperature {temperature:g}": stats.tokens_per_step or 1.0 for temperature, stats in found.items()}


def _say(step: int, steps: int, nats: float) -> None:
    _note(f"step {step}/{steps}  loss {nats:.4f}")


def _note(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
