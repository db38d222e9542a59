"""The learning rate at every step, which parameters decay, and what Muon makes of a gradient."""

from __future__ import annotations

import itertools
import math
from typing import Any

import numpy as np
import pytest
import torch

from conftest import tiny_config, tiny_model
from glassgpt.config import TrainConfig
from glassgpt.errors import UserError
from glassgpt.model import GPT
from glassgpt.runtime import Workers
from glassgpt.training.optimizers import (
    AdamW,
    Muon,
    learning_rate_at,
    make_optimizers,
    optimizer_tensors,
    orthogonalize,
    restore_optimizers,
    set_learning_rate,
)

SCHEDULES = ["cosine", "linear", "constant"]


def rates(**fields) -> list[float]:
    config = TrainConfig(**fields)
    return [learning_rate_at(step, config) for step in range(config.max_steps + 30)]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_warm_up_is_linear_and_ends_at_the_peak(schedule: str) -> None:
    curve = rates(schedule=schedule, max_steps=90, warmup_steps=20, learning_rate=0.3)
    assert curve[20] == pytest.approx(0.3)
    assert max(curve) == pytest.approx(0.3)
    assert curve[0] > 0  # the first step is not wasted
    steps = [b - a for a, b in itertools.pairwise([0.0, *curve[:21]])]
    assert steps == pytest.approx([0.3 / 21] * 21)


@pytest.mark.parametrize("schedule", ["cosine", "linear"])
@pytest.mark.parametrize(("lowest", "expected"), [(None, 0.03), (0.1, 0.1), (0.0, 0.0)])
def test_decay_ends_at_the_minimum_and_stays(schedule, lowest, expected) -> None:
    curve = rates(schedule=schedule, max_steps=90, warmup_steps=20, learning_rate=0.3,
                  min_learning_rate=lowest, decay_steps=70)  # fmt: skip
    assert curve[70:] == pytest.approx([expected] * 50)
    assert all(a > b for a, b in itertools.pairwise(curve[20:71]))  # falls at every step
    assert curve[45] == pytest.approx((0.3 + expected) / 2)  # half-way, both are in the middle


def test_cosine_follows_the_formula() -> None:
    curve = rates(schedule="cosine", max_steps=50, warmup_steps=10, learning_rate=1.0,
                  min_learning_rate=0.2)  # fmt: skip
    for step in range(10, 51):
        expected = 0.2 + 0.4 * (1 + math.cos(math.pi * (step - 10) / 40))
        assert curve[step] == pytest.approx(expected)


def test_linear_falls_by_equal_steps() -> None:
    curve = rates(schedule="linear", max_steps=50, warmup_steps=10, learning_rate=1.0,
                  min_learning_rate=0.2)  # fmt: skip
    falls = [a - b for a, b in itertools.pairwise(curve[10:51])]
    assert falls == pytest.approx([0.02] * 40)


def test_constant_stays_at_the_peak() -> None:
    curve = rates(schedule="constant", max_steps=40, warmup_steps=7, learning_rate=0.3)
    assert curve[7:] == [0.3] * (70 - 7)


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("max_steps", "warmup_steps"), [(1, 0), (1, 100), (5, 5), (5, 0)])
def test_odd_lengths_give_usable_rates(schedule, max_steps, warmup_steps) -> None:
    curve = rates(schedule=schedule, max_steps=max_steps, warmup_steps=warmup_steps)
    assert all(0 < rate <= TrainConfig.learning_rate for rate in curve)


# -- who takes what ------------------------------------------------------------------------------


