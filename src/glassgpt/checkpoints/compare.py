"""Whether an export still computes the same: two models, the same tokens, the largest difference.

    largest_difference((config, weights), read_gguf(path))  # 0.0003, say

Uses the plain NumPy model, so it tests the numbers in a file and not somebody's fast code. It
knows no file format.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np

from glassgpt import numpy_gpt
from glassgpt.config import ModelConfig

Model = tuple[ModelConfig, Mapping[str, np.ndarray]]


def largest_difference(ours: Model, theirs: Model, n_tokens: int = 64) -> float:
    """The largest difference of any logit over `n_tokens` random tokens (the same every time)."""
    config = ours[0]
    length = min(n_tokens, config.context_length)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=length)
    ours_logits, theirs_logits = (
        numpy_gpt.forward(tokens, weights, config) for config, weights in (ours, theirs)
    )
    return float(np.abs(ours_logits - theirs_logits).max())
