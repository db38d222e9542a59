"""What would it cost to train this here, or on those GPUs? Size, memory, time and money of a run.

    print(table(make_plan(["book.txt"], preset="shakespeare-char", gpu="A100", price=1.8)))
    options, expected = plan_budget({"budget": "5m"}, dataset, machine, began=time.monotonic())

costs.py does the arithmetic, budget.py has the rule; this room fills in what only a machine or a
text can say: how long a step takes here, how much memory there is, how many tokens. It trains
nothing and writes nothing.
"""

from __future__ import annotations

import bz2
import dataclasses
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassgpt import runtime
from glassgpt.config import ModelConfig, TrainConfig
from glassgpt.data.batches import Dataset, TokenFiles
from glassgpt.data.glance import Text, look_at
from glassgpt.errors import UserError
from glassgpt.model import GPT
from glassgpt.options import names_of, resolve_options, split_options
from glassgpt.reporting.run_log import Expectation
from glassgpt.reporting.terminal import format_seconds
from glassgpt.runtime import Card, find_card
from glassgpt.system import SILENT, Reporter, bytes_of, free_memory, peak_memory, seconds_of
from glassgpt.training.fused.step import can_fuse, multiplies_bfloat16
from glassgpt.training.optimizers import Optimizer, make_optimizers
from glassgpt.training.planning import budget
from glassgpt.training.planning.costs import (
    Memory,
    largest_micro_batch,
    memory,
    parameters_by_part,
    rows_per_process,
    seconds,
)
from glassgpt.training.step import Passes

# Of a card's arithmetic, where nobody says: nanoGPT's four days for GPT-2 on 8 A100 are 29 %.
USUAL_MFU = 0.3
_CALIBRATION_SHARE, _SHORTEST_TRY = 0.02, 0.25  # of the budget, seconds; for measuring a shape
_LOOKED_AT = 200_000  # tokens, to see how hard the text is
_FORWARD = 0.45  # of a training step's time, for an evaluation of as many tokens
_ROUND_ABOUT = 2.5  # seconds for all that is neither step nor evaluation


@dataclass(frozen=True)
class Plan:
    """One training and its price."""

    model: ModelConfig
    train: TrainConfig
    text: Text
    world: int  # processes, one for each GPU
    where: str  # "8 x A100", "cpu"
    card: Card | None  # None: this machine
    memory: Memory  # of one process
    room: int | None  # bytes it may take; None where nobody knows
    micro_batch_size: int | None  # the largest that fits; None: not even one sequence
    seconds_per_step: float | None  # None: not to be tried, since it does not fit
    speed_from: str  # how that is known
    price: float | None  # dollars for an hour of a GPU, or of this machine

    @property
    def fits(self) -> bool:
        return self.room is None or self.memory.total <= self.room

    @property
    def tokens_per_step(self) -> int:
        rows = rows_per_process(self.model, self.train, self.world) * self.world
        return rows * self.model.context_length

    @property
    def hours(self) -> float | None:
        if self.seconds_per_step is None:
            return None
        return self.seconds_per_step * self.train.max_steps / 3600


def make_plan(
    data: Sequence[str] | None = None,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    gpu: str | None = None,
    gpus: int | None = None,
    mfu: float | None = None,
    price: float | None = None,
    reporter: Reporter = SILENT,
    **options: Any,
) -> Plan:
    """The plan of `train` with these options: on `gpus` cards named `gpu`, or measured here.

    Raises `UserError` for what can't be: unknown options and cards, impossible numbers.
    """
    _check(gpu, gpus, mfu, price)
    given = resolve_options(options, preset=preset, config=config)
    shape, data_config, train = split_options(given)
    text = look_at(data or given.get("data") or (), data_config)
    model = ModelConfig.from_shape(shape.pop("shape"), vocab_size=text.vocab_size, **shape)
    if gpu is None:
        return _plan_here(model, train, text, price, reporter)
    card, world, share = find_card(gpu), gpus or 1, mfu or USUAL_MFU
    place: dict[str, Any] = {"device": "cuda", "world": world}
    tokens = rows_per_process(model, train, world) * world * model.context_length
    took = seconds(model, tokens, flops=card.flops * world, mfu=share)
    assumed = f"{share:.0%} of {card.flops / 1e12:,.0f} TFLOP/s, assumed"
    fitting = largest_micro_batch(model, train, card.memory, **place)
    return Plan(model, train, text, world, f"{world} x {card.name}", card,
                memory(model, train, **place), card.memory, fitting, took, assumed,
                price)  # fmt: skip


