"""Batches of tokens, as a pure function of (seed, step).

    data = load_data("data/book"); tokens, targets = data.train.batch(step=0, seed=1, n=8, T=64)

Nothing is drawn from a stored generator: any step's batch can be had at any time, so resuming,
debugging one step and changing the number of devices need no state. Files are memory-mapped;
how much text there is does not matter. NumPy in, NumPy out: torch is not known here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np

from glassgpt.data.prepared import is_prepared as is_prepared  # whoever loads data asks that first
from glassgpt.errors import UserError, explain_os_errors, first_of
from glassgpt.tokenizers.nanogpt_meta import tokenizer_of_meta
from glassgpt.tokenizers.tokenizer import Tokenizer, load_tokenizer, tokenizer_fingerprint

IGNORE = -100  # a target that carries no loss


class Split(Protocol):
    """What is trained and validated on: TokenFiles, or examples as packing.PackedRows.

    Batches are (tokens, targets), or (tokens, targets, positions) where several examples share a
    row: each (n, T) int64.
    """

    def __len__(self) -> int: ...  # tokens

    def count(self, T: int) -> int: ...  # windows of T tokens

    def batch(
        self, step: int, *, seed: int, n: int, T: int, rows: slice = slice(None)
    ) -> tuple[np.ndarray, ...]: ...

    def windows(
        self, *, n: int, T: int, limit: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[np.ndarray, ...]]: ...


class TokenFiles:
    """One split: a row of token files, memory-mapped, seen as one long sequence."""

    def __init__(self, paths: Sequence[Path], dtype: str, vocab_size: int) -> None:
        self.paths, self.vocab_size = paths, vocab_size
        self.shards = [_map(path, dtype) for path in paths]
        self.ends = np.cumsum([len(shard) for shard in self.shards])

    def __len__(self) -> int:
        return int(self.ends[-1]) if len(self.ends) else 0

    def read(self, start: int, end: int) -> np.ndarray:
        """Tokens start..end (end - start,) int64, across file borders."""
        parts = []
        for shard, shard_end in zip(self.shards, self.ends, strict=True):
            first = shard_end - len(shard)
            if start < shard_end and end > first:
                parts.append(shard[max(0, start - first) : end - first])
        return np.concatenate(parts).astype(np.int64) if parts else np.empty(0, np.int64)

    def batch(
        self, step: int, *, seed: int, n: int, T: int, rows: slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray]:
        """`n` random windows of T tokens and their successors: (n, T) and (n, T) int64.

        `rows` picks a device's part of the global batch; the batch itself depends on `seed`
        and `step` alone (Philox, a counter-based generator: Salmon et al., SC 2011).
        """
        generator = np.random.Generator(np.random.Philox(key=seed, counter=[0, 0, 0, step]))
        starts = generator.integers(0, len(self) - T, size=n)[rows]
        return self._windows_at(starts, T)

    def _windows_at(self, starts: np.ndarray, T: int) -> tuple[np.ndarray, np.ndarray]:
        if len(self.shards) == 1:
            windows = self.shards[0][starts[:, None] + np.arange(T + 1)].astype(np.int64)
        else:
            windows = np.stack([self.read(start, start + T + 1) for start in starts])
        self._check(windows)
        return windows[:, :-1], windows[:, 1:]

    def _check(self, tokens: np.ndarray) -> None:
        """What is used is looked at, whenever it is: to look at all in advance takes too long."""
        if (largest := tokens.max(initial=0)) >= self.vocab_size:
            raise UserError(f"{self.paths[0].parent} is damaged: token {largest} outside the "
                            f"vocabulary of {self.vocab_size}; delete it and prepare the data "
                            "again")  # fmt: skip

    def count(self, T: int) -> int:
        """How many windows of `T` tokens `windows` gives, the padded last one included."""
        return max(0, -(-(len(self) - 1) // T))

    def windows(
        self, *, n: int, T: int, limit: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """The whole split once, in order, as batches of up to `n` windows: every token but the
        first is a target exactly once. The last window is padded with IGNORE targets.

        `limit` takes only so many windows, spread evenly over the split: the same ones however
        they are batched (`n`) and divided among processes (`rank` of `world`).
        """
        n_windows = self.count(T)
        count = n_windows if limit is None else min(limit, n_windows)
        for first in range(rank * n, count, n * world):
            rows = min(n, count - first)
            if count < n_windows:  # the last one, which may be short, is never among them
                chosen = np.arange(first, first + rows) * n_windows // count
                yield self._windows_at(chosen * T, T)
                continue
            flat = self.read(first * T, min(len(self), (first + rows) * T + 1))
            self._check(flat)
            tokens, targets = np.zeros(rows * T, np.int64), np.full(rows * T, IGNORE)
            tokens[: len(flat) - 1], targets[: len(flat) - 1] = flat[:-1], flat[1:]
            yield tokens.reshape(rows, T), targets.reshape(rows, T)


class Replay:
    """The rows of one split, a `share` of each batch replaced by rows of other text, so that the
    model does not forget it. `packed`: the batches have positions; those of a row of text count on.
    """

    def __init__(self, rows: Split, others: Split, share: float, *, packed: bool) -> None:
        self.rows, self.others, self.share, self.packed = rows, others, share, packed
        self.count, self.windows = rows.count, rows.windows

    def __len__(self) -> int:
        return len(self.rows)

    def batch(
        self, step: int, *, seed: int, n: int, T: int, rows: slice = slice(None)
    ) -> tuple[np.ndarray, ...]:
        # Rounded over all steps together, so that a batch of one row has its share as well.
        replaced = int((step + 1) * n * self.share) - int(step * n * self.share)
        batch = self.rows.batch(step, seed=seed, n=n, T=T)
        if replaced:
            others = list(self.others.batch(step, seed=seed, n=replaced, T=T))
            others += [np.tile(np.arange(T), (replaced, 1))] * self.packed
            for ours, theirs in zip(batch, others, strict=True):
                ours[n - replaced :] = theirs
        return tuple(array[rows] for array in batch)


@dataclass
class Dataset:
    """A prepared folder: two splits, and the tokenizer that made them."""

    path: Path
    train: Split
    val: Split
    tokenizer: Tokenizer
    fingerprint: str
    source: str  # what it was made from, for messages
    packed: bool = False  # several texts share a row: batches have positions
    keep: Split | None = None  # other text, whose loss is watched

    def check_fits(self, context_length: int) -> None:
        """Raises `UserError` when there is not even one window to train or validate on."""
        if len(self.train) <= context_length:
            raise UserError(
                f"{self.source}: {len(self.train)} training tokens are too few for "
                f"context_length={context_length}; use more text or a shorter --context-length"
            )
        if len(self.val) < 2:
            raise UserError(
                f"{self.source}: {len(self.val)} validation tokens; use more text, a larger "
                "--val-fraction, or --val FILE"
            )


def load_data(path: str | Path) -> Dataset:
    """A folder made by `glassgpt prepare`, or one of nanoGPT's (train.bin, val.bin, meta.pkl)."""
    path = Path(path)
    if (path / "meta.json").exists():
        return _load_ours(path)
    if (path / "train.bin").exists():
        return _load_nanogpt(path)
    raise UserError(f"{path} holds no prepared data (no meta.json); see glassgpt prepare --help")


