"""The same model in plain NumPy: what `model.py` computes, with nothing hidden.

    python -m glassgpt.numpy_gpt "Alan Turing theorized that" --n-tokens 8 --model runs/book
    logits = numpy_gpt.forward(tokens, weights, config)        # weights: the names of model.py

The reference that the fast paths are tested against. One sequence, no batch, no sampling, no
torch. Every function's first line carries its shapes: T tokens, S cached tokens and these,
C n_embd, H heads, K key/value heads, D head_dim, F n_hidden, V vocab_size.
"""

from __future__ import annotations

import math
import signal
import sys
from collections.abc import Mapping, Sequence

import numpy as np

from glassgpt.config import ModelConfig
from glassgpt.errors import UserError

Weights = Mapping[str, np.ndarray]


def forward(
    tokens: np.ndarray,
    weights: Weights,
    config: ModelConfig,
    cache: Cache | None = None,
    positions: slice = slice(None),
) -> np.ndarray:
    """[T] -> [T, V]: the logits after each token, in the weights' own precision.

    `tokens` continue what `cache` holds; without one they are the beginning. `positions` says
    whose logits are wanted: all of them, or slice(-1, None), which is enough to choose a token.
    """
    cache = Cache() if cache is None else cache
    assert cache.length + len(tokens) <= config.context_length, "more than the context holds"
    model = gpt2 if config.family == "gpt2" else modern
    logits = model(tokens, weights, config, cache, positions)
    cache.length += len(tokens)
    return logits


def generate(
    prompt: Sequence[int],
    weights: Weights,
    config: ModelConfig,
    n_tokens: int,
    *,
    use_cache: bool = True,
    vocab_size: int | None = None,
) -> list[int]:
    """The `n_tokens` ids that follow those of the prompt, the likeliest one each time.

    Models may have more ids than their tokenizer; only those below `vocab_size` are chosen.

    Raises `UserError` for an empty prompt, and when the context can't hold prompt and answer.
    """
    if not prompt or n_tokens < 0 or len(prompt) + n_tokens > config.context_length:
        raise UserError(
            f"{len(prompt)} tokens of prompt and {n_tokens} new ones: the model's context holds "
            f"1 to {config.context_length}; change the prompt or ask for fewer"
        )
    tokens, cache = list(prompt), Cache()
    for _ in range(n_tokens):
        if not use_cache:
            cache = Cache()  # it has seen nothing: the whole text is read again
        new = np.array(tokens[cache.length :])
        logits = forward(new, weights, config, cache, positions=slice(-1, None))  # [1, V]
        tokens.append(int(logits[0, :vocab_size].argmax()))
    return tokens[len(prompt) :]


# -- GPT-2: from here to the next line of dashes is the whole model --------------------------------


def gelu(x: np.ndarray) -> np.ndarray:  # any shape
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x * x * x)))


def softmax(x: np.ndarray) -> np.ndarray:  # [..., S] -> [..., S], sums to 1
    e = np.exp(x - x.max(axis=-1, keepdims=True))
    return e / e.sum(axis=-1, keepdims=True)


def layer_norm(x: np.ndarray, w: Weights, name: str, eps: float) -> np.ndarray:  # [T, C] -> [T, C]
    x = (x - x.mean(axis=-1, keepdims=True)) / np.sqrt(x.var(axis=-1, keepdims=True) + eps)
    return x * w[f"{name}.weight"] + w.get(f"{name}.bias", 0)


def linear(x: np.ndarray, w: Weights, name: str) -> np.ndarray:  # [T, n] -> [T, m]
    return x @ w[f"{name}.weight"].T + w.get(f"{name}.bias", 0)


def attention(q, k, v):  # [H, T, D], [H, S, D] x 2 -> [H, T, D]; the queries are the last T of S
    T, S = q.shape[1], k.shape[1]
    scores = q @ k.swapaxes(-2, -1) / math.sqrt(q.shape[-1])  # [H, T, S]
    if T > 1:  # the last one sees them all
        future = np.triu(np.ones((T, S), dtype=bool), k=1 + S - T)
        scores = np.where(future, -np.inf, scores)
    return softmax(scores) @ v


class Cache:  # what attention remembers: {layer: [2, K, S, D]}, keys and values of S tokens
    def __init__(self):
        self.layers, self.length = {}, 0

    def extend(self, layer: int, k: np.ndarray, v: np.ndarray):  # [K, T, D] x 2 -> [K, S, D] x 2
        new = np.stack([k, v])
        old = self.layers.get(layer, new[:, :, :0])
        self.layers[layer] = np.concatenate([old, new], axis=2)
        return self.layers[layer]


def split_heads(x: np.ndarray, n_head: int) -> np.ndarray:  # [T, H*D] -> [H, T, D]
    return x.reshape(len(x), n_head, -1).swapaxes(0, 1)


def merge_heads(x: np.ndarray) -> np.ndarray:  # [H, T, D] -> [T, H*D]
    return x.swapaxes(0, 1).reshape(x.shape[1], -1)


