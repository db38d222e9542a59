"""Examples to finetune on: conversations, or texts with labels, out of the files people have.

    found = read_examples(["chats.jsonl"]); print(found.format, len(found.items), found.left_out)

| format   | a record, in .jsonl .json .csv .tsv .parquet                                    |
|----------|---------------------------------------------------------------------------------|
| messages | "messages": a list of {"role": system, user or assistant, "content"}            |
| sharegpt | "conversations": a list of {"from": system, human or gpt, "value"};             |
|          | of both perhaps "system", which comes first                                     |
| alpaca   | "instruction" and "output", perhaps "input", "system"                           |
| prompt   | "prompt" or "question", and "completion", "answer" or "response"; or as named   |
| labels   | "text" or "sentence", and "label"; or as named                                  |

dialogue is plain text whose lines begin with `User:`, `Assistant:` or `System:`; a turn goes on
over the lines that follow. `<|endoftext|>`, a line `---` and a line `System:` begin a new
conversation. text is anything else.

Which it is, the first file says (records before plain text): of the formats in the order above, the
first whose fields its first records have. A prompt, completion or label field that the caller names
means that format; a named text field, labels or text. Plain text is a dialogue if a role is its
first word; other plain text, a LICENSE say, waits for what the next files are. All files must be
of one format. This room knows no tokenizer, template or model.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Any, Literal, NamedTuple, TypeVar

from glassgpt.config import ExampleFormat
from glassgpt.data.archives import NotTextError
from glassgpt.data.sources import kind_by_name, read_files, resolve, suffix_of
from glassgpt.data.texts import RECORDS, SEPARATOR, Record, decode, lines, no_field, shown
from glassgpt.errors import UserError, first_of, nearest
from glassgpt.system import SILENT, Reporter

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {
    "system": "system", "user": "user", "assistant": "assistant",
    "human": "user", "gpt": "assistant",
}  # fmt: skip
_LOOKED_AT = 10  # records that say what a file holds
_ENOUGH_TEXTS = 16  # files of plain text, after which no examples are expected any more


class Turn(NamedTuple):
    """What one side says."""

    role: Role
    content: str


@dataclass(frozen=True)
class Conversation:
    """Turns in order; `where` they stand ("chats.jsonl, line 3") is for messages."""

    turns: tuple[Turn, ...]
    where: str

    @cached_property
    def digest(self) -> bytes:
        """SHA-256 of the words, whatever file they stand in."""
        return _sha256(self.turns)


@dataclass(frozen=True)
class Labelled:
    """A text and the name of its class."""

    text: str
    label: str
    where: str

    @cached_property
    def digest(self) -> bytes:
        return _sha256([self.text, self.label])


def _sha256(content: Any) -> bytes:
    return hashlib.sha256(json.dumps(content).encode()).digest()


Example = Conversation | Labelled
Example_ = TypeVar("Example_", Conversation, Labelled)


@dataclass(frozen=True)
class Examples:
    """What was found: conversations, or labelled texts, or (format text) neither."""

    format: ExampleFormat
    conversations: list[Conversation] = field(default_factory=list)
    labelled: list[Labelled] = field(default_factory=list)
    left_out: dict[str, int] = field(default_factory=dict)  # why, and how many examples
    skipped: list[str] = field(default_factory=list)  # "README.md: plain text", in folders

    @property
    def items(self) -> list[Conversation] | list[Labelled]:
        return self.labelled if self.format == "labels" else self.conversations


def read_examples(
    names: Sequence[str],
    *,
    format: ExampleFormat = "auto",
    text_field: str | None = None,
    prompt_field: str | None = None,
    completion_field: str | None = None,
    label_field: str | None = None,
    reporter: Reporter = SILENT,
) -> Examples:
    """The examples in `names`: files, folders, globs, packed or not, as `resolve` takes them.

    Where the format is text, reading stops there, without any items: how such data are read is
    another matter. Conversations without an answer or without a prompt, and empty labelled texts,
    are left out and counted. In folders and archives, files of other formats are skipped.

    Raises `UserError` for data of another format than `format` or than the first file, records that
    are malformed or lack a field, unknown roles, missing labels, and if nothing is left to learn.
    """
    fields = _Fields(text_field, prompt_field, completion_field, label_field)
    reading = _Reading(fields.meant(format), fields)
    files = resolve(names, reporter=reporter)
    if format == "text":
        return Examples("text")
    files.sort(key=lambda file: _kind(file.name, kind_by_name(file.name)) not in RECORDS)
    conversations, labelled, left_out, skipped = [], [], Counter(), []
    for example in read_files(
        files, reading.examples, on_skip=lambda name, why: skipped.append(f"{name}: {why}")
    ):
        if example is None:
            if reading.format == "text" or len(reading.texts) == _ENOUGH_TEXTS:
                break
        elif why := _why_left_out(example):
            left_out[why] += 1
        else:
            (labelled if isinstance(example, Labelled) else conversations).append(example)
    if reading.format == "text" or (reading.texts and reading.format is None):
        return Examples("text", skipped=skipped)
    skipped = [f"{name}: plain text" for name in reading.texts] + skipped
    if not conversations and not labelled:
        reasons = [f"{why}: {count:,}" for why, count in left_out.items()] or skipped[:1]
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise UserError(f"{first_of(list(names))}: there is nothing to learn from in it{why}")
    assert reading.format is not None
    return Examples(reading.format, conversations, labelled, dict(left_out), skipped)


def _why_left_out(example: Example) -> str | None:
    if isinstance(example, Labelled):
        return None if example.text.strip() else "empty text"
    asked = answered = False
    for role, content in example.turns:
        if content.strip():
            asked |= role == "user"
            answered |= role == "assistant"
            if asked and role == "assistant":
                return None
    return "empty prompt" if answered else "no assistant turn with text"


def _kind(name: str, kind: str) -> str:
    """As in sources.py, where .json is text: only here are its records of interest."""
    return "json" if kind == "text" and suffix_of(name) == ".json" else kind


# ---- which format ----------------------------------------------------------------------------

_Slot = tuple[str, ...]  # names of which a record needs one


class _Fields(NamedTuple):
    """The names that the caller gave."""

    text: str | None
    prompt: str | None
    completion: str | None
    label: str | None

    def meant(self, format: ExampleFormat) -> ExampleFormat:
        """`format`, or the one that the named fields mean."""
        meant: set[ExampleFormat] = {"labels"} if self.label else set()
        meant |= {"prompt"} if self.prompt or self.completion else set()
        if len(meant) > 1 or (meant and format not in ("auto", *meant)):
            raise UserError("--label-field is for format=labels, --prompt-field and "
                            "--completion-field are for format=prompt")  # fmt: skip
        return meant.pop() if meant else format

    def slots(self) -> dict[ExampleFormat, tuple[_Slot, ...]]:
        """What a record of each format must have, in the order in which they are tried."""

        def either(named: str | None, *usual: str) -> _Slot:
            return (named,) if named else usual

        return {
            "messages": (("messages",),),
            "sharegpt": (("conversations",),),
            "alpaca": (("instruction",), ("output",)),
            "prompt": (
                either(self.prompt, "prompt", "question"),
                either(self.completion, "completion", "answer", "response"),
            ),
            "labels": (either(self.text, "text", "sentence"), either(self.label, "label")),
        }


class _Reading:
    """Reads one file after the other; the first one decides the format, if the caller did not."""

    def __init__(self, format: ExampleFormat, fields: _Fields) -> None:
        self.format: ExampleFormat | None = None if format == "auto" else format
        self.decided_by: str | None = None  # the file, if one did
        self.texts: list[str] = []  # files of plain text, seen before one decided
        self.text_field, self.slots = fields.text, fields.slots()

    def examples(self, stream: io.BufferedReader, name: str, kind: str) -> Iterator[Example | None]:
        """What is in one file (see sources.Reader); None if that is text."""
        kind = _kind(name, kind)
        if kind in RECORDS:
            records = RECORDS[kind](stream, name)
            first = list(islice(records, _LOOKED_AT))
            if not first:
                return
            self._agree_on_records(name, first)
            inside = map(self._example, chain(first, records))
        else:
            blocks = decode(stream, name)
            head = next(blocks, "")
            is_dialogue = _BEGINNING.match(head)
            if is_dialogue or self.format is not None:
                self._agree(name, "dialogue" if is_dialogue else "text")
            else:
                self.texts.append(name)
            inside = _dialogues(chain([head], blocks), name)
        if self.format in (None, "text"):
            yield None
        else:
            yield from inside

    def _agree(self, name: str, looks: ExampleFormat) -> None:
        """Raises NotTextError, which skips files that nobody named, for another format."""
        if self.format is None:
            self.format, self.decided_by = looks, name
        if self.format == looks:
            return
        what = "plain text" if looks == "text" else f"in the format {looks}"
        if self.decided_by is None:
            raise NotTextError(name, f"{what}, not {self.format}", "choose another --format")
        like = f"{self.format} like {self.decided_by}"
        raise NotTextError(name, f"{what}, not {like}", "finetune on one format at a time")

    def _agree_on_records(self, name: str, first: list[Record]) -> None:
        fields = list(dict.fromkeys(field for record in first for field in record.fields))
        if self.format in self.slots and self._missing(self.format, fields) is None:
            return
        looks = self._look(fields, first)
        if looks is not None:
            return self._agree(name, looks)
        missing = self.text_field if self.format is None else self._missing(self.format, fields)
        what = f"not in the format {self.format}" if self.format else "in no known format"
        why = no_field(missing, fields) if missing else f"its fields are {shown(fields)}"
        raise NotTextError(name, f"{what}: {why}", "name yours: --prompt-field and "
                           "--completion-field, --label-field, or --text-field")  # fmt: skip

    def _missing(self, format: ExampleFormat, fields: list[str]) -> str | None:
        """The first field that records of that format need and these have not."""
        slots = self.slots.get(format, ())
        return next((slot[0] for slot in slots if not set(slot) & set(fields)), None)

    def _look(self, fields: list[str], first: list[Record]) -> ExampleFormat | None:
        """The format that records with these fields have."""
        for format in ("labels",) if self.text_field else self.slots:
            if self._missing(format, fields) is None:
                return format
        if (self.text_field or "text") in fields:
            return "text"
        if self.text_field or "label" in fields:
            return None
        texts = {
            key
            for record in first
            for key, value in record.fields.items()
            if isinstance(value, str)
        }
        return "text" if len(texts) == 1 else None

    def _example(self, record: Record) -> Example:
        assert self.format in self.slots
        slots = self.slots[self.format]
        if self.format in ("messages", "sharegpt"):
            return _chat(record, *slots[0])
        if self.format == "labels":
            text, label = slots
            return Labelled(_text(record, text), _label(record, label), record.where)
        prompt, completion = (_text(record, slot) for slot in slots)
        if self.format == "alpaca" and (more := _text_or_none(record, "input")):
            prompt = f"{prompt}\n\n{more}"
        turns = Turn("user", prompt), Turn("assistant", completion)
        if system := _text_or_none(record, "system"):
            turns = Turn("system", system), *turns
        return Conversation(turns, record.where)


# ---- from a record ---------------------------------------------------------------------------


def _value(record: Record, slot: _Slot) -> tuple[str, Any]:
    """The field of `slot` that is there, and what it holds."""
    for name in slot:
        if name in record.fields:
            return name, record.fields[name]
    raise UserError(f"{record.where}: {no_field(slot[0], record.fields)}")


def _text(record: Record, slot: _Slot) -> str:
    return record.text(_value(record, slot)[0])


def _text_or_none(record: Record, name: str) -> str | None:
    """None also for a blank one."""
    if record.fields.get(name) is None:
        return None
    return _text(record, (name,)) if _text(record, (name,)).strip() else None


def _label(record: Record, slot: _Slot) -> str:
    """A class by its name: of true and false as in JSON, of numbers in digits."""
    name, value = _value(record, slot)
    if value is None:
        raise UserError(f"{record.where}: field {name!r} is null; every text needs a label")
    if isinstance(value, int):  # or a bool
        return json.dumps(value)
    if isinstance(value, float):
        raise UserError(f"{record.where}: field {name!r} holds no class: {value}; a label is a "
                        "word or a whole number")  # fmt: skip
    label = _text(record, slot).strip()
    if not label:
        raise UserError(f"{record.where}: field {name!r} is empty; every text needs a label")
    return label


def _chat(record: Record, key: str) -> Conversation:
    """Of OpenAI's messages and ShareGPT's conversations, which differ in their names only."""
    name, said = _value(record, (key,))
    if not isinstance(said, list):
        raise UserError(f"{record.where}: field {name!r} holds no list of turns: {_excerpt(said)}")
    turns = []
    for number, fields in enumerate(said, 1):
        where = f"{record.where}, turn {number}"
        if not isinstance(fields, dict):
            raise UserError(f"{where}: not an object with role and content: {_excerpt(fields)}")
        turn = Record(where, fields, record.escaped)
        role = _text(turn, ("role", "from"))
        if role not in _ROLES:
            known = f"{nearest(role, _ROLES)} Known are {', '.join(_ROLES)}"
            raise UserError(f"{where}: unknown role {role!r}.{known}")
        turns.append(Turn(_ROLES[role], _text(turn, ("content", "value"))))
    if turns and turns[0].role != "system" and (system := _text_or_none(record, "system")):
        turns.insert(0, Turn("system", system))  # some ShareGPT data have it beside the turns
    return Conversation(tuple(turns), record.where)


def _excerpt(value: Any) -> str:
    return json.dumps(value, default=str)[:60]


# ---- from plain text -------------------------------------------------------------------------

_HEADING = re.compile("(System|User|Assistant):")
_BEGINNING = re.compile(rf"(?:\s|---|{re.escape(SEPARATOR)})*{_HEADING.pattern}")


def _dialogues(blocks: Iterable[str], name: str) -> Iterator[Conversation]:
    where, turns = "", []
    for number, line in _lines_and_ends(blocks):
        heading = _HEADING.match(line) if line is not None else None
        if turns and (line is None or (heading and heading[1] == "System")):
            yield Conversation(tuple(map(_joined, turns)), where)
            turns = []
        if heading:
            assert line is not None
            where = where if turns else f"{name}, line {number}"
            turns.append((_ROLES[heading[1].lower()], [line[heading.end() :].strip()]))
        elif turns and line is not None:
            turns[-1][1].append(line)
        elif line and line.strip():
            raise UserError(f"{name}, line {number}: words before the first User:, Assistant: or "
                            f"System: of a conversation: {line.strip()[:60]!r}")  # fmt: skip
    if turns:
        yield Conversation(tuple(map(_joined, turns)), where)


def _joined(turn: tuple[Role, list[str]]) -> Turn:
    role, said = turn
    return Turn(role, "\n".join(said).lstrip("\n").rstrip())


def _lines_and_ends(blocks: Iterable[str]) -> Iterator[tuple[int, str | None]]:
    """Lines with their numbers, and None where a conversation ends."""
    for number, line in enumerate(lines(blocks), 1):
        first, *others = line.rstrip("\r\n").split(SEPARATOR)
        yield number, None if first.strip() == "---" else first
        for other in others:
            yield number, None
            yield number, other


# ---- training and validation -----------------------------------------------------------------


def split_examples(
    items: Sequence[Example_], fraction: float
) -> tuple[list[Example_], list[Example_]]:
    """(train, val): `fraction` of the examples, at least one, is for validation.

    Of labelled texts, that share of every class that has two or more different ones. Which they are
    their words alone decide (by SHA-256), whatever the order; both lists keep the order of `items`.
    Copies of an example are on one side, even where the share is missed for that.

    Raises `UserError` when there are no two different examples (of one class) to part.
    """
    classes: dict[str | None, Counter[bytes]] = {}
    for item in items:
        label = item.label if isinstance(item, Labelled) else None
        classes.setdefault(label, Counter())[item.digest] += 1
    held_out = set().union(*(_hold_out(copies, fraction) for copies in classes.values()))
    if not held_out:
        of_one = "" if None in classes else " of one class"
        raise UserError(f"there are no two different examples{of_one}, so none to hold out for "
                        "validation; use more, or --val FILE")  # fmt: skip
    train = [item for item in items if item.digest not in held_out]
    return train, [item for item in items if item.digest in held_out]


def _hold_out(copies: Counter[bytes], fraction: float) -> set[bytes]:
    """Digests of which there are as many copies together as the share asks, as nearly as it can."""
    if len(copies) < 2:
        return set()
    room = min(max(1, round(copies.total() * fraction)), copies.total() - 1)
    chosen = set()
    for digest in sorted(copies):
        if copies[digest] <= room:
            chosen.add(digest)
            room -= copies[digest]
    return chosen or {min(copies, key=lambda digest: (copies[digest], digest))}


def duplicates(items: Iterable[Example]) -> int:
    """How many examples are copies, word for word, of earlier ones."""
    digests = [item.digest for item in items]
    return len(digests) - len(set(digests))


def overlap(train: Iterable[Example], val: Iterable[Example]) -> int:
    """How many examples of `val` stand in `train`, word for word."""
    seen = {item.digest for item in train}
    return sum(item.digest in seen for item in val)


def fingerprint(items: Iterable[Example]) -> str:
    """16 hex digits that change when an example or their order does."""
    return hashlib.sha256(b"".join(item.digest for item in items)).hexdigest()[:16]
