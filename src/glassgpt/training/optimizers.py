"""What one optimizer step does: which parameters decay, at what rate they learn, and when.

    optimizers = make_optimizers(model, config); lr = learning_rate_at(step, config)

The learning rate is a pure function of the step, so resuming needs no stored state. This module
knows no data, loss or file.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch.optim.adamw import adamw

from glassgpt.config import TrainConfig
from glassgpt.errors import UserError
from glassgpt.model import GPT
from glassgpt.runtime import Workers


def learning_rate_at(step: int, config: TrainConfig, done: float | None = None) -> float:
    """Linear warm-up to the peak, then the decay of `config.schedule` down to the minimum.

    `done`: the share of the training that is behind, where the clock decides and not the steps;
    the decay then begins at once, and the warm-up holds it back.
    """
    peak = config.learning_rate
    lowest = peak / 10 if config.min_learning_rate is None else config.min_learning_rate
    warm = min(1.0, (step + 1) / (config.warmup_steps + 1))
    if done is None:
        if step < config.warmup_steps:
            return peak * warm
        end = config.decay_steps or config.max_steps
        done = min(1.0, (step - config.warmup_steps) / max(1, end - config.warmup_steps))
    if config.schedule == "constant":
        return peak * warm
    remaining = 1 - done if config.schedule == "linear" else (1 + math.cos(math.pi * done)) / 2
    return min(peak * warm, lowest + (peak - lowest) * remaining)


class _Optimizer:
    """Parameters in groups with options, and what is remembered of each.

    Has what GradScaler asks of one. torch's own base class imports torch's compiler, only to be
    left out of what it compiles: a second that a short training doesn't have.
    """

    def __init__(self, groups: Sequence[dict[str, Any]]) -> None:
        self.param_groups = list(groups)
        self.state: dict[torch.nn.Parameter, dict[str, torch.Tensor]] = {}

    def zero_grad(self) -> None:
        for group in self.param_groups:
            for parameter in group["params"]:
                parameter.grad = None


# -- AdamW ---------------------------------------------------------------------------------------


class AdamW(_Optimizer):
    """AdamW (arXiv:1711.05101) by torch's fused kernel: one pass over memory for all parameters."""

    @torch.no_grad()
    def step(self) -> None:
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            kept = [self._state(p) for p in parameters]
            adamw(
                parameters,
                [p.grad for p in parameters if p.grad is not None],
                [state["exp_avg"] for state in kept],
                [state["exp_avg_sq"] for state in kept],
                [],
                [state["step"] for state in kept],
                fused=True,
                amsgrad=False,
                beta1=group["betas"][0],
                beta2=group["betas"][1],
                lr=group["lr"],
                weight_decay=group["weight_decay"],
                eps=1e-8,
                maximize=False,
            )

    def _state(self, p: torch.nn.Parameter) -> dict[str, torch.Tensor]:
        if p not in self.state:
            self.state[p] = {name: torch.zeros_like(p) for name in ("exp_avg", "exp_avg_sq")}
            self.state[p]["step"] = torch.zeros((), device=p.device)
        return self.state[p]


# -- Muon ----------------------------------------------------------------------------------------