def _check(gpu: str | None, gpus: int | None, mfu: float | None, price: float | None) -> None:
    if gpu is None and (gpus is not None or mfu is not None):
        name, value = ("gpus", gpus) if gpus is not None else ("mfu", mfu)
        raise UserError(f"{name}={value} needs --gpu, the name of a card; without it this "
                        "machine is measured")  # fmt: skip
    if gpus is not None and gpus < 1:
        raise UserError(f"gpus={gpus} must be at least 1")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"mfu={mfu} must be greater than 0 and at most 1")
    if price is not None and not 0 <= price < float("inf"):
        raise UserError(f"price={price} can't be negative; it is in dollars per GPU-hour")


def _plan_here(
    model: ModelConfig, train: TrainConfig, text: Text, price: float | None, reporter: Reporter
) -> Plan:
    machine = runtime.start(train)
    place, room = where_we_are(machine), room_here(machine)
    need = memory(model, train, **place)
    fitting, took = 1, None
    if room is not None:
        fitting = largest_micro_batch(model, train, room, **place)
    if room is None or need.total <= room:
        took = calibrate(model, train, machine, reporter)
    return Plan(model, train, text, 1, str(machine.device), None, need, room, fitting, took,
                "measured", price)  # fmt: skip


# -- this machine --------------------------------------------------------------------------------


def where_we_are(machine: runtime.Machine) -> dict[str, Any]:
    """What `costs.memory` wants to know of a machine."""
    on_cpu = machine.device.type == "cpu"
    known = ModelConfig.from_shape("modern", vocab_size=2)
    return {
        "device": "cpu" if on_cpu else "cuda",
        "threads": torch.get_num_threads(),
        "world": machine.world,
        "kernels": on_cpu and can_fuse(known),
        "bfloat16": multiplies_bfloat16() if on_cpu else machine.dtype != torch.float32,
    }


def room_here(machine: runtime.Machine) -> int | None:
    """Bytes that a training may take beyond what this process has; None where nobody knows."""
    if machine.device.type == "cuda":
        return torch.cuda.mem_get_info(machine.device)[0]
    return free_memory()


def calibrate(
    model: ModelConfig,
    train: TrainConfig,
    machine: runtime.Machine,
    reporter: Reporter = SILENT,
    *,
    budget: float = 2.0,
) -> float:
    """Seconds that a step of this training takes here, from a few real ones on random tokens.

    Few rows are slower, each, than many, so as many are measured as there is time for, and the
    rest is in proportion. Takes about `budget` seconds and what compiling takes, or as long as one
    pass of a row for each thread.
    """
    reporter.status("measuring a few steps")
    threads, rows = torch.get_num_threads(), rows_per_process(model, train, machine.world)
    gpt = GPT(model).to(machine.device)
    passes = Passes(gpt, train, machine, rows=rows, reporter=reporter)
    try:
        optimizers = make_optimizers(gpt, train, workers=passes.workers,
                                     low_precision=passes.precision == "bfloat16")  # fmt: skip
        tokens = np.random.default_rng(0).integers(
            model.vocab_size, size=(passes.micro_batch_size, model.context_length)
        )
        passes.compile(tokens, tokens)
        few = len(tokens) if passes.compiled else min(len(tokens), len(passes.steps))
        started = time.monotonic()
        times = _time_steps(passes, optimizers, tokens[:few], 0.0)
        while few < len(tokens):
            more = min(4 * few, len(tokens))
            if time.monotonic() - started + 2 * sum(times) * more / few > 1.25 * budget:
                break
            few = more
            times = _time_steps(passes, optimizers, tokens[:few], 0.0)
        if (left := budget - (time.monotonic() - started)) > sum(times):
            times = _time_steps(passes, optimizers, tokens[:few], left)
    finally:
        passes.close()
        reporter.close()
        torch.set_num_threads(threads)  # Passes may have left one to each of its workers
    backward, update = times
    return backward * rows / few + update


