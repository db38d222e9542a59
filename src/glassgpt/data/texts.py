"""Text out of bytes: decoding, documents, pieces; and the records of JSON lines, CSV and Parquet.

    with open("stories.txt", "rb") as file:
        for piece in split_documents(decode(file, "stories.txt"), 1 << 20):
            print(piece.starts_document, piece.text)

One block or one record is in memory at a time. This room does not know where the bytes come from,
nor what becomes of the text.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from glassgpt.data.archives import BLOCK, NotTextError, blame, optional, seekable
from glassgpt.errors import UserError, nearest

SEPARATOR = "<|endoftext|>"  # between the documents of one text file
_MAX_FIELD = 1 << 28  # characters in a CSV cell; beyond it, a quote was left open
_BATCH_ROWS = 64  # of a Parquet file
_MARKS = (  # byte order marks; UTF-32 before UTF-16, whose mark it begins with
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class Piece(NamedTuple):
    """A stretch of text; `starts_document` is True for the first piece of each document."""

    text: str
    starts_document: bool


def decode(stream: io.BufferedReader, name: str) -> Iterator[str]:
    """The text of `stream`, a block at a time: line ends as they are, no byte order mark.

    UTF-8, or UTF-16 or UTF-32 where the mark says so. Raises NotTextError.
    """
    head = stream.peek(4)[:4]
    encoding = next((code for mark, code in _MARKS if head.startswith(mark)), "utf-8")
    decoder = codecs.getincrementaldecoder(encoding)()
    is_utf8, done = encoding.startswith("utf-8"), 0
    while True:
        block = stream.read(BLOCK)
        done += len(block)
        if is_utf8 and b"\0" in block:
            raise NotTextError(name, "binary")
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:  # error.object: the bytes not decoded yet
            where = done - len(error.object) + error.start
            raise NotTextError(
                name,
                f"not {encoding.removesuffix('-sig').upper()} at byte {where}",
                "convert it, for example: iconv -f LATIN1 -t UTF-8 OLD > NEW",
            ) from error
        if not is_utf8 and "\0" in text:
            raise NotTextError(name, "binary")
        if not block:
            return
        yield text


def split_documents(blocks: Iterable[str], piece_chars: int) -> Iterator[Piece]:
    """Cut a text that comes in blocks at each SEPARATOR, dropping the line ends around it and what
    is empty between two, and cut long documents into pieces."""
    rest, starts, follows = "", True, False  # follows: a separator went before this document
    for block in blocks:
        searched = max(0, len(rest) - len(SEPARATOR) + 1)  # it may lie across two blocks
        rest += block
        if rest.find(SEPARATOR, searched) >= 0:
            *ended, rest = rest.split(SEPARATOR)
            for document in ended:
                document = document.rstrip("\r\n")
                if follows and starts:
                    document = document.lstrip("\r\n")
                yield from cut_document(document, piece_chars, starts)
                starts = follows = True
        if follows and starts:
            rest = rest.lstrip("\r\n")
        # Keep so much that no cut falls into a separator, nor between one and its line ends.
        *ready, rest = _cut(rest, piece_chars, spare=len(SEPARATOR))
        for text in ready:
            yield Piece(text, starts)
            starts = False
    yield from cut_document(rest, piece_chars, starts)


def cut_document(text: str, piece_chars: int, starts: bool = True) -> list[Piece]:
    """One document, or with `starts` False the rest of one, in pieces; none if it is empty."""
    if len(text) <= piece_chars:  # by far the most
        return [Piece(text, starts)] if text else []
    first, *others = _cut(text, piece_chars)
    return [Piece(first, starts), *(Piece(other, False) for other in others if other)]


def _cut(text: str, limit: int, spare: int = 0) -> list[str]:
    """`text` in pieces, of which the last has at most `limit + spare` characters, perhaps none."""
    pieces, start = [], 0
    while len(text) - start > limit + spare:
        end = cut_point(text, limit, start)
        pieces.append(text[start:end])
        start = end
    pieces.append(text[start:])
    return pieces


_LINE_END = re.compile(r"(?s:.*)\n(?<=\S\n)(?=[^\s/])")  # o200k joins "/" to the line end before it
_WORD_END = re.compile(r"(?s:.+) (?<=[^\W_] )(?=[^\W\d_])")


def cut_point(text: str, limit: int, start: int = 0) -> int:
    """Where to end a piece of `limit` characters that begins at `start`; more must follow it.

    The last place where every BPE pre-tokenizer splits anyway, so that the pieces give the tokens
    of the whole: after a line end between two visible characters, or else before a single space
    between two words. Where there is neither, anywhere but within line ends.

    >>> cut_point("two words\\nand more", 12)
    10
    >>> cut_point("two words and more", 12)
    9
    >>> cut_point("nothing-to-cut-at", 12)
    12
    """
    end = start + limit
    assert start < end < len(text), "nothing to cut"
    if match := _LINE_END.match(text, start, end + 1):
        return match.end()
    if match := _WORD_END.match(text, start, end + 2):
        return match.end() - 1
    before = end
    while before > start and text[before - 1] in "\r\n":
        before -= 1
    if before > start:
        return before
    return end + (text[end - 1 : end + 1] == "\r\n")


# ---- records ---------------------------------------------------------------------------------


def _lines(blocks: Iterable[str]) -> Iterator[str]:
    """Lines with their "\n", however long; other characters that could end a line don't."""
    rest: list[str] = []
    for block in blocks:
        first, *lines = block.split("\n")
        rest.append(first)
        if lines:
            yield "".join(rest) + "\n"
            for line in islice(lines, len(lines) - 1):
                yield line + "\n"
            rest = lines[-1:]
    if last := "".join(rest):
        yield last


