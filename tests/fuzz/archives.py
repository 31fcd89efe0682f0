"""Damages of files that hold tensors: .safetensors and .pt, which is a zip of a pickle and of numbers."""

import io
import json
import struct
import warnings
import zipfile
from random import Random

import torch

from tests.fuzz.damage import NUMBERS
from tests.fuzz.edits import TENSORS, edited


def safetensors_header(random: Random, content: bytes) -> bytes:
    """Another header of a .safetensors file before the same numbers."""
    length = struct.unpack("<Q", content[:8])[0]
    header = json.loads(content[8 : 8 + length])
    entry = header[random.choice([name for name in header if name != "__metadata__"])]
    choice = random.randrange(6)
    if choice == 0:
        entry["dtype"] = random.choice(
            ["F64", "F32", "F16", "BF16", "I64", "I32", "U8", "BOOL", "F8_E4M3", "C64", "X", ""]
        )
    elif choice == 1:
        i = random.randrange(max(1, len(entry["shape"])))
        entry["shape"][i : i + 1] = random.choice([[], [0], [1], [1, 1], [2**62], [2**64 - 1], [-1], [1.5], ["1"]])
    elif choice == 2:
        i = random.randrange(2)
        entry["data_offsets"][i] = random.choice([0, -1, entry["data_offsets"][1 - i], len(content), *NUMBERS])
    else:
        header = edited(random, header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + content[8 + length :]


def safetensors_values(random: Random, content: bytes) -> bytes:
    """Other numbers, rows or dtypes in one of the tensors, or in all, with the old metadata."""
    from safetensors.torch import load, save

    length = struct.unpack("<Q", content[:8])[0]
    metadata = json.loads(content[8 : 8 + length]).get("__metadata__")
    tensors = load(content)
    names = list(tensors) if random.random() < 0.2 else [random.choice(list(tensors))]
    change = random.choice(TENSORS)
    for name in names:
        changed = change(random, tensors[name].clone())
        tensors[name] = changed.contiguous() if isinstance(changed, torch.Tensor) else tensors[name]
    return save(tensors, metadata)


def pickled_value(random: Random, content: bytes) -> bytes:
    """One value of a checkpoint is another one, is missing, or has another name; the file is whole."""
    value = torch.load(io.BytesIO(content), weights_only=True)
    file = io.BytesIO()
    torch.save(edited(random, value), file)
    return file.getvalue()


def pickled_size(random: Random, content: bytes) -> bytes:
    """A checkpoint whose configuration asks for more than there is."""
    value = torch.load(io.BytesIO(content), weights_only=True)
    names = [name for name, old in value["config"].items() if isinstance(old, int) and not isinstance(old, bool)]
    value["config"][random.choice(names)] = random.choice([10**6, 10**9, 2**31, 2**62, 10**30, 3, 4, 8])
    file = io.BytesIO()
    torch.save(value, file)
    return file.getvalue()


def pickle_program(random: Random, content: bytes) -> bytes:
    """A checkpoint with a pickle of another kind in it: calls, deep nesting, memo loops, other protocols."""
    programs = [
        b"\x80\x02cos\nsystem\nX\x04\0\0\0trueq\0\x85R.", b"\x80\x02" + b"(" * 100_000 + b".", b"\x80\x02}q\0h\0h\0s.",
        b"\x80\x02" + b"]" * 50_000 + b"a" * 49_999 + b".", b"\x80\x04N.", b"\x80\x05\x95" + b"\xff" * 8 + b".",
        b"\x80\x02.", b"",
        b"\x80\x02ctorch\nzeros\n\x8a\x05\0\0\0\0\x10\x85R.", b"\x80\x02\x8a\xff" + b"\x01" * 255 + b".", b"I1\n.",
        b"\x80\x02h\xff.",
        b"\x80\x02ctorch._utils\n_rebuild_tensor_v2\n)R.", b"\x80\x02X\xff\xff\xff\x7fa.",
        b"\x80\x02ctorch\nfloat32\n.",
    ]  # fmt: skip
    return _rezipped(content, {"data.pkl": random.choice(programs)})


def zip_records(random: Random, content: bytes) -> bytes:
    """A checkpoint's records exchanged, missing, doubled, renamed, compressed, or cut; checksums agree."""
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    at, other = (random.randrange(len(records)) for _ in range(2))
    name, data = records[at]
    choice = random.randrange(8)
    if choice == 0:
        records[at], records[other] = (name, records[other][1]), (records[other][0], data)
    elif choice == 1:
        del records[at]
    elif choice == 2:
        records.append((name, records[other][1]))
    elif choice == 3:
        names = ["../x", "/etc/x", "a/b/c", name + "x", name.upper(), "data.pkl"]
        records[at] = (random.choice(names), data)
    elif choice == 4:
        records[at] = (name, data[: len(data) // 2])
    elif choice == 5:
        records[at] = (name, data + bytes(100))
    elif choice == 6:
        records = [(name.replace("/", "_") if random.random() < 0.5 else "x/" + name, data) for name, data in records]
    return _zipped(records, zipfile.ZIP_DEFLATED if choice == 7 else zipfile.ZIP_STORED)


def zip_field(random: Random, content: bytes) -> bytes:
    """A field of a record in the zip directory, of its local header, or of the end of the directory."""
    layouts = {b"PK\x01\x02": 46, b"PK\x03\x04": 30, b"PK\x05\x06": 22, b"PK\x06\x06": 56, b"PK\x06\x07": 20}
    mark = random.choice([b"PK\x01\x02", b"PK\x01\x02", *layouts])
    starts = [at for at in range(len(content) - 3) if content.startswith(mark, at)]
    if not starts:
        return content[:-1]
    at = random.choice(starts) + random.randrange(4, layouts[mark])
    if random.random() < 0.5:
        return content[:at] + bytes([content[at] ^ 1 << random.randrange(8)]) + content[at + 1 :]
    part = random.choice(
        [struct.pack("<H", random.choice(NUMBERS) % 2**16), struct.pack("<I", random.choice(NUMBERS) % 2**32)]
    )
    return content[:at] + part + content[at + len(part) :]


def zip_bomb(random: Random, content: bytes) -> bytes:
    """A checkpoint with a record that unpacks to 1.1 GB."""
    file = io.BytesIO()
    with (
        zipfile.ZipFile(io.BytesIO(content)) as archive,
        zipfile.ZipFile(file, "w", zipfile.ZIP_DEFLATED, compresslevel=1) as out,
    ):
        names = archive.namelist()
        victim = random.choice(names)
        for name in names:
            if name == victim:
                with out.open(name, "w", force_zip64=True) as record:
                    for _ in range(70):
                        record.write(bytes(1 << 24))
            else:
                out.writestr(name, archive.read(name))
    return file.getvalue()


def _rezipped(content: bytes, changes: dict[str, bytes]) -> bytes:
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        records = [(info.filename, archive.read(info)) for info in archive.infolist()]
    return _zipped([(name, changes.get(name.rpartition("/")[2], data)) for name, data in records], zipfile.ZIP_STORED)


def _zipped(records: list[tuple[str, bytes]], compression: int) -> bytes:
    file = io.BytesIO()
    with warnings.catch_warnings(), zipfile.ZipFile(file, "w", compression) as archive:
        warnings.simplefilter("ignore")  # doubled names are on purpose
        for name, data in records:
            archive.writestr(name, data)
    return file.getvalue()
