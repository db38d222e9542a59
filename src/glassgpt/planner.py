"""What a training costs on this machine, and what to train in the time there is.

    options, plan = plan_budget(given, dataset, machine, began=time.monotonic())

Measures a few real steps; the rule itself is in budget.py, arithmetic on costs in costs.py.
"""

from __future__ import annotations

import bz2
import dataclasses
import time
from typing import Any

import numpy as np

from glassgpt import runtime
from glassgpt.bench_train import time_steps
from glassgpt.budget import Choice, Text, choose, expected_loss
from glassgpt.config import ModelConfig, TrainConfig, seconds_of
from glassgpt.data.batches import Dataset, TokenFiles
from glassgpt.errors import UserError
from glassgpt.options import names_of
from glassgpt.report import Plan
from glassgpt.runlog import Progress

_CALIBRATION_SHARE = 0.02  # of the budget, for measuring one shape
_LOOKED_AT = 1 << 19  # tokens, to see how hard the text is
_FORWARD = 0.45  # of a training step's time, for an evaluation of as many tokens
_ROUND_ABOUT = 2.5  # seconds for all that is neither step nor evaluation


def plan_budget(
    given: dict[str, Any],
    data: Dataset,
    machine: runtime.Machine,
    *,
    began: float,
    progress: Progress,
    base: ModelConfig | None = None,
) -> tuple[dict[str, Any], Plan]:
    """`given` completed to make the best of its budget, and what to expect of that.

    Options that were given stay as they are, and so does the shape of a `base` to begin with; the
    others follow the rule. Raises `UserError` when the budget is too short for anything.
    """
    budget = seconds_of(given["budget"])
    alone = dataclasses.replace(machine, rank=0, world=1)
    fixed = {} if base is None else dataclasses.asdict(base)
    fixed |= {name: given[name] for name in {"shape", *names_of(ModelConfig)} & set(given)}
    text = text_of(data.train, data.tokenizer.vocab_size)
    measured: dict[ModelConfig, float] = {}

    def measure(model: ModelConfig, train: dict[str, Any]) -> float:
        progress.status(f"measuring {model.n_layer} layers, {model.n_embd} wide")
        own = {name: given[name] for name in names_of(TrainConfig) & set(given)}
        model = dataclasses.replace(model, dropout=given.get("dropout", train["dropout"]))
        config = TrainConfig(**{k: v for k, v in train.items() if k != "dropout"} | own)
        speed = time_steps(model, config, alone, seconds=_CALIBRATION_SHARE * budget,
                           progress=progress)  # fmt: skip
        return speed.seconds / speed.tokens / machine.world

    def choice(budget: float, measure: Any = None) -> Choice:
        left = budget - (time.monotonic() - began) - _ROUND_ABOUT
        return choose(text, seconds=left, fixed=fixed, measured=measured, measure=measure)

    if time.monotonic() - began + _ROUND_ABOUT > 0.75 * budget:
        raise UserError(f"budget={given['budget']} is too short: to begin and to end takes "
                        f"{time.monotonic() - began + _ROUND_ABOUT:.0f} s here")  # fmt: skip
    chosen, twice = choice(budget, measure), choice(2 * budget)
    once = _FORWARD * chosen.token_seconds * len(data.val)  # an evaluation
    evaluations = 1 + budget / max(budget / 10, 12 * once)
    tokens = max(chosen.tokens - evaluations * once / chosen.token_seconds, chosen.tokens / 2)
    plan = Plan(
        seconds=budget,
        tokens_per_second=1 / chosen.token_seconds,
        tokens=round(tokens),
        epochs=tokens / text.tokens,
        loss=expected_loss(chosen.model, tokens, text),
        loss_of_twice=twice.loss,
    )
    return _shape_of(chosen.model) | chosen.train | given, plan


def _shape_of(model: ModelConfig) -> dict[str, Any]:
    names = ("n_layer", "n_head", "n_embd", "context_length")
    return {name: getattr(model, name) for name in names}


def text_of(split: TokenFiles, vocab_size: int) -> Text:
    """How much text there is, and how hard it is."""
    few = split.read(0, min(len(split), _LOOKED_AT))
    packed = bz2.compress(few.astype(np.uint8 if vocab_size <= 256 else np.uint16).tobytes())
    return Text(len(split), vocab_size, 8 * len(packed) / max(1, len(few)))
