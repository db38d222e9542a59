"""How much of the validation text stands in the training text too.

    sample = OverlapSample(); sample.add("train", sample.sample(ids)); sample.share()

A model that has seen its exam looks better than it is. Every window of 50 tokens (the length at
which Lee et al., arXiv:2107.06499, call a repetition a duplicate) is hashed; the windows whose
hash ends in enough zero bits are kept, the same ones in both splits, so memory stays bounded.
"""

from __future__ import annotations

import threading

import numpy as np

WINDOW = 50
_KEEP = 1 << 18  # windows remembered per split
_BASE = np.uint64(0x9E3779B97F4A7C15)
_INVERSE = np.uint64(pow(0x9E3779B97F4A7C15, -1, 1 << 64))


class OverlapSample:
    """Hashes of sampled windows per split; `sample` may run in any thread."""

    def __init__(self) -> None:
        self.bits = 0  # a window is kept when its hash ends in this many zero bits
        self._kept: dict[str, list[np.ndarray]] = {"train": [], "val": []}
        self._count = {"train": 0, "val": 0}  # of hashes; adding up the lengths each time is slow
        self._local = threading.local()

    def sample(self, tokens: np.ndarray) -> np.ndarray:
        """Hashes of the windows of `tokens` that are in the sample."""
        n = len(tokens)
        if n < WINDOW:
            return np.empty(0, np.uint64)
        up, down = self._powers(n)
        # A polynomial hash by prefix sums, modulo 2^64: sum of t[i+j] * base^-j.
        sums = np.cumsum((tokens.astype(np.uint64) + np.uint64(1)) * down[:n])
        hashes = sums[WINDOW - 1 :].copy()
        hashes[1:] -= sums[:-WINDOW]
        hashes *= up[: len(hashes)]
        hashes ^= hashes >> np.uint64(32)  # the low bits of a product are weak: mix
        hashes *= _BASE
        hashes ^= hashes >> np.uint64(29)
        return hashes[hashes & np.uint64((1 << self.bits) - 1) == 0]

    def _powers(self, n: int) -> tuple[np.ndarray, np.ndarray]:
        cached = getattr(self._local, "powers", None)
        if cached is None or len(cached[0]) < n:
            ones = np.ones(max(n, 1 << 19), np.uint64)
            up, down = (
                np.cumprod(np.concatenate([ones[:1], ones[1:] * base]))
                for base in (_BASE, _INVERSE)
            )
            cached = up, down
            self._local.powers = cached
        return cached

    def add(self, split: str, hashes: np.ndarray) -> None:
        if not len(hashes):
            return
        self._kept[split].append(hashes)
        self._count[split] += len(hashes)
        while self._count[split] > _KEEP:  # keep every second window from now on, everywhere
            self.bits += 1
            mask = np.uint64((1 << self.bits) - 1)
            for name, parts in self._kept.items():
                joined = np.concatenate([np.empty(0, np.uint64), *parts])
                self._kept[name] = [joined[joined & mask == 0]]
                self._count[name] = len(self._kept[name][0])

    def share(self) -> float:
        """The share of validation windows that occur in the training text, 0 to 1."""
        mask = np.uint64((1 << self.bits) - 1)
        train, val = (
            np.concatenate([np.empty(0, np.uint64), *self._kept[name]]) for name in ("train", "val")
        )
        val = val[val & mask == 0]
        return float(np.isin(val, train).mean()) if len(val) else 0.0