def gpt2(tokens, w: Weights, config, cache: Cache, positions=slice(None)):  # [T] -> [T, V]
    n, eps, activation = config.n_head, config.norm_eps, ACTIVATIONS[config.activation]
    places = np.arange(cache.length, cache.length + len(tokens))
    x = w["token_embedding.weight"][tokens] + w["position_embedding.weight"][places]  # [T, C]
    for i in range(config.n_layer):
        b = f"blocks.{i}"
        qkv = linear(layer_norm(x, w, f"{b}.attn_norm", eps), w, f"{b}.attn.qkv")  # [T, 3C]
        q, k, v = (split_heads(t, n) for t in np.split(qkv, 3, axis=1))  # [H, T, D] each
        k, v = cache.extend(i, k, v)  # [H, S, D] each
        x = x + linear(merge_heads(attention(q, k, v)), w, f"{b}.attn.out")
        hidden = activation(linear(layer_norm(x, w, f"{b}.mlp_norm", eps), w, f"{b}.mlp.up"))
        x = x + linear(hidden, w, f"{b}.mlp.down")
    x = layer_norm(x[positions], w, "final_norm", eps)
    return x @ w.get("head.weight", w["token_embedding.weight"]).T


# -- what GPT-2's relatives and Llama and Qwen3 do differently -----------------------------------


def relu(x: np.ndarray) -> np.ndarray:  # any shape
    return np.maximum(x, 0)


def gelu_erf(x: np.ndarray) -> np.ndarray:  # any shape; the exact form, which GPT-2 approximates
    erf = np.vectorize(math.erf, otypes=[x.dtype])  # NumPy has no erf of its own
    return x * 0.5 * (1 + erf(x / math.sqrt(2)))


ACTIVATIONS = {"gelu_tanh": gelu, "gelu": gelu_erf, "relu": relu}


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:  # [..., C] -> [..., C]
    return x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps) * weight


def silu(x: np.ndarray) -> np.ndarray:  # any shape; the tanh form can't overflow
    return x * (0.5 * (1 + np.tanh(0.5 * x)))


def rotate(x: np.ndarray, angles: np.ndarray):  # [H, T, D], [T, D/2] -> [H, T, D]
    D = x.shape[-1]
    cos, sin = np.cos(angles).astype(x.dtype), np.sin(angles).astype(x.dtype)
    a, b = x[..., : D // 2], x[..., D // 2 :]
    return np.concatenate([a * cos - b * sin, b * cos + a * sin], axis=-1)


def modern(tokens, w: Weights, config, cache: Cache, positions=slice(None)):  # [T] -> [T, V]
    H, K, eps = config.n_head, config.n_kv_head, config.norm_eps
    places = np.arange(cache.length, cache.length + len(tokens))
    angles = np.outer(places, config.rope_frequencies)  # [T, D/2]
    x = w["token_embedding.weight"][tokens]  # [T, C]
    for i in range(config.n_layer):
        b = f"blocks.{i}"
        qkv = linear(rms_norm(x, w[f"{b}.attn_norm.weight"], eps), w, f"{b}.attn.qkv")
        q, k, v = np.split(split_heads(qkv, H + 2 * K), [H, H + K])  # [H, T, D], [K, T, D] x 2
        if config.qk_norm:
            q = rms_norm(q, w[f"{b}.attn.q_norm.weight"], eps)
            k = rms_norm(k, w[f"{b}.attn.k_norm.weight"], eps)
        q, k = rotate(q, angles), rotate(k, angles)
        k, v = cache.extend(i, k, v)  # [K, S, D] each
        k, v = np.repeat(k, H // K, axis=0), np.repeat(v, H // K, axis=0)  # [H, S, D] each
        x = x + linear(merge_heads(attention(q, k, v)), w, f"{b}.attn.out")
        h = rms_norm(x, w[f"{b}.mlp_norm.weight"], eps)
        h = silu(linear(h, w, f"{b}.mlp.gate")) * linear(h, w, f"{b}.mlp.up")  # [T, F]
        x = x + linear(h, w, f"{b}.mlp.down")
    x = rms_norm(x[positions], w["final_norm.weight"], eps)
    return x @ w.get("head.weight", w["token_embedding.weight"]).T


# -- python -m glassgpt.numpy_gpt ----------------------------------------------------------------


def main(prompt: str, *, n_tokens: int = 40, model: str = "gpt2", cache: bool = True) -> None:
    """Continue a prompt with the likeliest tokens, computed by NumPy alone.

    Args:
        prompt: What the text begins with.
        n_tokens: How many tokens to add.
        model: What `glassgpt sample` takes: a run directory, say.
        cache: Keep keys and values, instead of reading everything again for every token.
    """
    from glassgpt.checkpoints.load import load_pretrained
    from glassgpt.checkpoints.run_directory import require_language_model

    checkpoint = require_language_model(load_pretrained(model), model)
    weights = {name: np.asarray(w, dtype=np.float32) for name, w in checkpoint.weights.items()}
    tokenizer = checkpoint.tokenizer
    ids = tokenizer.encode(prompt, special=True)
    new = generate(
        ids, weights, checkpoint.config, n_tokens, use_cache=cache, vocab_size=tokenizer.vocab_size
    )
    print(prompt + tokenizer.decode(new))


if __name__ == "__main__":
    from cyclopts import App

    app = App(version_flags=())
    app.default(main)
    if hasattr(signal, "SIGPIPE"):  # `... | head` ends it without a word
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    try:
        app()
    except UserError as error:
        print(f"glassgpt.numpy_gpt: {error}", file=sys.stderr)
        raise SystemExit(2) from None
