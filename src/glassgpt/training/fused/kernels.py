"""What happens between the matrix products of a training step, each forward and backward.

Compiled loops over plain arrays, each run by one thread without Python's lock. Activations are
float32, or bfloat16 seen as its bits (uint16): `wide` reads either, `narrow` rounds to either;
arithmetic is float32 always. model.py says the same in torch, and is what this is tested against.

Shapes:  N = B * T tokens    C n_embd    F n_hidden    H heads    D head_dim    V vocab_size
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
from numba import njit, types
from numba.extending import overload

from glassgpt.inference.kernels.forward import exp
from glassgpt.inference.kernels.simd import FLAGS

_kernel = njit(nogil=True, fastmath=FLAGS, error_model="numpy", cache=True)
_ONE, _LOWEST = np.float32(1), np.float32(-1e30)


def wide(x: Any) -> Any:
    """A number of an array as float32."""


def narrow(array: Any, x: Any) -> Any:
    """float32 as a number of `array`; bfloat16 to the nearest, ties to even."""


@overload(wide, inline="always")
def _wide(x):
    if isinstance(x, types.Integer):  # bfloat16 is the upper half of float32
        return lambda x: np.uint32(np.uint32(x) << np.uint32(16)).view(np.float32)
    return lambda x: x


@overload(narrow, inline="always")
def _narrow(array, x):
    def to_bfloat16(array, x):
        bits = np.uint32(np.float32(x).view(np.uint32))
        odd = np.uint32(np.uint32(bits >> np.uint32(16)) & np.uint32(1))
        return np.uint16(np.uint32(bits + np.uint32(0x7FFF) + odd) >> np.uint32(16))

    return to_bfloat16 if isinstance(array.dtype, types.Integer) else lambda array, x: x


# -- embedding -----------------------------------------------------------------------------------


@_kernel
def gather_embeddings(tokens, table, x):
    """Rows of `table` (V, C) for `tokens` (N,) -> x (N, C)"""
    for n in range(len(tokens)):
        for c in range(x.shape[1]):
            x[n, c] = table[tokens[n], c]


@_kernel
def gather_embeddings_backward(tokens, dx, dtable):
    for n in range(len(tokens)):
        for c in range(dx.shape[1]):
            dtable[tokens[n], c] += dx[n, c]


# -- residual stream and RMSNorm -----------------------------------------------------------------


@_kernel
def add_norm(x, branch, weight, eps, y, normed, inverse):
    """What a branch adds, and what the next one reads: y = x + branch, normed = RMSNorm(y).

    x, y, normed and branch (N, C); `inverse` (N,) keeps 1 / root mean square for the way back.
    """
    N, C = x.shape
    for n in range(N):
        squares = np.float32(0)
        for c in range(C):
            v = x[n, c] + wide(branch[n, c])
            y[n, c] = v
            squares += v * v
        inverse[n] = _ONE / np.float32(math.sqrt(squares / np.float32(C) + eps))
        for c in range(C):
            normed[n, c] = narrow(normed, y[n, c] * inverse[n] * weight[c])


@_kernel
def norm_backward(dnormed, y, weight, inverse, dy, dweight, dbranch):
    """dy += the gradient through the norm; `dbranch` is dy, rounded, for the branch before."""
    N, C = y.shape
    for n in range(N):
        r, along = inverse[n], np.float32(0)
        for c in range(C):
            along += wide(dnormed[n, c]) * weight[c] * y[n, c]
        along *= r * r * r / np.float32(C)
        for c in range(C):
            d = wide(dnormed[n, c]) * r
            dweight[c] += d * y[n, c]
            v = dy[n, c] + d * weight[c] - along * y[n, c]
            dy[n, c] = v
            dbranch[n, c] = narrow(dbranch, v)


# -- attention -----------------------------------------------------------------------------------


@_kernel
def heads(qkv, q_weight, k_weight, cos, sin, eps, q, k, v, inverse):
    """Divide qkv (N, 3HD) into heads (B, H, T, D); normalise and rotate queries and keys.

    cos and sin (T, D/2); `inverse` (N, 2H) as in `add_norm`. Through a buffer of its own, which no
    argument can overlap: only so do these short loops become vectors (six times as fast).
    """
    B, H, T, D = q.shape
    half, x = D // 2, np.empty(D, np.float32)
    for b in range(B):
        for h in range(2 * H):  # the queries, then the keys
            out = q[b, h] if h < H else k[b, h - H]
            weight = q_weight if h < H else k_weight
            for t in range(T):
                n, squares = b * T + t, np.float32(0)
                for d in range(D):
                    x[d] = wide(qkv[n, h * D + d])
                    squares += x[d] * x[d]
                r = _ONE / np.float32(math.sqrt(squares / np.float32(D) + eps))
                inverse[n, h] = r
                for d in range(D):
                    x[d] *= r * weight[d]
                for d in range(half):
                    out[t, d] = narrow(out, x[d] * cos[t, d] - x[half + d] * sin[t, d])
                    out[t, half + d] = narrow(out, x[half + d] * cos[t, d] + x[d] * sin[t, d])
        for h in range(H):
            for t in range(T):
                for d in range(D):
                    v[b, h, t, d] = qkv[b * T + t, (2 * H + h) * D + d]


@_kernel
def heads_backward(
    dq, dk, dv, qkv, q_weight, k_weight, cos, sin, inverse, dqkv, dq_weight, dk_weight
):
    """dq, dk, dv (B, H, T, D) -> dqkv (N, 3HD); adds to the gradients of the norms' weights."""
    B, H, T, D = dq.shape
    half, x, g = D // 2, np.empty(D, np.float32), np.empty(D, np.float32)
    dweights = np.zeros((2, D), np.float32)
    for b in range(B):
        for h in range(2 * H):
            dout = dq[b, h] if h < H else dk[b, h - H]
            weight = q_weight if h < H else k_weight
            dweight = dweights[0] if h < H else dweights[1]
            for t in range(T):
                n, along = b * T + t, np.float32(0)
                r = inverse[n, h]
                for d in range(D):
                    x[d] = wide(qkv[n, h * D + d])
                for d in range(half):  # turned back
                    first, second = wide(dout[t, d]), wide(dout[t, half + d])
                    g[d] = first * cos[t, d] + second * sin[t, d]
                    g[half + d] = second * cos[t, d] - first * sin[t, d]
                for d in range(D):
                    dweight[d] += g[d] * x[d] * r
                    g[d] *= weight[d]
                    along += g[d] * x[d]
                along *= r * r * r / np.float32(D)
                for d in range(D):
                    dqkv[n, h * D + d] = narrow(dqkv, r * g[d] - along * x[d])
        for h in range(H):
            for t in range(T):
                for d in range(D):
                    dqkv[b * T + t, (2 * H + h) * D + d] = dv[b, h, t, d]
    dq_weight += dweights[0]
    dk_weight += dweights[1]


