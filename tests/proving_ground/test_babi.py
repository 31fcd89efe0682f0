"""bAbI: every answer by a slow reading of the story, which knows nothing of how rows are made."""

import numpy as np
import pytest
import torch

from benchmarks.proving_ground.babi import STEP, Babi, main
from benchmarks.proving_ground.stories import KINDS, NUMBERS, PLURAL, invented, read_stories, renamed, words_of
from benchmarks.proving_ground.task import rules
from lepton.data.tokenizer import load_tokenizer
from lepton.errors import InputError
from tests.proving_ground.smoke import smoke

TEXTS = {
    1: "1 Mary moved to the bathroom.\n2 John went to the hallway.\n3 Where is Mary? \tbathroom\t1\n"
    "4 Mary went back to the office.\n5 Where is Mary? \toffice\t4\n",
    2: "1 Mary got the milk there.\n2 Mary moved to the bathroom.\n3 Mary dropped the milk.\n"
    "4 Mary went to the kitchen.\n5 Where is the milk? \tbathroom\t1 2\n",
    3: "1 Mary got the milk there.\n2 Mary moved to the bathroom.\n3 Mary moved to the office.\n"
    "4 Mary left the milk.\n5 Where was the milk before the office? \tbathroom\t1 2 3\n",
    15: "1 Mice are afraid of sheep.\n2 Gertrude is a mouse.\n3 Sheep are afraid of cats.\n4 Winona is a sheep.\n"
    "5 What is gertrude afraid of?\tsheep\t2 1\n6 What is winona afraid of?\tcat\t4 3\n",
}


@pytest.fixture
def folder(tmp_path):
    """The same small stories in both splits."""
    for number, text in TEXTS.items():
        for split in ("train", "test"):
            (tmp_path / f"qa{number}_some-name_{split}.txt").write_text(text)
    return str(tmp_path)


def answer_by_hand(facts, asked):
    """Return the answer: a simulation of who is where and has what, or a look at who fears whom."""
    where, holder, trips, kind, fears = {}, {}, {}, {}, {}
    for line in " ".join(facts).split(" . "):
        words = line.removesuffix(" .").split()
        if "afraid" in words:
            fears[words[0]] = words[words.index("of") + 1]
        elif words[1] == "is":
            kind[words[0]] = words[-1]
        elif words[-1] in KINDS[1]:
            where[words[0]] = words[-1]
            for thing in [each for each in holder if holder[each] == words[0]]:
                trips.setdefault(thing, []).append(words[-1])
        else:
            thing = next(word for word in words if word in KINDS[2])
            if {"dropped", "left", "discarded"} & set(words) or "down" in words:
                holder.pop(thing, None)
            else:
                holder[thing] = words[0]
                if words[0] in where:
                    trips.setdefault(thing, []).append(where[words[0]])
    if asked[0] == "what":
        return fears[kind[asked[2]]]
    if asked[1] == "was":
        visited = [each for i, each in enumerate(trips[asked[3]]) if not i or each != trips[asked[3]][i - 1]]
        last = max(i for i, each in enumerate(visited) if each == asked[-2])
        return visited[last - 1]
    return where[asked[2]] if asked[2] in where else trips[asked[3]][-1]


def read_row(task, row, between):
    """Return facts, question and answer of a row of a task with noise."""
    names = {token: word for word, token in task.ids.items()}
    words = [names.get(token) for token in row]
    *_, answer = words
    at = len(row) - 2
    while words[at - 1] is not None and words[at - 1] != "." and at - 1 >= len(row) - 2 - task.room[1] + 1:
        at -= 1
    story = [word for word in words[: at - between] if word is not None]
    assert all(word is None for word in words[at - between : at])
    return story, words[at:-1], answer


@pytest.mark.parametrize("number", NUMBERS)
def test_the_files_are_read(number):
    found = read_stories(TEXTS[number], number)
    assert len(found) == TEXTS[number].count("?")
    assert read_stories(TEXTS[number].replace("\t", "|"), number) == found
    for question in found:
        assert answer_by_hand(question.facts, question.asked) == question.answer


def test_words():
    assert words_of("Mice are afraid of wolves.") == ["mouse", PLURAL, "are", "afraid", "of", "wolf", PLURAL, "."]
    assert words_of("Sheep are afraid of sheep.")[:2] == words_of("Sheep are afraid of sheep.")[5:7]
    assert words_of("Winona is a sheep.") == ["winona", "is", "a", "sheep", "."]


@pytest.mark.parametrize("number", NUMBERS)
def test_other_names_change_the_answer_with_the_story(number):
    generator, answers = torch.Generator().manual_seed(0), set()
    for _ in range(40):
        question = renamed(read_stories(TEXTS[number], number)[0], generator)
        assert answer_by_hand(question.facts, question.asked) == question.answer
        answers.add(question.answer)
    assert len(answers) == len(KINDS[4] if number == 15 else KINDS[1])