# Odd polynomials a x + b x^3 + c x^5, one after the other, that take any x in (0.001, 1] near 1:
# the first four of Polar Express (arXiv:2505.16932). They do what five of Muon's own do. Each sees
# its x made smaller by 2 %: bfloat16 rounds some above 1, where the next one would blow them up.
_MARGIN = 1.02
_POLYNOMIALS = (
    (8.28721201814563, -23.595886519098837, 17.300387312530933),
    (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
    (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    (3.3184196573706015, -2.488488024314874, 0.51004894012372),
)


def orthogonalize(matrices: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """The nearest (semi-)orthogonal matrices, roughly: all singular values become about 1.

    matrices (n, rows, columns) -> the same shape, in `dtype`. A Newton-Schulz iteration, which
    needs matrix products only (Jordan et al., "Muon", 2024).
    """
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    x = (x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)).to(dtype)
    for a, b, c in ((a / _MARGIN, b / _MARGIN**3, c / _MARGIN**5) for a, b, c in _POLYNOMIALS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


class Muon(_Optimizer):
    """Momentum whose update is made orthogonal: every direction of a matrix learns at one pace.

    For the matrices inside the blocks. Queries, keys and values are matrices of their own, though
    they share one tensor (`parts`: rows of each). All matrices of a shape are worked on together,
    divided among the `workers` if there are any. The update of an (m, n) matrix has the spectral
    norm sqrt(max(1, m / n)), so that one learning rate serves all widths (arXiv:2310.17813).
    """

    def __init__(
        self,
        parameters: Sequence[torch.nn.Parameter],
        parts: Sequence[tuple[int, ...]],
        *,
        lr: float,
        momentum: float,
        weight_decay: float,
        dtype: torch.dtype,
        scale: float = 1.0,
        workers: Workers | None = None,
    ) -> None:
        group = {"lr": lr, "scale": scale, "momentum": momentum, "weight_decay": weight_decay}
        super().__init__([group | {"params": list(parameters)}])
        self.dtype, self.workers = dtype, workers
        threads = 1 if workers is None else workers.n
        alike: dict[tuple[int, ...], list[tuple[torch.nn.Parameter, slice]]] = {}
        for parameter, rows in zip(parameters, parts, strict=True):
            self.state[parameter] = {"momentum": torch.zeros_like(parameter)}
            first = 0
            for n in rows:
                place = parameter, slice(first, first + n)
                alike.setdefault((n, parameter.size(1)), []).append(place)
                first += n
        self.groups = [
            places[i::threads] for places in alike.values() for i in range(threads) if places[i:]
        ]

    @torch.no_grad()
    def step(self) -> None:
        if self.workers is None:
            for places in self.groups:
                self._update(places)
            return
        self.workers.results([self.workers.submit(self._update, each) for each in self.groups])

    @torch.no_grad()
    def _update(self, places: list[tuple[torch.nn.Parameter, slice]]) -> None:
        options = self.param_groups[0]
        places = [place for place in places if place[0].grad is not None]
        if not places:
            return
        gradients = torch.stack([p.grad[rows] for p, rows in places if p.grad is not None])
        momenta = [self.state[p]["momentum"][rows] for p, rows in places]
        stacked = torch.stack(momenta).lerp_(gradients, 1 - options["momentum"])
        for momentum, new in zip(momenta, stacked, strict=True):
            momentum.copy_(new)
        updates = orthogonalize(gradients.lerp_(stacked, options["momentum"]), self.dtype)
        rows, columns = updates.shape[1:]
        rate = options["lr"] * max(1.0, rows / columns) ** 0.5
        kept = 1 - options["lr"] * options["weight_decay"]
        for (parameter, part), update in zip(places, updates, strict=True):
            parameter[part].mul_(kept).add_(update, alpha=-rate)


# -- both together -------------------------------------------------------------------------------

Optimizer = AdamW | Muon


def make_optimizers(
    model: GPT,
    config: TrainConfig,
    *,
    layer_decay: float = 1.0,
    low_precision: bool = False,
    workers: Workers | None = None,
) -> list[Optimizer]:
    """AdamW for all that learns, or for all that Muon does not take.

    Weight decay on matrices only: biases and norm weights are few and have no direction to shrink
    along; embeddings are matrices and decay, as in nanoGPT. With `layer_decay` every block learns
    that much slower than the next (ULMFiT, arXiv:1801.06146, section 3.2).
    """
    learning = {name: p for name, p in model.named_parameters() if p.requires_grad}
    scales = {name: _scale(name, model.config.n_layer, layer_decay) for name in learning}
    muons = set()
    if config.optimizer == "muon":  # an adapter's matrices (finetuning/lora.py) have other names
        names = [n for n in learning if n.startswith("blocks.") and n.endswith("weight")]
        muons = {name for name in names if learning[name].dim() >= 2}
    common = {"betas": (config.beta1, config.beta2)}
    groups, optimizers = [], []
    for scale in sorted(set(scales.values()), reverse=True):
        alike = {name: p for name, p in learning.items() if scales[name] == scale}
        rest = [p for name, p in alike.items() if name not in muons]
        how = common | {"lr": config.learning_rate * scale, "scale": scale}
        for decay, two in ((config.weight_decay, True), (0.0, False)):
            if of_kind := [p for p in rest if (p.dim() >= 2) is two]:
                groups.append(how | {"params": of_kind, "weight_decay": decay})
        if hidden := {name: p for name, p in alike.items() if name in muons}:
            optimizers.append(_muon(hidden, model, config, scale, low_precision, workers))
    return [AdamW(groups), *optimizers]


def _scale(name: str, n_layer: int, layer_decay: float) -> float:
    """The factor of a parameter's learning rate: 1 for the head and the norm before it."""
    kind, *rest = name.split(".")
    if kind == "blocks":
        return layer_decay ** (n_layer - 1 - int(rest[0]))
    return layer_decay**n_layer if kind in ("token_embedding", "position_embedding") else 1.0


def _muon(
    hidden: dict[str, torch.nn.Parameter],
    model: GPT,
    config: TrainConfig,
    scale: float,
    low_precision: bool,
    workers: Workers | None,
) -> Muon:
    rows = model.config.qkv_rows
    return Muon(
        list(hidden.values()),
        [rows if name.endswith("qkv.weight") else (len(p),) for name, p in hidden.items()],
        lr=config.muon_learning_rate * scale,
        scale=scale,
        momentum=config.muon_momentum,
        weight_decay=config.weight_decay,
        dtype=torch.bfloat16 if low_precision else torch.float32,
        workers=workers,
    )


_STATE = ("exp_avg", "exp_avg_sq", "step", "momentum")


def optimizer_tensors(
    optimizers: Sequence[Optimizer], model: torch.nn.Module
) -> dict[str, np.ndarray]:
    """What they remember, as "exp_avg.NAME-OF-PARAMETER" and so on; nothing before a first step."""
    state = {p: kept for optimizer in optimizers for p, kept in optimizer.state.items()}
    return {
        f"{key}.{name}": np.asarray(state[parameter][key].cpu())
        for name, parameter in model.named_parameters()
        for key in _STATE
        if key in state.get(parameter, ())
    }


def restore_optimizers(
    optimizers: Sequence[Optimizer],
    model: torch.nn.Module,
    tensors: Mapping[str, np.ndarray],
) -> None:
    """Take back what `optimizer_tensors` gave."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            for p in group["params"]:
                stored = {key: f"{key}.{names[p]}" for key in _STATE}
                found = {key: tensors[name] for key, name in stored.items() if name in tensors}
                if found and isinstance(optimizer, Muon) is not ("momentum" in found):
                    raise UserError("it was trained with another --optimizer; name that one")
                for key, array in found.items():
                    part = torch.from_numpy(np.array(array))
                    optimizer.state.setdefault(p, {})[key] = part.to(p.device)


def set_learning_rate(
    optimizers: Sequence[Optimizer], config: TrainConfig, learning_rate: float
) -> None:
    """`learning_rate` is AdamW's; Muon's rises and falls with it."""
    for optimizer in optimizers:
        muon = isinstance(optimizer, Muon)
        ratio = config.muon_learning_rate / config.learning_rate if muon else 1.0
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * ratio * group["scale"]
