"""The folder of prepared data while it is made: one writer at a time, whole or absent.

    with new_folder(Path("data/book"), inputs=[Path("book.txt")], overwrite=False) as folder:
        writer = TokenWriter(folder, "train", "<u2", limit=1000)

It is `.NAME.partial` until it is complete; one that a kill left behind is deleted by the next try.
This room does not know where the tokens come from.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
from array import array
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from glassgpt.errors import UserError, explain_os_errors
from glassgpt.system import exclusive, write_file

_SHARD_TOKENS = 100_000_000  # a token file of 200 MB: easy to copy, few to open
_OURS = re.compile(r"(train|val)-(\d+|documents)\.bin|meta\.json|tokenizer(_config)?\.json")


@contextlib.contextmanager
def new_folder(out: Path, *, inputs: Sequence[Path], overwrite: bool) -> Iterator[Path]:
    """An empty folder that takes the place of `out` when all goes well, and vanishes otherwise.

    Raises `UserError` where that would delete one of `inputs` or what `prepare` did not write,
    and while another process is at it.
    """
    place = Path(os.path.realpath(out))
    partial, old, lock = (
        place.with_name(f".{place.name}.{name}") for name in ("partial", "previous", "lock")
    )
    with explain_os_errors(f"write {out}"), exclusive(out, lock):
        for path in inputs:
            if {place, partial, old} & set(Path(os.path.realpath(path)).parents):
                raise UserError(f"{path} lies in {out}, which would be replaced; "
                                "choose another --out")  # fmt: skip
        _check_replaceable(out, overwrite)
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir()
        try:
            yield partial
            _swap(partial, place, old)
        finally:  # an error or Ctrl-C leaves nothing behind
            shutil.rmtree(partial, ignore_errors=True)


def _check_replaceable(out: Path, overwrite: bool) -> None:
    there = [] if not out.exists() else list(out.iterdir()) if out.is_dir() else [out]
    if there and not overwrite:
        raise UserError(f"{out} exists already with other content; choose another --out, "
                        "or say --overwrite")  # fmt: skip
    is_ours = all(path.is_file() and _OURS.fullmatch(path.name) for path in there)
    if there and not (is_ours and (out / "meta.json").exists()):
        raise UserError(f"{out} holds other files than prepared data; --overwrite leaves it alone")


def _swap(new: Path, place: Path, old: Path) -> None:
    """Give `new` its name; what had that before goes only afterwards, or else comes back."""
    shutil.rmtree(old, ignore_errors=True)  # left by a process that was killed in here
    if place.exists():
        os.replace(place, old)
    try:
        os.replace(new, place)
    except BaseException:
        if old.exists():
            os.replace(old, place)
        raise
    shutil.rmtree(old, ignore_errors=True)


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
