"""One loop for all training: batches in, a run directory out; stoppable and resumable anywhere.

    result = Trainer(run, model_config, train_config, dataset, machine, progress, options).fit()

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
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassgpt import checkpoint as ckpt
from glassgpt import runtime
from glassgpt.clock import Clock
from glassgpt.config import ModelConfig, Sampling, TrainConfig
from glassgpt.data.batches import IGNORE, Dataset, TokenFiles
from glassgpt.engine import Engine
from glassgpt.engine.cpu import NumpyEngine
from glassgpt.engine.reference import ReferenceEngine
from glassgpt.errors import UserError
from glassgpt.generate import complete
from glassgpt.model import GPT, load_weights
from glassgpt.optim import (
    learning_rate_at,
    make_optimizers,
    optimizer_tensors,
    restore_optimizers,
    set_learning_rate,
)
from glassgpt.passes import Passes
from glassgpt.plot import loss_curve
from glassgpt.report import Expectation, Report, TrainResult, summary, write_report
from glassgpt.runlog import Progress, RunLog, format_seconds, program, rewind_samples, write_sample
from glassgpt.tokenizer import unknown_note

_RESUMED = ("step", "evaluations_without_best", "evaluated_step", "samples", "spent")
_SMALL = 20_000_000  # parameters: a copy of them for sampling is no matter
_EVALUATION_SHARE = 0.04  # of a budget, for one evaluation; more text than that is left out


class Trainer:
    """Everything a run needs between its first and its last step."""

    def __init__(
        self,
        run: Path,
        model_config: ModelConfig,
        config: TrainConfig,
        data: Dataset,
        machine: runtime.Machine,
        progress: Progress,
        options: dict[str, Any],
        *,
        began: float | None = None,
        plan: Expectation | None = None,
    ) -> None:
        """`began`: when the time of a budget started to run (time.monotonic); `plan`: what is
        expected of it."""
        self.run, self.config, self.data, self.machine = run, config, data, machine
        self.progress, self.options, self.plan = progress, options, plan
        torch.manual_seed(config.seed)
        self.model = GPT(model_config).to(machine.device)
        self.T = model_config.context_length
        rows = max(1, round(config.batch_tokens / self.T / machine.world))
        self.rows_per_rank, self.rows_per_step = rows, rows * machine.world
        self.passes = Passes(self.model, config, machine, rows=rows, progress=progress)
        self.optimizers = make_optimizers(
            self.model, config, low_precision=self.passes.precision == "bfloat16",
            workers=self.passes.workers,
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
        self.recent: deque[float] = deque(maxlen=50)
        self._unread: tuple[torch.Tensor, torch.Tensor, float] | None = None

    def restore(
        self, saved: ckpt.Checkpoint, optimizer: Mapping[str, np.ndarray], state: dict[str, Any]
    ) -> None:
        """Continue where `save` left off."""
        load_weights(self.model, saved.weights)
        self.passes.weights_changed()
        restore_optimizers(self.optimizers, self.model, optimizer)
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
                self.progress.close()
                self.progress.say(f"stopped at once; go on with: {self._how_to_resume}")
                raise
        if not finished:
            self.save()
        return self._finish(finished)

    def _loop(self) -> bool:
        """Steps, evaluations and checkpoints in turn; False when asked to stop before the end."""
        clock, patience = self.clock, self.config.patience or math.inf
        while True:
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
        there = max(1, (len(self.data.val) - 1) // self.T)
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
            if took >= seconds / 2 or windows * self.T >= len(self.data.val) or loss is None:
                return windows, max(took, 1e-9) / windows, loss
            windows *= 2

    def _train_step(self) -> None:
        config, step, started = self.config, self.step, time.monotonic()
        done = self._agreed(self.clock.done(step)) if self.clock.budget else None
        rate = learning_rate_at(step, config, done)
        set_learning_rate(self.optimizers, config, rate)
        key = hash((config.seed, step, self.machine.rank)) & 0x7FFFFFFF
        if self.model.config.dropout:  # masks, too, are a function of the step
            torch.manual_seed(key)
        with self._timed("data"):
            batch = self._batch()
        with self._timed("forward and backward"):
            loss = self.passes.gradients(*batch, key)
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

    def _batch(self) -> tuple[np.ndarray, np.ndarray]:
        """This process's rows of the step's batch: tokens and targets (rows, T)."""
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
        config, next_step = self.config, self.step + 1
        intervals = (config.log_interval, config.eval_interval, config.checkpoint_interval)
        due = next_step == config.max_steps or any(n and next_step % n == 0 for n in intervals)
        if not due and self.machine.device.type != "cpu":
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
            self.progress.status(self._status_line(per_second))

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
        with self._timed("evaluation"):
            started = time.monotonic()
            val_loss = self.evaluate(self.data.val, windows=self.eval_windows)
            self.clock.saw_evaluation(time.monotonic() - started)
        if val_loss is None:  # asked to stop in the middle: done again after resuming
            return
        if not math.isfinite(val_loss):
            self._diverged(val_loss, math.nan, math.nan)
        self.evaluated_step = self.step
        if not math.isfinite(self.first_val_loss):
            self.first_val_loss = val_loss
        better = val_loss < self.best_val_loss
        self.evaluations_without_best = 0 if better else self.evaluations_without_best + 1
        if better:
            self.best_val_loss = val_loss
        self._write(val_loss=val_loss)
        if self.machine.is_main:
            if better:
                with self._timed("saving"):
                    ckpt.save_model(self.run, self._checkpoint())
            with self._timed("samples"):
                self._sample()
        self.save()
        note = "" if better else f" (best {self.best_val_loss:.4f})"
        took = format_seconds(self.clock.elapsed())
        self.progress.say(f"step {self.step:>6,}  val loss {val_loss:.4f}{note}  {took}")
        self._tick, self._tick_step = time.monotonic(), self.step

    def evaluate(self, split: TokenFiles, *, windows: int | None = None) -> float | None:
        """Mean loss over a split, or over `windows` spread over it; None when asked to stop."""

        def work(rows: int) -> tuple[float, float]:
            batches = split.windows(n=rows, T=self.T, rank=machine.rank, world=machine.world,
                                    limit=windows)  # fmt: skip
            total = count = 0.0
            for number, (tokens, targets) in enumerate(batches):
                if self._stop_now():
                    break
                if number % 64 == 63:
                    share = count * machine.world / (windows * self.T if windows else len(split))
                    self.progress.status(f"evaluating: {share:.0%} of the validation text")
                total += self.passes.losses(tokens, targets)
                count += int(np.count_nonzero(targets != IGNORE))
            return total, count

        machine = self.machine
        total, count = machine.sum(*self.passes.evaluate(work))
        return None if self._stop_now() else total / count

    def _sample(self) -> None:
        if not self.config.sample_tokens:
            return
        started = time.monotonic()
        tokenizer, prompt = self.data.tokenizer, self.config.sample_prompt
        ids = tokenizer.encode(prompt, special=True) if prompt else []
        how = Sampling(max_new_tokens=self.config.sample_tokens, temperature=0.8, top_k=200)
        config = self.model.config
        engine: Engine = ReferenceEngine(self.model)
        if self.machine.device.type == "cpu" and config.n_parameters < _SMALL:
            engine = NumpyEngine(config, self._checkpoint().weights)  # torch takes its time
        [piece] = complete(engine, tokenizer, [ids], how)
        text = (prompt or "") + piece.text
        self.samples = [*self.samples[:1], text]
        write_sample(self.run / "samples.md", self.step, text)
        self.clock.saw_sampling(time.monotonic() - started)

    # -- keeping ---------------------------------------------------------------------------------

    def save(self) -> None:
        """Replace `checkpoints/last` by the present moment."""
        if not self.machine.is_main:
            return
        if self._unread is not None:  # with a budget, the clock says when to save
            loss, norm, rate = self._unread
            if not math.isfinite(loss.item() + norm.item()) and not self.scaler.is_enabled():
                self._diverged(loss.item(), norm.item(), rate)
        started = time.monotonic()
        optimizer = optimizer_tensors(self.optimizers, self.model)
        state = {name: getattr(self, name) for name in _RESUMED}
        state |= {
            "eval_windows": self.eval_windows,
            "fits_in_memory": self.passes.fits_in_memory,
            "seconds": self.clock.elapsed(),
            "first_val_loss": _or_none(self.first_val_loss),
            "best_val_loss": _or_none(self.best_val_loss),
            "scaler": self.scaler.state_dict(),
            "plan": dataclasses.asdict(self.plan) if self.plan else None,
            "options": self.options,
            "data_path": str(self.data.path.absolute()),
            "data_fingerprint": self.data.fingerprint,
        }
        ckpt.save_training(self.run, self._checkpoint(), optimizer, state)
        took = time.monotonic() - started
        self.spent["saving"] = self.spent.get("saving", 0.0) + took
        self.clock.saw_saving(took)

    def _checkpoint(self) -> ckpt.Checkpoint:
        weights = {
            name: tensor.detach().cpu().numpy()
            for name, tensor in self.model.state_dict().items()
            if name in self.model.config.weight_shapes
        }
        info = {
            "torch_version": torch.__version__,
            "parameters": self.model.config.n_parameters,
            "step": self.step,
            "best_val_loss": _or_none(self.best_val_loss),
            "data": {"fingerprint": self.data.fingerprint, "path": str(self.data.path)},
            "options": self.options,
            "train": dataclasses.asdict(self.config),
        }
        return ckpt.Checkpoint(self.model.config, weights, self.data.tokenizer, info)

    def _finish(self, finished: bool) -> TrainResult:
        self.progress.close()
        self.passes.close()
        if self.log is not None:
            self.log.close()
            if self.evaluated_step is not None:
                loss_curve(self.run, vocab_size=self.model.config.vocab_size)
        if not finished:
            self.progress.say(f"stopped at step {self.step:,}; go on with: {self._how_to_resume}")
        elif not self.clock.is_over(self.step):
            self.progress.say(f"stopped early at step {self.step:,}: no better validation loss in "
                              f"{self.config.patience} evaluations")  # fmt: skip
        stopped_by = None if finished else self.stop.signal or signal.SIGTERM  # another rank's
        report = self._report()
        if self.machine.is_main and finished:
            write_report(self.run, report)
        return TrainResult(self.run, self.step, self.first_val_loss, self.best_val_loss,
                           self.clock.elapsed(), tuple(self.samples), tuple(summary(report)),
                           stopped_by)  # fmt: skip

    def _report(self) -> Report:
        tokens = self._tokens(self.step)
        return Report(
            shape=self._shape(), seconds=self.clock.elapsed(), steps=self.step, tokens=tokens,
            epochs=tokens / len(self.data.train), val_loss=self.best_val_loss,
            vocab_size=self.model.config.vocab_size, spent=self.spent,
            samples=tuple(self.samples), plan=self.plan,
        )  # fmt: skip

    # -- small things ----------------------------------------------------------------------------

    @property
    def _how_to_resume(self) -> str:
        return f"{program()} train --resume {shlex.quote(str(self.run))}"

    def _describe(self) -> None:
        if not self.machine.is_main:
            return
        data = self.data
        accumulated = math.ceil(self.rows_per_rank / self.passes.micro_batch_size)
        self.progress.say(f"{self._shape()} · {len(data.train):,} training tokens, "
                          f"vocabulary {self.model.config.vocab_size:,}")  # fmt: skip
        steps = self.config.max_steps
        epochs = self._tokens(steps) / len(data.train)
        length = f"{steps:,} steps of {self._tokens(1):,} tokens ({epochs:.1f} epochs)"
        if self.clock.budget is not None:
            left = format_seconds(self.clock.left(self.step))
            length = f"steps of {self._tokens(1):,} tokens, for {left}"
        self.progress.say(
            length + (f", {accumulated} micro-batches a step" if accumulated > 1 else "")
            + f", on {self.machine.device} in {self.passes.precision} -> {self.run}"
        )  # fmt: skip
        if note := unknown_note(data.tokenizer, self.config.sample_prompt or ""):
            self.progress.say(f"note: --sample-prompt: {note}")

    def _shape(self) -> str:
        config = self.model.config
        return (
            f"{config.n_parameters:,} parameters ({config.family}: {config.n_layer} layers, "
            f"{config.n_head} heads, {config.n_embd} wide, context {config.context_length})"
        )

    def _stop_now(self) -> bool:
        """May an evaluation break off? Not with several processes: all must do the same."""
        return self.machine.world == 1 and self.stop.requested

    def _stop_requested(self) -> bool:
        """True on every rank when any of them was asked to stop."""
        return self.machine.sum(float(self.stop.requested))[0] > 0

    def _tokens(self, steps: int) -> int:
        return steps * self.rows_per_step * self.T

    def _agreed(self, value: float) -> float:
        """The main process's value, in all: with a budget, each has a clock of its own."""
        if self.clock.budget is None or self.machine.world == 1:
            return value
        return self.machine.sum(float(value) if self.machine.is_main else 0.0)[0]

    @contextlib.contextmanager
    def _timed(self, part: str) -> Iterator[None]:
        """Seconds of `part`, for the report. A GPU works on while we count: there, it is the time
        in which the host waited."""
        started = time.monotonic()
        yield
        self.spent[part] = self.spent.get(part, 0.0) + time.monotonic() - started

    def _write(self, **values: Any) -> None:
        if self.log is not None:
            self.log.write(step=self.step, tokens=self._tokens(self.step),
                           seconds=round(self.clock.elapsed(), 3), **values)  # fmt: skip


def _or_none(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
