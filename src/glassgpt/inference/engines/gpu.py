"""Decoding on a GPU (CUDA, MPS): many rows step together, in memory that stays where it is.

    engine = GpuEngine(model.to("cuda", torch.bfloat16)); engine.open(64)

A step of a small model is so short that starting its hundreds of kernels one by one takes longer
than running them. So the shapes never change from one step to the next, and on CUDA the whole
step is compiled and recorded once as a CUDA graph, then replayed. model.py computes everything;
this room only keeps the keys and values and says which row stands where. It knows no sampling.
"""

from __future__ import annotations

import importlib.util
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import copy as shallow_copy
from typing import Any

import numpy as np
import torch

from glassgpt.cache import RowCache
from glassgpt.errors import UserError
from glassgpt.model import GPT
from glassgpt.runtime import is_out_of_memory, to_device

_FIRST_CAPACITY = 256  # places a row; every growth is compiled anew, so that they should be few
_BLOCK = 1024  # tokens of one row in one pass: attention's mask is (rows, _BLOCK, all before)
_PASS_TOKENS = 4096  # of all rows in one pass; with `every`, each has V logits
_COMPILED_SIZES = 1000  # torch would give up after 8 pairs of batch size and capacity


class GpuEngine:
    """An `Engine` on the model's own device, in its own number format.

    `compile=None` compiles the step on CUDA where Triton is there, and does without where that
    fails. A new number of rows or a longer text then costs a compilation, once; so rows are padded
    to a power of two, and so is the length of the longest text, up to the context. Use a compiled
    engine from one thread only: before torch 2.13, a CUDA graph belongs to the thread it is from.
    """

    def __init__(self, model: GPT, *, compile: bool | None = None) -> None:
        weight = model.head.weight
        self.model, self.config, self.device = model, model.config, weight.device
        self.name = f"{self.device.type} {str(weight.dtype).removeprefix('torch.')}"
        self.bytes_per_token = model.config.n_decoding_weights * weight.dtype.itemsize
        self.compiled = _can_compile(self.device) if compile is None else compile
        self._must_compile = bool(compile)
        self._compiled_logits = _compiled() if self.compiled else _next_logits
        self.lengths: list[int] = []  # what each row has read
        # A tensor (n_slots, K, capacity, D) for each layer. The last place of a row belongs to no
        # text: what only fills a batch is written there.
        self.keys: list[torch.Tensor] = []
        self.values: list[torch.Tensor] = []
        self.n_slots = self.capacity = 0

    def another(self) -> GpuEngine:
        other = shallow_copy(self)  # the compiled step too
        other.lengths, other.keys, other.values = [], [], []
        other.n_slots = other.capacity = 0
        return other

    def open(self, n_rows: int) -> None:
        self.lengths = [0] * n_rows
        n_slots = _power_of_two(n_rows)
        if n_slots != self.n_slots:  # the same memory as before needs no new compilation
            self.n_slots, self.capacity = n_slots, 0
            self.keys, self.values = [], []

    @torch.no_grad()
    def read(
        self, rows: Sequence[int], tokens: Sequence[np.ndarray], *, every: bool = False
    ) -> np.ndarray:
        """As `Engine.read`; raises `UserError` when the texts do not fit in the GPU's memory."""
        ends = [self.lengths[row] + len(new) for row, new in zip(rows, tokens, strict=True)]
        longest, limit = max(ends), self.config.context_length
        assert longest <= limit, f"{longest} positions, but the context is {limit}"
        with self._working(longest):
            self._reserve(longest)
            if all(len(new) == 1 for new in tokens):
                logits = self._step(rows, tokens)
            else:
                logits = self._prefill(rows, tokens, every)
        for row, end in zip(rows, ends, strict=True):
            self.lengths[row] = end
        return logits

    def rewind(self, row: int, length: int = 0) -> None:
        assert length <= self.lengths[row]
        self.lengths[row] = length

    @torch.no_grad()
    def copy(self, source: int, targets: Sequence[int]) -> None:
        length, there = self.lengths[source], to_device(np.array(targets, np.int64), self.device)
        for memory in (*self.keys, *self.values):
            memory[there, :, :length] = memory[source, :, :length]  # (K, length, D), for each
        for target in targets:
            self.lengths[target] = length

    # -- one token a row -------------------------------------------------------------------------

    def _step(self, rows: Sequence[int], tokens: Sequence[np.ndarray]) -> np.ndarray:
        """The first B rows go along, listed or not, so that nothing need be gathered."""
        index = np.asarray(rows)
        batch = np.zeros((3, _power_of_two(max(rows) + 1), 1), np.int64)
        batch[2] = self.capacity - 1
        batch[0, index, 0] = [new[0] for new in tokens]
        batch[1:, index, 0] = [self.lengths[row] for row in rows]
        logits = self._logits(self._send(batch))  # (B, V), perhaps a graph's own memory,
        return _to_host(logits[self._send(index)])  # hence a copy: the next step overwrites it

    def _logits(self, batch: torch.Tensor) -> torch.Tensor:
        arguments = (self.model, self.keys, self.values, self.capacity, batch)
        if self.compiled:
            try:
                return self._compiled_logits(*arguments)
            except Exception as error:  # the compiler fails in many ways, none of them ours
                if self._must_compile or is_out_of_memory(error):
                    raise
                reason = (str(error).strip() or repr(error)).splitlines()[0][:100]
                warnings.warn(
                    f"torch.compile does not work here ({reason}); decoding goes on "
                    "without it, more slowly",
                    stacklevel=2,
                )
                self.compiled = False
        return _next_logits(*arguments)

    # -- many tokens a row -----------------------------------------------------------------------

    def _prefill(
        self, rows: Sequence[int], tokens: Sequence[np.ndarray], every: bool
    ) -> np.ndarray:
        found: list[list[np.ndarray]] = [[] for _ in rows]
        for members, block in _passes([len(new) for new in tokens]):
            pieces = [tokens[i][block] for i in members]
            first = [0 if every else len(tokens[i]) - block.start - 1 for i in members]
            wanted = [range(a, len(piece)) for a, piece in zip(first, pieces, strict=True)]
            starts = [self.lengths[rows[i]] + block.start for i in members]
            logits = self._read_pieces([rows[i] for i in members], starts, pieces, wanted)
            parts = np.split(logits, np.cumsum([len(some) for some in wanted])[:-1])
            for i, part in zip(members, parts, strict=True):
                found[i].append(part)
        return np.concatenate([part for parts in found for part in parts])

    def _read_pieces(
        self, rows: list[int], starts: list[int], pieces: list[np.ndarray], wanted: list[range]
    ) -> np.ndarray:
        """Logits of the wanted places in each piece; shorter pieces are padded at their end."""
        T = max(len(piece) for piece in pieces)
        batch = np.zeros((3, len(rows), T), np.int64)
        batch[2] = self.capacity - 1
        for i, (start, piece) in enumerate(zip(starts, pieces, strict=True)):
            batch[0, i, : len(piece)] = piece
            batch[1:, i, : len(piece)] = np.arange(start, start + len(piece))
        tokens, positions, places = self._send(batch)  # (B, T) each
        visible, where = int(batch[1].max()) + 1, self._send(rows)
        cache = RowCache(
            self.keys,
            self.values,
            positions,
            places,
            visible=visible,
            rows=where,
            fresh=not any(starts),
        )
        hidden = self.model.hidden(tokens, cache).flatten(0, 1)  # (B * T, C)
        index = [i * T + t for i, some in enumerate(wanted) for t in some]
        return _to_host(self.model.head(hidden[self._send(index)]))

    # -- memory ----------------------------------------------------------------------------------

    def _reserve(self, length: int) -> None:
        """Room for texts of `length` tokens and the place that belongs to none."""
        if length < self.capacity:
            return
        capacity = max(_FIRST_CAPACITY, _power_of_two(length + 1))
        if capacity >= self.config.context_length:
            capacity = (self.config.context_length + 1 + 7) // 8 * 8  # aligned, for the kernels
        self.keys, self.values = (
            self._grown(self.keys, capacity),
            self._grown(self.values, capacity),
        )
        self.capacity = capacity

    def _grown(self, old: list[torch.Tensor], capacity: int) -> list[torch.Tensor]:
        shape = (self.n_slots, self.config.n_kv_head, capacity, self.config.head_dim)
        # Zeros: what nobody sees is multiplied by 0, and 0 times whatever was there may be NaN.
        new = [self.model.head.weight.new_zeros(shape) for _ in range(self.config.n_layer)]
        for memory, before in zip(new, old, strict=bool(old)):  # there are none at first
            memory[:, :, : before.size(2)] = before
        if self.compiled:
            for memory in new:  # a CUDA graph may then write to it where it is
                torch._dynamo.mark_static_address(memory, guard=False)
        return new

    def _send(self, numbers: np.ndarray | Sequence[int]) -> torch.Tensor:
        return to_device(np.asarray(numbers, np.int64), self.device)

    @contextmanager
    def _working(self, longest: int) -> Iterator[None]:
        """In evaluation mode; out of memory, the rows are as they were."""
        was_training = self.model.training
        if was_training:
            self.model.eval()
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not is_out_of_memory(error):
                raise
            raise UserError(
                f"{len(self.lengths)} texts of up to {longest:,} tokens do not fit in the memory "
                f"of {self.device}; ask for fewer at once or for shorter ones"
            ) from error
        finally:
            if was_training:
                self.model.train()


