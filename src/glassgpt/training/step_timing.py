"""Where does a training step's time go here, and how near is it to what the machine can multiply?

    speed = time_steps(model_config, train_config, machine, seconds=5)
    print(step_table(speed, product_peak(machine, speed.precision)))

Real steps on random tokens: batch, forward, backward, optimizer, evaluation. What the machine can
do at most is measured, too, by large matrix products in the same precision. Ratios against nanoGPT
are in benchmarks/train_cpu.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassgpt import runtime
from glassgpt.checkpoints.load import load_pretrained
from glassgpt.config import ModelConfig, TrainConfig
from glassgpt.data.batches import TokenFiles
from glassgpt.data.prepare import estimate_size
from glassgpt.errors import UserError
from glassgpt.options import resolve_options, split_options
from glassgpt.reporting.terminal import aligned
from glassgpt.system import SILENT, Reporter
from glassgpt.training.step import StepSeconds, measure_step, trial_step

_TEXT = 1 << 20  # random tokens, from which the batches are drawn
_SIDE = 2048  # rows and columns of the matrices whose product shows the peak: large enough for it


@dataclass(frozen=True)
class StepSpeed:
    """How fast a model is trained here."""

    model: ModelConfig
    tokens: int  # of a step
    precision: str  # of its products
    seconds: StepSeconds
    evaluation: float  # seconds, of as many tokens as a step has

    @property
    def flops_per_second(self) -> float:
        return self.tokens * self.model.flops_per_token() / self.seconds.total


def bench_train(
    run: str | None,
    preset: str | None,
    options: dict[str, Any],
    *,
    seconds: float,
    reporter: Reporter,
) -> str:
    """The table for the model `run`, or for the one that the options of training make."""
    if not seconds > 0:
        raise UserError(f"seconds={seconds} must be greater than 0")
    shape, data, train = split_options(resolve_options(options, preset=preset))
    machine = runtime.start(train)
    if run is None:
        model = ModelConfig.from_shape(
            shape.pop("shape"), vocab_size=estimate_size((), data).vocab_size, **shape
        )
    else:
        model = load_pretrained(run).config
    reporter.status("measuring training steps")
    speed = time_steps(model, train, machine, seconds=seconds, reporter=reporter)
    reporter.status("measuring matrix products")
    return step_table(speed, product_peak(machine, speed.precision))


def time_steps(
    model: ModelConfig,
    train: TrainConfig,
    machine: runtime.Machine,
    *,
    seconds: float,
    reporter: Reporter = SILENT,
) -> StepSpeed:
    """Train on random tokens in this process for about `seconds`, three steps at least."""
    T = model.context_length
    with trial_step(model, train, machine, reporter) as step, _random_text(model) as text:
        rows = step.plan.rows
        batches = (text.batch(i, seed=0, n=rows, T=T) for i in itertools.count())
        batch = next(batches)
        step.compile(batch)
        found = measure_step(step, batches, seconds=seconds, at_least=3)
        before = time.perf_counter()
        step.losses(batch)
        evaluation = time.perf_counter() - before
    return StepSpeed(model, rows * T, step.plan.precision, found, evaluation)


@contextlib.contextmanager
def _random_text(model: ModelConfig) -> Iterator[TokenFiles]:
    """Random tokens in a file, as training finds them."""
    dtype = "<u4" if model.vocab_size > 1 << 16 else "<u2"
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "tokens.bin"
        count = max(_TEXT, 2 * model.context_length)
        np.random.default_rng(0).integers(0, model.vocab_size, count).astype(dtype).tofile(path)
        yield TokenFiles([path], dtype, model.vocab_size)


def product_peak(machine: runtime.Machine, precision: str) -> float:
    """Multiplications and additions per second in products of large matrices of `precision`."""
    dtype, device = getattr(torch, precision), machine.device
    a, b = (torch.randn(_SIDE, _SIDE, device=device).to(dtype) for _ in range(2))

    def once() -> float:
        started = time.perf_counter()
        torch.mm(a, b)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started

    return 2 * _SIDE**3 / min(once() for _ in range(12))


def step_table(speed: StepSpeed, peak: float) -> str:
    """A line for each part, then what it comes to."""
    rows = [["a step", "ms", "share"]]
    for part, seconds in dataclasses.asdict(speed.seconds).items():
        rows.append([part, f"{1e3 * seconds:,.2f}", f"{seconds / speed.seconds.total:.0%}"])
    rows.append(["together", f"{1e3 * speed.seconds.total:,.2f}", ""])
    rows.append([f"evaluation of {speed.tokens:,} tokens", f"{1e3 * speed.evaluation:,.2f}", ""])
    return aligned(rows) + (
        f"\n{speed.tokens / speed.seconds.total:,.0f} tokens/s in {speed.precision} · "
        f"{speed.flops_per_second / 1e9:,.0f} GFLOP/s, {speed.flops_per_second / peak:.0%} (MFU) "
        f"of the {peak / 1e9:,.0f} that this device reaches in large matrix products"
    )
