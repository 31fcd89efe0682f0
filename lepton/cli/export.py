"""`python -m lepton export`: the weights of a checkpoint alone as safetensors, or a folder for transformers."""

import argparse
from pathlib import Path

from lepton.cli.arguments import add_json, print_json
from lepton.cli.loading import add_checkpoint, choose
from lepton.errors import InputError, naming
from lepton.requirements import need

DTYPES = ("fp32", "bf16", "int8")
FORMS = ("safetensors", "hf")
FILE_NAME = "model.safetensors"
SMALL = 1 << 14
"""Elements below which a matrix is not worth rounding to int8."""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the command's flags."""
    add_checkpoint(parser)
    parser.add_argument(
        "--to",
        choices=FORMS,
        default="safetensors",
        help="safetensors is a file for LEPTON, hf a folder for transformers (default: %(default)s)",
    )
    parser.add_argument(
        "--out",
        required=True,
        metavar="PATH",
        help=f"file to write, NAME.safetensors, or a folder for {FILE_NAME}; with --to hf a folder",
    )
    parser.add_argument(
        "--dtype",
        choices=DTYPES,
        default="fp32",
        help="precision of the parameters; int8 has a scale for each row of a matrix, and is read as fp32 (default: "
        "%(default)s)",
    )
    parser.add_argument(
        "--max_file_mb",
        type=int,
        metavar="N",
        help="write several files of at most N MiB of weights and tokenizer (default: one)",
    )
    parser.add_argument("--force", action="store_true", help="replace files that are there")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Write a file or a folder, and say how large it is."""
    if args.to == "hf" and (args.dtype == "int8" or args.max_file_mb is not None):
        raise InputError("--to hf: takes neither --dtype int8 nor --max_file_mb, which are of LEPTON's own files")
    if args.max_file_mb is not None and args.max_file_mb < 1:
        raise InputError(f"--max_file_mb {args.max_file_mb}: must be at least 1")
    return _folder(args) if args.to == "hf" else _file(args)


def _file(args: argparse.Namespace) -> int:
    """Write weights, configuration, size and tokenizer, to one file or to several.

    Every command's --checkpoint, `--init_from` and `Lepton.from_checkpoint` read it; of several files, any. Parameters
    take the precision that --dtype says; buffers (the drafter's ids, what was calibrated) stay as they are.
    """
    out = Path(args.out)
    if out.is_dir():
        out = out / FILE_NAME
    if out.suffix != Path(FILE_NAME).suffix:
        raise InputError(f"--out {args.out}: give a name that ends in .safetensors, or a folder")
    import torch

    from lepton import checkpoint
    from lepton.api import Lepton
    from lepton.weight_files import parts_beside, to_int8

    there = [path for path in (out, *parts_beside(out)) if path.exists()]
    if there and not args.force:
        raise InputError(f"{there[0]} exists: give another --out, or --force to replace it")

    choose(args)
    content = checkpoint.load(args.checkpoint)
    model = Lepton.restored(content, args.checkpoint)
    dtype = torch.bfloat16 if args.dtype == "bf16" else torch.float32
    parameters = {name: value.detach().to(dtype) for name, value in model.named_parameters()}
    weights = {**content["model"], **parameters}
    if args.dtype == "int8":
        large = {name for name, value in parameters.items() if value.dim() == 2 and value.numel() >= SMALL}
        weights = to_int8(weights, large)
    most = None if args.max_file_mb is None else args.max_file_mb << 20
    files = checkpoint.save_weights(out, content | {"model": weights}, most)
    for path in {*there} - {*files}:
        path.unlink()
    _report(args, files[0], sum(path.stat().st_size for path in files), model.num_params())
    return 0


def _folder(args: argparse.Namespace) -> int:
    """Write a folder that `AutoModelForCausalLM.from_pretrained` and `AutoTokenizer.from_pretrained` read."""
    need("transformers", "export --to hf")
    import torch
    from transformers.utils import logging

    from lepton import checkpoint
    from lepton.api import Lepton
    from lepton.hf.folder import write_folder

    choose(args)
    logging.disable_progress_bar()
    content = checkpoint.load(args.checkpoint)
    model = Lepton.restored(content, args.checkpoint)
    for parameter in model.parameters():
        parameter.data = parameter.to(torch.bfloat16 if args.dtype == "bf16" else torch.float32)
    with naming(args.checkpoint):
        tokenizer = model.tokenizer
    about = {"size": content.get("size"), "step": content["step"]}
    out = write_folder(model, args.out, tokenizer=tokenizer, **about, force=args.force)
    _report(args, out, sum(path.stat().st_size for path in out.iterdir()), model.num_params())
    return 0


def _report(args: argparse.Namespace, out: Path, size: int, count: int) -> None:
    if args.json:
        figures = {"checkpoint": args.checkpoint, "out": str(out), "dtype": args.dtype, "params": count, "bytes": size}
        print_json(figures)
    else:
        print(f"{count / 1e6:.1f} M parameters in {args.dtype}, {size / 1e6:.1f} MB: written to {out}")
