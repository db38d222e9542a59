"""Reads pickles, and the archives that torch.save writes, as data: nothing in them is ever run.

    saved = TorchArchive(Path("ckpt.pt")); saved.array(saved.content["model"]["lm_head.weight"])

A pickle is a program for a small stack machine, and Python's own machine calls whatever the
program names. The machine here only knows the instructions that build plain data; a tensor
stays a record (which bytes, what shape) until someone asks for its array, which is then mapped
from the file after its sizes are checked. This room knows no model and no torch.
"""

from __future__ import annotations

import math
import os
import pickletools
import struct
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from glassgpt.checkpoints.tensors import widen_bfloat16
from glassgpt.errors import UserError, explain_os_errors

_LARGEST = 4 << 20  # bytes of pickle; GPT-2 XL with its optimizer has under a tenth of that

# -- plain data ----------------------------------------------------------------------------------

_VALUES = {"INT", "BININT", "BININT1", "BININT2", "LONG", "LONG1", "LONG4", "FLOAT", "BINFLOAT",
           "UNICODE", "BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "BINBYTES",
           "SHORT_BINBYTES", "BINBYTES8"}  # fmt: skip
_CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False}
_EMPTY = {"EMPTY_DICT": dict, "EMPTY_LIST": list, "EMPTY_SET": list, "EMPTY_TUPLE": tuple}
_TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


@dataclass(frozen=True, slots=True, eq=False)
class _Name:
    """What stands for a function or class: its name. There is nothing to call or to change."""

    name: str


class _Machine:
    """Dictionaries, lists, tuples, text, bytes and numbers; sets become lists.

    Keys are text or numbers, so that no hash of nested tuples is ever computed (n instructions
    can nest them to 2^n leaves). Values may hold themselves: who walks them must bound the walk.
    """

    names: frozenset[str] = frozenset()  # that a pickle may mention

    def __init__(self, where: str) -> None:
        self.where = where
        self.stack: list[Any] = []
        self.marks: list[int] = []
        self.memo: dict[int, Any] = {}

    def run(self, content: bytes) -> Any:
        """The value that the pickle describes; raises `UserError` for anything but data."""
        if len(content) > _LARGEST:
            raise UserError(f"{self.where}: {len(content):,} bytes of pickle are too many; refused")
        try:
            for instruction, argument, _ in pickletools.genops(content):
                self.step(instruction.name, argument)
            return self.stack.pop()
        except UserError:
            raise
        except Exception as error:  # a damaged pickle fails in a dozen ways
            what = f"{type(error).__name__} {error}"
            raise UserError(f"{self.where} is no pickle, or damaged: {what:.100}") from error

    def step(self, name: str, argument: Any) -> None:
        stack = self.stack
        if name in _VALUES:
            if isinstance(argument, int) and not -(1 << 63) <= argument < 1 << 63:
                raise ValueError("a number of more than 64 bits")
            stack.append(argument)
        elif name in _CONSTANTS:
            stack.append(_CONSTANTS[name])
        elif name in _EMPTY:
            stack.append(_EMPTY[name]())
        elif name == "MARK":
            self.marks.append(len(stack))
        elif name in ("TUPLE", "LIST", "DICT"):
            items = self.pop_to(self.marks.pop())
            stack.append({"TUPLE": tuple, "LIST": list, "DICT": _pairs}[name](items))
        elif name in _TUPLES:
            stack.append(tuple(self.pop_to(len(stack) - _TUPLES[name])))
        elif name in ("APPEND", "APPENDS", "ADDITEMS"):
            items = self.pop_to(len(stack) - 1 if name == "APPEND" else self.marks.pop())
            self.top(list).extend(items)
        elif name in ("SETITEM", "SETITEMS"):
            items = self.pop_to(len(stack) - 2 if name == "SETITEM" else self.marks.pop())
            self.top(dict).update(_pairs(items))
        elif name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
            self.memo[len(self.memo) if argument is None else argument] = stack[-1]
        elif name in ("GET", "BINGET", "LONG_BINGET"):
            stack.append(self.memo[argument])
        elif name in ("GLOBAL", "INST", "STACK_GLOBAL"):
            if argument is None:
                argument = " ".join(self.pop_to(len(stack) - 2))
            stack.append(self.mention(argument.replace(" ", ".", 1)))
        elif name == "REDUCE":
            function, arguments = self.pop_to(len(stack) - 2)
            stack.append(self.call(function, arguments))
        elif name == "BINPERSID":
            stack.append(self.find(stack.pop()))
        elif name == "BUILD":  # attributes of an OrderedDict, such as a state dict's versions
            stack.pop()
            self.top(dict)
        elif name not in ("PROTO", "FRAME", "STOP"):
            raise UserError(f"{self.where}: the pickle instruction {name} is no data; refused")

    def pop_to(self, length: int) -> list[Any]:
        """What lies above the first `length` values of the stack."""
        if not 0 <= length <= len(self.stack):
            raise IndexError("the stack is too short")
        items = self.stack[length:]
        del self.stack[length:]
        return items

    def top(self, kind: type) -> Any:
        if type(self.stack[-1]) is not kind:
            raise TypeError(f"a {type(self.stack[-1]).__name__} where a {kind.__name__} belongs")
        return self.stack[-1]

    def mention(self, name: str) -> _Name:
        if name not in self.names:
            raise UserError(f"{self.where} wants to run {name!r:.80}; refused")
        return _Name(name)

    def call(self, function: Any, arguments: Any) -> Any:
        raise TypeError("a call of what is no known function")

    def find(self, key: Any) -> Any:
        raise TypeError("a reference to something outside the pickle")


