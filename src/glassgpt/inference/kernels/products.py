"""Products of a few tokens with a matrix in float32, int8 or int4, at the speed of memory.

`linear` is what a thread of kernels.py calls: it takes stretches of rows until none is left. One
token is bound by reading the weights, so they are asked for before they are needed; several
tokens by arithmetic, so four tokens meet 4 or 32 rows in registers. Quantised weights meet tokens
as whole numbers of 16 bits (`to_whole_numbers`), whose products are summed as integers.
"""

# Numba gives each intrinsic a first argument that callers do not write.
# pyright: reportCallIssue=false

from __future__ import annotations

import numpy as np
from numba.extending import overload

from glassgpt.inference.kernels import simd
from glassgpt.inference.kernels.quantize import GROUP, PANEL, ROWS, SPAN
from glassgpt.inference.kernels.simd import FLAGS, fast

_AHEAD = 8192  # bytes between what is used and what is fetched: more than the latency of memory


@fast
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


@fast
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


@fast
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


@fast
def _keep(y, t, row, total, scale, bias, add):
    """Sixteen outputs of token t: into y, or on top of what is there."""
    result = simd.load_floats(bias, row)
    if add:
        result = simd.multiply_add(result, simd.load_floats(y[t], row), np.float32(1))
    simd.store_floats(y[t], row, simd.multiply_add(result, total, simd.load_floats(scale, row)))


@fast
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
                        k = simd.dot_pairs(k, simd.load_int8(panels, at), simd.load_pair(x, j))
                        at += 2 * PANEL
                        k = simd.dot_pairs(k, simd.load_int8(panels, at), simd.load_pair(x, j + 2))
                    total = simd.add_scaled(total, k, work.unit[t, span // SPAN])
                _keep(y, t, panel, total, scale, bias, add)


@fast
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
            p0, p1 = simd.load_pair(x0, j), simd.load_pair(x1, j)
            p2, p3 = simd.load_pair(x2, j), simd.load_pair(x3, j)
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


@fast
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
                    k = simd.dot_pairs(k, simd.nibble(words, 0), simd.load_pair(x, c))
                    k = simd.dot_pairs(k, simd.nibble(words, 1), simd.load_pair(x, c + 2))
                    k = simd.dot_pairs(k, simd.nibble(words, 2), simd.load_pair(x, c + 4))
                    k = simd.dot_pairs(k, simd.nibble(words, 3), simd.load_pair(x, c + 6))
                simd.prefetch(scale, groups + j // GROUP * PANEL + _AHEAD // 8)
                s = simd.load_floats(scale, groups + j // GROUP * PANEL)
                s = simd.multiply_add(simd.no_floats(), s, work.unit[t, j // SPAN])
                total = simd.add_scaled(total, k, s)
            _keep(y, t, row, total, ones, bias, add)


def _product(y, work, numbers, scales, bias, layer, first, last, N, add):
    """y[:N, first:last] = a @ W[first:last].T + bias, or y += ..., of one layer's matrix W"""


@overload(_product, jit_options={"fastmath": FLAGS, "error_model": "numpy"})
def _choose_product(y, work, numbers, scales, bias, layer, first, last, N, add):
    """The code of `_product`, which the type of `numbers` decides when `forward` is compiled."""
    kernel = {"float32": _product_float32, "int8": _product_int8, "int16": _product_int4}
    return kernel[numbers.dtype.name].py_func


@fast
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
