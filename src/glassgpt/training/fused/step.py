"""Loss and gradients of the modern shape on a CPU, written out: model.py at twice its speed.

    step = FusedStep(model, Weights(model, torch.bfloat16)); loss = step(tokens, targets, scale)

Forward and backward stand here operation by operation, in memory that is reserved once: matrix
products are torch's, in bfloat16 where the processor multiplies it; everything between two of
them is one compiled loop (kernels.py) instead of torch's five or ten. model.py with autograd is
the reference, and the tests hold both against each other. It knows no optimizer and no data.
"""

from __future__ import annotations

import math
import time
from typing import Any, NamedTuple

import numpy as np
import torch

from glassgpt.config import ModelConfig
from glassgpt.inference.kernels.compiled import load_kernels
from glassgpt.model import GPT
from glassgpt.training.planning import costs
from glassgpt.training.planning.costs import FUSED_LOGITS


def can_fuse(config: ModelConfig) -> bool:
    """Is it the shape that this room knows, and is the compiler here?"""
    try:
        load_kernels("glassgpt.training.fused.kernels")
    except ImportError:
        return False
    return costs.is_fusible(config)


def multiplies_bfloat16() -> bool:
    """Has this processor instructions for products of bfloat16? Without, they are slow."""
    cpu: Any = torch.cpu
    return any(getattr(cpu, name, bool)() for name in ("_is_avx512_bf16_supported",
                                                       "_is_amx_tile_supported"))  # fmt: skip


class Weights:
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
            (rounded(b.attn.qkv.weight), rounded(b.attn.out.weight),
             rounded(b.mlp.gate.weight, b.mlp.up.weight), rounded(b.mlp.down.weight))
            for b in blocks
        ]  # fmt: skip
        self.head = rounded(self.model.head.weight)


class _Room(NamedTuple):
    """Memory that both see: torch as numbers, the kernels as float32 or bits of bfloat16."""

    tensor: torch.Tensor
    array: np.ndarray

    @classmethod
    def of(cls, dtype: torch.dtype, *shape: int) -> _Room:
        array = np.empty(shape, np.uint16 if dtype == torch.bfloat16 else np.float32)
        tensor = torch.from_numpy(array)
        return cls(tensor.view(dtype) if dtype == torch.bfloat16 else tensor, array)

    def view(self, *shape: int) -> _Room:
        return _Room(self.tensor.view(shape), self.array.reshape(shape))


class _Kept:
    """What a block remembers for the way back."""

    def __init__(self, config: ModelConfig, B: int, T: int, low: torch.dtype) -> None:
        N, C, F, H, D = B * T, config.n_embd, config.n_hidden, config.n_head, config.head_dim
        full = torch.float32
        self.x, self.x_inverse = _Room.of(full, N, C), _Room.of(full, N)
        self.x_normed, self.qkv = _Room.of(low, N, C), _Room.of(low, N, 3 * H * D)
        self.q, self.k, self.v = (_Room.of(low, B * H, T, D) for _ in range(3))
        self.qk_inverse = _Room.of(full, N, 2 * H)
        self.pattern, self.y = _Room.of(low, B * H, T, T), _Room.of(low, N, H * D)
        self.mid, self.mid_inverse = _Room.of(full, N, C), _Room.of(full, N)
        self.mid_normed = _Room.of(low, N, C)
        self.gate_up, self.hidden = _Room.of(low, N, 2 * F), _Room.of(low, N, F)