def _compiled() -> Callable[..., torch.Tensor]:
    """`_next_logits`, compiled for each size; on CUDA one replay of a recorded graph."""
    step = torch.compile(_next_logits, mode="reduce-overhead", dynamic=False, fullgraph=True)

    @torch._dynamo.config.patch(recompile_limit=_COMPILED_SIZES)
    def run(*arguments: Any) -> torch.Tensor:
        torch.compiler.cudagraph_mark_step_begin()  # what the last step gave is no longer needed
        return step(*arguments)

    return run


def _next_logits(
    model: GPT,
    keys: list[torch.Tensor],
    values: list[torch.Tensor],
    capacity: int,
    batch: torch.Tensor,
) -> torch.Tensor:
    """batch (3, B, 1): tokens, positions and places of the first B rows -> logits (B, V)"""
    tokens, positions, places = batch.unbind()
    cache = RowCache(keys, values, positions, places, visible=capacity)
    return model.head(model.hidden(tokens, cache)[:, -1])


def _passes(lengths: list[int]) -> Iterator[tuple[list[int], slice]]:
    """Which rows to read together, and which of their tokens; those of like length together."""
    for start in range(0, max(lengths), _BLOCK):
        left = sorted((i for i, n in enumerate(lengths) if n > start), key=lambda i: -lengths[i])
        while left:
            block = slice(start, min(start + _BLOCK, lengths[left[0]]))
            together = max(1, _PASS_TOKENS // (block.stop - block.start))
            yield left[:together], block
            left = left[together:]


def _to_host(logits: torch.Tensor) -> np.ndarray:
    """float32 logits; the one moment of a step in which the host waits for the GPU."""
    logits = logits.float()
    if logits.device.type != "cuda":
        return logits.cpu().numpy()
    # Into pinned memory the copy is several times as fast, and 64 rows of GPT-2 are 13 MB.
    host = torch.empty_like(logits, device="cpu", pin_memory=True)
    host.copy_(logits, non_blocking=True)
    torch.cuda.current_stream(logits.device).synchronize()
    return host.numpy()


def _can_compile(device: torch.device) -> bool:
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    return torch.cuda.get_device_capability(device) >= (7, 0)  # Triton knows no older ones


def _power_of_two(n: int) -> int:
    """The smallest that is at least n."""
    return 1 << max(0, n - 1).bit_length()
