"""`prepare`: text, Markdown, code folders and JSON lines -> training shards."""

import argparse
from pathlib import Path

from lepton.cli.arguments import add_json, print_json
from lepton.data.prepare import prepare
from lepton.data.tokenizer import load_tokenizer


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Declare the flags."""
    parser.add_argument(
        "sources",
        nargs="+",
        metavar="SOURCE",
        help="a text file (one document), a .jsonl or .jsonl.xz file (one document a line), or a folder of such files; "
        "in folders, hidden and binary files are skipped",
    )
    parser.add_argument("--out", required=True, metavar="DIR", help="folder for the shards; a new or empty one")
    parser.add_argument("--force", action="store_true", help="replace the data set in DIR, once the new one is whole")
    parser.add_argument("--text_field", default="text", metavar="NAME", help="field of JSON lines (default: text)")
    parser.add_argument(
        "--val_fraction",
        type=float,
        default=0.01,
        metavar="SHARE",
        help="share of the documents kept for validation (default: 0.01)",
    )
    parser.add_argument(
        "--tokenizer", metavar="PATH", help="tokenizer file (default: pile_tokenizer.json, or LEPTON's)"
    )
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prepare, and print what came of it."""
    metadata = prepare(
        args.sources,
        args.out,
        load_tokenizer(args.tokenizer),
        val_fraction=args.val_fraction,
        text_field=args.text_field,
        force=args.force,
        show_progress=True,
    )
    if args.json:
        print_json({"out": str(Path(args.out)), **metadata})
        return 0
    documents, tokens, text_bytes = metadata["documents"], metadata["total_tokens"], metadata["text_bytes"]
    print(f"{args.out}: {documents:,} documents, {tokens:,} tokens, {text_bytes / tokens:.2f} bytes of text a token")
    print(f"for validation: {metadata['val_documents']:,} documents, {metadata['val_tokens']:,} tokens")
    if metadata["skipped_files"]:
        print(f"skipped: {metadata['skipped_files']:,} files without readable text")
    flag = f" --tokenizer {args.tokenizer}" if args.tokenizer else ""
    print(f"train on it: python train.py --data_dir {args.out}{flag}")
    return 0
