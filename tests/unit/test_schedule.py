"""The clock of a training, with a time of its own: nobody waits, machines change their speed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import pytest

from glassgpt.config import TrainConfig
from glassgpt.training import schedule as clock
from glassgpt.training.optimizers import learning_rate_at
from glassgpt.training.schedule import Clock

BUDGET = 60.0
ENDLESS = 1 << 40
STARTING, FINISHING = 3.0, 1.0  # seconds before the first step, and after the last save


class Now:
    """What time.monotonic says."""

    def __init__(self) -> None:
        self.seconds = 1000.0

    def monotonic(self) -> float:
        return self.seconds


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> Now:
    time = Now()
    monkeypatch.setattr(clock, "time", time)
    return time


def budget_config(**options: Any) -> TrainConfig:
    usual: dict[str, Any] = dict(budget="60s", max_steps=ENDLESS, schedule="linear",
                                 min_learning_rate=0.0, warmup_steps=20)  # fmt: skip
    return TrainConfig(**usual | options)


@dataclass
class Machine:
    """A training without a model: `Trainer._loop` as the clock sees it."""

    now: Now
    step: float  # seconds of work
    evaluation: float
    saving: float = 0.05
    snapshot: float = 0.0
    slowdown: float = 1.0  # from `changes` on, everything takes so many times as long
    changes: float = BUDGET / 2
    rates: list[float] = field(default_factory=list)
    evaluated: list[float] = field(default_factory=list)  # when an evaluation began
    evaluating: float = 0.0

    def work(self, seconds: float) -> float:
        """Let time go by; what is under way when the speed changes is slower from there on."""
        before = self.now.seconds
        at_old_speed = min(seconds, max(0.0, 1000.0 + self.changes - before))
        self.now.seconds += at_old_speed + (seconds - at_old_speed) * self.slowdown
        return self.now.seconds - before

    def evaluate(self, timer: Clock) -> None:
        self.evaluated.append(timer.elapsed())
        took = self.work(self.evaluation)
        timer.saw_evaluation(took)
        timer.saw_saving(self.work(self.saving))
        self.evaluating += took

    def train(self, config: TrainConfig, *, used: float = 0.0) -> float:
        """Seconds until everything is over; the learning rates and evaluations are noted."""
        timer, step = Clock(config, began=self.now.seconds, used=used), 0
        self.now.seconds += STARTING
        timer.saw_evaluation(self.evaluation)
        timer.saw_saving(self.work(self.saving))
        while True:
            if timer.snapshot_is_due(step):
                timer.saw_snapshot(self.work(self.snapshot))
            if timer.is_over(step):
                break
            if timer.evaluation_is_due(step):
                self.evaluate(timer)
            elif timer.saving_is_due(step):
                timer.saw_saving(self.work(self.saving))
            self.rates.append(learning_rate_at(step, config, timer.done(step)))
            timer.saw_step(self.work(self.step))
            step += 1
        self.evaluate(timer)
        timer.saw_saving(self.work(self.saving))
        if config.snapshots and not timer.snapshot_is_due(step):
            timer.saw_snapshot(self.work(self.snapshot))
        self.now.seconds += FINISHING
        return timer.elapsed()


# -- ending on time ------------------------------------------------------------------------------


@pytest.mark.parametrize("step", [0.02, 0.1, 0.5])
@pytest.mark.parametrize("evaluation", [0.05, 2.4])
@pytest.mark.parametrize("slowdown", [1.0, 5.0, 0.2])
def test_it_ends_on_time_with_the_decay_complete_at_any_speed(now, step, evaluation, slowdown):
    machine = Machine(now, step, evaluation, slowdown=slowdown)
    config = budget_config()
    took = machine.train(config)
    assert 0.85 * BUDGET < took <= 1.04 * BUDGET
    assert machine.rates[-1] < 0.08 * config.learning_rate
    assert max(machine.rates) > 0.6 * config.learning_rate
    peak = machine.rates.index(max(machine.rates))
    later = machine.rates[peak:]
    slack = 0.05 * config.learning_rate  # a faster machine has more time than it thought
    assert all(b <= a + slack for a, b in zip(later, later[1:], strict=False))


@pytest.mark.parametrize("changes", range(6, 46, 2))
@pytest.mark.parametrize("slowdown", [5.0, 0.2])
def test_it_ends_on_time_whenever_the_machine_changes(now, changes, slowdown):
    machine = Machine(now, 0.1, 1.0, slowdown=slowdown, changes=changes)
    config = budget_config()
    assert 0.85 * BUDGET < machine.train(config) <= 1.05 * BUDGET
    assert machine.rates[-1] < 0.05 * config.learning_rate


@pytest.mark.parametrize("snapshot", [0.01, 0.5, 2.0])
@pytest.mark.parametrize("step", [0.003, 0.1, 0.57])
def test_it_ends_on_time_with_snapshots(now, snapshot, step):
    machine = Machine(now, step, 0.5, snapshot=snapshot)
    assert 0.85 * BUDGET < machine.train(budget_config(snapshots=True)) <= 1.02 * BUDGET
    assert machine.rates[-1] < 0.05 * TrainConfig().learning_rate


def test_done_reaches_one_when_training_must_end(now):
    timer = Clock(budget_config(), began=now.seconds)
    shares = []
    for _ in range(100):
        shares.append(timer.done(0))
        now.seconds += 0.01 * timer.training_ends
    assert shares[0] == 0
    assert shares == sorted(shares)
    assert shares[50] == pytest.approx(0.5)
    assert timer.done(0) == pytest.approx(1)
    now.seconds += BUDGET
    assert timer.done(0) == 1
    assert timer.is_over(0)


def test_the_next_step_counts_by_its_middle(now):
    timer = Clock(budget_config(), began=now.seconds)
    timer.saw_step(8.0)
    assert timer.done(1) == pytest.approx(4.0 / timer.training_ends)
    now.seconds += timer.training_ends - 3.9  # more than half of the step would be too late
    assert timer.is_over(1)
    now.seconds -= 0.2
    assert not timer.is_over(1)


def test_time_is_kept_for_the_last_evaluation_and_for_saving(now):
    timer = Clock(budget_config(), began=now.seconds)
    alone = timer.training_ends
    assert 0.9 * BUDGET < alone < BUDGET
    timer.saw_evaluation(4.0)
    evaluating = timer.training_ends
    assert evaluating <= alone - 4
    timer.saw_saving(3.0)
    assert timer.training_ends <= evaluating - 2 * 3  # the best model, and the newest state
    timer.saw_saving(1000.0)
    assert timer.training_ends > 0  # something is always trained


def test_slower_steps_announce_slower_evaluations_and_savings(now):
    timer = Clock(budget_config(), began=now.seconds)
    timer.saw_evaluation(2.0)
    timer.saw_saving(0.5)
    for _ in range(10):
        timer.saw_step(0.1)
    usual = BUDGET - timer.training_ends
    for _ in range(100):
        timer.saw_step(0.5)
    slow = BUDGET - timer.training_ends
    assert slow > 4 * (usual - 2)  # all but the constant end is five times as long
    for _ in range(100):
        timer.saw_step(0.1)
    assert BUDGET - timer.training_ends == pytest.approx(usual)


def test_one_pause_ends_nothing(now):
    """Ctrl-Z and fg, a disk that stalls: the decay goes on where the time is."""
    timer = Clock(budget_config(), began=now.seconds)
    timer.saw_evaluation(2.0)
    for _ in range(30):
        timer.saw_step(0.03)
    before = timer.training_ends
    timer.saw_step(10.0)
    assert timer.training_ends == before


def test_one_slow_step_changes_little(now):
    timer = Clock(budget_config(), began=now.seconds)
    for seconds in [0.1] * 50 + [0.3]:
        timer.saw_step(seconds)
    assert timer.step_seconds == pytest.approx(0.1, rel=0.25)


def test_a_limit_of_steps_completes_the_decay_as_well(now):
    """--budget 60s --max-steps 300, where 300 steps take less than the time there is."""
    machine, config = Machine(now, 0.05, 0.1), budget_config(max_steps=300)
    assert machine.train(config) < BUDGET / 2
    assert len(machine.rates) == 300
    assert machine.rates[-1] < 0.02 * config.learning_rate
    assert max(machine.rates) > 0.8 * config.learning_rate


# -- what is due ---------------------------------------------------------------------------------


@pytest.mark.parametrize("evaluation", [0.01, 0.3, 1.0, 2.4])
def test_evaluations_take_a_twelfth_of_the_time_at_most(now, evaluation):
    machine = Machine(now, 0.05, evaluation)
    machine.train(budget_config())
    *before, last = machine.evaluated
    assert last > 0.9 * (BUDGET - evaluation) - 3
    assert (machine.evaluating - evaluation) <= BUDGET / 12  # the last one must be
    if evaluation < 0.5:
        assert 7 <= len(before) <= 10  # one for each tenth of the budget
    pauses = [b - a for a, b in zip(machine.evaluated, machine.evaluated[1:], strict=False)]
    assert all(pause > 2.5 for pause in pauses)  # none just before the last


def test_savings_between_evaluations(now):
    timer = Clock(budget_config(budget="1h"), began=now.seconds)
    timer.saw_saving(0.1)
    now.seconds += 170
    assert not timer.saving_is_due(1000)
    now.seconds += 11
    assert timer.saving_is_due(1001)
    timer.saw_saving(20.0)  # a large model: less often
    now.seconds += 190
    assert not timer.saving_is_due(1002)
    now.seconds += 420
    assert timer.saving_is_due(1003)


# -- over several sessions -----------------------------------------------------------------------


def test_a_resumed_clock_has_the_time_that_was_left(now):
    timer = Clock(budget_config(), began=now.seconds, used=0.0)
    now.seconds += 25
    share, left = timer.done(7), timer.left(7)
    now.seconds += 100_000  # a pause
    later = Clock(budget_config(), began=now.seconds, used=timer.used + 25)
    assert (later.elapsed(), later.done(7), later.left(7)) == (25, share, left)
    assert left == BUDGET - 25
    machine, config = Machine(now, 0.1, 0.2), budget_config()
    assert 0.9 * BUDGET < machine.train(config, used=25.0) <= BUDGET
    assert now.seconds < 101_025 + 1000 + BUDGET
    assert machine.rates[-1] < 0.02 * config.learning_rate


def test_nothing_is_left_of_a_used_budget(now):
    timer = Clock(budget_config(), began=now.seconds, used=61.0)
    assert timer.is_over(1)
    assert (timer.done(1), timer.left(1)) == (1, 0)


# -- without a budget ----------------------------------------------------------------------------


def due(ask: Callable[[int], bool]) -> list[int]:
    return [step for step in range(13) if ask(step)]


def test_without_a_budget_steps_are_counted(now):
    config = TrainConfig(max_steps=12, eval_interval=5, checkpoint_interval=4)
    timer = Clock(config, began=now.seconds)
    now.seconds += 1e9  # time does not matter
    assert timer.budget is None
    assert [timer.done(step) for step in (0, 3, 12)] == [0, 0.25, 1]
    assert due(timer.is_over) == [12]
    assert due(timer.evaluation_is_due) == [0, 5, 10]
    assert due(timer.saving_is_due) == [0, 4, 8, 12]
    assert due(Clock(TrainConfig(), began=0.0).saving_is_due) == []
    timer.saw_step(2.0)
    assert timer.left(3) == 18