@pytest.mark.parametrize("given", [False, True])
def test_a_row_of_training_has_many_stories(folder, given):
    task = Babi(data_dir=folder if given else "", filler=64, tested=64)
    questions, fillers = task.training(9, 10, 12), set()
    names = {token: word for word, token in task.ids.items()}
    assert torch.equal(questions.targets, questions.level > 0)
    for row, level in zip(questions.tokens.tolist(), questions.level, strict=True):
        ends, start = [place + 2 for place in level.nonzero()[:, 0].tolist()], 0
        assert ends[-1] == len(row)
        for end in ends:
            words = [names.get(token) for token in row[start:end]]
            known = [word for word in words if word is not None]
            asked = next(i for i in range(len(known) - 1, -1, -1) if known[i] in ("where", "what"))
            assert answer_by_hand(known[:asked], known[asked:-1]) == known[-1]
            if start:  # only the last question may have filler before it, and the first story what is left of the row
                assert end == len(row) or None not in words
            start = end
        last = [names.get(token) for token in row[ends[-2] if len(ends) > 1 else 0 :]]
        fillers.add(last.count(None))
    assert max(map(len, (level.nonzero() for level in questions.level))) > 1
    assert len(fillers) > 3


@pytest.mark.parametrize("before", [False, True])
@pytest.mark.parametrize("test", [False, True])
@pytest.mark.parametrize("given", [False, True])
def test_answers_by_hand(folder, test, given, before):
    task = Babi(data_dir=folder if given else "", filler=64, tested=256, before=before, alone=True)
    drawn = [task.held_out(index, 12) for index in range(3)] if test else [task.training(9, 10, 12)]
    for index, questions in enumerate(drawn):
        between = 0 if before else 64 << index
        numbers = set()
        for row, level in zip(questions.tokens.tolist(), questions.level.tolist(), strict=True):
            facts, asked, answer = read_row(task, row, between)
            assert answer_by_hand(facts, asked) == answer
            assert level[:-1] == [0] * (len(level) - 1)
            assert level[-1] // STEP == index
            numbers.add(level[-1] % STEP)
        assert numbers == ({*NUMBERS} if given else {1, 15})


def test_training_begins_with_the_question_right_behind_the_story():
    task = Babi(filler=64, tested=64, alone=True)
    for row in task.training(0, 100_000, 8).tokens.tolist():
        facts, asked, answer = read_row(task, row, 0)
        assert answer_by_hand(facts, asked) == answer


def test_stories_of_our_own_have_no_shortcut():
    task = Babi(filler=16, tested=16)
    found = rules(task, [task.held_out(index, 200) for index in range(4)])
    for rule in found.values():
        assert rule.within(1, 1) < 0.6  # the last of 6 moves is the asked person's own in about half of the stories
        assert rule.within(15, 15) < 0.45
    people = {invented(torch.Generator().manual_seed(seed), 1).asked[2] for seed in range(40)}
    assert people == set(KINDS[0])


def test_prose_between_story_and_question(folder, tmp_path):
    tokenizer = load_tokenizer()
    rng = np.random.default_rng(0)
    for split, low in (("", 300), ("val", 900)):
        (tmp_path / "shards" / split).mkdir(parents=True, exist_ok=True)
        rows = rng.integers(low, low + 500, (8, 2048), dtype=np.uint16)
        np.save(tmp_path / "shards" / split / "shard_00000.npy", rows)
    task = Babi(data_dir=folder, filler_dir=str(tmp_path / "shards"), filler=1024, tested=1024, alone=True)
    assert task.ids["office"] == tokenizer.encode(" office")[0]
    assert len({*task.ids.values()}) == len(task.ids)
    for questions, low in ((task.training(9, 10, 4), 300), (task.held_out(0, 4), 900)):
        middle = questions.tokens[:, -1 - task.room[1] - 900 : -1 - task.room[1]]
        assert bool(((middle >= low) & (middle < low + 500)).all())
        assert set(questions.tokens[:, -1].tolist()) <= {*task.ids.values()}


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"tested": 3000}, "tested=3000"),
        ({"tokenizer": "t.json"}, "tokenizer=t.json"),
    ],
)
def test_what_cannot_be_drawn_is_named(fields, message):
    with pytest.raises(InputError, match=message):
        Babi(**fields)


def test_a_folder_without_stories_is_named(tmp_path):
    with pytest.raises(InputError, match="0 files qa1_"):
        Babi(data_dir=str(tmp_path)).held_out(0, 4)
    for text in ("Mary went home.", "1 Where is Mary? office"):
        with pytest.raises(InputError, match="line 1 is not of bAbI"):
            read_stories(text, 1)
    with pytest.raises(InputError, match="no question"):
        read_stories("1 Mary went home.", 1)


def test_smoke(capsys):
    found = smoke(main, capsys, "--models", "complete", "--rates", "1")
    assert set(found["rows_of_table"][-1]["right_at_level"]) == {"1", "15", str(STEP + 1), str(STEP + 15)}
