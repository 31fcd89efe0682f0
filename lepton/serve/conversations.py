"""Conversations that the server keeps: what the model has read of each, of constant size, in memory or on disk.

All happens in the event loop but for the reading and writing of files. A turn is whole or not at all: an answer that
was not given to its end leaves a conversation as it was.
"""

import asyncio
import contextlib
import secrets
import tempfile
import time
from collections import OrderedDict
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path

from lepton.errors import InputError
from lepton.model import Network, State
from lepton.serve.limits import Refusal
from lepton.serve.state_files import Notes, StateFiles

GIVEN = "conv_"
"""Begins the ids that the server gives; a client cannot begin a conversation under such an id."""


class Conversation:
    """A conversation with what is known of it. `Conversations` changes it."""

    def __init__(self, notes: Notes, *, on_disk: bool = False) -> None:
        self.notes = notes
        self.state: State | None = None
        """What the model has read, one row, on the CPU; None: nothing, or it is on disk."""
        self.on_disk = on_disk
        """Whether its file holds this very state."""
        self.changing = False
        """Whether a turn or another change is under way."""
        self.lock = asyncio.Lock()
        """Held while its state goes to or comes from disk."""

    @property
    def key(self) -> tuple[str, str]:
        """Its owner and its id."""
        return self.notes.owner, self.notes.id

    def to_dict(self) -> dict[str, object]:
        """Return what its owner is told of it."""
        notes = self.notes
        known = {"id": notes.id, "object": "conversation", "created_at": notes.created}
        return known | {"turns": notes.turns, "tokens": notes.tokens}


