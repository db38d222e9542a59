"""Batches of tokens, as a pure function of (seed, step).

    data = load_data("data/book"); tokens, targets = data.train.batch(step=0, seed=1, n=8, T=64)

Nothing is drawn from a stored generator: any step's batch can be computed at any time, so resuming,
debugging one step and changing the number of devices need no state. The text is one long sequence:
as in nanoGPT, a window may run from the end of one document into the next, and no mask hides the
earlier one. Files are memory-mapped, so the amount of text does not matter. NumPy in, NumPy out:
this module does not know torch, nor where the files come from (`dataset.py` does).
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np

from glassgpt.errors import UserError

IGNORE = -100  # a target that carries no loss


class Split(Protocol):
    """What is trained or validated on: TokenFiles, or examples as packing.PackedRows.

    A batch is (tokens, targets), or (tokens, targets, positions) where several examples share a
    row; each array is (n, T) int64.
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

        The batch depends on `seed` and `step` alone: Philox (Salmon et al., SC 2011) computes
        random numbers from a key and a counter. `rows` picks a device's part of the batch.
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
        """Check what is used, when it is used; checking all files in advance takes too long."""
        if (largest := tokens.max(initial=0)) >= self.vocab_size:
            raise UserError(
                f"{self.paths[0].parent} is damaged: token {largest} outside the vocabulary of "
                f"{self.vocab_size}; delete it and prepare the data again"
            )

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
    """The rows of one split, with a `share` of each batch replaced by rows of other text, so that
    the model does not forget it. `packed`: batches have positions, which run through in such a row.
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


def _map(path: Path, dtype: str) -> np.ndarray:
    if not path.exists():
        raise UserError(f"{path} is missing; prepare the data again")
    size, width = path.stat().st_size, np.dtype(dtype).itemsize
    if size % width:
        raise UserError(f"{path} is cut short ({size} bytes); prepare the data again")
    return np.memmap(path, dtype=dtype, mode="r") if size else np.empty(0, dtype)
