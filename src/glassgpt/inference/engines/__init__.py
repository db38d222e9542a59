"""What decoding asks of a model: rows of text that grow, and the logits after each.

`generate.py` talks to this interface only. `reference.py` fulfils it with model.py as it is;
every other engine is tested against that one.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import numpy as np

from glassgpt.config import ModelConfig


class Engine(Protocol):
    """Some rows, each the tokens of one text read so far; they may differ in length."""

    config: ModelConfig
    name: str  # "numba int8", say
    bytes_per_token: int  # of weights that one decoding step reads, however many rows it serves

    def another(self) -> Engine:
        """An engine with the same weights and rows of its own, so that two texts can grow at a
        time. In several threads, each needs one."""
        ...

    def open(self, n_rows: int) -> None:
        """Forget everything; from now on there are `n_rows` rows without tokens."""
        ...

    def read(
        self, rows: Sequence[int], tokens: Sequence[np.ndarray], *, every: bool = False
    ) -> np.ndarray:
        """Row rows[i] reads tokens[i] (T_i,), one at least, behind what it has read already.

        Returns float32 logits (len(rows), V) of what follows the last token of each, or with
        `every` those after each token, (T_0 + T_1 + ..., V); they may be overwritten by the next
        call. A row is listed once at most, and never grows beyond the context.
        """
        ...

    def rewind(self, row: int, length: int = 0) -> None:
        """Forget what this row has read, but for its first `length` tokens (no more than that)."""
        ...

    def copy(self, source: int, targets: Sequence[int]) -> None:
        """The rows `targets` have read what `source` has, without reading it again."""
        ...
