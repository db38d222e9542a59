"""The whole architecture on one page: GPT-2's shape and its modern descendants (Llama, Qwen3).

    model = GPT(ModelConfig.from_shape("modern", vocab_size=65)); logits = model(tokens)

It knows no optimizer, no tokenizer, no file and no loss: tokens in, logits out.
interpret/operations.py reads this file: a trace names activations by function and operation, see
interpret/activations.py.

Shapes:  B batch     T new tokens      S cached + new tokens    C n_embd     V vocab_size
         H heads     K key/value heads D head_dim               F n_hidden   L layers
The residual stream x is (B, T, C) from the embedding to the head; every block adds to it.
"""

from __future__ import annotations

import math
from collections import ChainMap
from collections.abc import Mapping

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from glassgpt.cache import Cache
from glassgpt.config import ModelConfig

_ACTIVATIONS = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),  # OpenAI's GPT-2
    "swiglu": F.silu,  # of the gate; arXiv:2002.05202
}


def make_norm(config: ModelConfig, width: int) -> nn.Module:
    """LayerNorm: centre, scale to unit variance. RMSNorm (arXiv:1910.07467): scale only."""
    if config.norm == "layernorm":
        return nn.LayerNorm(width, eps=config.norm_eps, bias=config.bias)
    return nn.RMSNorm(width, eps=config.norm_eps)


# -- positions -----------------------------------------------------------------------------------


def rotary_angles(config: ModelConfig) -> torch.Tensor:
    """Angle of every position for every pair of a head's dimensions.  -> (context_length, D/2)"""
    frequencies = torch.tensor(config.rope_frequencies, dtype=torch.float64)  # (D/2,)
    return torch.outer(torch.arange(config.context_length), frequencies)  # (context_length, D/2)


def rotate(x: torch.Tensor, cos: torch.Tensor, sin: torch.Tensor) -> torch.Tensor:
    """Turn dimension pairs (i, i + D/2) of x by the angles of their positions.

    x (B, H, T, D), cos and sin (1, T, D) or (B, 1, T, D) -> (B, H, T, D). The dot product of two
    rotated vectors depends only on how far apart their positions are.
    """
    first, second = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-second, first), dim=-1) * sin


# -- attention -----------------------------------------------------------------------------------


def attention_by_hand(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: float = 0.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """Attention as the formula reads, softmax(q k^T / sqrt(D)) v; the reference for the fast path.

    q (B, H, T, D), k and v (B, H, S, D) -> (B, H, T, D). The T queries are the last T of the S
    positions, and each sees itself and what came before it; or `mask` (B, 1, T, S) says what.
    """
    T, S = q.size(-2), k.size(-2)
    # Without the division, scores grow with D and the softmax would saturate (arXiv:1706.03762).
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.size(-1))  # (B, H, T, S)
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
    scores = scores.masked_fill(~mask, -math.inf)
    pattern = F.dropout(scores.softmax(dim=-1), dropout)  # (B, H, T, S), rows sum to 1
    return pattern @ v  # (B, H, T, D)


def attention(
    q: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
    dropout: float = 0.0,
    mask: torch.Tensor | None = None,
) -> torch.Tensor:
    """`attention_by_hand` by torch's fused kernel, which never stores the (T, S) scores."""
    T, S = q.size(-2), k.size(-2)
    if mask is None and 1 < T < S:  # after a cached prefix; "is_causal" would align top-left
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(diagonal=S - T)
    return F.scaled_dot_product_attention(q, k, v, mask, dropout, is_causal=mask is None and T > 1)


