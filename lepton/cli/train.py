"""`python -m lepton train`, which is also `python train.py`."""

import argparse
import ast
import os
import sys
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lepton.cli.arguments import add_json, print_json
from lepton.cli.main import complain, run_command
from lepton.cli.threads import share_the_cores
from lepton.presets import SIZES

if TYPE_CHECKING:
    from lepton.train.settings import TrainSettings

RANK_LOST = 1
"""Exit code where another process of the run has failed or is gone."""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command as train.py does; return the exit code."""
    return run_command("train", sys.argv[1:] if argv is None else argv, prog="train.py")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add a flag for each of `TrainSettings`; flags that are not given are left to it."""
    parser.argument_default = argparse.SUPPRESS
    parser.epilog = "A resumed run keeps the settings it was started with; flags that are given again win."
    _add_model_and_data(parser.add_argument_group("model and data"))
    _add_optimization(parser.add_argument_group("optimization"))
    _add_files_and_reports(parser.add_argument_group("checkpoints and reports"))
    _add_machine(parser.add_argument_group("machine"))
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Train; a request to stop (`lepton.train.stop_request`) saves what was reached and gives 128 + the signal."""
    since = time.perf_counter()
    share_the_cores()
    from lepton.distributed import RankLost, ranks_of
    from lepton.train.stop_request import Interrupted
    from lepton.train.trainer import train

    flags = vars(args)
    as_json = flags.pop("json", False)
    settings = settings_of(flags)
    leads = ranks_of(os.environ).leads
    try:
        path = train(settings, given=set(flags), stream=sys.stderr if as_json else sys.stdout, since=since)
    except Interrupted as interrupted:
        if leads:
            complain(str(interrupted))
        return interrupted.exit_code
    except RankLost as lost:
        if lost.speaks:
            complain(f"error: {lost}")
        return RANK_LOST
    if as_json and leads:
        from lepton import checkpoint

        print_json({"checkpoint": str(path), **(checkpoint.load(path)["validation"] or {})})
    return 0


def settings_of(flags: dict[str, Any]) -> "TrainSettings":
    """Return the settings that the given flags make."""
    from lepton.train.settings import TrainSettings

    overrides = dict(flags.get("overrides", []))
    return TrainSettings(**{**flags, "overrides": overrides})


def _add_model_and_data(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--model_size", choices=list(SIZES), help="size of the model (default: tiny, or that of --resume)")
    add("--dense", action="store_true", help="train the baseline of equal parameters without LEPTON's ideas")
    add("--override", dest="overrides", action="append", type=_assignment, metavar="NAME=VALUE",
        help="change a field of the model's shape, such as window=128; may be repeated")  # fmt: skip
    add("--data_dir", metavar="DIR", help="folder of shard_*.npy (default: the Python standard library's source)")
    add(
        "--tokenizer",
        metavar="PATH",
        help="tokenizer (default: pile_tokenizer.json if there is one, else LEPTON's own)",
    )
    add("--seq_len", type=int, metavar="N", help="tokens of a row (default: 512)")


def _add_optimization(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--batch_size", type=_count_or_auto, metavar="N|auto",
        help="rows of a micro-batch; auto: as many of the 4 x grad_accum rows of a step as fit into the GPU's "
             "memory (default: 4)")  # fmt: skip
    add("--grad_accum", type=int, metavar="N", help="micro-batches of an optimizer step (default: 16; on a CPU 1)")
    add("--max_steps", type=int, metavar="N", help="optimizer steps in all (default: 50000)")
    add("--lr", type=float, metavar="X", help="peak learning rate of AdamW (default: 6e-4)")
    add("--muon_lr", type=float, metavar="X", help="peak learning rate of Muon (default: 0.02)")
    add("--optimizer", choices=("muon", "adamw"), help="muon is Muon and AdamW; adamw is AdamW alone (default: muon)")
    add(
        "--weight_decay",
        type=float,
        metavar="X",
        help="weight decay of matrices, times the learning rate (default: 0.1)",
    )
    add("--warmup_steps", type=int, metavar="N", help="steps of warm-up, at most max_steps / 10 (default: 40)")
    add(
        "--cooldown",
        type=float,
        metavar="X",
        help="share of the run, at its end, in which the learning rates fall (default: 0.4)",
    )
    add(
        "--min_lr_ratio",
        type=float,
        metavar="X",
        help="learning rates at the end, as a share of their peaks (default: 0)",
    )
    add("--grad_clip", type=float, metavar="X", help="clip the gradient to this norm (default: 1)")
    add("--seed", type=int, metavar="N", help="seed of the weights and of the order of the data (default: 0)")


def _add_files_and_reports(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--checkpoint_dir", metavar="DIR", help="folder of checkpoints and metrics.jsonl (default: checkpoints)")
    add("--resume", metavar="PATH|auto", help="go on from a checkpoint; auto: the newest in checkpoint_dir, if any")
    add("--allow_other_data", action="store_true", help="resume although the data have changed since the checkpoint")
    add("--init_from", metavar="PATH", help="start a new run from a checkpoint's weights")
    add("--save_every", type=int, metavar="N", help="steps between checkpoints (default: 1000)")
    add("--keep", type=int, metavar="N", help="newest step_N.pt to keep (default: 3)")
    add("--eval_every", type=int, metavar="N", help="steps between validations (default: 500)")
    add("--eval_batches", type=int, metavar="N", help="batches of a validation (default: 16)")
    add("--log_every", type=int, metavar="N", help="steps between progress lines (default: 10)")
    add("--tensorboard", action="store_true", help="also write the metrics for TensorBoard, into the checkpoint folder")
    add("--no_tensorboard", dest="tensorboard", action="store_false", help="do not (the default)")
    add("--sample_every", type=int, metavar="N", help="steps between text samples (default: 1000)")
    add("--sample_prompt", metavar="TEXT", help="text that samples continue (default: a beginning of the data)")
    add("--sample_tokens", type=int, metavar="N", help="tokens of a sample (default: 64)")


def _add_machine(group: argparse._ArgumentGroup) -> None:
    add = group.add_argument
    add("--device", metavar="NAME", help="such as cuda:1 or cpu (default: an NVIDIA or AMD GPU if there is one)")
    add("--dtype", choices=("auto", "bf16", "fp32"), help="auto is bf16 where the hardware has it (default: auto)")
    add(
        "--checkpoint_activations",
        action="store_true",
        help="compute blocks again in the backward pass: less memory, more time",
    )
    add(
        "--no_checkpoint_activations",
        dest="checkpoint_activations",
        action="store_false",
        help="compute blocks once (the default)",
    )
    add("--shard", action="store_true", help="share weights and optimizer among the processes that torchrun starts")
    add("--compile", action="store_true", help="compile the model, on a GPU alone (default there)")
    add("--no_compile", dest="compile", action="store_false", help="do not compile the model")
    add("--threads", type=int, metavar="N", help="CPU threads (default: torch's choice)")


def _count_or_auto(text: str) -> int | None:
    """Return a number, or None, which leaves the choice to the trainer."""
    try:
        return None if text == "auto" else int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"'{text}' is neither a whole number nor auto") from None


def _assignment(text: str) -> tuple[str, Any]:
    name, equals, value = text.partition("=")
    try:
        if not equals:
            raise ValueError
        return name.strip(), ast.literal_eval(value.strip())
    except (ValueError, SyntaxError):
        raise argparse.ArgumentTypeError(f"'{text}' is not NAME=VALUE with a number, True, False or None") from None
