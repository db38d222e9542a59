"""One loop for all training: batches in, a run directory out; stoppable and resumable anywhere.

    result = Trainer(run, model, train_config, dataset, machine, reporter, options).fit()

Everything that varies between steps (batch, learning rate, dropout) is a function of (seed,
step), so a resumed run repeats the uninterrupted one bit for bit on a CPU. This room knows the
model only as "tokens in, logits out", and nothing of where options and data come from.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import shlex
import signal
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassgpt import runtime
from glassgpt.checkpoints import run_directory as ckpt
from glassgpt.config import TrainConfig
from glassgpt.data.batches import IGNORE, Dataset, Split
from glassgpt.errors import UserError
from glassgpt.model import GPT
from glassgpt.reporting.plots import loss_curve
from glassgpt.reporting.run_log import (
    Expectation,
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
from glassgpt.system import Reporter
from glassgpt.training.optimizers import (
    learning_rate_at,
    make_optimizers,
    optimizer_tensors,
    restore_optimizers,
    set_learning_rate,
)
from glassgpt.training.schedule import Clock
from glassgpt.training.step import Passes
from glassgpt.training.task import TextTask

_RESUMED = ("step", "evaluations_without_best", "evaluated_step", "samples", "spent", "kept")
_KEPT_TOKENS = 1 << 16  # of the text to keep are enough to see whether it is forgotten
_EVALUATION_SHARE = 0.04  # of a budget, for one evaluation; more text than that is left out


class Trainer:
    """Everything a run needs between its first and its last step."""

    def __init__(
        self,
        run: Path,
        model: GPT,
        config: TrainConfig,
        data: Dataset,
        machine: runtime.Machine,
        reporter: Reporter,
        options: dict[str, Any],
        *,
        task: TextTask | None = None,
        began: float | None = None,
        plan: Expectation | None = None,
    ) -> None:
        """`began`: when the time of a budget started to run (time.monotonic); `plan`: what is
        expected of it."""
        self.run, self.config, self.data, self.machine = run, config, data, machine
        self.reporter, self.options, self.plan = reporter, options, plan
        self.model, self.task = model, task or TextTask(data.tokenizer, config)
        self.T, self.shape = model.config.context_length, shape_in_words(model.config)
        rows = max(1, round(config.batch_tokens / self.T / machine.world))
        self.rows_per_rank, self.rows_per_step = rows, rows * machine.world
        self.drops = bool(model.config.dropout or self.task.dropout)
        self.passes = Passes(model, config, machine, rows=rows, reporter=reporter,
                             packed=data.packed, drops=self.drops, **self.task.loss)  # fmt: skip
        self.optimizers = make_optimizers(
            model, config, layer_decay=self.task.layer_decay,
            low_precision=self.passes.precision == "bfloat16", workers=self.passes.workers,
        )  # fmt: skip
        self.scaler = self.passes.scaler
        self.step = 0
        self.clock = Clock(config, began=began or time.monotonic())
        self.eval_windows = (config.eval_batches or 0) * self.rows_per_step or None
        self.spent: dict[str, float] = {}  # part of the work -> seconds
        self.first_val_loss = self.best_val_loss = math.inf
        self.evaluations_without_best = 0
        self.evaluated_step: int | None = None
        self.samples: list[str] = []
        self.kept: list[float] = []  # losses on the text to keep: the first and the latest
        self.recent: deque[float] = deque(maxlen=50)
        self._unread: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def restore(
        self,
        saved: ckpt.Checkpoint | None,
        tensors: Mapping[str, np.ndarray],
        state: dict[str, Any],
    ) -> None:
        """Continue where `save` left off."""
        self.task.restore(self.model, saved, tensors)
        self.passes.weights_changed()
        restore_optimizers(self.optimizers, self.model, tensors)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name in _RESUMED:
            if name in state:  # older runs lack some
                setattr(self, name, state[name])
        self.passes.fits_in_memory = fits = state.get("fits_in_memory")
        if self.options.get("micro_batch_size") == state["options"].get("micro_batch_size"):
            self.passes.micro_batch_size = min(self.passes.micro_batch_size, fits or 1 << 62)
        if self.clock.budget is not None:  # else --eval-batches may have been given anew
            self.eval_windows = state.get("eval_windows", self.eval_windows)
        self.clock.used = state["seconds"]
        if state.get("plan") and self.options.get("budget") == state["options"].get("budget"):
            self.plan = Expectation(**state["plan"])
        for name in ("first_val_loss", "best_val_loss"):
            setattr(self, name, math.inf if state[name] is None else state[name])
        if self.clock.is_over(self.step) and self.evaluated_step == self.step:
            by_steps = self.step >= self.config.max_steps
            more = "--max-steps with a larger number" if by_steps else "more --budget"
            raise UserError(f"{self.run} is finished at step {self.step}; {more} goes on")

    def fit(self) -> TrainResult:
        """Train until `max_steps`, until patience is exhausted, or until asked to stop."""
        self.log = None
        if self.machine.is_main:
            RunLog(self.run).rewind(self.step)
            rewind_samples(self.run / "samples.md", self.step)
            ckpt.rewind_snapshots(self.run, self.step)
            self.log = RunLog(self.run, tensorboard=self.config.tensorboard,
                              wandb=self.config.wandb, options=self.options)  # fmt: skip
        self._describe()
        with runtime.StopRequest().listening() as self.stop:
            try:
                self.passes.compile(*self._batch())
                if self.clock.budget is None:
                    self.clock.began = time.monotonic()  # the time of training alone
                self._tick, self._tick_step = time.monotonic(), self.step
                self._foresee()
                finished = self._loop()
            except KeyboardInterrupt:  # a second Ctrl-C, or one where nobody listens
                self.reporter.close()
                self.reporter.say(f"stopped at once; go on with: {self._how_to_resume}")
                raise
        if not finished:
            self.save()
        elif self.config.snapshots:
            self._snapshot()
        return self._finish(finished)

    def _loop(self) -> bool:
        """Steps, evaluations and checkpoints in turn; False when asked to stop before the end."""
        clock, patience = self.clock, self.config.patience or math.inf
        while True:
            if clock.snapshot_is_due(self.step):
                self._snapshot()
            over = bool(self._agreed(clock.is_over(self.step)))
            due = over or self._agreed(clock.evaluation_is_due(self.step))
            if due and self.evaluated_step != self.step:
                self._evaluate_and_keep_best()
            elif self._agreed(clock.saving_is_due(self.step)):
                self.save()
            if self._stop_requested():
                return over and self.evaluated_step == self.step
            if over or self.evaluations_without_best >= patience:
                return True
            self._train_step()

    def _foresee(self) -> None:
        """Of a budget, keep time for the last evaluation and for saving: how long do they take?

        So much of the validation text is looked at as a twenty-fifth of the time allows.
        """
        clock = self.clock
        if clock.budget is None:
            return
        windows, took, loss = self._try_evaluation(0.01 * clock.budget)
        allowed = round(_EVALUATION_SHARE * clock.budget / took)
        there = self.data.val.count(self.T)
        if self.eval_windows is None and there > allowed:
            self.eval_windows = round(self._agreed(max(1, allowed)))
        clock.saw_evaluation(took * (self.eval_windows or there))
        if loss is not None and not math.isfinite(self.first_val_loss):
            self.first_val_loss = loss
        if self.machine.is_main and not self.samples:
            self._sample()
        self.save()

    def _try_evaluation(self, seconds: float) -> tuple[int, float, float | None]:
        """Evaluate on more and more windows, for about so long -> how many, seconds of one, loss.

        The first try is not counted: what it compiles and fetches is there afterwards.
        """
        windows = self.passes.micro_batch_size * self.machine.world
        self.evaluate(self.data.val, windows=windows)
        while True:
            started = time.monotonic()
            loss = self.evaluate(self.data.val, windows=windows)
            took = self._agreed(time.monotonic() - started)
            if took >= seconds / 2 or windows >= self.data.val.count(self.T) or loss is None:
                return windows, max(took, 1e-9) / windows, loss
            windows *= 2

    def _train_step(self) -> None:
        config, step, started = self.config, self.step, time.monotonic()
        done = self._agreed(self.clock.done(step)) if self.clock.budget else None
        rate = learning_rate_at(step, config, done)
        set_learning_rate(self.optimizers, config, rate)
        key = hash((config.seed, step, self.machine.rank)) & 0x7FFFFFFF
        if self.drops:  # masks, too, are a function of the step
            torch.manual_seed(key)
        with self._timed("data"):
            batch = self._batch()
        with self._timed("forward and backward"):
            loss = self.passes.gradients(*batch, key=key)
        with self._timed("optimizer"):
            for optimizer in self.optimizers:
                self.scaler.unscale_(optimizer)  # type: ignore[arg-type]
            norm = torch.nn.utils.clip_grad_norm_(
                self.model.parameters(), config.grad_clip or math.inf, foreach=True
            )
            numbers = self._read(loss / self.machine.world, norm, rate)
            for optimizer in self.optimizers:
                self.scaler.step(optimizer)  # type: ignore[arg-type]
                optimizer.zero_grad()
            self.scaler.update()
            self.passes.weights_changed()
        self.step += 1
        self.clock.saw_step(time.monotonic() - started)
        if numbers is not None:
            self._record(*numbers, rate)

    def _batch(self) -> tuple[np.ndarray, ...]:
        """This process's rows of the step's batch: tokens, targets, perhaps positions; (rows, T)"""
        first = self.machine.rank * self.rows_per_rank
        return self.data.train.batch(
            self.step, seed=self.config.seed, n=self.rows_per_step, T=self.T,
            rows=slice(first, first + self.rows_per_rank),
        )  # fmt: skip

    def _read(
        self, loss: torch.Tensor, norm: torch.Tensor, rate: float
    ) -> tuple[float, float] | None:
        """Loss and gradient norm as numbers, checked before they can spoil the weights.

        Reading from a GPU waits for it, so there only when something is written after this step:
        an earlier NaN is still one then, and never reaches a checkpoint. On a CPU it is free.
        """
        if not self.clock.writing_is_due(self.step + 1) and self.machine.device.type != "cpu":
            self._unread = loss, norm, rate
            return None
        self._unread = None
        numbers = loss.item(), norm.item()
        # float16 overflows now and then; its scaler leaves such a step out by itself.
        if not math.isfinite(numbers[0] if self.scaler.is_enabled() else sum(numbers)):
            self._diverged(*numbers, rate)
        return numbers

    def _record(self, loss: float, norm: float, rate: float) -> None:
        self.recent.append(loss)
        if self.step % self.config.log_interval == 0 or self.step == self.config.max_steps:
            now = time.monotonic()
            per_second = self._tokens(self.step - self._tick_step) / max(1e-9, now - self._tick)
            self._tick, self._tick_step = now, self.step
            self._write(train_loss=loss, lr=rate, grad_norm=norm,
                        tokens_per_second=round(per_second, 1))  # fmt: skip
            self.reporter.status(self._status_line(per_second))

    def _status_line(self, per_second: float) -> str:
        of = "" if self.clock.budget else f"/{self.config.max_steps:,}"
        parts = [
            f"step {self.step:,}{of}",
            f"train loss {sum(self.recent) / len(self.recent):.3f}",
            *([f"best val loss {self.best_val_loss:.3f}"] if self.best_val_loss < math.inf else []),
            f"{per_second:,.0f} tokens/s",
        ]
        if self.machine.peak_flops:
            used = per_second * self.model.config.flops_per_token() / self.machine.peak_flops
            parts.append(f"MFU {used:.0%}")
        return " · ".join([*parts, f"{format_seconds(self.clock.left(self.step))} left"])

    def _diverged(self, loss: float, norm: float, rate: float) -> None:
        raise UserError(
            f"training diverged at step {self.step + 1}: loss {loss}, gradient norm {norm:.3g}, "
            f"learning rate {rate:.2e}; {self.run} keeps the last good checkpoint. Usual remedies: "
            "lower --learning-rate and --muon-learning-rate, more --warmup-steps, --grad-clip 1, "
            "--dtype float32"
        )

    # -- evaluation ------------------------------------------------------------------------------

    def _evaluate_and_keep_best(self) -> None:
        with self._timed("evaluation", self.clock.saw_evaluation):
            val_loss = self.evaluate(self.data.val, windows=self.eval_windows)
        if val_loss is None:  # asked to stop in the middle: done again after resuming
            return
        if not math.isfinite(val_loss):
            self._diverged(val_loss, math.nan, math.nan)
        self.evaluated_step = self.step
        if not math.isfinite(self.first_val_loss):
            self.first_val_loss = val_loss
        better = val_loss < self.best_val_loss
        self.evaluations_without_best = 0 if better else self.evaluations_without_best + 1
        self.best_val_loss = min(self.best_val_loss, val_loss)
        more = self._keep_loss()
        self._write(val_loss=val_loss, **more)
        if self.machine.is_main:
            if better:
                with self._timed("saving"):
                    self.task.save(self.run, self.model, self._info())
            self._sample()
        self.save()
        note = "" if better else f" (best {self.best_val_loss:.4f})"
        note += "".join(f"  {name.replace('_', ' ')} {loss:.4f}" for name, loss in more.items())
        took = format_seconds(self.clock.elapsed())
        self.reporter.say(f"step {self.step:>6,}  val loss {val_loss:.4f}{note}  {took}")
        self._tick, self._tick_step = time.monotonic(), self.step

    def _keep_loss(self) -> dict[str, float]:
        """Of the text that should not be forgotten, if there is one."""
        if self.data.keep is None:
            return {}
        loss = self.evaluate(self.data.keep, windows=max(1, _KEPT_TOKENS // self.T))
        self.kept = [*self.kept[:1], loss] if loss is not None else self.kept
        return {} if loss is None else {"keep_loss": loss}

    def evaluate(self, split: Split, *, windows: int | None = None) -> float | None:
        """Mean loss over a split, or over `windows` spread over it; None when asked to stop."""

        def work(rows: int) -> tuple[float, float]:
            batches = split.windows(n=rows, T=self.T, rank=machine.rank, world=machine.world,
                                    limit=windows)  # fmt: skip
            total = count = 0.0
            for number, batch in enumerate(batches):
                if self._stop_now():
                    break
                if number % 64 == 63:
                    share = number * rows * machine.world / (windows or split.count(self.T))
                    self.reporter.status(f"evaluating: {share:.0%} of the validation text")
                total += self.passes.losses(*batch)
                count += int(np.count_nonzero(batch[1] != IGNORE))
            return total, count

        machine = self.machine
        total, count = machine.sum(*self.passes.evaluate(work))
        return None if self._stop_now() else total / count

    def _sample(self) -> None:
        with self._timed("samples", self.clock.saw_sampling):
            if text := self.task.show(self.model):
                self.samples = [*self.samples[:1], text]
                write_sample(self.run / "samples.md", self.step, text)

    # -- keeping ---------------------------------------------------------------------------------

    def save(self) -> None:
        """Replace `checkpoints/last` by the present moment."""
        if not self.machine.is_main:
            return
        if self._unread is not None:  # with a budget, the clock says when to save
            loss, norm, rate = self._unread
            if not math.isfinite(loss.item() + norm.item()) and not self.scaler.is_enabled():
                self._diverged(loss.item(), norm.item(), rate)
        with self._timed("saving", self.clock.saw_saving):
            saved, tensors = self.task.to_resume(self.model, self._info())
            tensors |= optimizer_tensors(self.optimizers, self.model)
            ckpt.save_training(self.run, saved, tensors, self._state())

    def _state(self) -> dict[str, Any]:
        """What state.json says: all that goes on, beside weights and moments."""
        state = {name: getattr(self, name) for name in _RESUMED}
        return state | {
            "eval_windows": self.eval_windows,
            "fits_in_memory": self.passes.fits_in_memory,
            **self.task.state(),
            "seconds": self.clock.elapsed(),
            "first_val_loss": ckpt.finite_or_none(self.first_val_loss),
            "best_val_loss": ckpt.finite_or_none(self.best_val_loss),
            "scaler": self.scaler.state_dict(),
            "plan": dataclasses.asdict(self.plan) if self.plan else None,
            "options": self.options,
            "data_path": str(self.data.path.absolute()),
            "data_fingerprint": self.data.fingerprint,
        }

    def _snapshot(self) -> None:
        """Keep the model as it is now, for good. Where there is no room, training goes on."""
        if not self.machine.is_main:
            return
        with self._timed("saving", self.clock.saw_snapshot):
            try:
                now = self.task.checkpoint(self.model, self._info())
                ckpt.save_snapshot(self.run, self.step, now)
            except UserError as error:
                self.reporter.say(f"no snapshot of step {self.step:,}: {error}")

    def _info(self) -> dict[str, Any]:
        """What glassgpt.json says of it."""
        return {
            "torch_version": torch.__version__,
            "parameters": self.model.config.n_parameters,
            "step": self.step,
            "best_val_loss": ckpt.finite_or_none(self.best_val_loss),
            "data": {"fingerprint": self.data.fingerprint, "path": str(self.data.path)},
            "options": self.options,
            "train": dataclasses.asdict(self.config),
        }

    def _finish(self, finished: bool) -> TrainResult:
        self.reporter.close()
        self.passes.close()
        if self.log is not None:
            self.log.close()
            if self.evaluated_step is not None:
                loss_curve(self.run, guessing=self.task.guessing(self.model), per=self.task.per)
        if not finished:
            self.reporter.say(f"stopped at step {self.step:,}; go on with: {self._how_to_resume}")
        elif not self.clock.is_over(self.step):
            self.reporter.say(f"stopped early at step {self.step:,}: no better validation loss in "
                              f"{self.config.patience} evaluations")  # fmt: skip
        stopped_by = None if finished else self.stop.signal or signal.SIGTERM  # another rank's
        report = self._report()
        if self.machine.is_main and finished:
            write_report(self.run, report)
        return TrainResult(self.run, self.step, self.first_val_loss, self.best_val_loss,
                           self.clock.elapsed(), tuple(self.samples), tuple(summary(report)),
                           self.task.try_next, stopped_by)  # fmt: skip

    def _report(self) -> Report:
        return Report(
            shape=self.shape, seconds=self.clock.elapsed(), steps=self.step,
            tokens=self._tokens(self.step), epochs=self._epochs(self.step),
            val_loss=self.best_val_loss,
            guessing=self.task.guessing(self.model)[1], spent=self.spent,
            samples=tuple(self.samples), plan=self.plan, kept=tuple(self.kept),
        )  # fmt: skip

    # -- small things ----------------------------------------------------------------------------

    @property
    def _how_to_resume(self) -> str:
        return f"{program()} {self.task.verb} --resume {shlex.quote(str(self.run))}"

    def _describe(self) -> None:
        if not self.machine.is_main:
            return
        accumulated = math.ceil(self.rows_per_rank / self.passes.micro_batch_size)
        self.reporter.say(f"{self.shape} · {len(self.data.train):,} training tokens, "
                          f"vocabulary {self.model.config.vocab_size:,}")  # fmt: skip
        steps = self.config.max_steps
        length = f"{steps:,} steps of {self._tokens(1):,} tokens ({self._epochs(steps):.1f} epochs)"
        if self.clock.budget is not None:
            left = format_seconds(self.clock.left(self.step))
            length = f"steps of {self._tokens(1):,} tokens, for {left}"
        self.reporter.say(
            length + (f", {accumulated} micro-batches a step" if accumulated > 1 else "")
            + f", on {self.machine.device} in {self.passes.precision} -> {self.run}"
        )  # fmt: skip
        if note := self.task.note():
            self.reporter.say(note)

    def _stop_now(self) -> bool:
        """May an evaluation break off? Not with several processes: all must do the same."""
        return self.machine.world == 1 and self.stop.requested

    def _stop_requested(self) -> bool:
        """True on every rank when any of them was asked to stop."""
        return self.machine.sum(float(self.stop.requested))[0] > 0

    def _tokens(self, steps: int) -> int:
        return steps * self.rows_per_step * self.T

    def _epochs(self, steps: int) -> float:
        return steps * self.rows_per_step / self.data.train.count(self.T)

    def _agreed(self, value: float) -> float:
        """The main process's value, in all: with a budget, each has a clock of its own."""
        if self.clock.budget is None or self.machine.world == 1:
            return value
        return self.machine.sum(float(value) if self.machine.is_main else 0.0)[0]

    @contextlib.contextmanager
    def _timed(self, part: str, saw: Callable[[float], None] | None = None) -> Iterator[None]:
        """Seconds of `part`, for the report, and told to `saw`. A GPU works on while we count:
        there, it is the time in which the host waited."""
        started = time.monotonic()
        yield
        took = time.monotonic() - started
        self.spent[part] = self.spent.get(part, 0.0) + took
        if saw is not None:
            saw(took)

    def _write(self, **values: Any) -> None:
        if self.log is not None:
            self.log.write(step=self.step, tokens=self._tokens(self.step),
                           seconds=round(self.clock.elapsed(), 3), **values)  # fmt: skip
