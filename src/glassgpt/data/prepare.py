"""Text into token files: `glassgpt prepare SOURCE... --out DIR`, and what `train` does to raw text.

    report = prepare(["book.txt"], "data/book", DataConfig(tokenizer="char"))

One thread reads, all cores encode (the encoders release the GIL), results are written in order:
memory holds a few pieces, however large the input. The folder gets its name when it is complete.
This room knows nothing of models or training.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import shutil
from array import array
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from glassgpt.config import DataConfig
from glassgpt.data import sources
from glassgpt.data.batches import is_prepared
from glassgpt.data.overlap import OverlapSample
from glassgpt.data.vocabulary import build_tokenizer
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.tokenizer import Tokenizer, fingerprint, to_files

FORMAT = 1
_PIECE_CHARS = 1 << 16  # of a long document; tiktoken is fastest on pieces that fit the cache
_JOB_CHARS = 1 << 19  # what a worker takes at a time
_SHARD_TOKENS = 100_000_000  # a token file of 200 MB: easy to copy, few to open
_MANY = 1000  # documents after which counting stops and the split needs no total

Progress = Callable[[str, int, int | None], None]  # (what is being done, bytes done, bytes in all)


@dataclass
class Report:
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
    unchanged: bool = field(default=False, metadata={"stored": False})


@dataclass
class _Split:
    """Which part of the text is for validation."""

    val_documents: set[int] | None = None  # None: a fixed share of very many
    fraction: float = 0.0
    val_from_char: int | None = None  # too few documents: everything from this character on

    def is_val(self, document: int) -> bool:
        if self.val_documents is not None:
            return document in self.val_documents
        return _spread(document) < self.fraction


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
    progress: Progress | None = None,
) -> Report:
    """Tokenize `names` (files, folders, globs, corpora) into the folder `out`.

    The same input again returns the stored report and touches nothing. Raises `UserError` for
    input that can't be used and for an existing `out` with other content.
    """
    out = Path(out)
    tell = progress or (lambda what, done, total: None)
    inputs = sources.resolve(names, progress=tell)
    val_inputs = sources.resolve([config.val], progress=tell) if config.val else []
    stamps = [sources.fingerprint(source) for source in (*inputs, *val_inputs)]
    key = data_key(stamps, config)
    if is_prepared(out) and _stored_key(out) == key:
        return _stored_report(out)
    if out.exists() and not overwrite and (not out.is_dir() or any(out.iterdir())):
        raise UserError(f"{out} exists already with other content; choose another --out, "
                        "or say --overwrite")  # fmt: skip
    if out.exists() and (not out.is_dir() or any(not _is_ours(path) for path in out.iterdir())):
        raise UserError(f"{out} holds other files than prepared data; --overwrite leaves it alone")
    partial, old = (out.with_name(f".{out.name}.{name}") for name in ("partial", "previous"))
    with explain_os_errors(f"write {out}"):
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        try:
            run = _Preparation(inputs, val_inputs, partial, config, workers, tell)
            meta = run.go() | {"fingerprint": key, "sources": stamps}
            _write_durably(partial / "meta.json", json.dumps(meta, indent=2).encode())
            if out.exists():
                os.replace(out, old)
            os.replace(partial, out)
            shutil.rmtree(old, ignore_errors=True)
        finally:  # an error or Ctrl-C leaves nothing behind
            shutil.rmtree(partial, ignore_errors=True)
    return run.report


def _is_ours(path: Path) -> bool:
    """A file that `prepare` writes; nanoGPT's train.bin is somebody else's."""
    numbered = path.name.startswith(("train-", "val-")) and path.suffix == ".bin"
    return numbered or path.name in ("meta.json", "tokenizer.json", "tokenizer_config.json")


def data_key(stamps: list[dict[str, Any]], config: DataConfig) -> str:
    """Identifies the result: the content of the sources and everything that shapes the tokens."""
    content = [[stamp["sha256"], Path(stamp["name"]).suffix] for stamp in stamps]
    tokenizer = Path(config.tokenizer)
    if tokenizer.exists():  # a path: its content counts, not its name
        file = tokenizer / "tokenizer.json" if tokenizer.is_dir() else tokenizer
        content.append(["tokenizer", hashlib.sha256(file.read_bytes()).hexdigest()])
    described = json.dumps([FORMAT, content, dataclasses.asdict(config)], sort_keys=True)
    return hashlib.sha256(described.encode()).hexdigest()[:16]


def _stored_key(out: Path) -> str | None:
    try:
        return json.loads((out / "meta.json").read_bytes()).get("fingerprint")
    except (OSError, ValueError):
        return None


def _stored_report(out: Path) -> Report:
    return Report(**json.loads((out / "meta.json").read_bytes())["report"], unchanged=True)


def _write_durably(path: Path, content: bytes) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


class _Writer:
    """The token files of one split, and where its documents begin."""

    def __init__(self, folder: Path, name: str, dtype: str) -> None:
        self.folder, self.name, self.dtype = folder, name, dtype
        self.files: list[str] = []
        self.tokens = 0
        self.documents = array("Q")
        self._file: BinaryIO | None = None
        self._room = 0

    def start_document(self, separator: int | None) -> None:
        if separator is not None and self.documents:
            self.write(np.array([separator]))
        self.documents.append(self.tokens)

    def write(self, tokens: np.ndarray) -> None:
        while len(tokens):
            if self._file is None or self._room == 0:
                self.close()
                self.files.append(f"{self.name}-{len(self.files):05d}.bin")
                self._file = open(self.folder / self.files[-1], "wb")  # noqa: SIM115
                self._room = _SHARD_TOKENS
            part, tokens = tokens[: self._room], tokens[self._room :]
            self._file.write(part.astype(self.dtype).data)
            self._room -= len(part)
            self.tokens += len(part)

    def close(self) -> None:
        if self._file is not None:
            self._file.flush()
            os.fsync(self._file.fileno())
            self._file.close()
            self._file = None

    def finish(self) -> dict[str, Any]:
        """Close everything; what meta.json says of this split."""
        self.close()
        starts = f"{self.name}-documents.bin"
        _write_durably(self.folder / starts, np.array(self.documents, "<u8").tobytes())
        return {"files": self.files, "tokens": self.tokens, "documents": len(self.documents),
                "document_starts": starts}  # fmt: skip


@dataclass
class _Part:
    """A stretch of text on its way to a split."""

    split: str
    text: str
    starts_document: bool


class _Preparation:
    """One run: survey, vocabulary, then the pipeline read -> encode -> write."""

    def __init__(
        self,
        inputs: list[sources.Source],
        val_inputs: list[sources.Source],
        folder: Path,
        config: DataConfig,
        workers: int | None,
        tell: Progress,
    ) -> None:
        self.inputs, self.val_inputs, self.folder, self.config = inputs, val_inputs, folder, config
        has_affinity = hasattr(os, "sched_getaffinity")  # in a container fewer than all cores
        cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count()
        self.workers = workers or cores or 1
        self.tell = tell
        self.report = Report()
        self.hashes = array("q")

    def go(self) -> dict[str, Any]:
        split = _Split(val_documents=set()) if self.val_inputs else self._survey()
        self.tokenizer: Tokenizer = build_tokenizer(self.config.tokenizer, self._vocabulary_texts)
        self._fit_to_max_tokens(split)
        dtype = "<u2" if self.tokenizer.vocab_size <= 1 << 16 else "<u4"
        self.writers = {name: _Writer(self.folder, name, dtype) for name in ("train", "val")}
        self.used = np.zeros(self.tokenizer.vocab_size, dtype=np.int64)
        self.known = 0  # characters in the text that are the token for unknown ones
        self.overlap = OverlapSample()
        self._encode(self._parts(split))
        for name, content in to_files(self.tokenizer).items():
            _write_durably(self.folder / name, content)
        splits = {name: writer.finish() for name, writer in self.writers.items()}
        self._complete_report()
        facts = dataclasses.asdict(self.report)
        del facts["unchanged"]
        return {
            "format": FORMAT,
            "dtype": dtype,
            "tokenizer": fingerprint(self.tokenizer),
            "tokenizer_kind": self.tokenizer.kind,
            "vocab_size": self.tokenizer.vocab_size,
            **splits,
            "report": facts,
        }

    # -- reading ---------------------------------------------------------------------------------

    def _pieces(self, what: str, inputs: list[sources.Source]) -> Iterator[sources.Piece]:
        total, done = sources.total_bytes(inputs), 0
        skipped: list[str] = []

        def on_bytes(n: int) -> None:
            nonlocal done
            done += n
            self.tell(what, done, total)

        yield from sources.read_pieces(
            inputs,
            text_field=self.config.text_field,
            piece_chars=_PIECE_CHARS,
            on_skip=lambda name, why: skipped.append(f"{name}: {why}"),
            on_bytes=on_bytes,
        )
        self.report.skipped = skipped or self.report.skipped

    def _vocabulary_texts(self) -> Iterator[str]:
        return (piece.text for piece in self._pieces("learning the vocabulary", self.inputs))

    def _survey(self) -> _Split:
        """Count documents (up to `_MANY`) and characters, and decide how to split."""
        documents = characters = 0
        for piece in self._pieces("looking through the text", self.inputs):
            if not piece.text.isspace():
                documents += piece.starts_document
                characters += len(piece.text)
            if documents > _MANY:
                return _Split(fraction=self.config.val_fraction)
        if characters == 0:
            raise UserError(f"{', '.join(s.name for s in self.inputs)}: there is no text in it")
        n_val = int(documents * self.config.val_fraction)
        if n_val:
            return _Split(val_documents=set(sorted(range(documents), key=_spread)[:n_val]))
        self.characters = characters
        return _Split(set(), val_from_char=int(characters * (1 - self.config.val_fraction)))

    def _fit_to_max_tokens(self, split: _Split) -> None:
        """One document cut short: its validation part must lie before the end that is left."""
        if split.val_from_char is None or self.config.max_tokens is None:
            return
        first = next(self._pieces("looking through the text", self.inputs)).text
        per_token = len(first) / len(self.tokenizer.encode_array(first))
        characters = min(self.characters, int(self.config.max_tokens * per_token))
        split.val_from_char = int(characters * (1 - self.config.val_fraction))

    def _parts(self, split: _Split) -> Iterator[_Part]:
        """Every piece of text with its split, in order; counts documents on the way."""
        document, position = -1, 0
        running = 0  # hash of the current document so far
        name = "train"
        for source, inputs in (("train", self.inputs), ("val", self.val_inputs)):
            for piece in self._pieces("tokenizing", inputs) if inputs else ():
                text = piece.text
                # A document of blanks teaches nothing. (A piece this short is never the
                # beginning of a longer document.)
                if piece.starts_document and len(text) < 1000 and text.isspace():
                    self.report.too_short += 1
                    continue
                if piece.starts_document:
                    document += 1
                    self.hashes.append(running)
                    running = 0
                    name = "val" if source == "val" or split.is_val(document) else "train"
                running = hash((running, text))
                self.report.characters += len(text)
                cut = split.val_from_char
                before = len(text) if cut is None else max(0, min(len(text), cut - position))
                if before:
                    yield _Part(name, text[:before], piece.starts_document)
                if before < len(text):
                    first = cut is not None and cut >= position  # the validation text begins here
                    yield _Part("val", text[before:], piece.starts_document or first)
                position += len(text)
        self.hashes.append(running)
        self.report.documents = document + 1

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
                if self._enough():
                    break
            while waiting and not self._enough():
                self._write(*waiting.popleft().result())
        finally:
            pool.shutdown(wait=True, cancel_futures=True)

    def _enough(self) -> bool:
        limit = self.config.max_tokens
        return limit is not None and sum(w.tokens for w in self.writers.values()) >= limit

    def _encode_job(self, job: list[_Part]):
        """In a worker: ids of every part, and this job's sample of windows per split."""
        ids = [self.tokenizer.encode_array(part.text) for part in job]
        samples = [(p.split, self.overlap.sample(t)) for p, t in zip(job, ids, strict=True)]
        return job, ids, samples

    def _write(self, job: list[_Part], ids: list[np.ndarray], samples: list) -> None:
        separator = self.tokenizer.end_of_text
        for part, tokens in zip(job, ids, strict=True):
            writer = self.writers[part.split]
            if part.starts_document:
                writer.start_document(separator)
            writer.write(tokens)
        self.used += np.bincount(np.concatenate(ids), minlength=len(self.used))
        unknown = self.tokenizer.unknown_token
        if unknown is not None and len(unknown) == 1:  # an ordinary character (nanoGPT's models)
            self.known += sum(part.text.count(unknown) for part in job)
        for split, hashes in samples:
            self.overlap.add(split, hashes)

    # -- the report ------------------------------------------------------------------------------

    def _complete_report(self) -> None:
        report = self.report
        train, val = self.writers["train"], self.writers["val"]
        report.train_tokens, report.val_tokens = train.tokens, val.tokens
        report.val_documents = len(val.documents)
        report.vocab_size = len(self.used)
        report.vocab_used = int(np.count_nonzero(self.used))
        if self.tokenizer.kind == "char":
            unknown = self.tokenizer.spec["model"]["vocab"][self.tokenizer.unknown_token]
            report.unknown_tokens = int(self.used[unknown]) - self.known
        hashes = np.array(self.hashes[1:])  # the first is the empty beginning
        report.duplicates = len(hashes) - len(np.unique(hashes))
        report.overlap = self.overlap.share()


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
