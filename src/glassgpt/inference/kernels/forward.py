"""The forward pass of numpy_gpt.py as one compiled function that several threads run together.

`forward` is called by every thread with its own number; what the threads divide (rows of a
matrix, heads, tokens) they agree on through `sync`, and they meet at `wait`. A token costs the
reading of all weights, so everything here serves one end: memory never waits for arithmetic.

Shapes:  N tokens, of any rows and positions    C n_embd    F n_hidden    V vocab_size
         H heads     K key/value heads     D head_dim     L layers     S positions so far
Widths of buffers and rows of matrices are padded to a multiple of 32. Compiled code is kept on
disk (cpu.py says where); this room knows NumPy arrays only, no files and no tokenizers.
"""

# Numba gives each intrinsic a first argument that callers do not write.
# pyright: reportCallIssue=false, reportAttributeAccessIssue=false

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numba import njit
from numba.extending import overload

from glassgpt.inference.kernels import simd
from glassgpt.inference.kernels.products import linear, to_whole_numbers
from glassgpt.inference.kernels.quantize import PANEL
from glassgpt.inference.kernels.simd import FLAGS, fast

RELU, GELU, GELU_TANH, SWIGLU = range(4)
ACTIVATIONS = {"relu": RELU, "gelu": GELU, "gelu_tanh": GELU_TANH, "swiglu": SWIGLU}


class Matrix(NamedTuple):
    """The same matrix of every layer, (L, ...) each; `quantize.pack` explains int8 and int4."""

    numbers: np.ndarray  # float32 (L, m, n), int8 (L, m * n), int16 (L, m * n / 4): four each
    scales: np.ndarray  # (L, m) for int8, (L, m * n / GROUP) for int4 (float16), else (L, 0)
    bias: np.ndarray  # (L, m)


class Shape(NamedTuple):
    """The switches of `ModelConfig`, as numbers."""

    n_layer: int
    n_head: int
    n_kv_head: int
    head_dim: int
    n_embd: int
    n_hidden: int
    activation: int
    centred: bool  # LayerNorm subtracts the mean, RMSNorm does not
    rotary: bool
    qk_norm: bool
    norm_eps: float


class Model(NamedTuple):
    """All weights; a norm is (L, 2, C): weight and bias."""

    shape: Shape
    tokens: np.ndarray  # (V, C), or (0, C) where the head serves as table
    positions: np.ndarray  # (context_length, C), or (0, C)
    cos: np.ndarray  # (positions, D/2), empty without rotary positions
    sin: np.ndarray
    attn_norm: np.ndarray
    qkv: Matrix
    qk_norms: np.ndarray  # (L, 2, 2, D): of queries, of keys
    out: Matrix
    mlp_norm: np.ndarray
    up: Matrix  # SwiGLU: the rows of gate, then those of up
    down: Matrix
    final_norm: np.ndarray  # (1, 2, C)
    head: Matrix


class Work(NamedTuple):
    """Room for the intermediate results of up to N tokens."""

    x: np.ndarray  # (N, C) the residual stream
    a: np.ndarray  # (N, widest) what the next matrix reads
    b: np.ndarray  # (N, widest) what the last one wrote
    whole: np.ndarray  # (N, widest) int16: `a` as whole numbers, for quantised matrices
    unit: np.ndarray  # (N, widest / SPAN): what 1 stands for in each span
    scores: np.ndarray  # (threads, S)
    head: np.ndarray  # (threads, 3, D), two of them with zeros behind D
    logits: np.ndarray  # (N, V)


# -- threads -------------------------------------------------------------------------------------


@fast
def wait(sync, meeting, threads):
    """All threads come here before any goes on, unless one is missing (sync[1])
    -> the number of the next meeting."""
    if threads > 1:
        simd.fetch_add(sync, 0, 1)
        turns = 0
        while simd.read_shared(sync, 0) < (meeting + 1) * threads:
            if simd.read_shared(sync, 1):
                break
            turns += 1
            if turns > 4000:  # whoever is late has no core
                simd.give_way()
    return meeting + 1


# -- what happens to one token by itself ---------------------------------------------------------


@njit(nogil=True, fastmath={"contract"}, error_model="numpy")
def exp(x):
    """e^x in float32, to 1e-7: 2^n times a polynomial; loops over it become vectors."""
    x = min(max(x, np.float32(-87)), np.float32(88))
    n = np.floor(x * np.float32(1.4426950408889634) + np.float32(0.5))
    r = x - n * np.float32(0.693359375) + n * np.float32(2.12194440e-4)  # |r| <= ln(2) / 2
    p = np.float32(1 / 720)
    p = p * r + np.float32(1 / 120)
    p = p * r + np.float32(1 / 24)
    p = p * r + np.float32(1 / 6)
    p = p * r + np.float32(0.5)
    p = p * r + np.float32(1)
    p = p * r + np.float32(1)
    return p * simd.float_of_bits(np.int32((np.int32(n) + 127) << 23))


