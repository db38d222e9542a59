"""Decoding by model.py and its key/value cache: the reference for every faster engine."""

from __future__ import annotations

import numpy as np
import torch

from glassgpt.cache import KVCache
from glassgpt.model import GPT


class ReferenceEngine:
    """An `Engine` around a torch model, on whatever device it is."""

    def __init__(self, model: GPT) -> None:
        self.model = model
        self.config = model.config
        self.cache: KVCache | None = None

    def start(self, tokens: np.ndarray) -> np.ndarray:
        batch, weight = tokens.shape[0], self.model.head.weight
        if self.cache is None or self.cache.keys.size(1) != batch:
            self.cache = KVCache(self.config, batch, dtype=weight.dtype, device=weight.device)
        self.cache.clear()
        return self._forward(tokens)

    def step(self, tokens: np.ndarray) -> np.ndarray:
        return self._forward(tokens[:, None])

    @torch.inference_mode()
    def _forward(self, tokens: np.ndarray) -> np.ndarray:
        was_training = self.model.training
        self.model.eval()
        ids = torch.from_numpy(tokens.astype(np.int64)).to(self.model.head.weight.device)
        logits = self.model(ids, cache=self.cache, positions=slice(-1, None))[:, 0]
        self.model.train(was_training)
        return logits.float().cpu().numpy()
