"""Damages that fit any file: of its bytes, and other things in its place."""

import os
import struct
from pathlib import Path
from random import Random

NUMBERS = (0, 1, 2, 0x7F, 0x80, 0xFF, 2**15 - 1, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**63 - 1, 2**63, 2**64 - 1)
"""Where counters and lengths overflow."""


def place(random: Random, content: bytes) -> int:
    """Return a place in `content`, every other time one near its beginning or end, where headers are."""
    size = len(content)
    if not size:
        return 0
    near = min(size, 600)
    choice = random.randrange(4)
    if choice == 0:
        return random.randrange(near)
    if choice == 1:
        return size - 1 - random.randrange(near)
    return random.randrange(size)


def flip(random: Random, content: bytes) -> bytes:
    """One bit."""
    return _put(
        content, at := place(random, content), bytes([(content[at : at + 1] or b"\0")[0] ^ 1 << random.randrange(8)])
    )


def flips(random: Random, content: bytes) -> bytes:
    """Some bits of a stretch of 64 bytes."""
    start = place(random, content)
    for _ in range(random.randint(2, 8)):
        at = min(start + random.randrange(64), max(len(content) - 1, 0))
        content = _put(content, at, bytes([(content[at : at + 1] or b"\0")[0] ^ 1 << random.randrange(8)]))
    return content


def noise(random: Random, content: bytes) -> bytes:
    """A stretch of random bytes in the place of others."""
    return _put(content, place(random, content), random.randbytes(_length(random)))


def zeros(random: Random, content: bytes) -> bytes:
    """A stretch of zeros, such as a block that a disk never wrote."""
    return _put(content, place(random, content), bytes(_length(random)))


def number(random: Random, content: bytes) -> bytes:
    """A number at the edge of its width in the place of others, little-endian: a length, an offset, a count."""
    width, code = random.choice([(1, "B"), (2, "<H"), (4, "<I"), (8, "<Q")])
    return _put(content, place(random, content), struct.pack(code, random.choice(NUMBERS) % 256**width))


def insertion(random: Random, content: bytes) -> bytes:
    """Some bytes more."""
    at = place(random, content)
    return content[:at] + random.randbytes(_length(random)) + content[at:]


def deletion(random: Random, content: bytes) -> bytes:
    """Some bytes less."""
    at = place(random, content)
    return content[:at] + content[at + _length(random) :]


def repetition(random: Random, content: bytes) -> bytes:
    """A stretch twice."""
    at = place(random, content)
    return content[: at + _length(random)] + content[at:]


def swap(random: Random, content: bytes) -> bytes:
    """Two stretches of one length in each other's place."""
    length = min(_length(random), len(content) // 2)
    a, b = sorted(random.randrange(max(1, len(content) - length + 1)) for _ in range(2))
    if b - a < length:
        return content
    return (
        content[:a]
        + content[b : b + length]
        + content[a + length : b]
        + content[a : a + length]
        + content[b + length :]
    )


def cut(random: Random, content: bytes) -> bytes:
    """The end is missing."""
    return content[: place(random, content)]


def beheaded(random: Random, content: bytes) -> bytes:
    """The beginning is missing."""
    return content[place(random, content) :]


def extension(random: Random, content: bytes) -> bytes:
    """Something behind the end."""
    return content + random.choice([bytes(_length(random)), random.randbytes(_length(random)), content, b"\n"])


def replaced(random: Random, content: bytes) -> bytes:
    """Another content altogether."""
    return random.choice(
        [b"", b"\0", b"\n", b"\xef\xbb\xbf", b"PK\x03\x04", b"PK\x05\x06" + bytes(18), b"\x80\x02.", b"\x93NUMPY",
        b"{}",
         b"[]", b"null", b"\xfd7zXZ\0", b"\x1f\x8b\x08", b"BZh9", b"PAR1", random.randbytes(100), b"<html>404</html>",
         b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 12\n", bytes(len(content))]
    )  # fmt: skip


BYTES = (
    flip, flip, flip, flips, noise, zeros, number, number, number, insertion, deletion, repetition, swap, cut, cut,
    beheaded, extension, replaced,
)  # fmt: skip


def missing(_random: Random, path: Path) -> str:
    """Nothing."""
    return str(path)


def pipe(_random: Random, path: Path) -> str:
    """A pipe that nobody writes to."""
    os.mkfifo(path)
    return str(path)


def device(random: Random, path: Path) -> str:
    """A device that is empty, one without an end, one that is full, a terminal."""
    path.symlink_to(random.choice(["/dev/null", "/dev/zero", "/dev/full", "/dev/tty", "/dev/stdin"]))
    return str(path)


def folder(random: Random, path: Path) -> str:
    """A folder, sometimes with a folder of that name in it."""
    (path / path.name if random.random() < 0.5 else path).mkdir(parents=True)
    return str(path)


def loop(_random: Random, path: Path) -> str:
    """A link to itself."""
    path.symlink_to(path)
    return str(path)


def dangling(_random: Random, path: Path) -> str:
    """A link to nothing."""
    path.symlink_to(path.with_name("nothing"))
    return str(path)


def socket(_random: Random, path: Path) -> str:
    """A socket."""
    import socket as sockets

    with sockets.socket(sockets.AF_UNIX) as server:
        here = os.getcwd()
        os.chdir(path.parent)  # a socket's path is short
        try:
            server.bind(path.name)
        finally:
            os.chdir(here)
    return str(path)


def strange_name(random: Random, path: Path) -> str:
    """A name that no file has."""
    names = [
        f"{path}\0",
        f"{path}" + "x" * 300,
        f"{path}/{path.name}",
        "",
        "\udcff" + path.name,
        "\n",
        "/proc/self/mem",
    ]
    return random.choice(names)


KINDS = (missing, pipe, device, folder, loop, dangling, socket, strange_name)
"""Each puts another thing in the file's place (the file is gone already) and returns the name to open."""


def _length(random: Random) -> int:
    return random.choice([1, 2, 4, 8, 16, 100, 512, 4096])


def _put(content: bytes, at: int, part: bytes) -> bytes:
    part = part[: max(len(content) - at, 0)]
    return content[:at] + part + content[at + len(part) :]
