"""Records out of JSON lines, JSON arrays, CSV, TSV and Parquet, and the one text in each.

    with open("chats.jsonl", "rb") as file:
        for where, fields, escaped in RECORDS["jsonl"](file, "chats.jsonl"):
            print(where, fields)                                  # chats.jsonl, line 1 {...}

`RECORDS` gives whole records; `TABLES` gives one text of each, and reads no more than it needs.
One block or one record is in memory at a time (of a JSON array, all). This room does not know where
the bytes come from, nor what the fields mean.
"""

from __future__ import annotations

import csv
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from typing import Any, NamedTuple

from glassgpt.data.archives import BLOCK, blame, optional, seekable
from glassgpt.data.texts import decode
from glassgpt.errors import UserError, nearest

_MAX_FIELD = 1 << 28  # characters in a CSV cell; beyond it, a quote was left open
_BATCH_ROWS = 64  # of a Parquet file


class Record(NamedTuple):
    """Named values, and where they stand: "chats.jsonl, line 3", for messages."""

    where: str
    fields: dict[str, Any]
    escaped: bool = False  # the JSON has \u in it: see `refuse_half`


def lines(blocks: Iterable[str]) -> Iterator[str]:
    """Lines with their "\\n", however long; other characters that could end a line don't."""
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
    return ", ".join(map(repr, fields)) or "none"


_HALF = re.compile("[\ud800-\udfff]")


def refuse_half(text: str, where: str) -> None:
    r"""Raises `UserError` for half of a surrogate pair: JSON can write it (\ud83d), UTF-8 can't."""
    if half := _HALF.search(text):
        code = f"\\u{ord(half[0]):04x}"
        raise UserError(f"{where}: {code} is half a character (a surrogate); mend that line")


# ---- what files are made of ------------------------------------------------------------------


def _json_lines(blocks: Iterable[str], name: str) -> Iterator[tuple[int, dict[str, Any], str]]:
    """(its number, the object on it, the line) of every line that is not blank."""
    for number, line in enumerate(lines(blocks), 1):
        if line.isspace():
            continue
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            why = getattr(error, "msg", error)
            at = f", column {error.colno}" if isinstance(error, json.JSONDecodeError) else ""
            where = f"{name}, line {number}{at}"
            raise UserError(f"{where}: not JSON ({why}): {line.strip()[:60]!r}") from error
        if not isinstance(record, dict):
            where = f"{name}, line {number}"
            raise UserError(f"{where}: not a JSON object with fields: {line.strip()[:60]!r}")
        yield number, record, line


def _csv_rows(stream: io.BufferedReader, name: str, delimiter: str, *, strict: bool = False) -> Any:
    """Lists of cells. `strict`: a quote that is never closed, or within a word, is a csv.Error."""
    csv.field_size_limit(_MAX_FIELD)  # its default of 128 KiB is for spreadsheets; process-wide
    return csv.reader(lines(decode(stream, name)), delimiter=delimiter, strict=strict)


@contextmanager
def _parquet(stream: io.BufferedReader, name: str) -> Iterator[Any]:
    parquet = optional("pyarrow.parquet")
    with seekable(stream, name) as file, blame(name):
        yield parquet.ParquetFile(file, buffer_size=BLOCK)


# ---- whole records ---------------------------------------------------------------------------


def _json_records(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    for number, record, line in _json_lines(decode(stream, name), name):
        yield Record(f"{name}, line {number}", record, "\\u" in line)


def _array_records(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    """Of a .json file: one array of records, or else JSON lines that go by that name."""
    text = "".join(decode(stream, name))
    escaped = "\\u" in text
    if not text.lstrip().startswith("["):
        for number, record, _ in _json_lines([text], name):
            yield Record(f"{name}, line {number}", record, escaped)
        return
    try:
        records = json.loads(text)
    except (ValueError, RecursionError) as error:
        at, why = "", str(error)
        if isinstance(error, json.JSONDecodeError):
            at, why = f", line {error.lineno}, column {error.colno}", error.msg
        raise UserError(f"{name}{at}: not a JSON array of records ({why})") from error
    for number, record in enumerate(records, 1):
        where = f"{name}, record {number}"
        if not isinstance(record, dict):
            raise UserError(f"{where}: not a JSON object with fields: {json.dumps(record)[:60]}")
        yield Record(where, record, escaped)


def _csv_records(stream: io.BufferedReader, name: str, delimiter: str = ",") -> Iterator[Record]:
    """A row that has another number of cells than the header would put them under wrong names."""
    rows = _csv_rows(stream, name, delimiter, strict=True)
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
    """Of two columns with one name only the last would be read, and nobody would notice."""
    if twice := [cell for cell, n in Counter(header).items() if n > 1]:
        raise UserError(f"{where}: two columns are named {twice[0]!r}; rename one")
    if len(header) == 1 and (found := re.search(r"[;\t|]", header[0])):
        raise UserError(f"{where}: columns seem to be separated by {found[0]!r}: "
                        f"{header[0][:60]!r}; write commas, or tabs in a .tsv")  # fmt: skip


def _parquet_records(stream: io.BufferedReader, name: str) -> Iterator[Record]:
    with _parquet(stream, name) as table:
        row = 0
        for batch in table.iter_batches(_BATCH_ROWS, use_threads=False):
            for fields in batch.to_pylist():
                row += 1
                yield Record(f"{name}, row {row}", fields)


RECORDS: dict[str, Callable[[io.BufferedReader, str], Iterator[Record]]] = {
    "jsonl": _json_records,
    "json": _array_records,
    "csv": _csv_records,
    "tsv": lambda stream, name: _csv_records(stream, name, "\t"),
    "parquet": _parquet_records,
}


# ---- one text of each ------------------------------------------------------------------------


def _choose_field(
    wanted: str | None, fields: Sequence[str], texts: Sequence[str], where: str
) -> str:
    """The field to read: `wanted`, else "text", else the only one in `texts` (that hold text)."""
    if wanted is not None:
        if wanted in fields:
            return wanted
        raise UserError(f"{where}: {no_field(wanted, fields)}; choose with --text-field")
    if "text" in fields:
        return "text"
    if len(texts) == 1:
        return texts[0]
    raise UserError(
        f"{where}: which field is the text? Name it (--text-field). There are: {shown(fields)}"
    )


def _json_texts(stream: io.BufferedReader, name: str, field: str | None) -> Iterator[str]:
    for number, record, line in _json_lines(decode(stream, name), name):
        if field is None or field not in record:
            texts = [key for key, value in record.items() if isinstance(value, str)]
            field = _choose_field(field, list(record), texts, f"{name}, line {number}")
        text = record[field]
        if not isinstance(text, str):
            where = f"{name}, line {number}"
            raise UserError(f"{where}: field {field!r} holds no text: {json.dumps(text)[:60]}")
        if "\\u" in line:
            refuse_half(text, f"{name}, line {number}")
        yield text


def _csv_texts(
    stream: io.BufferedReader, name: str, field: str | None, delimiter: str = ","
) -> Iterator[str]:
    rows = _csv_rows(stream, name, delimiter)
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
    types = optional("pyarrow.types")
    with _parquet(stream, name) as table:
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
