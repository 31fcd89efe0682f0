"""`python -m lepton export`: the weights of a checkpoint alone, in the safetensors format."""

import argparse
from pathlib import Path

from lepton.cli.arguments import add_json, print_json
from lepton.errors import InputError

DTYPES = ("fp32", "bf16")
FILE_NAME = "model.safetensors"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    parser.add_argument("--checkpoint", required=True, metavar="FILE", help="checkpoint to read")
    parser.add_argument(
        "--out", required=True, metavar="PATH", help=f"file to write, NAME.safetensors, or a folder for {FILE_NAME}"
    )
    parser.add_argument(
        "--dtype", choices=DTYPES, default="fp32", help="precision of the parameters (default: %(default)s)"
    )
    parser.add_argument("--force", action="store_true", help="replace a file that is there")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write one file that holds weights, configuration, size and tokenizer, and say how large it is.

    Every command's --checkpoint, `--init_from` and `Lepton.from_checkpoint` read it. Parameters take the precision that
    --dtype says; buffers (the drafter's ids, what was calibrated) stay as they are.
    """
    out = Path(args.out)
    if out.is_dir():
        out = out / FILE_NAME
    if out.suffix != Path(FILE_NAME).suffix:
        raise InputError(f"--out {args.out}: give a name that ends in .safetensors, or a folder")
    if out.exists() and not args.force:
        raise InputError(f"{out} exists: give another --out, or --force to replace it")

    import torch

    from lepton import checkpoint
    from lepton.api import Lepton

    content = checkpoint.load(args.checkpoint)
    model = Lepton.restored(content, args.checkpoint)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    parameters = {name: value.detach().to(dtype) for name, value in model.named_parameters()}
    weights = {**content["model"], **parameters}
    checkpoint.save(out, content | {"model": weights})
    size, count = out.stat().st_size, model.num_params()
    if args.json:
        print_json(
            {"checkpoint": args.checkpoint, "out": str(out), "dtype": args.dtype, "params": count, "bytes": size}
        )
        return 0
    print(f"{count / 1e6:.1f} M parameters in {args.dtype}, {size / 1e6:.1f} MB: written to {out}")
    return 0
