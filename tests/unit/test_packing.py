"""Rows of several examples: nothing lost, nothing twice, the same batches whoever asks."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassgpt.data.batches import IGNORE, TokenFiles
from glassgpt.data.packing import PackedRows, _best_fit

Batch = tuple[np.ndarray, np.ndarray, np.ndarray]
Example = tuple[tuple[int, ...], tuple[int, ...]]


def examples_of(lengths: Iterable[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Tokens say which example they are of and where they stand; every third target counts."""
    made = []
    for number, length in enumerate(lengths):
        tokens = 1000 * (number + 1) + np.arange(length)
        made.append((tokens, np.where(np.arange(length) % 3 == 0, tokens + 1, IGNORE)))
    return made


def seen(batches: Iterable[Batch]) -> Counter[Example]:
    """The examples in `batches`, found by their positions alone, without the padding."""
    found: Counter[Example] = Counter()
    for batch in batches:
        for tokens, targets, positions in zip(*batch, strict=True):
            starts = [*np.flatnonzero(positions == 0).tolist(), len(tokens)]
            for start, end in zip(starts, starts[1:], strict=False):
                assert positions[start:end].tolist() == list(range(end - start))
                if (targets[start:end] != IGNORE).any():
                    found[tuple(tokens[start:end]), tuple(targets[start:end])] += 1
                else:
                    assert end == len(tokens)  # padding stands last, and is one segment
                    assert not tokens[start:end].any()
    return found


def as_counter(examples: list[tuple[np.ndarray, np.ndarray]]) -> Counter[Example]:
    return Counter((tuple(tokens), tuple(targets)) for tokens, targets in examples)


LENGTHS = st.lists(st.integers(1, 11), min_size=1, max_size=30)


@given(lengths=LENGTHS, n=st.integers(1, 7), T=st.integers(11, 15), seed=st.integers(0, 2**63 - 1))
def test_every_example_comes_once_in_an_epoch(lengths, n, T, seed) -> None:
    examples = examples_of(lengths)
    rows = PackedRows(examples, T)
    assert len(rows) == sum(lengths)
    assert rows.n_targets == sum((targets != IGNORE).sum() for _, targets in examples)
    assert rows.fill == pytest.approx(sum(lengths) / (rows.n_rows * T))
    epochs = 3
    steps = -(-epochs * rows.n_rows // n)
    batches = [rows.batch(step, seed=seed, n=n, T=T) for step in range(steps)]
    for array in batches[0]:
        assert array.shape == (n, T)
        assert array.dtype == np.int64
    one_by_one = [tuple(array[i : i + 1] for array in batch) for batch in batches for i in range(n)]
    for epoch in range(epochs):
        here = one_by_one[epoch * rows.n_rows : (epoch + 1) * rows.n_rows]
        assert seen(here) == as_counter(examples)  # type: ignore[arg-type]


@given(lengths=LENGTHS, n=st.integers(1, 5), world=st.integers(1, 4), limit=st.integers(1, 40))
def test_windows_give_every_row_once(lengths, n, world, limit) -> None:
    examples = examples_of(lengths)
    rows = PackedRows(examples, 11)
    parts = [list(rows.windows(n=n, T=11, rank=rank, world=world)) for rank in range(world)]
    assert all(1 <= len(tokens) <= n for part in parts for tokens, _, _ in part)
    assert sum(len(tokens) for part in parts for tokens, _, _ in part) == rows.count(11)
    assert seen(batch for part in parts for batch in part) == as_counter(examples)
    alone = [row.tolist() for batch in rows.windows(n=3, T=11, limit=limit) for row in batch[0]]
    shared = [
        row.tolist()
        for rank in range(world)
        for batch in rows.windows(n=n, T=11, limit=limit, rank=rank, world=world)
        for row in batch[0]
    ]
    assert sorted(alone) == sorted(shared)
    assert len(alone) == min(limit, rows.n_rows)
    assert len({tuple(row) for row in alone}) == len(alone)


def test_limited_windows_are_spread_evenly() -> None:
    rows = PackedRows(examples_of([7] * 100), 7)
    (batch,) = rows.windows(n=100, T=7, limit=5)
    assert (batch[0][:, 0] // 1000 - 1).tolist() == [0, 20, 40, 60, 80]


def test_every_epoch_has_an_order_of_its_own() -> None:
    rows = PackedRows(examples_of([5] * 50), 5)
    orders = [rows.batch(epoch, seed=1, n=50, T=5)[0][:, 0].tolist() for epoch in range(4)]
    assert len({tuple(order) for order in orders}) == 4
    assert all(sorted(order) == sorted(orders[0]) for order in orders)
    assert orders[0] != sorted(orders[0])


def test_the_order_is_not_that_of_random_windows(tmp_path: Path) -> None:
    """Text that is replayed beside examples must not be drawn by the same numbers."""
    np.arange(51, dtype="<u2").tofile(tmp_path / "a.bin")
    text = TokenFiles([tmp_path / "a.bin"], "<u2", 51)
    starts = text.batch(0, seed=1, n=50, T=1)[0][:, 0]
    rows = PackedRows(examples_of([5] * 50), 5)
    order = rows.batch(0, seed=1, n=50, T=5)[0][:, 0] // 1000 - 1
    assert (starts == order).mean() < 0.2


@given(lengths=st.lists(st.integers(1, 40), min_size=1, max_size=200))
def test_rows_are_as_full_as_best_fit_makes_them(lengths) -> None:
    rows = _best_fit(lengths, 40)
    assert sorted(example for row in rows for example in row) == list(range(len(lengths)))
    assert all(sum(lengths[i] for i in row) <= 40 for row in rows)
    # The plainest best fit: look at every row.
    spaces: list[int] = []
    for length in sorted(lengths, reverse=True):
        fitting = [space for space in spaces if space >= length]
        if fitting:
            spaces.remove(min(fitting))
        spaces.append((min(fitting) if fitting else 40) - length)
    assert sorted(spaces) == sorted(40 - sum(lengths[i] for i in row) for row in rows)


def test_short_examples_leave_little_padding() -> None:
    chance = random.Random(0)
    rows = PackedRows(examples_of(chance.randint(5, 200) for _ in range(2000)), 256)
    assert rows.fill > 0.98


def test_examples_that_do_not_fit_or_teach_nothing_are_bugs() -> None:
    nothing = np.array([IGNORE, IGNORE])
    tokens = np.array([1, 2])
    for examples in ([], [(tokens, nothing)], [(tokens[:0], tokens[:0])], [(tokens, tokens[:1])]):
        with pytest.raises(AssertionError):
            PackedRows(examples, 8)
    with pytest.raises(AssertionError, match="2 tokens in a row of 1"):
        PackedRows([(tokens, tokens)], 1)
    rows = PackedRows([(tokens, tokens)], 8)
    for ask in (lambda: rows.batch(0, seed=1, n=1, T=9), lambda: rows.count(4)):
        with pytest.raises(AssertionError, match="packed in rows of 8"):
            ask()


@given(n_tokens=st.integers(0, 60), T=st.integers(1, 17))
def test_token_files_count_their_windows(tmp_path_factory, n_tokens, T) -> None:
    path = tmp_path_factory.mktemp("count") / "a.bin"
    np.arange(n_tokens, dtype="<u2").tofile(path)
    files = TokenFiles([path], "<u2", 100)
    assert files.count(T) == sum(len(tokens) for tokens, _ in files.windows(n=4, T=T))