def decays(model: GPT, config: TrainConfig) -> dict[str, tuple[type, float]]:
    """Which optimizer takes a parameter, and what it loses of it at a rate of 1."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    found: dict[str, tuple[type, float]] = {}
    for optimizer in make_optimizers(model, config):
        for group in optimizer.param_groups:
            for parameter in group["params"]:
                assert names[parameter] not in found  # each once
                found[names[parameter]] = type(optimizer), group["weight_decay"]
    assert found.keys() == set(names.values())
    return found


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
@pytest.mark.parametrize("shape", ["gpt2", "modern"])
def test_matrices_decay_and_vectors_do_not(shape: str, optimizer: str) -> None:
    model = GPT(tiny_config(shape))
    config = TrainConfig(weight_decay=0.25, beta1=0.7, beta2=0.8, learning_rate=0.5,
                         muon_learning_rate=0.8, optimizer=optimizer)  # fmt: skip
    taken = decays(model, config)
    for name in taken:
        is_vector = name.endswith("bias") or "norm" in name
        hidden = name.startswith("blocks.") and not is_vector
        expected = Muon if hidden and optimizer == "muon" else AdamW
        assert taken[name] == (expected, 0.0 if is_vector else 0.25), name
    optimizers = make_optimizers(model, config)
    assert {group["betas"] for group in optimizers[0].param_groups} == {(0.7, 0.8)}  # type: ignore[index]

    # With a gradient of zero, decay is all that moves: by rate times decay.
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizers, config, 0.2)
    for each in optimizers:
        each.step()
    for name, parameter in model.named_parameters():
        rate = 0.32 if taken[name][0] is Muon else 0.2  # both are at 2/5 of their peak
        kept = 1 - rate * taken[name][1]
        torch.testing.assert_close(parameter.detach(), before[name] * kept)


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_each_block_learns_slower_than_the_next(optimizer: str) -> None:
    model = GPT(tiny_config("gpt2", n_layer=3))
    config = TrainConfig(learning_rate=0.5, muon_learning_rate=0.8, optimizer=optimizer)
    optimizers = make_optimizers(model, config, layer_decay=0.5)
    set_learning_rate(optimizers, config, 0.25)  # half of the peak
    rates = {id(p): group["lr"] / (0.4 if isinstance(each, Muon) else 0.25)
             for each in optimizers for group in each.param_groups
             for p in group["params"]}  # fmt: skip
    for name, parameter in model.named_parameters():
        below = {"blocks.0": 2, "blocks.1": 1, "blocks.2": 0, "token_em": 3, "position": 3}
        expected = 0.5 ** below.get(name[:8], 0)
        assert rates[id(parameter)] == pytest.approx(expected), name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_what_is_frozen_has_no_optimizer(optimizer: str) -> None:
    model = GPT(tiny_config())
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name.startswith("blocks.1."))
    config = TrainConfig(optimizer=optimizer)
    taken = {id(p) for each in make_optimizers(model, config) for group in each.param_groups
             for p in group["params"]}  # fmt: skip
    assert taken == {id(p) for p in model.parameters() if p.requires_grad}


def test_without_blocks_there_is_nothing_for_muon() -> None:
    [optimizer] = make_optimizers(GPT(tiny_config(n_layer=0)), TrainConfig(optimizer="muon"))
    assert isinstance(optimizer, AdamW)


def test_adamw_is_that_of_torch() -> None:
    """Also where a parameter had no gradient in some steps."""
    config = TrainConfig(optimizer="adamw", weight_decay=0.25, beta1=0.7, beta2=0.8)
    ours, theirs = tiny_model(tiny_config()), tiny_model(tiny_config())
    [optimizer] = make_optimizers(ours, config)
    groups = [
        {"params": [p for p in theirs.parameters() if (p.dim() >= 2) is two], "weight_decay": decay}
        for two, decay in ((True, 0.25), (False, 0.0))
    ]
    reference = torch.optim.AdamW(groups, betas=(0.7, 0.8))
    for number in range(4):
        for index, pair in enumerate(zip(ours.parameters(), theirs.parameters(), strict=True)):
            for p in pair:
                p.grad = noise(*p.shape, seed=100 * number + index) if index != number else None
        set_learning_rate([optimizer], config, 0.05 / (number + 1))
        for group in reference.param_groups:
            group["lr"] = 0.05 / (number + 1)
        optimizer.step()
        reference.step()
    for (name, p), other in zip(ours.named_parameters(), theirs.parameters(), strict=True):
        torch.testing.assert_close(p, other, rtol=1e-5, atol=1e-6, msg=name)


# -- Muon ----------------------------------------------------------------------------------------


def noise(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def matrices(n: int, rows: int, columns: int) -> torch.Tensor:
    """With singular values from 1 down to 1/20, of very different sizes."""
    u, _, v = torch.linalg.svd(noise(n, rows, columns), full_matrices=False)
    spectrum = torch.logspace(0, -1.3, min(rows, columns))
    size = torch.logspace(-6, 3, n)[:, None, None]
    return (u * spectrum) @ v * size


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("rows", "columns"), [(23, 9), (9, 23), (14, 14), (1, 6), (5, 1)])
def test_singular_values_become_about_one(rows: int, columns: int, dtype: torch.dtype) -> None:
    many = matrices(5, rows, columns)
    found = orthogonalize(many, dtype)
    assert (found.shape, found.dtype) == (many.shape, dtype)
    spectrum = torch.linalg.svdvals(found.float())
    assert 0.4 < spectrum.min() <= spectrum.max() < 1.65
    u, _, v = torch.linalg.svd(many, full_matrices=False)  # the nearest orthogonal one is u v
    nearness = (found.float() * (u @ v)).sum(dim=(1, 2)) / min(rows, columns)
    assert nearness.min() > 0.5


@pytest.mark.parametrize("rank", [1, 2, 5])
def test_low_rank_does_not_blow_up_in_bfloat16(rank: int) -> None:
    """All of a matrix in a few directions: nothing may be rounded to where the next step fails."""
    generator = torch.Generator().manual_seed(rank)
    for rows, columns in ((14, 14), (100, 7), (64, 200)):
        left, right = (torch.randn(60, n, rank, generator=generator) for n in (rows, columns))
        found = orthogonalize(left @ right.mT, torch.bfloat16)
        assert torch.linalg.svdvals(found.float()).max() < 1.65


@pytest.mark.parametrize(("rows", "columns"), [(7, 4), (4, 7)])
def test_many_matrices_are_each_by_itself(rows: int, columns: int) -> None:
    many = matrices(5, rows, columns)
    each = torch.cat([orthogonalize(one[None], torch.float32) for one in many])
    torch.testing.assert_close(orthogonalize(many, torch.float32), each, rtol=1e-5, atol=1e-6)


def test_nothing_stays_nothing() -> None:
    assert orthogonalize(torch.zeros(2, 3, 5), torch.float32).eq(0).all()


def muon(parameters: Any, parts: Any, **options: Any) -> Muon:
    usual = dict(lr=1.0, momentum=0.9, weight_decay=0.0, dtype=torch.float32)
    return Muon(list(parameters), parts, **{**usual, **options})


@pytest.mark.parametrize(("rows", "columns"), [(18, 8), (8, 18), (8, 8)])
def test_the_update_is_as_large_as_a_tall_matrix_needs(rows: int, columns: int) -> None:
    parameter = torch.nn.Parameter(torch.zeros(rows, columns))
    parameter.grad = matrices(1, rows, columns)[0]
    muon([parameter], [(rows,)], lr=0.3).step()
    spectrum = torch.linalg.svdvals(parameter.detach()) / (0.3 * max(1, rows / columns) ** 0.5)
    assert 0.4 < spectrum.min() <= spectrum.max() < 1.65
    assert (parameter.detach() * parameter.grad).sum() < 0  # downhill


def test_momentum_looks_ahead() -> None:
    """m <- 0.9 m + 0.1 g, and the update is that of 0.9 m + 0.1 g once more (Nesterov)."""
    parameter, memory = torch.nn.Parameter(torch.zeros(4, 7)), torch.zeros(4, 7)
    optimizer = muon([parameter], [(4,)])
    for seed in range(3):
        gradient = noise(4, 7, seed=seed)
        parameter.grad, before = gradient.clone(), parameter.detach().clone()
        optimizer.step()
        memory = 0.9 * memory + 0.1 * gradient
        ahead = orthogonalize((0.9 * memory + 0.1 * gradient)[None], torch.float32)[0]
        torch.testing.assert_close(before - parameter.detach(), ahead, rtol=1e-4, atol=1e-5)


def test_queries_keys_and_values_are_matrices_of_their_own() -> None:
    """One parameter of (q, k, v) rows moves as three would; one of all rows moves otherwise."""
    sizes, start = (8, 4, 4), noise(16, 6)
    together, alone = (torch.nn.Parameter(start.clone()) for _ in range(2))
    three = [torch.nn.Parameter(part.clone()) for part in start.split(sizes)]
    optimizers = [
        muon([together], [sizes], weight_decay=0.1, lr=0.1),
        muon(three, [(n,) for n in sizes], weight_decay=0.1, lr=0.1),
        muon([alone], [(16,)], weight_decay=0.1, lr=0.1),
    ]
    for seed in range(2):
        gradient = noise(16, 6, seed=seed + 1)
        together.grad = alone.grad = gradient
        for parameter, part in zip(three, gradient.split(sizes), strict=True):
            parameter.grad = part.clone()
        for optimizer in optimizers:
            optimizer.step()
    torch.testing.assert_close(together, torch.cat(three), rtol=1e-5, atol=1e-6)
    assert (together - alone).abs().max() > 0.01


@pytest.mark.parametrize("shape", ["gpt2", "modern"])
def test_the_parts_of_a_model_are_its_heads(shape: str) -> None:
    config = tiny_config(shape)
    _, optimizer = make_optimizers(GPT(config), TrainConfig())
    assert isinstance(optimizer, Muon)
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    expected = [(0, q), (q, q + kv), (q + kv, q + 2 * kv)] * config.n_layer
    qkv = config.weight_shapes["blocks.0.attn.qkv.weight"]
    places = [place for group in optimizer.groups for place in group]
    parts = [(rows.start, rows.stop) for parameter, rows in places if parameter.shape == qkv]
    assert sorted(parts) == sorted(expected)
    others = [rows for parameter, rows in places if parameter.shape != qkv]
    assert len(others) == len(optimizer.param_groups[0]["params"]) - config.n_layer


# -- both together -------------------------------------------------------------------------------


class Training:
    """A model, its optimizers, and gradients that are a function of the step."""

    def __init__(self, optimizer: str = "muon", shape: str = "modern", **options: Any) -> None:
        self.config = TrainConfig(optimizer=optimizer, learning_rate=0.03, muon_learning_rate=0.1)  # type: ignore[arg-type]
        self.model = tiny_model(tiny_config(shape))
        self.optimizers = make_optimizers(self.model, self.config, **options)

    def step(self, number: int) -> None:
        for index, parameter in enumerate(self.model.parameters()):
            parameter.grad = noise(*parameter.shape, seed=100 * number + index)
        set_learning_rate(self.optimizers, self.config, 0.02 / (number + 1))
        for optimizer in self.optimizers:
            optimizer.step()

    @property
    def weights(self) -> dict[str, torch.Tensor]:
        return {name: p.detach().clone() for name, p in self.model.named_parameters()}


@pytest.mark.parametrize("shape", ["gpt2", "modern"])
@pytest.mark.parametrize("low_precision", [False, True])
def test_threads_take_turns_without_changing_a_thing(shape: str, low_precision: bool) -> None:
    workers = Workers(3)
    one = Training(shape=shape, low_precision=low_precision)
    several = Training(shape=shape, low_precision=low_precision, workers=workers)
    assert len(several.optimizers[1].groups) > len(one.optimizers[1].groups)  # type: ignore[attr-defined]
    start = one.weights
    for number in range(3):
        one.step(number)
        several.step(number)
    workers.close()
    for name, weight in one.weights.items():
        torch.testing.assert_close(several.weights[name], weight, rtol=0, atol=1e-6)
        assert (weight - start[name]).abs().max() > 1e-3, name


@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_restored_optimizers_go_on_where_they_were(optimizer: str) -> None:
    one, other = Training(optimizer), Training(optimizer)
    for number in range(3):
        one.step(number)
    kept = optimizer_tensors(one.optimizers, one.model)
    saved = {name: np.copy(array) for name, array in kept.items()}
    hidden = {name for name in one.weights if name.startswith("blocks") and "norm" not in name}
    muons = hidden if optimizer == "muon" else set()
    assert {f"momentum.{name}" for name in muons} == {n for n in saved if "momentum" in n}
    assert {f"exp_avg_sq.{n}" for n in one.weights.keys() - muons} == {
        name for name in saved if "exp_avg_sq" in name
    }
    other.model.load_state_dict(one.model.state_dict())
    fresh = Training(optimizer)
    fresh.model.load_state_dict(one.model.state_dict())
    restore_optimizers(other.optimizers, other.model, saved)
    for number in range(3, 5):
        for each in (one, other, fresh):
            each.step(number)
    for name, weight in one.weights.items():
        assert torch.equal(other.weights[name], weight), name
        assert not torch.equal(fresh.weights[name], weight), name  # what is restored matters


@pytest.mark.parametrize(("before", "now"), [("muon", "adamw"), ("adamw", "muon")])
def test_the_memory_of_another_optimizer_is_refused(before: str, now: str) -> None:
    trained, other = Training(before), Training(now)
    trained.step(0)
    saved = optimizer_tensors(trained.optimizers, trained.model)
    with pytest.raises(UserError, match=r"^[^\n]*another --optimizer[^\n]*$"):
        restore_optimizers(other.optimizers, other.model, saved)
