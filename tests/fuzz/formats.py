"""Damages that know a file's format: the container stays whole, what it says is wrong."""

import ast
import gzip
import io
import json
import lzma
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

from tests.fuzz import archives
from tests.fuzz.edits import changed, edited

Edit = Callable[[Random, bytes], bytes]

TEXTS = (
    "[" * 200_000, "{\"a\":" * 100_000, "[" * 5000 + "]" * 5000, "9" * 5000, "-" + "1" * 4301, "1e999", "NaN",
    "\"\\ud800\"",
    "\"" + "x" * 100_000 + "\"", "\x00", "\ufeff{}", "// no", "{'a': 1}", "tru", "\"",
)  # fmt: skip
"""Texts in the place of a JSON value."""
PLACEHOLDER = "\u241f here"


def json_value(random: Random, content: bytes) -> bytes:
    """One value of a JSON text is another one, is missing, is there twice, or has another name."""
    value = json.loads(content)
    return json.dumps(edited(random, value)).encode()


def json_text(random: Random, content: bytes) -> bytes:
    """One value of a JSON text is a text that parsers stumble over."""
    value = changed(random, json.loads(content), lambda _old: PLACEHOLDER)
    return json.dumps(value).replace(json.dumps(PLACEHOLDER), random.choice(TEXTS), 1).encode("utf-8", "replace")


def json_encoding(random: Random, content: bytes) -> bytes:
    """The same text in another encoding."""
    return content.decode().encode(random.choice(["utf-16", "utf-32", "utf-8-sig", "utf-7", "utf-16-be"]))


def lines(edit: Edit) -> Edit:
    """Apply an edit of JSON to one line."""

    def edited_line(random: Random, content: bytes) -> bytes:
        parts = content.splitlines()
        at = random.randrange(len(parts))
        parts[at] = edit(random, parts[at]).replace(b"\n", b" ")
        return b"\n".join(parts) + b"\n"

    edited_line.__name__ = f"{edit.__name__}_of_a_line"
    return edited_line


