"""The tokenizer: byte-level BPE over the `tokenizers` library.

- Any file of that library's JSON form is read, plain or xz-compressed, as long as its decoder is byte-level.
- Encoding never gives a special id: a text that spells ``<|endoftext|>`` is a text about it.
- Decoding goes through bytes, so that any list of ids decodes, a torn character as U+FFFD.
"""

import codecs
import contextlib
import hashlib
import json
import lzma
import operator
import os
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import cached_property
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers

from lepton.data.sources import Corpus
from lepton.errors import InputError, shown
from lepton.files import parse_json, read_bytes, replacing, unpack_xz

EOS = "<|endoftext|>"
SPECIALS = (EOS, "<|pad|>", "<|unk|>")
MAX_IDS = 50257
PUBLIC_NAME = "pile_tokenizer.json"
SHIPPED_NAME = "tokenizer.json.xz"
MAX_BYTES = 1 << 25
"""Most bytes of a tokenizer file, packed and unpacked; those with 50,257 ids have 2 to 4 million."""


def _byte_of_character() -> dict[int, int]:
    """The map of GPT-2's byte-level BPE, from the printable character that stands for a byte to the byte."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: byte for byte in printable} | {256 + n: byte for n, byte in enumerate(others)}


class StreamDecoder:
    """Decodes ids one by one into text, holding back the bytes of a character that is not complete yet."""

    def __init__(self, bytes_of_id: list[bytes]) -> None:
        self._bytes_of_id = bytes_of_id
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """Return the text that `token` completes; empty for a special or unknown id."""
        known = 0 <= token < len(self._bytes_of_id)
        return self._utf8.decode(self._bytes_of_id[token]) if known else ""

    def flush(self) -> str:
        """Return what is held back, as U+FFFD, and start anew."""
        return self._utf8.decode(b"", final=True)


class Tokenizer:
    """Text to ids and back. Made by `from_json`, `load_tokenizer` or `train_tokenizer`."""

    def __init__(self, backend: tokenizers.Tokenizer) -> None:
        backend.no_truncation()
        backend.no_padding()
        backend.encode_special_tokens = True
        self._backend = backend
        eos = backend.token_to_id(EOS)
        if eos is None:
            raise InputError(f"the tokenizer has no {EOS}: it needs one to end a document")
        if dropout := getattr(backend.model, "dropout", None):
            raise InputError(
                f"the tokenizer has dropout {dropout}, which gives a text other ids each time: set it to null"
            )
        if backend.post_processor and not _keeps_ids(json.loads(backend.post_processor.__getstate__())):
            raise InputError("the tokenizer's post-processor drops or repeats the text: its `single` must hold A once")
        if any(token.content == EOS and not token.special for token in backend.get_added_tokens_decoder().values()):
            backend.add_special_tokens([EOS])  # else a text that spells it would end there
        self.eos_id: int = eos
        """The id that ends a document."""
        vocab = backend.get_vocab()
        self.size: int = 1 + max(vocab.values())
        """Number of ids."""
        if self.size > MAX_IDS:
            raise InputError(f"the tokenizer has {self.size} ids: at most {MAX_IDS} fit the model")
        if twice := [i for i, count in Counter(vocab.values()).items() if count > 1]:
            # Which of them the library keeps differs from one time to the next, and so would text and hash.
            raise InputError(f"the tokenizer gives several tokens the id {min(twice)}: give each its own")

    @staticmethod
    def from_json(text: str) -> "Tokenizer":
        """Rebuild a tokenizer from `to_json` or from a file of the `tokenizers` library.

        Raises InputError when it is no such text, is not byte-level, has no end of text, or has too many ids.
        """
        if not isinstance(text, str):
            raise InputError(f"no tokenizer of the `tokenizers` library: {type(text).__name__}, not its JSON text")
        _check_merges(parse_json(text, "no tokenizer of the `tokenizers` library"))
        with _library("no tokenizer of the `tokenizers` library"):
            backend = tokenizers.Tokenizer.from_str(text)
        if not isinstance(backend.decoder, decoders.ByteLevel):
            raise InputError("the tokenizer is not byte-level: give one with a ByteLevel decoder")
        return Tokenizer(backend)

    def to_json(self) -> str:
        """Return the whole tokenizer as text, the form that a checkpoint carries."""
        text: str = self._backend.to_str()
        return text

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, without specials."""
        with _library("the tokenizer cannot encode this text"):
            ids: list[int] = self._backend.encode(_encodable(text), add_special_tokens=False).ids
        return ids

    def limit_cache(self, words: int) -> None:
        """Let the library remember the ids of at most so many words for each thread that encodes.

        By itself it remembers 10,000, about 340 bytes each: what a server with many threads need not do.
        """
        model = self._backend.model
        if isinstance(model, models.BPE | models.Unigram):  # the others remember none
            model._resize_cache(words)

    def special_id(self, token: str) -> int | None:
        """Return the id of a special token, which no text encodes to; None: there is none of that name."""
        specials = {each.content: i for i, each in self._backend.get_added_tokens_decoder().items() if each.special}
        return specials.get(token)

    def encode_batch(self, texts: Iterable[str]) -> list[list[int]]:
        """Return the ids of each text, on all cores."""
        encodable = [_encodable(text) for text in texts]
        with _library("the tokenizer cannot encode this text"):
            batch = self._backend.encode_batch_fast(encodable, add_special_tokens=False)
        return [encoding.ids for encoding in batch]

    def decode(self, ids: Iterable[int]) -> str:
        """Return the text of `ids`. Special and unknown ids have none; a torn character becomes U+FFFD."""
        table = self._bytes_of_id
        try:
            values = [operator.index(i) for i in ids]
        except TypeError:
            raise InputError(f"ids={shown(ids)}: give the ids of one text, a list of integers") from None
        return b"".join(table[i] for i in values if 0 <= i < len(table)).decode("utf-8", "replace")

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder that takes ids one by one and only gives complete characters."""
        return StreamDecoder(self._bytes_of_id)

    def bytes_of(self, token: int) -> bytes:
        """Return the bytes of one id's text, which may be a part of a character; empty for a special or unknown id."""
        table = self._bytes_of_id
        return table[token] if 0 <= token < len(table) else b""

    def token_bytes(self) -> np.ndarray:
        """Return the number of UTF-8 bytes of each id's text, int64 [size]; 0 for specials."""
        return np.array([len(text) for text in self._bytes_of_id], dtype=np.int64)

    @cached_property
    def hash(self) -> str:
        """SHA-256 (hex) of all that decides an id, whatever the file's format and the library's version.

        Settings enter only where they differ from their defaults: a version that adds one changes no hash, nor does
        this the hashes that data sets hold already.
        """
        form = json.loads(self._backend.to_str())
        model = form["model"]
        merges = [merge if isinstance(merge, str) else " ".join(merge) for merge in model.get("merges", [])]
        added = [[token["id"], token["content"]] for token in form["added_tokens"]]
        parts = [model["type"], model["vocab"], merges, added, form["normalizer"], form["pre_tokenizer"]]
        if settings := _settings(form):
            parts.append(settings)
        return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()

    @cached_property
    def _bytes_of_id(self) -> list[bytes]:
        characters = _byte_of_character()
        table = [b""] * self.size
        for token, i in self._backend.get_vocab(with_added_tokens=False).items():
            table[i] = token.translate(characters).encode("latin-1", "replace")
        for i, added in self._backend.get_added_tokens_decoder().items():
            table[i] = b"" if added.special else added.content.encode()
        return table