@fast
def normalize(y, x, weight, bias, centred, eps):
    """LayerNorm (centred) or RMSNorm of (n,) -> y (n,)"""
    n = len(weight)
    mean = np.float32(0)
    if centred:
        for j in range(n):
            mean += x[j]
        mean /= np.float32(n)
    square = np.float32(0)
    for j in range(n):
        square += (x[j] - mean) * (x[j] - mean)
    scale = np.float32(1) / np.sqrt(square / np.float32(n) + np.float32(eps))
    for j in range(n):
        y[j] = (x[j] - mean) * scale * weight[j] + bias[j]


@fast
def activate(y, x, n, kind):
    """The non-linearity of the MLP: x (n,) or for SwiGLU (2n,) -> y (n,)"""
    one = np.float32(1)
    if kind == GELU_TANH:  # 0.5 x (1 + tanh u) = x / (1 + e^(-2u))
        c, d = np.float32(-2 * math.sqrt(2 / math.pi)), np.float32(0.044715)
        for j in range(n):
            v = x[j]
            y[j] = v / (one + exp(c * (v + d * v * v * v)))
    elif kind == SWIGLU:
        for j in range(n):
            y[j] = x[j] / (one + exp(-x[j])) * x[n + j]
    elif kind == RELU:
        for j in range(n):
            y[j] = max(x[j], np.float32(0)) if x[j] == x[j] else x[j]
    else:
        for j in range(n):
            y[j] = np.float32(0.5 * x[j] * (1 + math.erf(x[j] * math.sqrt(0.5))))


@fast
def rotate(x, cos, sin):
    """Turn the pairs (i, i + D/2) of x (D,) by the angles of its position, in place."""
    half = len(cos)
    for i in range(half):
        first, second = x[i], x[half + i]
        x[i] = first * cos[i] - second * sin[i]
        x[half + i] = second * cos[i] + first * sin[i]


@fast
def attend(q, keys, values, S, scale, scores, y):
    """softmax(q k^T scale) v of one head: q, y (D,), keys and values (S or more, D).

    D is padded to a multiple of 16, with zeros in q, keys and values.
    """
    D = keys.shape[1]
    largest = np.float32(-np.inf)
    for s in range(S):
        total = simd.no_floats()
        for d in range(0, D, PANEL):
            simd.prefetch(values, s * D + d)
            key = simd.load_floats(keys, s * D + d)
            total = simd.multiply_add(total, simd.load_floats(q, d), key)
        scores[s] = simd.sum_of(total) * scale
        largest = max(largest, scores[s])
    total = np.float32(0)
    for s in range(S):
        scores[s] = exp(scores[s] - largest)
        total += scores[s]
    share = np.float32(1) / total
    for d in range(0, D, PANEL):
        even = odd = simd.no_floats()  # one sum would wait for itself
        for s in range(0, S - 1, 2):
            even = simd.multiply_add(even, simd.load_floats(values, s * D + d), scores[s])
            odd = simd.multiply_add(odd, simd.load_floats(values, s * D + D + d), scores[s + 1])
        if S % 2:
            last = (S - 1) * D + d
            even = simd.multiply_add(even, simd.load_floats(values, last), scores[S - 1])
        even = simd.multiply_add(even, odd, np.float32(1))
        simd.store_floats(y, d, simd.multiply_add(simd.no_floats(), even, share))


# -- the whole pass ------------------------------------------------------------------------------


@fast
def embed_tokens(model, work, tokens, positions, n):
    """The row of the table for token n, and of its position, into the residual stream."""
    shape, x = model.shape, work.x[n]
    if len(model.tokens):
        x[: shape.n_embd] = model.tokens[tokens[n]]
    else:
        _row(x, model.head.numbers, model.head.scales, tokens[n], shape.n_embd)
    if not shape.rotary:
        for j in range(shape.n_embd):
            x[j] += model.positions[positions[n], j]


def _row(x, numbers, scales, token, width):
    """Row `token` of the head, when it is the table of embeddings as well -> x (width,)"""


