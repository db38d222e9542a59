"""Decoding on a CPU without torch: `NumbaEngine` (compiled, all cores), `NumpyEngine` (anywhere).

    engine = NumbaEngine(config, weights, "int8"); engine.open(1); logits = engine.read([0], [ids])

`NumpyEngine` is numpy_gpt.py with a cache that is not copied; `NumbaEngine` arranges the same
weights for kernels.py and runs it in as many threads as there are cores.
"""

from __future__ import annotations

import math
import os
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from copy import copy as shallow_copy
from types import ModuleType

import numpy as np

from glassgpt import numpy_gpt
from glassgpt.config import ModelConfig, WeightPrecision
from glassgpt.inference.kernels.compiled import first_call, load_kernels
from glassgpt.inference.kernels.quantize import (
    PANEL,
    ROWS,
    SPAN,
    packed_sizes,
    padded,
    quantize,
    quantize_into,
)
from glassgpt.system import SILENT, Reporter, usable_cores

Weights = Mapping[str, np.ndarray]
_BLOCK = 64  # tokens of one pass: many enough to use each weight well, few enough for the caches
_FIRST_CAPACITY = 256  # positions; doubled when they are used up
_WORTH_A_THREAD = 4_000_000  # multiplications; below, waking a thread costs more than it saves


def precision_of(name: str, config: ModelConfig, weights: WeightPrecision) -> WeightPrecision:
    """How the weight `name` is stored.

    With int4 the head has 8 bits (llama.cpp's Q4_0 files give it 6): each of its rows makes a
    logit. A table of embeddings that is not the head as well is never read as a whole.
    """
    head = "token_embedding.weight" if config.tie_embeddings else "head.weight"
    if weights != "float32" and name == head:
        return "int8"
    matrix = name.endswith(".weight") and (".mlp." in name or name.split(".")[-2] in ("qkv", "out"))
    return weights if matrix else "float32"


# -- NumPy alone ---------------------------------------------------------------------------------


