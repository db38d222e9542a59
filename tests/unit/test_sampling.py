"""The filters by their properties, and the sampler."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from glassgpt.config import Sampling
from glassgpt.errors import UserError
from glassgpt.inference.generate import (
    draw_token,
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    probabilities,
)

LOGITS = arrays(np.float64, st.integers(1, 30), elements=st.floats(-30, 30))


def kept(filtered: np.ndarray) -> set[int]:
    return set(np.flatnonzero(np.isfinite(filtered)).tolist())


def unchanged(filtered: np.ndarray, logits: np.ndarray) -> bool:
    """What is kept keeps its logit."""
    ids = sorted(kept(filtered))
    return np.array_equal(filtered[ids], logits[ids])


# -- filters -------------------------------------------------------------------------------------


@given(logits=LOGITS, k=st.integers(1, 40))
def test_top_k_keeps_exactly_the_k_largest(logits: np.ndarray, k: int) -> None:
    filtered = keep_top_k(logits, k)
    ids = kept(filtered)
    assert len(ids) == min(k, len(logits))
    assert unchanged(filtered, logits)
    left_out = set(range(len(logits))) - ids
    if left_out:
        lowest = min(logits[i] for i in ids)
        assert all(logits[i] <= lowest for i in left_out)
        ties = [i for i in range(len(logits)) if logits[i] == lowest]
        assert [i for i in ties if i in ids] == ties[: len(ids.intersection(ties))]  # lowest ids


@given(logits=LOGITS, p=st.floats(0.01, 1.0))
def test_top_p_keeps_the_smallest_set_that_reaches_p(logits: np.ndarray, p: float) -> None:
    filtered = keep_top_p(logits, p)
    ids = kept(filtered)
    assert unchanged(filtered, logits)
    chance = probabilities(logits)
    assert chance[list(ids)].sum() >= p - 1e-9
    descending = np.sort(chance)[::-1]
    assert descending[: len(ids) - 1].sum() < p + 1e-9  # one fewer would not do
    assert chance[list(ids)].sum() == pytest.approx(descending[: len(ids)].sum())


@given(logits=LOGITS, p=st.floats(0.001, 1.0))
def test_min_p_keeps_what_is_likely_enough(logits: np.ndarray, p: float) -> None:
    filtered = keep_min_p(logits, p)
    chance = probabilities(logits)
    assert unchanged(filtered, logits)
    for i in range(len(logits)):
        share = chance[i] / chance.max()
        if abs(share - p) > 1e-9:
            assert (i in kept(filtered)) == (share > p)
    assert int(np.argmax(logits)) in kept(filtered)


@given(logits=LOGITS, penalty=st.floats(1.01, 5), data=st.data())
def test_repetition_penalty_lowers_what_was_seen(logits, penalty, data) -> None:
    seen = data.draw(st.lists(st.integers(0, len(logits) - 1)))
    before = logits.copy()
    lowered = penalize_repetition(logits, np.array(seen, dtype=int), penalty)
    assert np.array_equal(logits, before)  # the caller's stay as they are
    for i in range(len(logits)):
        if i not in seen or logits[i] == 0:
            assert lowered[i] == logits[i]
        else:
            assert lowered[i] < logits[i] or abs(logits[i]) < 1e-300
            assert lowered[i] * logits[i] >= 0  # never beyond zero
    twice = penalize_repetition(logits, np.array(seen * 2, dtype=int), penalty)
    assert np.array_equal(twice, lowered)  # once, however often it was there


@given(logits=LOGITS)
def test_probabilities_are_the_softmax(logits: np.ndarray) -> None:
    expected = torch.softmax(torch.from_numpy(logits), dim=0).numpy()
    np.testing.assert_allclose(probabilities(logits), expected, rtol=0, atol=1e-12)
    np.testing.assert_allclose(probabilities(logits + 1e5), expected, rtol=0, atol=1e-9)


def test_filters_apply_in_the_order_of_the_fields() -> None:
    logits = np.array([1.0, 3.0, 2.5, 2.0, -1.0, 2.4], np.float32)
    how = Sampling(repetition_penalty=2.0, temperature=0.5, top_k=4, top_p=0.9, min_p=0.2)
    by_hand = penalize_repetition(logits.astype(np.float64), np.array([1]), 2.0) / 0.5
    for function, value in ((keep_top_k, 4), (keep_top_p, 0.9), (keep_min_p, 0.2)):
        by_hand = function(by_hand, value)
    assert np.array_equal(filter_logits(logits, [1], how), by_hand)
    # Temperature before top-p: a hot one needs more tokens to reach p, a cold one fewer.
    sizes = [len(kept(filter_logits(logits, [], Sampling(temperature=t, top_p=0.8))))
             for t in (0.1, 1.0, 10.0)]  # fmt: skip
    assert sizes == sorted(set(sizes))
    # Top-k before top-p: the share is of what top-k has left.
    even = np.zeros(10)
    assert len(kept(filter_logits(even, [], Sampling(top_k=4, top_p=0.5)))) == 2


@given(logits=LOGITS, seen=st.lists(st.integers(0, 29)))
def test_without_options_nothing_changes(logits: np.ndarray, seen: list[int]) -> None:
    assert np.array_equal(filter_logits(logits, seen, Sampling()), logits)
    every = Sampling(top_k=10**6, repetition_penalty=1.0, min_p=1e-300)
    seen = [i for i in seen if i < len(logits)]
    np.testing.assert_allclose(filter_logits(logits, seen, every), logits)
    everything = probabilities(filter_logits(logits, [], Sampling(top_p=1.0)))
    np.testing.assert_allclose(everything, probabilities(logits), rtol=0, atol=1e-12)


@given(logits=LOGITS, seed=st.integers(0, 2**32))
def test_temperature_zero_is_greedy(logits: np.ndarray, seed: int) -> None:
    filtered = filter_logits(logits, [], Sampling(temperature=0, top_p=0.5))
    assert kept(filtered) == {int(np.argmax(logits))}
    assert draw_token(filtered, seed=seed, sample=3, position=9) == np.argmax(logits)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-5, 1e5, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    logits = np.array([3.0, 7.0, -2.0, 6.5])
    filtered = filter_logits(logits, [], Sampling(temperature=temperature))
    chance = probabilities(filtered)
    assert np.isfinite(chance).all()
    expected = [0, 1, 0, 0] if temperature < 1 else [0.25] * 4
    np.testing.assert_allclose(chance, expected, atol=1e-3)


@pytest.mark.parametrize(("broken", "what"), [(np.nan, "NaN"), (np.inf, "infinite")])
@pytest.mark.parametrize(
    "options", [{"temperature": 0.0}, {}, {"repetition_penalty": 1.1}], ids=str
)
def test_logits_that_are_no_numbers_are_an_error(broken: float, what: str, options: dict) -> None:
    for logits in ([0.0, broken, 1.0], [broken] * 3):
        with pytest.raises(UserError, match=f"are {what}: its weights are broken"):
            filter_logits(np.array(logits, np.float32), [2], Sampling(**options))
    excluded = np.array([-np.inf, 2.0, -np.inf], np.float32)  # a model may rule tokens out
    assert kept(filter_logits(excluded, [2], Sampling(**options))) == {1}


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("spread", [0.0, 0.02, 1.0, 40.0, 3000.0])
@pytest.mark.parametrize("rounded", [True, False])
def test_filters_and_draw_are_what_sorting_everything_gives(spread: float, rounded: bool) -> None:
    """With ties, with tokens ruled out, and of a size at which sorting all would be slow."""
    rng = np.random.default_rng(5)
    for V in (1, 2, 40, 3000):
        logits = rng.standard_normal(V) * spread
        logits = logits.round(2) if rounded else logits
        logits[rng.permutation(V)[: V // 3]] = -np.inf
        before = logits.copy()
        order = np.argsort(-logits, kind="stable")
        reached = np.cumsum(probabilities(logits)[order])
        for k in (1, 2, V // 2, V - 1, V):
            assert kept(keep_top_k(logits, max(k, 1))) == set(order[: max(k, 1)]) & kept(logits)
        for p in (1e-9, 0.1, 0.5, 0.9, 0.9999, 1.0):
            n = int(np.searchsorted(reached, p)) + 1 if p < 1 else V
            filtered = keep_top_p(logits, p)
            assert kept(filtered) == set(order[:n]) & kept(logits)
            number = np.random.Generator(np.random.Philox(key=[3, 4], counter=V)).random()
            cumulative = np.cumsum(probabilities(filtered))
            expected = np.searchsorted(cumulative, number * cumulative[-1], side="right")
            assert draw_token(filtered, seed=3, sample=4, position=V) == expected
        assert np.array_equal(logits, before)


# -- the sampler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("vary", ["position", "sample", "seed"])
def test_draws_follow_the_distribution(vary: str) -> None:
    """Whichever coordinate runs, the draws are independent and as likely as they should be."""
    logits = np.log([0.5, 0.02, 0.28, 1e-9, 0.2 - 1e-9])
    n = 4000
    fixed = {"seed": 11, "sample": 5, "position": 3}
    tokens = np.array([draw_token(logits, **(fixed | {vary: i})) for i in range(n)])
    chance = probabilities(logits)
    counts = np.bincount(tokens, minlength=5)
    assert counts[3] == 0
    expected = chance[[0, 1, 2, 4]] * n
    chi_square = (((counts[[0, 1, 2, 4]] - expected) ** 2) / expected).sum()
    assert chi_square < 16.3  # 3 degrees of freedom: exceeded once in a thousand
    # Neighbours know nothing of each other: as often equal as independent draws are.
    equal = (tokens[1:] == tokens[:-1]).mean()
    assert equal == pytest.approx((chance**2).sum(), abs=0.035)


def test_a_draw_is_a_function_of_its_coordinates() -> None:
    logits = np.zeros(10_000)
    first = draw_token(logits, seed=1, sample=2, position=3)
    assert draw_token(logits, seed=1, sample=2, position=3) == first
    others = [
        draw_token(logits, seed=seed, sample=sample, position=position)
        for seed, sample, position in itertools.product((1, 2, 3), repeat=3)
        if (seed, sample, position) != (1, 2, 3)
    ]
    assert len({first, *others}) == 27


@given(logits=LOGITS, position=st.integers(0, 1000), k=st.integers(1, 30))
def test_what_is_left_out_is_never_drawn(logits, position, k) -> None:
    filtered = keep_top_k(logits, k)
    assert draw_token(filtered, seed=1, sample=0, position=position) in kept(filtered)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_random_interval(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding must not lead to a token of chance 0, before the first or after the last."""

    class Rigged:
        def __init__(self, bits: np.random.Philox) -> None: ...

        def random(self) -> float:
            return number

    monkeypatch.setattr(np.random, "Generator", Rigged)
    logits = np.array([-np.inf, -np.inf, *np.linspace(0, 1, 11), -np.inf, -np.inf])
    assert draw_token(logits, seed=0, sample=0, position=0) == (12 if number else 2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", [0, 2**53, 2**63, 2**64 - 2, 2**64, 2**200])
def test_every_seed_is_another_one_or_refused(seed: int) -> None:
    try:
        seeds = [Sampling(seed=seed).seed, Sampling(seed=seed + 1).seed]
    except UserError:
        assert seed >= 2**63
        return
    drawn = {draw_token(np.zeros(100_000), seed=s, sample=0, position=0) for s in seeds}
    assert len(drawn) == 2


def test_the_smallest_temperature_is_greedy() -> None:
    logits = np.array([1.0, 3.0, 2.0])
    for temperature in (5e-324, 1e-320, 1e-300):
        assert draw_token(filter_logits(logits, [], Sampling(temperature=temperature)),
                    seed=1, sample=0, position=0) == 1  # fmt: skip