def _choose_field(
    wanted: str | None, fields: Sequence[str], texts: Sequence[str], where: str
) -> str:
    """The field to read: `wanted`, else "text", else the only one in `texts` (that hold text)."""
    shown = ", ".join(map(repr, fields)) or "none"
    if wanted is not None:
        if wanted in fields:
            return wanted
        close = nearest(wanted, fields)
        raise UserError(
            f"{where}: no field {wanted!r}.{close} There are: {shown}; choose with --text-field"
        )
    if "text" in fields:
        return "text"
    if len(texts) == 1:
        return texts[0]
    raise UserError(f"{where}: which field is the text? Name it (--text-field). There are: {shown}")


_HALF = re.compile("[\ud800-\udfff]")  # JSON can escape half of a surrogate pair, UTF-8 can't


def _json_texts(stream: io.BufferedReader, name: str, field: str | None) -> Iterator[str]:
    for number, line in enumerate(_lines(decode(stream, name)), 1):
        if line.isspace():
            continue
        where = f"{name}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", error)
            at = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise UserError(f"{where}{at}: not JSON ({why}): {line.strip()[:60]!r}") from error
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object with fields: {line.strip()[:60]!r}")
        if field is None or field not in record:
            texts = [key for key, value in record.items() if isinstance(value, str)]
            field = _choose_field(field, list(record), texts, where)
        text = record[field]
        if not isinstance(text, str):
            raise UserError(f"{where}: field {field!r} holds no text: {json.dumps(text)[:60]}")
        if "\\u" in line and (half := _HALF.search(text)):
            code = f"\\u{ord(half[0]):04x}"
            raise UserError(f"{where}: {code} is half a character (a surrogate); mend that line")
        yield text


def _csv_texts(
    stream: io.BufferedReader, name: str, field: str | None, delimiter: str = ","
) -> Iterator[str]:
    csv.field_size_limit(_MAX_FIELD)  # its default of 128 KiB is for spreadsheets; process-wide
    rows = csv.reader(_lines(decode(stream, name)), delimiter=delimiter)
    try:
        header = next(rows, [])
        column = header.index(_choose_field(field, header, header, f"{name}, line 1"))
        for row in rows:
            if len(row) > column:
                yield row[column]
            elif row:
                where = f"{name}, line {rows.line_num}"
                raise UserError(f"{where}: {len(row)} fields, so no {header[column]!r}")
    except csv.Error as error:
        raise UserError(f"{name}, line {rows.line_num}: {error}; is a quote left open?") from error


def _parquet_texts(stream: io.BufferedReader, name: str, field: str | None) -> Iterator[str]:
    parquet, types = optional("pyarrow.parquet"), optional("pyarrow.types")
    with seekable(stream, name) as file, blame(name):
        table = parquet.ParquetFile(file, buffer_size=BLOCK)
        columns = table.schema_arrow
        is_text = [types.is_string(c.type) or types.is_large_string(c.type) for c in columns]
        texts = [column.name for column, yes in zip(columns, is_text, strict=True) if yes]
        field = _choose_field(field, columns.names, texts, name)
        if field not in texts:
            raise UserError(f"{name}: column {field!r} holds {columns.field(field).type}, not text")
        row = 0
        for batch in table.iter_batches(_BATCH_ROWS, columns=[field], use_threads=False):
            for text in batch.column(0).to_pylist():
                row += 1
                if text is None:
                    raise UserError(f"{name}, row {row}: column {field!r} is empty (null)")
                yield text


TABLES: dict[str, Callable[[io.BufferedReader, str, str | None], Iterator[str]]] = {
    "jsonl": _json_texts,
    "csv": _csv_texts,
    "tsv": lambda stream, name, field: _csv_texts(stream, name, field, "\t"),
    "parquet": _parquet_texts,
}
