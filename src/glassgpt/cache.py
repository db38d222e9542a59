"""The key/value cache: what attention remembers, so that each new token costs one position.

    cache = KVCache(model.config, batch=1); logits = model(tokens, cache=cache)

The caller owns the cache and passes it to `forward`; the model itself keeps no state. `KVCache`
holds sequences of equal length and grows with them. `RowCache` gives one forward pass access to
rows of different lengths, in memory that never moves. `Packing` stores nothing; it keeps apart
texts that share a row in training. None of them knows about sampling, or about what happens when
the context is full (`inference/generate.py` decides that).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch

from glassgpt.config import ModelConfig

_FIRST_CAPACITY = 256  # positions; a long context is allocated only as far as it is used


class Cache(Protocol):
    """What model.py asks for in one forward pass over T new tokens a sequence."""

    mask: torch.Tensor | None
    """Which of the S positions a new token sees, True in (B, 1, T, S); None: all before it."""

    def positions(self, n_tokens: int) -> slice | torch.Tensor:
        """Positions of the new tokens: a slice of length T for all rows, or a tensor (B, T)."""
        ...

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store this layer's new k and v, (B, K, T, D) each.

        Returns the keys and values to attend to, (B, K, S, D) each.
        """
        ...

    def advance(self, n_tokens: int) -> None:
        """Count `n_tokens` as cached; called after every layer has stored its part."""
        ...


class KVCache:
    """Keys and values of every layer for the positions seen so far, in one allocation.

    keys, values: (L, B, K, capacity, D); the first `length` positions are in use. When no
    `capacity` is given, it doubles whenever it is full, up to the context length.
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
        """An independent cache with the same content."""
        copy = object.__new__(type(self))
        copy.__dict__.update(self.__dict__, keys=self.keys.clone(), values=self.values.clone())
        return copy

    def advance(self, n_tokens: int) -> None:
        self.length += n_tokens


class RowCache:
    """Rows of a larger memory, each with its own length, for one forward pass.

    keys, values: for each layer (R, K, capacity, D), R >= B. Nothing here depends on a number that
    only the host knows, so the pass can be compiled once and replayed as a CUDA graph.

    rows (B,): the row of each of the B sequences; None means the first B rows, which are then read
    in place, without a copy. positions (B, T): of the new tokens in their texts. places (B, T):
    where their keys and values are stored. That equals `positions`, except for tokens that only
    pad the batch: they go to a place that no text uses. A token sees the first `visible` places up
    to its own position. `fresh`: all texts begin in this pass, so the plain causal mask is enough.
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
        """Nothing to do: the owner of the rows counts their lengths."""


class Packing:
    """Rows that hold several short texts one after the other; a token sees only its own text.

    positions (B, T): of the tokens in their texts; a text begins wherever the position is 0.
    """

    def __init__(self, positions: torch.Tensor) -> None:
        self._positions, T = positions, positions.size(1)
        text = (positions == 0).cumsum(dim=1)  # (B, T): number of the text in its row
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
        """Nothing to do: nothing is cached."""
