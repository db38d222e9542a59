"""What a finetuning learns from: text, conversations or labelled texts, as rows for the loop.

    examples = open_finetune_data(session, FinetuneConfig(), base); print(examples.report)

Reads files, keeps some examples for validation, encodes with the base's tokenizer and template,
and packs. It knows no model and no optimizer.
"""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from pathlib import Path

import numpy as np

from glassgpt.checkpoints.load import tokenizer_file
from glassgpt.checkpoints.run_directory import Checkpoint
from glassgpt.config import DataConfig, ExampleFormat, FinetuneConfig
from glassgpt.data.batches import IGNORE, Replay, TokenFiles
from glassgpt.data.dataset import Dataset, is_prepared
from glassgpt.data.examples import (
    Conversation,
    Example_,
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
from glassgpt.options import make_config
from glassgpt.tokenizers.chat_template import Chat, choose_template
from glassgpt.tokenizers.tokenizer import END_OF_TEXT, Tokenizer, add_tokens, unknown_note
from glassgpt.training.run import TrainingSession, adopt_tokenizer, open_data

Row = tuple[np.ndarray, np.ndarray]  # tokens and targets, (n,) each


@dataclass
class FinetuneData:
    """What is to be learned: rows, what they mean, and the tokenizer that made them."""

    data: Dataset
    kind: str  # text, conversations, labels
    report: list[str]  # about the data, a line each
    chat: Chat | None = None  # of conversations
    questions: Sequence[Conversation] = ()  # conversations to show the model's answers to
    labels: tuple[str, ...] = ()
    counts: np.ndarray | None = None  # texts of each label


def open_finetune_data(
    session: TrainingSession, config: FinetuneConfig, base: Checkpoint
) -> FinetuneData:
    """Read, split and pack the data, whatever they are."""
    T, limit = session.options.get("context_length"), base.config.context_length
    name = session.options["init_from"]
    if T is not None and not 0 < T <= limit:
        raise UserError(f"context_length={T}: {name} has {limit} positions")
    return _Reader(session, config, base, name, T or limit).read()


@dataclass(frozen=True)
class _Reader:
    """Reads what the options of one finetuning name."""

    session: TrainingSession
    config: FinetuneConfig
    base: Checkpoint
    base_name: str
    T: int  # tokens of a row

    @cached_property
    def files(self) -> DataConfig:
        """How the data are read; text is made into tokens by the base's tokenizer."""
        return make_config(DataConfig, self.session.options)

    @property
    def names(self) -> tuple[str, ...]:
        return self.session.options["data"]

    def read(self) -> FinetuneData:
        config = self.config
        prepared = len(self.names) == 1 and is_prepared(self.names[0])
        if prepared and config.format in ("auto", "text"):
            examples = Examples("text")
        else:
            examples = self.examples(self.names)
        self.check_options(examples)
        keep = None
        if config.keep is not None:
            keep = self.open_text((config.keep,), dataclasses.replace(self.files, val=None))
        if self.base.labels and examples.format != "labels":
            raise UserError(f"{self.base_name} is a classifier; it learns from labels alone")
        if examples.format == "text":
            found = self.text()
        elif examples.format == "labels":
            found = self.labels(examples)
        else:
            found = self.conversations(examples)
        if keep is not None:
            if found.kind == "labels":
                raise UserError("--keep is for a model that writes text; a classifier writes none")
            data = found.data
            data.keep = keep.val
            data.fingerprint += f"+{keep.fingerprint}"
            if config.replay:
                data.train = Replay(data.train, keep.train, config.replay, packed=data.packed)
        return found

    def examples(self, names: Sequence[str], format: ExampleFormat | None = None) -> Examples:
        config = self.config
        return read_examples(
            names,
            format=format or config.format,
            text_field=self.files.text_field,
            prompt_field=config.prompt_field,
            completion_field=config.completion_field,
            label_field=config.label_field,
        )

    def check_options(self, examples: Examples) -> None:
        """What the data can't follow is refused, so that nobody believes that it was done."""
        kind = examples.format if examples.format in ("text", "labels") else "conversations"
        for meant, names in _OPTIONS_FOR.items():
            for name in names:
                if meant != kind and getattr(self.config, name) != getattr(FinetuneConfig, name):
                    raise UserError(
                        f"{name} is for {meant}, and the data hold {kind}; leave it out"
                    )
        if kind != "text" and self.files.max_tokens is not None:
            raise UserError(f"max_tokens is for text, and the data hold {kind}; leave it out")

    # -- text --

    def open_text(self, names: Sequence[str], config: DataConfig) -> Dataset:
        """Text as tokens of the base; it is prepared once, into the cache."""
        config = dataclasses.replace(config, tokenizer=tokenizer_file(self.base.tokenizer))
        session = self.session
        data = open_data(names, config, machine=session.machine, reporter=session.reporter)
        adopt_tokenizer(data, self.base, self.base_name)
        return data

    def text(self) -> FinetuneData:
        data = self.open_text(self.names, self.files)
        assert isinstance(data.train, TokenFiles)
        few = self.base.tokenizer.decode(data.train.read(0, min(len(data.train), 1 << 16)))
        report = [
            f"data: text, {len(data.train):,} tokens to learn from, {len(data.val):,} to judge by"
        ]
        if note := unknown_note(self.base.tokenizer, few):
            report.append(f"note: {note}")
        return FinetuneData(data, "text", report)

    # -- examples --

    def check_number(self, examples: Examples) -> None:
        if len(examples.items) < 2:
            raise UserError(
                f"{self.names[0]}: one example is too few, since some are kept to judge by; "
                "add more, or name others with --val"
            )

    def conversations(self, examples: Examples) -> FinetuneData:
        T, train = self.T, examples.conversations
        if self.files.val:
            val = self.examples([self.files.val], examples.format).conversations
        else:
            self.check_number(examples)
            train, val = split_examples(train, self.files.val_fraction)
        base = self.base
        chat = Chat(*choose_template(self.config.template, base.tokenizer, base.chat_template))
        rows, counted = encode_all(chat, train, T, self.config.loss_on)
        val_rows, judged = encode_all(chat, val, T, self.config.loss_on)
        for what, some in (("to learn from", rows), ("to judge by", val_rows)):
            if not some:
                raise UserError(
                    f"{self.names[0]}: no example {what} fits into {T} tokens and has words to "
                    "learn; raise --context-length, or see --loss-on"
                )
        report = [
            f"data: {examples.format}, {len(train):,} conversations, {counted.turns:,} turns, "
            f"such as {chat.tokenizer.decode(rows[0][0].tolist())[:60]!r}",
            f"      {counted.tokens:,} tokens, {counted.learned / max(1, counted.tokens):.0%} of "
            f"them with loss; the longest has {counted.longest:,} of {T:,} that fit",
            f"      {counted.cut:,} longer than that, cut between turns; {counted.left_out:,} "
            f"exchanges left out, too long alone; nothing to learn in {counted.nothing_learned:,} "
            f"conversations (and in {judged.nothing_learned:,} to judge by)",
            f"      {_repeated(train, val)}",
            *_left_out(examples),
            *_unknown(chat.tokenizer, (turn.content for item in train for turn in item.turns)),
        ]
        data = self.packed(rows, val_rows, chat.tokenizer)
        return FinetuneData(data, "conversations", report, chat, val[:3])

    def labels(self, examples: Examples) -> FinetuneData:
        train = examples.labelled
        if self.files.val:
            val = self.examples([self.files.val], "labels").labelled
        else:
            self.check_number(examples)
            train, val = split_examples(train, self.files.val_fraction)
        tokenizer, T = self.base.tokenizer, self.T
        if tokenizer.end_of_text is None:  # shorter texts of a batch are filled up with it
            tokenizer = add_tokens(tokenizer, [END_OF_TEXT])
        labels = self.base.labels or tuple(sorted({item.label for item in train}))
        if len(labels) < 2:
            raise UserError(
                f"{self.names[0]}: every text has the label {train[0].label!r}; "
                "classes are two or more"
            )
        index = {label: number for number, label in enumerate(labels)}
        for item in [*train, *val]:
            if item.label not in index:
                raise UserError(
                    f"{item.where}: the label {item.label!r} is none of those to learn: "
                    f"{', '.join(map(repr, labels[:10]))}"
                )
        rows, n_cut = _label_rows(train, tokenizer, index, T)
        val_rows, n_val_cut = _label_rows(val, tokenizer, index, T)
        if not rows or not val_rows:
            raise UserError(f"{self.names[0]}: there is no text in it")
        counts = np.bincount([targets[-1] for _, targets in rows], minlength=len(labels))
        longest = max(len(tokens) for tokens, _ in rows)
        shown = ", ".join(f"{label} {n:,}" for label, n in zip(labels[:10], counts, strict=False))
        report = [
            f"data: {len(rows):,} texts with {len(labels)} labels: {shown}",
            f"      {sum(len(tokens) for tokens, _ in rows):,} tokens; the longest has "
            f"{longest:,} of {T:,} that fit; {n_cut:,} longer than that are cut (and "
            f"{n_val_cut:,} to judge by)",
            f"      {_repeated(train, val)}",
            *_left_out(examples),
            *_unknown(tokenizer, (item.text for item in train)),
        ]
        data = self.packed(rows, val_rows, tokenizer)
        return FinetuneData(data, "labels", report, labels=labels, counts=counts)

    def packed(self, train: list[Row], val: list[Row], tokenizer: Tokenizer) -> Dataset:
        digest, name = hashlib.sha256(), self.names[0]
        for tokens, targets in (*train, *val):
            digest.update(tokens.astype("<i8").tobytes() + targets.astype("<i8").tobytes())
        rows, val_rows = PackedRows(train, self.T), PackedRows(val, self.T)
        fingerprint = digest.hexdigest()[:16]
        return Dataset(Path(name), rows, val_rows, tokenizer, fingerprint, name, packed=True)


_OPTIONS_FOR = {"conversations": ("template", "loss_on"), "labels": ("class_weights",)}


def _label_rows(
    items: Sequence[Labelled], tokenizer: Tokenizer, index: dict[str, int], T: int
) -> tuple[list[Row], int]:
    """Each text with its class as the last target; and how many texts are cut to T tokens."""
    rows, n_cut = [], 0
    for item in items:
        ids = encode_text(tokenizer, item.text)
        n_cut += len(ids) > T
        if kept := ids[:T]:  # none where the tokenizer knows no character of the text
            targets = [IGNORE] * (len(kept) - 1) + [index[item.label]]
            rows.append((np.array(kept), np.array(targets)))
    return rows, n_cut


def _left_out(examples: Examples) -> list[str]:
    reasons = [f"{why}: {n:,}" for why, n in examples.left_out.items()]
    lines = [f"      left out before: {', '.join(reasons)}"] if reasons else []
    return lines + [f"      skipped {each}" for each in examples.skipped[:5]]


def _unknown(tokenizer: Tokenizer, texts: Iterable[str]) -> list[str]:
    note = unknown_note(tokenizer, "".join(dict.fromkeys(chain.from_iterable(texts))))
    return [f"note: {note}"] if note else []


def _repeated(train: list[Example_], val: list[Example_]) -> str:
    both = overlap(train, val)
    return (
        f"{duplicates(train):,} duplicates; of {len(val):,} to judge by {both:,} are also learned"
    )
