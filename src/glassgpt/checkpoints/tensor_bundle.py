"""Tensor bundles, TensorFlow's checkpoints (model.ckpt.index, model.ckpt.data-*), in NumPy alone.

    TensorBundle(Path("124M/model.ckpt"))["model/wte"]

The data files hold the numbers, end to end; the index is a table from a tensor's name to its
type, shape, place and checksum. This room does not know which tensors make a model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np

from glassgpt.checkpoints.crc32c import crc32c, masked
from glassgpt.checkpoints.tensors import widen_bfloat16
from glassgpt.errors import UserError, explain_os_errors

Value = TypeVar("Value", int, bytes)

# DataType of tensorflow/core/framework/types.proto -> how the numbers lie in the file.
_TYPES = {1: np.dtype("<f4"), 19: np.dtype("<f2"), 14: np.dtype("<u2")}
_BFLOAT16 = 14
_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_LONGEST_NAME = 512  # names share prefixes, so a small index could otherwise unfold to gigabytes


@dataclass(frozen=True)
class _Entry:
    """What the index says of one tensor (BundleEntryProto)."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int  # in bytes
    crc: int  # masked CRC-32C of these bytes
    sliced: bool  # stored in parts, as partitioned variables are

    @classmethod
    def parse(cls, message: bytes) -> _Entry:
        fields = _fields(message)
        shape = _fields(_last(fields, 2, b""))
        # A dimension is a message too, whose field 1 is its size; 0 is not written.
        dims = tuple(_last(_fields(dim), 1, 0) for dim in shape.get(2, []))
        numbers = [_last(fields, number, 0) for number in (1, 3, 4, 5, 6)]
        dtype, shard, offset, size, crc = numbers
        return cls(dtype, dims, shard, offset, size, crc, sliced=7 in fields)


