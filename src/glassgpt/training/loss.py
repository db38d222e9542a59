"""What training minimises, in a fraction of the memory that its logits would take.

    loss = NextTokenLoss(model, recompute=True); loss(tokens, targets).backward()

Of everything that a step keeps, the logits are the largest: with GPT-2's vocabulary 50,257 numbers
a token, three times over. So they are made for some rows at a time, turned into gradients at once
and thrown away. This module knows of a GPT its `hidden`, `head` and `blocks`, and nothing of
optimizers, batches and scaling.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from types import MethodType
from typing import Any, Literal

import torch
import torch.nn as nn
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from glassgpt.cache import Packing
from glassgpt.data.batches import IGNORE
from glassgpt.model import GPT, Block

# Numbers in the logits that exist at a time; in float32 256 MB, and up to three such tensors.
CHUNK_LOGITS = 1 << 26


class NextTokenLoss(nn.Module):
    """A GPT as training calls it: compiled, in DDP, under autocast, or as it is.

    Its parameters are the model's; what is saved is `model`, by the model's own names.
    """

    def __init__(
        self,
        model: GPT,
        *,
        chunk_logits: int = CHUNK_LOGITS,
        pad_vocab_to: int | Literal["auto"] | None = "auto",
        recompute: bool = False,
        class_weights: torch.Tensor | None = None,
    ) -> None:
        """At most `chunk_logits` numbers of the (B*T, V) logits exist at a time (or one row).

        `pad_vocab_to` rounds V up to a multiple inside the computation, because a GPU's matrix
        units want aligned rows; "auto" does so on CUDA only, with 64. `recompute` keeps no more
        of a block than its input, and computes the rest again in the backward pass: a third more
        work, and the activations of one block instead of all (arXiv:1604.06174). `class_weights`
        (V,) multiply the loss of targets, where the head tells classes apart and not tokens.
        """
        super().__init__()
        self.model, self.chunk_logits = model, chunk_logits
        if pad_vocab_to == "auto":
            pad_vocab_to = 64 if model.head.weight.is_cuda else None
        self.padding = -len(model.head.weight) % pad_vocab_to if pad_vocab_to else 0
        self.class_weights = class_weights
        for block in model.blocks:  # not by modules around them, which would rename parameters
            block.forward = MethodType(_recomputed if recompute else Block.forward, block)
        self._in_chunks: Any = _loss_in_chunks

    def ready_to_compile(self) -> NextTokenLoss:
        """This loss, ready for torch.compile, which would unroll the loop over chunks and take
        minutes for 85 of them; so it compiles a chunk. To be called only then: it loads the
        compiler."""
        self._in_chunks = torch.compiler.disable(_loss_in_chunks)  # type: ignore
        return self

    def forward(
        self, tokens: torch.Tensor, targets: torch.Tensor, positions: torch.Tensor | None = None
    ) -> torch.Tensor:
        """Cross-entropy in nats, summed over the targets that count; those of -100 do not.

        tokens (B, T), targets (B, T) int64 -> () float32. `positions` (B, T): several texts share
        a row, see `Packing`; of such rows many targets don't count, and get no logits.
        """
        packing = None if positions is None else Packing(positions)
        hidden = self.model.hidden(tokens, packing).flatten(0, 1)  # (B*T, C)
        targets, weight = targets.flatten(), self.model.head.weight  # (B*T), (V, C)
        if packing is not None:
            counts = (targets != IGNORE).nonzero()[:, 0]  # (N)
            hidden, targets = hidden[counts], targets[counts]  # (N, C), (N)
        if torch.is_autocast_enabled(hidden.device.type):
            hidden = hidden.to(torch.get_autocast_dtype(hidden.device.type))
        if self.padding:
            weight = F.pad(weight, (0, 0, 0, self.padding))  # (V + padding, C)
        if self.class_weights is not None:
            logits = F.linear(hidden, self.model.head.weight.to(hidden.dtype)).float()
            return F.cross_entropy(logits, targets, self.class_weights, reduction="sum")
        V, N, n_chunks = len(self.model.head.weight), len(hidden), 1
        # A power of two, as batches mostly are: chunks of equal size are compiled once.
        while n_chunks < N and math.ceil(N / n_chunks) * len(weight) > self.chunk_logits:
            n_chunks *= 2
        if n_chunks == 1:
            return _loss(hidden, weight.to(hidden.dtype), targets, V)
        compiled = torch.compiler.is_compiling()
        return self._in_chunks(hidden, weight, targets, V, n_chunks, compiled)


def _loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, V: int
) -> torch.Tensor:
    """hidden (N, C), weight (V or more, C), targets (N) -> ()"""
    logits = F.linear(hidden, weight)[:, :V].float()  # (N, V)
    return F.cross_entropy(logits, targets, reduction="sum")


def _gradients_and_loss(
    hidden: torch.Tensor, weight: torch.Tensor, targets: torch.Tensor, V: int, both: bool
) -> tuple[tuple[torch.Tensor, ...], torch.Tensor]:
    """hidden (N, C), weight (V or more, C), targets (N) -> the gradients of hidden and, where
    `both` learn, of weight; and the loss ()"""
    learning = (0, 1) if both else (0,)
    return torch.func.grad_and_value(_loss, argnums=learning)(hidden, weight, targets, V)


@functools.cache
def _compiled(function: Callable[..., Any]) -> Callable[..., Any]:
    return torch.compile(function, dynamic=False)


def _loss_in_chunks(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    targets: torch.Tensor,
    V: int,
    n_chunks: int,
    compiled: bool,
) -> torch.Tensor:
    """hidden (N, C), weight (V or more, C), targets (N) -> ()"""
    if torch.is_grad_enabled():
        work = _compiled(_gradients_and_loss) if compiled else _gradients_and_loss
        return _ChunkedLoss.apply(hidden, weight, targets, V, n_chunks, work)  # type: ignore
    work, weight = _compiled(_loss) if compiled else _loss, weight.to(hidden.dtype)
    chunks = zip(hidden.chunk(n_chunks), targets.chunk(n_chunks), strict=True)
    return torch.stack([work(rows, weight, wanted, V) for rows, wanted in chunks]).sum()


class _ChunkedLoss(torch.autograd.Function):
    """`_loss` without keeping the logits.

    Nothing but scaling follows the loss, so its gradient is known up to a factor in the forward
    pass already; taken there, logits need not be made twice (as in Liger Kernel,
    arXiv:2410.10989).
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        targets: torch.Tensor,
        V: int,
        n_chunks: int,
        gradients_and_loss: Callable[..., Any],
    ) -> torch.Tensor:
        """hidden (N, C), weight (V or more, C), targets (N) -> ()"""
        loss, both = torch.zeros((), device=hidden.device), ctx.needs_input_grad[1]
        d_hidden, d_weight = [], torch.zeros_like(weight) if both else None  # float32, as kept
        weight = weight.to(hidden.dtype)
        for rows, wanted in zip(hidden.chunk(n_chunks), targets.chunk(n_chunks), strict=True):
            (d_rows, *d_part), part = gradients_and_loss(rows, weight, wanted, V, both)
            loss += part
            d_hidden.append(d_rows)
            if d_weight is not None:
                d_weight += d_part[0]
        ctx.save_for_backward(torch.cat(d_hidden), d_weight)
        return loss

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, d_loss: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """() -> (N, C), (V or more, C)"""
        d_hidden, d_weight = ctx.saved_tensors
        d_weight = None if d_weight is None else d_weight * d_loss
        return d_hidden * d_loss, d_weight, None, None, None, None


def _recomputed(block: Block, *inputs: Any) -> torch.Tensor:
    """A block's `forward`, which in training keeps nothing but its inputs."""
    if not (block.training and torch.is_grad_enabled()):
        return Block.forward(block, *inputs)
    return checkpoint(Block.forward, block, *inputs, use_reentrant=False)  # type: ignore
