"""Independent pieces of work, spread over the cores: one thread each.

    workers = Workers(2); losses = workers.run([first_half, second_half])

torch's own way to use several cores is to split every single operation, with a barrier behind
each; in a small model that is thousands of barriers a second, and when another program takes a
core for a moment everyone waits for it. Rows are independent until their gradients are added:
one meeting a step instead of thousands. Measured in docs/LOG.md.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from typing import TypeVar

import torch

T_ = TypeVar("T_")


class Workers:
    """Calls functions in this thread, or in `n` others at a time."""

    def __init__(self, n: int = 1) -> None:
        self.n = n
        self._pool: ThreadPoolExecutor | None = None
        if n > 1:
            # One thread per operation, in the workers and here.
            self._pool = ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,))
            torch.set_num_threads(1)

    def run(self, calls: Sequence[Callable[[], T_]]) -> list[T_]:
        """What each of the `calls` gives, in order."""
        if self._pool is None:
            return [call() for call in calls]
        futures = [self._pool.submit(call) for call in calls]
        wait(futures)  # also when one failed: none may still be at work on its gradients
        return [future.result() for future in futures]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


def share_weights(model: torch.nn.Module) -> torch.nn.Module:
    """A second model on the same weights in memory, with gradients of its own."""
    shared = {
        id(p): torch.nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, shared)  # which takes these for the copies it has made already
