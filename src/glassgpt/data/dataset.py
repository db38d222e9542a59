"""A folder of prepared data: how to recognise one, load it, and write it.

    data = load_data("data/book"); print(len(data.train), data.tokenizer.vocab_size)

What the batches are, `batches.py` says; this module does not know how text becomes tokens
(`prepare.py` does).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from glassgpt.data.batches import Split, TokenFiles
from glassgpt.errors import UserError, explain_os_errors, first_of
from glassgpt.system import Json, before_sigterm, check_outside, own_folder, write_file
from glassgpt.tokenizers.nanogpt_meta import tokenizer_of_meta
from glassgpt.tokenizers.tokenizer import Tokenizer, load_tokenizer, tokenizer_fingerprint

_SHARD_TOKENS = 100_000_000  # tokens per file, 200 MB: easy to copy, and not many to open
_OURS = re.compile(r"(train|val)-(\d+|documents)\.bin|meta\.json|tokenizer(_config)?\.json")
_UNFINISHED, _LOCK = ".preparing", ".preparing.lock"
_NO_CONTENT = {_UNFINISHED, _LOCK, "lost+found"}  # the last is in every new volume of ext4


# ---- recognising one ---------------------------------------------------------------------------


def read_data_meta(folder: str | Path) -> Json | None:
    """What a meta.json of ours says; None without one, or where it is another program's."""
    try:
        meta = json.loads((Path(folder) / "meta.json").read_bytes())
    except (OSError, ValueError, RecursionError):
        return None
    return meta if isinstance(meta, dict) and isinstance(meta.get("options"), dict) else None


def is_prepared(folder: str | Path) -> bool:
    """Whether token files for training lie here: ours, or nanoGPT's."""
    if _holds(folder, "train.bin"):
        return _holds(folder, "val.bin") or _holds(folder, "meta.pkl")
    return has_tokens(folder) and read_data_meta(folder) is not None


def has_tokens(folder: str | Path) -> bool:
    """Whether `prepare` was at work here, be it finished or not."""
    return any(_holds(folder, name) for name in ("train-00000.bin", "val-00000.bin", _UNFINISHED))


def _holds(folder: str | Path, name: str) -> bool:
    return os.path.exists(os.path.join(folder, name))


# ---- loading one -------------------------------------------------------------------------------


@dataclass
class Dataset:
    """A prepared folder: two splits, and the tokenizer that made them."""

    path: Path
    train: Split
    val: Split
    tokenizer: Tokenizer
    fingerprint: str
    source: str  # what it was made from, for messages
    packed: bool = False  # several texts share a row: batches have positions
    keep: Split | None = None  # other text, whose loss is watched

    def check_fits(self, context_length: int) -> None:
        """Raises `UserError` when there is not even one window to train or validate on."""
        if len(self.train) <= context_length:
            raise UserError(
                f"{self.source}: {len(self.train)} training tokens are too few for "
                f"context_length={context_length}; use more text or a shorter --context-length"
            )
        if len(self.val) < 2:
            raise UserError(
                f"{self.source}: {len(self.val)} validation tokens; use more text, a larger "
                "--val-fraction, or --val FILE"
            )


def load_data(path: str | Path) -> Dataset:
    """A folder made by `glassgpt prepare`, or one of nanoGPT's (train.bin, val.bin, meta.pkl)."""
    path = Path(path)
    if (path / "meta.json").exists():
        return _load_ours(path)
    if (path / "train.bin").exists():
        return _load_nanogpt(path)
    raise UserError(f"{path} holds no prepared data (no meta.json); see glassgpt prepare --help")


def _load_ours(path: Path) -> Dataset:
    with explain_os_errors(f"read {path}"):
        try:
            meta = json.loads((path / "meta.json").read_bytes())
            dtype, tokenizer = meta["dtype"], load_tokenizer(path)
            if dtype not in ("<u2", "<u4"):
                raise ValueError(f"dtype {dtype!r}")
            train, val = (
                _token_files(path, meta[name], name, dtype, tokenizer) for name in ("train", "val")
            )
            key, source = meta["fingerprint"], first_of([one["name"] for one in meta["sources"]])
        except UserError:
            raise
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            raise UserError(f"{path / 'meta.json'} is damaged: {error!r}") from error
    if tokenizer_fingerprint(tokenizer) != meta.get("tokenizer"):
        raise UserError(f"{path}: the data were made with another tokenizer.json than this one")
    return Dataset(path, train, val, tokenizer, key, source)


def _token_files(
    folder: Path, meta: Json, name: str, dtype: str, tokenizer: Tokenizer
) -> TokenFiles:
    paths = [folder / file for file in meta["files"]]
    split = TokenFiles(paths, dtype, tokenizer.vocab_size)
    if len(split) != meta["tokens"]:
        raise UserError(
            f"{folder}: {name} holds {len(split)} tokens instead of {meta['tokens']}; "
            "prepare the data again"
        )
    return split


