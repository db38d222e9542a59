"""What every Split promises: batches are a function of (seed, step), and windows come once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from glassgpt.data.batches import IGNORE, Replay, Split, TokenFiles
from glassgpt.data.packing import PackedRows

T = 9
Make = Callable[[Path], Split]


def token_files(folder: Path, *sizes: int, first: int = 0) -> TokenFiles:
    """Files that hold first, first + 1, ...: a token says where it stands."""
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number}.bin" for number in range(len(sizes))]
    ends = np.cumsum(sizes) + first
    for path, size, end in zip(paths, sizes, ends, strict=True):
        np.arange(end - size, end).astype("<u2").tofile(path)
    return TokenFiles(paths, "<u2", vocab_size=int(ends[-1]))


def packed_rows(folder: Path) -> PackedRows:
    """Tokens say which example they are of."""
    examples = []
    for number, length in enumerate([3, 9, 4, 4, 1, 8, 2, 7] * 20):
        tokens = 1000 * (number + 1) + np.arange(length)
        examples.append((tokens, np.where(np.arange(length) % 3 == 0, tokens + 1, IGNORE)))
    return PackedRows(examples, T)


SPLITS: dict[str, Make] = {
    "one file": lambda folder: token_files(folder, 6000),
    "several files": lambda folder: token_files(folder, 700, 30, 5000),
    "examples in rows": packed_rows,
    "replay": lambda folder: Replay(
        token_files(folder, 6000),
        token_files(folder / "old", 6000, first=7000),
        0.25,
        packed=False,
    ),
}


@pytest.fixture(params=SPLITS.values(), ids=SPLITS.keys())
def make(request) -> Make:
    return request.param


def test_a_batch_depends_on_seed_and_step_alone(make: Make, tmp_path: Path) -> None:
    split = make(tmp_path)
    first = split.batch(7, seed=5, n=6, T=T)
    assert all(array.shape == (6, T) and array.dtype == np.int64 for array in first)
    split.batch(3, seed=6, n=4, T=T)
    again = make(tmp_path / "copy").batch(7, seed=5, n=6, T=T)
    assert all(np.array_equal(one, other) for one, other in zip(first, again, strict=True))
    for step, seed in ((8, 5), (7, 6), (5, 7), (7, 5 + 2**62)):
        assert not np.array_equal(first[0], split.batch(step, seed=seed, n=6, T=T)[0])


@pytest.mark.parametrize("world", [1, 2, 3, 4, 6])
def test_rank_slices_tile_the_global_batch(make: Make, tmp_path: Path, world: int) -> None:
    split, share = make(tmp_path), 12 // world
    whole = split.batch(2, seed=3, n=12, T=T)
    parts = [
        split.batch(2, seed=3, n=12, T=T, rows=slice(rank * share, (rank + 1) * share))
        for rank in range(world)
    ]
    for side, array in enumerate(whole):
        assert np.array_equal(np.concatenate([part[side] for part in parts]), array)


@pytest.mark.parametrize("limit", [None, 1, 7, 50, 10_000])
def test_windows_are_the_same_however_divided(make: Make, tmp_path: Path, limit) -> None:
    split, divisions = make(tmp_path), []
    for n, world in ((1, 1), (4, 1), (2, 3), (5, 2)):
        rows = []
        for rank in range(world):
            for tokens, *_ in split.windows(n=n, T=T, limit=limit, rank=rank, world=world):
                assert 1 <= len(tokens) <= n
                rows += [tuple(row) for row in tokens.tolist()]
        divisions.append(sorted(rows))
    assert all(rows == divisions[0] for rows in divisions)
    assert len(divisions[0]) == len(set(divisions[0])) == min(limit or 10_000, split.count(T))
