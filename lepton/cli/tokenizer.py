"""`tokenizer`: train one on text of one's own, or show the facts of one."""

import argparse
import sys

from lepton.cli.arguments import add_json, print_json
from lepton.cli.prepare import add_separator, separator_of
from lepton.data.tokenizer import MAX_IDS, Tokenizer, load_tokenizer, train_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the actions `train` and `info` with their flags."""
    actions = parser.add_subparsers(dest="action", required=True, metavar="train|info")
    train = actions.add_parser("train", help="train byte-level BPE", description="Train byte-level BPE on text.")
    train.add_argument("sources", nargs="+", metavar="SOURCE", help="files and folders, as `prepare` takes them")
    train.add_argument("--out", required=True, metavar="FILE", help="the .json or .json.xz file to write")
    train.add_argument("--force", action="store_true", help="replace FILE, once the new tokenizer is trained")
    train.add_argument("--vocab_size", type=int, default=MAX_IDS, metavar="N", help=f"ids (default: {MAX_IDS})")
    train.add_argument("--text_field", default="text", metavar="NAME", help="field of JSON entries (default: text)")
    add_separator(train)
    add_json(train)
    info = actions.add_parser("info", help="show ids and hash", description="Show a tokenizer's ids and hash.")
    info.add_argument("--tokenizer", metavar="PATH", help="tokenizer file (default: pile_tokenizer.json, or LEPTON's)")
    add_json(info)


def run(args: argparse.Namespace) -> int:
    """Train, or load, and print the tokenizer's facts."""
    if args.action == "train":
        tokenizer = train_tokenizer(
            args.sources,
            args.out,
            args.vocab_size,
            text_field=args.text_field,
            separator=separator_of(args),
            force=args.force,
            show_progress=sys.stderr.isatty(),
        )
    else:
        tokenizer = load_tokenizer(args.tokenizer)
    facts = _facts(tokenizer)
    if args.json:
        print_json(facts)
    else:
        print("\n".join(f"{name}: {value}" for name, value in facts.items()))
    return 0


def _facts(tokenizer: Tokenizer) -> dict[str, object]:
    return {"ids": tokenizer.size, "eos_id": tokenizer.eos_id, "hash": tokenizer.hash}