class _RowCache(numpy_gpt.Cache):
    """Keys and values of one row, written in place; doubled when full."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        first = min(_FIRST_CAPACITY, config.context_length)
        shape = (config.n_layer, 2, config.n_kv_head, first, config.head_dim)
        self.limit, self.memory = config.context_length, np.empty(shape, np.float32)

    def extend(self, layer: int, k: np.ndarray, v: np.ndarray) -> np.ndarray:
        end = self.length + k.shape[1]
        if end > self.memory.shape[3]:
            self.memory = _longer(self.memory, end, self.limit)
        self.memory[layer, 0, :, self.length : end] = k
        self.memory[layer, 1, :, self.length : end] = v
        return self.memory[layer, :, :, :end]

    def copy_of(self, other: _RowCache) -> None:
        self.length, self.memory = other.length, other.memory.copy()


def _longer(memory: np.ndarray, needed: int, limit: int) -> np.ndarray:
    """The same with room for more positions, which are the last but one axis."""
    *before, capacity, width = memory.shape
    longer = np.zeros((*before, min(limit, max(needed, 2 * capacity)), width), memory.dtype)
    longer[..., :capacity, :] = memory
    return longer


class NumpyEngine:
    """An `Engine` that needs NumPy only. Rows are computed one after the other.

    Quantised weights give what they give elsewhere, but are unpacked on loading: no byte less is
    read.
    """

    def __init__(
        self, config: ModelConfig, weights: Weights, precision: WeightPrecision = "float32"
    ) -> None:
        self.config = config
        self.weights = _side_by_side(config, weights, precision)
        self.name = f"numpy {precision}"
        self.bytes_per_token = 4 * config.n_decoding_weights
        self.rows: list[_RowCache] = []

    def another(self) -> NumpyEngine:
        other = shallow_copy(self)
        other.rows = []
        return other

    def open(self, n_rows: int) -> None:
        self.rows = [_RowCache(self.config) for _ in range(n_rows)]

    def read(
        self, rows: Sequence[int], tokens: Sequence[np.ndarray], *, every: bool = False
    ) -> np.ndarray:
        positions, logits = slice(None) if every else slice(-1, None), []
        for row, new in zip(rows, tokens, strict=True):
            last = len(new) - 1
            for start in range(0, len(new), _BLOCK):
                block = np.asarray(new[start : start + _BLOCK])
                out = numpy_gpt.forward(block, self.weights, self.config, self.rows[row], positions)
                if every or start + _BLOCK > last:
                    logits.append(out)
        return np.concatenate(logits)

    def rewind(self, row: int, length: int = 0) -> None:
        assert length <= self.rows[row].length
        self.rows[row].length = length

    def copy(self, source: int, targets: Sequence[int]) -> None:
        for target in targets:
            self.rows[target].copy_of(self.rows[source])


def _side_by_side(
    config: ModelConfig, weights: Weights, precision: WeightPrecision
) -> dict[str, np.ndarray]:
    """float32 copies of all weights in one allocation, which gets large pages: 16 % faster with
    GPT-2's sizes than a file's mapping or an allocation for each."""
    line = 16  # numbers: 64 bytes
    shapes = config.weight_shapes
    memory = np.empty(sum(padded(math.prod(shape), line) for shape in shapes.values()), np.float32)
    arrays, start = {}, 0
    for name, shape in shapes.items():
        array = memory[start : start + math.prod(shape)].reshape(shape)
        start += padded(array.size, line)
        stored, given = precision_of(name, config, precision), weights[name]
        if stored != "float32":
            given = quantize(np.asarray(given, np.float32), stored).dequantize()[:, : shape[1]]
        array[...] = given
        arrays[name] = array
    return arrays


# -- the compiled engine -------------------------------------------------------------------------


class _Team:
    """The threads and buffers of a pass; engines that share weights share them, in turn."""

    def __init__(self, kernels: ModuleType, config: ModelConfig, threads: int) -> None:
        self.forward, self.threads = kernels.forward, threads
        self.work = _make_room(kernels, config, threads)
        self.sync = np.zeros(8 * (4 * config.n_layer + 2), np.int64)
        self._multiplications = config.n_decoding_weights
        self._hire()

    def _hire(self) -> None:
        self.lock, self._process = threading.Lock(), os.getpid()
        self._helpers = ThreadPoolExecutor(max(1, self.threads - 1), "glassgpt-decode")

    def run(self, model, work, cache, tokens, *batch, alone: bool = False) -> None:
        """One pass; the caller, who holds the lock, is thread 0."""
        worth = len(tokens) * self._multiplications // _WORTH_A_THREAD
        threads = 1 if alone else max(1, min(self.threads, worth))
        self.sync.fill(0)
        shared = (threads, self.sync, model, work, cache, tokens, *batch)
        others: list[Future] = []
        try:
            for me in range(1, threads):
                others.append(self._helpers.submit(self._take_part, me, shared))
            self._take_part(0, shared)
        finally:
            for other in others:
                other.result()

    def _take_part(self, me: int, shared: tuple) -> None:
        try:
            self.forward(me, *shared)
        except BaseException:  # Ctrl-C, say: nobody must wait for this thread
            self.sync[1] = 1
            raise

    def of_this_process(self) -> _Team:
        """Threads don't survive a fork."""
        if self._process != os.getpid():
            self._hire()
        return self


