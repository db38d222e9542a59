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

from glassgpt.engine import simd
from glassgpt.engine.quantize import GROUP, PANEL, ROWS

# Sums may be reordered, so that they can be vectors; NaN and infinity keep their meaning.
_FLAGS = {"reassoc", "contract", "nsz", "arcp"}
_fast = njit(nogil=True, fastmath=_FLAGS, error_model="numpy")
_AHEAD = 8192  # bytes between what is used and what is fetched: more than the latency of memory
SPAN = 256  # columns whose products are summed as integers: 256 * 127 * 32767 < 2^31
RELU, GELU, GELU_TANH, SWIGLU = range(4)
ACTIVATIONS = {"relu": RELU, "gelu": GELU, "gelu_tanh": GELU_TANH, "swiglu": SWIGLU}


class Matrix(NamedTuple):
    """The same matrix of every layer, (L, ...) each; `quantize.pack` explains int8 and int4."""

    numbers: np.ndarray  # float32 (L, m, n), int8 (L, m * n), int16 (L, m * n / 4): four each
    scales: np.ndarray  # (L, m) for int8, (L, m * n / GROUP) for int4, else (L, 0)
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
    head: np.ndarray  # (threads, D), zeros behind D
    logits: np.ndarray  # (N, V)


# -- threads -------------------------------------------------------------------------------------


@_fast
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


# -- matrix products: y[:, first:last] = x @ W[first:last].T + bias, for N tokens ------------------


