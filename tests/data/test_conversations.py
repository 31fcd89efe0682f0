"""Conversations are read from JSON lines, arrays and Parquet files, and from nothing else."""

import json
from pathlib import Path

import pytest

from lepton.data.chat import Message
from lepton.data.conversations import Conversations
from lepton.errors import InputError
from tests.data.test_chat_shards import talks, write
from tests.data.test_sources import put


def test_lines_arrays_and_parquet_give_the_same(tmp_path: Path) -> None:
    made = talks(20)
    lists = [[message._asdict() for message in messages] for messages in made]
    folder = tmp_path / "in"
    put(folder / "readme.md", "no conversation")
    put(folder / "a.json", json.dumps([{"messages": each} for each in lists]))
    found = Conversations([folder], text_field="messages")
    assert list(found.conversations()) == made
    assert found.skipped_counts() == {".md without usable 'messages'": 1}
    lines = write(tmp_path / "b.jsonl", made, field=None)
    assert list(Conversations([lines], text_field="messages").conversations()) == made
    told: list[int] = []
    list(Conversations([lines, folder], text_field="messages").conversations(told.append))
    assert sum(told) == lines.stat().st_size + (folder / "a.json").stat().st_size
    arrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    parquet.write_table(arrow.table({"n": range(20), "messages": lists}), tmp_path / "c.parquet")
    assert list(Conversations([tmp_path / "c.parquet"], text_field="messages").conversations()) == made


@pytest.mark.parametrize("name", ["a.txt", "a.csv", "a.html", "a.json"])
def test_other_files_are_refused(tmp_path: Path, name: str) -> None:
    path = put(tmp_path / name, '{"x": 1}')
    with pytest.raises(InputError, match=rf"{name}: conversations are read from \.jsonl, \.parquet and \.json arrays"):
        Conversations([path], text_field="messages")


def test_the_first_conversation_is_looked_at_before_anything_is_written(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", [[Message("user", "q")]])
    with pytest.raises(InputError, match=r"a\.jsonl, line 1: the conversation does not end with an answer"):
        Conversations([path], text_field="messages")
