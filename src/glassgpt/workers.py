"""Rows of a batch, spread over the cores: one thread each, one copy of the gradients each.

    workers = Workers(model, 2); losses = workers.map(work, tokens, targets)

torch's own way to use several cores is to split every single operation, with a barrier behind
each; in a small model that is thousands of barriers a second, and when another program takes a
core for a moment everyone waits for it. Rows are independent until their gradients are added:
one meeting a step instead of thousands. Measured in docs/LOG.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor, wait
from typing import Any

import numpy as np
import torch

# Every thread holds a gradient of the whole model: beyond this many numbers in all (1 GB), the
# model is large enough for torch's way to be the better one.
_MOST_GRADIENTS = 250_000_000


class Workers:
    """Applies a function to (model, rows) on this thread or, split by rows, on several."""

    def __init__(self, model: Any, n: int = 1) -> None:
        self.models = [model]  # a module, or what wraps one (compiled, DDP)
        self._pool: ThreadPoolExecutor | None = None
        if n > 1:
            self.models += [share_weights(model) for _ in range(n - 1)]
            # One thread per operation, in the workers and here.
            self._pool = ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,))
            torch.set_num_threads(1)

    def map(self, work: Callable[..., Any], *arrays: np.ndarray) -> list[Any]:
        """[work(model, *rows) for each share of the rows of `arrays`], in order."""
        if self._pool is None:
            return [work(self.models[0], *arrays)]
        shares = zip(*(np.array_split(array, len(self.models)) for array in arrays), strict=True)
        futures = [
            self._pool.submit(work, model, *share)
            for model, share in zip(self.models, shares, strict=True)
            if len(share[0])
        ]
        wait(futures)  # also when one failed: none may still be at work on its gradients
        return [future.result() for future in futures]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()

    def gather_gradients(self) -> None:
        """Add every copy's gradients to the first model's, and forget them there."""
        for index in range(1, len(self.models)):
            for mine, theirs in zip(self._parameters(0), self._parameters(index), strict=True):
                if theirs.grad is None:  # no share of a small batch
                    continue
                assert mine.grad is not None
                mine.grad += theirs.grad
                theirs.grad = None

    def forget_gradients(self) -> None:
        """After a step that failed half-way."""
        for index in range(1, len(self.models)):
            for parameter in self._parameters(index):
                parameter.grad = None

    def _parameters(self, index: int) -> list[torch.nn.Parameter]:
        return list(self.models[index].parameters())


def useful_workers(threads: int, rows: int, n_parameters: int) -> int:
    """How many workers pay: no more than rows or cores, and none for a large model."""
    n = min(threads, rows)
    return n if n * n_parameters <= _MOST_GRADIENTS else 1


def share_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A second model on the same weights in memory, with gradients of its own."""
    other = copy.deepcopy(model)
    for mine, theirs in zip(model.parameters(), other.parameters(), strict=True):
        theirs.data = mine.data
    return other
