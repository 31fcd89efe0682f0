"""`python -m lepton eval`: how well a checkpoint predicts text that it was not trained on."""

import argparse
import math
import sys
import time
from typing import TYPE_CHECKING

from lepton.cli.arguments import add_json, print_json
from lepton.cli.loading import add_loading, load
from lepton.errors import InputError

if TYPE_CHECKING:
    from lepton.data.tokenizer import Tokenizer
    from lepton.evals.heldout import HeldOut
    from lepton.model import Lepton


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_loading(parser)
    parser.add_argument(
        "--data_dir", metavar="DIR", help="folder of shard_*.npy (default: the Python standard library's source)"
    )
    parser.add_argument(
        "--split", choices=("val", "train"), default="val", help="part of the data set (default: %(default)s)"
    )
    parser.add_argument(
        "--text", nargs="+", metavar="FILE", help="text files, folders, .jsonl or .jsonl.xz instead of a data set"
    )
    parser.add_argument("--max_tokens", type=int, metavar="N", help="stop after about so many tokens (default: all)")
    parser.add_argument("--batch_size", type=int, default=8, metavar="N", help="rows at once (default: %(default)s)")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print nats a token, bits a byte and the tokens they come from."""
    from lepton.data.sources import Corpus
    from lepton.evals.heldout import evaluate_documents

    for name in ("max_tokens", "batch_size"):
        value = getattr(args, name)
        if value is not None and value < 1:
            raise InputError(f"--{name} {value}: must be at least 1")
    if args.text and args.data_dir:
        raise InputError(f"--text {args.text[0]} and --data_dir {args.data_dir}: give one of them")
    corpus = Corpus(args.text) if args.text else None
    model, tokenizer, step = load(args)
    start = time.perf_counter()
    if corpus is not None:
        what = f"{len(corpus.files)} file{'s' if len(corpus.files) != 1 else ''}"
        result = evaluate_documents(model, corpus.pieces(), tokenizer, args.max_tokens)
    else:
        what, result = _data_set(args, model, tokenizer)
    seconds = time.perf_counter() - start
    if args.json:
        print_json(
            {
                "checkpoint": args.checkpoint,
                "step": step,
                "data": what,
                "tokens": result.tokens,
                "bytes": result.bytes,
                "nats_per_token": result.nats_per_token,
                "bits_per_byte": result.bits_per_byte if result.bytes else None,
                "seconds": round(seconds, 3),
            }
        )
    else:
        print(f"{args.checkpoint} (step {step}) on {what}")
        print(f"nats per token  {result.nats_per_token:.4f}")
        print(f"bits per byte   {result.bits_per_byte:.4f}")
        print(f"tokens          {result.tokens:,} ({result.bytes:,} bytes, {seconds:.1f} s)")
    return 0


def _data_set(args: argparse.Namespace, model: "Lepton", tokenizer: "Tokenizer") -> "tuple[str, HeldOut]":
    from lepton.data.shards import ShardedDataset
    from lepton.data.stdlib import default_corpus
    from lepton.evals.heldout import evaluate_rows

    folder = args.data_dir or default_corpus(tokenizer)

    def split(seq_len: int) -> ShardedDataset:
        return ShardedDataset(
            folder,
            seq_len=seq_len,
            seed=0,
            split=args.split,
            vocab_size=model.config.vocab_size,
            tokenizer_hash=tokenizer.hash,
        )

    dataset = split(split(1).row_len - 1)  # whole rows
    what = f"{dataset.describe()}, {args.split} split"
    print(what, file=sys.stderr)
    per_batch = args.batch_size * dataset.seq_len
    limit = None if args.max_tokens is None else math.ceil(args.max_tokens / per_batch)
    return what, evaluate_rows(model, dataset.batches(args.batch_size, limit), tokenizer)
