"""Forward and backward passes of a batch on this machine, whatever it is.

    passes = Passes(model, config, machine, rows=32); loss = passes.gradients(tokens, targets)

One place decides how: compiled on a GPU, averaged over the processes of a torchrun, by hand
(fused/) or by autograd over the cores of a CPU; and what happens when memory runs out. It knows no
optimizer, no schedule and no file.
"""

from __future__ import annotations

import gc
import time
import warnings
from collections.abc import Callable, Sequence
from typing import Any, Protocol, TypeVar

import numpy as np
import torch

from glassgpt import runtime
from glassgpt.config import TrainConfig
from glassgpt.data.batches import IGNORE
from glassgpt.errors import UserError
from glassgpt.inference.kernels.compiled import first_call
from glassgpt.model import GPT
from glassgpt.system import Reporter
from glassgpt.training.fused.step import FusedStep, Weights, can_fuse, multiplies_bfloat16
from glassgpt.training.loss import NextTokenLoss
from glassgpt.training.planning.costs import EVAL_LOGITS, useful_workers
from glassgpt.training.workers import Workers, share_weights

T_ = TypeVar("T_")
# Of some rows the tokens, the targets and, where texts share a row, their positions; (B, T) each.
Batch = tuple[np.ndarray, ...]


class Step(Protocol):
    """Adds the gradients of some rows to those of `model`."""

    seconds: np.ndarray  # spent so far: forward, backward
    plain: Any  # model and loss as they are, for evaluations

    @property
    def model(self) -> GPT: ...

    def __call__(
        self, tokens: np.ndarray, targets: np.ndarray, scale: float, key: int, *packing: np.ndarray
    ) -> torch.Tensor | float:
        """The summed loss of (B, T) tokens, whose gradients are taken times `scale`."""
        ...


class AutogradStep:
    """model.py and its loss as they are, or what wraps them (compiled, DDP)."""

    def __init__(self, model: GPT, machine: runtime.Machine, scaler: Any, **how: Any) -> None:
        self.model, self.machine, self.scaler = model, machine, scaler
        self.plain: Any = NextTokenLoss(model, **how)
        self.called: Any = self.plain
        self.seconds = np.zeros(2)

    def __call__(
        self, tokens: np.ndarray, targets: np.ndarray, scale: float, key: int, *packing: np.ndarray
    ) -> torch.Tensor | float:
        started = time.perf_counter()
        loss = summed_loss(self.called, (tokens, targets, *packing), self.machine)
        forward = time.perf_counter()
        self.scaler.scale(loss * scale).backward()
        self.seconds += (forward - started, time.perf_counter() - forward)
        return loss.detach()


def summed_loss(loss: Any, batch: Batch, machine: runtime.Machine) -> torch.Tensor:
    """Cross-entropy, summed over the targets that count, in nats."""
    with machine.autocast():
        return loss(*(runtime.to_device(array, machine.device) for array in batch))


