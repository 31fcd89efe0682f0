"""Conversations on disk: a state in a safetensors file each, with notes in its metadata of whose it is."""

import json
import re
import secrets
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open

from lepton.errors import InputError
from lepton.files import remove_unfinished
from lepton.model import Network, State
from lepton.model.state import WEIGHTS
from lepton.model.weights import fingerprint
from lepton.serve.requests import CONVERSATION

SUFFIX = ".safetensors"
NOTES = "conversation"
"""Key of the notes in a file's metadata."""
OWNER = re.compile("[0-9a-f]{0,32}")
MOST = 1 << 62
"""Largest number in notes."""


@dataclass(frozen=True)
class Notes:
    """What is known of a conversation beside its state. It holds no text."""

    id: str
    owner: str
    """Digest of the key that made it; empty on a server without keys."""
    created: int
    """When it began, in seconds since 1970."""
    turns: int = 0
    """Answers that it has had."""
    tokens: int = 0
    """Tokens that the model has read."""


class StateFiles:
    """A folder with a file for each conversation that is not in memory."""

    def __init__(self, model: Network, folder: Path) -> None:
        """Use a folder, which must be there and writable, for states of `model`.

        Raises:
            InputError: it is no such folder.
        """
        self._model, self._folder = model, folder
        try:
            folder.mkdir(parents=True, exist_ok=True)
            probe = folder / f".{secrets.token_hex(8)}"
            probe.touch()
            probe.unlink()
        except OSError as error:
            text = f"{folder}: conversations cannot be kept there ({error.strerror}); name a folder"
            raise InputError(text) from None
        remove_unfinished(folder)

    def path(self, notes: Notes) -> Path:
        """Return where a conversation is kept. The name tells nothing of its id."""
        return self._folder / (sha256(f"{notes.owner}/{notes.id}".encode()).hexdigest()[:32] + SUFFIX)

    def save(self, notes: Notes, state: State) -> None:
        """Write a conversation. Raises InputError if that fails."""
        state.save(self.path(notes), notes={NOTES: json.dumps(asdict(notes))})

    def load(self, notes: Notes) -> State:
        """Return the state of a conversation, on the CPU.

        Raises:
            InputError: its file is gone or damaged, or of another model.
        """
        return self._model.load_state(self.path(notes)).to("cpu")

    def delete(self, notes: Notes) -> None:
        """Remove a conversation's file, if there is one."""
        self.path(notes).unlink(missing_ok=True)

    def found(self) -> Iterator[Notes]:
        """Yield what an earlier server with the same weights has left here."""
        weights = fingerprint(self._model)
        for path in sorted(self._folder.glob(f"*{SUFFIX}")):
            notes, made_by = _notes(path)
            if notes is not None and path == self.path(notes) and made_by == weights:
                yield notes

    def packed(self, notes: Notes, state: State) -> bytes:
        """Return a conversation as the content of a file, without its id and its owner."""

        def written(path: Path) -> bytes:
            state.save(path, notes={NOTES: json.dumps(asdict(replace(notes, id="x", owner="")))})
            return path.read_bytes()

        return self._aside(written)

    @torch.no_grad()
    def unpacked(self, notes: Notes, content: bytes) -> tuple[Notes, State]:
        """Return a conversation from the content of a file, under the id and owner of `notes`, on the CPU.

        Raises:
            InputError: it is no conversation that this model can go on with.
        """

        def read(path: Path) -> tuple[Notes, State]:
            path.write_bytes(content)
            try:
                state = self._model.load_state(path)
            except InputError as error:
                raise InputError(str(error).replace(str(path), "the file")) from None
            if state.batch_size != 1:
                raise InputError(f"the file holds {state.batch_size} texts: give one conversation")
            token = int(self._model.config.eos_id == 0)  # not eos_id, after which the state would not matter
            if not self._model(torch.tensor([[token]], device=self._model.device), state).logits.isfinite().all():
                raise InputError("the file holds numbers that this model cannot go on from")
            old = _notes(path)[0]
            turns = 0 if old is None else old.turns
            return replace(notes, turns=turns, tokens=int(state.position_B[0])), state.to("cpu")

        return self._aside(read)

    def _aside(self, use: Callable[[Path], Any]) -> Any:
        path = self._folder / f".{secrets.token_hex(16)}.tmp"
        try:
            return use(path)
        except OSError as error:
            raise InputError(f"the server cannot write conversations ({error.strerror})") from None
        finally:
            path.unlink(missing_ok=True)


def _notes(path: Path) -> tuple[Notes | None, str | None]:
    """Return the notes in a file, None where it has none that can be, and the fingerprint of its weights."""
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
        found = json.loads(metadata.get(NOTES, "null"))
    except (OSError, ValueError, SafetensorError, RecursionError):
        return None, None
    if not isinstance(found, dict) or found.keys() != Notes.__dataclass_fields__.keys():
        return None, None
    texts, numbers = (found["id"], found["owner"]), (found["created"], found["turns"], found["tokens"])
    if not all(isinstance(each, str) for each in texts) or not all(type(each) is int for each in numbers):
        return None, None
    if not CONVERSATION.fullmatch(found["id"]) or not OWNER.fullmatch(found["owner"]):
        return None, None
    return (Notes(**found) if all(0 <= each <= MOST for each in numbers) else None), metadata.get(WEIGHTS)
