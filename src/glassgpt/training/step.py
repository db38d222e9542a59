"""How a training step is taken on this machine: gradients and losses of a batch, and the update.

    step = TrainingStep(model, config, machine); loss = step.gradients(data.train.batch(0, ...))

`StepPlan` decides once how: compiled on a GPU, averaged over the processes of torchrun, by the
fused step (fused/) or by autograd on the cores of a CPU. The training loop follows the plan,
planning/costs.py reads it, `measure_step` times it. This module knows no schedule and no file.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import gc
import statistics
import time
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch

from glassgpt import runtime
from glassgpt.config import ModelConfig, TrainConfig
from glassgpt.data.batches import IGNORE
from glassgpt.errors import UserError
from glassgpt.inference.kernels.compiled import first_call
from glassgpt.model import GPT
from glassgpt.system import SILENT, Reporter
from glassgpt.training.fused.step import FusedStep, RoundedWeights, can_fuse, multiplies_bfloat16
from glassgpt.training.loss import NextTokenLoss
from glassgpt.training.optimizers import make_optimizers

# Tokens, targets and, where several texts share a row, positions; (B, T) each.
Batch = Sequence[np.ndarray]

# Numbers in the gradients of all threads together (1 GB in float32). Each thread holds a gradient
# of the whole model; for a model that needs more, torch's own threads are the faster way.
_MOST_GRADIENTS = 250_000_000
# Numbers in the logits of an evaluation batch: large batches are fast, but must fit in memory.
EVAL_LOGITS = 1 << 24


# -- the plan ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepPlan:
    """How one process takes a training step."""

    device: str  # "cpu", "cuda", "mps"
    world: int  # processes that share a step
    rows: int  # sequences of this process in a step
    micro_batch_size: int  # sequences whose activations are held at the same time
    precision: str  # of matrix products: "float32", "bfloat16", "float16"
    fused: bool = False  # by fused/step.py; otherwise by autograd
    workers: int = 1  # threads that take a share of the rows; with 1, torch splits each operation
    compile: bool = False  # try torch.compile
    recompute: bool = False  # keep only a block's input, and compute the rest again

    @classmethod
    def decide(
        cls,
        model: ModelConfig,
        train: TrainConfig,
        machine: runtime.Machine,
        *,
        packed: bool = False,
        plain: bool = True,
        drops: bool | None = None,
    ) -> StepPlan:
        """The plan of training `model` on `machine`, with as many threads as torch has now.

        `packed`: several texts share a row; `plain`: all weights learn, by the usual loss; `drops`:
        there is dropout [what the model's config says].
        """
        device, drops = machine.device.type, bool(model.dropout) if drops is None else drops
        rows = rows_per_process(model, train, machine.world)
        at_once = min(train.micro_batch_size or rows, rows)
        compile = train.compile == "on" or (train.compile == "auto" and device == "cuda")
        autograd = cls(
            device,
            machine.world,
            rows,
            at_once,
            _name(machine.dtype),
            # Each batch of packed rows has its own number of targets: no two would share a program.
            compile=compile and not packed,
            recompute=train.recompute,
        )
        if device != "cpu" or machine.world > 1 or autograd.compile:
            return autograd
        threads = torch.get_num_threads()
        workers = min(threads, at_once)
        if workers * model.n_parameters > _MOST_GRADIENTS:
            workers = 1
        fusible = plain and not packed and machine.dtype != torch.float16 and can_fuse(model)
        if fusible and (workers > 1 or threads == 1 or rows == 1):
            low = train.dtype == "auto" and multiplies_bfloat16()
            precision = "bfloat16" if low else autograd.precision
            return dataclasses.replace(autograd, fused=True, workers=workers, precision=precision)
        # Dropout in autograd draws from one generator for all threads: their order would matter.
        return dataclasses.replace(autograd, workers=1 if drops else workers)

    @property
    def width(self) -> int:
        """Bytes of a number in matrix products."""
        return 4 if self.precision == "float32" else 2


def rows_per_process(model: ModelConfig, train: TrainConfig, world: int = 1) -> int:
    """Sequences of a step that each of `world` processes takes."""
    return max(1, round(train.batch_tokens / model.context_length / world))


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


# -- the step ------------------------------------------------------------------------------------


class ShareStep(Protocol):
    """Adds the gradients of a thread's share of the rows to those of its model."""

    seconds: np.ndarray  # spent so far: forward, backward

    def __call__(self, batch: Batch, scale: float, seed: int = 0) -> torch.Tensor | float:
        """The summed loss of the rows; the gradients added are those of the loss times `scale`."""
        ...


class AutogradStep:
    """model.py and its loss as they are, or compiled, or in DistributedDataParallel."""

    def __init__(
        self, loss: torch.nn.Module, machine: runtime.Machine, scaler: torch.amp.GradScaler
    ) -> None:
        self.loss: Any = loss
        self.machine, self.scaler = machine, scaler
        self.seconds = np.zeros(2)

    def __call__(self, batch: Batch, scale: float, seed: int = 0) -> torch.Tensor:
        started = time.perf_counter()
        loss = summed_loss(self.loss, batch, self.machine)
        forward = time.perf_counter()
        self.scaler.scale(loss * scale).backward()
        self.seconds += (forward - started, time.perf_counter() - forward)
        return loss.detach()


def summed_loss(loss: Any, batch: Batch, machine: runtime.Machine) -> torch.Tensor:
    """Cross-entropy in nats, summed over the targets that count."""
    with machine.autocast():
        return loss(*(runtime.to_device(array, machine.device) for array in batch))


def share_weights(model: GPT) -> GPT:
    """A second model on the same weights in memory, with gradients of its own."""
    shared = {
        id(p): torch.nn.Parameter(p.data, requires_grad=p.requires_grad) for p in model.parameters()
    }
    return copy.deepcopy(model, shared)  # deepcopy takes these for copies that it has made already


class TrainingStep:
    """Everything between a batch and changed weights; follows its `plan`."""

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        machine: runtime.Machine,
        *,
        reporter: Reporter = SILENT,
        packed: bool = False,
        drops: bool | None = None,
        layer_decay: float = 1.0,
        class_weights: torch.Tensor | None = None,
    ) -> None:
        """`packed` and `drops` as in `StepPlan.decide`, `layer_decay` as in `make_optimizers`,
        `class_weights` as in `NextTokenLoss`."""
        self.model, self.machine, self.packed = model, machine, packed
        self.reporter, self.class_weights = reporter, class_weights
        self.drops = bool(model.config.dropout) if drops is None else drops
        learning = {n: tuple(p.shape) for n, p in model.named_parameters() if p.requires_grad}
        plain = learning == model.config.weight_shapes and class_weights is None
        self.plan = StepPlan.decide(
            model.config, config, machine, packed=packed, plain=plain, drops=self.drops
        )
        self.scaler = torch.amp.GradScaler(
            machine.device.type, enabled=machine.dtype == torch.float16
        )
        self.fits_in_memory: int | None = None  # sequences at a time, once more did not fit
        self.workers = runtime.Workers(self.plan.workers)
        self.models = [model, *(share_weights(model) for _ in range(self.plan.workers - 1))]
        self._make_steps()
        self.optimizers = make_optimizers(
            model,
            config,
            layer_decay=layer_decay,
            low_precision=self.plan.precision == "bfloat16",
            workers=self.workers,
        )

    def _make_steps(self) -> None:
        """A loss for evaluations and a `ShareStep` for each thread, as the plan says."""
        recompute, weights = self.plan.recompute, self.class_weights
        self.plain_losses = [
            NextTokenLoss(model, recompute=recompute, class_weights=weights)
            for model in self.models
        ]
        self.compiled = False
        self.weights: RoundedWeights | None = None
        self.steps: list[ShareStep]
        if self.plan.fused:
            self.weights = RoundedWeights(self.model, getattr(torch, self.plan.precision))
            self.steps = [FusedStep(model, self.weights) for model in self.models]
            return
        losses: list[torch.nn.Module] = [*self.plain_losses]
        if self.machine.world > 1:
            with warnings.catch_warnings():  # newer torch has another name for the option
                warnings.simplefilter("ignore", FutureWarning)
                losses = [
                    torch.nn.parallel.DistributedDataParallel(losses[0], broadcast_buffers=False)
                ]
        self.steps = [AutogradStep(loss, self.machine, self.scaler) for loss in losses]

    # -- gradients and losses --------------------------------------------------------------------

    def gradients(self, batch: Batch, key: int = 0) -> torch.Tensor:
        """Set the gradients of the mean loss of a step's rows; the mean loss of this process.

        `key` decides what dropout drops. When memory runs out, the micro-batch is halved and the
        step taken again: more micro-batches are accumulated, and the step's batch stays the same.
        """
        n_targets = float(np.count_nonzero(batch[1] != IGNORE))
        if self.packed:  # processes may have unequal numbers; their gradients are averaged
            n_targets = self.machine.sum(n_targets)[0] / self.machine.world
        while True:
            with self._suppressing_memory_errors():
                total = self._accumulate(batch, n_targets, key)
                break
            self._use_less_memory()
        if self.machine.world > 1:
            torch.distributed.all_reduce(total)
        return total

    def _accumulate(self, batch: Batch, n_targets: float, key: int) -> torch.Tensor:
        total, at_once = torch.zeros((), device=self.machine.device), self.plan.micro_batch_size
        for start in range(0, len(batch[0]), at_once):
            if self.machine.world > 1:  # gradients are averaged over processes once, at the end
                last = start + at_once >= len(batch[0])
                self.steps[0].loss.require_backward_grad_sync = last  # type: ignore
            futures = []
            for i, first, share in self._shares(batch, start, at_once):
                seed = runtime.seed_of(key, first)
                futures.append(self.workers.submit(self.steps[i], share, 1 / n_targets, seed))
            for loss in self.workers.results(futures):
                total += loss
        self._gather()
        return total / n_targets

    def losses(self, batch: Batch) -> float:
        """The summed loss of some rows, in the machine's precision, without dropout."""
        for model in self.models:
            model.eval()
        try:
            while True:
                with self._suppressing_memory_errors():
                    total, at_once = 0.0, self.evaluation_rows
                    for start in range(0, len(batch[0]), at_once):
                        shares = self._shares(batch, start, at_once)
                        futures = [
                            self.workers.submit(self._loss, i, rows) for i, _, rows in shares
                        ]
                        total += sum(self.workers.results(futures))
                    return total
                self._use_less_memory()
        finally:
            for model in self.models:
                model.train()

    @torch.no_grad()  # here, since each thread has a switch of its own
    def _loss(self, i: int, rows: Batch) -> float:
        loss: torch.nn.Module = self.plain_losses[i]
        # Processes may have unequal shares; the last, smaller batch is not worth compiling for.
        whole = len(rows[0]) == self.plan.micro_batch_size and self.machine.world == 1
        if self.compiled and whole:
            loss = self.steps[i].loss  # type: ignore
        return summed_loss(loss, rows, self.machine).item()

    @property
    def evaluation_rows(self) -> int:
        """Rows to give to `losses` at a time."""
        rows, config = self.plan.micro_batch_size, self.model.config
        if self.compiled:
            return rows
        # Without gradients more fits at once, and large batches are faster.
        return max(rows, min(4 * rows, EVAL_LOGITS // (config.context_length * config.vocab_size)))

    def _shares(self, batch: Batch, start: int, n: int) -> Iterator[tuple[int, int, Batch]]:
        """Of `n` rows from `start` on: number of a thread, of its first row, and its rows."""
        rows = [array[start : start + n] for array in batch]
        cuts = zip(*(np.array_split(array, len(self.steps)) for array in rows), strict=True)
        for i, share in enumerate(cuts):
            if len(share[0]):
                yield i, start, share
            start += len(share[0])

    def _gather(self) -> None:
        """Add every thread's gradients to the first one's, and forget them there."""
        mine = list(self.model.parameters())
        for model in self.models[1:]:
            for parameter, other in zip(mine, model.parameters(), strict=True):
                if other.grad is None:  # no share of a small batch
                    continue
                assert parameter.grad is not None
                parameter.grad += other.grad
                other.grad = None

    # -- the update ------------------------------------------------------------------------------

    def clip(self, most: float | None) -> torch.Tensor:
        """Scale the gradients so that their norm is at most `most`; the norm that they had."""
        for optimizer in self.optimizers:
            self.scaler.unscale_(optimizer)  # type: ignore[arg-type]
        most = most or float("inf")
        return torch.nn.utils.clip_grad_norm_(self.model.parameters(), most, foreach=True)

    def update(self) -> None:
        """Change the weights by the gradients, and forget these."""
        for optimizer in self.optimizers:
            self.scaler.step(optimizer)  # type: ignore[arg-type]
            optimizer.zero_grad()
        self.scaler.update()
        self.weights_changed()

    def weights_changed(self) -> None:
        """To be called after every change of the weights; `update` does so."""
        if self.weights is not None:
            self.weights.refresh()

    # -- compiling -------------------------------------------------------------------------------

    def compile(self, batch: Batch) -> None:
        """Get ready for rows like these: kernels, torch.compile; what fails is said and left out.

        Raises nothing: a compiler fails in many ways, and training goes on without it.
        """
        if self.plan.fused:
            try:
                with first_call(f"{self.plan.precision} training", self.reporter):
                    self.steps[0]([array[:1] for array in batch], 0.0)
            except ImportError as error:
                self._without_compiler("the fused step", error)
                if self.drops:  # as in StepPlan: threads would draw in any order
                    del self.models[1:]
                how = {"precision": _name(self.machine.dtype), "workers": len(self.models)}
                self.plan = dataclasses.replace(self.plan, fused=False, **how)
                self._make_steps()
        elif self.plan.compile:
            step: Any = self.steps[0]
            uncompiled = step.loss
            try:
                self.reporter.status("compiling the model (once; a minute or so)")
                self.plain_losses[0].ready_to_compile()
                step.loss = torch.compile(uncompiled, dynamic=False)
                step([array[: self.plan.micro_batch_size] for array in batch], 0.0)
                self.compiled = True
            except Exception as error:
                step.loss = uncompiled
                self._without_compiler("torch.compile", error)
        self._forget_gradients()

    def _without_compiler(self, what: str, error: Exception) -> None:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        self.reporter.say(
            f"warning: {what} does not work here ({reason[:100]}); training goes on without it"
        )
        self.plan = dataclasses.replace(self.plan, compile=False)

    def close(self) -> None:
        self.workers.close()

    # -- memory ----------------------------------------------------------------------------------

    @contextlib.contextmanager
    def _suppressing_memory_errors(self) -> Iterator[None]:
        """Go on behind the block when memory runs out in it, if less memory could do."""
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not runtime.is_out_of_memory(error):
                raise
            plan = self.plan
            least = plan.micro_batch_size == 1 and (plan.recompute or plan.fused)
            if self.machine.world > 1 or least:
                more = "" if plan.recompute or plan.fused else ", --recompute"
                raise UserError(
                    f"out of memory with micro_batch_size={plan.micro_batch_size}; use a "
                    f"smaller --micro-batch-size, --context-length or model{more}"
                ) from None

    def _use_less_memory(self) -> None:
        """Halve the micro-batch; of a single row, recompute the activations."""
        self._forget_gradients()
        gc.collect()  # an error of a thread holds itself, and with it all that its step had
        if self.machine.device.type == "cuda":
            torch.cuda.empty_cache()
        if self.plan.micro_batch_size == 1:
            self.reporter.say("out of memory: going on with recomputed activations, a third slower")
            self.plan = dataclasses.replace(self.plan, recompute=True)
            self._make_steps()
            return
        size = self.fits_in_memory = (self.plan.micro_batch_size + 1) // 2
        self.plan = dataclasses.replace(self.plan, micro_batch_size=size)
        self.reporter.say(
            f"out of memory: going on with micro_batch_size={size}, same tokens per step"
        )

    def resume_with(self, fits_in_memory: int | None, limited: bool) -> None:
        """Remember what fitted in an earlier session; when `limited`, take no more at a time."""
        self.fits_in_memory = fits_in_memory
        if fits_in_memory and limited:
            size = min(self.plan.micro_batch_size, fits_in_memory)
            self.plan = dataclasses.replace(self.plan, micro_batch_size=size)

    def _forget_gradients(self) -> None:
        """As before a step: after one that failed half-way, or was a trial."""
        for model in self.models:
            for parameter in model.parameters():
                parameter.grad = None


# -- measuring -----------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepSeconds:
    """Where the time of a step goes: seconds, the medians of several steps."""

    data: float
    forward: float
    backward: float
    optimizer: float

    @property
    def total(self) -> float:
        return self.data + self.forward + self.backward + self.optimizer


@contextlib.contextmanager
def trial_step(
    model: ModelConfig, train: TrainConfig, machine: runtime.Machine, reporter: Reporter
) -> Iterator[TrainingStep]:
    """A step of a new model, to be measured; afterwards torch has its threads back."""
    threads = torch.get_num_threads()
    step = TrainingStep(GPT(model).to(machine.device), train, machine, reporter=reporter)
    try:
        yield step
    finally:
        step.close()
        torch.set_num_threads(threads)


def measure_step(
    step: TrainingStep, batches: Iterator[Batch], *, seconds: float, at_least: int = 2
) -> StepSeconds:
    """Take real steps for about `seconds`, or `at_least` so many; the first, which fills caches,
    does not count."""
    found: list[StepSeconds] = []
    parameter, started = next(step.model.parameters()), time.perf_counter()
    while len(found) < at_least or time.perf_counter() - started < seconds:
        before, passes = time.perf_counter(), _pass_seconds(step)
        batch = next(batches)
        ready = time.perf_counter()
        step.gradients(batch, key=len(found)).item()  # reading a number waits for a GPU
        forward, backward = _pass_seconds(step) - passes
        between = time.perf_counter()
        step.clip(1.0)
        step.update()
        parameter.flatten()[0].item()
        end, both = time.perf_counter(), (between - ready) / (forward + backward)
        found.append(StepSeconds(ready - before, both * forward, both * backward, end - between))
    columns = zip(*map(dataclasses.astuple, found[1:]), strict=True)
    return StepSeconds(*map(statistics.median, columns))


def _pass_seconds(step: TrainingStep) -> np.ndarray:
    """Spent in forward and in backward passes so far, on average over the threads.

    A GPU works on while the host goes ahead: there, it is the host's time.
    """
    return np.mean([share.seconds for share in step.steps], axis=0)
