"""The rule behind --budget: what it promises whatever the constants of its laws are."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassgpt.config import ModelConfig, TrainConfig
from glassgpt.errors import UserError
from glassgpt.options import names_of
from glassgpt.system import bytes_of, seconds_of
from glassgpt.training.planning.budget import (
    CHARACTERS,
    LADDER,
    WEB_TEXT,
    Choice,
    Law,
    TextStatistics,
    candidates,
    choose,
    expected_loss,
    training_options,
)

BOOK = TextStatistics(tokens=1_000_000, vocab_size=65, bits_per_token=2.7)
SHORT = TextStatistics(tokens=5_000, vocab_size=65, bits_per_token=2.7)
WEB = TextStatistics(tokens=1 << 40, vocab_size=50257, bits_per_token=9.0)
TEXTS = (BOOK, SHORT, WEB)
sizes = st.floats(1e3, 1e10)
laws = st.sampled_from([CHARACTERS, WEB_TEXT])


def at_speed(flops: float) -> Any:
    """A machine that is equally good at every shape: its `measure`."""
    return lambda model, train: model.flops_per_token() / flops


# -- durations and sizes -------------------------------------------------------------------------


@pytest.mark.parametrize(("text", "seconds"), [
    ("30", 30), ("90s", 90), ("5m", 300), ("1h30m", 5400), ("1.5h", 5400), ("2d", 172_800),
    (" 5M ", 300), ("0.5s", 0.5), ("1m30", 90), ("1d2h3m4s", 93_784),
])  # fmt: skip
def test_durations(text, seconds):
    assert seconds_of(text) == seconds
    assert TrainConfig(budget=text).budget == text


@pytest.mark.parametrize("text", ["", " ", "0", "0m", "-5m", "m", "5x", "5min", "five",
                                  "1e3", "1.2.3", "inf", "nan", "5m!", "1,5m",
                                  "9" * 400])  # fmt: skip
def test_what_is_no_duration(text):
    for make in (seconds_of, lambda budget: TrainConfig(budget=budget)):
        with pytest.raises(UserError, match="is no duration; write 30s, 5m or 1h30m"):
            make(text)


@pytest.mark.parametrize(("text", "n"), [
    ("800MB", 800 * 10**6), ("8GB", 8 * 10**9), ("1.5gb", 1_500_000_000), (" 8 G ", 8 * 10**9),
    ("2T", 2 * 10**12), ("1m", 10**6),
])  # fmt: skip
def test_amounts_of_memory(text, n):
    assert bytes_of(text) == n
    assert TrainConfig(memory=text, budget="1m").memory == text
    with pytest.raises(UserError, match="without one"):
        TrainConfig(memory=text)


@pytest.mark.parametrize("text", ["", "8", "0GB", "-1GB", "GB", "8 KB", "8GiB", "1e9", "inf",
                                  "1.GB", "9" * 400 + "GB"])  # fmt: skip
def test_what_is_no_amount_of_memory(text):
    for make in (bytes_of, lambda memory: TrainConfig(memory=memory)):
        with pytest.raises(UserError, match="is no amount of memory; write 800MB or 8GB"):
            make(text)


# -- the law -------------------------------------------------------------------------------------


@given(laws, sizes, sizes, st.floats(1.01, 100))
def test_more_of_anything_is_never_worse(law, n, tokens, factor):
    for text in TEXTS:
        here = law(n, tokens, text, 1.0)
        assert law(n * factor, tokens, text, 1.0) < here
        assert law(n, tokens * factor, text, 1.0) <= here
        assert here > law.floor
        assert law(n, tokens, text, 2.0) == pytest.approx(2 * here)


@given(laws, sizes, st.floats(1.1, 500))
def test_repeated_tokens_teach_less_and_never_nothing(law, n, epochs):
    endless = dataclasses.replace(BOOK, tokens=1 << 60)
    tokens = epochs * BOOK.tokens
    repeated, new = law(n, tokens, BOOK, 1.0), law(n, tokens, endless, 1.0)
    once = law(n, BOOK.tokens, BOOK, 1.0)
    assert new < repeated < once


@given(laws, sizes, st.floats(0.01, 1))
def test_up_to_once_through_it_is_the_plain_law(law, n, share):
    tokens = share * BOOK.tokens
    plain = law.floor + law.a / n**law.alpha + law.b / tokens**law.beta
    assert law(n, tokens, BOOK, 1.0) == pytest.approx(plain)


def test_repetitions_wear_off_as_the_paper_says():
    """arXiv:2305.16264, eq. 5: after r repetitions, r (1 - 1/e) texts were seen besides the
    first."""
    law = Law(floor=1.0, a=1.0, alpha=1.0, b=1.0, beta=1.0, repetitions=4.0)
    seen = 1 / (law(math.inf, 5 * BOOK.tokens, BOOK, 1.0) - 1)
    assert seen == pytest.approx(BOOK.tokens * (1 + 4 * (1 - math.exp(-1))))


def test_the_expectation_is_scaled_by_how_hard_the_text_is():
    model = ModelConfig.from_shape("modern", vocab_size=65, n_layer=2, n_embd=64, n_head=2)
    easy = dataclasses.replace(BOOK, bits_per_token=1.35)
    assert expected_loss(model, 1e6, BOOK) == pytest.approx(2 * expected_loss(model, 1e6, easy))
    assert 0.5 < expected_loss(model, 3e7, BOOK) < math.log(65)
    none = dataclasses.replace(model, n_layer=0)  # embeddings alone
    assert math.isfinite(expected_loss(none, 1e6, BOOK))


# -- the shapes ----------------------------------------------------------------------------------


def test_the_ladder_climbs():
    shapes = candidates(BOOK, {})
    assert len(shapes) == len(LADDER)
    costs = [model.flops_per_token() for model in shapes]
    assert costs == sorted(costs)
    assert costs[-1] > 50 * costs[0]


@pytest.mark.parametrize("fixed", [
    {"n_layer": 7}, {"n_embd": 80}, {"n_embd": 72, "n_head": 9}, {"shape": "gpt2"},
    {"dropout": 0.3}, {"context_length": 48}, {"n_layer": 0}, {"n_head": 1},
    {"n_layer": 1, "n_embd": 32, "n_head": 2, "context_length": 16},
    {"shape": "gpt2", "n_embd": 99, "n_head": 3}, {"n_hidden": 77}, {"tie_embeddings": False},
])  # fmt: skip
def test_what_is_fixed_stays(fixed):
    shapes = candidates(dataclasses.replace(BOOK, vocab_size=41), fixed)
    assert shapes
    assert len(set(shapes)) == len(shapes)
    for model in shapes:
        assert model.vocab_size == 41
        assert model.family == ("gpt2" if fixed.get("shape") == "gpt2" else "qwen3")
        for name, value in fixed.items():
            assert name == "shape" or getattr(model, name) == value


@pytest.mark.parametrize("shape", ["modern", "gpt2"])
@pytest.mark.parametrize("n_embd", [2, 6, 34, 58, 62, 100, 200, 298, 300, 1000])
def test_widths_that_no_usual_head_divides(shape, n_embd):
    for model in candidates(BOOK, {"n_embd": n_embd, "shape": shape}):
        assert (model.n_embd, model.n_head * model.head_dim) == (n_embd, n_embd)


@pytest.mark.parametrize(("fixed", "reason"), [
    ({"n_embd": 101}, "even"), ({"n_embd": 48, "n_head": 5}, "n_head=5"),
    ({"n_embd": 0}, "n_embd=0"), ({"n_head": 0}, "n_head=0"), ({"n_layer": -1}, "n_layer=-1"),
    ({"dropout": 2.0}, "dropout=2.0"),
])  # fmt: skip
def test_shapes_that_can_not_be(fixed, reason):
    with pytest.raises(UserError, match=reason):
        candidates(BOOK, fixed)


def test_a_model_to_begin_with_is_the_only_candidate():
    """--from: all of its fields are fixed, the vocabulary among them."""
    for shape in ("modern", "gpt2"):
        base = ModelConfig.from_shape(shape, vocab_size=65, n_layer=3, n_embd=24, n_head=2)
        assert candidates(BOOK, dataclasses.asdict(base)) == [base]


def test_how_to_train_is_made_of_options_of_train():
    model, *_ = candidates(BOOK, {})
    before = -1.0
    for epochs in (0.1, 1, 5, 20, 1000):
        options = training_options(model, epochs * BOOK.tokens, BOOK)
        assert options["dropout"] >= before  # the more often a text is seen
        before = options.pop("dropout")
        assert options.keys() <= names_of(TrainConfig)
        assert TrainConfig(**options, budget="5m").max_steps > 10**9
    assert 0 < before < 1
    assert training_options(model, BOOK.tokens, BOOK)["dropout"] == 0


# -- the choice ----------------------------------------------------------------------------------


def choose_measured(
    text: TextStatistics,
    seconds: float,
    measure: Callable[[ModelConfig, dict[str, Any]], float],
    measured: dict[ModelConfig, float] | None = None,
) -> Choice:
    """As the planner does: until the best shape is a measured one."""
    shapes, measured = candidates(text, {}), {} if measured is None else measured
    while (best := choose(shapes, text, seconds, measured)).model not in measured:
        measured[best.model] = measure(best.model, best.train)
    return best


@pytest.mark.parametrize("text", TEXTS, ids=["book", "short", "web"])
@pytest.mark.parametrize("flops", [1e9, 1e11, 1e14])
def test_more_time_never_expects_a_worse_loss(text, flops):
    found = [
        choose_measured(text, seconds, at_speed(flops))
        for seconds in (1, 10, 30, 60, 120, 300, 3600, 86400)
    ]
    losses = [choice.loss for choice in found]
    assert all(later <= before for before, later in zip(losses, losses[1:], strict=False))
    for choice in found:
        assert choice.loss == expected_loss(choice.model, choice.tokens, text)
        assert choice.model.context_length < text.tokens
    if text is not SHORT:
        parameters = [choice.model.n_parameters for choice in found]
        assert parameters == sorted(parameters)
        assert parameters[0] < parameters[-1] or flops == 1e14


def test_no_other_shape_expects_less():
    measure = at_speed(3e10)
    best = choose_measured(BOOK, 120, measure)
    for model in candidates(BOOK, {}):
        tokens = 120 / measure(model, {})
        assert expected_loss(model, tokens, BOOK) >= best.loss * (1 - 1e-9)


def test_a_machine_on_which_wide_shapes_are_slow_gets_a_narrow_one():
    usual = choose_measured(BOOK, 600, at_speed(1e11))
    assert usual.model.n_embd > 128

    def measure(model: ModelConfig, train: dict[str, Any]) -> float:
        return model.flops_per_token() / (1e11 if model.n_embd <= 96 else 1e6)

    measured: dict[ModelConfig, float] = {}
    choice = choose_measured(BOOK, 600, measure, measured)
    assert choice.model.n_embd <= 96
    assert choice.token_seconds == measured[choice.model] == measure(choice.model, {})
    assert choice.tokens == pytest.approx(600 / choice.token_seconds)


def test_what_was_measured_is_not_measured_again():
    asked: list[ModelConfig] = []

    def measure(model: ModelConfig, train: dict[str, Any]) -> float:
        assert train["max_steps"] > 10**9
        asked.append(model)
        return at_speed(2e10)(model, train)

    measured: dict[ModelConfig, float] = {}
    first = choose_measured(BOOK, 100, measure, measured)
    assert 1 <= len(asked) < len(LADDER)  # only those that look best
    assert len(set(asked)) == len(asked)
    assert list(measured) == asked
    again = choose_measured(BOOK, 100, measure, measured)
    assert (again, len(measured)) == (first, len(set(asked)))
    unmeasured = choose(candidates(BOOK, {}), BOOK, 200, measured)
    assert unmeasured.loss <= first.loss


@pytest.mark.slow
@given(st.lists(st.floats(1e-9, 1.0), min_size=len(LADDER), max_size=len(LADDER)),
       st.floats(0.1, 1e5))  # fmt: skip
def test_it_ends_on_every_machine(speeds, seconds):
    speed_of = dict(zip(candidates(BOOK, {}), speeds, strict=True))
    measured: dict[ModelConfig, float] = {}
    choice = choose_measured(BOOK, seconds, lambda model, train: speed_of[model], measured)
    assert choice.token_seconds == speed_of[choice.model]
    assert choice.loss == min(expected_loss(model, max(1.0, seconds / took), BOOK)
                              for model, took in measured.items())  # fmt: skip


def test_a_tiny_text():
    tiny = TextStatistics(tokens=70, vocab_size=5, bits_per_token=1.0)
    choice = choose_measured(tiny, 60, at_speed(1e10))
    assert choice.model.context_length < 70
    assert math.isfinite(choice.loss)
    fixed = {"context_length": 8}
    few = dataclasses.replace(tiny, tokens=9, bits_per_token=0.0)
    assert choose(candidates(few, fixed), few, 60, {}).model.context_length == 8
    with pytest.raises(UserError, match="9 tokens are too few"):
        candidates(few, {})


def test_no_time_at_all_still_gives_a_plan():
    for seconds in (0.0, 1e-6):
        choice = choose_measured(BOOK, seconds, at_speed(1e10))
        assert math.isfinite(choice.loss)
