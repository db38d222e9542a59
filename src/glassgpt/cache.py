"""The key/value cache: what attention remembers, so that each new token costs one position.

    cache = KVCache(model.config, batch=1); logits = model(tokens, cache=cache)

The caller owns it and passes it to `forward`; the model keeps no state of its own. It knows
nothing of sampling or of what happens when it is full (`generate.py` decides that).
"""

from __future__ import annotations

import torch

from glassgpt.config import ModelConfig


class KVCache:
    """Keys and values of every layer for the positions seen so far, in one allocation.

    keys, values: (L, B, K, capacity, D); the first `length` positions are in use.
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
        capacity = capacity or config.context_length
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
        assert end <= self.capacity, f"{end} positions do not fit in a cache of {self.capacity}"
        self.keys[layer, :, :, self.length : end] = k
        self.values[layer, :, :, self.length : end] = v
        return self.keys[layer, :, :, :end], self.values[layer, :, :, :end]

    def advance(self, n_tokens: int) -> None:
        self.length += n_tokens

    def clear(self) -> None:
        self.length = 0
