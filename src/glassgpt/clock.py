"""How much of a training is behind, and what is due: by counting steps, or by the clock.

    clock = Clock(config, began=time.monotonic()); clock.done(step) -> 0.0 ... 1.0

With a budget, steps are as many as fit: the learning rate follows the time that has passed, so
that the decay is complete when time is up, on a machine of any speed and one that becomes slower
half-way. What comes after the last step (evaluation, saving, figures) is foreseen from what it took
before. This room knows seconds and steps, no model and no file.
"""

from __future__ import annotations

import time

from glassgpt.config import TrainConfig, seconds_of

_FINISHING = 1.3  # seconds for the curve, the sample, the report and the end of the process
_SAFETY = 1.15  # evaluations vary
_STEPS_BETWEEN_EVALUATIONS = 12  # of their own duration: they take at most a twelfth of the time


class Clock:
    """The time of one training, over all its sessions; `ahead` seconds were used before."""

    def __init__(self, config: TrainConfig, *, began: float, used: float = 0.0) -> None:
        self.config, self.began, self.used = config, began, used
        self.budget = None if config.budget is None else seconds_of(config.budget)
        self.step_seconds = 0.0  # a moving average
        self.evaluation_seconds = self.saving_seconds = 0.0  # at the present speed
        self.evaluated = self.saved = self.elapsed()

    def elapsed(self) -> float:
        """Seconds since the training began, without the pauses between sessions."""
        return self.used + time.monotonic() - self.began

    # -- what has been seen ----------------------------------------------------------------------

    def saw_step(self, seconds: float) -> None:
        """A slower step means that evaluating and saving are slower, too."""
        before = self.step_seconds or seconds
        self.step_seconds = 0.9 * before + 0.1 * seconds
        self.evaluation_seconds *= self.step_seconds / before
        self.saving_seconds *= self.step_seconds / before

    def saw_evaluation(self, seconds: float) -> None:
        self.evaluation_seconds, self.evaluated = seconds, self.elapsed()

    def saw_saving(self, seconds: float) -> None:
        self.saving_seconds, self.saved = seconds, self.elapsed()

    # -- what follows from it --------------------------------------------------------------------

    @property
    def training_ends(self) -> float:
        """When the last step must be over (seconds since the beginning), for all else to fit."""
        assert self.budget is not None
        after = _SAFETY * self.evaluation_seconds + 2 * self.saving_seconds + _FINISHING
        return max(self.budget - after, 0.1 * self.budget)

    def done(self, step: int) -> float:
        """The share of the training that is behind in the middle of the next step.

        With a budget, of the time or of the steps, whichever will be used up first.
        """
        by_steps = step / self.config.max_steps
        if self.budget is None:
            return by_steps
        by_time = (self.elapsed() + self.step_seconds / 2) / self.training_ends
        return min(1.0, max(by_time, by_steps))

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

    def left(self, step: int) -> float:
        """Seconds until the end."""
        if self.budget is None:
            return (self.config.max_steps - step) * self.step_seconds
        return max(0.0, self.budget - self.elapsed())
