"""Text out of any source: files, folders, archives, tables, and the named corpora.

    for piece in read_pieces(resolve(["book.txt", "letters/", "pages.tar.xz", "shakespeare"])):
        print(piece.starts_document, piece.text)

Archives are known by their first bytes, not by their names, and opened however deep they nest; what
a file holds is known by its name (.jsonl .csv .tsv .parquet), otherwise it is text. All of it is
streamed: memory holds a few blocks, whatever the size of the input. Archives are taken apart
in `archives.py`, bytes become text and records in `texts.py`; none of the three knows of tokens.
"""

from __future__ import annotations

import glob
import io
import os
import re
import shlex
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Generic, NamedTuple, TypedDict, TypeVar

from glassgpt.data.archives import (
    ARCHIVES,
    COMPRESSIONS,
    NotTextError,
    decompress,
    is_hidden,
    packed_kind,
)
from glassgpt.data.dataset import has_tokens, is_prepared
from glassgpt.data.texts import (
    RECORDS,
    TextPiece,
    cut_document,
    decode,
    read_texts,
    split_documents,
)
from glassgpt.errors import UserError, explain_os_errors, nearest
from glassgpt.system import SILENT, Reporter, sha256_of

if TYPE_CHECKING:
    from _typeshed import WriteableBuffer

    from glassgpt.data.corpora import RemoteFile

_BUFFER = 1 << 17  # bytes read from disk at least
_REMOTE_BUFFER = 4 << 20  # bytes fetched by a request at least
_MAX_DEPTH = 12  # levels of archives in archives: there are ones that contain themselves

T = TypeVar("T")
Reader = Callable[
    [io.BufferedReader, str, str], Iterator[T]
]  # (content, name, kind) -> what's in it


@dataclass(frozen=True)
class Source:
    """One file to read: on disk, or on the net and read from there.

    `named`: the user asked for this very file, so it is an error if it holds no text; what a folder
    or a glob brings along is skipped instead.
    """

    name: str
    file: Path | RemoteFile
    named: bool = True


# ---- what the user named, as files -----------------------------------------------------------


def resolve(names: Sequence[str], *, reporter: Reporter = SILENT) -> list[Source]:
    """The files behind `names`: files, folders, globs (also `**`) and names of corpora, in order.

    Folders are searched to the bottom, sorted, without hidden files and prepared data. What is
    listed twice comes once. A corpus is fetched if need be. Raises UserError for a name that leads
    to nothing, or to prepared data.
    """
    assert not isinstance(names, str), "a list of names, not one name"
    found: dict[str, Source] = {}
    for name in names:
        for source in _expand(name, reporter):
            file = source.file
            key = os.path.realpath(file) if isinstance(file, Path) else file.url
            if key not in found or (source.named and not found[key].named):
                found[key] = source
    return list(found.values())


def _expand(name: str, reporter: Reporter) -> list[Source]:
    from glassgpt.data.corpora import CORPORA, fetch_corpus

    path = Path(name).expanduser()
    with explain_os_errors(f"read {name}"):
        if name and path.is_dir():
            return _worth_reading(name, _in_folder(name))
        if name and path.exists():
            if not path.is_file():
                raise UserError(f"{name} is not a file on disk; save what it gives to a file first")
            if path.stat().st_size == 0:
                raise UserError(f"{name} is empty")
            return [Source(name, path)]
        if name in CORPORA:
            return [Source(f"{name}/{file.name}", file) for file in fetch_corpus(name, reporter)]
        if glob.has_magic(name):
            return _worth_reading(name, _matching(name))
        parent = path.parent
        entries = islice(parent.iterdir(), 1000) if parent.is_dir() else ()
        beside = [name.removesuffix(path.name) + entry.name for entry in entries]
    corpora = ", ".join(CORPORA)
    raise UserError(
        f"{name!r} does not exist.{nearest(name, [*CORPORA, *beside])} "
        f"Name a file, a folder, a glob or a corpus ({corpora})"
    )


def _worth_reading(name: str, found: list[Source]) -> list[Source]:
    if total_bytes(found) == 0:
        raise UserError(f"{name}: there is nothing to read; check the name and what is there")
    return found