def _time_steps(
    passes: Passes, optimizers: Sequence[Optimizer], tokens: np.ndarray, budget: float
) -> tuple[float, float]:
    """Medians, in seconds, of a pass over these rows and of the update behind it.

    As often as fits in the budget, but once, behind a first time that fills the caches; as in
    `Trainer._train_step`, where nothing is read.
    """
    passes.rows, backward, update = len(tokens), [], []
    started = time.perf_counter()
    while len(update) < 2 or time.perf_counter() - started < budget:
        before = time.perf_counter()
        passes.gradients(tokens, tokens).item()  # waits for a GPU
        between = time.perf_counter()
        parameters = list(passes.model.parameters())
        torch.nn.utils.clip_grad_norm_(parameters, 1.0, foreach=True)
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
        passes.weights_changed()
        parameters[0].flatten()[0].item()
        backward.append(between - before)
        update.append(time.perf_counter() - between)
    return statistics.median(backward[1:]), statistics.median(update[1:])


# -- a budget -----------------------------------------------------------------------------------


def plan_budget(
    given: dict[str, Any],
    data: Dataset,
    machine: runtime.Machine,
    *,
    began: float,
    reporter: Reporter,
    asked: set[str] = frozenset(),  # type: ignore
    base: ModelConfig | None = None,
) -> tuple[dict[str, Any], Expectation]:
    """`given` completed to make the best of its budget, and what to expect of that.

    Options that were given stay as they are, and so does the shape of a `base` to begin with; the
    others follow the rule. A preset's numbers of steps yield to the clock, unless they were `asked`
    for by name. Raises `UserError` when the budget is too short for anything.
    """
    counts = {"max_steps", "warmup_steps", "decay_steps"} - asked
    given = {name: value for name, value in given.items() if name not in counts}
    total = seconds_of(given["budget"])
    alone = dataclasses.replace(machine, rank=0, world=1)
    fixed = {} if base is None else dataclasses.asdict(base)
    fixed |= {name: given[name] for name in {"shape", *names_of(ModelConfig)} & set(given)}
    assert isinstance(data.train, TokenFiles)
    text = _look_into(data.train, data.tokenizer.vocab_size)
    measured: dict[ModelConfig, float] = {}

    def complete(model: ModelConfig, train: dict[str, Any]) -> tuple[ModelConfig, TrainConfig]:
        wanted = {**train, **given}
        own = {name: wanted[name] for name in names_of(TrainConfig) & set(wanted)}
        return dataclasses.replace(model, dropout=wanted["dropout"]), TrainConfig(**own)

    def measure(model: ModelConfig, train: dict[str, Any]) -> float:
        reporter.status(f"measuring {model.n_layer} layers, {model.n_embd} wide")
        model, config = complete(model, train)
        enough = max(_SHORTEST_TRY, _CALIBRATION_SHARE * total)
        took = calibrate(model, config, alone, reporter, budget=enough)
        tokens = rows_per_process(model, config) * model.context_length
        return took / tokens / machine.world

    room = room_here(machine)
    if given.get("memory"):
        room = min(room or 1 << 60, bytes_of(given["memory"]) - peak_memory())

    def fits(model: ModelConfig, train: dict[str, Any]) -> bool:
        need = memory(*complete(model, train), **where_we_are(machine))
        return room is None or need.total <= room

    def choice(whole: float, measure: Any = None) -> budget.Choice:
        return budget.choose(
            text, seconds=lambda: whole - (time.monotonic() - began) - _ROUND_ABOUT, fixed=fixed,
            measured=measured, measure=measure, fits=fits,
        )  # fmt: skip

    if time.monotonic() - began + _ROUND_ABOUT > 0.75 * total:
        raise UserError(f"budget={given['budget']} is too short: to begin and to end takes "
                        f"{time.monotonic() - began + _ROUND_ABOUT:.0f} s here")  # fmt: skip
    chosen, twice = choice(total, measure), choice(2 * total)
    expected = _expectation(chosen, twice, text, total, len(data.val))
    reporter.say(f"plan: {describe_budget(chosen.model, expected)}")
    return _shape_of(chosen.model) | chosen.train | given, expected