@_fast
def _product_float32(y, work, numbers, scales, bias, layer, first, last, N, add):
    matrix, n = numbers[layer], numbers.shape[2]
    for row in range(first, last, PANEL):
        end = row + PANEL
        for t in range(0, N - N % 4, 4):
            if t == 0:
                for i in range(row, end):
                    for j in range(0, n, 16):
                        simd.prefetch(matrix, (i + PANEL) * n + j)
            _four_by_four(y, work.a, matrix, bias[layer], row, end, t, add)
        for t in range(N - N % 4, N):
            x = work.a[t, :n]
            for i in range(row, end):
                for j in range(0, n, 16):
                    simd.prefetch(matrix, i * n + j + _AHEAD // 4)
                w, total = matrix[i], np.float32(0)
                for j in range(n):
                    total += w[j] * x[j]
                y[t, i] = (y[t, i] if add else np.float32(0)) + total + bias[layer, i]


@_fast
def _four_by_four(y, a, matrix, bias, first, last, t, add):
    """Four tokens, four rows at a time: 16 sums in registers for 8 loads."""
    n = matrix.shape[1]
    x0, x1, x2, x3 = a[t, :n], a[t + 1, :n], a[t + 2, :n], a[t + 3, :n]
    sums = np.empty((4, 4), np.float32)
    for i in range(first, last, 4):
        w0, w1, w2, w3 = matrix[i], matrix[i + 1], matrix[i + 2], matrix[i + 3]
        a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = np.float32(0)
        c0 = c1 = c2 = c3 = d0 = d1 = d2 = d3 = np.float32(0)
        for j in range(n):
            p, q, r, s = w0[j], w1[j], w2[j], w3[j]
            u0, u1, u2, u3 = x0[j], x1[j], x2[j], x3[j]
            a0, a1, a2, a3 = a0 + p * u0, a1 + p * u1, a2 + p * u2, a3 + p * u3
            b0, b1, b2, b3 = b0 + q * u0, b1 + q * u1, b2 + q * u2, b3 + q * u3
            c0, c1, c2, c3 = c0 + r * u0, c1 + r * u1, c2 + r * u2, c3 + r * u3
            d0, d1, d2, d3 = d0 + s * u0, d1 + s * u1, d2 + s * u2, d3 + s * u3
        sums[0, 0], sums[1, 0], sums[2, 0], sums[3, 0] = a0, a1, a2, a3
        sums[0, 1], sums[1, 1], sums[2, 1], sums[3, 1] = b0, b1, b2, b3
        sums[0, 2], sums[1, 2], sums[2, 2], sums[3, 2] = c0, c1, c2, c3
        sums[0, 3], sums[1, 3], sums[2, 3], sums[3, 3] = d0, d1, d2, d3
        for k in range(4):
            for m in range(4):
                old = y[t + k, i + m] if add else np.float32(0)
                y[t + k, i + m] = old + sums[k, m] + bias[i + m]


@_fast
def _keep(y, t, row, total, scale, bias, add):
    """Sixteen outputs of token t: into y, or on top of what is there."""
    result = simd.load_floats(bias, row)
    if add:
        result = simd.multiply_add(result, simd.load_floats(y[t], row), np.float32(1))
    simd.store_floats(y[t], row, simd.multiply_add(result, total, simd.load_floats(scale, row)))


@_fast
def _product_int8(y, work, numbers, scales, bias, layer, first, last, N, add):
    panels, scale, bias = numbers[layer], scales[layer], bias[layer]
    n = len(panels) // len(scale)
    for row in range(first, last, 2 * PANEL):
        for t in range(0, N - N % 4, 4):
            _two_by_four(y, work, panels, scale, bias, row, n, t, N // 4, add)
        for t in range(N - N % 4, N):
            for panel in range(row, row + 2 * PANEL, PANEL):
                x, total, start = work.whole[t], simd.no_floats(), panel * n
                for span in range(0, n, SPAN):
                    k = simd.no_ints()
                    for j in range(span, min(span + SPAN, n), 4):  # a cache line
                        at = start + j * PANEL
                        simd.prefetch(panels, at + _AHEAD)
                        k = simd.dot_pairs(k, simd.load_int8(panels, at), simd.pair(x, j))
                        at += 2 * PANEL
                        k = simd.dot_pairs(k, simd.load_int8(panels, at), simd.pair(x, j + 2))
                    total = simd.add_scaled(total, k, work.unit[t, span // SPAN])
                _keep(y, t, panel, total, scale, bias, add)


@_fast
def _two_by_four(y, work, panels, scale, bias, row, n, t, quads, add):
    """Four tokens, two panels at a time: eight sums in registers for six loads.

    Each of the `quads` of tokens asks for its part of the next two panels.
    """
    x0, x1, x2, x3 = work.whole[t], work.whole[t + 1], work.whole[t + 2], work.whole[t + 3]
    a0 = a1 = a2 = a3 = b0 = b1 = b2 = b3 = simd.no_floats()
    step = 64 // quads
    soon = (row + ROWS) * n + t // 4 * (ROWS * n // quads)
    for span in range(0, n, SPAN):
        k0 = k1 = k2 = k3 = m0 = m1 = m2 = m3 = simd.no_ints()
        for j in range(span, min(span + SPAN, n), 2):
            at = row * n + j * PANEL
            v, w = simd.load_int8(panels, at), simd.load_int8(panels, at + PANEL * n)
            simd.prefetch(panels, soon)
            soon += step
            p0, p1 = simd.pair(x0, j), simd.pair(x1, j)
            p2, p3 = simd.pair(x2, j), simd.pair(x3, j)
            k0, m0 = simd.dot_pairs(k0, v, p0), simd.dot_pairs(m0, w, p0)
            k1, m1 = simd.dot_pairs(k1, v, p1), simd.dot_pairs(m1, w, p1)
            k2, m2 = simd.dot_pairs(k2, v, p2), simd.dot_pairs(m2, w, p2)
            k3, m3 = simd.dot_pairs(k3, v, p3), simd.dot_pairs(m3, w, p3)
        u0, u1 = work.unit[t, span // SPAN], work.unit[t + 1, span // SPAN]
        u2, u3 = work.unit[t + 2, span // SPAN], work.unit[t + 3, span // SPAN]
        a0, b0 = simd.add_scaled(a0, k0, u0), simd.add_scaled(b0, m0, u0)
        a1, b1 = simd.add_scaled(a1, k1, u1), simd.add_scaled(b1, m1, u1)
        a2, b2 = simd.add_scaled(a2, k2, u2), simd.add_scaled(b2, m2, u2)
        a3, b3 = simd.add_scaled(a3, k3, u3), simd.add_scaled(b3, m3, u3)
    _keep(y, t, row, a0, scale, bias, add)
    _keep(y, t + 1, row, a1, scale, bias, add)
    _keep(y, t + 2, row, a2, scale, bias, add)
    _keep(y, t + 3, row, a3, scale, bias, add)
    _keep(y, t, row + PANEL, b0, scale, bias, add)
    _keep(y, t + 1, row + PANEL, b1, scale, bias, add)
    _keep(y, t + 2, row + PANEL, b2, scale, bias, add)
    _keep(y, t + 3, row + PANEL, b3, scale, bias, add)


@_fast
def _product_int4(y, work, numbers, scales, bias, layer, first, last, N, add):
    panels, scale, bias = numbers[layer], scales[layer], bias[layer]
    n, ones = len(panels) * 4 // len(bias), np.ones(last, np.float32)
    for row in range(first, last, PANEL):
        start, groups = row * n // 4, row * n // GROUP
        for t in range(N):
            x, total = work.whole[t], simd.no_floats()
            for j in range(0, n, GROUP):
                k = simd.no_ints()
                for c in range(j, j + GROUP, 8):
                    words = simd.load_shorts(panels, start + c // 4 * PANEL)
                    simd.prefetch(panels, start + c // 4 * PANEL + _AHEAD // 2)
                    k = simd.dot_pairs(k, simd.nibble(words, 0), simd.pair(x, c))
                    k = simd.dot_pairs(k, simd.nibble(words, 1), simd.pair(x, c + 2))
                    k = simd.dot_pairs(k, simd.nibble(words, 2), simd.pair(x, c + 4))
                    k = simd.dot_pairs(k, simd.nibble(words, 3), simd.pair(x, c + 6))
                s = simd.load_floats(scale, groups + j // GROUP * PANEL)
                s = simd.multiply_add(simd.no_floats(), s, work.unit[t, j // SPAN])
                total = simd.add_scaled(total, k, s)
            _keep(y, t, row, total, ones, bias, add)


def _product(y, work, numbers, scales, bias, layer, first, last, N, add):
    raise NotImplementedError  # the type of `numbers` decides, when `forward` is compiled


@overload(_product, jit_options={"fastmath": _FLAGS, "error_model": "numpy"})
def _choose_product(y, work, numbers, scales, bias, layer, first, last, N, add):
    kernel = {"float32": _product_float32, "int8": _product_int8, "int16": _product_int4}
    return kernel[numbers.dtype.name].py_func


@_fast
def linear(y, work, matrix, layer, N, add, counter, threads, sync):
    """y = a @ W.T + bias, or y += ...; every thread takes stretches of rows until none is left."""
    rows = matrix.bias.shape[1]
    stretch = max(ROWS, rows // (4 * threads) // ROWS * ROWS)
    while True:
        first = simd.fetch_add(sync, counter, stretch)
        if first >= rows:
            return
        last = min(rows, first + stretch)
        _product(y, work, matrix.numbers, matrix.scales, matrix.bias, layer, first, last, N, add)


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


@_fast
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


@_fast
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


@_fast
def to_whole_numbers(whole, unit, x, n):
    """x (n,) as int16 times a unit for each span; its error is a 65,000th of the span's largest."""
    for span in range(0, n, SPAN):
        end = min(span + SPAN, n)
        largest = np.int32(0)  # the pattern of |x|: ordered as the numbers are, with NaN on top
        for j in range(span, end):
            largest = max(largest, np.int32(simd.bits_of_float(x[j]) & 0x7FFFFFFF))
        scale = simd.float_of_bits(largest) / np.float32(32767)
        inverse = np.float32(1) / scale if scale > 0 else np.float32(0)
        for j in range(span, end):
            whole[j] = np.int16(np.int32(np.floor(x[j] * inverse + np.float32(0.5))))
        unit[span // SPAN] = scale
    for j in range(n, (n + GROUP - 1) // GROUP * GROUP):
        whole[j] = 0


@_fast
def rotate(x, cos, sin):
    """Turn the pairs (i, i + D/2) of x (D,) by the angles of its position, in place."""
    half = len(cos)
    for i in range(half):
        first, second = x[i], x[half + i]
        x[i] = first * cos[i] - second * sin[i]
        x[half + i] = second * cos[i] + first * sin[i]


@_fast
def attend(q, keys, values, S, scale, scores, y):
    """softmax(q k^T scale) v of one head: q, y (D,), keys and values (S or more, D).

    D is padded to a multiple of 16 with zeros in keys and values; what q has there is no matter.
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


@_fast
def embed(model, work, tokens, positions, n):
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
    raise NotImplementedError  # see _choose_row


@overload(_row)
def _choose_row(x, numbers, scales, token, width):
    """Row `token` of the head, when it is the table of embeddings as well."""

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


@_fast
def remember(place, x, padded):
    """Key or value x (D,) -> its place in the cache, through `padded`, which ends with zeros."""
    padded[: len(x)] = x
    for d in range(0, len(place), PANEL):
        simd.store_floats(place, d, simd.load_floats(padded, d))


@_fast
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
            remember(cache[kind - 1, layer, rows[n], of, positions[n]], x, work.head[me])
    meeting = wait(sync, meeting, threads)
    scale = np.float32(1 / math.sqrt(D))
    for task in range(me, N * H, threads):
        n, h = task // H, task % H
        keys = cache[0, layer, rows[n], h // (H // K)]
        values = cache[1, layer, rows[n], h // (H // K)]
        q, y = work.b[n, h * D :], work.head[me]
        attend(q, keys, values, positions[n] + 1, scale, work.scores[me], y)
        work.a[n, h * D : (h + 1) * D] = y[:D]
    return wait(sync, meeting, threads)


@_fast
def read_norm(work, n, norm, shape, quantized):
    """x -> normalised a, of token n."""
    normalize(work.a[n], work.x[n], norm[0], norm[1], shape.centred, shape.norm_eps)
    if quantized:
        to_whole_numbers(work.whole[n], work.unit[n], work.a[n], shape.n_embd)


@njit(nogil=True, fastmath=_FLAGS, error_model="numpy", cache=True)
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
        embed(model, work, tokens, positions, n)
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
            work.a[i], work.x[wanted[i]], model.final_norm[0, 0], model.final_norm[0, 1],
            shape.centred, shape.norm_eps,
        )  # fmt: skip
        if quantized:
            to_whole_numbers(work.whole[i], work.unit[i], work.a[i], shape.n_embd)
    wait(sync, meeting, threads)
    linear(work.logits, work, model.head, 0, len(wanted), False, counter, threads, sync)
