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

The format dialogue is plain text whose turns begin with `User:`, `Assistant:` or `System:` at the
start of a line. `<|endoftext|>`, a line `---` and a line `System:` begin a new conversation. The
format text is anything else.

The first file decides the format (files of records come before plain text): it is the first of the
table whose fields the first records have. If the caller names a prompt, completion or label field,
it is the format with that field; a named text field means labels or text. Plain text is a dialogue
if its first word is a role; any other plain text, such as a LICENSE, decides nothing as long as
other files follow. All files must be of one format. This module knows no tokenizer, template or
model.
"""

from __future__ import annotations

import hashlib
import io
import json
import re
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain, islice
from typing import Literal, NamedTuple, TypeVar, get_args

from glassgpt.config import ExampleFormat
from glassgpt.data.archives import NotTextError
from glassgpt.data.sources import Reader, Source, kind_by_name, read_files, resolve, suffix_of
from glassgpt.data.texts import RECORDS, SEPARATOR, Record, decode, lines, no_field, shown
from glassgpt.errors import UserError, first_of, nearest
from glassgpt.system import SILENT, Reporter

Role = Literal["system", "user", "assistant"]
_ROLES: dict[str, Role] = {role: role for role in get_args(Role)}
_ROLES |= {"human": "user", "gpt": "assistant"}  # as ShareGPT calls them
_LOOKED_AT = 10  # records of a file that decide what its format is
_ENOUGH_TEXTS = 16  # files of plain text after which no examples are expected


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


def _sha256(content: object) -> bytes:
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

    Where the format is text, the result has no items: `prepare` reads such data. Conversations
    without an answer or without a prompt, and empty labelled texts, are left out and counted. In
    folders and archives, files of other formats are skipped.

    Raises `UserError` for data of another format than `format` or than the first file, records that
    are malformed or lack a field, unknown roles, missing labels, and if nothing is left to learn.
    """
    fields = _Fields(text_field, prompt_field, completion_field, label_field)
    wanted = fields.meant(format)
    files = resolve(names, reporter=reporter)
    if format == "text":
        return Examples("text")
    files.sort(key=lambda file: _kind(file.name, kind_by_name(file.name)) not in RECORDS)
    decision, skipped = _Decision(wanted), []

    def on_skip(name: str, why: str) -> None:
        skipped.append(f"{name}: {why}")

    if wanted == "auto":
        decision = detect_format(files, fields, on_skip)
        if decision.format == "text":
            return Examples("text", skipped=skipped)
        skipped = [f"{file.name}: plain text" for file in files if file.name in decision.texts]
        files = [file for file in files if file.name not in decision.texts]
    conversations, labelled, left_out = [], [], Counter()
    for example in read_files(files, _reader(decision, fields), on_skip=on_skip):
        if why := _why_left_out(example):
            left_out[why] += 1
        else:
            (labelled if isinstance(example, Labelled) else conversations).append(example)
    if not conversations and not labelled:
        reasons = [f"{why}: {count:,}" for why, count in left_out.items()] or skipped[:1]
        why = f" ({'; '.join(reasons)})" if reasons else ""
        raise UserError(f"{first_of(list(names))}: there is nothing to learn from in it{why}")
    return Examples(decision.format, conversations, labelled, dict(left_out), skipped)


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
    """As `sources.kind_by_name` says, but a .json file holds records here, not text."""
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
            raise UserError(
                "--label-field is for format=labels, --prompt-field and --completion-field are for "
                "format=prompt"
            )
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

    def missing(self, format: ExampleFormat, names: Collection[str]) -> str | None:
        """The first field that records of that format need and these have not."""
        slots = self.slots().get(format, ())
        return next((slot[0] for slot in slots if not set(slot) & set(names)), None)

    def look(self, names: Sequence[str], first: list[Record]) -> ExampleFormat | None:
        """The format of records that begin with `first` and have fields of these names."""
        for format in ("labels",) if self.text else self.slots():
            if self.missing(format, names) is None:
                return format
        if (self.text or "text") in names:
            return "text"
        if self.text or "label" in names:
            return None
        values = ((key, value) for record in first for key, value in record.fields.items())
        texts = {key for key, value in values if isinstance(value, str)}
        return "text" if len(texts) == 1 else None