class TensorBundle(Mapping[str, np.ndarray]):
    """The tensors of a TensorFlow checkpoint by name, each read from disk at each access.

    `prefix` is the path up to ".index" and ".data-*". float32, float16 and bfloat16 come as
    float32. Opening it reads the index only; a `UserError` says what is missing or damaged.
    """

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        index = prefix.with_name(f"{prefix.name}.index")
        with explain_os_errors(f"read {index}"):
            raw = index.read_bytes()
        try:
            table = _read_table(raw)
            header = _fields(table.pop("", b""))
            self._shards = _last(header, 1, 0)
            if _last(header, 2, 0):
                raise ValueError("its numbers are big-endian, which GlassGPT does not read")
            self._entries = {name: _Entry.parse(value) for name, value in table.items()}
        except ValueError as error:
            raise UserError(f"{index} can't be read: {error}; fetch or copy it again") from error

    def __getitem__(self, name: str) -> np.ndarray:
        entry, shape = self._entries[name], self.shape_of(name)
        dtype, path = _TYPES[entry.dtype], self._file(entry)
        with explain_os_errors(f"read {path}"):
            # Not a memory map: its pages would count as memory in use, and stay.
            flat = np.fromfile(path, dtype, count=entry.size // dtype.itemsize, offset=entry.offset)
        # Always checked, and no library needed: crc32c.py takes 9 to 27 % of the time of loading.
        if masked(crc32c(flat)) != entry.crc:
            raise UserError(f"{path} is damaged at {name}: wrong checksum; fetch it again")
        if entry.dtype == _BFLOAT16:
            flat = widen_bfloat16(flat)
        return flat.astype(np.float32, copy=False).reshape(shape)

    def __contains__(self, name: object) -> bool:  # without reading the tensor
        return name in self._entries

    def __iter__(self) -> Iterator[str]:
        return iter(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def shape_of(self, name: str) -> tuple[int, ...]:
        """The shape, once all that can be checked without reading the numbers is in order."""
        entry = self._entries[name]
        where = f"{self.prefix}: the tensor {name}"
        if entry.sliced:
            raise UserError(f"{where} is stored in slices; save it unpartitioned")
        if entry.dtype not in _TYPES:
            raise UserError(f"{where} has TensorFlow's type {entry.dtype}; only floats can be read")
        # NumPy can't express a shape beyond these bounds, even where a 0 makes it empty.
        sane = len(entry.shape) < 32 and math.prod(max(n, 1) for n in entry.shape) < 1 << 60
        n_bytes = math.prod(entry.shape) * _TYPES[entry.dtype].itemsize if sane else None
        if n_bytes != entry.size or entry.shard >= self._shards:
            raise UserError(f"{where} has contradictory entries in the index; fetch it again")
        path = self._file(entry)
        with explain_os_errors(f"read {path}"):
            length = path.stat().st_size
        if entry.offset + entry.size > length:
            raise UserError(f"{path} ends before {name}: it is cut short; fetch it again")
        return entry.shape

    def _file(self, entry: _Entry) -> Path:
        suffix = f".data-{entry.shard:05}-of-{self._shards:05}"
        return self.prefix.with_name(self.prefix.name + suffix)


# -- the index: a sorted table of byte strings, in blocks (LevelDB's format) ---------------------
# Whatever is wrong in it raises a ValueError with the reason.


def _read_table(raw: bytes) -> dict[str, bytes]:
    """The whole table: an index of blocks, each with the next keys in order, found by a footer."""
    if int.from_bytes(raw[-8:], "little") != _MAGIC:
        raise ValueError("it is no TensorFlow index, or cut short")
    footer, position = raw[-_FOOTER:], 0
    for _ in range(2):  # skips offset and size of a block that TensorFlow leaves empty
        _, position = _varint(footer, position)
    table: dict[str, bytes] = {}
    last = None
    for _, handle in _block_entries(_block(raw, footer[position:])):
        for key, value in _block_entries(_block(raw, handle)):
            if last is not None and key <= last:  # also a block that is listed twice
                raise ValueError("its names are not in order")
            table[key.decode("utf-8")] = value
            last = key
    return table


def _block(raw: bytes, handle: bytes) -> bytes:
    """The content of the block at (offset, size), after it a type byte and a checksum."""
    offset, position = _varint(handle, 0)
    size, _ = _varint(handle, position)
    end = offset + size + 1
    if end + 4 > len(raw) - _FOOTER:
        raise ValueError("it is cut short")
    if masked(crc32c(raw[offset:end])) != int.from_bytes(raw[end : end + 4], "little"):
        raise ValueError(f"the block at byte {offset} has a wrong checksum")
    if raw[end - 1] != 0:
        raise ValueError(f"the block at byte {offset} is compressed (TensorFlow's never are)")
    return raw[offset : end - 1]


def _block_entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """(key, value) pairs: a key is given by what it shares with the last one, and the rest."""
    restarts = int.from_bytes(block[-4:], "little")  # places to begin a search; we read it all
    end = len(block) - 4 * (restarts + 1)
    if end < 0:
        raise ValueError("a block is too short for its content")
    key, position = b"", 0
    while position < end:
        shared, position = _varint(block, position)
        unshared, position = _varint(block, position)
        size, position = _varint(block, position)
        if shared > len(key) or shared + unshared > _LONGEST_NAME:
            raise ValueError("a name makes no sense")
        if position + unshared + size > end:
            raise ValueError("a block is too short for its content")
        key = key[:shared] + block[position : position + unshared]
        position += unshared + size
        yield key, block[position - size : position]


# -- protocol buffers: as much as the index needs ------------------------------------------------


def _varint(data: bytes, position: int) -> tuple[int, int]:
    """(number, position after it): 7 bits a byte, lowest first; the last has its top bit clear."""
    value = 0
    for shift in range(0, 64, 7):
        if position >= len(data):
            break
        byte = data[position]
        position += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, position
    raise ValueError("a number in it does not end")


def _fields(message: int | bytes) -> dict[int, list[int | bytes]]:
    """Field number -> its values in order, unsigned integers or bytes."""
    if isinstance(message, int):
        raise ValueError("an entry has a number where a message belongs")
    fields: dict[int, list[int | bytes]] = {}
    position = 0
    while position < len(message):
        tag, position = _varint(message, position)
        kind = tag & 7
        if kind == 0:
            value, position = _varint(message, position)
        elif kind in (1, 2, 5):
            size = {1: 8, 5: 4}.get(kind)
            if size is None:
                size, position = _varint(message, position)
            value = message[position : position + size]
            position += size
            if position > len(message):
                raise ValueError("an entry is cut short")
            value = value if kind == 2 else int.from_bytes(value, "little")
        else:
            raise ValueError("an entry is no protocol buffer")
        fields.setdefault(tag >> 3, []).append(value)
    return fields


def _last(fields: dict[int, list[int | bytes]], number: int, default: Value) -> Value:
    """The value that counts where a field is there more than once; absent: its default."""
    value = fields.get(number, [default])[-1]
    if not isinstance(value, type(default)):
        raise ValueError("an entry has a field of the wrong type")
    return value
