"""Conversations in shards: each whole in a row as if it were alone, and the answers alone as targets."""

import json
import random
from pathlib import Path

import numpy as np
import pytest

from lepton.data.chat import END, ChatTemplate, Message
from lepton.data.chat_shards import prepare_chat
from lepton.data.prepare import prepare
from lepton.data.shards import ShardedDataset
from lepton.data.tokenizer import EOS, Tokenizer
from lepton.errors import InputError
from tests.data.small import small

Talk = list[Message]


@pytest.fixture(scope="module")
def letters() -> Tokenizer:
    return Tokenizer(small(259, added=(EOS, "<|pad|>", END)))


def talks(count: int, seed: int = 0, longest: int = 20) -> list[Talk]:
    chance = random.Random(seed)
    made = []
    for i in range(count):
        messages = [Message("system", "s" * chance.randrange(9))] * (i % 3 == 0)
        for turn in range(chance.randrange(1, 4)):
            messages += [
                Message("user", f"{i}.{turn}?" + "q" * chance.randrange(longest)),
                Message("assistant", "A" * chance.randrange(1, longest)),
            ]
        made.append(messages)
    return made


def write(path: Path, made: list[Talk], *, field: str | None = "messages") -> Path:
    lists = [[message._asdict() for message in messages] for messages in made]
    path.write_text("".join(json.dumps(each if field is None else {field: each}) + "\n" for each in lists))
    return path


def read(folder: Path, split: str, tokenizer: Tokenizer, seq_len: int = 255) -> list[tuple[str, str]]:
    """The documents of a split in order, each with the text of what counts."""
    data = ShardedDataset(
        folder, seq_len=seq_len, seed=0, split=split, vocab_size=259, eos_id=0, tokenizer_hash=tokenizer.hash
    )  # type: ignore[arg-type]
    found = []
    for batch in data.batches(7):
        assert batch.targets is not None
        assert batch.targets.shape == (len(batch.tokens), seq_len)
        for row, length, targets in zip(batch.tokens, batch.lengths, batch.targets, strict=True):
            assert row[length - 1] == 0
            assert not targets[length - 1 :].any()
            text, counted = "", ""
            for i, token in enumerate(row[:length].tolist()):
                text += tokenizer.decode([token])
                counted += tokenizer.decode([token]) if i and targets[i - 1] else ""
                assert i == 0 or token != 2 or targets[i - 1] == row_is_answer(text)
                if token == 0:
                    found.append((text, counted))
                    text, counted = "", ""
    return found


def row_is_answer(text: str) -> bool:
    return text.rfind("Assistant:\n") > max(text.rfind("User:\n"), text.rfind("System:\n"))


def expected(messages: Talk) -> tuple[str, str]:
    names = {"system": "System:\n", "user": "User:\n", "assistant": "Assistant:\n"}
    text = "".join(f"{names[role]}{content}\n" for role, content in messages)
    return text, "".join(message.content for message in messages if message.role == "assistant")


@pytest.mark.parametrize("field", [None, "messages"])
def test_every_conversation_is_whole_in_one_row_and_its_answers_count(
    tmp_path: Path, letters: Tokenizer, field: str | None
) -> None:
    made = talks(200)
    source = write(tmp_path / "a.jsonl", made, field=field)
    metadata = prepare_chat([source], tmp_path / "out", letters, row_len=256, val_fraction=0.2, shard_rows=20)
    train, val = (read(tmp_path / "out", split, letters) for split in ("train", "val"))
    assert sorted(train + val) == sorted(map(expected, made))
    assert len(val) == metadata["val_documents"] > 20
    template = ChatTemplate(letters)
    marked = [template.marked(messages, 0) for messages in made]
    assert metadata["total_tokens"] == sum(map(len, marked))
    assert metadata["answer_tokens"] == sum(int((each >= 1 << 16).sum()) for each in marked)
    assert (metadata["documents"], metadata["chat"], metadata["row_len"]) == (200, "lepton-1", 256)
    shards = sorted((tmp_path / "out").glob("shard_*.npy"))
    assert len(shards) > 1
    rows = sum(len(np.load(path)) for path in shards)
    assert sum(map(len, marked)) / 256 < rows * 1.1 + 5, "rows are mostly full"
    for path in shards:
        flags = np.load(path.with_name(path.name.replace("shard", "answers")))
        assert flags.shape == np.load(path).shape
        assert flags.dtype == np.uint8


def test_windows_that_are_shorter_than_a_row_have_their_part_of_the_answers(tmp_path: Path, letters: Tokenizer) -> None:
    made = talks(60)
    metadata = prepare_chat([write(tmp_path / "a.jsonl", made)], tmp_path / "out", letters, row_len=256)
    counts = []
    for seq_len in (255, 100, 7):
        both = [
            ShardedDataset(tmp_path / "out", seq_len=seq_len, seed=3, split=split, vocab_size=259)  # type: ignore[arg-type]
            for split in ("train", "val")
        ]
        counts.append(sum(data.batch(0, batch_size=data.windows).counted for data in both))
    assert counts == [metadata["answer_tokens"]] * 3


