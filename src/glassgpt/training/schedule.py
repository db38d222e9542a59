"""How much of a training is behind, and what is due: by counting steps, or by the clock.

    clock = Clock(config, began=time.monotonic()); clock.done(step) -> 0.0 ... 1.0

With a budget, steps are as many as fit: the learning rate follows the time that has passed, so
that the decay is complete when time is up, on a machine of any speed and one that becomes slower
half-way. What comes after the last step (evaluation, saving, figures) is foreseen from what it took
before. This room knows seconds and steps, no model and no file.
"""

from __future__ import annotations

import math
import statistics
import time
from collections import deque

from glassgpt.config import TrainConfig
from glassgpt.system import seconds_of

_FINISHING = 1.5  # seconds for the curve, the sample, the report and the end of the process
_SAFETY = 1.15  # evaluations vary
_FIRST_STEPS = 5  # behind an evaluation: they say how fast the machine is at that time
_SLOWER = 6.0  # times: the most that is believed of a machine that changes its speed
_STEPS_BETWEEN_EVALUATIONS = 12  # of their own duration: they take at most a twelfth of the time


class Clock:
    """The time of one training; earlier sessions of it `used` so many seconds."""

    def __init__(self, config: TrainConfig, *, began: float, used: float = 0.0) -> None:
        self.config, self.began, self.used = config, began, used
        self.budget = None if config.budget is None else seconds_of(config.budget)
        self.steps: deque[float] = deque(maxlen=25)  # seconds of the latest
        self.evaluation_seconds = self.saving_seconds = self.sampling_seconds = 0.0
        self.snapshot_seconds = 0.0
        self.speed = self.before = 0.0  # of a step, when the evaluation was measured; earlier
        self.evaluated = self.saved = self.elapsed()

    def elapsed(self) -> float:
        """Seconds since the training began, without the pauses between sessions."""
        return self.used + time.monotonic() - self.began

    # -- what has been seen ----------------------------------------------------------------------

    def saw_step(self, seconds: float) -> None:
        self.steps.append(seconds)
        if not self.speed and len(self.steps) == _FIRST_STEPS:
            self.speed = self.step_seconds

    def saw_evaluation(self, seconds: float) -> None:
        self.evaluation_seconds, self.evaluated = seconds, self.elapsed()
        self.before, self.speed = self.step_seconds, 0.0
        self.steps.clear()  # the steps that come now are of the same speed as this evaluation

    def saw_saving(self, seconds: float) -> None:
        self.saving_seconds, self.saved = seconds, self.elapsed()

    def saw_sampling(self, seconds: float) -> None:
        self.sampling_seconds = seconds

    def saw_snapshot(self, seconds: float) -> None:
        self.snapshot_seconds = seconds

    # -- what follows from it --------------------------------------------------------------------

    @property
    def step_seconds(self) -> float:
        """Of the latest steps the middle one: a pause counts once, a slower machine soon."""
        return statistics.median(self.steps) if self.steps else self.before

    @property
    def training_ends(self) -> float:
        """When the last step must be over (seconds since the beginning), for all else to fit.

        When steps have become slower than they were at the last evaluation, the next one will be
        slower, too; within reason, since a guess must not end the training.
        """
        assert self.budget is not None
        slower = self.step_seconds / self.speed if self.speed else 1.0
        known = _SAFETY * self.evaluation_seconds + 2 * self.saving_seconds + self.sampling_seconds
        if self.config.snapshots:  # the last one; of an adapter's model, it is more than it saves
            known += max(self.saving_seconds, self.snapshot_seconds)
        after = known * min(_SLOWER, max(1 / _SLOWER, slower)) + _FINISHING
        return max(self.budget - after, self.budget / 2)

    def done(self, step: int) -> float:
        """The share of the training that is behind in the middle of the next step: of its time, or
        of its steps, whichever comes first."""
        steps = step / self.config.max_steps
        if self.budget is None:
            return steps
        seconds = (self.elapsed() + self.step_seconds / 2) / self.training_ends
        return min(1.0, max(seconds, steps))

    def is_over(self, step: int) -> bool:
        """Is there no time for another step, or none to take?"""
        if step >= self.config.max_steps:
            return True
        return self.budget is not None and (
            self.elapsed() + self.step_seconds / 2 > self.training_ends
        )

    def evaluation_is_due(self, step: int) -> bool:
        """Every `eval_interval` steps; with a budget at every tenth of it, when that is cheap."""
        if self.budget is None:
            return step % self.config.eval_interval == 0
        pause = max(self.budget / 10, _STEPS_BETWEEN_EVALUATIONS * self.evaluation_seconds)
        now = self.elapsed()
        return now - self.evaluated >= pause and self.training_ends - now > pause / 2

    def saving_is_due(self, step: int) -> bool:
        """Between evaluations, which save as well."""
        if self.budget is None:
            interval = self.config.checkpoint_interval
            return bool(interval) and step % interval == 0
        pause = max(self.budget / 20, 10.0, 30 * self.saving_seconds)
        return self.elapsed() - self.saved >= pause

    def snapshot_is_due(self, step: int) -> bool:
        """At powers of the square root of two: a model learns most in its first steps."""
        if not self.config.snapshots or step == 0:
            return self.config.snapshots
        return step == round(2 ** (round(2 * math.log2(step)) / 2))

    def writing_is_due(self, step: int) -> bool:
        """Will numbers or weights be written after this step, as far as steps say so?"""
        config = self.config
        intervals = (config.log_interval, config.eval_interval, config.checkpoint_interval)
        counted = any(n and step % n == 0 for n in intervals)
        return counted or step == config.max_steps or self.snapshot_is_due(step)

    def left(self, step: int) -> float:
        """Seconds until the end."""
        if self.budget is None:
            return (self.config.max_steps - step) * self.step_seconds
        return max(0.0, self.budget - self.elapsed())
