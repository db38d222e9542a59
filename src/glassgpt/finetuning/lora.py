"""LoRA: leave a model's matrices as they are and learn a small correction to each.

    add_lora(model, LoRA(rank=8, alpha=16)); model.blocks[0].mlp.up.a[0].shape  # (8, n_embd)

Finetuning moves a matrix W (out, in) in few directions: a product B A of B (out, r) and A (r, in)
with r of 4 to 64 is enough (arXiv:2106.09685). So W is frozen, and in

    y = x W^T + (alpha / r) (x A^T) B^T

only A and B learn: about a hundredth of the numbers, so gradients and optimizer state are as small.
A starts random and B zero, so at first nothing changes. After training the product can be added to
W, and the model runs as fast as before. W does not change, so it may be held in 16 or 8 bits.
This module knows model.py's blocks, and no optimizer, loss or file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F

from glassgpt.checkpoints.tensors import Lazy
from glassgpt.config import FinetuneConfig, ModelConfig
from glassgpt.errors import UserError
from glassgpt.model import GPT


@dataclass(frozen=True)
class LoRA:
    """Which matrices are adapted, and how."""

    rank: int  # r, the width between A and B
    alpha: float  # the correction counts alpha / rank, so that another rank needs no other rate
    targets: tuple[str, ...] = ()  # of config.LORA_TARGETS; () for all that the model has
    dropout: float = 0.0  # share of the correction's inputs that is dropped in training
    base_weights: Literal["float32", "bfloat16", "int8"] = "float32"  # how W is held

    @classmethod
    def from_config(cls, config: FinetuneConfig) -> LoRA:
        """What the options say; `lora_rank` must be set."""
        assert config.lora_rank is not None
        alpha = config.lora_alpha or 2.0 * config.lora_rank
        return cls(
            config.lora_rank, alpha, config.lora_targets, config.lora_dropout, config.base_weights
        )


# -- one matrix ----------------------------------------------------------------------------------


def _restored(weight: torch.Tensor, scale: torch.Tensor | None, dtype: torch.dtype) -> torch.Tensor:
    """The frozen matrix in numbers of `dtype`; (out, in), scale (out, 1) -> (out, in)"""
    return (weight if scale is None else weight * scale).to(dtype)


class _FrozenProduct(torch.autograd.Function):
    """x W^T + bias, which keeps W for the backward pass in the precision it is held in.

    Autograd by itself would keep a float copy of every matrix from the forward to the backward
    pass, so holding W in fewer bits would save nothing.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: torch.Tensor,
        weight: torch.Tensor,
        scale: torch.Tensor | None,
        bias: torch.Tensor | None,
    ) -> torch.Tensor:
        """x (..., in), weight (out, in), scale (out, 1), bias (out) -> (..., out)"""
        ctx.save_for_backward(weight, scale)
        return F.linear(x, _restored(weight, scale, x.dtype), bias if bias is None else bias.to(x))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, dy: torch.Tensor) -> tuple[torch.Tensor | None, ...]:
        """(..., out) -> (..., in); what is frozen gets no gradient"""
        weight, scale = ctx.saved_tensors
        return dy @ _restored(weight, scale, dy.dtype), None, None, None