@overload(_row)
def _choose_row(x, numbers, scales, token, width):
    """The code of `_row`, which the type of `numbers` decides when `forward` is compiled."""

    def row_of_float32(x, numbers, scales, token, width):
        x[:width] = numbers[0, token]

    def row_of_int8(x, numbers, scales, token, width):
        panel, lane = token // PANEL, token % PANEL
        n = numbers.shape[1] // scales.shape[1]
        start = panel * PANEL * n
        for j in range(width):
            at = start + (j // 2 * PANEL + lane) * 2 + j % 2
            x[j] = np.float32(numbers[0, at]) * scales[0, token]

    return row_of_float32 if numbers.dtype.name == "float32" else row_of_int8


@fast
def remember(place, x, padded):
    """Key or value x (D,) -> its place in the cache, through `padded`, which ends with zeros."""
    padded[: len(x)] = x
    for d in range(0, len(place), PANEL):
        simd.store_floats(place, d, simd.load_floats(padded, d))


@fast
def attention(me, threads, sync, meeting, model, work, cache, layer, rows, positions, N):
    """b: queries, keys, values of N tokens -> a: what the heads have gathered."""
    shape, D = model.shape, model.shape.head_dim
    H, K = shape.n_head, shape.n_kv_head
    heads = H + 2 * K
    for task in range(me, N * heads, threads):
        n, h = task // heads, task % heads
        x = work.b[n, h * D : (h + 1) * D]
        kind = 0 if h < H else (1 if h < H + K else 2)  # query, key, value
        if kind < 2 and shape.qk_norm:
            weight, bias = model.qk_norms[layer, kind, 0], model.qk_norms[layer, kind, 1]
            normalize(x, x, weight, bias, False, shape.norm_eps)
        if kind < 2 and shape.rotary:
            rotate(x, model.cos[positions[n]], model.sin[positions[n]])
        if kind > 0:
            of = h - H - (kind - 1) * K
            remember(cache[kind - 1, layer, rows[n], of, positions[n]], x, work.head[me, 0])
    meeting = wait(sync, meeting, threads)
    scale = np.float32(1 / math.sqrt(D))
    for task in range(me, N * H, threads):
        n, h = task // H, task % H
        keys = cache[0, layer, rows[n], h // (H // K)]
        values = cache[1, layer, rows[n], h // (H // K)]
        q, y = work.head[me, 1], work.head[me, 2]
        q[:D] = work.b[n, h * D : (h + 1) * D]
        attend(q, keys, values, positions[n] + 1, scale, work.scores[me], y)
        work.a[n, h * D : (h + 1) * D] = y[:D]
    return wait(sync, meeting, threads)


@fast
def read_norm(work, n, norm, shape, quantized):
    """x -> normalised a, of token n."""
    normalize(work.a[n], work.x[n], norm[0], norm[1], shape.centred, shape.norm_eps)
    if quantized:
        to_whole_numbers(work.whole[n], work.unit[n], work.a[n], shape.n_embd)


@njit(nogil=True, fastmath=FLAGS, error_model="numpy", cache=True)
def forward(me, threads, sync, model, work, cache, tokens, rows, positions, wanted, quantized):
    """Thread `me` of `threads`: N tokens -> work.logits of those `wanted`.

    tokens, rows, positions (N,): token n stands at positions[n] of row rows[n], behind all that
    the cache (2, L, rows, K, S, D) holds of that row; every token sees those before it, also of
    this call. wanted: numbers of tokens. sync: zeros, int64; [0] counts who came to a meeting,
    [1] calls all of them off, every eighth after that is the next row of a matrix.
    """
    shape, N = model.shape, len(tokens)
    heads = shape.n_head * shape.head_dim
    meeting, counter = 0, 8
    for n in range(me, N, threads):
        embed_tokens(model, work, tokens, positions, n)
    meeting = wait(sync, meeting, threads)
    for layer in range(shape.n_layer):
        for n in range(me, N, threads):
            read_norm(work, n, model.attn_norm[layer], shape, quantized)
        meeting = wait(sync, meeting, threads)
        linear(work.b, work, model.qkv, layer, N, False, counter, threads, sync)
        meeting = wait(sync, meeting, threads)
        meeting = attention(
            me, threads, sync, meeting, model, work, cache, layer, rows, positions, N
        )
        if quantized:
            for n in range(me, N, threads):
                to_whole_numbers(work.whole[n], work.unit[n], work.a[n], heads)
            meeting = wait(sync, meeting, threads)
        linear(work.x, work, model.out, layer, N, True, counter + 8, threads, sync)
        meeting = wait(sync, meeting, threads)
        for n in range(me, N, threads):
            read_norm(work, n, model.mlp_norm[layer], shape, quantized)
        meeting = wait(sync, meeting, threads)
        linear(work.b, work, model.up, layer, N, False, counter + 16, threads, sync)
        meeting = wait(sync, meeting, threads)
        for n in range(me, N, threads):
            activate(work.a[n], work.b[n], shape.n_hidden, shape.activation)
            if quantized:
                to_whole_numbers(work.whole[n], work.unit[n], work.a[n], shape.n_hidden)
        meeting = wait(sync, meeting, threads)
        linear(work.x, work, model.down, layer, N, True, counter + 24, threads, sync)
        meeting = wait(sync, meeting, threads)
        counter += 32
    for i in range(me, len(wanted), threads):
        # Token i of `a` is wanted[i] of x; `a` is free, all products are done.
        normalize(
            work.a[i],
            work.x[wanted[i]],
            model.final_norm[0, 0],
            model.final_norm[0, 1],
            shape.centred,
            shape.norm_eps,
        )
        if quantized:
            to_whole_numbers(work.whole[i], work.unit[i], work.a[i], shape.n_embd)
    wait(sync, meeting, threads)
    linear(work.logits, work, model.head, 0, len(wanted), False, counter, threads, sync)
