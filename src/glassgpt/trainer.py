"""One loop for all training: batches in, a run directory out; stoppable and resumable anywhere.

    result = Trainer(run, model_config, train_config, dataset, machine, progress, options).fit()

Everything that varies between steps (batch, learning rate, dropout) is a function of (seed,
step), so a resumed run repeats the uninterrupted one bit for bit on a CPU. This room knows the
model only as "tokens in, logits out", and nothing of where options and data come from.
"""

from __future__ import annotations

import dataclasses
import math
import shlex
import signal
import time
import warnings
from collections import deque
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from glassgpt import checkpoint as ckpt
from glassgpt import runtime
from glassgpt.config import ModelConfig, Sampling, TrainConfig
from glassgpt.data.batches import IGNORE, Dataset, TokenFiles
from glassgpt.engine.reference import ReferenceEngine
from glassgpt.errors import UserError
from glassgpt.generate import complete
from glassgpt.model import GPT, load_weights
from glassgpt.optim import (
    learning_rate_at,
    make_optimizer,
    optimizer_tensors,
    restore_optimizer,
    set_learning_rate,
)
from glassgpt.plot import loss_curve
from glassgpt.runlog import Progress, RunLog, format_seconds, program, rewind_samples, write_sample
from glassgpt.tokenizer import unknown_note
from glassgpt.workers import Workers, useful_workers

_EVAL_LOGITS = 1 << 24  # numbers per evaluation batch: large batches are fast, but must fit
_RESUMED = ("step", "evaluations_without_best", "evaluated_step", "fits_in_memory", "samples")