class NumbaEngine:
    """An `Engine` of compiled kernels: rows of a batch share each reading of the weights.

    Quantised weights go with keys and values in float16. Raises ImportError where Numba can't be
    used. `reporter` takes notes for the user.
    """

    def __init__(
        self,
        config: ModelConfig,
        weights: Weights,
        precision: WeightPrecision = "float32",
        *,
        threads: int | None = None,
        reporter: Reporter = SILENT,
    ) -> None:
        kernels = load_kernels("glassgpt.inference.kernels.forward")
        self.config, self.precision, self.name = config, precision, f"numba {precision}"
        self.model = _arrange(kernels, config, weights, precision)
        parts = (self.model.qkv, self.model.out, self.model.up, self.model.down, self.model.head)
        self.bytes_per_token = sum(part.numbers.nbytes + part.scales.nbytes for part in parts)
        halves = precision != "float32" and kernels.simd.HAS_FLOAT16
        self._cache_type = np.uint16 if halves else np.float32  # the bits of float16
        self._team = _Team(kernels, config, threads or usable_cores())
        self._logits = np.empty((0, padded(config.vocab_size, ROWS)), np.float32)
        self.open(1)
        self._compile(reporter)

    def another(self) -> NumbaEngine:
        other = shallow_copy(self)
        other._logits = self._logits[:0]
        other.open(0)
        return other

    def open(self, n_rows: int) -> None:
        config = self.config
        capacity = min(_FIRST_CAPACITY, config.context_length)
        self.lengths = [0] * n_rows
        width = padded(config.head_dim, PANEL)
        shape = (2, config.n_layer, n_rows, config.n_kv_head, capacity, width)
        self.cache = np.zeros(shape, self._cache_type)
        self._fit(capacity)

    def read(
        self, rows: Sequence[int], tokens: Sequence[np.ndarray], *, every: bool = False
    ) -> np.ndarray:
        counts = [len(new) for new in tokens]
        ends = np.array([self.lengths[row] for row in rows]) + counts
        assert ends.max() <= self.config.context_length, "more than the context holds"
        if ends.max() > self.cache.shape[4]:
            self.cache = _longer(self.cache, ends.max(), self.config.context_length)
            self._fit(self.cache.shape[4])
        flat = np.concatenate([np.asarray(new, np.int64) for new in tokens])
        assert flat.min() >= 0, "no such token"
        assert flat.max() < self.config.vocab_size, "no such token"
        owners = np.repeat(np.asarray(rows, np.int64), counts)
        places = np.arange(len(flat)) + np.repeat(ends - np.cumsum(counts), counts)
        wanted = np.arange(len(flat)) if every else np.cumsum(counts) - 1
        if len(self._logits) < len(wanted):
            self._logits = np.empty((len(wanted), self._logits.shape[1]), np.float32)
        done = 0
        for start in range(0, len(flat), _BLOCK):
            block = slice(start, start + _BLOCK)
            mine = wanted[(wanted >= start) & (wanted < start + _BLOCK)] - start
            self._run(
                flat[block],
                owners[block],
                places[block],
                mine,
                self._logits[done : done + len(mine)],
            )
            done += len(mine)
        for row, end in zip(rows, ends.tolist(), strict=True):
            self.lengths[row] = end
        return self._logits[:done, : self.config.vocab_size]

    def rewind(self, row: int, length: int = 0) -> None:
        assert length <= self.lengths[row]
        self.lengths[row] = length

    def copy(self, source: int, targets: Sequence[int]) -> None:
        length = self.lengths[source]
        for target in targets:
            self.cache[:, :, target, :, :length] = self.cache[:, :, source, :, :length]
            self.lengths[target] = length

    def _run(self, tokens, rows, positions, wanted, logits, alone: bool = False) -> None:
        """One pass of up to _BLOCK tokens -> logits (len(wanted), V padded)"""
        team = self._team.of_this_process()
        with team.lock:
            work = team.work._replace(scores=self._scores, logits=logits)
            team.run(
                self.model,
                work,
                self.cache,
                tokens,
                rows,
                positions,
                wanted,
                self.precision != "float32",
                alone=alone,
            )

    def _compile(self, reporter: Reporter) -> None:
        """A first token, in this thread alone: compiles, or reads what was compiled before."""
        zero, logits = np.zeros(1, np.int64), np.empty((1, self._logits.shape[1]), np.float32)
        with first_call(self.precision, reporter):
            self._run(zero, zero, zero, zero, logits, alone=True)

    def _fit(self, capacity: int) -> None:
        """Tables and buffers whose size follows the cache's."""
        self._scores = np.empty((self._team.threads, capacity), np.float32)
        if self.config.position == "rope":
            angles = np.outer(np.arange(capacity), self.config.rope_frequencies)
            cos, sin = np.cos(angles).astype(np.float32), np.sin(angles).astype(np.float32)
            self.model = self.model._replace(cos=cos, sin=sin)


# -- how the kernels want the weights ------------------------------------------------------------


def _arrange(
    kernels: ModuleType, config: ModelConfig, weights: Weights, precision: WeightPrecision
):
    """All weights, those of one kind stacked over the layers: kernels.Model."""
    layers, learned = range(config.n_layer), config.position == "learned"

    def matrix(*names: str):
        stacks = [[f"blocks.{i}.{name}" for name in names] for i in layers]
        return _matrix(kernels, config, weights, stacks, precision)

    no_rows, no_angles = np.empty((0, config.n_embd), np.float32), np.empty((0, 0), np.float32)
    head = "token_embedding" if config.tie_embeddings else "head"
    head_precision = precision_of(f"{head}.weight", config, precision)
    return kernels.Model(
        shape=_shape(kernels, config),
        tokens=no_rows if config.tie_embeddings else _float32(weights["token_embedding.weight"]),
        positions=_float32(weights["position_embedding.weight"]) if learned else no_rows,
        cos=no_angles,
        sin=no_angles,
        attn_norm=_norms(config, weights, [f"blocks.{i}.attn_norm" for i in layers]),
        qkv=matrix("attn.qkv"),
        qk_norms=_qk_norms(config, weights),
        out=matrix("attn.out"),
        mlp_norm=_norms(config, weights, [f"blocks.{i}.mlp_norm" for i in layers]),
        up=matrix(*(["mlp.gate"] if config.activation == "swiglu" else []), "mlp.up"),
        down=matrix("mlp.down"),
        final_norm=_norms(config, weights, ["final_norm"]),
        head=_matrix(kernels, config, weights, [[head]], head_precision),
    )


