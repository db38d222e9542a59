"""Files out of archives, streamed: gzip, xz, bzip2, zstd; tar, zip, 7z; one inside the other.

    with open("pages.tar.xz", "rb") as file:
        packed_kind(file.peek(512))                                  # 'xz'
        for name, content in ARCHIVES["tar"](decompress("xz", file, "pages"), "pages"):
            print(name, content.read())

Damage is always an error, and it names the file or member that has it. This room sees bytes; it
does not know what they mean.
"""

from __future__ import annotations

import bz2
import errno
import gzip
import importlib
import io
import lzma
import os
import re
import shutil
import stat
import tarfile
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from tarfile import HeaderError, ReadError
from types import ModuleType
from typing import Any, BinaryIO

from glassgpt.errors import UserError, explain_os_errors

BLOCK = 1 << 20  # bytes moved at a time
_BUFFER = 1 << 17  # bytes between one level of an archive and the next

Members = Iterator[tuple[str, io.BufferedReader]]  # of an archive: (name, content)

_KINDS = re.compile(
    rb"(?P<gzip>\x1f\x8b\x08)|(?P<xz>\xfd7zXZ\x00)|(?P<bzip2>BZh[1-9](?:1AY&SY|\x17rE8P\x90))"
    rb"|(?P<zstd>\x28\xb5\x2f\xfd|[\x50-\x5f]\x2a\x4d\x18)|(?P<zip>PK(?:\x03\x04|\x05\x06))"
    rb"|(?P<sevenzip>7z\xbc\xaf\x27\x1c)|(?P<parquet>PAR1\x15)|(?P<tar>.{257}ustar)",
    re.DOTALL,
)


def packed_kind(head: bytes) -> str | None:
    """The kind of archive that begins with `head` (512 bytes, or all there is); None if none."""
    match = _KINDS.match(head)
    return match.lastgroup if match else None


class NotTextError(UserError):
    """What can't be read as text; `reason` says why in a few words."""

    def __init__(self, name: str, reason: str, remedy: str = "name a text file instead") -> None:
        super().__init__(f"{name} is {reason}; {remedy}")
        self.reason = reason


@contextmanager
def blame(name: str) -> Iterator[None]:
    """What unpackers raise at damage is nearly anything, so here anything means: `name` is damaged.

    Raises UserError, and lets through what is the machine's fault (a full disk, too little memory).
    """
    try:
        yield
    except (UserError, MemoryError):
        raise
    except Exception as error:
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        why = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{name} is damaged or cut short ({why}); fetch it again") from error


def optional(module: str) -> ModuleType:
    """Import a module that only some files need; raises UserError where it isn't installed."""
    try:
        return importlib.import_module(module)
    except ImportError as error:
        why = f"this needs {module.partition('.')[0]}: pip install 'glassgpt[data]'"
        raise UserError(why) from error


@contextmanager
def seekable(stream: io.BufferedReader, name: str) -> Iterator[Any]:
    """`stream` itself if it can be read in any order, else a copy on disk while it is needed."""
    if stream.seekable():
        yield stream
        return
    with tempfile.TemporaryFile() as file:
        with _unpacking(name):
            shutil.copyfileobj(stream, file, BLOCK)
        file.seek(0)
        yield file


def _unpacking(name: str) -> AbstractContextManager[None]:
    return explain_os_errors(f"unpack {name} in {tempfile.gettempdir()} (TMPDIR names another)")


class _Unpacked(io.RawIOBase):
    """A stream out of an archive, which puts damage into words."""

    def __init__(self, stream: Any, name: str) -> None:
        self._stream, self._name = stream, name

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: memoryview) -> int:
        with blame(self._name):
            return self._stream.readinto(buffer)


def _buffered(stream: Any, name: str) -> io.BufferedReader:
    return io.BufferedReader(_Unpacked(stream, name), _BUFFER)


