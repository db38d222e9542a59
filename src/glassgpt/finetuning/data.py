"""What a finetuning learns from: text, conversations or labelled texts, as rows for the trainer.

    lesson = open_lesson(options, FinetuneConfig(), base, machine, reporter); print(lesson.report)

Reads files, splits off what is judged by, encodes with the base's tokenizer and template, packs.
It knows no model and no optimizer.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from glassgpt import runtime
from glassgpt.checkpoints.load import tokenizer_file
from glassgpt.checkpoints.run_directory import Checkpoint
from glassgpt.config import FinetuneConfig
from glassgpt.data.batches import IGNORE, Dataset, Replay, TokenFiles, is_prepared
from glassgpt.data.examples import (
    Examples,
    Labelled,
    duplicates,
    overlap,
    read_examples,
    split_examples,
)
from glassgpt.data.packing import PackedRows
from glassgpt.errors import UserError
from glassgpt.finetuning.conversations import encode_all
from glassgpt.inference.classify import encode_text
from glassgpt.system import Reporter
from glassgpt.tokenizers.chat_template import Chat, choose_template
from glassgpt.tokenizers.tokenizer import END_OF_TEXT, Tokenizer, add_tokens, unknown_note
from glassgpt.training.run import adopt_tokenizer, open_data


@dataclass
class Lesson:
    """What is to be learned: rows, what they are for, and the tokenizer that made them."""

    data: Dataset
    kind: str  # text, conversations, labels
    report: list[str]  # of the data, a line each
    chat: Chat | None = None
    questions: Sequence[Any] = ()  # conversations to show answers to
    labels: tuple[str, ...] = ()
    counts: np.ndarray | None = None  # texts of each label


def open_lesson(
    given: dict[str, Any],
    job: FinetuneConfig,
    base: Checkpoint,
    machine: runtime.Machine,
    reporter: Reporter,
) -> Lesson:
    """Read, split and pack the data, whatever they are."""
    T, limit = given.get("context_length"), base.config.context_length
    if T is not None and not 0 < T <= limit:
        raise UserError(f"context_length={T}: {given['init_from']} has {limit} positions")
    fields: dict[str, Any] = {name: given.get(name) for name in
              ("text_field", "prompt_field", "completion_field", "label_field")}  # fmt: skip
    prepared = len(given["data"]) == 1 and is_prepared(given["data"][0])
    if prepared and job.format in ("auto", "text"):
        examples = Examples("text")
    else:
        examples = read_examples(given["data"], format=job.format, **fields)
    _check_options(given, job, examples.format)
    keep = None
    if job.keep is not None:
        keep = _text(given | {"data": (job.keep,), "val": None}, base, machine, reporter)
    if base.labels and examples.format != "labels":
        raise UserError(f"{given['init_from']} is a classifier; it learns from labels alone")
    if examples.format == "text":
        lesson = _text_lesson(given, base, machine, reporter)
    else:
        train, val = _split(given, examples, fields)
        make = _label_lesson if examples.format == "labels" else _chat_lesson
        lesson = make(given, job, base, examples, train, val, T or limit)
    if keep is not None:
        if lesson.kind == "labels":
            raise UserError("--keep watches a language model; a classifier is none any more")
        lesson.data.keep = keep.val
        lesson.data.fingerprint += f"+{keep.fingerprint}"
        if job.replay:
            lesson.data.train = Replay(lesson.data.train, keep.train, job.replay,
                                       packed=lesson.data.packed)  # fmt: skip
    return lesson


_FOR = {"conversations": ("template", "loss_on"), "labels": ("class_weights",)}


def _check_options(given: dict[str, Any], job: FinetuneConfig, format: str) -> None:
    """What the data can't follow is refused, lest somebody believes that it was done."""
    kind = format if format in ("text", "labels") else "conversations"
    for meant, names in _FOR.items():
        for name in names:
            if meant != kind and getattr(job, name) != getattr(FinetuneConfig, name):
                raise UserError(f"{name} is for {meant}, and the data hold {kind}; leave it out")
    if kind != "text" and given.get("max_tokens") is not None:
        raise UserError(f"max_tokens is for text, and the data hold {kind}; leave it out")


def _text(
    given: dict[str, Any], base: Checkpoint, machine: runtime.Machine, reporter: Reporter
) -> Dataset:
    """Text, prepared with the base's tokenizer; it is prepared once, into the cache."""
    given = given | {"tokenizer": tokenizer_file(base.tokenizer)}
    data = open_data(given, set(), machine, reporter)
    adopt_tokenizer(data, base, given["init_from"])
    return data


def _text_lesson(
    given: dict[str, Any], base: Checkpoint, machine: runtime.Machine, reporter: Reporter
) -> Lesson:
    data = _text(given, base, machine, reporter)
    assert isinstance(data.train, TokenFiles)
    few = base.tokenizer.decode(data.train.read(0, min(len(data.train), 1 << 16)))
    report = [
        f"data: text, {len(data.train):,} tokens to learn from, {len(data.val):,} to judge by"
    ]
    if note := unknown_note(base.tokenizer, few):
        report.append(f"note: {note}")
    return Lesson(data, "text", report)


def _split(given: dict[str, Any], examples: Examples, fields: dict[str, Any]) -> tuple[list, list]:
    if given.get("val"):
        val = read_examples([given["val"]], format=examples.format, **fields)
        return examples.items, val.items
    if len(examples.items) < 2:
        raise UserError(f"{given['data'][0]}: one example is too few, since some are kept to judge "
                        "by; add more, or name others with --val")  # fmt: skip
    items: Any = examples.items  # all of one kind
    return split_examples(items, given.get("val_fraction", 0.1))


