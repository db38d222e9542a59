"""Bytes into text: decoding, documents, and the records of JSON, CSV, TSV and Parquet.

    with open("stories.txt", "rb") as file:
        for stretch in split_documents(decode(file, "stories.txt"), 1 << 20):
            print(stretch.starts_document, stretch.text)
    with open("chats.jsonl", "rb") as file:
        for where, fields, escaped in RECORDS["jsonl"](file, "chats.jsonl"):
            print(where, fields)                                  # chats.jsonl, line 1 {...}

One block or one record is in memory at a time (of a JSON array, all). This module does not know
where the bytes come from, nor what becomes of the text.
"""

from __future__ import annotations

import codecs
import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from itertools import islice
from typing import Any, NamedTuple

from glassgpt.data.archives import BLOCK, NotTextError, blame, optional, seekable
from glassgpt.errors import UserError, nearest

SEPARATOR = "<|endoftext|>"  # between the documents of one text file
_MAX_CELL = 1 << 28  # characters in a CSV cell; a longer one means that a quote was left open
_BATCH_ROWS = 64  # rows of a Parquet file in memory at a time
_MARKS = (  # byte order marks; UTF-32 before UTF-16, whose mark it begins with
    (codecs.BOM_UTF8, "utf-8-sig"),
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


class TextPiece(NamedTuple):
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


def split_documents(blocks: Iterable[str], piece_chars: int) -> Iterator[TextPiece]:
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
            yield TextPiece(text, starts)
            starts = False
    yield from cut_document(rest, piece_chars, starts)


def cut_document(text: str, piece_chars: int, starts: bool = True) -> list[TextPiece]:
    """One document, or with `starts` False the rest of one, in pieces; none if it is empty."""
    if len(text) <= piece_chars:  # nearly always
        return [TextPiece(text, starts)] if text else []
    first, *others = _cut(text, piece_chars)
    return [TextPiece(first, starts), *(TextPiece(other, False) for other in others if other)]


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


# ---- records ----------------------------------------------------------------------------------


class Record(NamedTuple):
    """Named values, and where they stand: "chats.jsonl, line 3", for messages."""

    where: str
    fields: dict[str, Any]
    escaped: bool = False  # the JSON contains \\u, so a text may hold half a surrogate pair

    def text(self, field: str) -> str:
        """The text in `field`; raises `UserError` if it holds something else."""
        text = self.fields[field]
        if not isinstance(text, str):
            excerpt = json.dumps(text, default=str)[:60]
            raise UserError(f"{self.where}: field {field!r} holds no text: {excerpt}")
        if self.escaped and (half := _HALF.search(text)):  # JSON can write it, UTF-8 can't
            code = f"\\u{ord(half[0]):04x}"
            raise UserError(
                f"{self.where}: {code} is half a character (a surrogate); mend that line"
            )
        return text


_HALF = re.compile("[\ud800-\udfff]")


def read_texts(stream: io.BufferedReader, name: str, kind: str, field: str | None) -> Iterator[str]:
    """The text of each record of a file of a `kind` in RECORDS.

    It stands in `field` (None: in "text", or else in the only field of the first record that holds
    text). Of Parquet, only that column is read.
    """

    def choose(fields: Sequence[str], texts: Sequence[str], where: str) -> str:
        if field is not None:
            if field in fields:
                return field
            raise UserError(f"{where}: {no_field(field, fields)}; choose with --text-field")
        if "text" in fields:
            return "text"
        if len(texts) == 1:
            return texts[0]
        raise UserError(
            f"{where}: which field is the text? Name it (--text-field). There are: {shown(fields)}"
        )

    is_parquet = kind == "parquet"
    records = _parquet(stream, name, choose) if is_parquet else RECORDS[kind](stream, name)
    for record in records:
        if field is None or field not in record.fields:
            texts = [key for key, value in record.fields.items() if isinstance(value, str)]
            field = choose(list(record.fields), texts, record.where)
        yield record.text(field)


def lines(blocks: Iterable[str]) -> Iterator[str]:
    """Lines with their "\n", however long; other characters that could end a line don't."""
    rest: list[str] = []
    for block in blocks:
        first, *ended = block.split("\n")
        rest.append(first)
        if ended:
            yield "".join(rest) + "\n"
            for line in islice(ended, len(ended) - 1):
                yield line + "\n"
            rest = ended[-1:]
    if last := "".join(rest):
        yield last


def no_field(wanted: str, fields: Collection[str]) -> str:
    """ "no field 'txt'. Did you mean 'text'? There are: 'id', 'text'", for a message."""
    return f"no field {wanted!r}.{nearest(wanted, fields)} There are: {shown(fields)}"


def shown(fields: Iterable[str]) -> str:
    """The names of fields, for a message."""
    return ", ".join(map(repr, fields)) or "none"


def _json_lines(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    return _records_in_lines(decode(stream, name), name)


def _records_in_lines(blocks: Iterable[str], name: str) -> Iterator[Record]:
    for number, line in enumerate(lines(blocks), 1):
        if line.isspace():
            continue
        where = f"{name}, line {number}"
        try:
            fields = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", error)
            at = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            raise UserError(f"{where}{at}: not JSON ({why}): {line.strip()[:60]!r}") from error
        if not isinstance(fields, dict):
            raise UserError(f"{where}: not a JSON object with fields: {line.strip()[:60]!r}")
        yield Record(where, fields, "\\u" in line)


def _json_array(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    """A .json file: one array of records, or JSON lines under that name."""
    text = "".join(decode(stream, name))
    if not text.lstrip().startswith("["):
        yield from _records_in_lines([text], name)
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        at, why = "", str(error)
        if isinstance(error, json.JSONDecodeError):
            at, why = f", line {error.lineno}, column {error.colno}", error.msg
        raise UserError(f"{name}{at}: not a JSON array of records ({why})") from error
    for number, fields in enumerate(records, 1):
        where = f"{name}, record {number}"
        if not isinstance(fields, dict):
            raise UserError(f"{where}: not a JSON object with fields: {json.dumps(fields)[:60]}")
        yield Record(where, fields, "\\u" in text)


def _csv(stream: io.BufferedReader, name: str, delimiter: str = ",") -> Iterator[Record]:
    """Strict: a row with more or fewer cells than the header would get wrong names."""
    csv.field_size_limit(_MAX_CELL)  # the default of 128 KiB is too little; holds process-wide
    rows = csv.reader(lines(decode(stream, name)), delimiter=delimiter, strict=True)
    where = f"{name}, line 1"
    try:
        header = next(rows, [])
        _check_header(header, where)
        where = f"{name}, line {rows.line_num + 1}"
        for row in rows:
            if row and len(row) != len(header):
                cells = f"{len(row)} cell{'s' * (len(row) != 1)}, {len(header)} in the header"
                raise UserError(f"{where}: {cells}; a text with {delimiter!r} in it needs quotes")
            if row:
                yield Record(where, dict(zip(header, row, strict=True)))
            where = f"{name}, line {rows.line_num + 1}"  # where the next one begins
    except csv.Error as error:
        raise UserError(
            f"{where}: {error}; is a quote left open, or alone in a text? Double it"
        ) from error


def _check_header(header: list[str], where: str) -> None:
    """Of two columns with one name only the last would be read, unnoticed."""
    if twice := [cell for cell, n in Counter(header).items() if n > 1]:
        raise UserError(f"{where}: two columns are named {twice[0]!r}; rename one")
    if len(header) == 1 and (found := re.search(r"[;\t|]", header[0])):
        raise UserError(
            f"{where}: columns seem to be separated by {found[0]!r}: {header[0][:60]!r}; "
            "write commas, or tabs in a .tsv"
        )


def _parquet(
    stream: io.BufferedReader,
    name: str,
    choose: Callable[[Sequence[str], Sequence[str], str], str] | None = None,
) -> Iterator[Record]:
    """`choose(fields, fields that hold text, name)` names the only column to read (None: all)."""
    parquet, types = optional("pyarrow.parquet"), optional("pyarrow.types")
    with seekable(stream, name) as file, blame(name):
        table, columns = parquet.ParquetFile(file, buffer_size=BLOCK), None
        if choose is not None:
            schema = table.schema_arrow
            is_text = [types.is_string(c.type) or types.is_large_string(c.type) for c in schema]
            texts = [column.name for column, yes in zip(schema, is_text, strict=True) if yes]
            columns = [choose(schema.names, texts, name)]
        row = 0
        for batch in table.iter_batches(_BATCH_ROWS, columns=columns, use_threads=False):
            for fields in batch.to_pylist():
                row += 1
                yield Record(f"{name}, row {row}", fields)


RECORDS: dict[str, Callable[[io.BufferedReader, str], Iterator[Record]]] = {
    "jsonl": _json_lines,
    "json": _json_array,
    "csv": _csv,
    "tsv": lambda stream, name: _csv(stream, name, "\t"),
    "parquet": _parquet,
}
