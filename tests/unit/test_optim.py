"""The learning rate at every step, and which parameters decay."""

from __future__ import annotations

import itertools
import math

import pytest
import torch

from conftest import tiny_config
from glassgpt.config import TrainConfig
from glassgpt.model import GPT
from glassgpt.optim import learning_rate_at, make_optimizer, set_learning_rate

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


@pytest.mark.parametrize("shape", ["gpt2", "modern"])
def test_matrices_decay_and_vectors_do_not(shape: str) -> None:
    model = GPT(tiny_config(shape))
    config = TrainConfig(weight_decay=0.25, beta1=0.7, beta2=0.8, learning_rate=0.5)
    optimizer = make_optimizer(model, config)
    decay = {p: group["weight_decay"] for group in optimizer.param_groups for p in group["params"]}
    assert len(decay) == len(list(model.parameters()))  # each once
    for name, parameter in model.named_parameters():
        is_vector = name.endswith("bias") or "norm" in name
        assert decay[parameter] == (0.0 if is_vector else 0.25), name
    assert {group["betas"] for group in optimizer.param_groups} == {(0.7, 0.8)}

    # With a gradient of zero, decay is all that moves: by rate times decay.
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    set_learning_rate(optimizer, 0.2)
    optimizer.step()
    for name, parameter in model.named_parameters():
        kept = 1 - 0.2 * decay[parameter]
        torch.testing.assert_close(parameter.detach(), before[name] * kept)
