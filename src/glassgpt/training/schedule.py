"""How much of a training is done, and what is due: counted in steps, or in time.

    clock = Clock(config, began=time.monotonic()); clock.done(step) -> 0.0 ... 1.0

With a budget, as many steps are taken as fit. The learning rate follows the time that has passed,
so that the decay is complete when the time is up, on a machine of any speed, also on one that
becomes slower half-way. Time for what follows the last step (evaluation, saving, figures) is
reserved by what it took before. This module knows seconds and steps, no model and no file.
"""

from __future__ import annotations

import contextlib
import math
import statistics
import time
from collections import deque
from collections.abc import Callable, Iterator

from glassgpt.config import TrainConfig
from glassgpt.system import seconds_of

_FINISHING = 1.5  # seconds for the curve, the sample, the report and the end of the process
_SAFETY = 1.15  # factor of the time reserved for an evaluation, since evaluations vary
_FIRST_STEPS = 5  # steps after an evaluation whose median is the machine's speed at that time
_SLOWER = 6.0  # the largest factor of a change of speed that is believed; more is a pause
_EVALUATION_PAUSE = 12  # times an evaluation's seconds: they take at most a twelfth of the time


class Clock:
    """The time of one training; earlier sessions of it `used` so many seconds."""

    def __init__(self, config: TrainConfig, *, began: float, used: float = 0.0) -> None:
        self.config, self.began, self.used = config, began, used
        self.budget = None if config.budget is None else seconds_of(config.budget)
        self.steps: deque[float] = deque(maxlen=25)  # seconds of the latest steps
        self.spent: dict[str, float] = {}  # part of the work -> seconds
        self.evaluation_seconds = self.saving_seconds = self.sampling_seconds = 0.0
        self.snapshot_seconds = 0.0
        # Seconds of a step at the time of the last evaluation, and before it.
        self.speed = self.before = 0.0
        self.evaluated = self.saved = self.elapsed()

    def elapsed(self) -> float:
        """Seconds since the training began, without the pauses between sessions."""
        return self.used + time.monotonic() - self.began

    # -- what was measured -----------------------------------------------------------------------

    @contextlib.contextmanager
    def timed(self, part: str, saw: Callable[[float], None] | None = None) -> Iterator[None]:
        """Add the seconds of a block to what was `spent` on `part`, and tell them to `saw`.

        A GPU works on while we count: there, it is the time in which the host waited.
        """
        started = time.monotonic()
        yield
        took = time.monotonic() - started
        self.spent[part] = self.spent.get(part, 0.0) + took
        if saw is not None:
            saw(took)

    def saw_step(self, seconds: float) -> None:
        self.steps.append(seconds)
        if not self.speed and len(self.steps) == _FIRST_STEPS:
            self.speed = self.step_seconds

    def saw_evaluation(self, seconds: float) -> None:
        self.evaluation_seconds, self.evaluated = seconds, self.elapsed()
        self.before, self.speed = self.step_seconds, 0.0
        self.steps.clear()  # the next steps have the same speed as this evaluation

    def saw_saving(self, seconds: float) -> None:
        self.saving_seconds, self.saved = seconds, self.elapsed()

    def saw_sampling(self, seconds: float) -> None:
        self.sampling_seconds = seconds

    def saw_snapshot(self, seconds: float) -> None:
        self.snapshot_seconds = seconds

    # -- what is due -----------------------------------------------------------------------------

    @property
    def step_seconds(self) -> float:
        """The median of the latest steps: a pause hardly counts, a slower machine soon does."""
        return statistics.median(self.steps) if self.steps else self.before

    @property
    def training_ends(self) -> float:
        """When the last step must be over, in seconds since the beginning, so that all else fits.

        If steps have become slower since the last evaluation, the next evaluation will be slower,
        too. The factor is limited, since a guess must not end the training.
        """
        assert self.budget is not None
        slower = self.step_seconds / self.speed if self.speed else 1.0
        known = _SAFETY * self.evaluation_seconds + 2 * self.saving_seconds + self.sampling_seconds
        if self.config.snapshots:  # the last one; an adapter's merged model is more than is saved
            known += max(self.saving_seconds, self.snapshot_seconds)
        after = known * min(_SLOWER, max(1 / _SLOWER, slower)) + _FINISHING
        return max(self.budget - after, self.budget / 2)

    def done(self, step: int) -> float:
        """The share of the training that is done in the middle of the next step: of its time or of
        its steps, whichever is more."""
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
        pause = max(self.budget / 10, _EVALUATION_PAUSE * self.evaluation_seconds)
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
        """At powers of the square root of two, since a model learns most in its first steps."""
        if not self.config.snapshots or step == 0:
            return self.config.snapshots
        return step == round(2 ** (round(2 * math.log2(step)) / 2))

    def writing_is_due(self, step: int) -> bool:
        """Do the step counts say that numbers or weights are written after this step?"""
        config = self.config
        intervals = (config.log_interval, config.eval_interval, config.checkpoint_interval)
        counted = any(n and step % n == 0 for n in intervals)
        return counted or step == config.max_steps or self.snapshot_is_due(step)

    def left(self, step: int) -> float:
        """Seconds until the end."""
        if self.budget is None:
            return (self.config.max_steps - step) * self.step_seconds
        return max(0.0, self.budget - self.elapsed())
