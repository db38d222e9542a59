"""The key/value cache: what attention remembers, so that each new token costs one position.

    cache = KVCache(model.config, batch=1); logits = model(tokens, cache=cache)

The caller owns it and passes it to `forward`; the model keeps no state of its own. `KVCache` holds
sequences of one length and grows with them; `RowCache` shows one forward pass rows of different
lengths in memory that never moves; `Packing` remembers nothing, and keeps apart texts that share a
row in training. None knows anything of sampling or of what happens when the context is full
(`generate.py` decides that).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from glassgpt.config import ModelConfig

_FIRST_CAPACITY = 256  # a whole context of 131,072 positions would be gigabytes


class Cache(Protocol):
    """What model.py asks for in one forward pass over T new tokens a sequence."""

    mask: torch.Tensor | None
    """Which of the S positions a new token sees, True in (B, 1, T, S); None: all before it."""

    def positions(self, n_tokens: int) -> slice | torch.Tensor:
        """Where the new tokens stand in their texts: T places for all, or a tensor (B, T)."""
        ...

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store this layer's new k, v (B, K, T, D); return all to look at, (B, K, S, D) each."""
        ...

    def advance(self, n_tokens: int) -> None:
        """Every layer has stored its part."""
        ...


class KVCache:
    """Keys and values of every layer for the positions seen so far, in one allocation.

    keys, values: (L, B, K, capacity, D); the first `length` positions are in use. Without a
    given `capacity` it doubles when it is full, up to the context.
    """

    mask: torch.Tensor | None = None

    def __init__(
        self,
        config: ModelConfig,
        batch: int,
        *,
        capacity: int | None = None,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
    ) -> None:
        self._limit = capacity or config.context_length
        capacity = capacity or min(_FIRST_CAPACITY, config.context_length)
        shape = (config.n_layer, batch, config.n_kv_head, capacity, config.head_dim)
        self.keys = torch.empty(shape, dtype=dtype, device=device)
        self.values = torch.empty_like(self.keys)
        self.length = 0

    @property
    def capacity(self) -> int:
        return self.keys.size(3)

    def positions(self, n_tokens: int) -> slice:
        return slice(self.length, self.length + n_tokens)

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        end = self.length + k.size(2)
        if end > self.capacity:
            self._grow(end)
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def _grow(self, needed: int) -> None:
        assert needed <= self._limit, f"{needed} positions do not fit in a cache of {self._limit}"
        more = min(self._limit, max(needed, 2 * self.capacity)) - self.capacity
        room = torch.empty_like(self.keys[:, :, :, :1]).expand(-1, -1, -1, more, -1)
        self.keys = torch.cat((self.keys, room), dim=3)
        self.values = torch.cat((self.values, room), dim=3)

    def clone(self) -> KVCache:
        """One more cache with the same content."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, keys=self.keys.clone(), values=self.values.clone())
        return copy

    def advance(self, n_tokens: int) -> None:
        self.length += n_tokens


class RowCache:
    """Some rows of a larger memory, each with a length of its own, for one forward pass.

    keys, values: for each layer (R, K, capacity, D), R >= B. Nothing here depends on a number that
    only the host knows, so that the pass can be compiled once and replayed as a CUDA graph.

    rows (B,): where the B sequences of the pass are; None for the first B, which are then read
    where they lie, without a copy. positions (B, T): of the new tokens in their texts. places
    (B, T): where their keys and values go; `positions`, but for what is only there to fill the
    batch, which goes to a place that no text uses. A token sees the `visible` first places, up to
    its own position. `fresh` says that all texts begin here, so that plain causality will do.
    """

    def __init__(
        self,
        keys: Sequence[torch.Tensor],
        values: Sequence[torch.Tensor],
        positions: torch.Tensor,
        places: torch.Tensor,
        *,
        visible: int,
        rows: torch.Tensor | None = None,
        fresh: bool = False,
    ) -> None:
        self.keys, self.values, self.visible = keys, values, visible
        self._positions, self._places = positions, places
        first = torch.arange(positions.size(0), device=positions.device)
        self._written = (first if rows is None else rows)[:, None]  # (B, 1), beside places (B, T)
        self._read = slice(positions.size(0)) if rows is None else rows
        self.mask: torch.Tensor | None = None
        if not fresh:
            places_seen = torch.arange(visible, device=positions.device)  # (S,)
            self.mask = places_seen <= positions[:, None, :, None]  # (B, 1, T, S)

    def positions(self, n_tokens: int) -> torch.Tensor:
        return self._positions

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        seen = []
        for memory, new in ((self.keys[layer], k), (self.values[layer], v)):
            memory[self._written, :, self._places] = new.transpose(1, 2)  # (B, T, K, D)
            seen.append(memory[self._read, :, : self.visible])  # (B, K, S, D)
        return seen[0], seen[1]

    def advance(self, n_tokens: int) -> None:
        """Whoever owns the rows counts."""


class Packing:
    """Rows in which several texts stand one behind the other: a token sees its own text alone.

    positions (B, T): of the tokens in their texts; one begins wherever it is 0. What the texts have
    in common is the row, so that short ones don't waste it.
    """

    def __init__(self, positions: torch.Tensor) -> None:
        self._positions, T = positions, positions.size(1)
        text = (positions == 0).cumsum(dim=1)  # (B, T): which of its row
        same = text[:, :, None] == text[:, None, :]  # (B, T, T)
        before = torch.ones(T, T, dtype=torch.bool, device=positions.device).tril()
        self.mask: torch.Tensor | None = (same & before)[:, None]  # (B, 1, T, T)

    def positions(self, n_tokens: int) -> torch.Tensor:
        return self._positions

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        return k, v

    def advance(self, n_tokens: int) -> None:
        """Nothing follows."""