def _expectation(
    chosen: budget.Choice, twice: budget.Choice, text: budget.Text, seconds: float, n_val: int
) -> Expectation:
    """Of `chosen` within so many seconds, some of which go into evaluations."""
    once = _FORWARD * chosen.token_seconds * n_val
    evaluations = 1 + seconds / max(seconds / 10, 12 * once)
    share = max(1 - evaluations * once / chosen.token_seconds / chosen.tokens, 0.5)
    tokens = share * chosen.tokens
    return Expectation(
        seconds=seconds,
        tokens_per_second=1 / chosen.token_seconds,
        tokens=round(tokens),
        epochs=tokens / text.tokens,
        loss=budget.expected_loss(chosen.model, tokens, text),
        loss_of_twice=budget.expected_loss(twice.model, share * twice.tokens, text),
    )


def describe_budget(model: ModelConfig, expected: Expectation) -> str:
    """What a budget will go into, in a line."""
    return (
        f"{model.n_layer} layers, {model.n_embd} wide, context {model.context_length} "
        f"({_count(model.n_parameters)} parameters); about {_count(expected.tokens)} tokens, "
        f"{expected.epochs:.1f} times through the text, at {expected.tokens_per_second:,.0f} a "
        f"second; expected loss {expected.loss:.2f} (twice the time: {expected.loss_of_twice:.2f})"
    )


def budget_table(
    model: ModelConfig, given: dict[str, Any], expected: Expectation, machine: runtime.Machine
) -> str:
    """The same and more, a line for each; at the end what was chosen, as options to copy."""
    own = {name: given[name] for name in names_of(TrainConfig) & set(given)}
    need = memory(model, TrainConfig(**own), **where_we_are(machine))
    hidden = {"data", "budget", "memory", "out", "max_steps", "init_from"}
    chosen = " ".join(f"--{name.replace('_', '-')} {given[name]}" for name in sorted(given)
                      if name not in hidden)  # fmt: skip
    rows = [
        ("time", format_seconds(expected.seconds)),
        ("model", f"{model.n_layer} layers, {model.n_head} heads, {model.n_embd} wide, "
                  f"context {model.context_length}: {model.n_parameters:,} parameters"),
        ("arithmetic", f"{model.flops_per_token() / 1e6:,.1f} MFLOP per token"),
        ("speed", f"{expected.tokens_per_second:,.0f} tokens/s (measured)"),
        ("tokens", f"{_count(expected.tokens)}, {expected.epochs:.1f} times through the text"),
        ("memory", f"{(need.total + peak_memory()) / 1e9:,.2f} GB, at the peak"),
        ("expected loss", f"{expected.loss:.2f} nats per token"),
        ("in twice the time", f"{expected.loss_of_twice:.2f}"),
        ("chosen", chosen),
    ]  # fmt: skip
    return "\n".join(f"{name:<19}{value}" for name, value in rows)


def _shape_of(model: ModelConfig) -> dict[str, Any]:
    names = ("n_layer", "n_head", "n_embd", "context_length")
    return {name: getattr(model, name) for name in names}


