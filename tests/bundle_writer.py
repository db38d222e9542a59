"""Writes TensorFlow's tensor bundles from the description of the format, sound or spoilt.

    write_bundle(tmp_path / "model.ckpt", {"model/wte": array}.items(), shards=2)

For what the committed fixture can't show: several blocks, other types, damage, and the size of
GPT-2 1558M. That the format is understood, the fixture shows: TensorFlow wrote it.
"""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from glassgpt.checkpoints.openai import masked_crc32c

MAGIC = 0xDB4775248B80FB57
TYPES = {"float32": 1, "float64": 2, "int32": 3, "uint16": 14, "float16": 19}  # uint16: bfloat16


def varint(number: int) -> bytes:
    *low, high = [number >> shift & 0x7F for shift in range(0, max(1, number.bit_length()), 7)]
    return bytes([byte | 0x80 for byte in low] + [high])


def field(number: int, value: int | bytes) -> bytes:
    if isinstance(value, int):
        return varint(number << 3) + varint(value)
    return varint(number << 3 | 2) + varint(len(value)) + value


def entry(*, dtype=1, shape=(), shard=0, offset=0, size=0, crc=0, sliced=False) -> bytes:
    """BundleEntryProto."""
    dims = b"".join(field(2, field(1, dim)) for dim in shape)
    numbers = field(1, dtype) + field(2, dims) + field(3, shard) + field(4, offset) + field(5, size)
    checksum = varint(6 << 3 | 5) + crc.to_bytes(4, "little")
    return numbers + checksum + (field(7, b"") if sliced else b"")


def block(items: Iterable[tuple[bytes, bytes]], kind: int = 0, every: int = 16) -> bytes:
    """Entries, restarts, type and checksum; each `every`-th key is written in full."""
    content, restarts, last = b"", [], b""
    for i, (key, value) in enumerate(items):
        shared = 0
        if i % every == 0:
            restarts.append(len(content))
        else:
            while shared < min(len(key), len(last)) and key[shared] == last[shared]:
                shared += 1
        content += varint(shared) + varint(len(key) - shared) + varint(len(value))
        content += key[shared:] + value
        last = key
    content += np.array([*restarts, len(restarts)], "<u4").tobytes() + bytes([kind])
    return content + masked_crc32c(content).to_bytes(4, "little")


def table(items: dict[bytes, bytes], *, per_block: int = 100, kind: int = 0) -> bytes:
    """The content of an .index file, `per_block` entries to a block."""
    ordered, raw, handles = sorted(items.items()), b"", []
    for start in range(0, len(ordered), per_block):
        part = ordered[start : start + per_block]
        data = block(part, kind)
        handles.append((part[-1][0], varint(len(raw)) + varint(len(data) - 5)))
        raw += data
    meta, index = block([]), block(handles)
    footer = b"".join(
        varint(number) for number in (len(raw), len(meta) - 5, len(raw) + len(meta), len(index) - 5)
    )
    return raw + meta + index + footer.ljust(40, b"\0") + MAGIC.to_bytes(8, "little")


def index(entries: dict[str, dict[str, Any]], *, shards: int = 1, **options: Any) -> bytes:
    """`entries`: tensor name -> keywords of `entry`."""
    header = field(1, shards) + field(2, 0) + field(3, field(1, 1))
    named = {name.encode(): entry(**values) for name, values in entries.items()}
    return table({b"": header, **named}, **options)


def write_bundle(
    prefix: Path, tensors: Iterable[tuple[str, np.ndarray]], *, shards: int = 1, **options: Any
) -> dict[str, dict[str, Any]]:
    """Tensors in turn into `shards` data files, and the index; returns the index's entries."""
    paths = [prefix.with_name(f"{prefix.name}.data-{i:05}-of-{shards:05}") for i in range(shards)]
    for path in paths:
        path.write_bytes(b"")
    entries = {}
    for i, (name, tensor) in enumerate(tensors):
        with open(paths[i % shards], "ab") as file:
            entries[name] = dict(
                dtype=TYPES[tensor.dtype.name], shape=tensor.shape, shard=i % shards,
                offset=file.tell(), size=tensor.nbytes, crc=masked_crc32c(tensor.tobytes()),
            )  # fmt: skip
            file.write(np.ascontiguousarray(tensor).data)
    prefix.with_name(f"{prefix.name}.index").write_bytes(index(entries, shards=shards, **options))
    return entries
