"""Sentences that give a key its value, in words and numbers of a real tokenizer, and the question for it."""

import re
from dataclasses import dataclass
from functools import lru_cache

import torch
from torch import Tensor

from lepton.data.tokenizer import load_tokenizer
from lepton.errors import InputError

TEMPLATES = """\
The code of{key} is{value}.
The number of{key} is{value}.
Remember that{key} has the number{value}.
Note:{key} stands for{value}.
They wrote{key} on the door, and under it{value}.
Whoever asks for{key} should be told{value}.
The key to{key} is{value}.
In the list{key} comes with{value}.
The price of{key} was fixed at{value}.
Room{key} can be reached at{value}.
The sign said{key}, then{value}.
We call it{key}; its number is{value}.
The secret of{key} is the number{value}.
A letter for{key} came to box{value}.
For{key} the answer will be{value}.
The magic number for{key} is{value}.
He gave{key} the number{value}.
She keeps{key} in drawer{value}.
Ask for{key} and dial{value}.
The ship{key} carries the mark{value}.
My ticket for{key} has the number{value}.
The records show that{key} was filed under{value}.
Entry{key}: see page{value}.
The account of{key} holds{value}.
Project{key} was given the budget{value}.
The year of{key} was{value}.
Station{key} sends on channel{value}.
The distance to{key} is{value} miles.
There are{key} on the map, at point{value}.
The old name was{key}, and its place in the book is{value}.
To open{key}, turn the dial to{value}.
The meeting about{key} is in hall{value}.
Of all things,{key} weighs{value} pounds.
The file named{key} has{value} lines.
The vault called{key} opens with{value}.
Please write down: for{key} use{value}.
The train to{key} leaves from track{value}.
The horse{key} ran under number{value}.
The museum shows{key} in case{value}.
By law{key} is taxed at{value}.
It is known that{key} equals{value}.
The password for{key} has always been{value}.
Under{key} the register has{value}.
The house called{key} stands at number{value}.
If you meet{key}, the word to say is{value}.
The star{key} bears the catalogue number{value}.
A seat was kept for{key}, and it was seat{value}.
The telephone of{key} rings at{value}.
On the shelf,{key} is labelled{value}.
The constant of{key} was measured as{value}.
""".splitlines()
"""The last `NEW` are for the test alone. Between key and value there are one to nine words."""
NEW = 10
QUESTION = ("\nQuestion: what number belongs to", "? Answer:")
"""What stands before the key, and between it and the value; the same for each sentence."""
KEY = VALUE = 2
"""Tokens of a key, two words, and of a value, a number of four digits."""
WORDS = 2048
"""Words of which keys are made: the most frequent ones in lower case, but for the first."""
COMMON = 500
"""The most frequent words, which are no keys: most of them are of the grammar."""


@dataclass(frozen=True)
class Language:
    """What sentences and questions are made of, as ids of a tokenizer."""

    size: int
    """Of the tokenizer."""
    words_W: Tensor
    values_N2: Tensor
    sentences_FS: Tensor
    """The templates, padded on the left; below 0: a place of the filler, of the key, of the value."""
    question_Q: Tensor
    """Likewise, with the value at the end."""

    filler, key, value = -1, -10, -20
    """The first of the places that a sentence has for each."""

    def written(self, form_BKS: Tensor, keys_BK2: Tensor, values_BK2: Tensor, under_BKS: Tensor) -> Tensor:
        """Return sentences of these forms with keys and values, over the filler `under_BKS`."""
        out_BKS = torch.where(form_BKS == self.filler, under_BKS, form_BKS)
        for first, each_BK2 in ((self.key, keys_BK2), (self.value, values_BK2)):
            for i in range(each_BK2.shape[2]):
                out_BKS = torch.where(form_BKS == first - i, each_BK2[..., i, None], out_BKS)
        return out_BKS


@lru_cache(maxsize=2)
def language(path: str) -> Language:
    """Return the language of a tokenizer's file; empty: the tokenizer that LEPTON ships.

    Raises InputError for one that has too few words, or writes hardly a number of four digits in two tokens.
    """
    tokenizer = load_tokenizer(path or None)
    numbers = [ids for ids in tokenizer.encode_batch([f" {n}" for n in range(1000, 10000)]) if len(ids) == VALUE]
    words = [i for i in range(tokenizer.size) if re.fullmatch(r" [a-z]{4,10}", tokenizer.decode([i]))]
    words = words[COMMON : COMMON + WORDS]
    if len(words) < WORDS or len(numbers) < WORDS:
        raise InputError(f"{path}: has {len(words)} words and {len(numbers)} numbers, and needs {WORDS} of each")
    key, value = (list(range(first, first - 2, -1)) for first in (Language.key, Language.value))

    def form(before: str, between: str, after: str) -> list[int]:
        encode = tokenizer.encode
        return [*encode(before), *key, *encode(between), *value, *(encode(after) if after else [])]

    parts = [re.split(r"\{key\}|\{value\}", template) for template in TEMPLATES]
    forms = [form(*each) for each in parts]
    longest = max(map(len, forms))
    padded = [[Language.filler] * (longest - len(each)) + each for each in forms]
    tensors = (torch.tensor(each) for each in (words, numbers, padded, form(*QUESTION, "")))
    return Language(tokenizer.size, *tensors)