def _encodable(text: str) -> str:
    """Replace lone surrogates, which JSON and command lines can smuggle in, by question marks."""
    if not isinstance(text, str):
        raise InputError(f"text={shown(text)}: must be a string")
    try:
        text.encode()
    except UnicodeEncodeError:
        return text.encode("utf-8", "replace").decode()
    return text


def _check_merges(form: Any) -> None:
    """Raise InputError for merges without the prefix that the library cuts off them all: it would end the process."""
    model = form.get("model") if isinstance(form, dict) else None
    if not isinstance(model, dict) or not (prefix := model.get("continuing_subword_prefix")):
        return
    merges = model["merges"] if isinstance(model.get("merges"), list) else []
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in merges)
    fits = isinstance(prefix, str) and prefix.isascii()
    if not fits or not all(isinstance(pair, list) and str([*pair, "", ""][1]).startswith(prefix) for pair in pairs):
        raise InputError(f"its merges lack the continuing_subword_prefix {prefix!r}: correct it, or set it to null")


def _settings(form: dict[str, Any]) -> dict[str, Any]:
    """Return what decides an id beside vocabulary, merges, normalizer and pre-tokenizer, where it is no default.

    Special tokens are never found in a text (see `Tokenizer`), so of added tokens only the others' flags count.
    """
    model = form["model"]
    names = model.keys() - {"type", "vocab", "merges", "dropout"}
    settings = {name: model[name] for name in names if model[name] not in (None, "") and model[name] is not False}
    flags = ("single_word", "lstrip", "rstrip", "normalized")
    found = [[token["id"], *(token[flag] for flag in flags)] for token in form["added_tokens"] if not token["special"]]
    return settings | ({"found": found} if found else {})


