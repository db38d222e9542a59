"""What a plan measures on this machine leaves the machine as it was."""

from __future__ import annotations

import dataclasses
import threading

import pytest
import torch

from conftest import tiny_config
from glassgpt import runtime
from glassgpt.config import TrainConfig
from glassgpt.training.planning import planner
from glassgpt.training.planning.planner import calibrate, make_plan
from glassgpt.training.step import StepSeconds


@pytest.mark.parametrize("shape", ["gpt2", "modern"])
def test_calibrating_gives_the_threads_back(shape):
    torch.set_num_threads(2)
    model, train = tiny_config(shape), TrainConfig(batch_tokens=130, threads=2)
    before = threading.active_count()
    took = calibrate(model, train, runtime.start(train), budget=0.05)
    assert took > 0
    assert torch.get_num_threads() == 2
    assert threading.active_count() == before


def test_a_step_of_many_rows_is_in_proportion(monkeypatch):
    """Nothing but whole passes over fewer rows is measured; the update comes once."""
    timed = []

    def clock(step, batches, *, seconds):
        timed.append(len(next(batches)[0]))
        return StepSeconds(0.0, 0.004 * timed[-1], 0.006 * timed[-1], 5.0)

    monkeypatch.setattr(planner, "measure_step", clock)
    model = tiny_config("gpt2")
    train = TrainConfig(batch_tokens=64 * model.context_length, threads=1)
    took = calibrate(model, train, runtime.start(train), budget=1.0)
    assert timed == [1]
    assert took == pytest.approx(64 * 0.01 + 5)


def test_what_does_not_fit_is_not_tried(monkeypatch):
    monkeypatch.setattr(planner, "room_here", lambda machine: 10**6)
    monkeypatch.setattr(planner, "calibrate", None)  # calling it would fail
    plan = make_plan(n_layer=1, n_head=1, n_embd=8, threads=1, device="cpu")
    assert (plan.fits, plan.seconds_per_step, plan.hours) == (False, None, None)
    assert "not even one sequence" in planner.plan_table(plan)
    roomy = dataclasses.replace(plan, room=None)
    assert roomy.fits
    assert "unknown" in planner.plan_table(roomy)