def _chat_lesson(
    given: dict[str, Any],
    job: FinetuneConfig,
    base: Checkpoint,
    examples: Examples,
    train: list,
    val: list,
    T: int,
) -> Lesson:
    chat = Chat(*choose_template(job.template, base))
    rows, counted = encode_all(chat, train, T, job.loss_on)
    val_rows, judged = encode_all(chat, val, T, job.loss_on)
    for what, some in (("to learn from", rows), ("to judge by", val_rows)):
        if not some:
            raise UserError(f"{given['data'][0]}: no example {what} fits into {T} tokens and has "
                            "words to learn; raise --context-length, or see --loss-on")  # fmt: skip
    report = [
        f"data: {examples.format}, {len(train):,} conversations, {counted.turns:,} turns, "
        f"such as {chat.tokenizer.decode(rows[0][0].tolist())[:60]!r}",
        f"      {counted.tokens:,} tokens, {counted.learned / max(1, counted.tokens):.0%} of them "
        f"with loss; the longest has {counted.longest:,} of {T:,} that fit",
        f"      {counted.cut:,} longer than that, cut between turns; {counted.left_out:,} "
        f"exchanges left out, too long alone; nothing to learn in {counted.nothing_learned:,} "
        f"conversations (and in {judged.nothing_learned:,} to judge by)",
        f"      {_repeated(train, val)}",
        *_left_out(examples),
        *_unknown(chat.tokenizer, (turn.content for item in train for turn in item.turns)),
    ]
    data = _packed(given, rows, val_rows, T, chat.tokenizer)
    return Lesson(data, "conversations", report, chat, val[:3])


def _label_lesson(
    given: dict[str, Any],
    job: FinetuneConfig,
    base: Checkpoint,
    examples: Examples,
    train: list[Labelled],
    val: list[Labelled],
    T: int,
) -> Lesson:
    tokenizer = base.tokenizer
    if tokenizer.end_of_text is None:  # shorter texts of a batch are filled up with it
        tokenizer = add_tokens(tokenizer, [END_OF_TEXT])
    labels = base.labels or tuple(sorted({item.label for item in train}))
    if len(labels) < 2:
        raise UserError(f"{given['data'][0]}: every text has the label {train[0].label!r}; "
                        "classes are two or more")  # fmt: skip
    index = {label: number for number, label in enumerate(labels)}
    for item in [*train, *val]:
        if item.label not in index:
            raise UserError(f"{item.where}: the label {item.label!r} is none of those to learn: "
                            f"{', '.join(map(repr, labels[:10]))}")  # fmt: skip

    n_cut: list[int] = []  # texts to learn from, and to judge by

    def rows(items: list[Labelled]) -> list[tuple[np.ndarray, np.ndarray]]:
        found, lengths = [], []
        for item in items:
            ids = encode_text(tokenizer, item.text)
            lengths.append(len(ids))
            if kept := ids[:T]:  # without a character that the model knows there is none
                targets = np.append(np.full(len(kept) - 1, IGNORE), index[item.label])
                found.append((np.array(kept), targets))
        n_cut.append(sum(length > T for length in lengths))
        return found

    train_rows, val_rows = rows(train), rows(val)
    if not train_rows or not val_rows:
        raise UserError(f"{given['data'][0]}: there is no text in it")
    counts = np.bincount([row[1][-1] for row in train_rows], minlength=len(labels))
    longest = max(len(ids) for ids, _ in train_rows)
    shown = ", ".join(f"{label} {n:,}" for label, n in zip(labels[:10], counts, strict=False))
    report = [
        f"data: {len(train_rows):,} texts with {len(labels)} labels: {shown}",
        f"      {sum(len(ids) for ids, _ in train_rows):,} tokens; the longest has {longest:,} of "
        f"{T:,} that fit; {n_cut[0]:,} longer than that are cut (and {n_cut[1]:,} to judge by)",
        f"      {_repeated(train, val)}",
        *_left_out(examples),
        *_unknown(tokenizer, (item.text for item in train)),
    ]
    data = _packed(given, train_rows, val_rows, T, tokenizer)
    return Lesson(data, "labels", report, labels=labels, counts=counts)


def _packed(given: dict[str, Any], train: list, val: list, T: int, tokenizer: Tokenizer) -> Dataset:
    digest = hashlib.sha256()
    for tokens, targets in (*train, *val):
        digest.update(tokens.astype("<i8").tobytes() + targets.astype("<i8").tobytes())
    name, rows, val_rows = digest.hexdigest()[:16], PackedRows(train, T), PackedRows(val, T)
    return Dataset(Path(given["data"][0]), rows, val_rows, tokenizer, name, given["data"][0],
                   packed=True)  # fmt: skip


def _left_out(examples: Examples) -> list[str]:
    reasons = [f"{why}: {n:,}" for why, n in examples.left_out.items()]
    lines = [f"      left out before: {', '.join(reasons)}"] if reasons else []
    return lines + [f"      skipped {each}" for each in examples.skipped[:5]]


def _unknown(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    note = unknown_note(tokenizer, "".join(dict.fromkeys(chain.from_iterable(texts))))
    return [f"note: {note}"] if note else []


def _repeated(train: list, val: list) -> str:
    both = overlap(train, val)
    return (
        f"{duplicates(train):,} duplicates; of {len(val):,} to judge by {both:,} are also learned"
    )
