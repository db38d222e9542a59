"""What one optimizer step does: which parameters decay, at what rate they learn, and when.

    optimizer = make_optimizer(model, config); lr = learning_rate_at(step, config)

Schedules are pure functions of the step, so resuming needs no stored state. This room knows no
data, loss or file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping

import numpy as np
import torch

from glassgpt.config import TrainConfig


def learning_rate_at(step: int, config: TrainConfig) -> float:
    """Linear warm-up to the peak, then the decay of `config.schedule` down to the minimum."""
    peak = config.learning_rate
    lowest = peak / 10 if config.min_learning_rate is None else config.min_learning_rate
    if step < config.warmup_steps:
        return peak * (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return peak
    end = config.decay_steps or config.max_steps
    done = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
    remaining = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return lowest + (peak - lowest) * remaining


def make_optimizer(model: torch.nn.Module, config: TrainConfig) -> torch.optim.AdamW:
    """AdamW (arXiv:1711.05101) with weight decay on matrices only.

    Biases and norm weights are few and have no direction to shrink along; embeddings are matrices
    and decay, as in nanoGPT. The fused kernel updates all parameters in one pass over memory.
    """
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    groups = [
        {"params": matrices, "weight_decay": config.weight_decay},
        {"params": vectors, "weight_decay": 0.0},
    ]
    return torch.optim.AdamW(
        groups,
        lr=config.learning_rate,
        betas=(config.beta1, config.beta2),
        fused=next(model.parameters()).device.type in ("cpu", "cuda", "mps"),
    )


_ADAM_STATE = ("exp_avg", "exp_avg_sq", "step")


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module
) -> dict[str, np.ndarray]:
    """What AdamW remembers, as "exp_avg.NAME-OF-PARAMETER" and so on; before its first step zeros,
    from which it would go on in the same way."""
    return {
        f"{key}.{name}": np.asarray(optimizer.state[parameter][key].cpu())
        if parameter in optimizer.state
        else np.zeros(() if key == "step" else tuple(parameter.shape), np.float32)
        for name, parameter in model.named_parameters()
        for key in _ADAM_STATE
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer, model: torch.nn.Module, tensors: Mapping[str, np.ndarray]
) -> None:
    """Take back what `optimizer_tensors` gave."""
    for name, parameter in model.named_parameters():
        parts = {key: torch.from_numpy(np.array(tensors[f"{key}.{name}"])) for key in _ADAM_STATE}
        optimizer.state[parameter] = {
            key: part.to(parameter.device) if part.dim() else part for key, part in parts.items()
        }


def set_learning_rate(optimizer: torch.optim.Optimizer, learning_rate: float) -> None:
    for group in optimizer.param_groups:
        group["lr"] = learning_rate
