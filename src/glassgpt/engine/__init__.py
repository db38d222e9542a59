"""What decoding asks of a model: logits for the next token, one position at a time.

`generate.py` talks to this interface only. `reference.py` fulfils it with model.py as it is.
"""

from __future__ import annotations

from typing import Protocol

import numpy as np

from glassgpt.config import ModelConfig


class Engine(Protocol):
    """Remembers the tokens it was fed; rows of the batch advance together."""

    config: ModelConfig

    def start(self, tokens: np.ndarray) -> np.ndarray:
        """Forget everything, read tokens (B, T), return the last position's logits (B, V)."""
        ...

    def step(self, tokens: np.ndarray) -> np.ndarray:
        """Read one more token per row (B,), return the logits after it (B, V) float32."""
        ...
