"""Decoding by model.py and its key/value cache: the reference for every faster engine."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import contextmanager

import numpy as np
import torch

from glassgpt.cache import KVCache
from glassgpt.model import GPT


class ReferenceEngine:
    """An `Engine` around a torch model, on whatever device it is; one row after the other."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.config = model.config
        self.caches: list[KVCache] = []
        dtype = model.head.weight.dtype
        self.name = f"torch {str(dtype).removeprefix('torch.')}"
        self.bytes_per_token = model.config.n_decoding_weights * dtype.itemsize

    def another(self) -> ReferenceEngine:
        return ReferenceEngine(self.model)

    def open(self, n_rows: int) -> None:
        self.caches = [self._new_cache() for _ in range(n_rows)]

    @torch.inference_mode()
    def read(
        self, rows: Sequence[int], tokens: Sequence[np.ndarray], *, every: bool = False
    ) -> np.ndarray:
        positions = slice(None) if every else slice(-1, None)
        device, logits = self.model.head.weight.device, []
        with _evaluating(self.model):
            for row, new in zip(rows, tokens, strict=True):
                ids = torch.from_numpy(np.array(new, dtype=np.int64))[None].to(device)
                out = self.model(ids, cache=self.caches[row], positions=positions)[0]  # (T', V)
                logits.append(out.float().cpu().numpy())
        return np.concatenate(logits)

    def rewind(self, row: int, length: int = 0) -> None:
        assert length <= self.caches[row].length
        self.caches[row].length = length

    def copy(self, source: int, targets: Sequence[int]) -> None:
        for target in targets:
            self.caches[target] = self.caches[source].clone()

    def _new_cache(self) -> KVCache:
        weight = self.model.head.weight
        return KVCache(self.config, batch=1, dtype=weight.dtype, device=weight.device)


@contextmanager
def _evaluating(model: GPT):
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