def _load_nanogpt(path: Path) -> Dataset:
    if (path / "meta.pkl").exists():
        tokenizer: Tokenizer = tokenizer_of_meta(path / "meta.pkl")
    else:  # nanoGPT's own rule: no meta.pkl means GPT-2's BPE
        from glassgpt.tokenizers.vocabulary import build_tokenizer

        tokenizer = build_tokenizer("gpt2", lambda: iter(()))
    size = tokenizer.vocab_size
    train, val = (TokenFiles([path / f"{name}.bin"], "<u2", size) for name in ("train", "val"))
    for split in (train, val):
        # A look at the start is enough to notice the wrong vocabulary, and OpenWebText has 17 GB.
        if split.read(0, 1 << 20).max(initial=0) >= size:
            raise UserError(f"{path}: tokens outside the vocabulary; another tokenizer made them")
    digest = hashlib.sha256(f"{len(train)} {len(val)}".encode())
    for split in (train, val):
        digest.update(np.ascontiguousarray(split.read(0, 1 << 20)).data)
    name = digest.hexdigest()[:16]
    return Dataset(path, train, val, tokenizer, name, str(path))


# ---- writing one -------------------------------------------------------------------------------


@contextlib.contextmanager
def replace_data(out: Path, *, inputs: Sequence[Path], overwrite: bool) -> Iterator[Path]:
    """An empty folder, whose files become those of `out` when all goes well and vanish otherwise.

    While they are made they lie in a hidden folder within `out`; at the end they move to their
    places, meta.json last, and without it nothing counts as prepared. So a kill at any moment
    leaves what was there before, or what the next try clears away. `out` itself is never exchanged:
    it may be a mounted volume or the current folder.

    Raises `UserError` where this would delete one of `inputs` or files that `prepare` did not
    write, and while another process writes `out`.
    """
    place = Path(os.path.realpath(out))
    new, lock, existed = place / _UNFINISHED, place / _LOCK, os.path.exists(place)
    check_outside(out, inputs)

    def leave() -> None:
        shutil.rmtree(new, ignore_errors=True)
        lock.unlink(missing_ok=True)
        if not existed:
            with contextlib.suppress(OSError):
                place.rmdir()

    def check() -> None:
        _check_replaceable(out, overwrite)

    with (
        explain_os_errors(f"write {out}"),
        own_folder(out, _LOCK, check, keep_empty=existed),
    ):
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        try:
            with before_sigterm(leave):
                yield new
        except BaseException:
            shutil.rmtree(new, ignore_errors=True)
            raise
        _replace_files(place, new)


def _check_replaceable(out: Path, overwrite: bool) -> None:
    there = [out] if out.exists() else []
    if out.is_dir():
        there = [path for path in out.iterdir() if path.name not in _NO_CONTENT]
    if there and not overwrite:
        raise UserError(
            f"{out} exists already with other content; choose another --out, or say --overwrite"
        )
    is_ours = all(path.is_file() and _OURS.fullmatch(path.name) for path in there)
    if there and not (is_ours and has_tokens(out)):
        raise UserError(f"{out} holds other files than prepared data; --overwrite leaves it alone")


def _replace_files(place: Path, new: Path) -> None:
    """In the order of names, meta.json is the first to go and the last to come."""
    for old in sorted(path for path in place.iterdir() if path.name not in _NO_CONTENT):
        old.unlink()
    for path in sorted(new.iterdir(), reverse=True):
        os.replace(path, place / path.name)
    new.rmdir()


class TokenWriter:
    """The token files of one split, at most `limit` tokens, and where its documents begin."""

    def __init__(self, folder: Path, name: str, dtype: str, limit: int) -> None:
        self.folder, self.name, self.dtype, self.limit = folder, name, dtype, limit
        self.files: list[str] = []
        self.tokens = 0
        self.documents = array("Q")
        self._document: int | None = None  # the one being written
        self._file: BinaryIO | None = None
        self._file_room = 0

    @property
    def room(self) -> int:
        return self.limit - self.tokens

    def add(self, document: int, tokens: np.ndarray, separator: int | None) -> np.ndarray:
        """Write what there is room for, after a separator if a document begins; returns it."""
        if document != self._document:
            if separator is not None and self.documents:
                self._write(np.array([separator])[: self.room])
            self._document = document
            if self.room:
                self.documents.append(self.tokens)
        tokens = tokens[: self.room]
        self._write(tokens)
        return tokens

    def _write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self._file is None or self._file_room == 0:
                self.close()
                self.files.append(f"{self.name}-{len(self.files):05d}.bin")
                self._file = open(self.folder / self.files[-1], "wb")  # noqa: SIM115
                self._file_room = _SHARD_TOKENS
            part, tokens = tokens[: self._file_room], tokens[self._file_room :]
            self._file.write(part.astype(self.dtype).data)
            self._file_room -= len(part)
            self.tokens += len(part)

    def close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def finish(self) -> Json:
        """Close everything; what meta.json says of this split."""
        self.close()
        starts = f"{self.name}-documents.bin"
        write_file(self.folder / starts, np.array(self.documents, "<u8").tobytes())
        return {
            "files": self.files,
            "tokens": self.tokens,
            "documents": len(self.documents),
            "document_starts": starts,
        }