def _shape(kernels: ModuleType, config: ModelConfig):
    return kernels.Shape(
        config.n_layer,
        config.n_head,
        config.n_kv_head,
        config.head_dim,
        config.n_embd,
        config.n_hidden,
        kernels.ACTIVATIONS[config.activation],
        config.norm == "layernorm",
        config.position == "rope",
        config.qk_norm,
        config.norm_eps,
    )


def _float32(array: np.ndarray) -> np.ndarray:
    """A copy: of an array that can't be written to, Numba would compile everything once more."""
    return np.array(array, dtype=np.float32, order="C")


def _norms(config: ModelConfig, weights: Weights, names: list[str]) -> np.ndarray:
    """(len(names), 2, C): weight, bias."""
    norms = np.zeros((len(names), 2, config.n_embd), np.float32)
    for norm, name in zip(norms, names, strict=True):
        norm[0] = weights[f"{name}.weight"]
        if config.bias:
            norm[1] = weights[f"{name}.bias"]
    return norms


def _qk_norms(config: ModelConfig, weights: Weights) -> np.ndarray:
    """(L, 2, 2, D): of queries and keys; weight and a bias of zeros."""
    norms = np.zeros((config.n_layer, 2, 2, config.head_dim), np.float32)
    if config.qk_norm:
        for layer in range(config.n_layer):
            for i, name in enumerate(("q_norm", "k_norm")):
                norms[layer, i, 0] = weights[f"blocks.{layer}.attn.{name}.weight"]
    return norms


def _matrix(
    kernels: ModuleType,
    config: ModelConfig,
    weights: Weights,
    layers: list[list[str]],
    precision: WeightPrecision,
):
    """One matrix of each layer, made of those that `layers` names, one below the other."""
    shapes = [config.weight_shapes[f"{name}.weight"] for name in (layers or [[]])[0]]
    m, n = sum(shape[0] for shape in shapes), shapes[0][1] if shapes else 1
    rows, L = padded(m, ROWS), len(layers)
    bias = np.zeros((L, rows), np.float32)
    if precision == "float32":
        numbers, scales = np.zeros((L, rows, n), np.float32), np.empty((L, 0), np.float32)
    else:
        sizes = packed_sizes(rows, n, precision)
        numbers = np.empty((L, sizes[0]), np.int8 if precision == "int8" else np.int16)
        halves = precision == "int4" and kernels.simd.HAS_FLOAT16
        scales = np.empty((L, sizes[1]), np.uint16 if halves else np.float32)
    for layer, names in enumerate(layers):
        parts = [weights[f"{name}.weight"] for name in names]
        full = np.asarray(parts[0] if len(parts) == 1 else np.concatenate(parts), np.float32)
        if precision == "float32":
            numbers[layer, :m] = full
        else:
            quantize_into(numbers[layer], scales[layer], full, precision)
        if config.bias and f"{names[0]}.bias" in weights:
            bias[layer, :m] = np.concatenate([weights[f"{name}.bias"] for name in names])
    return kernels.Matrix(numbers, scales, bias)


def _make_room(kernels: ModuleType, config: ModelConfig, threads: int):
    """Buffers for a pass of up to _BLOCK tokens; scores and logits are the engine's own."""
    hidden = config.n_hidden * (2 if config.activation == "swiglu" else 1)
    widest = padded(max(config.n_embd, sum(config.qkv_rows), hidden) + PANEL, ROWS)
    return kernels.Work(
        x=np.zeros((_BLOCK, padded(config.n_embd, ROWS)), np.float32),
        a=np.zeros((_BLOCK, widest), np.float32),
        b=np.zeros((_BLOCK, widest), np.float32),
        whole=np.zeros((_BLOCK, widest), np.int16),
        unit=np.zeros((_BLOCK, -(-widest // SPAN)), np.float32),
        scores=np.empty((threads, 0), np.float32),
        head=np.zeros((threads, 3, padded(config.head_dim, PANEL)), np.float32),
        logits=np.empty((0, 0), np.float32),
    )
