"""Loss and gradients of the modern shape on a CPU, written out: model.py at twice its speed.

    step = FusedStep(model, RoundedWeights(model, torch.bfloat16))
    loss = step((tokens, targets), scale)

Forward and backward stand here operation by operation, in memory that is reserved once. Matrix
products are torch's, in bfloat16 where the processor multiplies it; everything between two of
them is one compiled loop (kernels.py) instead of five or ten operations of torch. model.py with
autograd is the reference; tests compare the two. This module knows no optimizer and no data.
"""

from __future__ import annotations

import math
import time
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch

from glassgpt.config import ModelConfig
from glassgpt.inference.kernels.compiled import load_kernels
from glassgpt.model import GPT

FUSED_LOGITS = 1 << 22  # numbers at a time, so that large vocabularies never fill the memory
# Positions: the scores of all pairs are kept, more than what is saved elsewhere for long contexts.
_LONGEST_CONTEXT = 1024


def can_fuse(config: ModelConfig) -> bool:
    """Is it a shape that this module knows, and is the compiler installed?"""
    modern = config.family == "qwen3" and config.n_kv_head == config.n_head
    if not (modern and config.n_layer > 0 and config.context_length <= _LONGEST_CONTEXT):
        return False
    try:
        load_kernels("glassgpt.training.fused.kernels")
    except ImportError:
        return False
    return True


def multiplies_bfloat16() -> bool:
    """Has this processor instructions for products of bfloat16? Without, they are slow."""
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


class RoundedWeights:
    """The matrices as the products read them: rounded once a step, for all threads."""

    def __init__(self, model: GPT, dtype: torch.dtype) -> None:
        self.model, self.dtype = model, dtype
        self.refresh()

    @torch.no_grad()
    def refresh(self) -> None:
        """After every change of the model's weights."""

        def rounded(*matrices: torch.Tensor) -> torch.Tensor:
            return torch.cat(matrices).to(self.dtype)

        blocks: Any = self.model.blocks
        self.blocks = [
            (
                rounded(b.attn.qkv.weight),
                rounded(b.attn.out.weight),
                rounded(b.mlp.gate.weight, b.mlp.up.weight),
                rounded(b.mlp.down.weight),
            )
            for b in blocks
        ]
        self.head = rounded(self.model.head.weight)


class Buffer(NamedTuple):
    """Memory that both see: torch as numbers, the kernels as float32 or bits of bfloat16."""

    tensor: torch.Tensor
    array: np.ndarray

    @classmethod
    def of(cls, dtype: torch.dtype, *shape: int) -> Buffer:
        array = np.empty(shape, np.uint16 if dtype == torch.bfloat16 else np.float32)
        tensor = torch.from_numpy(array)
        return cls(tensor.view(dtype) if dtype == torch.bfloat16 else tensor, array)

    def view(self, *shape: int) -> Buffer:
        return Buffer(self.tensor.view(shape), self.array.reshape(shape))


class SavedActivations:
    """What a block keeps from its forward to its backward pass."""

    def __init__(self, config: ModelConfig, B: int, T: int, low: torch.dtype) -> None:
        N, C, F, H, D = B * T, config.n_embd, config.n_hidden, config.n_head, config.head_dim
        full = torch.float32
        self.x, self.x_inverse = Buffer.of(full, N, C), Buffer.of(full, N)
        self.x_normed, self.qkv = Buffer.of(low, N, C), Buffer.of(low, N, 3 * H * D)
        self.q, self.k, self.v = (Buffer.of(low, B * H, T, D) for _ in range(3))
        self.qk_inverse = Buffer.of(full, N, 2 * H)
        self.pattern, self.y = Buffer.of(low, B * H, T, T), Buffer.of(low, N, H * D)
        self.mid, self.mid_inverse = Buffer.of(full, N, C), Buffer.of(full, N)
        self.mid_normed = Buffer.of(low, N, C)
        self.gate_up, self.hidden = Buffer.of(low, N, 2 * F), Buffer.of(low, N, F)


