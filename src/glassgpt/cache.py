"""The key/value cache: what attention remembers, so that each new token costs one position.

    cache = KVCache(model.config, batch=1); logits = model(tokens, cache=cache)

The caller owns it and passes it to `forward`; the model keeps no state of its own. It knows
nothing of sampling or of what happens when it is full (`generate.py` decides that).
"""

from __future__ import annotations

import torch

from glassgpt.config import ModelConfig

_FIRST_CAPACITY = 256  # a whole context of 131,072 positions would be gigabytes


class KVCache:
    """Keys and values of every layer for the positions seen so far, in one allocation.

    keys, values: (L, B, K, capacity, D); the first `length` positions are in use. Without a
    given `capacity` it doubles when it is full, up to the context.
    """

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

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Store this layer's new k, v (B, K, T, D); return all so far, (B, K, S, D) each.

        `length` moves once per forward pass, when every layer has stored its part (`advance`).
        """
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

    def clear(self) -> None:
        self.length = 0