class AdaptedLinear(nn.Module):
    """A frozen nn.Linear with its low-rank correction, or without one where it is no target.

    `weight` (out, in) and `bias` (out) keep their names. `a` (r, in) and `b` (rows, r) come once
    for the whole matrix, or for each of several stacks of rows (q, k and v), as others store them.
    """

    def __init__(self, plain: nn.Linear, lora: LoRA, rows: Sequence[int]) -> None:
        """`rows`: how many each stack has, from the top; () for a matrix without correction."""
        super().__init__()
        weight, scale = plain.weight.detach(), None
        if lora.base_weights == "int8":  # -127..127, times a scale of each row
            scale = weight.abs().amax(dim=1, keepdim=True) / 127
            weight = (weight / scale.where(scale > 0, 1)).round().to(torch.int8)
        elif lora.base_weights == "bfloat16":
            weight = weight.to(torch.bfloat16)
        # Parameters, not buffers: workers share the former among their copies of a model.
        self.weight = nn.Parameter(weight, requires_grad=False)
        self.scale = None if scale is None else nn.Parameter(scale, requires_grad=False)
        bias = plain.bias
        self.bias = None if bias is None else nn.Parameter(bias.detach(), requires_grad=False)
        new = partial(torch.empty, device=weight.device)
        self.a = nn.ParameterList(new(lora.rank, weight.size(1)) for _ in rows)
        self.b = nn.ParameterList(new(height, lora.rank).zero_() for height in rows)
        for a in self.a:  # as PEFT: uniform, up to 1 / sqrt(in)
            nn.init.kaiming_uniform_(a, a=math.sqrt(5))
        self.factor, self.dropout = lora.alpha / lora.rank, lora.dropout
        self.training = plain.training

    def pairs(self) -> list[tuple[nn.Parameter, nn.Parameter]]:
        """A (r, in) and B (rows, r) of each stack; none where there is no correction."""
        return list(zip(self.a, self.b, strict=True))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x (..., in) -> (..., out)"""
        if torch.is_autocast_enabled(x.device.type):
            x = x.to(torch.get_autocast_dtype(x.device.type))
        y: Any = _FrozenProduct.apply(x, self.weight, self.scale, self.bias)  # (..., out)
        if not self.pairs():
            return y
        x = F.dropout(x, self.dropout, self.training)
        parts = [F.linear(F.linear(x, a) * self.factor, b) for a, b in self.pairs()]
        return y + (parts[0] if len(parts) == 1 else torch.cat(parts, dim=-1))

    @torch.no_grad()
    def dense(self) -> torch.Tensor:
        """W with the correction added, (out, in) float32."""
        weight = _restored(self.weight, self.scale, torch.float32)
        if not self.pairs():
            return weight
        return weight + self.factor * torch.cat([b @ a for a, b in self.pairs()])


# -- a model -------------------------------------------------------------------------------------


def add_lora(model: GPT, lora: LoRA) -> None:
    """Freeze a model and give the matrices of its blocks corrections; only these can learn then.

    Matrices that are no target are held in `base_weights` as well; embeddings, norms and head
    stay float32. Random numbers come from torch's generator. Raises `UserError` for a target that
    the model does not have.
    """
    modules = model.blocks.named_modules()  # "0.attn.qkv"
    linears = {path: module for path, module in modules if isinstance(module, nn.Linear)}
    if not linears:
        raise UserError("lora_rank: a model without blocks has no matrices to adapt")
    there = list(dict.fromkeys(path.rpartition(".")[2] for path in linears))
    if missing := [target for target in lora.targets if target not in there]:
        raise UserError(f"lora_targets={missing[0]}: this model has {', '.join(there)}")
    model.requires_grad_(False)
    for path in list(linears):
        linear, name = linears.pop(path), path.rpartition(".")[2]  # to let go of it
        wanted = name in (lora.targets or there)
        rows = _stacks(model.config, name, linear.out_features) if wanted else ()
        model.blocks.set_submodule(path, AdaptedLinear(linear, lora, rows))


def _stacks(config: ModelConfig, name: str, rows: int) -> tuple[int, ...]:
    """Rows that have a pair of their own: Llama's q, k and v are three matrices elsewhere."""
    return config.qkv_rows if name == "qkv" and config.family != "gpt2" else (rows,)


def merged_weights(model: GPT) -> Mapping[str, np.ndarray]:
    """The weights of a plain model that computes the same, under the names of model.py.

    Each is float32 and is made when it is asked for, so that there is never a second copy of the
    model; one without correction may share the model's memory. Works for models without LoRA, too.
    """

    def make(name: str) -> np.ndarray:
        path, _, kind = name.rpartition(".")
        module = model.get_submodule(path)
        tensor = getattr(module, kind)
        if isinstance(module, AdaptedLinear) and kind == "weight":
            tensor = module.dense()
        return tensor.detach().float().cpu().numpy()

    return Lazy({name: partial(make, name) for name in model.config.weight_shapes})


def adapter_tensors(model: GPT) -> dict[str, np.ndarray]:
    """Copies of what is learned: blocks.0.attn.qkv.a.0 (r, in), blocks.0.attn.qkv.b.0 (rows, r)."""
    return {
        f"{path}.{name}": parameter.detach().cpu().numpy().copy()
        for path, module in model.named_modules()
        if isinstance(module, AdaptedLinear)
        for name, parameter in module.named_parameters()
        if name.startswith(("a.", "b."))
    }