def _in_folder(name: str) -> list[Source]:
    def refuse(error: OSError) -> None:
        raise error  # os.walk would leave out a folder it may not read, without a word

    folder, paths = os.path.expanduser(name), []
    _refuse_prepared(name, folder)
    for parent, folders, files in os.walk(folder, onerror=refuse):
        shown = [entry for entry in folders if not is_hidden(entry)]
        folders[:] = [entry for entry in shown if not is_prepared(os.path.join(parent, entry))]
        paths += [os.path.join(parent, entry) for entry in files if not is_hidden(entry)]
    return [
        Source(os.path.join(name, os.path.relpath(path, folder)), Path(path), named=False)
        for path in sorted(paths)
        if os.path.isfile(path)  # not a pipe, nor a link to nothing
    ]


def _refuse_prepared(name: str, folder: str) -> None:
    """Its meta.json and tokenizer.json would pass for text."""
    if is_prepared(folder):
        raise UserError(
            f"{name} is prepared data already, not text; train on it alone: "
            f"glassgpt train {shlex.quote(name)}"
        )
    if has_tokens(folder):
        raise UserError(
            f"{name} is prepared data without a sound meta.json, so incomplete or damaged; "
            "prepare the data again"
        )


def _matching(pattern: str) -> list[Source]:
    found = []
    for match in sorted(glob.glob(os.path.expanduser(pattern), recursive=True)):
        if os.path.isdir(match):  # as if the shell had expanded the glob
            found += _in_folder(match)
        elif os.path.isfile(match):
            found.append(Source(match, Path(match), named=False))
    return found


def total_bytes(sources: Iterable[Source]) -> int:
    """The size of all sources together as they lie there, packed, in bytes."""
    return sum(_size(source) for source in sources)


def _size(source: Source) -> int:
    if not isinstance(source.file, Path):
        return source.file.size
    with explain_os_errors(f"read {source.name}"):
        return source.file.stat().st_size


class Stamp(TypedDict):
    """What identifies a source, as meta.json keeps it."""

    name: str
    bytes: int
    sha256: str


def stamp_of(source: Source) -> Stamp:
    """The stamp of a source; a streamed one has the SHA-256 that it is pinned to."""
    if not isinstance(source.file, Path):
        sha256 = source.file.sha256
    else:
        with explain_os_errors(f"read {source.name}"):
            sha256 = sha256_of(source.file)
    return {"name": source.name, "bytes": _size(source), "sha256": sha256}


# ---- reading ---------------------------------------------------------------------------------