def _load_ours(path: Path) -> Dataset:
    with explain_os_errors(f"read {path}"):
        try:
            meta = json.loads((path / "meta.json").read_bytes())
            dtype, tokenizer = meta["dtype"], load_tokenizer(path)
            if dtype not in ("<u2", "<u4"):
                raise ValueError(f"dtype {dtype!r}")
            splits = {
                name: TokenFiles(
                    [path / file for file in meta[name]["files"]], dtype, tokenizer.vocab_size
                )
                for name in ("train", "val")
            }
            for name, split in splits.items():
                if len(split) != meta[name]["tokens"]:
                    raise UserError(
                        f"{path}: {name} holds {len(split)} tokens instead of "
                        f"{meta[name]['tokens']}; prepare the data again"
                    )
            name = meta["fingerprint"]
            source = first_of([source["name"] for source in meta["sources"]])
        except (ValueError, LookupError, TypeError, RecursionError) as error:
            if isinstance(error, UserError):
                raise
            raise UserError(f"{path / 'meta.json'} is damaged: {error!r}") from error
    if tokenizer_fingerprint(tokenizer) != meta.get("tokenizer"):
        raise UserError(f"{path}: the data were made with another tokenizer.json than this one")
    return Dataset(path, splits["train"], splits["val"], tokenizer, name, source)


def _map(path: Path, dtype: str) -> np.ndarray:
    if not path.exists():
        raise UserError(f"{path} is missing; prepare the data again")
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size % width:
        raise UserError(f"{path} is cut short ({size} bytes); prepare the data again")
    return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype)


# -- nanoGPT's folders ---------------------------------------------------------------------------


def _load_nanogpt(path: Path) -> Dataset:
    if (path / "meta.pkl").exists():
        tokenizer: Tokenizer = tokenizer_of_meta(path / "meta.pkl")
    else:  # nanoGPT's own rule: no meta.pkl means GPT-2's BPE
        from glassgpt.tokenizers.vocabulary import build_tokenizer

        tokenizer = build_tokenizer("gpt2", lambda: iter(()))
    size = tokenizer.vocab_size
    train, val = (TokenFiles([path / f"{name}.bin"], "<u2", size) for name in ("train", "val"))
    for split in (train, val):
        # A look at the start is enough to notice the wrong vocabulary, and OpenWebText has 17 GB.
        if split.read(0, 1 << 20).max(initial=0) >= size:
            raise UserError(f"{path}: tokens outside the vocabulary; another tokenizer made them")
    digest = hashlib.sha256(f"{len(train)} {len(val)}".encode())
    for split in (train, val):
        digest.update(np.ascontiguousarray(split.read(0, 1 << 20)).data)
    name = digest.hexdigest()[:16]
    return Dataset(path, train, val, tokenizer, name, str(path))
