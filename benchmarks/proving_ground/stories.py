"""The stories of bAbI (Weston et al. 2015): their files, and other names for those who act in them."""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import NamedTuple

import torch

from lepton.errors import InputError

NUMBERS = (1, 2, 3, 15)
"""One, two and three supporting facts, and deduction."""
KINDS = (
    ("mary", "john", "daniel", "sandra"),
    ("bathroom", "bedroom", "hallway", "office", "kitchen", "garden"),
    ("football", "apple", "milk"),
    ("gertrude", "winona", "emily", "jessica"),
    ("mouse", "cat", "wolf", "sheep"),
)
"""Words that may change places in a story, all of a kind at once: the answer changes with them."""
PLURALS = {"mouse": "mice", "cat": "cats", "wolf": "wolves", "sheep": "sheep"}
PLURAL = "(many)"
"""Follows a noun in the plural: then `sheep` and `sheep` are two words, and one noun has one word."""


class Question(NamedTuple):
    """A question about a story."""

    facts: tuple[str, ...]
    """Words of the sentences before it, each ended by `.`."""
    asked: tuple[str, ...]
    """Words of the question, `?` at the end."""
    answer: str
    number: int
    """Of the task."""


def words_of(sentence: str) -> list[str]:
    """Return the words of a sentence in lower case, its mark at the end, plurals of animals as two words."""
    words = re.findall(r"[a-z]+|[.?]", sentence.lower())
    plural = {many: one for one, many in PLURALS.items() if many != one}
    found = [each for word in words for each in ((plural[word], PLURAL) if word in plural else (word,))]
    for at, word in reversed([*enumerate(found)]):  # of `sheep` only the place tells
        if word == "sheep" and (at == 0 or found[at - 1] == "of"):
            found.insert(at + 1, PLURAL)
    return found


def read_stories(text: str, number: int) -> list[Question]:
    """Return the questions of a file of bAbI, with the facts before each.

    A question, its answer and the numbers of the facts that it needs are set apart by tabs, in some copies by `|`.
    Raises InputError for another text, and for one without questions.
    """
    found, facts = list[Question](), list[str]()
    for count, line in enumerate(text.splitlines(), 1):
        match = re.fullmatch(r"(\d+) ([^\t|]+?)\s*(?:[\t|](\w+)[\t|][\d ]+)?", line)
        if match is None or ("?" in line) != bool(match[3]):
            raise InputError(f"line {count} is not of bAbI: {line[:60]!r}; expected `1 Mary moved to the office.`")
        place, sentence, answer = match.groups()
        facts = [] if place == "1" else facts
        if answer is None:
            facts.extend(words_of(sentence))
        else:
            found.append(Question(tuple(facts), tuple(words_of(sentence)), answer.lower(), number))
    if not found:
        raise InputError("no question in this text: it is not of bAbI")
    return found


@lru_cache(maxsize=4)
def load_stories(folder: str, split: str) -> tuple[Question, ...]:
    """Return the questions of `NUMBERS` in a folder with `qa1_..._train.txt` and so on, of a split, train or test.

    Raises InputError where a file is missing or is not of bAbI.
    """
    found = list[Question]()
    for number in NUMBERS:
        paths = [*Path(folder).glob(f"**/qa{number}_*_{split}.txt")]
        if len(paths) != 1:
            raise InputError(
                f"{folder} holds {len(paths)} files qa{number}_*_{split}.txt: unpack one language of bAbI there"
            )
        found += read_stories(paths[0].read_text("utf-8"), number)
    return tuple(found)


def renamed(question: Question, generator: torch.Generator) -> Question:
    """Return the question with the words of each of `KINDS` in a random order."""
    names = {
        old: kind[new]
        for kind in KINDS
        for old, new in zip(kind, torch.randperm(len(kind), generator=generator).tolist(), strict=True)
    }

    def change(words: Sequence[str]) -> tuple[str, ...]:
        return tuple(names.get(word, word) for word in words)

    (answer,) = change([question.answer])
    return Question(change(question.facts), change(question.asked), answer, question.number)


def invented(generator: torch.Generator, number: int, sentences: int = 6) -> Question:
    """Return a question of the kind of task 1 or 15, by rules of our own: where no data are given."""

    def pick(count: int) -> list[int]:
        return torch.randint(1 << 30, (count,), generator=generator).tolist()

    people, places, _, mice, animals = KINDS
    if number == 15:
        order = torch.randperm(4, generator=generator).tolist()
        fears = [
            [animals[i], PLURAL, "are", "afraid", "of", animals[order[i]], PLURAL, "."] for i in range(len(animals))
        ]
        kinds = [pick(1)[0] % 4 for _ in mice]
        births = [[name, "is", "a", animals[kind], "."] for name, kind in zip(mice, kinds, strict=True)]
        lines = [*fears, *births]
        lines = [lines[i] for i in torch.randperm(8, generator=generator).tolist()]
        who = pick(1)[0] % 4
        asked, answer = ("what", "is", mice[who], "afraid", "of", "?"), animals[order[kinds[who]]]
    else:
        moves = [(people[a % 4], places[b % 6]) for a, b in (pick(2) for _ in range(sentences))]
        lines = [[who, "went", "to", "the", where, "."] for who, where in moves]
        who = moves[pick(1)[0] % sentences][0]
        asked, answer = ("where", "is", who, "?"), dict(moves)[who]
    return Question(tuple(word for line in lines for word in line), asked, answer, number)
