"""What would it cost to train this here, or on those GPUs? Size, memory, time and money of a run.

    print(plan_table(make_plan(["book.txt"], preset="shakespeare-char", gpu="A100", price=1.8)))
    options, expected = plan_budget({"budget": "5m"}, dataset, machine, began=time.monotonic())

costs.py does the arithmetic, budget.py has the rule. This module adds what only a machine or a text
can tell: how long a step takes here, how much memory there is, how many tokens. It trains nothing
and writes nothing.
"""

from __future__ import annotations

import bz2
import contextlib
import dataclasses
import itertools
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassgpt import runtime
from glassgpt.config import ModelConfig, TrainConfig
from glassgpt.data.batches import TokenFiles
from glassgpt.data.dataset import Dataset
from glassgpt.data.prepare import DataSize, estimate_size
from glassgpt.errors import UserError
from glassgpt.options import Options, names_of, resolve_options, split_options
from glassgpt.reporting.run_log import Expectation
from glassgpt.reporting.terminal import format_seconds
from glassgpt.runtime import Card, find_card
from glassgpt.system import SILENT, Reporter, bytes_of, free_memory, peak_memory, seconds_of
from glassgpt.training.planning import budget
from glassgpt.training.planning.costs import (
    Memory,
    largest_micro_batch,
    memory,
    parameters_by_part,
    training_seconds,
)
from glassgpt.training.step import (
    StepPlan,
    StepSeconds,
    TrainingStep,
    measure_step,
    rows_per_process,
    trial_step,
)

# Share of a card's arithmetic that is assumed where nobody names one: nanoGPT's four days for GPT-2
# on 8 A100 are 29 %.
USUAL_MFU = 0.3
_CALIBRATION_SHARE, _SHORTEST_TRY = 0.02, 0.25  # of the budget; seconds: to measure one shape
_LOOKED_AT = 200_000  # tokens that are compressed, to see how hard the text is to predict
_FORWARD = 0.45  # of a training step's time, for an evaluation of as many tokens
_ROUND_ABOUT = 2.5  # seconds for all that is neither step nor evaluation


@dataclass(frozen=True)
class Plan:
    """One training and its price."""

    model: ModelConfig
    train: TrainConfig
    text: DataSize
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
    text = estimate_size(data or given.get("data") or (), data_config)
    model = ModelConfig.from_shape(shape.pop("shape"), vocab_size=text.vocab_size, **shape)
    if gpu is None:
        return _plan_here(model, train, text, price, reporter)
    card, world, share = find_card(gpu), gpus or 1, mfu or USUAL_MFU
    dtype = torch.float32 if train.dtype == "float32" else torch.bfloat16
    machine = runtime.Machine(torch.device("cuda"), dtype, world=world)
    tokens = rows_per_process(model, train, world) * world * model.context_length
    took = training_seconds(model, tokens, flops=card.flops * world, mfu=share)
    assumed = f"{share:.0%} of {card.flops / 1e12:,.0f} TFLOP/s, assumed"
    return Plan(
        model,
        train,
        text,
        world,
        f"{world} x {card.name}",
        card,
        memory(model, train, StepPlan.decide(model, train, machine)),
        card.memory,
        largest_micro_batch(model, train, machine, card.memory),
        took,
        assumed,
        price,
    )


def _check(gpu: str | None, gpus: int | None, mfu: float | None, price: float | None) -> None:
    if gpu is None and (gpus is not None or mfu is not None):
        name, value = ("gpus", gpus) if gpus is not None else ("mfu", mfu)
        raise UserError(
            f"{name}={value} needs --gpu, the name of a card; without it this machine is measured"
        )
    if gpus is not None and gpus < 1:
        raise UserError(f"gpus={gpus} must be at least 1")
    if mfu is not None and not 0 < mfu <= 1:
        raise UserError(f"mfu={mfu} must be greater than 0 and at most 1")
    if price is not None and not 0 <= price < float("inf"):
        raise UserError(f"price={price} can't be negative; it is in dollars per GPU-hour")