@dataclass(frozen=True)
class _Decision:
    """The format of the examples."""

    format: ExampleFormat
    decided_by: str | None = None  # the file that said so, if the caller did not
    texts: tuple[str, ...] = ()  # files of plain text before that one

    def check(self, name: str, looks: ExampleFormat) -> None:
        """Raises NotTextError, which skips files that nobody named, for another format."""
        if looks == self.format:
            return
        what = "plain text" if looks == "text" else f"in the format {looks}"
        if self.decided_by is None:
            raise NotTextError(name, f"{what}, not {self.format}", "choose another --format")
        like = f"{self.format} like {self.decided_by}"
        raise NotTextError(name, f"{what}, not {like}", "finetune on one format at a time")


def detect_format(
    files: Sequence[Source], fields: _Fields, on_skip: Callable[[str, str], None]
) -> _Decision:
    """The format that the first file with examples has, or text where none has any.

    A file is only looked at as far as needed. Raises `UserError` for records of no known format.
    """

    def look(
        stream: io.BufferedReader, name: str, kind: str
    ) -> Iterator[tuple[str, ExampleFormat | None]]:
        kind = _kind(name, kind)
        if kind not in RECORDS:
            yield name, "dialogue" if _BEGINNING.match(next(decode(stream, name), "")) else None
        elif first := list(islice(RECORDS[kind](stream, name), _LOOKED_AT)):
            names = _names(first)
            if (format := fields.look(names, first)) is None:
                raise _unknown(name, "in no known format", fields.text, names)
            yield name, format

    texts: list[str] = []
    for name, format in read_files(files, look, on_skip=on_skip):
        if format is not None:
            return _Decision(format, name, tuple(texts))
        texts.append(name)
        if len(texts) == _ENOUGH_TEXTS:
            break
    return _Decision("text" if texts else "auto", None, tuple(texts))


def _reader(decision: _Decision, fields: _Fields) -> Reader[Example]:
    """What reads the examples of one file (see `sources.read_files`)."""
    format, slots = decision.format, fields.slots()

    def read(stream: io.BufferedReader, name: str, kind: str) -> Iterator[Example]:
        kind = _kind(name, kind)
        if kind in RECORDS:
            records = RECORDS[kind](stream, name)
            first = list(islice(records, _LOOKED_AT))
            names = _names(first)
            missing = fields.missing(format, names)
            if first and (format not in slots or missing is not None):
                if (looks := fields.look(names, first)) is None:
                    raise _unknown(name, f"not in the format {format}", missing, names)
                decision.check(name, looks)
            for record in chain(first, records):
                yield _example(record, format, slots[format])
        elif name in decision.texts:
            raise NotTextError(name, "plain text")
        else:
            blocks = decode(stream, name)
            head = next(blocks, "")
            decision.check(name, "dialogue" if _BEGINNING.match(head) else "text")
            yield from _dialogues(chain([head], blocks), name)

    return read


def _names(records: list[Record]) -> list[str]:
    return list(dict.fromkeys(name for record in records for name in record.fields))


def _unknown(name: str, what: str, missing: str | None, names: list[str]) -> NotTextError:
    why = no_field(missing, names) if missing else f"its fields are {shown(names)}"
    remedy = "name yours: --prompt-field and --completion-field, --label-field, or --text-field"
    return NotTextError(name, f"{what}: {why}", remedy)


# ---- from a record ---------------------------------------------------------------------------


def _example(record: Record, format: ExampleFormat, slots: tuple[_Slot, ...]) -> Example:
    if format in ("messages", "sharegpt"):
        return _chat(record, *slots[0])
    if format == "labels":
        text, label = slots
        return Labelled(_text(record, text), _label(record, label), record.where)
    prompt, completion = (_text(record, slot) for slot in slots)
    if format == "alpaca" and (more := _text_or_none(record, "input")):
        prompt = f"{prompt}\n\n{more}"
    turns = Turn("user", prompt), Turn("assistant", completion)
    if system := _text_or_none(record, "system"):
        turns = Turn("system", system), *turns
    return Conversation(turns, record.where)


def _value(record: Record, slot: _Slot) -> tuple[str, object]:
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
        raise UserError(
            f"{record.where}: field {name!r} holds no class: {value}; a label is a word or a whole "
            "number"
        )
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


def _excerpt(value: object) -> str:
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
            raise UserError(
                f"{name}, line {number}: words before the first User:, Assistant: or System: of a "
                f"conversation: {line.strip()[:60]!r}"
            )
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
        raise UserError(
            f"there are no two different examples{of_one}, so none to hold out for validation; "
            "use more, or --val FILE"
        )
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