def _keeps_ids(processor: dict[str, Any]) -> bool:
    """Return whether a post-processor leaves a text's ids as they are, specials apart, which are not asked for."""
    if processor["type"] == "Sequence":
        return all(map(_keeps_ids, processor["processors"]))
    if processor["type"] != "TemplateProcessing":
        return True
    return [piece["Sequence"]["id"] for piece in processor["single"] if "Sequence" in piece] == ["A"]


@contextlib.contextmanager
def _library(failure: str) -> Iterator[None]:
    """Turn the errors of the `tokenizers` library into InputError: it raises bare exceptions, and its panics are not
    even those."""
    try:
        yield
    except (InputError, MemoryError):
        raise
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise InputError(f"{failure}: {' '.join(str(error).split())}") from None


def load_tokenizer(path: str | Path | None = None, beside: Path | None = None) -> Tokenizer:
    """Return the tokenizer at `path`; else ``pile_tokenizer.json`` in the working folder or in the folder `beside`;
    else the one that LEPTON ships. Raises InputError for a file that cannot be used."""
    if path is None:
        folders = [Path.cwd()] if beside is None else [Path.cwd(), beside]
        path = next((folder / PUBLIC_NAME for folder in folders if os.path.lexists(folder / PUBLIC_NAME)), None)
    if path is None:
        content = (resources.files("lepton.data") / SHIPPED_NAME).read_bytes()
        return Tokenizer.from_json(lzma.decompress(content).decode())
    content = read_bytes(path, "tokenizer", MAX_BYTES)
    if not content:
        raise InputError(f"{path} is empty, not a tokenizer")
    if content.startswith(b"\xfd7zXZ"):
        content = unpack_xz(content, str(path), MAX_BYTES)
    try:
        return Tokenizer.from_json(content.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise InputError(f"{path} is not a tokenizer: not UTF-8 text") from None
    except InputError as error:
        raise InputError(f"{path}: {error}") from None


def train_tokenizer(
    sources: Iterable[str | Path],
    out: str | Path,
    vocab_size: int = MAX_IDS,
    *,
    text_field: str = "text",
    separator: str | None = None,
    force: bool = False,
    show_progress: bool = False,
) -> Tokenizer:
    """Train byte-level BPE on `sources` (see `Corpus`) and write it to `out`, xz-compressed if its name ends in .xz.

    The form is that of the public tokenizer: ids 0, 1, 2 are the specials, then come the 256 bytes, then the merges.
    An existing file is only replaced with `force`. Raises InputError for sources without text, too.
    """
    sources, out = list(sources), Path(out)
    smallest = len(SPECIALS) + 256
    if not smallest <= vocab_size <= MAX_IDS:
        raise InputError(f"vocab_size={vocab_size}: must lie in {smallest}..{MAX_IDS}")
    if os.path.isdir(out) or (os.path.exists(out) and not force):
        raise InputError(f"{out} exists: name a new file with --out, or replace a file with --force")
    corpus = Corpus(sources, text_field=text_field, separator=separator)
    if any(path.name == out.name and path.resolve() == out.resolve() for path in corpus.files):
        raise InputError(f"{out} is one of the sources: name another file with --out")
    try:
        with replacing(out) as unfinished:
            unfinished.touch()  # what cannot be written is said before the work
            tokenizer = _train(corpus, vocab_size, show_progress)
            if tokenizer.size == smallest < vocab_size:
                raise InputError(f"found nothing to learn from in {', '.join(map(str, sources))}: name files with text")
            content = tokenizer.to_json().encode()
            packed = lzma.compress(content, preset=9 | lzma.PRESET_EXTREME) if out.suffix == ".xz" else content
            unfinished.write_bytes(packed)
    except OSError as error:
        raise InputError(f"cannot write the tokenizer {out}: {error.strerror}") from None
    return tokenizer


def _train(corpus: Corpus, vocab_size: int, show_progress: bool) -> Tokenizer:
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.post_processor = processors.ByteLevel(trim_offsets=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=list(SPECIALS),
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
        show_progress=show_progress,
    )
    with _library("the `tokenizers` library cannot learn from this text"):
        backend.train_from_iterator((_encodable(piece.text) for piece in corpus.pieces()), trainer)
    return Tokenizer(backend)