class CausalSelfAttention(nn.Module):
    """Every position asks (q) all earlier ones (k) and gathers what they offer (v)."""

    attend = staticmethod(attention)  # set to `attention_by_hand` to watch it work

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.config, self.layer = config, layer
        D, H, K = config.head_dim, config.n_head, config.n_kv_head
        self.qkv = nn.Linear(config.n_embd, (H + 2 * K) * D, bias=config.bias)
        self.out = nn.Linear(H * D, config.n_embd, bias=config.bias)
        # Bounds the scores, so that a high learning rate can't blow them up (arXiv:2302.05442).
        self.q_norm = make_norm(config, D) if config.qk_norm else nn.Identity()
        self.k_norm = make_norm(config, D) if config.qk_norm else nn.Identity()

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C); `rotation` is cos and sin, or None."""
        B, T, _ = x.shape
        D, H, K = self.config.head_dim, self.config.n_head, self.config.n_kv_head
        heads = self.qkv(x).view(B, T, H + 2 * K, D).transpose(1, 2)  # (B, H + 2K, T, D)
        q, k, v = heads.split((H, K, K), dim=1)  # (B, H, T, D), (B, K, T, D), (B, K, T, D)
        q, k = self.q_norm(q), self.k_norm(k)
        if rotation is not None:
            q, k = rotate(q, *rotation), rotate(k, *rotation)
        if cache is not None:
            k, v = cache.extend(self.layer, k, v)  # (B, K, S, D) each
        if K < H:  # each key/value head serves a group of H/K heads (arXiv:2305.13245)
            k, v = (t.repeat_interleave(H // K, dim=1) for t in (k, v))  # (B, H, S, D)
        dropout = self.config.dropout if self.training else 0.0
        mask = None if cache is None else cache.mask
        y = self.attend(q, k, v, dropout, mask)  # (B, H, T, D)
        return self.out(y.transpose(1, 2).reshape(B, T, H * D))  # (B, T, C)


# -- the block -----------------------------------------------------------------------------------


class MLP(nn.Module):
    """Each position by itself: widen, bend, narrow. SwiGLU multiplies by a second, gating path."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.activation = _ACTIVATIONS[config.activation]
        width, hidden = config.n_embd, config.n_hidden
        gated = config.activation == "swiglu"
        self.gate = nn.Linear(width, hidden, bias=config.bias) if gated else None
        self.up = nn.Linear(width, hidden, bias=config.bias)
        self.down = nn.Linear(hidden, width, bias=config.bias)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)"""
        if self.gate is None:
            hidden = self.activation(self.up(x))  # (B, T, F)
        else:
            hidden = self.activation(self.gate(x)) * self.up(x)  # (B, T, F)
        return self.down(hidden)  # (B, T, C)


class Block(nn.Module):
    """Communicate, then compute; each reads a normalised copy and adds to the residual stream."""

    def __init__(self, config: ModelConfig, layer: int) -> None:
        super().__init__()
        self.attn_norm = make_norm(config, config.n_embd)
        self.attn = CausalSelfAttention(config, layer)
        self.mlp_norm = make_norm(config, config.n_embd)
        self.mlp = MLP(config)
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self,
        x: torch.Tensor,
        rotation: tuple[torch.Tensor, torch.Tensor] | None,
        cache: Cache | None,
    ) -> torch.Tensor:
        """x (B, T, C) -> (B, T, C)"""
        x = x + self.dropout(self.attn(self.attn_norm(x), rotation, cache))
        return x + self.dropout(self.mlp(self.mlp_norm(x)))


# -- the model -----------------------------------------------------------------------------------


class GPT(nn.Module):
    """Token ids in, logits out."""

    cos: torch.Tensor
    sin: torch.Tensor

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        V, C = config.vocab_size, config.n_embd
        self.token_embedding = nn.Embedding(V, C)
        learned = config.position == "learned"
        self.position_embedding = nn.Embedding(config.context_length, C) if learned else None
        self.dropout = nn.Dropout(config.dropout)
        self.blocks = nn.ModuleList(Block(config, layer) for layer in range(config.n_layer))
        self.final_norm = make_norm(config, C)
        self.head = nn.Linear(C, V, bias=False)
        if config.tie_embeddings:  # the same table reads and writes tokens (arXiv:1608.05859)
            self.head.weight = self.token_embedding.weight
        if not learned:
            # A table of the config, not a weight: never saved, rebuilt from rope_theta.
            with torch.device("cpu"):
                angles = rotary_angles(config).repeat(1, 2)  # (context_length, D)
            dtype = self.head.weight.dtype
            self.register_buffer("cos", angles.cos().to(dtype), persistent=False)
            self.register_buffer("sin", angles.sin().to(dtype), persistent=False)
        self.init_weights()

    @classmethod
    def from_weights(cls, config: ModelConfig, weights: Mapping[str, np.ndarray]) -> GPT:
        """A model with these weights (names of model.py), in evaluation mode.

        Memory never holds two copies: parameters are created without storage, and each takes
        the copy of its array as it is read.
        """
        with torch.device("meta"):
            model = cls(config)
        tensors = {}
        for name, shape in config.weight_shapes.items():
            tensors[name] = torch.empty(shape)  # before the array, whose memory is then reused
            tensors[name].numpy()[...] = weights[name]
        model.load_state_dict(tensors, strict=False, assign=True)
        if config.tie_embeddings:
            model.head.weight = model.token_embedding.weight
        return model.eval()

    @torch.no_grad()
    def init_weights(self) -> None:
        """Every matrix N(0, 0.02), as GPT-2; biases 0; norms 1.

        The 2L matrices that write to the residual stream start smaller by sqrt(2L), so that the
        variance of the stream does not grow with depth (GPT-2 paper, section 2.3).
        """
        for name, parameter in self.named_parameters():
            if parameter.dim() < 2:
                parameter.fill_(0.0 if name.endswith("bias") else 1.0)
                continue
            writes_residual = name.endswith(("attn.out.weight", "mlp.down.weight"))
            shrink = math.sqrt(2 * self.config.n_layer) if writes_residual else 1.0
            nn.init.normal_(parameter, std=0.02 / shrink)

    def hidden(self, tokens: torch.Tensor, cache: Cache | None = None) -> torch.Tensor:
        """The residual stream after the last block, normalised: what the head reads.

        tokens (B, T) int64 -> (B, T, C). With a cache, `tokens` continue what it holds.
        """
        T, limit = tokens.size(1), self.config.context_length
        at = slice(T) if cache is None else cache.positions(T)  # a slice of T positions, or (B, T)
        if isinstance(at, slice):  # reading a tensor would make the host wait for the GPU
            assert at.stop <= limit, f"{at.stop} positions, but the context is {limit}"
        x = self.token_embedding(tokens)  # (B, T, C)
        rotation = None
        if self.position_embedding is not None:
            x = x + self.position_embedding.weight[at]  # (T, C) or (B, T, C)
        else:
            cos, sin = self.cos[at].to(x.dtype), self.sin[at].to(x.dtype)
            rotation = cos.unsqueeze(-3), sin.unsqueeze(-3)  # (1, T, D) or (B, 1, T, D)
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x, rotation, cache)
        if cache is not None:
            cache.advance(tokens.size(1))
        return self.final_norm(x)

    def forward(
        self,
        tokens: torch.Tensor,
        *,
        cache: Cache | None = None,
        positions: slice | torch.Tensor = slice(None),
    ) -> torch.Tensor:
        """Logits of the next token at the positions asked for (all of them by default).

        tokens (B, T) -> (B, T', V). `positions=slice(-1, None)` is all that sampling needs, and
        saves the largest matrix product of a small model for the other T - 1.
        """
        return self.head(self.hidden(tokens, cache)[:, positions])


def crop_positions(weights: Mapping[str, np.ndarray], config: ModelConfig):
    """The weights for a shorter context: of learned positions, only the first remain."""
    name = "position_embedding.weight"
    if name not in weights:
        return weights
    return ChainMap({name: weights[name][: config.context_length]}, weights)  # type: ignore


@torch.no_grad()
def load_weights(model: GPT, weights: Mapping[str, np.ndarray]) -> None:
    """Copy NumPy weights (names of model.py) into a model, one after the other."""
    for name, parameter in model.named_parameters():
        parameter.copy_(torch.from_numpy(np.array(weights[name], dtype=np.float32)))