class Workspace:
    """All memory of a step for B rows of T tokens."""

    def __init__(self, config: ModelConfig, B: int, T: int, low: torch.dtype) -> None:
        N, C, F, H, D = B * T, config.n_embd, config.n_hidden, config.n_head, config.head_dim
        V, full = config.vocab_size, torch.float32
        self.size = B, T
        self.blocks = [SavedActivations(config, B, T, low) for _ in range(config.n_layer)]
        self.x, self.dx = Buffer.of(full, N, C), Buffer.of(full, N, C)
        self.inverse = Buffer.of(full, N)
        self.zeros, self.branch = Buffer.of(low, N, C), Buffer.of(low, N, C)
        self.normed, self.dnormed = Buffer.of(low, N, C), Buffer.of(low, N, C)
        self.zeros.tensor.zero_()
        self.scores, self.dropped = (Buffer.of(low, B * H, T, T) for _ in range(2))
        self.by_head, self.dq, self.dk, self.dv = (Buffer.of(low, B * H, T, D) for _ in range(4))
        self.dy, self.dqkv = Buffer.of(low, N, H * D), Buffer.of(low, N, 3 * H * D)
        self.dhidden, self.dgate_up = Buffer.of(low, N, F), Buffer.of(low, N, 2 * F)
        self.logits = Buffer.of(low, max(1, min(N, FUSED_LOGITS // V)), V)


class FusedStep:
    """Adds the gradients of rows of tokens to a model's; one for each thread."""

    def __init__(self, model: GPT, weights: RoundedWeights) -> None:
        self.model, self.config, self.weights = model, model.config, weights
        self.blocks: list[Any] = list(model.blocks)
        self.k: Any = load_kernels("glassgpt.training.fused.kernels")
        self.eps = np.float32(model.config.norm_eps)
        half = model.config.head_dim // 2
        self.cos, self.sin = (
            np.ascontiguousarray(table[:, :half].numpy()) for table in (model.cos, model.sin)
        )
        self.scale = np.float32(1 / math.sqrt(model.config.head_dim))
        self.workspace: Workspace | None = None
        self.seconds = np.zeros(2)  # forward, backward (with the head and its loss)

    @torch.no_grad()
    def __call__(self, batch: Sequence[np.ndarray], scale: float, seed: int = 0) -> float:
        """`batch`: tokens and targets (B, T) -> the loss, summed over the targets, in nats.

        Gradients are those of the loss times `scale`; negative targets carry none. `seed` decides
        what dropout drops. Every row is one text: packed rows are not for this step.
        """
        started, (B, T) = time.perf_counter(), batch[0].shape
        tokens, targets = (np.ascontiguousarray(ids).reshape(-1) for ids in batch)
        if self.workspace is None or self.workspace.size != (B, T):
            self.workspace = None  # goes first: never memory for two
            self.workspace = Workspace(self.config, B, T, self.weights.dtype)
        self.seed = seed & 0xFFFFFFFF
        self._forward(self.workspace, tokens)
        forward = time.perf_counter()
        loss = self._head(self.workspace, targets, scale)
        self._backward(self.workspace, tokens)
        self.seconds += (forward - started, time.perf_counter() - forward)
        return loss

    # -- forward ---------------------------------------------------------------------------------

    def _forward(self, space: Workspace, tokens: np.ndarray) -> None:
        """tokens (N,) -> space.normed (N, C), what the head reads."""
        self.k.gather_embeddings(tokens, _array(self.model.token_embedding.weight), space.dx.array)
        self._drop(space.dx, place=-1)
        x, branch = space.dx, space.zeros
        for layer in range(self.config.n_layer):
            x, branch = self._block(layer, space, x, branch)
        norm: Any = self.model.final_norm.weight
        self._add_norm(x, branch, norm, space.x, space.normed, space.inverse)

    def _block(
        self, layer: int, space: Workspace, x: Buffer, branch: Buffer
    ) -> tuple[Buffer, Buffer]:
        """`Block.forward` for a stream whose last branch is not added yet; so is what it gives."""
        block, kept = self.blocks[layer], space.blocks[layer]
        qkv, out, gate_up, down = self.weights.blocks[layer]
        self._add_norm(x, branch, block.attn_norm.weight, kept.x, kept.x_normed, kept.x_inverse)
        torch.mm(kept.x_normed.tensor, qkv.T, out=kept.qkv.tensor)
        self._attention(layer, space)
        torch.mm(kept.y.tensor, out.T, out=space.branch.tensor)
        self._drop(space.branch, place=3 * layer)
        norm, normed = block.mlp_norm.weight, (kept.mid, kept.mid_normed, kept.mid_inverse)
        self._add_norm(kept.x, space.branch, norm, *normed)
        torch.mm(kept.mid_normed.tensor, gate_up.T, out=kept.gate_up.tensor)
        self.k.swiglu(kept.gate_up.array, kept.hidden.array)
        torch.mm(kept.hidden.tensor, down.T, out=space.branch.tensor)
        self._drop(space.branch, place=3 * layer + 1)
        return kept.mid, space.branch

    def _attention(self, layer: int, space: Workspace) -> None:
        """kept.qkv -> kept.y, by the formula: for short contexts the scores fit in the cache."""
        kept, attn = space.blocks[layer], self.blocks[layer].attn
        how = _array(attn.q_norm.weight), _array(attn.k_norm.weight), self.cos, self.sin, self.eps
        q, k, v = self._by_head(kept.q, kept.k, kept.v)
        self.k.heads(kept.qkv.array, *how, q, k, v, kept.qk_inverse.array)
        torch.bmm(kept.q.tensor, kept.k.tensor.mT, out=space.scores.tensor)
        self.k.causal_softmax(space.scores.array, self.scale, kept.pattern.array)
        pattern = self._drop(kept.pattern, place=3 * layer + 2, into=space.dropped)
        torch.bmm(pattern.tensor, kept.v.tensor, out=space.by_head.tensor)
        self._merged(kept.y).copy_(self._by_head(space.by_head, tensor=True)[0].transpose(1, 2))

    def _head(self, space: Workspace, targets: np.ndarray, scale: float) -> float:
        """The loss; leaves the gradient of what the head reads in space.dnormed."""
        head, loss, at_once = self.model.head.weight, 0.0, len(space.logits.array)
        for first in range(0, len(targets), at_once):
            rows = slice(first, min(first + at_once, len(targets)))
            logits = space.logits.tensor[: rows.stop - first]
            normed = space.normed.tensor[rows]
            torch.mm(normed, self.weights.head.T, out=logits)
            loss += self.k.cross_entropy(
                space.logits.array[: len(logits)], targets[rows], np.float32(scale)
            )
            torch.mm(logits, self.weights.head, out=space.dnormed.tensor[rows])
            _add(head, logits.T @ normed)
        return loss

    # -- backward --------------------------------------------------------------------------------

    def _backward(self, space: Workspace, tokens: np.ndarray) -> None:
        """From space.dnormed, the gradient of what the head reads, back to the embeddings."""
        norm: Any = self.model.final_norm.weight
        space.dx.array.fill(0)
        self._norm_backward(norm, space.x, space.inverse, space)
        for layer in reversed(range(self.config.n_layer)):
            self._block_backward(layer, space)
        self._drop(space.dx, place=-1)
        table = _gradient(self.model.token_embedding.weight)
        self.k.gather_embeddings_backward(tokens, space.dx.array, table)

    def _block_backward(self, layer: int, space: Workspace) -> None:
        """space.dx and, rounded, space.branch: gradient behind the block -> before it."""
        k, block, kept = self.k, self.blocks[layer], space.blocks[layer]
        qkv, out, gate_up, down = self.weights.blocks[layer]
        mlp, attn, d = block.mlp, block.attn, space.branch.tensor
        self._drop(space.branch, place=3 * layer + 1)
        _add(mlp.down.weight, d.T @ kept.hidden.tensor)
        torch.mm(d, down, out=space.dhidden.tensor)
        k.swiglu_backward(kept.gate_up.array, space.dhidden.array, space.dgate_up.array)
        both = space.dgate_up.tensor.T @ kept.mid_normed.tensor
        _add(mlp.gate.weight, both[: self.config.n_hidden])
        _add(mlp.up.weight, both[self.config.n_hidden :])
        torch.mm(space.dgate_up.tensor, gate_up, out=space.dnormed.tensor)
        self._norm_backward(block.mlp_norm.weight, kept.mid, kept.mid_inverse, space)
        self._drop(space.branch, place=3 * layer)
        _add(attn.out.weight, d.T @ kept.y.tensor)
        torch.mm(d, out, out=space.dy.tensor)
        self._attention_backward(layer, space)
        _add(attn.qkv.weight, space.dqkv.tensor.T @ kept.x_normed.tensor)
        torch.mm(space.dqkv.tensor, qkv, out=space.dnormed.tensor)
        self._norm_backward(block.attn_norm.weight, kept.x, kept.x_inverse, space)

    def _attention_backward(self, layer: int, space: Workspace) -> None:
        """space.dy -> space.dqkv"""
        kept, attn = space.blocks[layer], self.blocks[layer].attn
        dy, scores, place = space.by_head.tensor, space.scores, 3 * layer + 2
        self._by_head(space.by_head, tensor=True)[0].copy_(self._merged(space.dy).transpose(1, 2))
        pattern = self._drop(kept.pattern, place=place, into=space.dropped)
        torch.bmm(pattern.tensor.mT, dy, out=space.dv.tensor)
        torch.bmm(dy, kept.v.tensor.mT, out=scores.tensor)
        self._drop(scores, place=place)
        self.k.causal_softmax_backward(kept.pattern.array, scores.array, self.scale)
        torch.bmm(scores.tensor, kept.k.tensor, out=space.dq.tensor)
        torch.bmm(scores.tensor.mT, kept.q.tensor, out=space.dk.tensor)
        gradients = self._by_head(space.dq, space.dk, space.dv)
        how = _array(attn.q_norm.weight), _array(attn.k_norm.weight), self.cos, self.sin
        into = space.dqkv.array, _gradient(attn.q_norm.weight), _gradient(attn.k_norm.weight)
        self.k.heads_backward(*gradients, kept.qkv.array, *how, kept.qk_inverse.array, *into)

    # -- small things ----------------------------------------------------------------------------

    def _add_norm(self, x: Buffer, branch: Buffer, weight: torch.Tensor, *into: Buffer) -> None:
        """`into`: x + branch, its RMSNorm, and 1 / root mean square of each row."""
        outputs = (buffer.array for buffer in into)
        self.k.add_norm(x.array, branch.array, _array(weight), self.eps, *outputs)

    def _norm_backward(
        self, weight: torch.Tensor, y: Buffer, inverse: Buffer, space: Workspace
    ) -> None:
        """space.dnormed joins space.dx, whose rounded copy in space.branch the next branch reads"""
        known = space.dnormed.array, y.array, _array(weight), inverse.array
        self.k.norm_backward(*known, space.dx.array, _gradient(weight), space.branch.array)

    def _drop(self, x: Buffer, place: int, into: Buffer | None = None) -> Buffer:
        """Dropout, in place or `into` other memory: the same at the same `place` of a step."""
        if not self.config.dropout:
            return x
        y, key = into or x, (self.seed + (place + 2) * 0x632BE59B) & 0xFFFFFFFF
        self.k.drop(x.array.reshape(-1), y.array.reshape(-1), np.uint32(key), self.config.dropout)
        return y

    def _by_head(self, *buffers: Buffer, tensor: bool = False) -> list[Any]:
        """(B * H, T, D) as (B, H, T, D)"""
        assert self.workspace is not None
        B, T = self.workspace.size
        views = [buffer.view(B, self.config.n_head, T, self.config.head_dim) for buffer in buffers]
        return [view.tensor if tensor else view.array for view in views]

    def _merged(self, buffer: Buffer) -> torch.Tensor:
        """(N, H * D) as (B, T, H, D)"""
        assert self.workspace is not None
        return buffer.tensor.view(*self.workspace.size, self.config.n_head, self.config.head_dim)


def _array(parameter: torch.Tensor) -> np.ndarray:
    return parameter.detach().numpy()


def _gradient(parameter: torch.Tensor) -> np.ndarray:
    if parameter.grad is None:
        parameter.grad = torch.zeros_like(parameter)
    return parameter.grad.numpy()


def _add(parameter: torch.Tensor, gradient: torch.Tensor) -> None:
    if parameter.grad is None:
        parameter.grad = gradient.float()
    else:
        parameter.grad += gradient
