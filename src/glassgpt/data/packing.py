"""Examples of different lengths in rows of one length: little padding, and none cut in two.

    rows = PackedRows([(tokens, targets), ...], T=256); print(rows.n_rows, rows.fill)
    tokens, targets, positions = rows.batch(step=0, seed=1, n=8, T=256)

Where an example begins, positions begin at 0 again: by that, attention keeps to one example. Like
`batches.TokenFiles`, batches are a pure function of (seed, step); but here every row comes once in
an epoch. NumPy in, NumPy out: this room does not know what the tokens mean.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterable, Iterator
from functools import lru_cache

import numpy as np

from glassgpt.data.batches import IGNORE

_STREAM = 1 << 64  # apart from the random numbers of TokenFiles, whose key is the seed alone


class PackedRows:
    """One split: examples as (tokens (n,), targets (n,)), in rows of `T` places.

    `targets[i]` is what is to be predicted at `tokens[i]`, IGNORE where nothing is. Each example
    has 1 to `T` tokens and at least one target: whoever makes them leaves others out.
    """

    def __init__(self, examples: Iterable[tuple[np.ndarray, np.ndarray]], T: int) -> None:
        kept = []
        for tokens, targets in examples:
            assert 1 <= len(tokens) == len(targets) <= T, f"{len(tokens)} tokens in a row of {T}"
            assert (targets != IGNORE).any(), "an example from which nothing is learned"
            kept.append((tokens.astype(np.int32), targets.astype(np.int32)))
        assert kept, "no examples"
        rows = _best_fit([len(tokens) for tokens, _ in kept], T)
        order = [example for row in rows for example in row]
        # One flat array each, example after example, row after row; a pair of offsets finds a row.
        self._tokens = np.concatenate([kept[i][0] for i in order])
        self._targets = np.concatenate([kept[i][1] for i in order])
        lengths = np.array([len(kept[i][0]) for i in order])
        starts = np.cumsum(lengths) - lengths
        self._positions = (np.arange(len(self)) - np.repeat(starts, lengths)).astype(np.int32)
        self._ends = np.cumsum([sum(len(kept[i][0]) for i in row) for row in rows])
        self.T, self.n_rows = T, len(rows)
        self.n_targets = int(np.count_nonzero(self._targets != IGNORE))

    def __len__(self) -> int:
        """Tokens, without padding."""
        return len(self._tokens)

    @property
    def fill(self) -> float:
        """The share of all places that holds a token, 0 to 1."""
        return len(self) / (self.n_rows * self.T)

    def count(self, T: int) -> int:
        """How many rows `windows` gives."""
        assert T == self.T, f"packed in rows of {self.T}, not {T}"
        return self.n_rows

    def batch(
        self, step: int, *, seed: int, n: int, T: int, rows: slice = slice(None)
    ) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens, targets, positions of `n` rows: (n, T) int64 each; `rows` picks a device's part.

        Steps go on through the epochs without a gap, so a batch may hold the end of one and the
        beginning of the next. Each epoch has an order of its own, which depends on `seed` alone.
        """
        assert T == self.T, f"packed in rows of {self.T}, not {T}"
        numbers = np.arange(step * n, (step + 1) * n)[rows].tolist()
        return self._rows([self._place(seed, number) for number in numbers])

    def _place(self, seed: int, number: int) -> int:
        """Which row comes as the `number`-th since the beginning of training."""
        epoch, at = divmod(number, self.n_rows)
        return int(_order(seed, epoch, self.n_rows)[at])

    def windows(
        self, *, n: int, T: int, limit: int | None = None, rank: int = 0, world: int = 1
    ) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
        """All rows once, in order, as batches of up to `n`; the rest as in TokenFiles.windows."""
        n_rows = self.count(T)
        count = n_rows if limit is None else min(limit, n_rows)
        for first in range(rank * n, count, n * world):
            chosen = np.arange(first, min(first + n, count)) * n_rows // count
            yield self._rows(chosen.tolist())

    def _rows(self, chosen: list[int]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        tokens = np.zeros((len(chosen), self.T), np.int64)
        targets = np.full_like(tokens, IGNORE)
        positions = np.empty_like(tokens)
        for at, row in enumerate(chosen):
            start, end = self._ends[row - 1] if row else 0, self._ends[row]
            used = end - start
            tokens[at, :used] = self._tokens[start:end]
            targets[at, :used] = self._targets[start:end]
            positions[at, :used] = self._positions[start:end]
            positions[at, used:] = np.arange(self.T - used)  # padding: a segment of its own
        return tokens, targets, positions


@lru_cache(maxsize=4)
def _order(seed: int, epoch: int, n_rows: int) -> np.ndarray:
    """(n_rows,): in which order the rows come in an epoch."""
    philox = np.random.Philox(key=_STREAM + seed, counter=[0, 0, 0, epoch])
    return np.random.Generator(philox).permutation(n_rows)


def _best_fit(lengths: list[int], T: int) -> list[list[int]]:
    """Rows of examples: each, longest first, goes where it leaves the least space.

    Best-fit decreasing, which takes at most 11/9 of the fewest rows possible, plus 4 (Johnson et
    al., SIAM J. Comput. 3, 1974); for language models: Ding et al., arXiv:2404.10830. Rows with
    the same space are kept together and the spaces sorted: finding a row is a binary search.
    """
    rows: list[list[int]] = []
    with_space: dict[int, list[int]] = {}
    spaces: list[int] = []  # the keys of `with_space`, in order
    for example in np.argsort(-np.array(lengths), kind="stable").tolist():
        at = bisect_left(spaces, lengths[example])
        if at == len(spaces):
            space, row = T, len(rows)
            rows.append([])
        else:
            space = spaces[at]
            row = with_space[space].pop()
            if not with_space[space]:
                del with_space[space], spaces[at]
        rows[row].append(example)
        space -= lengths[example]
        if space not in with_space:
            with_space[space] = []
            insort(spaces, space)
        with_space[space].append(row)
    return rows