def _plan_here(
    model: ModelConfig, train: TrainConfig, text: DataSize, price: float | None, reporter: Reporter
) -> Plan:
    machine = runtime.start(train)
    need, room = memory(model, train, StepPlan.decide(model, train, machine)), room_here(machine)
    fitting, took = 1, None
    if room is not None:
        fitting = largest_micro_batch(model, train, machine, room)
    if room is None or need.total <= room:
        took = calibrate(model, train, machine, reporter)
    where, measured = str(machine.device), "measured"
    return Plan(model, train, text, 1, where, None, need, room, fitting, took, measured, price)


# -- this machine --------------------------------------------------------------------------------


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

    Few rows are slower, each, than many, so as many are measured as there is time for; more take
    longer in proportion. Takes about `budget` seconds and what compiling takes, or as long as one
    pass of a row for each thread.
    """
    reporter.status("measuring a few steps")
    with contextlib.closing(reporter), trial_step(model, train, machine, reporter) as step:
        most, started = step.plan.micro_batch_size, time.monotonic()
        size = (most, model.context_length)
        tokens = np.random.default_rng(0).integers(model.vocab_size, size=size)
        step.compile((tokens, tokens))
        few = most if step.compiled else min(most, len(step.steps))
        started = time.monotonic()
        times = _time_rows(step, tokens[:few], 0.0)
        while few < most:
            more = min(4 * few, most)
            if time.monotonic() - started + 2 * times.total * more / few > 1.25 * budget:
                break
            few = more
            times = _time_rows(step, tokens[:few], 0.0)
        if (left := budget - (time.monotonic() - started)) > times.total:
            times = _time_rows(step, tokens[:few], left)
    return (times.forward + times.backward) * step.plan.rows / few + times.optimizer


def _time_rows(step: TrainingStep, tokens: np.ndarray, seconds: float) -> StepSeconds:
    return measure_step(step, itertools.repeat((tokens, tokens)), seconds=seconds)


# -- a budget -----------------------------------------------------------------------------------


def plan_budget(
    given: Options,
    data: Dataset,
    machine: runtime.Machine,
    *,
    began: float,
    reporter: Reporter,
    asked: set[str] = frozenset(),  # type: ignore
    base: ModelConfig | None = None,
) -> tuple[Options, Expectation]:
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
    room = room_here(machine)
    if given.get("memory"):
        asked_for = bytes_of(given["memory"]) - peak_memory()
        room = asked_for if room is None else min(room, asked_for)
    if time.monotonic() - began + _ROUND_ABOUT > 0.75 * total:
        needed = time.monotonic() - began + _ROUND_ABOUT
        raise UserError(
            f"budget={given['budget']} is too short: to begin and to end takes {needed:.0f} s here"
        )
    shapes = []
    for model in budget.candidates(text, fixed):
        full, train = _completed(model, budget.training_options(model, 1, text), given)
        need = memory(full, train, StepPlan.decide(full, train, machine))
        if room is None or need.total <= room:
            shapes.append(model)
    if not shapes:
        raise UserError("not even the smallest model of the plan fits in so little memory")
    measured: dict[ModelConfig, float] = {}  # shape -> seconds per token
    while True:  # until the best shape is a measured one; measuring takes time from the budget
        left = total - (time.monotonic() - began) - _ROUND_ABOUT
        chosen = budget.choose(shapes, text, left, measured)
        if chosen.model in measured:
            break
        reporter.status(f"measuring {chosen.model.n_layer} layers, {chosen.model.n_embd} wide")
        model, train = _completed(chosen.model, chosen.train, given)
        enough = max(_SHORTEST_TRY, _CALIBRATION_SHARE * total)
        took = calibrate(model, train, alone, reporter, budget=enough)
        tokens = rows_per_process(model, train) * model.context_length
        measured[chosen.model] = took / tokens / machine.world
    twice = budget.choose(shapes, text, left + total, measured)
    expected = _expectation(chosen, twice, text, total, len(data.val))
    reporter.say(f"plan: {describe_budget(chosen.model, expected)}")
    return _shape_of(chosen.model) | chosen.train | given, expected


def _completed(
    model: ModelConfig, train: Options, given: Options
) -> tuple[ModelConfig, TrainConfig]:
    """A shape and options of the rule, with the options that were `given`."""
    wanted = {**train, **given}
    own = {name: wanted[name] for name in names_of(TrainConfig) & set(wanted)}
    return dataclasses.replace(model, dropout=wanted["dropout"]), TrainConfig(**own)


def _expectation(
    chosen: budget.Choice,
    twice: budget.Choice,
    text: budget.TextStatistics,
    seconds: float,
    n_val: int,
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
    model: ModelConfig, given: Options, expected: Expectation, machine: runtime.Machine
) -> str:
    """The same and more, a line for each; at the end what was chosen, as options to copy."""
    own = {name: given[name] for name in names_of(TrainConfig) & set(given)}
    train = TrainConfig(**own)
    need = memory(model, train, StepPlan.decide(model, train, machine))
    hidden = {"data", "budget", "memory", "out", "max_steps", "init_from"}
    chosen = [f"--{n.replace('_', '-')} {given[n]}" for n in sorted(given) if n not in hidden]
    rows = [
        ("time", format_seconds(expected.seconds)),
        ("model", f"{_shape_in_words(model)}: {model.n_parameters:,} parameters"),
        ("arithmetic", f"{model.flops_per_token() / 1e6:,.1f} MFLOP per token"),
        ("speed", f"{expected.tokens_per_second:,.0f} tokens/s (measured)"),
        ("tokens", f"{_count(expected.tokens)}, {expected.epochs:.1f} times through the text"),
        ("memory", f"{(need.total + peak_memory()) / 1e9:,.2f} GB, at the peak"),
        ("expected loss", f"{expected.loss:.2f} nats per token"),
        ("in twice the time", f"{expected.loss_of_twice:.2f}"),
        ("chosen", " ".join(chosen)),
    ]
    return "\n".join(f"{name:<19}{value}" for name, value in rows)


def _shape_of(model: ModelConfig) -> Options:
    names = ("n_layer", "n_head", "n_embd", "context_length")
    return {name: getattr(model, name) for name in names}


def _look_into(split: TokenFiles, vocab_size: int) -> budget.TextStatistics:
    """How much text there is, and how hard it is."""
    few = split.read(0, min(len(split), _LOOKED_AT))
    packed = bz2.compress(few.astype(np.uint8 if vocab_size <= 256 else np.uint16).tobytes())
    return budget.TextStatistics(len(split), vocab_size, 8 * len(packed) / max(1, len(few)))


# -- to read -------------------------------------------------------------------------------------


def plan_table(plan: Plan) -> str:
    """What is trained, what it needs, what it costs: a line for each."""
    model, train, need = plan.model, plan.train, plan.memory
    parts = ", ".join(f"{part} {n / 1e6:,.1f} M" for part, n in parameters_by_part(model).items())
    steps = f"{train.max_steps:,} steps of {plan.tokens_per_step:,}"
    shape = _shape_in_words(model)
    rows = [
        ("model", f"{model.family}: {shape}, vocabulary {model.vocab_size:,}"),
        ("parameters", f"{model.n_parameters:,} ({parts})"),
        ("arithmetic", f"{model.flops_per_token() / 1e6:,.1f} MFLOP per token"),
        ("tokens", f"{steps}: {_count(train.max_steps * plan.tokens_per_step)}{_epochs(plan)}"),
        ("memory", f"{need.total / 1e9:,.2f} GB {'per GPU' if plan.card else 'at the peak'}"),
    ]
    rows += [(f"  {name}", f"{getattr(need, name) / 1e9:,.2f}") for name in _PARTS]
    rows += [("fits", _fits(plan)), ("speed", _speed(plan)), *_price(plan)]
    return "\n".join(f"{name:<15}{value}" for name, value in rows)


_PARTS = ("weights", "gradients", "optimizer", "activations", "other")


def _shape_in_words(model: ModelConfig) -> str:
    heads, context = f"{model.n_head} heads", f"context {model.context_length:,}"
    return f"{model.n_layer} layers, {heads}, {model.n_embd} wide, {context}"


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
