"""What loaders and calls need around them: the small model, its tokenizer, the specimens. Made once a process."""

from functools import cached_property
from pathlib import Path
from typing import Any

import torch

from lepton.api import Lepton, State
from lepton.data.tokenizer import Tokenizer, load_tokenizer
from lepton.errors import InputError
from tests.cli.tiny import run
from tests.fuzz.judge import LONGEST
from tests.fuzz.specimens import STREAM


class World:
    """Undamaged things beside the damaged one."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        """Where the specimens lie."""

    @cached_property
    def model(self) -> Lepton:
        """The model of the specimens."""
        return Lepton.from_checkpoint(self.folder / "weights.pt")

    @cached_property
    def tokenizer(self) -> Tokenizer:
        """Its tokenizer."""
        return load_tokenizer(self.folder / "tokenizer.json")

    @cached_property
    def state(self) -> State:
        """A state of one row that has read more than a window."""
        with torch.no_grad():
            return self.model(torch.tensor([STREAM])).state

    def command(self, *words: Any) -> Any:
        """Run a command line; its refusal, which must be one line that begins with 'error: ', is an InputError."""
        code, out, err = run(*words)
        if code == 0:
            return out
        errors = [line for line in err.splitlines() if line.startswith("error: ")]
        one_line = len(errors) == 1 and len(errors[0]) <= LONGEST and err.rstrip().endswith(errors[0].rstrip())
        if code == 2 and one_line:
            raise InputError(errors[0])
        raise AssertionError(f"exit code {code}, stderr: {err[-500:]}")