class _Rooms:
    """All memory of a step for B rows of T tokens."""

    def __init__(self, config: ModelConfig, B: int, T: int, low: torch.dtype) -> None:
        N, C, F, H, D = B * T, config.n_embd, config.n_hidden, config.n_head, config.head_dim
        self.size = B, T
        self.blocks = [_Kept(config, B, T, low) for _ in range(config.n_layer)]
        self.x, self.dx = _Room.of(torch.float32, N, C), _Room.of(torch.float32, N, C)
        self.inverse = _Room.of(torch.float32, N)
        self.nothing, self.branch, self.normed, self.dnormed = (
            _Room.of(low, N, C) for _ in range(4)
        )
        self.nothing.tensor.zero_()
        self.scores, self.dropped = (_Room.of(low, B * H, T, T) for _ in range(2))
        self.by_head, self.dq, self.dk, self.dv = (_Room.of(low, B * H, T, D) for _ in range(4))
        self.dy, self.dqkv = _Room.of(low, N, H * D), _Room.of(low, N, 3 * H * D)
        self.dhidden, self.dgate_up = _Room.of(low, N, F), _Room.of(low, N, 2 * F)
        self.logits = _Room.of(
            low, max(1, min(N, FUSED_LOGITS // config.vocab_size)), config.vocab_size
        )


class FusedStep:
    """Adds the gradients of rows of tokens to a model's; one for each thread."""

    def __init__(self, model: GPT, weights: Weights) -> None:
        self.model, self.config, self.weights = model, model.config, weights
        self.blocks: list[Any] = list(model.blocks)
        self.k: Any = load_kernels("glassgpt.training.fused.kernels")
        self.eps = np.float32(model.config.norm_eps)
        half = model.config.head_dim // 2
        self.cos, self.sin = (
            np.ascontiguousarray(table[:, :half].numpy()) for table in (model.cos, model.sin)
        )
        self.scale = np.float32(1 / math.sqrt(model.config.head_dim))
        self.plain: Any = None  # the model with autograd's loss; whoever evaluates sets it
        self.rooms: _Rooms | None = None
        self.seconds = np.zeros(2)  # forward, backward (with the head and its loss)

    @torch.no_grad()
    def __call__(
        self,
        tokens: np.ndarray,
        targets: np.ndarray,
        scale: float,
        key: int = 0,
        *packing: np.ndarray,
    ) -> float:
        """tokens, targets (B, T) -> the loss, summed over the targets, in nats.

        Gradients are those of the loss times `scale`; negative targets carry none. `key` decides
        what dropout drops. Every row is one text: `packing` is not for this step.
        """
        assert not packing
        started, (B, T) = time.perf_counter(), tokens.shape
        tokens, targets = (np.ascontiguousarray(ids).reshape(-1) for ids in (tokens, targets))
        if self.rooms is None or self.rooms.size != (B, T):
            self.rooms = None  # goes first: never memory for two
            self.rooms = _Rooms(self.config, B, T, self.weights.dtype)
        self.key = key & 0xFFFFFFFF
        self._forward(self.rooms, tokens)
        forward = time.perf_counter()
        loss = self._head(self.rooms, targets, scale)
        self._backward(self.rooms, tokens)
        self.seconds += (forward - started, time.perf_counter() - forward)
        return loss

    # -- forward ---------------------------------------------------------------------------------

    def _forward(self, rooms: _Rooms, tokens: np.ndarray) -> None:
        """tokens (N,) -> rooms.normed (N, C), what the head reads."""
        self.k.embed(tokens, _numbers(self.model.token_embedding.weight), rooms.dx.array)
        self._drop(rooms.dx, place=-1)
        x, branch = rooms.dx, rooms.nothing
        for layer in range(self.config.n_layer):
            x, branch = self._block(layer, rooms, x, branch)
        norm: Any = self.model.final_norm.weight
        self.k.add_norm(x.array, branch.array, _numbers(norm), self.eps, rooms.x.array,
                        rooms.normed.array, rooms.inverse.array)  # fmt: skip

    def _block(self, layer: int, rooms: _Rooms, x: _Room, branch: _Room) -> tuple[_Room, _Room]:
        """`Block.forward` for a stream whose last branch is not added yet; so is what it gives."""
        k, block, kept = self.k, self.blocks[layer], rooms.blocks[layer]
        qkv, out, gate_up, down = self.weights.blocks[layer]
        k.add_norm(x.array, branch.array, _numbers(block.attn_norm.weight), self.eps, kept.x.array,
                   kept.x_normed.array, kept.x_inverse.array)  # fmt: skip
        torch.mm(kept.x_normed.tensor, qkv.T, out=kept.qkv.tensor)
        self._attention(layer, rooms)
        torch.mm(kept.y.tensor, out.T, out=rooms.branch.tensor)
        self._drop(rooms.branch, place=3 * layer)
        k.add_norm(kept.x.array, rooms.branch.array, _numbers(block.mlp_norm.weight), self.eps,
                   kept.mid.array, kept.mid_normed.array, kept.mid_inverse.array)  # fmt: skip
        torch.mm(kept.mid_normed.tensor, gate_up.T, out=kept.gate_up.tensor)
        k.swiglu(kept.gate_up.array, kept.hidden.array)
        torch.mm(kept.hidden.tensor, down.T, out=rooms.branch.tensor)
        self._drop(rooms.branch, place=3 * layer + 1)
        return kept.mid, rooms.branch

    def _attention(self, layer: int, rooms: _Rooms) -> None:
        """kept.qkv -> kept.y, by the formula: for short contexts the scores fit in the cache."""
        kept, attn = rooms.blocks[layer], self.blocks[layer].attn
        self.k.heads(kept.qkv.array, _numbers(attn.q_norm.weight), _numbers(attn.k_norm.weight),
                     self.cos, self.sin, self.eps, *self._by_head(kept.q, kept.k, kept.v),
                     kept.qk_inverse.array)  # fmt: skip
        torch.bmm(kept.q.tensor, kept.k.tensor.mT, out=rooms.scores.tensor)
        self.k.softmax(rooms.scores.array, self.scale, kept.pattern.array)
        pattern = self._drop(kept.pattern, place=3 * layer + 2, into=rooms.dropped)
        torch.bmm(pattern.tensor, kept.v.tensor, out=rooms.by_head.tensor)
        self._merged(kept.y).copy_(self._by_head(rooms.by_head, tensor=True)[0].transpose(1, 2))

    def _head(self, rooms: _Rooms, targets: np.ndarray, scale: float) -> float:
        """The loss; leaves the gradient of what the head reads in rooms.dnormed."""
        head, loss, at_once = self.model.head.weight, 0.0, len(rooms.logits.array)
        for first in range(0, len(targets), at_once):
            rows = slice(first, min(first + at_once, len(targets)))
            logits = rooms.logits.tensor[: rows.stop - first]
            normed = rooms.normed.tensor[rows]
            torch.mm(normed, self.weights.head.T, out=logits)
            loss += self.k.cross_entropy(rooms.logits.array[: len(logits)], targets[rows],
                                         np.float32(scale))  # fmt: skip
            torch.mm(logits, self.weights.head, out=rooms.dnormed.tensor[rows])
            _add(head, logits.T @ normed)
        return loss

    # -- backward --------------------------------------------------------------------------------

    def _backward(self, rooms: _Rooms, tokens: np.ndarray) -> None:
        """From rooms.dnormed, the gradient of what the head reads, back to the embeddings."""
        norm: Any = self.model.final_norm.weight
        rooms.dx.array.fill(0)
        self._norm_backward(norm, rooms.x, rooms.inverse, rooms)
        for layer in reversed(range(self.config.n_layer)):
            self._block_backward(layer, rooms)
        self._drop(rooms.dx, place=-1)
        table = _gradient(self.model.token_embedding.weight)
        self.k.embed_backward(tokens, rooms.dx.array, table)

    def _block_backward(self, layer: int, rooms: _Rooms) -> None:
        """rooms.dx and, rounded, rooms.branch: gradient behind the block -> before it."""
        k, block, kept = self.k, self.blocks[layer], rooms.blocks[layer]
        qkv, out, gate_up, down = self.weights.blocks[layer]
        mlp, attn, d = block.mlp, block.attn, rooms.branch.tensor
        self._drop(rooms.branch, place=3 * layer + 1)
        _add(mlp.down.weight, d.T @ kept.hidden.tensor)
        torch.mm(d, down, out=rooms.dhidden.tensor)
        k.swiglu_backward(kept.gate_up.array, rooms.dhidden.array, rooms.dgate_up.array)
        both = rooms.dgate_up.tensor.T @ kept.mid_normed.tensor
        _add(mlp.gate.weight, both[: self.config.n_hidden])
        _add(mlp.up.weight, both[self.config.n_hidden :])
        torch.mm(rooms.dgate_up.tensor, gate_up, out=rooms.dnormed.tensor)
        self._norm_backward(block.mlp_norm.weight, kept.mid, kept.mid_inverse, rooms)
        self._drop(rooms.branch, place=3 * layer)
        _add(attn.out.weight, d.T @ kept.y.tensor)
        torch.mm(d, out, out=rooms.dy.tensor)
        self._attention_backward(layer, rooms)
        _add(attn.qkv.weight, rooms.dqkv.tensor.T @ kept.x_normed.tensor)
        torch.mm(rooms.dqkv.tensor, qkv, out=rooms.dnormed.tensor)
        self._norm_backward(block.attn_norm.weight, kept.x, kept.x_inverse, rooms)

    def _attention_backward(self, layer: int, rooms: _Rooms) -> None:
        """rooms.dy -> rooms.dqkv"""
        kept, attn = rooms.blocks[layer], self.blocks[layer].attn
        dy, scores, place = rooms.by_head.tensor, rooms.scores, 3 * layer + 2
        self._by_head(rooms.by_head, tensor=True)[0].copy_(self._merged(rooms.dy).transpose(1, 2))
        pattern = self._drop(kept.pattern, place=place, into=rooms.dropped)
        torch.bmm(pattern.tensor.mT, dy, out=rooms.dv.tensor)
        torch.bmm(dy, kept.v.tensor.mT, out=scores.tensor)
        self._drop(scores, place=place)
        self.k.softmax_backward(kept.pattern.array, scores.array, self.scale)
        torch.bmm(scores.tensor, kept.k.tensor, out=rooms.dq.tensor)
        torch.bmm(scores.tensor.mT, kept.q.tensor, out=rooms.dk.tensor)
        self.k.heads_backward(
            *self._by_head(rooms.dq, rooms.dk, rooms.dv), kept.qkv.array,
            _numbers(attn.q_norm.weight), _numbers(attn.k_norm.weight), self.cos, self.sin,
            kept.qk_inverse.array, rooms.dqkv.array, _gradient(attn.q_norm.weight),
            _gradient(attn.k_norm.weight),
        )  # fmt: skip

    def _norm_backward(self, weight: torch.Tensor, y: _Room, inverse: _Room, rooms: _Rooms) -> None:
        """rooms.dnormed joins rooms.dx, whose rounded copy in rooms.branch the next branch reads"""
        self.k.norm_backward(rooms.dnormed.array, y.array, _numbers(weight), inverse.array,
                             rooms.dx.array, _gradient(weight), rooms.branch.array)  # fmt: skip

    # -- small things ----------------------------------------------------------------------------

    def _drop(self, x: _Room, place: int, into: _Room | None = None) -> _Room:
        """Dropout, in place or `into` other memory: the same at the same `place` of a step."""
        if not self.config.dropout:
            return x
        y, key = into or x, (self.key + (place + 2) * 0x632BE59B) & 0xFFFFFFFF
        self.k.drop(x.array.reshape(-1), y.array.reshape(-1), np.uint32(key), self.config.dropout)
        return y

    def _by_head(self, *rooms: _Room, tensor: bool = False) -> list[Any]:
        """(B * H, T, D) as (B, H, T, D)"""
        assert self.rooms is not None
        B, T = self.rooms.size
        views = [room.view(B, self.config.n_head, T, self.config.head_dim) for room in rooms]
        return [view.tensor if tensor else view.array for view in views]

    def _merged(self, room: _Room) -> torch.Tensor:
        """(N, H * D) as (B, T, H, D)"""
        assert self.rooms is not None
        return room.tensor.view(*self.rooms.size, self.config.n_head, self.config.head_dim)


def _numbers(parameter: torch.Tensor) -> np.ndarray:
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