def read_pieces(
    sources: Iterable[Source],
    *,
    text_field: str | None = None,
    piece_chars: int = 1 << 20,
    on_skip: Callable[[str, str], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[TextPiece]:
    """All documents of all sources, in order, in pieces of at most about `piece_chars` characters.

    A text file is one document, or several with `<|endoftext|>` between them; in JSON lines, CSV,
    TSV and Parquet each record is one, its text in `text_field` (None: "text", or else the only
    field that holds text). `on_skip` and `on_bytes` as in `read_files`.

    Raises UserError for text that isn't UTF-8 (or UTF-16 with its mark), records without their
    field, archives damaged or cut short, and sources without any text.
    """

    def read(stream: io.BufferedReader, name: str, kind: str) -> Iterator[TextPiece]:
        if kind in RECORDS:
            for text in read_texts(stream, name, kind, text_field):
                yield from cut_document(text, piece_chars)
        else:
            yield from split_documents(decode(stream, name), piece_chars)

    sources = list(sources)
    pieces = read_files(sources, read, on_skip=on_skip, on_bytes=on_bytes)
    first = next(pieces, None)
    if first is None:
        names = [source.name for source in sources]
        shown = ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
        raise UserError(f"there is no text in {shown or 'an empty list of sources'}")
    yield first
    yield from pieces


def read_files(
    sources: Iterable[Source],
    read: Reader[T],
    *,
    on_skip: Callable[[str, str], None] | None = None,
    on_bytes: Callable[[int], None] | None = None,
) -> Iterator[T]:
    """What `read` finds in every file, in order, also in those that archives hold.

    `read(content, name, kind)` gets its kind as `kind_by_name` says; NotTextError is how it refuses
    a file. `on_skip(name, reason)`: that happened to a file in a folder or archive. Where it
    happens after a part was handed out already, or to a file that the user named, it is an error,
    and so is a named file in which nothing is found. `on_bytes(n)`: n more bytes were read; they
    add up to `total_bytes`.
    """
    how = _How(read, on_skip or (lambda name, reason: None))
    for source in sources:
        something = False
        with explain_os_errors(f"read {source.name}"), _Metered(source, on_bytes) as metered:
            buffer = _BUFFER if isinstance(source.file, Path) else _REMOTE_BUFFER
            stream: io.BufferedReader = io.BufferedReader(metered, buffer)
            for found in _contents(stream, source.name, how, strict=source.named):
                something = True
                yield found
            metered.finish()
        if source.named and not something:
            raise UserError(f"{source.name}: there is no text in it")


class _How(NamedTuple, Generic[T]):
    """The options of `read_files` that every level needs."""

    read: Reader[T]
    skip: Callable[[str, str], None]


class _Metered(io.RawIOBase):
    """The raw bytes of a source, counted as they are read.

    Formats that are read out of order (zip, Parquet) read some parts twice and others never: the
    count never exceeds the size, and `finish` makes up the rest.
    """

    def __init__(self, source: Source, on_bytes: Callable[[int], None] | None) -> None:
        self._file = file = source.file
        if isinstance(file, Path):
            self._raw = io.FileIO(file)
        else:
            from glassgpt.data.corpora import open_remote

            self._raw = open_remote(file)
        self._left, self._on_bytes = _size(source), on_bytes

    def _count(self, n: int) -> None:
        n = min(n, self._left)
        self._left -= n
        if n and self._on_bytes is not None:
            self._on_bytes(n)

    def finish(self) -> None:
        self._count(self._left)

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        return self._raw.seek(offset, whence)

    def tell(self) -> int:
        return self._raw.tell()

    def readinto(self, buffer: WriteableBuffer) -> int:
        try:
            n = self._raw.readinto(buffer) or 0
        except Exception as error:
            if isinstance(self._file, Path):
                raise
            from glassgpt.data.corpora import unreachable

            raise unreachable(self._file, error) from error
        self._count(n)
        return n

    def close(self) -> None:
        self._raw.close()
        super().close()


def _contents(
    stream: io.BufferedReader, name: str, how: _How[T], *, strict: bool, depth: int = 0
) -> Iterator[T]:
    """What is in `stream`, whatever it is; unless `strict`, what is not text is skipped."""
    if depth > _MAX_DEPTH:
        raise UserError(f"{name}: more than {_MAX_DEPTH} archives in one another; unpack it first")
    handed_out = False
    try:
        head = stream.peek(512)[:512]
        if not head:
            raise NotTextError(name, "empty")
        kind = packed_kind(head) or kind_by_name(name)
        if kind in COMPRESSIONS or kind in ARCHIVES:
            inside = _unpack(stream, name, kind, how, strict=strict, depth=depth + 1)
        else:
            inside = how.read(stream, name, kind)
        for found in inside:
            handed_out = True
            yield found
    except NotTextError as problem:
        if strict or handed_out:
            raise
        how.skip(name, problem.reason)


def _unpack(
    stream: io.BufferedReader, name: str, kind: str, how: _How[T], *, strict: bool, depth: int
) -> Iterator[T]:
    if kind in COMPRESSIONS:
        inner = decompress(kind, stream, name)
        yield from _contents(inner, name, how, strict=strict, depth=depth)
        return
    for member, inner in ARCHIVES[kind](stream, name):
        yield from _contents(inner, f"{name}/{member}", how, strict=False, depth=depth)


_SUFFIXES = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
}


def kind_by_name(name: str) -> str:
    """What a file of that name holds, unless its first bytes say otherwise."""
    return _SUFFIXES.get(suffix_of(name), "text")


def suffix_of(name: str) -> str:
    """ ".jsonl" of "Chats.JSONL.gz": `.gz` and the like don't count."""
    bare = re.sub(r"(\.(gz|xz|bz2|zstd?))+$", "", name.lower())
    return os.path.splitext(bare)[1]