def _pairs(items: list[Any]) -> dict[str | int, Any]:
    if len(items) % 2 or not all(isinstance(key, str | int) for key in items[::2]):
        raise TypeError("a key that is neither text nor number")
    return dict(zip(items[::2], items[1::2], strict=True))


def read_pickle(path: Path) -> Any:
    """The plain data in a pickle file; raises `UserError` when it names any code."""
    with explain_os_errors(f"read {path}"), open(path, "rb") as file:
        return _Machine(str(path)).run(file.read(_LARGEST + 1))


# -- tensors -------------------------------------------------------------------------------------

_BFLOAT16 = "torch.BFloat16Storage"
_DTYPES = {"torch.FloatStorage": "<f4", "torch.HalfStorage": "<f2", "torch.DoubleStorage": "<f8",
           _BFLOAT16: "<u2", "torch.LongStorage": "<i8", "torch.IntStorage": "<i4",
           "torch.ShortStorage": "<i2", "torch.CharStorage": "i1", "torch.ByteStorage": "u1",
           "torch.BoolStorage": "?"}  # fmt: skip
_REBUILD_TENSOR = "torch._utils._rebuild_tensor_v2"
_REBUILD_PARAMETER = "torch._utils._rebuild_parameter"


@dataclass(frozen=True, slots=True, eq=False)
class Storage:
    """An entry of the archive: what kind of numbers, and how many."""

    kind: str
    key: str
    numel: int


@dataclass(frozen=True, slots=True, eq=False)
class StoredTensor:
    """A part of a storage; as the pickle says, so not to be trusted before `array` checked it."""

    storage: Storage
    offset: int
    size: tuple[Any, ...]
    stride: tuple[Any, ...]


class _TorchMachine(_Machine):
    names = frozenset([*_DTYPES, _REBUILD_TENSOR, _REBUILD_PARAMETER, "collections.OrderedDict"])

    def call(self, function: Any, arguments: Any) -> Any:
        match function, arguments:
            case _Name("collections.OrderedDict"), ():
                return {}
            case _Name(name), (StoredTensor() as tensor, _, _) if name == _REBUILD_PARAMETER:
                return tensor
            case (
                _Name(name),
                (Storage() as storage, int(offset), tuple(size), tuple(stride), *_),
            ) if name == _REBUILD_TENSOR:
                return StoredTensor(storage, offset, size, stride)
        return super().call(function, arguments)

    def find(self, key: Any) -> Any:
        match key:
            case ("storage", _Name(kind), str(entry), _, int(numel)) if kind in _DTYPES:
                return Storage(kind, entry, numel)
        return super().find(key)


