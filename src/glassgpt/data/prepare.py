"""Text into token files: `glassgpt prepare SOURCE... --out DIR`, and what `train` does to raw text.

    report = prepare(["book.txt"], "data/book", DataConfig(tokenizer="char"))

One thread reads, all cores encode (the encoders release the GIL), results are written in order:
memory holds a few pieces, however large the input. The folder counts only when it is complete.
This room knows nothing of models or training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import sys
from array import array
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glassgpt.config import DataConfig
from glassgpt.data import sources
from glassgpt.data.dataset import TokenWriter, is_prepared, load_data, read_data_meta, replace_data
from glassgpt.data.texts import TextPiece
from glassgpt.errors import UserError, explain_os_errors, first_of
from glassgpt.system import SILENT, Reporter, cache_dir, usable_cores, write_file
from glassgpt.tokenizers.tokenizer import Tokenizer, to_files, tokenizer_fingerprint
from glassgpt.tokenizers.vocabulary import build_tokenizer, tokenizer_path

FORMAT = 3  # goes up when the same text and options give other tokens
_PIECE_CHARS = 1 << 16  # of a long document; tiktoken is fastest on pieces that fit the cache
_JOB_CHARS = 1 << 19  # what a worker takes at a time
_MANY = 1000  # documents after which counting stops and the split needs no total
_CHARS_PER_TOKEN = 16  # more than any text has on average: max_tokens needs to see no more
_MAX_WORKERS = 1024
_CHEAP_TO_READ = 1 << 26  # bytes of text that an estimate may read
_ASCII = "".join(map(chr, range(32, 127)))  # stands for a text that is not read
_GPT2_TOKENS = 50257  # known without the files


@dataclass
class PrepareReport:
    """What `prepare` found; the same facts stand in meta.json."""

    documents: int = 0
    characters: int = 0
    train_tokens: int = 0
    val_tokens: int = 0
    val_documents: int = 0
    vocab_size: int = 0
    vocab_used: int = 0
    unknown_tokens: int = 0
    duplicates: int = 0
    too_short: int = 0
    overlap: float = 0.0
    skipped: list[str] = field(default_factory=list)
    unchanged: bool = False  # it was there already

    def describe(self, out: str | Path) -> str:
        """What `glassgpt prepare` ends with: facts, then what should make the reader look twice."""
        tokens = self.train_tokens + self.val_tokens
        state = "already prepared from the same input; nothing to do" if self.unchanged else "ready"
        facts = {
            "documents": f"{self.documents:,} ({self.val_documents:,} for validation)",
            "characters": f"{self.characters:,}",
            "tokens": f"{tokens:,} ({self.train_tokens:,} training, "
            f"{self.val_tokens:,} validation)",
            "per token": f"{self.characters / max(1, tokens):.2f} characters",
            "vocabulary": f"{self.vocab_used:,} of {self.vocab_size:,} tokens occur",
            "duplicates": f"{self.duplicates:,} documents are exact copies of earlier ones",
            "overlap": f"{self.overlap:.1%} of the validation text (windows of 50 tokens) "
            "also stands in the training text",
            "too short": f"{self.too_short:,} blank documents left out",
        }
        if self.unknown_tokens:
            facts["unknown"] = f"{self.unknown_tokens:,} characters are not in the vocabulary"
        if self.skipped:
            facts["skipped"] = f"{len(self.skipped):,} files, such as {self.skipped[0]}"
        lines = [f"{out}: {state}", *(f"  {name:12} {fact}" for name, fact in facts.items())]
        if self.val_tokens < 1000:
            lines.append(
                "  note: so little validation text gives a noisy loss; see --val-fraction and --val"
            )
        if self.overlap > 0.1:
            lines.append(
                "  note: the validation loss will look better than it is; remove copies "
                "from the text, or give --val FILE"
            )
        return "\n".join(lines)


@dataclass
class _Split:
    """Which part of the text is for validation."""

    val_documents: set[int] = field(default_factory=set)
    fraction: float = 0.0  # and this share of all, when they are too many to be counted
    val_from_char: int | None = None  # too few documents: everything from this character on

    def is_val(self, document: int) -> bool:
        return document in self.val_documents or _spread(document) < self.fraction


def _spread(i: int) -> float:
    """Numbers in [0, 1) that fill it evenly (golden-ratio sequence), so that any share of the
    documents is taken evenly from the whole collection."""
    return (i + 1) * 0.6180339887498949 % 1.0


def prepare(
    names: Sequence[str],
    out: str | Path,
    config: DataConfig,
    *,
    workers: int | None = None,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
) -> PrepareReport:
    """Tokenize `names` (files, folders, globs, corpora) into the folder `out`.

    The same input again returns the stored report and touches nothing. Raises `UserError` for
    input that can't be used, for an existing `out` with other content, and while another process
    writes `out`.
    """
    if workers is not None and not 1 <= workers <= _MAX_WORKERS:
        raise UserError(f"workers={workers} must lie between 1 and {_MAX_WORKERS}")
    inputs = sources.resolve(names, reporter=reporter)
    val_inputs = sources.resolve([config.val], reporter=reporter) if config.val is not None else []
    stamps = [sources.stamp_of(source) for source in (*inputs, *val_inputs)]
    key = data_key(stamps, config)
    out = Path(out)
    if (stored := _stored_report(out, key)) is not None:
        return stored
    files = [source.file for source in (*inputs, *val_inputs) if isinstance(source.file, Path)]
    with replace_data(out, inputs=files, overwrite=overwrite) as folder:
        run = _Preparation(inputs, val_inputs, folder, config, workers, reporter)
        stated = {"fingerprint": key, "sources": stamps, "options": dataclasses.asdict(config)}
        meta = run.go() | stated
        write_file(folder / "meta.json", json.dumps(meta, indent=2).encode())
    return run.report


def data_key(stamps: Sequence[sources.Stamp], config: DataConfig) -> str:
    """Identifies the result: the content of the sources and everything that shapes the tokens."""
    content = [[stamp["sha256"], sources.kind_by_name(stamp["name"])] for stamp in stamps]
    path = tokenizer_path(config.tokenizer)
    if path is not None:  # its content counts, not its name
        with explain_os_errors(f"read the tokenizer {path}"):
            content.append(["tokenizer", hashlib.sha256(path.read_bytes()).hexdigest()])
        config = dataclasses.replace(config, tokenizer="path")
    described = json.dumps([FORMAT, content, dataclasses.asdict(config)], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _stored_report(out: Path, key: str) -> PrepareReport | None:
    """Of a folder that holds what `key` stands for, and holds it undamaged."""
    meta = read_data_meta(out)
    if meta is None or meta.get("fingerprint") != key:
        return None
    try:
        load_data(out)
        return PrepareReport(**meta["report"] | {"unchanged": True})
    except (UserError, KeyError, TypeError):
        return None


@dataclass
class _Part:
    """A stretch of text on its way to a split; without text, a blank document to be counted."""

    split: str
    text: str
    document: int = -1
    seen: int = 0  # hash of the document up to here
    continues: bool = False  # more of the document went before


class _Preparation:
    """One run: survey, vocabulary, then the pipeline read -> encode -> write."""

    def __init__(
        self,
        inputs: list[sources.Source],
        val_inputs: list[sources.Source],
        folder: Path,
        config: DataConfig,
        workers: int | None,
        reporter: Reporter,
    ) -> None:
        self.inputs, self.val_inputs, self.folder, self.config = inputs, val_inputs, folder, config
        self.workers = workers or usable_cores()
        self.reporter = reporter
        self.report = PrepareReport()
        self.skipped: dict[str, None] = {}  # in order, once each, however often it is read
        self.hashes = array("q")  # of the documents that were kept
        self.document = -1  # the last of them

    def go(self) -> dict[str, Any]:
        from glassgpt.data.overlap import OverlapSample  # needed only here

        split = _Split() if self.val_inputs else self._survey()
        self.tokenizer: Tokenizer = build_tokenizer(self.config.tokenizer, self._vocabulary_texts)
        dtype = "<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4"
        self.writers = {
            name: TokenWriter(self.folder, name, dtype, limit)
            for name, limit in self._limits().items()
        }
        self.used = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        self.known = 0  # characters in the text that are the token for unknown ones
        self.overlap = OverlapSample()
        self._encode(self._parts(split))
        for name, content in to_files(self.tokenizer).items():
            write_file(self.folder / name, content)
        splits = {name: writer.finish() for name, writer in self.writers.items()}
        self._complete_report()
        return {
            "format": FORMAT,
            "dtype": dtype,
            "tokenizer": tokenizer_fingerprint(self.tokenizer),
            "tokenizer_kind": self.tokenizer.kind,
            "vocab_size": self.tokenizer.vocab_size,
            **splits,
            "report": dataclasses.asdict(self.report),
        }

    def _limits(self) -> dict[str, int]:
        """Tokens that each split may take: its share of max_tokens. A --val file is read whole."""
        limit = self.config.max_tokens
        if limit is None:
            return {"train": sys.maxsize, "val": sys.maxsize}
        if self.val_inputs:
            return {"train": limit, "val": sys.maxsize}
        val = max(1, round(limit * self.config.val_fraction))
        return {"train": limit - val, "val": val}

    # -- reading ---------------------------------------------------------------------------------

    def _pieces(self, what: str, inputs: list[sources.Source]) -> Iterator[TextPiece]:
        """The text of `inputs`; of what `max_tokens` limits, only the beginning that may matter."""
        total, done = sources.total_bytes(inputs), 0
        room = sys.maxsize
        if self.config.max_tokens is not None and inputs is self.inputs:
            room = self.config.max_tokens * _CHARS_PER_TOKEN

        def on_bytes(n: int) -> None:
            nonlocal done
            done += n
            self.reporter.advance(what, done, total)

        pieces = sources.read_pieces(
            inputs,
            text_field=self.config.text_field,
            piece_chars=_PIECE_CHARS,
            on_skip=lambda name, why: self.skipped.setdefault(f"{name}: {why}"),
            on_bytes=on_bytes,
        )
        for text, starts_document in _empty_blanks(pieces):
            yield TextPiece(text[:room], starts_document)
            room -= len(text)
            if room <= 0:
                return

    def _vocabulary_texts(self) -> Iterator[str]:
        return (piece.text for piece in self._pieces("learning the vocabulary", self.inputs))

    def _survey(self) -> _Split:
        """Count documents (up to `_MANY`) and characters, and decide how to split."""
        fraction = self.config.val_fraction
        documents = characters = 0
        for text, starts_document in self._pieces("looking through the text", self.inputs):
            documents += bool(text) and starts_document
            characters += len(text)
            if documents > _MANY:  # one at least, however small the share
                return _Split({min(range(_MANY), key=_spread)}, fraction)
        if characters == 0:
            raise UserError(f"{self._named()}: there is no text in it")
        if documents * fraction >= 1:
            n_val = min(round(documents * fraction), documents - 1)
            return _Split(set(sorted(range(documents), key=_spread)[:n_val]))
        return _Split(val_from_char=int(characters * (1 - fraction)))

    def _parts(self, split: _Split) -> Iterator[_Part]:
        """Every piece of text with its split, in order, until the splits are full."""
        document, position, seen = -1, 0, 0
        name = "train"
        for source, inputs in (("train", self.inputs), ("val", self.val_inputs)):
            fed = [self.writers[s] for s in ([source] if self.val_inputs else self.writers)]
            for text, starts_document in self._pieces("tokenizing", inputs) if inputs else ():
                if not any(writer.room for writer in fed):
                    break
                if not text:
                    yield _Part(source, text)
                    continue
                if starts_document:
                    document, seen = document + 1, 0
                    name = "val" if source == "val" or split.is_val(document) else "train"
                seen = hash((seen, text))
                cut = split.val_from_char
                before = len(text) if cut is None else max(0, min(len(text), cut - position))
                for into, stretch in ((name, text[:before]), ("val", text[before:])):
                    if stretch and self.writers[into].room:
                        yield _Part(into, stretch, document, seen, not starts_document)
                position += len(text)

    # -- encoding --------------------------------------------------------------------------------

    def _encode(self, parts: Iterator[_Part]) -> None:
        """Keep every worker busy, with a bounded number of jobs under way; write in order."""
        pool = ThreadPoolExecutor(self.workers)
        waiting: deque[Future] = deque()
        try:
            for job in _jobs(parts):
                waiting.append(pool.submit(self._encode_job, job))
                if len(waiting) > 2 * self.workers:
                    self._write(*waiting.popleft().result())
            while waiting:
                self._write(*waiting.popleft().result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _encode_job(self, job: list[_Part]):
        """In a worker: ids of every part, and its sample of windows."""
        ids = [self.tokenizer.encode_array(p.text, continues=p.continues) for p in job]
        return job, ids, [self.overlap.sample(tokens) for tokens in ids]

    def _write(self, job: list[_Part], ids: list[np.ndarray], samples: list[np.ndarray]) -> None:
        """In order: what there is room for is written, and that alone is counted."""
        kept, unknown = [], self.tokenizer.unknown_token
        for part, tokens, sample in zip(job, ids, samples, strict=True):
            writer = self.writers[part.split]
            if not part.text:
                self.report.too_short += writer.room > 0
                continue
            taken = writer.add(part.document, tokens, self.tokenizer.end_of_text)
            if len(taken) == len(tokens):
                characters, seen = len(part.text), part.seen
            elif len(taken):  # a document cut short is no copy of another
                characters, seen = len(self.tokenizer.decode(taken)), hash((part.seen, len(taken)))
                sample = self.overlap.sample(taken)
            else:
                continue
            self.report.characters += characters
            if part.document != self.document:
                self.document = part.document
                self.hashes.append(0)
            self.hashes[-1] = seen
            self.overlap.add(part.split, sample)
            kept.append(taken)
            if unknown is not None and len(unknown) == 1:  # an ordinary character (nanoGPT's)
                self.known += part.text[: len(taken)].count(unknown)
        if kept:
            self.used += np.bincount(np.concatenate(kept), minlength=len(self.used))

    # -- the report ------------------------------------------------------------------------------

    def _named(self) -> str:
        return first_of([source.name for source in self.inputs])

    def _complete_report(self) -> None:
        report = self.report
        train, val = self.writers["train"], self.writers["val"]
        for what, writer in (("training", train), ("validation", val)):
            if writer.tokens == 0:
                raise UserError(
                    f"{self._named()}: no text is left for {what}; use more text, "
                    "a larger --max-tokens, another --val-fraction, or --val FILE"
                )
        report.train_tokens, report.val_tokens = train.tokens, val.tokens
        report.documents, report.val_documents = len(self.hashes), len(val.documents)
        report.skipped = list(self.skipped)
        report.vocab_size = len(self.used)
        report.vocab_used = int(np.count_nonzero(self.used))
        if self.tokenizer.kind == "char":
            unknown = self.tokenizer.spec["model"]["vocab"][self.tokenizer.unknown_token]
            report.unknown_tokens = int(self.used[unknown]) - self.known
        report.duplicates = report.documents - len(np.unique(self.hashes))
        report.overlap = self.overlap.share()


def _empty_blanks(pieces: Iterable[TextPiece]) -> Iterator[TextPiece]:
    """The same, but a document of blanks alone, which teaches nothing, is one empty piece."""
    blank: list[TextPiece] = []  # of a document that has shown nothing else so far
    for piece in pieces:
        if blank and piece.starts_document:
            yield TextPiece("", True)
            blank = []
        if (blank or piece.starts_document) and piece.text.isspace():
            blank.append(piece)
            continue
        yield from blank
        blank = []
        yield piece
    if blank:
        yield TextPiece("", True)


def _jobs(parts: Iterable[_Part]) -> Iterator[list[_Part]]:
    """Short parts travel together; a job has about `_JOB_CHARS` characters."""
    job, chars = [], 0
    for part in parts:
        job.append(part)
        chars += len(part.text)
        if chars >= _JOB_CHARS:
            yield job
            job, chars = [], 0
    if job:
        yield job


# ---- before anything is prepared --------------------------------------------------------------


@dataclass(frozen=True)
class DataSize:
    """Vocabulary and length of data, as far as they are known before preparing them."""

    vocab_size: int
    train_tokens: int | None
    note: str = ""  # what is not known, and why


def estimate_size(names: Sequence[str], config: DataConfig) -> DataSize:
    """The size of prepared data, or of texts as `config` would prepare them.

    Counting characters takes a moment; what would take long, such as learning word pieces, is left
    unknown. Nothing is downloaded, nothing written. Raises `UserError` for data that are damaged,
    texts that can't be read, and unknown tokenizers.
    """
    if len(names) == 1 and is_prepared(names[0]):
        dataset = load_data(names[0])
        return DataSize(dataset.tokenizer.vocab_size, len(dataset.train))
    if not names:
        return _unread(config, "no text is named")
    if not all(os.path.exists(os.path.expanduser(name)) for name in names):
        return _unread(config, f"{names[0]} is not on this disk")
    inputs = sources.resolve(names)
    if sources.total_bytes(inputs) > _CHEAP_TO_READ:
        return _unread(config, "so much text is not counted before it is prepared")
    every = inputs + (sources.resolve([config.val]) if config.val is not None else [])
    key = data_key([sources.stamp_of(source) for source in every], config)
    if is_prepared(cache_dir() / "data" / key):
        return estimate_size([str(cache_dir() / "data" / key)], config)
    if config.tokenizer not in ("char", "byte"):
        return _unread(config, "the text is not prepared yet")
    pieces = sources.read_pieces(inputs, text_field=config.text_field)
    content = "".join(piece.text for piece in pieces)
    size = build_tokenizer(config.tokenizer, lambda: iter([content])).vocab_size
    length = len(content) if config.tokenizer == "char" else len(content.encode("utf-8"))
    share = 1.0 if config.val is not None else 1 - config.val_fraction
    return DataSize(size, min(round(length * share), config.max_tokens or length))


def _unread(config: DataConfig, why: str) -> DataSize:
    name = config.tokenizer
    if name == "gpt2":
        size = _GPT2_TOKENS
    elif name.startswith("bpe:") and name[4:].isdecimal():
        size = int(name[4:][:9])
    else:
        size = build_tokenizer(name, lambda: iter([_ASCII])).vocab_size
        why += f"; vocabulary of {size} assumed" if name == "char" else ""
    return DataSize(size, None, f"epochs unknown: {why}")
