"""Arrays that stay on disk until they are asked for.

    weights = SafeTensors([Path("runs/book/model.safetensors")]); weights["model.norm.weight"]

A file of 6 GB is opened in a moment, and whoever copies its tensors into a model one by one needs
memory for the model and one tensor, not for two models. This room knows files and NumPy; what
the tensors mean is the business of the modules of the formats.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import BinaryIO

import numpy as np
import safetensors
import safetensors.numpy

from glassgpt.errors import UserError, explain_os_errors
from glassgpt.system import write_file

# NumPy has no bfloat16; it is the upper half of a float32, so widening it is exact.
_DTYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "I64": "<i8", "I32": "<i4",
           "I16": "<i2", "I8": "i1", "U8": "u1", "BOOL": "?"}  # fmt: skip


class Lazy(Mapping[str, np.ndarray]):
    """A mapping whose arrays are made when they are asked for, each time anew."""

    def __init__(self, makers: Mapping[str, Callable[[], np.ndarray]]) -> None:
        self._makers = dict(makers)

    def __getitem__(self, name: str) -> np.ndarray:
        return self._makers[name]()

    def __contains__(self, name: object) -> bool:  # Mapping's own would make the array
        return name in self._makers

    def __iter__(self) -> Iterator[str]:
        return iter(self._makers)

    def __len__(self) -> int:
        return len(self._makers)


class SafeTensors(Mapping[str, np.ndarray]):
    """The tensors of one or several safetensors files, mapped into memory one at a time.

    bfloat16 and float16 come as float32. Opening checks the headers, and with `verify` the
    checksum of files that carry one (`write_tensors`); raises `UserError` for what is missing,
    cut short or not what was written. The files stay open: what replaces them is not seen.
    """

    def __init__(self, paths: Sequence[Path], *, verify: bool = True) -> None:
        self.shapes: dict[str, tuple[int, ...]] = {}
        self._places: dict[str, tuple[BinaryIO, str, int]] = {}  # file, dtype, first byte
        for path in paths:
            names, metadata = self._open(path)
            if verify and "sha256" in metadata:
                found = _digest(Lazy({name: partial(self._raw, name) for name in names}))
                if metadata["sha256"] != found:
                    raise UserError(f"{path} is damaged: its content does not match its checksum")

    def _open(self, path: Path) -> tuple[list[str], dict[str, str]]:
        with explain_os_errors(f"read {path}"):
            file = open(path, "rb")  # noqa: SIM115  (kept open as long as this object lives)
        try:
            with safetensors.safe_open(path, framework="numpy") as checked:  # sizes and offsets
                metadata = checked.metadata() or {}
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
        except (safetensors.SafetensorError, ValueError, OSError) as error:
            raise UserError(f"{path} is truncated or damaged: {error}") from error
        header.pop("__metadata__", None)
        for name, entry in header.items():
            if entry["dtype"] not in _DTYPES:
                raise UserError(f"{path}: {name} has dtype {entry['dtype']}; float32, float16 and "
                                "bfloat16 can be read")  # fmt: skip
            self.shapes[name] = tuple(entry["shape"])
            self._places[name] = file, entry["dtype"], 8 + length + entry["data_offsets"][0]
        return list(header), metadata

    def _raw(self, name: str) -> np.ndarray:
        file, dtype, offset = self._places[name]
        shape = self.shapes[name]
        if 0 in shape:
            return np.empty(shape, _DTYPES[dtype])
        # An own mapping per tensor: its pages leave memory when the array does.
        return np.memmap(file, _DTYPES[dtype], mode="r", offset=offset, shape=shape)

    def __getitem__(self, name: str) -> np.ndarray:
        raw = self._raw(name)
        if self._places[name][1] == "BF16":
            return widen_bfloat16(raw)
        return raw.astype(np.float32) if raw.dtype == np.float16 else raw

    def __contains__(self, name: object) -> bool:
        return name in self.shapes

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


def widen_bfloat16(raw: np.ndarray) -> np.ndarray:
    """uint16 bit patterns of bfloat16 -> float32, any shape."""
    wide = raw.astype(np.uint32)
    wide <<= 16
    return wide.view(np.float32)


def tensor_shapes(tensors: Mapping[str, np.ndarray]) -> Mapping[str, tuple[int, ...]]:
    """Name -> shape; without reading anything where they are known."""
    known = getattr(tensors, "shapes", None)
    return known if known is not None else {name: t.shape for name, t in tensors.items()}


def write_tensors(path: Path, tensors: Mapping[str, np.ndarray]) -> None:
    """A safetensors file whose metadata hold the SHA-256 of its tensors."""
    metadata = {"format": "pt", "sha256": _digest(tensors)}
    tensors = {n: np.require(t, requirements="C") for n, t in tensors.items()}
    write_file(path, safetensors.numpy.save(tensors, metadata=metadata))


def _digest(tensors: Mapping[str, np.ndarray]) -> str:
    digest = hashlib.sha256()
    for name in sorted(tensors):
        tensor = tensors[name]
        digest.update(f"{name} {tensor.dtype} {tensor.shape}\n".encode())
        digest.update(np.ascontiguousarray(tensor).data)
    return digest.hexdigest()
