"""What a training writes and says about itself: metrics, status line, samples, report.

    journal.open(step=0); journal.log_step(1, loss=3.2, norm=0.5, rate=1e-3, best=math.inf)

Files are those of the main process; the other processes keep silent and write nothing. This module
knows numbers and words, and decides nothing about the training.
"""

from __future__ import annotations

import math
import shlex
import signal
import time
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassgpt.checkpoints import run_directory as ckpt
from glassgpt.config import TrainConfig
from glassgpt.data.dataset import Dataset
from glassgpt.model import GPT
from glassgpt.reporting.plots import loss_curve
from glassgpt.reporting.run_log import (
    Report,
    RunLog,
    TrainResult,
    rewind_samples,
    shape_in_words,
    summary,
    write_report,
    write_sample,
)
from glassgpt.reporting.terminal import format_seconds, program
from glassgpt.runtime import Machine
from glassgpt.system import Reporter
from glassgpt.training.schedule import Clock
from glassgpt.training.task import TextTask

if TYPE_CHECKING:
    from glassgpt.training.loop import LoopState
    from glassgpt.training.step import StepPlan


@dataclass
class Journal:
    """One run, as it is told to people and kept in files."""

    run: Path
    config: TrainConfig
    model: GPT
    data: Dataset
    machine: Machine
    task: TextTask
    clock: Clock
    reporter: Reporter
    options: dict[str, Any]
    rows_per_step: int  # of all processes

    def __post_init__(self) -> None:
        self.shape = shape_in_words(self.model.config)
        self.recent: deque[float] = deque(maxlen=50)  # losses of the latest steps
        self.log: RunLog | None = None
        self.restart_speed(0)

    def open(self, step: int) -> None:
        """Open the files, and forget what they tell of later steps, which will be done again."""
        if not self.machine.is_main:
            return
        RunLog(self.run).rewind(step)
        rewind_samples(self.run / "samples.md", step)
        ckpt.rewind_snapshots(self.run, step)
        loggers = {"tensorboard": self.config.tensorboard, "wandb": self.config.wandb}
        self.log = RunLog(self.run, **loggers, options=self.options)

    def describe(self, plan: StepPlan, step: int) -> None:
        """Say what is trained, for how long, and how."""
        if not self.machine.is_main:
            return
        n, vocab_size = len(self.data.train), self.model.config.vocab_size
        self.reporter.say(f"{self.shape} · {n:,} training tokens, vocabulary {vocab_size:,}")
        steps, tokens = self.config.max_steps, f"{self.tokens(1):,} tokens"
        length = f"{steps:,} steps of {tokens} ({self.epochs(steps):.1f} epochs)"
        if self.clock.budget is not None:
            length = f"steps of {tokens}, for {format_seconds(self.clock.left(step))}"
        if (accumulated := math.ceil(plan.rows / plan.micro_batch_size)) > 1:
            length += f", {accumulated} micro-batches a step"
        self.reporter.say(f"{length}, on {self.machine.device} in {plan.precision} -> {self.run}")
        if note := self.task.note():
            self.reporter.say(note)

    def restart_speed(self, step: int) -> None:
        """Tokens per second are counted from now on: this was no step."""
        self._since, self._since_step = time.monotonic(), step

    def log_step(self, step: int, loss: float, norm: float, rate: float, best: float) -> None:
        """A step was taken; every `log_interval` of them one is written and shown."""
        self.recent.append(loss)
        if step % self.config.log_interval and step != self.config.max_steps:
            return
        passed = max(1e-9, time.monotonic() - self._since)
        per_second = self.tokens(step - self._since_step) / passed
        self.restart_speed(step)
        speed = round(per_second, 1)
        self.write(step, train_loss=loss, lr=rate, grad_norm=norm, tokens_per_second=speed)
        of = "" if self.clock.budget else f"/{self.config.max_steps:,}"
        parts = [f"step {step:,}{of}", f"train loss {sum(self.recent) / len(self.recent):.3f}"]
        if best < math.inf:
            parts.append(f"best val loss {best:.3f}")
        parts.append(f"{per_second:,.0f} tokens/s")
        if self.machine.peak_flops:
            used = per_second * self.model.config.flops_per_token() / self.machine.peak_flops
            parts.append(f"MFU {used:.0%}")
        parts.append(f"{format_seconds(self.clock.left(step))} left")
        self.reporter.status(" · ".join(parts))

    def write_evaluation(self, step: int, val_loss: float, kept: float | None) -> None:
        """The losses on the validation text and, if there is one, on the text to keep."""
        more = {} if kept is None else {"keep_loss": kept}
        self.write(step, val_loss=val_loss, **more)

    def say_evaluation(
        self, step: int, val_loss: float, best: float | None, kept: float | None
    ) -> None:
        """`best`: the best loss so far, if this is not the one."""
        note = "" if best is None else f" (best {best:.4f})"
        note += "" if kept is None else f"  keep loss {kept:.4f}"
        took = format_seconds(self.clock.elapsed())
        self.reporter.say(f"step {step:>6,}  val loss {val_loss:.4f}{note}  {took}")
        self.restart_speed(step)

    def write(self, step: int, **values: float) -> None:
        """A line of metrics.jsonl."""
        if self.log is not None:
            seconds = round(self.clock.elapsed(), 3)
            self.log.write(step=step, tokens=self.tokens(step), seconds=seconds, **values)

    def write_sample(self, step: int, text: str) -> None:
        write_sample(self.run / "samples.md", step, text)

    def close(self, state: LoopState, finished: bool, signal_number: int | None) -> TrainResult:
        """Say how the training ended; curve, report and result."""
        self.reporter.close()
        guessing = self.task.guessing(self.model)
        if self.log is not None:
            self.log.close()
            if state.evaluated_step is not None:
                loss_curve(self.run, guessing=guessing, per=self.task.per)
        step, seconds, samples = state.step, self.clock.elapsed(), tuple(state.samples)
        if not finished:
            self.reporter.say(f"stopped at step {step:,}; go on with: {self.how_to_resume}")
        elif not self.clock.is_over(step):
            more = f"no better validation loss in {self.config.patience} evaluations"
            self.reporter.say(f"stopped early at step {step:,}: {more}")
        report = Report(
            shape=self.shape,
            seconds=seconds,
            steps=step,
            tokens=self.tokens(step),
            epochs=self.epochs(step),
            val_loss=state.best_val_loss,
            guessing=guessing[1],
            spent=self.clock.spent,
            samples=samples,
            plan=state.plan,
            kept=tuple(state.kept),
        )
        if self.machine.is_main and finished:
            write_report(self.run, report)
        return TrainResult(
            self.run,
            step,
            state.first_val_loss,
            state.best_val_loss,
            seconds,
            samples,
            tuple(summary(report)),
            self.task.try_next,
            signal=None if finished else signal_number or signal.SIGTERM,  # another process's
        )

    @property
    def how_to_resume(self) -> str:
        return f"{program()} {self.task.verb} --resume {shlex.quote(str(self.run))}"

    def tokens(self, steps: int) -> int:
        return steps * self.rows_per_step * self.model.config.context_length

    def epochs(self, steps: int) -> float:
        windows = self.data.train.count(self.model.config.context_length)
        return steps * self.rows_per_step / windows
