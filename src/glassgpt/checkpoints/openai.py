"""OpenAI's GPT-2 release, the folder with model.ckpt.*: our config, weights and tokenizer of it.

    config, weights, tokenizer = load_openai(Path("124M"))

The weights are read one by one, when asked for, and not kept: a model needs room only once. They
lie in a TensorFlow checkpoint ("tensor bundle"): the data files hold the numbers, end to end; the
index is a table from a tensor's name to its type, shape, place and checksum. This module needs no
torch, no TensorFlow and no net: `files_of` says where the files are, others fetch them.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TypeVar

import google_crc32c
import numpy as np

from glassgpt.checkpoints.tensors import Lazy, widen_bfloat16
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError, explain_os_errors, nearest
from glassgpt.tokenizers.tokenizer import Tokenizer, gpt2_tokenizer

MODELS = ("124M", "355M", "774M", "1558M")
FILES = (
    "checkpoint",
    "encoder.json",
    "hparams.json",
    "model.ckpt.data-00000-of-00001",
    "model.ckpt.index",
    "model.ckpt.meta",
    "vocab.bpe",
)
_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models/{model}/{file}"

Value = TypeVar("Value", int, bytes)

# DataType of tensorflow/core/framework/types.proto -> how the numbers lie in the file.
_TYPES = {1: np.dtype("<f4"), 19: np.dtype("<f2"), 14: np.dtype("<u2")}
_BFLOAT16 = 14
_MAGIC = 0xDB4775248B80FB57
_FOOTER = 48
_LONGEST_NAME = 512  # names share prefixes, so a small index could otherwise unfold to gigabytes


def files_of(model: str) -> dict[str, str]:
    """File name -> URL, for one of OpenAI's `MODELS`."""
    if model not in MODELS:
        raise UserError(
            f"no GPT-2 {model!r}.{nearest(model, MODELS)} The sizes are: {', '.join(MODELS)}"
        )
    return {file: _URL.format(model=model, file=file) for file in FILES}


def load_openai(folder: Path) -> tuple[ModelConfig, Mapping[str, np.ndarray], Tokenizer]:
    """Config, lazy weights and tokenizer; raises `UserError` for what is missing or damaged."""
    raw = {}
    for file in ("hparams.json", "encoder.json", "vocab.bpe"):
        with explain_os_errors(f"read {folder / file}"):
            raw[file] = (folder / file).read_bytes()
    try:
        hparams = json.loads(raw["hparams.json"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'hparams.json'} is damaged: {error}; fetch it again") from error
    try:
        tokenizer = gpt2_tokenizer(raw["encoder.json"], raw["vocab.bpe"])
        tokenizer.check()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}: encoder.json and vocab.bpe make no tokenizer ({error}); fetch them again"
        ) from error
    bundle = TensorBundle(folder / "model.ckpt")
    config, weights = from_openai(hparams, bundle, str(folder))
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: encoder.json has {tokenizer.vocab_size} tokens, hparams.json n_vocab="
            f"{config.vocab_size}; they do not belong together, fetch them again"
        )
    return config, weights, tokenizer


def from_openai(
    hparams: object, tensors: Mapping[str, np.ndarray], where: str
) -> tuple[ModelConfig, Mapping[str, np.ndarray]]:
    """hparams.json and the release's tensors -> the config, and float32 weights by our names.

    The weights are read when asked for, but their presence and shapes are checked here; for a
    `TensorBundle` that takes no reading. Raises `UserError` with `where` in front.
    """
    sizes: dict[str, int] = {}
    for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"):
        size = hparams.get(name) if isinstance(hparams, Mapping) else None
        if type(size) is not int:
            raise UserError(f"{where}: hparams.json has {name}={size!r}; fetch it again")
        sizes[name] = size
    vocab_size, context_length = sizes.pop("n_vocab"), sizes.pop("n_ctx")
    config = ModelConfig.from_shape(
        "gpt2", vocab_size=vocab_size, context_length=context_length, **sizes
    )
    if config.n_layer > len(tensors):  # or the list of their names might fill the memory
        raise UserError(
            f"{where}: hparams.json has n_layer={config.n_layer}, the checkpoint only "
            f"{len(tensors)} tensors; they do not belong together, fetch them again"
        )
    names = {}
    for ours, shape in config.weight_shapes.items():
        theirs = names[ours] = their_name(ours)
        if theirs not in tensors:
            raise UserError(f"{where}: the tensor {theirs} is missing; fetch model.ckpt.* again")
        expected = (1, *reversed(shape)) if is_convolution(theirs) else shape
        bundle = isinstance(tensors, TensorBundle)
        found = tensors.shape_of(theirs) if bundle else tensors[theirs].shape
        if found != expected:
            raise UserError(
                f"{where}: {theirs} has shape {found}, hparams.json asks for {expected}; "
                "they do not belong together, fetch them again"
            )
    return config, Lazy({ours: partial(_read, tensors, theirs) for ours, theirs in names.items()})


def _read(tensors: Mapping[str, np.ndarray], theirs: str) -> np.ndarray:
    """float32 in our orientation: linear layers are convolutions of width 1 here, (1, in, out);
    torch's are (out, in)."""
    tensor = np.asarray(tensors[theirs], np.float32)
    return tensor[0].T if is_convolution(theirs) else tensor


_PARTS = {
    "attn_norm": "ln_1",
    "attn.qkv": "attn/c_attn",
    "attn.out": "attn/c_proj",
    "mlp_norm": "ln_2",
    "mlp.up": "mlp/c_fc",
    "mlp.down": "mlp/c_proj",
    "final_norm": "ln_f",
}


def their_name(ours: str) -> str:
    """blocks.3.attn.qkv.weight -> model/h3/attn/c_attn/w"""
    if ours.endswith("_embedding.weight"):
        return "model/wte" if ours.startswith("token") else "model/wpe"
    part, _, kind = ours.rpartition(".")
    block = ""
    if part.startswith("blocks."):
        _, layer, part = part.split(".", maxsplit=2)
        block = f"h{layer}/"
    weight = "w" if "/c_" in _PARTS[part] else "g"
    return f"model/{block}{_PARTS[part]}/{weight if kind == 'weight' else 'b'}"


def is_convolution(theirs: str) -> bool:
    return "/c_" in theirs and theirs.endswith("/w")


# -- tensor bundles, the checkpoints of TensorFlow -----------------------------------------------


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
        if masked_crc32c(flat.view(np.uint8)) != entry.crc:
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


def masked_crc32c(data: bytes | np.ndarray) -> int:
    """CRC-32C as the files store it: rotated and shifted, so that data may hold checksums too."""
    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF


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
    if masked_crc32c(raw[offset:end]) != int.from_bytes(raw[end : end + 4], "little"):
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