class Passes:
    """All that a training step and an evaluation do between tokens and gradients."""

    def __init__(
        self,
        model: GPT,
        config: TrainConfig,
        machine: runtime.Machine,
        *,
        rows: int,
        reporter: Reporter,
        packed: bool = False,
        drops: bool | None = None,
        **loss: Any,
    ) -> None:
        """`rows` of this process in a step; `packed`: with positions; `drops`: with random masks
        [where the model's config has dropout]; `loss`: options of NextTokenLoss."""
        self.model, self.config, self.machine, self.reporter = model, config, machine, reporter
        self.rows, self.packed, self.loss = rows, packed, loss
        self.drops = bool(model.config.dropout) if drops is None else drops
        self.scaler = torch.amp.GradScaler(  # type: ignore[attr-defined]
            machine.device.type, enabled=machine.dtype == torch.float16
        )
        self.micro_batch_size = min(config.micro_batch_size or rows, rows)
        self.fits_in_memory: int | None = None  # sequences, once more of them did not
        self.recompute = config.recompute
        self.compiled = False
        self.may_compile = config.compile == "on" or (
            config.compile == "auto" and machine.device.type == "cuda"
        )
        # Of packed rows, each batch has another number of targets: no two would share a program.
        self.may_compile = self.may_compile and not packed
        self.weights: Weights | None = None  # of the fused step
        self.workers = Workers(1)
        self.steps = self._make_steps()

    @property
    def precision(self) -> str:
        dtype = self.machine.dtype if self.weights is None else self.weights.dtype
        return str(dtype).removeprefix("torch.")

    # -- what training calls ---------------------------------------------------------------------

    def gradients(self, *batch: np.ndarray, key: int = 0) -> torch.Tensor:
        """Set the gradients of the mean loss of a step's rows; the mean loss of this process.

        `key` decides what dropout drops.
        """
        n_targets = float(np.count_nonzero(batch[1] != IGNORE))
        if self.packed:  # processes may have unequal numbers; their gradients are averaged
            n_targets = self.machine.sum(n_targets)[0] / self.machine.world

        def attempt() -> torch.Tensor:
            total = torch.zeros((), device=self.machine.device)
            for start in range(0, self.rows, self.micro_batch_size):
                rows = slice(start, start + self.micro_batch_size)
                if self.machine.world > 1:  # gradients are averaged over ranks once, at the end
                    last = rows.stop >= self.rows
                    self.steps[0].called.require_backward_grad_sync = last  # type: ignore
                for loss in self._share(work, [array[rows] for array in batch], start):
                    total += loss
            self._gather()
            return total / n_targets

        def work(step: Step, first: int, tokens: Any, targets: Any, *packing: Any) -> Any:
            return step(tokens, targets, 1 / n_targets, hash((key, first)), *packing)

        total = self._shrinking_to_memory(attempt)
        if self.machine.world > 1:
            torch.distributed.all_reduce(total)
        return total

    def losses(self, *batch: np.ndarray) -> float:
        """The summed loss of some rows, in the machine's precision, without dropout."""

        @torch.no_grad()  # here, since each thread has a switch of its own
        def work(step: Any, first: int, *share: np.ndarray) -> float:
            step.model.eval()
            # Ranks may have unequal shares; the last, smaller batch is not worth compiling for.
            whole = self.compiled and len(share[0]) == self.micro_batch_size
            loss = step.called if whole and self.machine.world == 1 else step.plain
            return summed_loss(loss, share, self.machine).item()

        return sum(self._share(work, batch, 0))

    def evaluate(self, work: Callable[[int], T_]) -> T_:
        """Call `work` with the number of rows for each call of `losses`, less where memory ends."""

        def attempt() -> T_:
            rows = self.micro_batch_size
            if not self.compiled:  # no gradients: more fits at once, and large batches are faster
                config = self.model.config
                fit = EVAL_LOGITS // (config.context_length * config.vocab_size)
                rows = max(rows, min(4 * rows, fit))
            return work(rows)

        try:
            return self._shrinking_to_memory(attempt)
        finally:
            for step in self.steps:
                step.model.train()

    @property
    def seconds(self) -> tuple[float, float]:
        """Spent in forward and in backward passes so far, on average over the threads.

        A GPU works on while the host goes ahead: there, it is the host's time.
        """
        forward, backward = np.mean([step.seconds for step in self.steps], axis=0)
        return float(forward), float(backward)

    def weights_changed(self) -> None:
        """After every step of the optimizer."""
        if self.weights is not None:
            self.weights.refresh()

    def compile(self, *batch: np.ndarray) -> None:
        """Get ready for rows like these: kernels, torch.compile; what fails is said and left out.

        Raises nothing: a compiler fails in many ways, and training goes on without it.
        """
        if self.weights is not None:
            try:
                with first_call(f"{self.precision} training", self.reporter):
                    tokens, targets = (array[:1] for array in batch)
                    self.steps[0](tokens, targets, 0.0, 0)
            except ImportError as error:
                self._without_compiler("the fused step", error)
                self.weights = None
                # As in _make_steps: with dropout, threads would draw in any order.
                steps = self.steps[:1] if self.drops else self.steps
                self.steps = [self._autograd(s.model) for s in steps]
        elif self.may_compile:
            step: Any = self.steps[0]
            plain = step.called
            try:
                self.reporter.status("compiling the model (once; a minute or so)")
                step.plain.ready_to_compile()
                step.called = torch.compile(step.called, dynamic=False)
                tokens, targets = (array[: self.micro_batch_size] for array in batch)
                step(tokens, targets, 0.0, 0)
                self.compiled = True
            except Exception as error:
                step.called = plain
                self._without_compiler("torch.compile", error)
        self._forget()

    def close(self) -> None:
        self.workers.close()

    # -- how -------------------------------------------------------------------------------------

    def _make_steps(self) -> Sequence[Step]:
        """One for each thread that takes a share of the rows."""
        model, machine, n_parameters = self.model, self.machine, self.model.config.n_parameters
        if machine.world > 1:
            with warnings.catch_warnings():  # newer torch has another name for the same wish
                warnings.simplefilter("ignore", FutureWarning)
                step = self._autograd(model)
                step.called = torch.nn.parallel.DistributedDataParallel(  # type: ignore
                    step.plain, broadcast_buffers=False
                )
            return [step]
        n = useful_workers(torch.get_num_threads(), self.micro_batch_size, n_parameters)
        if machine.device.type == "cpu" and not self.may_compile:
            fused = self._is_plain() and machine.dtype != torch.float16
            if fused and (n > 1 or torch.get_num_threads() == 1 or self.rows == 1):
                return self._fused_steps(n)
            # Dropout draws from one generator for all threads: their order would matter.
            if not self.drops:
                self.workers = Workers(n)
                models = [model, *(share_weights(model) for _ in range(n - 1))]
                return [self._autograd(each) for each in models]
        return [self._autograd(model)]

    def _is_plain(self) -> bool:
        """What the fused step computes: the whole of a modern GPT learns, from rows of one text."""
        learning = {n: tuple(p.shape) for n, p in self.model.named_parameters() if p.requires_grad}
        whole = learning == self.model.config.weight_shapes
        return whole and can_fuse(self.model.config) and not self.packed and not self.loss

    def _autograd(self, model: GPT) -> AutogradStep:
        how = self.loss | {"recompute": self.recompute}
        return AutogradStep(model, self.machine, self.scaler, **how)

    def _fused_steps(self, n: int) -> Sequence[Step]:
        low = self.machine.dtype == torch.bfloat16 or (
            self.config.dtype == "auto" and multiplies_bfloat16()
        )
        self.weights = Weights(self.model, torch.bfloat16 if low else torch.float32)
        self.workers = Workers(n)
        models = [self.model, *(share_weights(self.model) for _ in range(n - 1))]
        steps = [FusedStep(each, self.weights) for each in models]
        for step in steps:
            step.plain = NextTokenLoss(step.model)
        return steps

    def _without_compiler(self, what: str, error: Exception) -> None:
        reason = str(error).strip().splitlines()[0] if str(error).strip() else repr(error)
        self.reporter.say(f"warning: {what} does not work here ({reason[:100]}); "
                          "training goes on without it")  # fmt: skip
        self.may_compile = False

    def _share(
        self, work: Callable[..., Any], batch: Sequence[np.ndarray], first: int
    ) -> list[Any]:
        """[work(step, number of the first row, rows of the arrays)] for each thread's share."""
        n = len(self.steps)
        shares = zip(*(np.array_split(array, n) for array in batch), strict=True)
        calls, at = [], first
        for step, share in zip(self.steps, shares, strict=True):
            if len(share[0]):
                calls.append(lambda step=step, share=share, at=at: work(step, at, *share))
            at += len(share[0])
        return self.workers.run(calls)

    def _gather(self) -> None:
        """Add every thread's gradients to the first one's, and forget them there."""
        mine = list(self.model.parameters())
        for step in self.steps[1:]:
            for parameter, other in zip(mine, step.model.parameters(), strict=True):
                if other.grad is None:  # no share of a small batch
                    continue
                assert parameter.grad is not None
                parameter.grad += other.grad
                other.grad = None

    def _forget(self) -> None:
        """No gradients, as before a step: after one that failed half-way, or was a trial."""
        for step in self.steps:
            for parameter in step.model.parameters():
                parameter.grad = None

    def _shrinking_to_memory(self, work: Callable[[], T_]) -> T_:
        """Do `work`; when memory runs out, halve the micro-batch and do it again.

        The step's batch stays the same: more micro-batches are accumulated.
        """
        while True:
            try:
                return work()
            except (RuntimeError, MemoryError) as error:
                if not runtime.is_out_of_memory(error):
                    raise
                one_row = self.micro_batch_size == 1
                if self.machine.world > 1 or (one_row and (self.recompute or self.weights)):
                    more = "" if self.recompute or self.weights else ", --recompute"
                    raise UserError(
                        f"out of memory with micro_batch_size={self.micro_batch_size}; use a "
                        f"smaller --micro-batch-size, --context-length or model{more}"
                    ) from None
            self._forget()
            gc.collect()  # an error of a thread holds itself, and with it all that its step had
            if self.machine.device.type == "cuda":
                torch.cuda.empty_cache()
            if one_row:
                self._recompute_from_now_on()
                continue
            self.micro_batch_size = self.fits_in_memory = (self.micro_batch_size + 1) // 2
            self.reporter.say(f"out of memory: going on with micro_batch_size="
                              f"{self.micro_batch_size}, same tokens per step")  # fmt: skip

    def _recompute_from_now_on(self) -> None:
        """The last resort: of every block, keep its input alone."""
        self.recompute = True
        self.reporter.say("out of memory: going on with recomputed activations, a third slower")
        for step in self.steps:
            assert isinstance(step, AutogradStep)
            step.called = step.plain = NextTokenLoss(step.model, **self.loss, recompute=True)
        self.compiled = False