def _look_into(split: TokenFiles, vocab_size: int) -> budget.Text:
    """How much text there is, and how hard it is."""
    few = split.read(0, min(len(split), _LOOKED_AT))
    packed = bz2.compress(few.astype(np.uint8 if vocab_size <= 256 else np.uint16).tobytes())
    return budget.Text(len(split), vocab_size, 8 * len(packed) / max(1, len(few)))


# -- to read -------------------------------------------------------------------------------------


def table(plan: Plan) -> str:
    """What is trained, what it needs, what it costs: a line for each."""
    model, train, need = plan.model, plan.train, plan.memory
    parts = ", ".join(f"{part} {n / 1e6:,.1f} M" for part, n in parameters_by_part(model).items())
    rows = [
        ("model", f"{model.family}: {model.n_layer} layers, {model.n_head} heads, {model.n_embd} "
                  f"wide, context {model.context_length:,}, vocabulary {model.vocab_size:,}"),
        ("parameters", f"{model.n_parameters:,} ({parts})"),
        ("arithmetic", f"{model.flops_per_token() / 1e6:,.1f} MFLOP per token"),
        ("tokens", f"{train.max_steps:,} steps of {plan.tokens_per_step:,}: "
                   f"{_count(train.max_steps * plan.tokens_per_step)}{_epochs(plan)}"),
        ("memory", f"{need.total / 1e9:,.2f} GB {'per GPU' if plan.card else 'at the peak'}"),
    ]  # fmt: skip
    rows += [(f"  {name}", f"{getattr(need, name) / 1e9:,.2f}") for name in _PARTS]
    rows += [("fits", _fits(plan)), ("speed", _speed(plan)), *_price(plan)]
    return "\n".join(f"{name:<15}{value}" for name, value in rows)


_PARTS = ("weights", "gradients", "optimizer", "activations", "other")


def _count(n: float) -> str:
    for size, name in ((1e9, "billion"), (1e6, "million")):
        if n >= size:
            return f"{n / size:,.1f} {name}"
    return f"{n:,.0f}"


def _epochs(plan: Plan) -> str:
    there = plan.text.train_tokens
    if not there:
        return f" ({plan.text.note})" if plan.text.note else ""
    epochs = plan.train.max_steps * plan.tokens_per_step / there
    return f", {epochs:,.1f} epochs of {_count(there)}"


def _fits(plan: Plan) -> str:
    if plan.room is None:
        return "unknown: this system does not say how much memory there is"
    room = f"the {plan.room / 1e9:,.1f} GB {'of one' if plan.card else 'that are free'}"
    if plan.micro_batch_size is None:
        return f"no, not even one sequence at a time in {room}; make the model smaller"
    most = f"--micro-batch-size {plan.micro_batch_size}"
    return f"yes, in {room}; up to {most}" if plan.fits else f"not in {room}; {most} would"


def _speed(plan: Plan) -> str:
    took = plan.seconds_per_step
    if took is None:
        return f"not measured: it does not fit on {plan.where}"
    shown = f"{took:,.2f} s" if took >= 0.1 else f"{1000 * took:,.1f} ms"
    rate = plan.tokens_per_step / took
    return f"{shown} a step, {_count(rate)} tokens/s on {plan.where} ({plan.speed_from})"


def _price(plan: Plan) -> list[tuple[str, str]]:
    if plan.hours is None:
        return []
    hours = plan.hours
    shown = f"{hours:,.1f} hours ({hours / 24:,.1f} days)"
    if hours < 1:
        shown = format_seconds(hours * 3600)
    rows = [("time", f"{shown}, without evaluations")]
    kind = "GPU-hours" if plan.where != "cpu" else "hours"
    if plan.card:
        rows.append(("GPU-hours", f"{hours * plan.world:,.1f}"))
    if plan.price is not None:
        total = hours * plan.world * plan.price
        rows.append(("price", f"${total:,.2f} ({kind} at ${plan.price:,.2f})"))
    return rows