def line_order(random: Random, content: bytes) -> bytes:
    """Lines in another order, some of them empty or torn."""
    parts = content.splitlines()
    random.shuffle(parts)
    at = random.randrange(len(parts))
    parts[at] = random.choice([b"", b" ", parts[at][: len(parts[at]) // 2], b"\r", b"\xff\xfe", b"null", b"3", b"[]"])
    return random.choice([b"\n", b"\r\n", b"\r"]).join(parts)


def packed(edit: Edit, form: Any = lzma) -> Edit:
    """Apply an edit to what a file of a packed form (a module of Python's) holds."""

    def edited_inside(random: Random, content: bytes) -> bytes:
        return form.compress(edit(random, form.decompress(content)))

    edited_inside.__name__ = f"{edit.__name__}_in_{form.__name__}"
    return edited_inside


def xz_form(random: Random, content: bytes) -> bytes:
    """The same content in another form of the format: no checksum, two streams, padding, the old format."""
    plain = lzma.decompress(content)
    return random.choice(
        [
            lambda: lzma.compress(plain, check=lzma.CHECK_NONE, preset=0),
            lambda: lzma.compress(plain[:50], preset=0) + lzma.compress(plain[50:], preset=0),
            lambda: content + bytes(4 * random.randrange(5)) + lzma.compress(b"", preset=0),
            lambda: content + bytes(random.randrange(1, 9)),
            lambda: lzma.compress(plain, format=lzma.FORMAT_ALONE, preset=0),
            lambda: lzma.compress(content, preset=0),
        ]
    )()


_MEGABYTES = 64
_bombs: dict[bytes, bytes] = {}


def xz_bomb(random: Random, _content: bytes) -> bytes:
    """Some hundred kilobytes that unpack to 4 GB: of zeros, of one text in a JSON value."""
    fill, head, tail = random.choice([(b"\0", b"", b""), (b"x", b'{"text": "', b'"}\n'), (b"[", b"", b"")])
    if fill not in _bombs:
        _bombs[fill] = lzma.compress(fill * (_MEGABYTES << 20), preset=0)
    return lzma.compress(head) + _bombs[fill] * (4096 // _MEGABYTES) + lzma.compress(tail)


def npy_header(random: Random, content: bytes) -> bytes:
    """Another header of an .npy file before the same numbers."""
    length = struct.unpack("<H", content[8:10])[0]
    fields = ast.literal_eval(content[10 : 10 + length].decode())
    name = random.choice([*fields, "shape", "descr"])
    rows, width = fields["shape"]
    odd: dict[str, list[Any]] = {
        "descr": ["|O", "<f4", "<f2", "<c8", "|b1", "|u1", "|i1", "<i8", ">u2", "<u8", "|V2", "<U1", "|S0", "<m8[s]",
        "", "x",
                  None, 5, [("a", "<u2")], "<u2,<u2", ("<u2", (2,)), "|S99999999999", "<U2147483647"],
        "shape": [(), (rows,), (rows * width,), (0, width), (rows, 0), (rows, 1), (-1, width), (rows, -width), (-rows,
        -width),
                  (2**62, 4), (2**64, 2), (10**30, 1), (rows + 1, width), (rows - 1, width), (width, rows), (True,
                  width),
                  (float(rows), width), (rows, str(width)), [rows, width], rows, None, (rows, 1, width), ((rows,),
                  width)],
        "fortran_order": [True, None, 1, "False", []],
    }  # fmt: skip
    fields[name] = random.choice(odd[name])
    if random.random() < 0.1:
        fields["more"] = 1
    return _npy(repr(fields), content[10 + length :])


def npy_text(random: Random, content: bytes) -> bytes:
    """A header of an .npy file that is no literal."""
    length = struct.unpack("<H", content[8:10])[0]
    header = content[10 : 10 + length].decode()
    at = random.randrange(len(header.rstrip()))
    texts = ["(", ")", "'", '"', "\\", "#", "\n", "\t", "\0", "é", "\x0c", "{", "}", ":", "0x", "1L", "\n  ",
    "\"\"\"", "(" * 500,
             "-" * 3000, "[" * 9000, "lambda:0", "9" * 5000, "__import__('os')"]  # fmt: skip
    width = random.randrange(3)
    return _npy(header[:at] + random.choice(texts) + header[at + width :], content[10 + length :])


def npy_pickle(random: Random, content: bytes) -> bytes:
    """An array of objects, which only unpickling could read."""
    file = io.BytesIO()
    np.save(file, np.array([[1, None], ["a", random.random()]], dtype=object), allow_pickle=True)
    return file.getvalue()


def npy_values(random: Random, content: bytes) -> bytes:
    """The same shape with other numbers."""
    array = np.load(io.BytesIO(content)).astype(random.choice([np.int64, np.int32, np.uint16, np.uint64, np.int8]))
    info = np.iinfo(array.dtype)
    array[random.randrange(len(array)), random.randrange(array.shape[1])] = random.choice(
        [info.min, info.max, -1 % info.max]
    )
    file = io.BytesIO()
    np.save(file, random.choice([array, array[::-1], array.T, np.asfortranarray(array)]))
    return file.getvalue()


def _npy(header: str, rest: bytes) -> bytes:
    text = header.encode("utf-8", "replace")
    return b"\x93NUMPY\x02\x00" + struct.pack("<I", len(text)) + text + rest


JSON_EDITS: tuple[Edit, ...] = (json_value, json_value, json_value, json_text, json_encoding)
LINE_EDITS: tuple[Edit, ...] = (lines(json_value), lines(json_value), lines(json_text), line_order)
EDITS: dict[str, tuple[Edit, ...]] = {
    ".pt": (archives.pickled_value,) * 6
    + (
        archives.pickled_size,
        archives.pickled_size,
        archives.pickle_program,
        archives.zip_records,
        archives.zip_field,
        archives.zip_field,
        archives.zip_field,
    ),
    ".safetensors": (archives.safetensors_header, archives.safetensors_values),
    ".json": JSON_EDITS,
    ".jsonl": LINE_EDITS,
    ".json.xz": (*map(packed, JSON_EDITS), xz_form),
    ".jsonl.xz": (*map(packed, LINE_EDITS), xz_form),
    ".jsonl.gz": tuple(packed(edit, gzip) for edit in LINE_EDITS),
    ".npy": (npy_header, npy_header, npy_header, npy_text, npy_text, npy_pickle, npy_values),
}
"""The edits of a file by the end of its name."""
BOMBS: dict[str, tuple[Edit, ...]] = {".pt": (archives.zip_bomb,), ".json.xz": (xz_bomb,), ".jsonl.xz": (xz_bomb,)}
"""Rare, since each takes a second to make."""