def test_a_conversation_that_is_longer_than_a_row_is_cut_and_counted(tmp_path: Path, letters: Tokenizer) -> None:
    made = [[Message("user", "q"), Message("assistant", letter * 300)] for letter in "abcde"]
    notes: list[str] = []
    prepare_chat([write(tmp_path / "a.jsonl", made)], tmp_path / "out", letters, row_len=100, note=notes.append)
    assert "cut into rows: 5 conversations longer than 100 tokens; see --row_len" in notes
    data = ShardedDataset(tmp_path / "out", seq_len=99, seed=0, split="train", vocab_size=259)
    assert data.rows > 10
    assert data.has_answers


def test_equal_conversations_are_left_out(tmp_path: Path, letters: Tokenizer) -> None:
    made = talks(30)
    source = write(tmp_path / "a.jsonl", made + made[:10])
    metadata = prepare_chat([source], tmp_path / "out", letters, row_len=256)
    assert (metadata["documents"], metadata["duplicates"]) == (30, 10)
    kept = prepare_chat([source], tmp_path / "out", letters, row_len=256, force=True, keep_duplicates=True)
    assert (kept["documents"], kept["duplicates"]) == (40, 0)


def test_few_conversations_validate_on_whole_ones(tmp_path: Path, letters: Tokenizer) -> None:
    made = talks(40)
    metadata = prepare_chat([write(tmp_path / "a.jsonl", made)], tmp_path / "out", letters, row_len=256)
    train, val = (read(tmp_path / "out", split, letters) for split in ("train", "val"))
    assert sorted(train + val) == sorted(map(expected, made))
    assert metadata["val_tokens"] >= metadata["total_tokens"] // 10
    assert len(val) == metadata["val_documents"] > 0


def test_a_data_set_of_text_takes_the_place_of_one_of_conversations(tmp_path: Path, letters: Tokenizer) -> None:
    source = write(tmp_path / "a.jsonl", talks(30))
    prepare_chat([source], tmp_path / "out", letters, row_len=256)
    text = tmp_path / "a.txt"
    text.write_text("some text " * 500)
    prepare([text], tmp_path / "out", letters, row_len=256, force=True)
    assert not list((tmp_path / "out").rglob("answers_*.npy"))
    data = ShardedDataset(tmp_path / "out", seq_len=255, seed=0, split="train", vocab_size=259)
    assert next(data.batches(1)).targets is None


def test_other_answers_are_other_data(tmp_path: Path, letters: Tokenizer) -> None:
    out = tmp_path / "out"
    prepare_chat([write(tmp_path / "a.jsonl", talks(99))], out, letters, row_len=256)
    found = []
    for _ in range(2):
        found.append(ShardedDataset(out, seq_len=255, seed=0, split="train", vocab_size=259).fingerprint())
        np.save(out / "answers_00000.npy", 1 - np.load(out / "answers_00000.npy"))
    assert found[0].pop("content") != found[1].pop("content")
    assert found[0] == found[1]


def test_flags_that_are_missing_or_do_not_fit_are_named(tmp_path: Path, letters: Tokenizer) -> None:
    out = tmp_path / "out"
    prepare_chat([write(tmp_path / "a.jsonl", talks(99))], out, letters, row_len=256, shard_rows=10)

    def opened() -> ShardedDataset:
        return ShardedDataset(out, seq_len=255, seed=0, split="train", vocab_size=259)

    flags = np.load(out / "answers_00000.npy")
    np.save(out / "answers_00000.npy", flags[:-1])
    with pytest.raises(InputError, match=r"answers_00000\.npy does not fit shard_00000\.npy .*: prepare"):
        opened()
    (out / "answers_00000.npy").unlink()
    with pytest.raises(InputError, match=r"no such shard: .*answers_00000\.npy"):
        opened()
    np.save(out / "answers_00000.npy", flags)
    opened()
    for path in out.glob("answers_*.npy"):
        path.unlink()
    with pytest.raises(
        InputError, match=r"out was prepared from conversations, .* answers_\*\.npy .*: prepare .* again"
    ):
        opened()


def test_what_is_no_conversation_is_named_with_its_place(tmp_path: Path, letters: Tokenizer) -> None:
    good = json.dumps({"messages": [message._asdict() for message in talks(1)[0]]}) + "\n"
    for content, problem in (
        (
            good + '{"messages": [{"role": "user", "content": "a"}]}\n',
            r"a\.jsonl, line 2: the conversation does not end",
        ),
        (good + "{", r"a\.jsonl, line 2: no JSON .*; correct the line, or remove it"),
        ('{"text": "a"}\n', r"a\.jsonl, line 1: no field 'messages' \(found: text\); .*--text_field"),
        ("", "no conversation found in "),
    ):
        source = tmp_path / "a.jsonl"
        source.write_text(content)
        with pytest.raises(InputError, match=problem):
            prepare_chat([source], tmp_path / "out", letters)
        assert not (tmp_path / "out").exists()
