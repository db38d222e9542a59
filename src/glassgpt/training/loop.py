"""One loop for all training: batches in, a run directory out; it can stop and resume anywhere.

    result = Trainer(run, model, train_config, dataset, machine, reporter, options).fit()

Whatever varies between steps (batch, learning rate, dropout) is a function of (seed, step), so a
resumed run repeats the uninterrupted one bit for bit on a CPU. This module knows the model only as
"tokens in, loss out", and nothing of where options and data come from.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch

from glassgpt import runtime
from glassgpt.checkpoints import run_directory as ckpt
from glassgpt.config import TrainConfig
from glassgpt.data.batches import IGNORE, Split
from glassgpt.data.dataset import Dataset
from glassgpt.errors import UserError
from glassgpt.model import GPT
from glassgpt.options import Options
from glassgpt.reporting.run_log import Expectation, TrainResult
from glassgpt.system import Json, Reporter
from glassgpt.training.journal import Journal
from glassgpt.training.optimizers import (
    learning_rate_at,
    optimizer_tensors,
    restore_optimizers,
    set_learning_rate,
)
from glassgpt.training.schedule import Clock
from glassgpt.training.step import Batch, TrainingStep
from glassgpt.training.task import TextTask

_KEPT_TOKENS = 1 << 16  # tokens of the text to keep: enough to see whether it is forgotten
_EVALUATION_SHARE = 0.04  # of a budget, for one evaluation; it looks at no more text than that


@dataclass
class LoopState:
    """All that an interrupted loop needs to go on, beside weights and optimizer moments."""

    step: int = 0
    seconds: float = 0.0  # of training, over all sessions
    spent: dict[str, float] = field(default_factory=dict)  # part of the work -> seconds
    first_val_loss: float = math.inf  # nats per token, as all losses
    best_val_loss: float = math.inf
    evaluations_without_best: int = 0
    evaluated_step: int | None = None
    eval_windows: int | None = None  # of the validation text are looked at; None: all
    samples: list[str] = field(default_factory=list)  # the first and the latest
    kept: list[float] = field(default_factory=list)  # on the text to keep, the first and the latest
    fits_in_memory: int | None = None  # sequences at a time, once more did not fit
    scaler: Json = field(default_factory=dict)  # of float16 gradients
    plan: Expectation | None = None

    def to_json(self) -> Json:
        first, best = map(ckpt.finite_or_none, (self.first_val_loss, self.best_val_loss))
        return dataclasses.asdict(self) | {"first_val_loss": first, "best_val_loss": best}

    @classmethod
    def from_json(cls, saved: Json) -> LoopState:
        """Earlier versions of this program saved less; what is missing is as at the beginning."""
        names = [each.name for each in dataclasses.fields(cls)]
        known = {name: saved[name] for name in names if saved.get(name) is not None}
        if "plan" in known:
            known["plan"] = Expectation(**known["plan"])
        return cls(**known)


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
        options: Options,
        *,
        task: TextTask | None = None,
        began: float | None = None,
        plan: Expectation | None = None,
    ) -> None:
        """`began`: when the time of a budget started to run (time.monotonic); `plan`: what is
        expected of it."""
        self.run, self.config, self.data, self.machine = run, config, data, machine
        self.model, self.reporter, self.options = model, reporter, options
        self.task = task or TextTask(data.tokenizer, config)
        self.T = model.config.context_length
        self.drops = bool(model.config.dropout or self.task.dropout)
        self.training_step = TrainingStep(
            model,
            config,
            machine,
            reporter=reporter,
            packed=data.packed,
            drops=self.drops,
            layer_decay=self.task.layer_decay,
            class_weights=self.task.class_weights,
        )
        self.optimizers = self.training_step.optimizers
        self.rows_per_rank = self.training_step.plan.rows
        rows = self.rows_per_step = self.rows_per_rank * machine.world
        self.state = LoopState(eval_windows=(config.eval_batches or 0) * rows or None, plan=plan)
        self.clock = Clock(config, began=began or time.monotonic())
        self.journal = Journal(
            run, config, model, data, machine, self.task, self.clock, reporter, options, rows
        )
        self._unread: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def fit(self) -> TrainResult:
        """Train until `max_steps`, until time or patience is exhausted, or until asked to stop."""
        self.journal.open(self.state.step)
        self.journal.describe(self.training_step.plan, self.state.step)
        with runtime.StopRequest().listening() as self.stop:
            try:
                self.training_step.compile(self._batch())
                if self.clock.budget is None:
                    self.clock.began = time.monotonic()  # the time of training alone
                else:
                    self._reserve_time()
                self.journal.restart_speed(self.state.step)
                finished = self._loop()
            except KeyboardInterrupt:  # a second Ctrl-C, or one where nobody listens
                self.reporter.close()
                self.reporter.say(f"stopped at once; go on with: {self.journal.how_to_resume}")
                raise
        if not finished:
            self.save()
        elif self.config.snapshots:
            self._snapshot()
        self.training_step.close()
        return self.journal.close(self.state, finished, self.stop.signal)

    # -- the loop --------------------------------------------------------------------------------

    def _loop(self) -> bool:
        """Steps, evaluations and checkpoints in turn; False when asked to stop before the end."""
        state, clock, patience = self.state, self.clock, self.config.patience or math.inf
        while True:
            if clock.snapshot_is_due(state.step):
                self._snapshot()
            over = bool(self._agreed(clock.is_over(state.step)))
            due = over or self._agreed(clock.evaluation_is_due(state.step))
            if due and state.evaluated_step != state.step:
                self._evaluate_and_keep_best()
            elif self._agreed(clock.saving_is_due(state.step)):
                self.save()
            if self._stop_requested():
                return over and state.evaluated_step == state.step
            if over or state.evaluations_without_best >= patience:
                return True
            self._train_step()

    def _train_step(self) -> None:
        config, step, started = self.config, self.state.step, time.monotonic()
        done = self._agreed(self.clock.done(step)) if self.clock.budget else None
        rate = learning_rate_at(step, config, done)
        set_learning_rate(self.optimizers, config, rate)
        key = runtime.seed_of(config.seed, step, self.machine.rank)
        if self.drops:  # dropout masks, too, are a function of the step
            torch.manual_seed(key)
        with self.clock.timed("data"):
            batch = self._batch()
        with self.clock.timed("forward and backward"):
            loss = self.training_step.gradients(batch, key)
        with self.clock.timed("optimizer"):
            norm = self.training_step.clip(config.grad_clip)
            numbers = self._read(loss / self.machine.world, norm, rate)
            self.training_step.update()
        self.state.step += 1
        self.clock.saw_step(time.monotonic() - started)
        if numbers is not None:
            self.journal.log_step(step + 1, *numbers, rate, self.state.best_val_loss)

    def _batch(self) -> Batch:
        """This process's rows of the step's batch: tokens, targets, perhaps positions; (rows, T)"""
        first, seed = self.machine.rank * self.rows_per_rank, self.config.seed
        mine, all_rows = slice(first, first + self.rows_per_rank), self.rows_per_step
        return self.data.train.batch(self.state.step, seed=seed, n=all_rows, T=self.T, rows=mine)

    def _read(
        self, loss: torch.Tensor, norm: torch.Tensor, rate: float
    ) -> tuple[float, float] | None:
        """Loss and gradient norm as numbers, checked before they can spoil the weights.

        Reading from a GPU waits for it, so there only when something is written after this step:
        an earlier NaN is still one then, and never reaches a checkpoint. On a CPU it is free.
        """
        if not self.clock.writing_is_due(self.state.step + 1) and self.machine.device.type != "cpu":
            self._unread = loss, norm, rate
            return None
        self._unread = None
        numbers = loss.item(), norm.item()
        # float16 overflows now and then; its scaler leaves such a step out by itself.
        scaled = self.training_step.scaler.is_enabled()
        if not math.isfinite(numbers[0] if scaled else sum(numbers)):
            self._diverged(*numbers, rate)
        return numbers

    def _diverged(self, loss: float, norm: float, rate: float) -> None:
        raise UserError(
            f"training diverged at step {self.state.step + 1}: loss {loss}, gradient norm "
            f"{norm:.3g}, learning rate {rate:.2e}; {self.run} keeps the last good checkpoint. "
            "Usual remedies: lower --learning-rate and --muon-learning-rate, more --warmup-steps, "
            "--grad-clip 1, --dtype float32"
        )

    # -- evaluation ------------------------------------------------------------------------------

    def _evaluate_and_keep_best(self) -> None:
        state = self.state
        with self.clock.timed("evaluation", self.clock.saw_evaluation):
            val_loss = self.evaluate(self.data.val, windows=state.eval_windows)
        if val_loss is None:  # asked to stop in the middle: done again after resuming
            return
        if not math.isfinite(val_loss):
            self._diverged(val_loss, math.nan, math.nan)
        state.evaluated_step = state.step
        if not math.isfinite(state.first_val_loss):
            state.first_val_loss = val_loss
        better = val_loss < state.best_val_loss
        state.evaluations_without_best = 0 if better else state.evaluations_without_best + 1
        state.best_val_loss = min(state.best_val_loss, val_loss)
        kept = self._loss_on_text_to_keep()
        self.journal.write_evaluation(state.step, val_loss, kept)
        if self.machine.is_main:
            if better:
                with self.clock.timed("saving"):
                    self.task.save(self.run, self.model, self._info())
            self._sample()
        self.save()
        best = None if better else state.best_val_loss
        self.journal.say_evaluation(state.step, val_loss, best, kept)

    def _loss_on_text_to_keep(self) -> float | None:
        """Of the text that should not be forgotten, if there is one."""
        if self.data.keep is None:
            return None
        loss = self.evaluate(self.data.keep, windows=max(1, _KEPT_TOKENS // self.T))
        if loss is not None:
            self.state.kept = [*self.state.kept[:1], loss]
        return loss

    def evaluate(self, split: Split, *, windows: int | None = None) -> float | None:
        """Mean loss over a split, or over `windows` spread over it; None when asked to stop."""
        machine, rows, total, count = self.machine, self.training_step.evaluation_rows, 0.0, 0
        place = {"rank": machine.rank, "world": machine.world}
        batches = split.windows(n=rows, T=self.T, limit=windows, **place)
        for number, batch in enumerate(batches):
            if self._stop_now():
                break
            if number % 64 == 63:
                share = number * rows * machine.world / (windows or split.count(self.T))
                self.reporter.status(f"evaluating: {share:.0%} of the validation text")
            total += self.training_step.losses(batch)
            count += int(np.count_nonzero(batch[1] != IGNORE))
        total, count = machine.sum(total, count)
        return None if self._stop_now() else total / count

    def _sample(self) -> None:
        with self.clock.timed("samples", self.clock.saw_sampling):
            if text := self.task.show(self.model):
                self.state.samples = [*self.state.samples[:1], text]
                self.journal.write_sample(self.state.step, text)

    def _reserve_time(self) -> None:
        """Of a budget, for the last evaluation and for saving, by trying how long they take.

        An evaluation looks at as much of the validation text as its share of the budget allows.
        """
        windows, took, loss = self._try_evaluation(0.01 * (self.clock.budget or 0.0))
        allowed = round(_EVALUATION_SHARE * (self.clock.budget or 0.0) / took)
        there = self.data.val.count(self.T)
        if self.state.eval_windows is None and there > allowed:
            self.state.eval_windows = round(self._agreed(max(1, allowed)))
        self.clock.saw_evaluation(took * (self.state.eval_windows or there))
        if loss is not None and not math.isfinite(self.state.first_val_loss):
            self.state.first_val_loss = loss
        if self.machine.is_main and not self.state.samples:
            self._sample()
        self.save()

    def _try_evaluation(self, seconds: float) -> tuple[int, float, float | None]:
        """Evaluate on more and more windows, for about so long -> how many, seconds of one, loss.

        The first try is not counted: what it compiles and fetches is there afterwards.
        """
        windows = self.training_step.plan.micro_batch_size * self.machine.world
        self.evaluate(self.data.val, windows=windows)
        while True:
            started = time.monotonic()
            loss = self.evaluate(self.data.val, windows=windows)
            took = self._agreed(time.monotonic() - started)
            if took >= seconds / 2 or windows >= self.data.val.count(self.T) or loss is None:
                return windows, max(took, 1e-9) / windows, loss
            windows *= 2

    # -- saving and resuming ---------------------------------------------------------------------

    def save(self) -> None:
        """Replace `checkpoints/last` by the present moment."""
        if not self.machine.is_main:
            return
        if self._unread is not None:  # with a budget, the clock says when to save
            loss, norm, rate = self._unread
            finite = math.isfinite(loss.item() + norm.item())
            if not finite and not self.training_step.scaler.is_enabled():
                self._diverged(loss.item(), norm.item(), rate)
        with self.clock.timed("saving", self.clock.saw_saving):
            saved, tensors = self.task.to_resume(self.model, self._info())
            tensors |= optimizer_tensors(self.optimizers, self.model)
            self.state.seconds, self.state.spent = self.clock.elapsed(), self.clock.spent
            self.state.fits_in_memory = self.training_step.fits_in_memory
            self.state.scaler = self.training_step.scaler.state_dict()
            origin = {
                "options": self.options,
                "data_path": str(self.data.path.absolute()),
                "data_fingerprint": self.data.fingerprint,
            }
            state = self.state.to_json() | self.task.state() | origin
            ckpt.save_training(self.run, saved, tensors, state)

    def restore(
        self,
        saved: ckpt.Checkpoint | None,
        tensors: Mapping[str, np.ndarray],
        state: Json,
    ) -> None:
        """Continue where `save` left off."""
        self.task.restore(self.model, saved, tensors)
        self.training_step.weights_changed()
        restore_optimizers(self.optimizers, self.model, tensors)
        new, self.state = self.state, LoopState.from_json(state)
        given, before = self.options.get, state["options"].get
        if self.clock.budget is None or "eval_windows" not in state:
            self.state.eval_windows = new.eval_windows  # --eval-batches may have been given anew
        if given("budget") != before("budget"):
            self.state.plan = new.plan
        if self.state.scaler:
            self.training_step.scaler.load_state_dict(self.state.scaler)
        same = given("micro_batch_size") == before("micro_batch_size")
        self.training_step.resume_with(self.state.fits_in_memory, limited=same)
        self.clock.used, self.clock.spent = self.state.seconds, self.state.spent
        if self.clock.is_over(self.state.step) and self.state.evaluated_step == self.state.step:
            by_steps = self.state.step >= self.config.max_steps
            more = "--max-steps with a larger number" if by_steps else "more --budget"
            raise UserError(f"{self.run} is finished at step {self.state.step}; {more} goes on")

    def _snapshot(self) -> None:
        """Keep the model as it is now, for good. Where there is no room, training goes on."""
        if not self.machine.is_main:
            return
        with self.clock.timed("saving", self.clock.saw_snapshot):
            try:
                now = self.task.checkpoint(self.model, self._info())
                ckpt.save_snapshot(self.run, self.state.step, now)
            except UserError as error:
                self.reporter.say(f"no snapshot of step {self.state.step:,}: {error}")

    def _info(self) -> Json:
        """What glassgpt.json says of the model."""
        return {
            "torch_version": torch.__version__,
            "parameters": self.model.config.n_parameters,
            "step": self.state.step,
            "best_val_loss": ckpt.finite_or_none(self.state.best_val_loss),
            "data": {"fingerprint": self.data.fingerprint, "path": str(self.data.path)},
            "options": self.options,
            "train": dataclasses.asdict(self.config),
        }

    # -- small things ----------------------------------------------------------------------------

    def _stop_now(self) -> bool:
        """May an evaluation break off? Not with several processes: all must do the same."""
        return self.machine.world == 1 and self.stop.requested

    def _stop_requested(self) -> bool:
        """True on every rank when any of them was asked to stop."""
        return self.machine.sum(float(self.stop.requested))[0] > 0

    def _agreed(self, value: float) -> float:
        """The main process's value, in all: with a budget, each has a clock of its own."""
        if self.clock.budget is None or self.machine.world == 1:
            return value
        return self.machine.sum(float(value) if self.machine.is_main else 0.0)[0]
