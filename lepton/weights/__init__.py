"""The model that comes with LEPTON: this folder holds its weights, and a model card, README.md."""

from pathlib import Path

from lepton.errors import InputError

FOLDER = Path(__file__).parent
"""Where the weights are."""
CARD = "README.md"
FILES = "model*.safetensors"
"""What `python -m lepton export` writes, one file or several."""


def packaged(folder: Path | None = None) -> Path:
    """Return the file of the weights in `folder` (default: those that come with LEPTON), the first one of several.

    `Lepton.from_checkpoint` and `--checkpoint` read it as they read any checkpoint.

    Raises:
        InputError: there are none, such as in a copy of the source that leaves them out.
    """
    folder = folder or FOLDER
    files = sorted(folder.glob(FILES))
    if not files:
        raise InputError(
            f"no weights come with this copy of LEPTON, {folder} has no {FILES}: name a checkpoint (--checkpoint "
            "FILE), or train one first, such as with python train.py --model_size nano"
        )
    return files[0]