class Conversations:
    """All conversations of a server."""

    def __init__(self, model: Network, *, in_memory: int, most: int, folder: Path | None = None) -> None:
        """Keep conversations with `model`; `open` makes them usable.

        Args:
            model: what answers.
            in_memory: conversations whose states are in memory, at most, beside those of turns under way. The others
                are on disk.
            most: conversations of one owner, at most.
            folder: where states are kept on disk, also when the server ends; None: in a folder that ends with it.

        Raises:
            InputError: the folder cannot be used.
        """
        self._model, self._in_memory, self._most = model, in_memory, most
        self._files = None if folder is None else StateFiles(model, folder)
        self._own: tempfile.TemporaryDirectory[str] | None = None
        """The folder that ends with the server."""
        self._all: dict[tuple[str, str], Conversation] = {}
        self._held: OrderedDict[Conversation, None] = OrderedDict()
        """Those in memory, the least recently used first."""

    @property
    def count(self) -> int:
        """Conversations of all owners."""
        return len(self._all)

    @property
    def in_memory(self) -> int:
        """States in memory."""
        return sum(each.state is not None for each in self._held)

    @property
    def files(self) -> StateFiles:
        """Those on disk."""
        assert self._files is not None, "not open"
        return self._files

    async def open(self) -> None:
        """Take in what an earlier server has left in the folder."""
        if self._files is None:
            self._own = tempfile.TemporaryDirectory(prefix="lepton-", ignore_cleanup_errors=True)
            self._files = StateFiles(self._model, Path(self._own.name))
        for notes in await asyncio.to_thread(lambda: list(self.files.found())):
            self._all[notes.owner, notes.id] = Conversation(notes, on_disk=True)

    async def close(self) -> None:
        """Write what is in memory to the folder; one that ends with the server is removed."""
        if self._own is not None:
            self._own.cleanup()
            return
        for each in [*self._held]:
            with contextlib.suppress(Refusal):  # a full disk: the others may fit
                await self._write(each)

    def of(self, owner: str) -> list[Conversation]:
        """Return the conversations of an owner, the oldest first."""
        return sorted((each for each in self._all.values() if each.notes.owner == owner), key=_age)

    def find(self, owner: str, name: str) -> Conversation:
        """Return a conversation. Raises Refusal if the owner has none of this id."""
        found = self._all.get((owner, name))
        if found is None:
            text = f"you have no conversation {name[:64]!r} here"
            raise Refusal(text, param="conversation", code="conversation_not_found", status=404)
        return found

    def create(self, owner: str, name: str | None = None) -> Conversation:
        """Begin a conversation, under an id of the client's or one that is drawn.

        Raises:
            Refusal: there is one of this id; or the owner has too many.
        """
        if name is None:
            name = GIVEN + secrets.token_hex(12)
        elif name.startswith(GIVEN):
            self.find(owner, name)
        if (owner, name) in self._all:
            text = f"there is a conversation {name!r}: go on with it, or delete it first"
            raise Refusal(text, param="id", code="conversation_exists", status=409)
        if len(self.of(owner)) >= self._most:
            text = f"you have {self._most:,} conversations, which is the most: delete one first"
            raise Refusal(text, code="too_many_conversations", status=429)
        made = Conversation(Notes(name, owner, int(time.time())))
        self._all[made.key] = made
        return made

    @contextlib.asynccontextmanager
    async def change(
        self, owner: str, name: str, *, create: bool = False, load: bool = True
    ) -> AsyncIterator[Conversation]:
        """Let a conversation change inside the block, with its state in memory; `commit` changes it.

        With `create`, one that is not there begins, and is gone again unless it was changed. Without `load`, its state
        need not be had.

        Raises:
            Refusal: there is none; another change is under way; or its state cannot be had.
        """
        new = create and (owner, name) not in self._all
        found = self.create(owner, name) if new else self.find(owner, name)
        if found.changing:
            text = f"conversation {name!r} is busy with another request: wait for its end"
            raise Refusal(text, param="conversation", code="conversation_busy", status=409)
        before, found.changing = found.notes, True
        try:
            if load:
                await self.load(found)
            yield found
        finally:
            if found.notes is before:  # else `commit` has let go of it, and it may be in another change
                found.changing = False
                if new:
                    self._forget(found)

    def commit(self, conversation: Conversation, state: State, *, notes: Notes | None = None, turns: int = 0) -> None:
        """Give a conversation that is being changed a new state, and let go of it.

        `notes` are its new ones if they are known; else it has had so many more `turns`.
        """
        own = conversation.notes
        more = replace(own, turns=own.turns + turns, tokens=int(state.position_B[0]))
        conversation.notes, conversation.state, conversation.on_disk = notes or more, state, False
        conversation.changing = False

    async def delete(self, owner: str, name: str) -> None:
        """Remove a conversation. Raises Refusal if there is none, or a change is under way."""
        async with self.change(owner, name, load=False) as found, found.lock:
            await asyncio.to_thread(self.files.delete, found.notes)
            self._forget(found)

    async def load(self, conversation: Conversation) -> State | None:
        """Return the state of a conversation, which is in memory then; None: the model has read nothing.

        Raises:
            Refusal: its file is gone or damaged, or another state cannot be written to make room.
        """
        async with conversation.lock:
            if conversation not in self._held:
                await self._make_room()
                if conversation.on_disk:
                    try:
                        conversation.state = await asyncio.to_thread(self.files.load, conversation.notes)
                    except InputError:
                        text = f"conversation {conversation.notes.id!r} is lost: its file is damaged or gone; delete it"
                        raise Refusal(text, param="conversation", code="conversation_lost", status=410) from None
            if conversation.key in self._all:
                self._held[conversation] = None
                self._held.move_to_end(conversation)
            return conversation.state

    async def _make_room(self) -> None:
        """Write the least recently used states to disk until one more fits into memory; those in use stay."""
        for each in [*self._held]:
            if len(self._held) < self._in_memory:
                return
            if each in self._held and not each.changing and not each.lock.locked():
                async with each.lock:
                    await self._write(each)
                    if not each.changing:  # else a turn has begun with it meanwhile
                        self._held.pop(each, None)
                        each.state = None

    async def _write(self, conversation: Conversation) -> None:
        """Let a conversation's file hold its state, if it has one."""
        notes, state = conversation.notes, conversation.state
        if state is None or conversation.on_disk:
            return
        try:
            await asyncio.to_thread(self.files.save, notes, state)
        except InputError:
            text = "the server cannot write conversations to its disk; delete some, or ask whose server it is"
            raise Refusal(text, code="cannot_keep", status=503) from None
        conversation.on_disk = conversation.state is state

    def _forget(self, conversation: Conversation) -> None:
        self._all.pop(conversation.key, None)
        self._held.pop(conversation, None)


def _age(conversation: Conversation) -> tuple[int, str]:
    return conversation.notes.created, conversation.notes.id
