"""`prepare`: text, Markdown, HTML, code folders, JSON lines, JSON arrays, tables and Parquet -> training shards."""

import argparse
import os
import shlex
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

from lepton.cli.arguments import add_json, print_json
from lepton.data.chat_shards import FIELD, prepare_chat
from lepton.data.chat_shards import ROW_LEN as CHAT_ROW_LEN
from lepton.data.prepare import MAX_ROW_LEN, ROW_LEN, PreparationFields, prepare
from lepton.data.publish import check_out
from lepton.data.snippets import snippets
from lepton.data.sources import MARKER
from lepton.data.split import FLOOR
from lepton.data.tokenizer import load_tokenizer, train_tokenizer
from lepton.errors import InputError

SEQ_LEN = 512
"""What training reads at once unless `--seq_len` is given."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a text file or an .html page (one document), a .jsonl file (one document a line), a .json array, a .csv "
        "or .tsv table (one an entry), each also as .gz, .xz, .bz2 or .zst, a .parquet file (one document a row), or a "
        "folder of such files; in folders, hidden and binary files and linked folders are skipped, and .json files "
        "without text fields are source code",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards; a new or empty one")
    parser.add_argument("--force", action="store_true", help="replace the data set in DIR, once the new one is whole")
    parser.add_argument(
        "--chat",
        action="store_true",
        help="the sources are conversations, for fine-tuning: JSON lines (also a .json array, or .parquet) of "
        '[{"role": "user", "content": "..."}, {"role": "assistant", "content": "..."}, ...], or of objects with such a '
        "list in the field `messages`",
    )
    parser.add_argument(
        "--text_field",
        metavar="NAME",
        help=f"field of JSON entries, column of tables (default: text; with --chat {FIELD})",
    )
    add_separator(parser)
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=0.01,
        metavar="SHARE",
        help=f"share of the documents kept for validation (default: 0.01); of small corpora more, up to {FLOOR} tokens",
    )
    parser.add_argument(
        "--keep_duplicates", action="store_true", help="keep documents that are equal to an earlier one"
    )
    parser.add_argument(
        "--row_len",
        type=int,
        metavar="N",
        help=f"tokens of a row, the most that --seq_len can be; 2..{MAX_ROW_LEN} (default: {ROW_LEN}; with --chat "
        f"{CHAT_ROW_LEN}, and longer conversations are cut)",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="tokenizer file (default: pile_tokenizer.json, or LEPTON's)"
    )
    parser.add_argument(
        "--train_tokenizer",
        type=int,
        metavar="N",
        help="first train a tokenizer of N ids on the sources, into the file DIR.tokenizer.json.xz, and use it",
    )
    add_json(parser)


def add_separator(parser: argparse.ArgumentParser) -> None:
    """Add `--separator`, which `separator_of` reads."""
    parser.add_argument(
        "--separator",
        metavar="TEXT",
        help=f"split documents where TEXT stands, \\n is a new line; '' never (default: where a line is just {MARKER})",
    )


def separator_of(args: argparse.Namespace) -> str | None:
    """Return the separator that was asked for, with its new lines."""
    return None if args.separator is None else args.separator.replace("\\n", "\n")


def run(args: argparse.Namespace) -> int:
    """Prepare, and print what came of it."""
    notes: list[str] = []
    if args.train_tokenizer is not None:
        args.tokenizer = _trained_tokenizer(args)
    tokenizer = load_tokenizer(args.tokenizer)
    how = PreparationFields(val_fraction=args.val_fraction, keep_duplicates=args.keep_duplicates)
    if args.text_field is not None:
        how["text_field"] = args.text_field
    if args.row_len is not None:
        how["row_len"] = args.row_len
    if args.separator is not None:
        if args.chat:
            raise InputError("--separator: conversations are not split; leave it out, or leave out --chat")
        how["separator"] = separator_of(args)
    make = prepare_chat if args.chat else prepare
    metadata = make(args.sources, args.out, tokenizer, force=args.force, show_progress=True, note=notes.append, **how)
    if args.json:
        print("\n".join(notes), end="\n" if notes else "", file=sys.stderr)
        print_json({"out": str(Path(args.out)), **metadata})
        return 0
    print(f"{args.out}: {_contents(metadata)}")
    shown = [f"  {text!r}" for text in snippets(Path(args.out), tokenizer, metadata)]
    print("\n".join([_validation(metadata), *notes, "random snippets of what trains:", *shown]))
    print(_next_step(args, metadata))
    return 0


def _trained_tokenizer(args: argparse.Namespace) -> str:
    """Train a tokenizer on the sources, beside the output folder; return its file."""
    if args.tokenizer is not None:
        raise InputError(f"--tokenizer {args.tokenizer} and --train_tokenizer: give one of them")
    if args.chat:
        raise InputError("--train_tokenizer: a model to fine-tune has a tokenizer already; leave it out")
    out = Path(args.out).absolute()
    check_out(out, args.force)  # before the work
    path = f"{args.out.rstrip('/')}.tokenizer.json.xz"
    train_tokenizer(
        args.sources,
        path,
        args.train_tokenizer,
        text_field=args.text_field or "text",
        separator=separator_of(args),
        force=args.force,
        show_progress=sys.stderr.isatty(),
    )
    return path


def _contents(metadata: dict[str, Any]) -> str:
    """Return how much there is of what."""
    documents, tokens = metadata["documents"], metadata["total_tokens"]
    if "chat" in metadata:
        return f"{documents:,} conversations, {tokens:,} tokens, {metadata['answer_tokens']:,} of them in answers"
    return f"{documents:,} documents, {tokens:,} tokens, {metadata['text_bytes'] / tokens:.2f} bytes of text per token"


def _validation(metadata: dict[str, Any]) -> str:
    """Return what validates, with a warning where it is little."""
    documents, ends, tokens = metadata["val_documents"], metadata["val_ends"], metadata["val_tokens"]
    if not tokens:
        return f"for validation: the last rows, {metadata['held_out_tokens']:,} tokens"
    unit = "conversations" if "chat" in metadata else "documents"
    whose = [f"{documents:,} {unit}"] * bool(documents) + [f"the ends of {ends:,} that train"] * bool(ends)
    little = "; this is little, and what is measured on it is noisy: prepare more text" if tokens < FLOOR else ""
    return f"for validation: {' and '.join(whose)}, {tokens:,} tokens{little}"


def _next_step(args: argparse.Namespace, metadata: dict[str, Any]) -> str:
    """Return the command that trains on the data, or why there is none yet."""
    row_len, chat = metadata["row_len"], "chat" in metadata
    if max(metadata["val_tokens"], metadata["held_out_tokens"]) < 2:
        return "too little to train on: nothing is left for validation; prepare more text"
    words = ["python", "-m", "lepton", "train", "--data_dir", args.out]
    if chat:
        words += ["--init_from", "checkpoints/final.pt", "--checkpoint_dir", "chat"]
        words += ["--seq_len", str(row_len - 1)] if row_len - 1 != SEQ_LEN else []  # a conversation is then never cut
    else:
        words += ["--tokenizer", args.tokenizer] if args.tokenizer else []
        words += ["--seq_len", str(row_len)] if row_len < SEQ_LEN else []
        words += [] if _has_gpu() else ["--model_size", "nano"]
    command = subprocess.list2cmdline(words) if os.name == "nt" else shlex.join(words)
    return f"{'fine-tune a model' if chat else 'train'} on it: {command}"


def _has_gpu() -> bool:
    """Return whether this looks like a machine with an NVIDIA GPU. Asking torch would take seconds."""
    return shutil.which("nvidia-smi") is not None