@dataclass(frozen=True)
class TrainResult:
    """What came of it; the rest stands in the run directory."""

    run: Path
    step: int
    first_val_loss: float
    best_val_loss: float
    seconds: float
    samples: tuple[str, ...]  # the first and the latest
    signal: int | None = None  # of the signal that interrupted it; it can be resumed

    @property
    def finished(self) -> bool:
        return self.signal is None


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
    ) -> None:
        self.run, self.config, self.data, self.machine = run, config, data, machine
        self.progress, self.options = progress, options
        torch.manual_seed(config.seed)
        self.model = GPT(model_config).to(machine.device)
        self.optimizer = make_optimizer(self.model, config)
        self.scaler = torch.amp.GradScaler(  # type: ignore[attr-defined]
            machine.device.type, enabled=machine.dtype == torch.float16
        )
        self.T = model_config.context_length
        per_rank = max(1, round(config.batch_tokens / self.T / machine.world))
        self.rows_per_rank, self.rows_per_step = per_rank, per_rank * machine.world
        self.micro_batch_size = min(config.micro_batch_size or per_rank, per_rank)
        self.fits_in_memory: int | None = None  # sequences, once more of them did not
        self.compiled = False
        self.may_compile = config.compile == "on" or (
            config.compile == "auto" and machine.device.type == "cuda"
        )
        self.workers = self._make_workers()
        self.step = 0
        self.seconds = 0.0  # of earlier sessions
        self.first_val_loss = self.best_val_loss = math.inf
        self.evaluations_without_best = 0
        self.evaluated_step: int | None = None
        self.samples: list[str] = []
        self.recent: deque[float] = deque(maxlen=50)

    def restore(
        self, saved: ckpt.Checkpoint, optimizer: Mapping[str, np.ndarray], state: dict[str, Any]
    ) -> None:
        """Continue where `save` left off."""
        load_weights(self.model, saved.weights)
        restore_optimizer(self.optimizer, self.model, optimizer)
        if state["scaler"]:
            self.scaler.load_state_dict(state["scaler"])
        for name in _RESUMED:
            setattr(self, name, state.get(name))
        if self.options.get("micro_batch_size") == state["options"].get("micro_batch_size"):
            self.micro_batch_size = min(self.micro_batch_size, self.fits_in_memory or 1 << 62)
        self.seconds = state["seconds"]
        for name in ("first_val_loss", "best_val_loss"):
            setattr(self, name, math.inf if state[name] is None else state[name])
        if self.step >= self.config.max_steps and self.evaluated_step == self.step:
            raise UserError(f"{self.run} is finished at step {self.step}; "
                            "--max-steps with a larger number goes on")  # fmt: skip

    def fit(self) -> TrainResult:
        """Train until `max_steps`, until patience is exhausted, or until asked to stop."""
        self.log = None
        if self.machine.is_main:
            RunLog(self.run).rewind(self.step)
            rewind_samples(self.run / "samples.md", self.step)
            self.log = RunLog(self.run, tensorboard=self.config.tensorboard,
                              wandb=self.config.wandb, options=self.options)  # fmt: skip
        self._describe()
        self._compile()
        self.started = self._tick = time.monotonic()
        self._tick_step = self.step
        with runtime.StopRequest().listening() as self.stop:
            try:
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
        config = self.config
        while True:
            done = self.step >= config.max_steps
            due = done or self.step % config.eval_interval == 0
            if due and self.evaluated_step != self.step:
                self._evaluate_and_keep_best()
            elif config.checkpoint_interval and self.step % config.checkpoint_interval == 0:
                self.save()
            if self._stop_requested():
                return done and self.evaluated_step == self.step
            if done or self.evaluations_without_best >= (config.patience or math.inf):
                return True
            self._train_step()

    def _train_step(self) -> None:
        config, step = self.config, self.step
        rate = learning_rate_at(step, config)
        set_learning_rate(self.optimizer, rate)
        if self.model.config.dropout:  # masks, too, are a function of the step
            torch.manual_seed(hash((config.seed, step, self.machine.rank)) & 0x7FFFFFFF)
        loss = self._shrinking_to_memory(self._gradients)
        self.scaler.unscale_(self.optimizer)
        norm = torch.nn.utils.clip_grad_norm_(
            self.model.parameters(), config.grad_clip or math.inf, foreach=True
        )
        numbers = self._read(loss / self.machine.world, norm, rate)
        self.scaler.step(self.optimizer)
        self.scaler.update()
        self.optimizer.zero_grad(set_to_none=True)
        self.step += 1
        if numbers is not None:
            self._record(*numbers, rate)

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
            return None
        numbers = loss.item(), norm.item()
        # float16 overflows now and then; its scaler leaves such a step out by itself.
        if not math.isfinite(numbers[0] if self.scaler.is_enabled() else sum(numbers)):
            self._diverged(*numbers, rate)
        return numbers

    def _gradients(self) -> torch.Tensor:
        """Sum up the gradient of this step's batch, micro-batch by micro-batch; the mean loss."""
        machine, first = self.machine, self.machine.rank * self.rows_per_rank
        tokens, targets = self.data.train.batch(
            self.step, seed=self.config.seed, n=self.rows_per_step, T=self.T,
            rows=slice(first, first + self.rows_per_rank),
        )  # fmt: skip

        def work(model: Any, tokens: np.ndarray, targets: np.ndarray) -> torch.Tensor:
            loss = self._loss(model, tokens, targets) / n_targets
            self.scaler.scale(loss).backward()
            return loss.detach()

        n_targets = targets.size
        total = torch.zeros((), device=machine.device)
        for start in range(0, self.rows_per_rank, self.micro_batch_size):
            rows = slice(start, start + self.micro_batch_size)
            if machine.world > 1:  # gradients are averaged over ranks once, at the end
                last = rows.stop >= self.rows_per_rank
                self.workers.models[0].require_backward_grad_sync = last
            for loss in self.workers.map(work, tokens[rows], targets[rows]):
                total += loss
        self.workers.gather_gradients()
        if machine.world > 1:
            torch.distributed.all_reduce(total)
        return total

    def _loss(self, model: Any, tokens: np.ndarray, targets: np.ndarray) -> torch.Tensor:
        """Cross-entropy, summed over the targets that count, in nats."""
        device = self.machine.device
        with self.machine.autocast():
            logits = model(runtime.to_device(tokens, device))  # (B, T, V)
        flat = runtime.to_device(targets, device).flatten()
        return F.cross_entropy(logits.flatten(0, 1).float(), flat, ignore_index=IGNORE,
                               reduction="sum")  # fmt: skip

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
        config = self.config
        left = self._tokens(config.max_steps - self.step) / max(1.0, per_second)
        parts = [
            f"step {self.step:,}/{config.max_steps:,}",
            f"train loss {sum(self.recent) / len(self.recent):.3f}",
            f"best val loss {self.best_val_loss:.3f}",
            f"{per_second:,.0f} tokens/s",
        ]
        if self.machine.peak_flops:
            used = per_second * self.model.config.flops_per_token() / self.machine.peak_flops
            parts.append(f"MFU {used:.0%}")
        return " · ".join([*parts, f"{format_seconds(left)} left"])

    def _diverged(self, loss: float, norm: float, rate: float) -> None:
        raise UserError(
            f"training diverged at step {self.step + 1}: loss {loss}, gradient norm {norm:.3g}, "
            f"learning rate {rate:.2e}; {self.run} keeps the last good checkpoint. Usual remedies: "
            "a lower --learning-rate, more --warmup-steps, --grad-clip 1, --dtype float32"
        )

    # -- evaluation ------------------------------------------------------------------------------

    def _evaluate_and_keep_best(self) -> None:
        val_loss = self.evaluate(self.data.val)
        if val_loss is None:  # asked to stop in the middle: done again after resuming
            return
        if not math.isfinite(val_loss):
            self._diverged(val_loss, math.nan, learning_rate_at(self.step, self.config))
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
                ckpt.save_model(self.run, self._checkpoint())
            self._sample()
        self.save()
        note = "" if better else f" (best {self.best_val_loss:.4f})"
        took = format_seconds(self._elapsed())
        self.progress.say(f"step {self.step:>6,}  val loss {val_loss:.4f}{note}  {took}")
        self._tick, self._tick_step = time.monotonic(), self.step

    def evaluate(self, split: TokenFiles) -> float | None:
        """Mean loss over a whole split (or `eval_batches` of it); None when asked to stop."""

        @torch.no_grad()
        def work(model: Any, tokens: np.ndarray, targets: np.ndarray) -> float:
            # Ranks may have unequal shares; the last, smaller batch is not worth compiling for.
            if machine.world > 1 or (self.compiled and len(tokens) != self.micro_batch_size):
                model = self.model
            return self._loss(model.eval(), tokens, targets).item()

        def attempt() -> tuple[float, float]:
            rows = self.micro_batch_size
            if not self.compiled:  # no gradients: more fits at once, and large batches are faster
                fit = _EVAL_LOGITS // (self.T * self.model.config.vocab_size)
                rows = max(rows, min(4 * rows, fit))
            batches = split.windows(n=rows, T=self.T, rank=machine.rank, world=machine.world,
                                    limit=limit)  # fmt: skip
            total = count = 0.0
            for number, (tokens, targets) in enumerate(batches):
                if self._stop_now():
                    break
                if number % 64 == 63:
                    share = count * machine.world / (limit * self.T if limit else len(split))
                    self.progress.status(f"evaluating: {share:.0%} of the validation text")
                total += sum(self.workers.map(work, tokens, targets))
                count += int(np.count_nonzero(targets != IGNORE))
            return total, count

        machine, limit = self.machine, (self.config.eval_batches or 0) * self.rows_per_step or None
        total, count = self._shrinking_to_memory(attempt)
        for model in (self.model, *self.workers.models):
            model.train()
        total, count = machine.sum(total, count)
        return None if self._stop_now() else total / count

    def _sample(self) -> None:
        if not self.config.sample_tokens:
            return
        tokenizer, prompt = self.data.tokenizer, self.config.sample_prompt
        ids = tokenizer.encode(prompt, special=True) if prompt else []
        how = Sampling(max_new_tokens=self.config.sample_tokens, temperature=0.8, top_k=200)
        [piece] = complete(ReferenceEngine(self.model), tokenizer, [ids], how)
        text = (prompt or "") + piece.text
        self.samples = [*self.samples[:1], text]
        write_sample(self.run / "samples.md", self.step, text)

    # -- keeping ---------------------------------------------------------------------------------

    def save(self) -> None:
        """Replace `checkpoints/last` by the present moment."""
        if not self.machine.is_main:
            return
        optimizer = optimizer_tensors(self.optimizer, self.model)
        state = {name: getattr(self, name) for name in _RESUMED}
        state |= {
            "seconds": self._elapsed(),
            "first_val_loss": _or_none(self.first_val_loss),
            "best_val_loss": _or_none(self.best_val_loss),
            "scaler": self.scaler.state_dict(),
            "options": self.options,
            "data_path": str(self.data.path.absolute()),
            "data_fingerprint": self.data.fingerprint,
        }
        ckpt.save_training(self.run, self._checkpoint(), optimizer, state)

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
        self.workers.close()
        if self.log is not None:
            self.log.close()
            if self.evaluated_step is not None:
                loss_curve(self.run, vocab_size=self.model.config.vocab_size)
        if not finished:
            self.progress.say(f"stopped at step {self.step:,}; go on with: {self._how_to_resume}")
        elif self.step < self.config.max_steps:
            self.progress.say(f"stopped early at step {self.step:,}: no better validation loss in "
                              f"{self.config.patience} evaluations")  # fmt: skip
        stopped_by = None if finished else self.stop.signal or signal.SIGTERM  # another rank's
        return TrainResult(self.run, self.step, self.first_val_loss, self.best_val_loss,
                           self._elapsed(), tuple(self.samples), stopped_by)  # fmt: skip

    # -- small things ----------------------------------------------------------------------------

    @property
    def _how_to_resume(self) -> str:
        return f"{program()} train --resume {shlex.quote(str(self.run))}"

    def _describe(self) -> None:
        if not self.machine.is_main:
            return
        config, data = self.model.config, self.data
        accumulated = math.ceil(self.rows_per_rank / self.micro_batch_size)
        self.progress.say(
            f"{config.n_parameters:,} parameters ({config.family}: {config.n_layer} layers, "
            f"{config.n_head} heads, {config.n_embd} wide, context {config.context_length}) · "
            f"{len(data.train):,} training tokens, vocabulary {config.vocab_size:,}"
        )
        epochs = self._tokens(self.config.max_steps) / len(data.train)
        precision = str(self.machine.dtype).removeprefix("torch.")
        self.progress.say(
            f"{self.config.max_steps:,} steps of {self._tokens(1):,} tokens ({epochs:.1f} epochs"
            + (f", {accumulated} micro-batches a step" if accumulated > 1 else "")
            + f") on {self.machine.device} in {precision} -> {self.run}"
        )
        if note := unknown_note(data.tokenizer, self.config.sample_prompt or ""):
            self.progress.say(f"note: --sample-prompt: {note}")

    def _make_workers(self) -> Workers:
        """The model as training calls it: on every core of a CPU, in every process, compiled."""
        model: Any = self.model
        if self.machine.world > 1:
            with warnings.catch_warnings():  # newer torch has another name for the same wish
                warnings.simplefilter("ignore", FutureWarning)
                model = torch.nn.parallel.DistributedDataParallel(model, broadcast_buffers=False)
        elif self.machine.device.type == "cpu" and not self.may_compile:
            # Dropout draws from one generator for all threads: their order would matter.
            config, threads = self.model.config, torch.get_num_threads()
            if not config.dropout:
                n = useful_workers(threads, self.micro_batch_size, config.n_parameters)
                return Workers(model, n)
        return Workers(model)

    def _compile(self) -> None:
        """torch.compile where it is wanted and works; otherwise say so once and go on."""
        if not self.may_compile:
            return
        try:
            self.progress.status("compiling the model (once; a minute or so)")
            compiled: Any = torch.compile(self.workers.models[0], dynamic=False)
            tokens, targets = self.data.train.batch(0, seed=0, n=self.micro_batch_size, T=self.T)
            self._loss(compiled, tokens, targets).backward()
            self.workers.models[0], self.compiled = compiled, True
        except Exception as error:  # the compiler fails in many ways, none of them ours
            reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
            self.progress.say(f"warning: torch.compile does not work here ({reason[:100]}); "
                              "training goes on without it")  # fmt: skip
            self.may_compile = False
            self.workers = self._make_workers()
        self.optimizer.zero_grad(set_to_none=True)

    def _shrinking_to_memory(self, work: Callable[[], Any]) -> Any:
        """Do `work`; when memory runs out, halve the micro-batch and do it again.

        The step's batch stays the same: more micro-batches are accumulated.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not runtime.is_out_of_memory(error):
                    raise
                if self.micro_batch_size == 1 or self.machine.world > 1:
                    raise UserError(
                        f"out of memory with micro_batch_size={self.micro_batch_size}; use a "
                        "smaller --micro-batch-size, --context-length or model"
                    ) from None
            self.optimizer.zero_grad(set_to_none=True)
            self.workers.forget_gradients()
            if self.machine.device.type == "cuda":
                torch.cuda.empty_cache()
            self.micro_batch_size = self.fits_in_memory = (self.micro_batch_size + 1) // 2
            self.progress.say(f"out of memory: going on with micro_batch_size="
                              f"{self.micro_batch_size}, same tokens per step")  # fmt: skip

    def _stop_now(self) -> bool:
        """May an evaluation break off? Not with several processes: all must do the same."""
        return self.machine.world == 1 and self.stop.requested

    def _stop_requested(self) -> bool:
        """True on every rank when any of them was asked to stop."""
        return self.machine.sum(float(self.stop.requested))[0] > 0

    def _tokens(self, steps: int) -> int:
        return steps * self.rows_per_step * self.T

    def _elapsed(self) -> float:
        return self.seconds + time.monotonic() - self.started

    def _write(self, **values: Any) -> None:
        if self.log is not None:
            self.log.write(step=self.step, tokens=self._tokens(self.step),
                           seconds=round(self._elapsed(), 3), **values)  # fmt: skip


def _or_none(loss: float) -> float | None:
    return loss if math.isfinite(loss) else None
