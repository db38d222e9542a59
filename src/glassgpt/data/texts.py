"""Text out of bytes: decoding, documents, pieces.

    with open("stories.txt", "rb") as file:
        for piece in split_documents(decode(file, "stories.txt"), 1 << 20):
            print(piece.starts_document, piece.text)

One block is in memory at a time. This room does not know where the bytes come from, nor what
becomes of the text; tables of records are read next door, in `records.py`.
"""

from __future__ import annotations

import codecs
import io
import re
from collections.abc import Iterable, Iterator
from typing import NamedTuple

from glassgpt.data.archives import BLOCK, NotTextError

SEPARATOR = "<|endoftext|>"  # between the documents of one text file
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
