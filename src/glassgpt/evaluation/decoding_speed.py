"""How fast a model decodes on this machine, and what share of the memory's speed that uses.

    for speed in bench_decode(load_pretrained("runs/book")): print(speed)

One token at batch 1 needs every weight once, so bytes per token times tokens per second can't
exceed the speed of the memory, unless the model fits in the caches. This module asks an `Engine`
for logits and does not know what is inside. benchmarks/decode_cpu.py compares other programs.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any, get_args

import numpy as np

from glassgpt.checkpoints.load import load_pretrained
from glassgpt.checkpoints.run_directory import Checkpoint, require_language_model
from glassgpt.config import EngineName, WeightPrecision
from glassgpt.errors import UserError
from glassgpt.inference.engines import Engine
from glassgpt.inference.engines.choose import build_engine
from glassgpt.reporting.terminal import aligned
from glassgpt.system import SILENT, Reporter, usable_cores

ROWS = (1, 8)  # texts written side by side
_REPEATS = 3  # measurements of reading a prompt, of which the median counts
_LONGEST = 20.0  # seconds of decoding: a slow engine is measured with fewer tokens
_BANDWIDTH_BYTES = 1 << 29  # far larger than any cache


@dataclass(frozen=True)
class DecodeSpeed:
    """One engine with one precision, in tokens per second."""

    engine: str  # its own name: "numba int8"
    bytes_per_token: int
    prefill: dict[int, float]  # tokens of the prompt -> of one row
    decode: dict[int, float]  # rows -> of all rows together
    on_cpu: bool = True

    def share(self, bandwidth: float) -> float | None:
        """Of `bandwidth` bytes/s, what decoding one row reads; None for a GPU, whose memory
        `memory_bandwidth` has not measured."""
        return self.bytes_per_token * self.decode[1] / bandwidth if self.on_cpu else None


def memory_bandwidth(threads: int | None = None) -> float:
    """Bytes per second that `threads` threads [all cores] read together.

    Each sums its slice of an array of 512 MB, by NumPy, which lets the other threads run
    meanwhile; the best of six times counts, because nothing makes reading faster than it is.
    """
    threads = min(threads or usable_cores(), usable_cores())
    slices = np.array_split(np.ones(_BANDWIDTH_BYTES // 4, dtype=np.float32), threads)
    seconds = []
    with ThreadPoolExecutor(threads) as pool:
        for _ in range(6):
            started = time.perf_counter()
            list(pool.map(np.sum, slices))
            seconds.append(time.perf_counter() - started)
    return _BANDWIDTH_BYTES / min(seconds)


def bench_decode(
    checkpoint: Checkpoint,
    *,
    engines: Sequence[EngineName] = (),
    weights: Sequence[WeightPrecision] = (),
    threads: int | None = None,
    prompt_tokens: Sequence[int] = (32, 512),
    new_tokens: int = 128,
    reporter: Reporter = SILENT,
) -> Iterator[DecodeSpeed]:
    """Measure each engine with each precision; without a choice all that this machine has.

    Prompts and new tokens are cut to what the context holds; decoding follows the shortest
    prompt. Raises `UserError` for what was asked for by name and can't be had.
    """
    _check(prompt_tokens, new_tokens, threads)
    context = checkpoint.config.context_length
    prompts = sorted({min(n, context) for n in prompt_tokens})
    seen: set[str] = set()
    refusal: UserError | None = None
    for name in engines or [name for name in get_args(EngineName) if name != "auto"]:
        for precision in weights or get_args(WeightPrecision):
            device = "auto" if name == "gpu" else "cpu"
            reporter.status(f"{name} {precision}: preparing")
            try:
                engine = build_engine(
                    checkpoint,
                    device=device,
                    engine=name,
                    weights=precision,
                    threads=threads,
                    reporter=reporter,
                )
            except UserError as error:
                if engines and weights:
                    raise
                refusal = refusal or error
                continue
            if engine.name in seen:  # another name for what was measured
                continue
            seen.add(engine.name)
            yield _speed_of(engine, prompts, new_tokens, reporter, on_cpu=device == "cpu")
            del engine  # before the next one: only one copy of the weights at a time
    if refusal and not seen:
        raise refusal


def describe_decode(run: str, *, threads: int | None, reporter: Reporter, **how: Any) -> str:
    """The table for the model `run`, and how fast memory is."""
    checkpoint = require_language_model(load_pretrained(run), run)
    speeds = list(bench_decode(checkpoint, threads=threads, reporter=reporter, **how))
    reporter.status("measuring the memory")
    bandwidth = memory_bandwidth(threads)
    return f"{speed_table(speeds, bandwidth)}\nmemory speed: {bandwidth / 1e9:.1f} GB/s"


def _check(prompt_tokens: Sequence[int], new_tokens: int, threads: int | None) -> None:
    shortest = min(prompt_tokens, default=0)
    given = ("prompt_tokens", shortest), ("new_tokens", new_tokens), ("threads", threads)
    for name, value in given:
        if value is not None and value < 1:
            raise UserError(f"{name}={value} must be at least 1")


def _speed_of(
    engine: Engine, prompts: Sequence[int], new_tokens: int, reporter: Reporter, *, on_cpu: bool
) -> DecodeSpeed:
    prefill, decode = {}, {}
    for n_tokens in prompts:
        reporter.status(f"{engine.name}: prompt of {n_tokens} tokens")
        prefill[n_tokens] = prefill_speed(engine, n_tokens)
    for n_rows in ROWS:
        reporter.status(f"{engine.name}: {new_tokens} tokens, batch {n_rows}")
        decode[n_rows] = decode_speed(engine, n_rows, prompts[0], new_tokens)
    return DecodeSpeed(engine.name, engine.bytes_per_token, prefill, decode, on_cpu)


def prefill_speed(engine: Engine, n_tokens: int) -> float:
    """Tokens per second of reading a prompt of random tokens; median, after a warm-up."""
    [prompt] = _random_prompts(engine, 1, n_tokens)
    seconds = []
    for _ in range(_REPEATS + 1):  # the first one compiles and fills the caches
        engine.open(1)
        started = time.perf_counter()
        engine.read([0], [prompt])
        seconds.append(time.perf_counter() - started)
    return n_tokens / statistics.median(seconds[1:])


def decode_speed(engine: Engine, n_rows: int, prompt_tokens: int, new_tokens: int) -> float:
    """Tokens per second, of all rows together, of greedy decoding behind random prompts.

    Counted are the steps that read one token a row and choose the next, not the prompts.
    """
    context = engine.config.context_length
    prompts = _random_prompts(engine, n_rows, max(1, min(prompt_tokens, context // 2)))
    steps = min(new_tokens, context - prompts.shape[1])
    rows = range(n_rows)
    for limit in (min(2, steps), steps):  # the first time compiles and fills the caches
        engine.open(n_rows)
        chosen = engine.read(rows, list(prompts)).argmax(axis=1)
        done, started = 0, time.perf_counter()
        while done < limit and time.perf_counter() - started < _LONGEST:
            chosen = engine.read(rows, list(chosen[:, None])).argmax(axis=1)
            done += 1
        seconds = time.perf_counter() - started
    return n_rows * done / seconds


def _random_prompts(engine: Engine, n_rows: int, n_tokens: int) -> np.ndarray:
    """(n_rows, n_tokens) ids, the same every time."""
    rng = np.random.default_rng(0)
    return rng.integers(engine.config.vocab_size, size=(n_rows, n_tokens))


def speed_table(speeds: Sequence[DecodeSpeed], bandwidth: float) -> str:
    """One line for each engine and precision."""
    prompts = list(speeds[0].prefill)
    measured = [*(f"prompt of {n}" for n in prompts), *(f"batch {n}" for n in ROWS)]
    rows = [["tokens/s", *measured, "MB/token", "of memory speed"]]
    for speed in speeds:
        share = speed.share(bandwidth)
        rates = [*speed.prefill.values(), *speed.decode.values()]
        shown = [f"{rate:,.0f}" if rate >= 100 else f"{rate:.1f}" for rate in rates]
        size = f"{speed.bytes_per_token / 1e6:,.1f}"
        rows.append([speed.engine, *shown, size, "" if share is None else f"{share:.0%}"])
    return aligned(rows)
