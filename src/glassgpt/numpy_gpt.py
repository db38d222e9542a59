"""The same forward pass in plain NumPy: what `model.py` computes, with nothing hidden.

    logits = numpy_gpt.forward(tokens, weights, config)        # weights: the names of model.py

The reference that the fast paths are tested against. One sequence, no batch, no cache, no
torch. Every function's first line carries its shapes: T tokens, C n_embd, H heads, K key/value
heads, D head_dim, F n_hidden, V vocab_size.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np

from glassgpt.config import ModelConfig

Weights = Mapping[str, np.ndarray]


def forward(tokens: np.ndarray, weights: Weights, config: ModelConfig) -> np.ndarray:
    """[T] -> [T, V]: the logits after each token, in the weights' own precision."""
    if config.family != "gpt2":
        return modern(tokens, weights, config)
    activation = {"gelu_tanh": gelu, "gelu": gelu_erf, "relu": relu}[config.activation]
    return gpt2(tokens, weights, config.n_layer, config.n_head, config.norm_eps, activation)


# -- GPT-2: from here to the next line of dashes is the whole model --------------------------------


def gelu(x: np.ndarray) -> np.ndarray:  # any shape
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def softmax(x: np.ndarray) -> np.ndarray:  # [..., S] -> [..., S], sums to 1
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def layer_norm(x: np.ndarray, w: Weights, name: str, eps: float) -> np.ndarray:  # [T, C] -> [T, C]
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)


def linear(x: np.ndarray, w: Weights, name: str) -> np.ndarray:  # [T, n] -> [T, m]
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def attention(q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:  # [H, T, D] x 3 -> same
    scores = q @ k.swapaxes(-2, -1) / math.sqrt(q.shape[-1])  # [H, T, T]
    future = np.triu(np.ones(scores.shape[-2:], dtype=bool), k=1)
    return softmax(np.where(future, -np.inf, scores)) @ v


def split_heads(x: np.ndarray, n_head: int) -> np.ndarray:  # [T, H*D] -> [H, T, D]
    return x.reshape(len(x), n_head, -1).swapaxes(0, 1)


def merge_heads(x: np.ndarray) -> np.ndarray:  # [H, T, D] -> [T, H*D]
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def gpt2(tokens, w: Weights, n_layer: int, n_head: int, eps=1e-5, activation=gelu):  # [T] -> [T, V]
    x = w["token_embedding.weight"][tokens] + w["position_embedding.weight"][: len(tokens)]
    for i in range(n_layer):
        b = f"blocks.{i}"
        qkv = linear(layer_norm(x, w, f"{b}.attn_norm", eps), w, f"{b}.attn.qkv")  # [T, 3C]
        q, k, v = (split_heads(t, n_head) for t in np.split(qkv, 3, axis=1))
        heads = attention(q, k, v)
        x = x + linear(merge_heads(heads), w, f"{b}.attn.out")
        hidden = activation(linear(layer_norm(x, w, f"{b}.mlp_norm", eps), w, f"{b}.mlp.up"))
        x = x + linear(hidden, w, f"{b}.mlp.down")
    x = layer_norm(x, w, "final_norm", eps)
    return x @ w.get("head.weight", w["token_embedding.weight"]).T


# -- what GPT-2's relatives and Llama and Qwen3 do differently -----------------------------------


def relu(x: np.ndarray) -> np.ndarray:  # any shape
    return np.maximum(x, 0)


def gelu_erf(x: np.ndarray) -> np.ndarray:  # any shape; the exact form, which GPT-2 approximates
    erf = np.vectorize(math.erf, otypes=[x.dtype])  # NumPy has no erf of its own
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:  # [..., C] -> [..., C]
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:  # any shape; the tanh form can't overflow
    return x * (0.5 * (1 + np.tanh(0.5 * x)))


def rotate(x: np.ndarray, theta: float) -> np.ndarray:  # [H, T, D] -> [H, T, D]
    T, D = x.shape[-2:]
    angles = np.outer(np.arange(T), theta ** (-np.arange(0, D, 2) / D))  # [T, D/2]
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def modern(tokens: np.ndarray, w: Weights, config: ModelConfig) -> np.ndarray:  # [T] -> [T, V]
    H, K, eps = config.n_head, config.n_kv_head, config.norm_eps
    x = w["token_embedding.weight"][tokens]  # [T, C]
    for i in range(config.n_layer):
        b = f"blocks.{i}"
        qkv = linear(rms_norm(x, w[f"{b}.attn_norm.weight"], eps), w, f"{b}.attn.qkv")
        q, k, v = np.split(split_heads(qkv, H + 2 * K), [H, H + K])  # [H, T, D], [K, T, D] x 2
        if config.qk_norm:
            q = rms_norm(q, w[f"{b}.attn.q_norm.weight"], eps)
            k = rms_norm(k, w[f"{b}.attn.k_norm.weight"], eps)
        q, k = rotate(q, config.rope_theta), rotate(k, config.rope_theta)
        k, v = np.repeat(k, H // K, axis=0), np.repeat(v, H // K, axis=0)  # [H, T, D] each
        x = x + linear(merge_heads(attention(q, k, v)), w, f"{b}.attn.out")
        h = rms_norm(x, w[f"{b}.mlp_norm.weight"], eps)
        h = silu(linear(h, w, f"{b}.mlp.gate")) * linear(h, w, f"{b}.mlp.up")  # [T, F]
        x = x + linear(h, w, f"{b}.mlp.down")
    x = rms_norm(x, w["final_norm.weight"], eps)
    return x @ w.get("head.weight", w["token_embedding.weight"]).T