# ---- one file, packed ------------------------------------------------------------------------


def decompress(kind: str, stream: io.BufferedReader, name: str) -> io.BufferedReader:
    """What is packed in `stream`, which is of a `kind` in COMPRESSIONS."""
    with blame(name):
        return _buffered(COMPRESSIONS[kind](stream), name)


def _open_zstd(stream: BinaryIO) -> Any:
    """Not by `zstandard`, whose reader takes a file cut short for a whole one."""
    try:
        zstd = importlib.import_module("compression.zstd")  # Python 3.14 on
    except ImportError:
        zstd = optional("backports.zstd")
    return zstd.ZstdFile(stream)


COMPRESSIONS: dict[str, Callable[[Any], Any]] = {
    "gzip": lambda stream: gzip.GzipFile(fileobj=stream),
    "xz": lzma.LZMAFile,
    "bzip2": bz2.BZ2File,
    "zstd": _open_zstd,
}


# ---- many files ------------------------------------------------------------------------------


def is_hidden(name: str) -> bool:
    """Hidden anywhere along its path, or one of the shadow files that macOS puts into archives."""
    parts = name.split("/")
    return any(part[:1] == "." and part not in (".", "..") for part in parts) or "__MACOSX" in parts


class _StrictTarInfo(tarfile.TarInfo):
    """`tarfile` takes a damaged or missing header for the end of the archive; only zeros are."""

    @classmethod
    def fromtarfile(cls, tarfile: Any) -> Any:
        try:
            return super().fromtarfile(tarfile)
        except HeaderError as error:
            if type(error).__name__ == "EOFHeaderError":  # the zeros
                raise
            raise ReadError(str(error)) from error


def _tar_members(stream: io.BufferedReader, name: str) -> Members:
    archive: Any
    with (
        blame(name),
        tarfile.open(fileobj=stream, mode="r|", bufsize=_BUFFER, tarinfo=_StrictTarInfo) as archive,
    ):
        while (member := archive.next()) is not None:
            if member.isreg() and not is_hidden(member.name):
                path = member.name.removeprefix("./")
                yield path, _buffered(archive.extractfile(member), f"{name}/{path}")
            archive.members.clear()  # it would remember them all
    while stream.read(BLOCK):
        pass  # on to the very end, where the checksum of what the tar is packed in stands


def _zip_members(stream: io.BufferedReader, name: str) -> Members:
    with seekable(stream, name) as file, blame(name), zipfile.ZipFile(file) as archive:
        members = archive.infolist()
        if members and members[0].filename in ("[Content_Types].xml", "mimetype"):
            raise NotTextError(name, "an office document or e-book", "save it as plain text first")
        for member in members:
            path, is_link = member.filename, stat.S_ISLNK(member.external_attr >> 16)
            if member.is_dir() or is_link or is_hidden(path):
                continue
            if member.flag_bits & 1:
                raise UserError(f"{name} is locked with a password; unpack it first")
            yield path, _buffered(archive.open(member), f"{name}/{path}")


def _sevenzip_members(stream: io.BufferedReader, name: str) -> Members:
    """Members share compressed blocks, so all are unpacked to disk first and read from there."""
    py7zr = optional("py7zr")
    with seekable(stream, name) as file, tempfile.TemporaryDirectory() as folder:
        with _unpacking(name), blame(name), py7zr.SevenZipFile(file) as archive:
            if archive.needs_password():
                raise UserError(f"{name} is locked with a password; unpack it first")
            files = [info.filename for info in archive.list() if info.is_file]
            members = [path for path in files if not is_hidden(path)]
            archive.extract(folder, targets=members)
        for path in members:
            with open(os.path.join(folder, path), "rb") as content:
                yield path, content


ARCHIVES: dict[str, Callable[[io.BufferedReader, str], Members]] = {
    "tar": _tar_members,
    "zip": _zip_members,
    "sevenzip": _sevenzip_members,
}
