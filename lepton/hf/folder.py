"""A model as a folder that transformers reads."""

import os
import secrets
import shutil
from pathlib import Path

from transformers import GenerationConfig

from lepton.api import Lepton
from lepton.data.tokenizer import Tokenizer
from lepton.engine.options import GenerationOptions
from lepton.errors import InputError
from lepton.files import UNFINISHED, as_path
from lepton.hf.card import card
from lepton.hf.conversion import from_lepton
from lepton.hf.tokenizer import as_fast_tokenizer

CARD_NAME = "README.md"


def write_folder(
    model: Lepton,
    out: str | Path,
    *,
    tokenizer: Tokenizer | None,
    size: str | None = None,
    step: int = 0,
    force: bool = False,
) -> Path:
    """Write weights, configuration, tokenizer, generation configuration, code and card of a model.

    A new folder appears when all of it is there; into one that exists the files go one by one.

    Args:
        model: in the precision that is to be written.
        out: the folder.
        tokenizer: that of the model; None: the folder has none.
        size: name of the model's size, for the card.
        step: steps that it was trained for, for the card.
        force: whether files in a folder that exists are replaced. Others stay.

    Returns:
        The folder.

    Raises:
        InputError: the folder cannot be written, or has files.
    """
    out = as_path(out)
    if out.exists() and not out.is_dir():
        raise InputError(f"{out} is a file: name a folder to write")
    if out.is_dir() and any(out.iterdir()) and not force:
        raise InputError(f"{out} has files: give another folder, or --force to replace those of an export")
    whole = out.resolve()
    unfinished = whole.parent / f".{whole.name}.{secrets.token_hex(4)}{UNFINISHED}"
    try:
        unfinished.mkdir(parents=True)
        _fill(unfinished, model, tokenizer)
        text = card(model.config, model.num_params(), size=size, step=step)
        (unfinished / CARD_NAME).write_text(text, encoding="utf-8")
        for path in unfinished.iterdir():  # weights would be readable for their owner alone
            shutil.copymode(unfinished / CARD_NAME, path)
        if out.is_dir():
            for path in sorted(unfinished.iterdir()):
                os.replace(path, whole / path.name)
        else:
            os.replace(unfinished, whole)
    except OSError as error:
        raise InputError(f"cannot write {out}: {error.strerror or error}; name a folder that can be written") from error
    finally:
        shutil.rmtree(unfinished, ignore_errors=True)
    return out


def _fill(folder: Path, model: Lepton, tokenizer: Tokenizer | None) -> None:
    pad = model.config.eos_id
    if tokenizer is not None:
        fast = as_fast_tokenizer(tokenizer)
        fast.save_pretrained(folder)
        pad = fast.pad_token_id
    wrapped = from_lepton(model, pad_token_id=pad)
    wrapped.generation_config = generation_config(model.config.eos_id, pad)
    wrapped.save_pretrained(folder)


def generation_config(eos_id: int, pad_id: int) -> GenerationConfig:
    """Return LEPTON's own defaults of generation in the terms of transformers."""
    usual = GenerationOptions()
    return GenerationConfig(
        do_sample=True,
        temperature=usual.temperature,
        top_p=usual.top_p,
        top_k=0,  # all; the default of transformers is 50
        max_new_tokens=usual.max_new_tokens,
        bos_token_id=eos_id,
        eos_token_id=eos_id,
        pad_token_id=pad_id,
    )