@_kernel
def causal_softmax(scores, scale, pattern):
    """scores (B * H, T, T) -> pattern: rows over what came before sum to 1, the rest is 0."""
    T = scores.shape[1]
    row = np.empty(T, np.float32)
    for i in range(len(scores)):
        for t in range(T):
            largest, total = _LOWEST, np.float32(0)
            for s in range(t + 1):
                row[s] = wide(scores[i, t, s]) * scale
                largest = max(largest, row[s])
            for s in range(t + 1):
                row[s] = exp(row[s] - largest)
                total += row[s]
            share = _ONE / total
            for s in range(t + 1):
                pattern[i, t, s] = narrow(pattern, row[s] * share)
            for s in range(t + 1, T):
                pattern[i, t, s] = 0


@_kernel
def causal_softmax_backward(pattern, dpattern, scale):
    """dpattern (B * H, T, T) becomes the gradient of the scores, in place."""
    T = pattern.shape[1]
    for i in range(len(pattern)):
        for t in range(T):
            mean = np.float32(0)
            for s in range(t + 1):
                mean += wide(pattern[i, t, s]) * wide(dpattern[i, t, s])
            for s in range(t + 1):
                d = wide(pattern[i, t, s]) * (wide(dpattern[i, t, s]) - mean) * scale
                dpattern[i, t, s] = narrow(dpattern, d)
            for s in range(t + 1, T):
                dpattern[i, t, s] = 0


# -- SwiGLU --------------------------------------------------------------------------------------


@_kernel
def swiglu(gate_up, hidden):
    """gate_up (N, 2F) -> hidden (N, F): SiLU(gate) * up"""
    N, F = hidden.shape
    for n in range(N):
        for f in range(F):
            gate = wide(gate_up[n, f])
            hidden[n, f] = narrow(hidden, gate / (_ONE + exp(-gate)) * wide(gate_up[n, F + f]))


@_kernel
def swiglu_backward(gate_up, dhidden, dgate_up):
    N, F = dhidden.shape
    for n in range(N):
        for f in range(F):
            gate, up, d = wide(gate_up[n, f]), wide(gate_up[n, F + f]), wide(dhidden[n, f])
            sigmoid = _ONE / (_ONE + exp(-gate))
            slope = sigmoid * (_ONE + gate * (_ONE - sigmoid))
            dgate_up[n, f] = narrow(dgate_up, d * up * slope)
            dgate_up[n, F + f] = narrow(dgate_up, d * gate * sigmoid)


# -- loss and dropout ----------------------------------------------------------------------------


@_kernel
def cross_entropy(logits, targets, scale):
    """logits (N, V) become their gradient, times `scale`; -> the loss, summed, in nats.

    A negative target carries no loss.
    """
    N, V = logits.shape
    row, loss = np.empty(V, np.float32), 0.0
    for n in range(N):
        if targets[n] < 0:
            logits[n, :] = 0
            continue
        largest, total = _LOWEST, np.float32(0)
        for v in range(V):
            row[v] = wide(logits[n, v])
            largest = max(largest, row[v])
        right = row[targets[n]]
        for v in range(V):
            row[v] = exp(row[v] - largest)
            total += row[v]
        loss += math.log(total) + largest - right
        row[targets[n]] -= total
        for v in range(V):
            logits[n, v] = narrow(logits, row[v] * (scale / total))
    return loss


@_kernel
def drop(x, y, key, share):
    """x (n,) -> y: the `share` that the `key` chooses becomes 0, the rest grows to make up for it.

    Number i is dropped when a hash of (key, i) is low (MurmurHash3's last step): the way back finds
    the same ones without a stored mask.
    """
    grow, limit = _ONE / (_ONE - np.float32(share)), np.uint32(share * 4294967296.0)
    for i in range(len(x)):
        bits = np.uint32(np.uint32(i) * np.uint32(0x9E3779B9) + np.uint32(key))
        bits = np.uint32(bits ^ np.uint32(bits >> np.uint32(16)))
        bits = np.uint32(bits * np.uint32(0x85EBCA6B))
        bits = np.uint32(bits ^ np.uint32(bits >> np.uint32(13)))
        bits = np.uint32(bits * np.uint32(0xC2B2AE35))
        bits = np.uint32(bits ^ np.uint32(bits >> np.uint32(16)))
        kept = wide(x[i]) * grow if bits >= limit else np.float32(0)
        y[i] = narrow(y, kept)