class TorchArchive:
    """A file of torch.save: `content` is its data, in which tensors are `StoredTensor`s."""

    def __init__(self, path: Path) -> None:
        self.path = path
        with explain_os_errors(f"read {path}"):
            file = self._file = open(path, "rb")  # noqa: SIM115  (read from as long as this lives)
            start = file.read(2)
            try:
                entries = zipfile.ZipFile(file).infolist()
            except Exception as error:  # a damaged archive, too, fails in a dozen ways
                raise UserError(
                    f"{path} is cut short or damaged; copy it again" if start == b"PK" else
                    f"{path} is no file of torch.save, or one from before PyTorch 1.6 "
                    "(load it there and save it with a newer one)"
                ) from error  # fmt: skip
        self._entries = {entry.filename: entry for entry in entries}
        roots = [name[:-9] for name in self._entries if name.endswith("/data.pkl")]
        if len(roots) != 1:
            raise UserError(f"{path} is no file of torch.save: it holds no data.pkl")
        self._root = roots[0]
        if f"{self._root}/byteorder" in self._entries and bytes(self._entry("byteorder")) == b"big":
            raise UserError(f"{path} was written by a big-endian machine; save it on another one")
        program = self._entry("data.pkl")[: _LARGEST + 1].tobytes()
        self.content = _TorchMachine(str(path)).run(program)

    def array(self, tensor: StoredTensor) -> np.ndarray:
        """The tensor, mapped from the file (bfloat16: widened); checked against the archive."""
        size, storage = tensor.size, tensor.storage
        numbers = (storage.numel, tensor.offset, *size[:9], *tensor.stride[:9])
        if len(size) > 8 or any(type(n) is not int or not 0 <= n < 1 << 48 for n in numbers):
            raise UserError(f"{self.path} is damaged: a tensor has impossible sizes")
        dtype = np.dtype(_DTYPES[storage.kind])
        entry, numel = self._entry(f"data/{storage.key}"), math.prod(size)
        whole = len(entry) == storage.numel * dtype.itemsize
        if not whole or numel == 0 or tensor.offset + numel > storage.numel:
            raise UserError(f"{self.path} is damaged: a tensor lies outside its storage")
        rows = [math.prod(size[i + 1 :]) for i in range(len(size))]
        packed = [n == 1 or s == row for n, s, row in zip(size, tensor.stride, rows, strict=False)]
        if len(tensor.stride) != len(size) or not all(packed):
            raise UserError(f"{self.path}: a tensor is not stored row by row; call contiguous()")
        array = entry.view(dtype)[tensor.offset : tensor.offset + numel].reshape(size)
        if storage.kind == _BFLOAT16:
            return widen_bfloat16(array)
        return array.view(np.ndarray)

    def _entry(self, name: str) -> np.ndarray:
        """The bytes of an entry, (n,) uint8, mapped; they must be what the archive promises."""
        entry = self._entries.get(f"{self._root}/{name}")
        if entry is None:
            raise UserError(f"{self.path} is damaged: its entry {name!r:.80} is missing")
        self._file.seek(entry.header_offset)
        header = self._file.read(30).ljust(30, b"\0")
        start = entry.header_offset + 30 + sum(struct.unpack_from("<2H", header, 26))
        size = min(entry.file_size, os.fstat(self._file.fileno()).st_size - start)
        content = np.empty(0, np.uint8)
        if size > 0:  # a mapping of its own, which leaves memory with the array; never written to
            content = np.memmap(self._file, np.uint8, mode="c", offset=start, shape=(size,))
        if entry.compress_type != zipfile.ZIP_STORED or zlib.crc32(content.data) != entry.CRC:
            raise UserError(f"{self.path} is damaged: {name!r:.80} does not match its checksum")
        return content
