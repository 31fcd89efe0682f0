"""The container of a checkpoint, read beside torch: `torch.load` compares no checksum, and trusts every size.

A checkpoint is a zip archive: a pickle, and a record of plain bytes for each storage of its tensors. What is checked is
that both readers of the archive see the same records, whole, and that each record is as large as its storage says. So
nothing is loaded from memory that no record has filled, and loading takes no more memory than the file has bytes.
"""

import io
import math
import pickle
import struct
import zipfile
from collections import OrderedDict
from pathlib import Path
from typing import Any, BinaryIO

from lepton.errors import InputError

ITEM_BYTES = {
    "Double": 8, "Float": 4, "Half": 2, "BFloat16": 2, "Long": 8, "Int": 4, "Short": 2, "Char": 1, "Byte": 1, "Bool": 1,
}  # fmt: skip
"""Bytes of a number in each of torch's storages."""
PICKLE_BYTES = 1 << 26
"""Largest pickle that is read; a model of 3 B parameters needs a thousandth of it."""
LOCAL_HEADER = struct.Struct("<4s5H3I2H")
WITH_DESCRIPTOR, UTF8 = 0x8, 0x800
"""The flags of a record that do not change how its bytes are read."""
FOLDER = 0x10
"""The attribute of a folder, which torch skips as one without bytes."""


def check(path: Path) -> None:
    """Raise unless the archive is whole and every storage has a record of its size.

    Raises:
        InputError: what does not fit.
        Exception: of many other kinds, for an archive that cannot be read.
    """
    with path.open("rb") as file, zipfile.ZipFile(file) as archive:
        records = _records(archive, file)
        if damaged := archive.testzip():
            raise InputError(f"the checksum of '{damaged}' is wrong")
        folder = next(iter(records)).split("/")[0]
        content = records.get(f"{folder}/data.pkl")
        if content is None or content.file_size > PICKLE_BYTES:
            raise InputError("its pickle is missing or too large")
        _Scan(archive.read(content), {name.removeprefix(f"{folder}/"): info for name, info in records.items()}).load()


def _records(archive: zipfile.ZipFile, file: BinaryIO) -> dict[str, zipfile.ZipInfo]:
    """Return the records by name, once the directory of the archive and the records' own headers agree."""
    infos = sorted(archive.infolist(), key=lambda info: info.header_offset)
    end = 0
    for info in infos:
        stored = info.compress_type == zipfile.ZIP_STORED and info.compress_size == info.file_size
        plain = not info.flag_bits & ~(WITH_DESCRIPTOR | UTF8) and not info.external_attr & FOLDER
        if not stored or not plain or info.filename.endswith("/"):
            raise InputError(f"'{info.filename}' is not a plain record")
        file.seek(info.header_offset)
        magic, _, flags, method, *_others, name_length, extra_length = LOCAL_HEADER.unpack(file.read(LOCAL_HEADER.size))
        name = file.read(name_length).decode()
        if (magic, flags, method, name) != (b"PK\3\4", info.flag_bits, info.compress_type, info.orig_filename):
            raise InputError(f"the header of '{info.filename}' contradicts the directory")
        if info.header_offset < end:
            raise InputError(f"'{info.filename}' overlaps another record")
        end = file.tell() + extra_length + info.file_size
    names = {info.filename.lower() for info in infos}  # torch finds records without regard to case
    if len(names) < len(infos) or len({name.split("/")[0] for name in names}) != 1 or end > archive.start_dir:
        raise InputError("its records contradict each other")
    return {info.filename: info for info in infos}


class _Scan(pickle._Unpickler):
    """Reads the pickle for the sizes in it alone: makes no tensor, and calls nothing but what stands here.

    Python's own unpickler and not the one in C, which takes memory for whatever size it reads.
    """

    def __init__(self, content: bytes, records: dict[str, zipfile.ZipInfo]) -> None:
        super().__init__(io.BytesIO(content), encoding="utf-8")
        self._records = records

    def find_class(self, module: str, name: str) -> Any:
        if (module, name) == ("collections", "OrderedDict"):
            return OrderedDict
        if (module, name) == ("torch._utils", "_rebuild_tensor_v2"):
            return _check_tensor
        if module == "torch" and name.removesuffix("Storage") in ITEM_BYTES:
            return name
        raise pickle.UnpicklingError(f"it asks for '{module}.{name}', which no checkpoint needs")

    def persistent_load(self, pid: Any) -> tuple[int, int]:
        """Return the bytes of a number and the numbers of the storage that `pid` names."""
        _, kind, key, _, count = pid
        item = ITEM_BYTES[kind.removesuffix("Storage")]
        record = self._records.get(f"data/{key}")
        if record is None or record.file_size != item * count:
            has = "no bytes" if record is None else f"{record.file_size:,} bytes"
            raise InputError(f"storage {key} should hold {item * count:,} bytes and has {has}")
        return item, count


def _check_tensor(
    storage: tuple[int, int], offset: int, size: tuple[int, ...], stride: tuple[int, ...], *_others: Any
) -> None:
    """Take the place of the function that rebuilds a tensor: compare its extent with its storage."""
    _, count = storage
    reach = offset + sum((length - 1) * step for length, step in zip(size, stride, strict=True)) + 1
    if min(offset, *size, *stride, 0) < 0 or math.prod(size) > count or (0 not in size and reach > count):
        raise InputError(f"a tensor of shape {size} does not fit its storage of {count:,} numbers")
