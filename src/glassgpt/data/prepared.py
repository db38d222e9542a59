"""The folder of prepared data: how to know one, and how one is made, by one writer at a time.

    with new_folder(Path("data/book"), inputs=[Path("book.txt")], overwrite=False) as folder:
        writer = TokenWriter(folder, "train", "<u2", limit=1000)

While it is made, everything lies in a hidden folder within. At the end the files move to their
places, meta.json last, and without it nothing counts as prepared: a kill at any moment leaves what
was there before, or what the next try clears away. The folder itself is never exchanged, so it may
be a mounted volume or the current one. This room does not know where the tokens come from.
"""

from __future__ import annotations

import contextlib
import json
import os
import re
import shutil
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from glassgpt.errors import UserError, explain_os_errors
from glassgpt.system import before_sigterm, exclusive, write_file

_SHARD_TOKENS = 100_000_000  # a token file of 200 MB: easy to copy, few to open
_OURS = re.compile(r"(train|val)-(\d+|documents)\.bin|meta\.json|tokenizer(_config)?\.json")
_UNFINISHED, _LOCK = ".preparing", ".preparing.lock"
_NO_CONTENT = {_UNFINISHED, _LOCK, "lost+found"}  # the last: in every new volume of ext4


# ---- knowing one -----------------------------------------------------------------------------


def read_meta(folder: str | Path) -> dict[str, Any] | None:
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
    return has_tokens(folder) and read_meta(folder) is not None


def has_tokens(folder: str | Path) -> bool:
    """Whether `prepare` was at work here, be it finished or not."""
    return any(_holds(folder, name) for name in ("train-00000.bin", "val-00000.bin", _UNFINISHED))


def _holds(folder: str | Path, name: str) -> bool:
    return os.path.exists(os.path.join(folder, name))


# ---- making one ------------------------------------------------------------------------------


@contextlib.contextmanager
def new_folder(out: Path, *, inputs: Sequence[Path], overwrite: bool) -> Iterator[Path]:
    """An empty folder, whose files become those of `out` when all goes well and vanish otherwise.

    Raises `UserError` where that would delete one of `inputs` or what `prepare` did not write,
    and while another process is at it.
    """
    place = Path(os.path.realpath(out))
    new, lock, existed = place / _UNFINISHED, place / _LOCK, os.path.exists(place)
    for path in inputs:
        if place in Path(os.path.realpath(path)).parents:
            raise UserError(f"{path} lies in {out}, which would be replaced; "
                            "choose another --out")  # fmt: skip

    def leave() -> None:
        shutil.rmtree(new, ignore_errors=True)
        lock.unlink(missing_ok=True)
        _remove_empty(place, existed)

    with explain_os_errors(f"write {out}"):
        _check_replaceable(out, overwrite)
        try:
            with exclusive(out, lock):
                _check_replaceable(out, overwrite)  # another process may have finished just now
                shutil.rmtree(new, ignore_errors=True)
                new.mkdir()
                try:
                    with before_sigterm(leave):
                        yield new
                except BaseException:
                    shutil.rmtree(new, ignore_errors=True)
                    raise
                _replace_files(place, new)
        finally:
            _remove_empty(place, existed)


def _check_replaceable(out: Path, overwrite: bool) -> None:
    there = [out] if out.exists() else []
    if out.is_dir():
        there = [path for path in out.iterdir() if path.name not in _NO_CONTENT]
    if there and not overwrite:
        raise UserError(f"{out} exists already with other content; choose another --out, "
                        "or say --overwrite")  # fmt: skip
    is_ours = all(path.is_file() and _OURS.fullmatch(path.name) for path in there)
    if there and not (is_ours and has_tokens(out)):
        raise UserError(f"{out} holds other files than prepared data; --overwrite leaves it alone")


def _remove_empty(place: Path, existed: bool) -> None:
    if not existed:
        with contextlib.suppress(OSError):  # it has files: all went well
            place.rmdir()


def _replace_files(place: Path, new: Path) -> None:
    """By name, meta.json is the first of all to go and the last to come."""
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

    def finish(self) -> dict[str, Any]:
        """Close everything; what meta.json says of this split."""
        self.close()
        starts = f"{self.name}-documents.bin"
        write_file(self.folder / starts, np.array(self.documents, "<u8").tobytes())
        return {"files": self.files, "tokens": self.tokens, "documents": len(self.documents),
                "document_starts": starts}  # fmt: skip
