"""A trained model with its tokenizer, as the commands that use one need it."""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lepton.errors import InputError, naming

if TYPE_CHECKING:
    from lepton.api import Lepton
    from lepton.data.tokenizer import Tokenizer

DTYPES = ("auto", "bf16", "fp32")
KEPT = "the model that comes with LEPTON stays as it is: name the checkpoint to write, --out PATH"
SEEN = (
    "note: without --data_dir this reads Python's standard library, which that model was trained on, so its "
    "figures are better than those of new text"
)


def add_checkpoint(parser: argparse.ArgumentParser) -> None:
    """Add the flag that `choose` reads."""
    parser.add_argument(
        "--checkpoint", metavar="FILE", help="checkpoint to load (default: the model that comes with LEPTON)"
    )


def choose(args: argparse.Namespace) -> None:
    """Put the model that comes with LEPTON in the place of a checkpoint that was not named, and say so on stderr.

    Raises:
        InputError: no model comes with this copy of LEPTON; or the command would write what it reads.
    """
    if args.checkpoint is not None:
        return
    if "out" in vars(args) and args.out is None:
        raise InputError(KEPT)
    from lepton.weight_files import about
    from lepton.weights import CARD, packaged

    path = packaged()
    known, card = about(path), path.with_name(CARD)
    size = str(known["size"]).upper() if known.get("size") else "a model"
    more = f"; {card} describes it" if card.exists() else ""
    print(f"no --checkpoint: {size} of step {known.get('step')}, which comes with LEPTON{more}", file=sys.stderr)
    args.checkpoint = str(path)
    if "data_dir" in vars(args) and not any(vars(args).get(name) for name in ("data_dir", "text", "tasks")):
        print(SEEN, file=sys.stderr)


def target(args: argparse.Namespace) -> str:
    """Return the checkpoint that a command writes: `--out`, or the one that it reads.

    Raises:
        InputError: that is the model that comes with LEPTON, or one of several files.
    """
    from lepton.weight_files import PART
    from lepton.weights import FOLDER

    out: str = args.out or args.checkpoint
    if args.out is None and Path(out).resolve().parent == FOLDER.resolve():
        raise InputError(KEPT)
    if PART.fullmatch(Path(out).name):
        raise InputError(f"{out} is one of several files: name another checkpoint to write, --out PATH")
    return out


def add_loading(parser: argparse.ArgumentParser) -> None:
    """Add the flags that `load` reads."""
    add_checkpoint(parser)
    parser.add_argument("--tokenizer", metavar="FILE", help="tokenizer (default: the one that the checkpoint carries)")
    parser.add_argument("--device", metavar="NAME", help="such as cuda:1 (default: a GPU where there is one, else cpu)")
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="auto",
        help="auto is bf16 where the hardware has it (default: %(default)s)",
    )


def load(args: argparse.Namespace) -> "tuple[Lepton, Tokenizer, int]":
    """Return the model on its device in eval mode, its tokenizer, and the training step of the checkpoint.

    Raises:
        InputError: no such checkpoint, device or tokenizer, or a tokenizer that does not fit the model.
    """
    model, tokenizer, content = load_with_record(args)
    return model, tokenizer, content["step"]


def load_with_record(args: argparse.Namespace) -> "tuple[Lepton, Tokenizer, dict[str, Any]]":
    """As `load`, but with all that the checkpoint holds beside the weights in place of the step."""
    from lepton import checkpoint
    from lepton.api import Lepton
    from lepton.data.tokenizer import Tokenizer, load_tokenizer
    from lepton.runtime.device import keep_freed_memory, pick_device, pick_dtype

    device = pick_device(args.device)
    if device.type == "cpu":
        keep_freed_memory()  # else the logits of every slice are fresh pages, which doubles their time
    content = checkpoint.load(args.checkpoint)
    if args.tokenizer is not None:
        tokenizer = load_tokenizer(Path(args.tokenizer))
    elif content.get("tokenizer"):
        with naming(args.checkpoint):
            tokenizer = Tokenizer.from_json(content["tokenizer"])
    else:
        raise InputError(
            f"{args.checkpoint} carries no tokenizer: name the one that it was trained with, --tokenizer FILE"
        )
    model = Lepton.restored(content, args.checkpoint)
    if tokenizer.size > model.config.vocab_size:
        raise InputError(
            f"the tokenizer has {tokenizer.size} ids, the model {model.config.vocab_size}: they do not fit"
        )
    record = {name: value for name, value in content.items() if name not in ("model", "optimizer")}
    return model.to(device, pick_dtype(args.dtype, device)), tokenizer, record


def rewrite(source: str, out: str, step: int, change: Callable[[dict[str, Any]], None]) -> None:
    """Write the checkpoint `source` to `out` once `change` has changed its content in place.

    Raises:
        InputError: `source` is no longer that of `step`, such as best.pt of a run that goes on, or cannot be written.
    """
    from lepton import checkpoint

    content = checkpoint.load(source)
    if content["step"] != step:
        raise InputError(f"{source} was replaced while it was calibrated (step {step} -> {content['step']}): try again")
    change(content)
    checkpoint.save(out, content)
