"""Where does a training step's time go here, and how near is it to what the machine can multiply?

    speed = time_steps(model_config, train_config, machine, seconds=5); print(table(speed, peak))

Real steps on random tokens: batch, forward, backward, optimizer, evaluation. What the machine can
do at most is measured, too, by large matrix products in the same precision. Ratios against nanoGPT
are in benchmarks/train_cpu.py.
"""

from __future__ import annotations

import contextlib
import statistics
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassgpt import runtime
from glassgpt.checkpoints.load import load_pretrained
from glassgpt.config import ModelConfig, TrainConfig
from glassgpt.data.batches import TokenFiles
from glassgpt.data.glance import look_at
from glassgpt.errors import UserError
from glassgpt.model import GPT
from glassgpt.options import resolve_options, split_options
from glassgpt.reporting.terminal import aligned
from glassgpt.system import SILENT, Reporter
from glassgpt.training.optimizers import Optimizer, make_optimizers
from glassgpt.training.step import Passes

_TEXT = 1 << 20  # tokens
_SIDE = 2048  # of the matrices whose product shows the peak


@dataclass(frozen=True)
class StepSpeed:
    """One training step, in seconds; the medians of several."""

    model: ModelConfig
    tokens: int  # of a step
    precision: str  # of its products
    parts: dict[str, float]  # part of the step -> seconds
    evaluation: float  # of as many tokens as a step has

    @property
    def seconds(self) -> float:
        return sum(self.parts.values())

    @property
    def flops_per_second(self) -> float:
        return self.tokens * self.model.flops_per_token() / self.seconds


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
            shape.pop("shape"), vocab_size=look_at((), data).vocab_size, **shape
        )
    else:
        model = load_pretrained(run).config
    reporter.status("measuring training steps")
    speed = time_steps(model, train, machine, seconds=seconds, reporter=reporter)
    reporter.status("measuring matrix products")
    return table(speed, product_peak(machine, speed.precision))


def time_steps(
    model: ModelConfig,
    train: TrainConfig,
    machine: runtime.Machine,
    *,
    seconds: float,
    reporter: Reporter = SILENT,
) -> StepSpeed:
    """Train on random tokens in this process for about `seconds`, three steps at least."""
    threads = torch.get_num_threads()
    rows = max(1, round(train.batch_tokens / model.context_length))
    gpt = GPT(model).to(machine.device)
    passes = Passes(gpt, train, machine, rows=rows, reporter=reporter)
    optimizers = make_optimizers(gpt, train, low_precision=passes.precision == "bfloat16",
                                 workers=passes.workers)  # fmt: skip
    steps: list[dict[str, float]] = []
    try:
        with _random_text(model) as text:
            batch = text.batch(0, seed=0, n=rows, T=model.context_length)
            passes.compile(*batch)
            started = time.monotonic()
            while len(steps) < 3 or time.monotonic() - started < seconds:
                steps.append(_step(passes, optimizers, text, len(steps), machine))
            before = time.perf_counter()
            passes.losses(*batch)
            evaluation = time.perf_counter() - before
    finally:
        passes.close()
        torch.set_num_threads(threads)
    parts = {part: statistics.median(step[part] for step in steps[1:]) for part in steps[0]}
    return StepSpeed(model, rows * model.context_length, passes.precision, parts, evaluation)


def _step(
    passes: Passes,
    optimizers: Sequence[Optimizer],
    text: TokenFiles,
    number: int,
    machine: runtime.Machine,
) -> dict[str, float]:
    """Seconds of each part of one step."""

    def lap() -> float:
        nonlocal last
        if machine.device.type == "cuda":
            torch.cuda.synchronize()
        took, last = time.perf_counter() - last, time.perf_counter()
        return took

    last, parts = time.perf_counter(), {}
    n, T = passes.rows, passes.model.config.context_length
    batch = text.batch(number, seed=0, n=n, T=T)
    parts["data"] = lap()
    before = np.array(passes.seconds)
    passes.gradients(*batch, key=number)
    both, (forward, backward) = lap(), np.array(passes.seconds) - before
    parts["forward"] = both * forward / (forward + backward)
    parts["backward"] = both * backward / (forward + backward)
    torch.nn.utils.clip_grad_norm_(passes.model.parameters(), 1.0, foreach=True)
    for optimizer in optimizers:
        optimizer.step()
        optimizer.zero_grad()
    passes.weights_changed()
    parts["optimizer"] = lap()
    return parts


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


def table(speed: StepSpeed, peak: float) -> str:
    """A line for each part, then what it comes to."""
    rows = [["a step", "ms", "share"]]
    for part, seconds in speed.parts.items():
        rows.append([part, f"{1e3 * seconds:,.2f}", f"{seconds / speed.seconds:.0%}"])
    rows.append(["together", f"{1e3 * speed.seconds:,.2f}", ""])
    rows.append([f"evaluation of {speed.tokens:,} tokens", f"{1e3 * speed.evaluation:,.2f}", ""])
    return aligned(rows) + (
        f"\n{speed.tokens / speed.seconds:,.0f} tokens/s in {speed.precision} · "
        f"{speed.flops_per_second / 1e9:,.0f} GFLOP/s, {speed.flops_per_second / peak:.0%} (MFU) "
        f"of the {peak / 1e9:,.0f} that this device reaches in large matrix products"
    )
