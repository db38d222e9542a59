"""Filters by their properties, the sampler, stop rules, streaming, and the sliding window."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from conftest import tiny_config, tiny_model, weights_of
from glassgpt import generate
from glassgpt.api import LoadedModel
from glassgpt.checkpoint import Checkpoint
from glassgpt.config import ModelConfig, Sampling
from glassgpt.engine.reference import ReferenceEngine
from glassgpt.errors import UserError
from glassgpt.generate import (
    Piece,
    complete,
    draw,
    filter_logits,
    keep_min_p,
    keep_top_k,
    keep_top_p,
    penalize_repetition,
    probabilities,
    stream,
    window,
)
from glassgpt.model import GPT
from glassgpt.tokenizer import CharTokenizer, Tokenizer, byte_tokenizer, unknown_note

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?\n-:;'"
LOGITS = arrays(np.float64, st.integers(1, 30), elements=st.floats(-30, 30))
both_shapes = pytest.mark.parametrize("shape", ["gpt2", "modern"])


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
    assert draw(filtered, seed=seed, sample=3, position=9) == np.argmax(logits)


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-5, 1e5, 1e300])
def test_extreme_temperatures(temperature: float) -> None:
    logits = np.array([3.0, 7.0, -2.0, 6.5])
    filtered = filter_logits(logits, [], Sampling(temperature=temperature))
    chance = probabilities(filtered)
    assert np.isfinite(chance).all()
    expected = [0, 1, 0, 0] if temperature < 1 else [0.25] * 4
    np.testing.assert_allclose(chance, expected, atol=1e-3)


@pytest.mark.parametrize("broken", [np.nan, np.inf])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_logits_that_are_no_numbers_are_an_error(broken: float, temperature: float) -> None:
    logits = np.array([0.0, broken, 1.0], np.float32)
    with pytest.raises(UserError, match="weights are broken"):
        filter_logits(logits, [], Sampling(temperature=temperature))


# -- the sampler ---------------------------------------------------------------------------------


@pytest.mark.parametrize("vary", ["position", "sample", "seed"])
def test_draws_follow_the_distribution(vary: str) -> None:
    """Whichever coordinate runs, the draws are independent and as likely as they should be."""
    logits = np.log([0.5, 0.02, 0.28, 1e-9, 0.2 - 1e-9])
    n = 4000
    fixed = {"seed": 11, "sample": 5, "position": 3}
    tokens = np.array([draw(logits, **(fixed | {vary: i})) for i in range(n)])
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
    first = draw(logits, seed=1, sample=2, position=3)
    assert draw(logits, seed=1, sample=2, position=3) == first
    others = [
        draw(logits, seed=seed, sample=sample, position=position)
        for seed, sample, position in itertools.product((1, 2, 3), repeat=3)
        if (seed, sample, position) != (1, 2, 3)
    ]
    assert len({first, *others}) == 27


@given(logits=LOGITS, position=st.integers(0, 1000), k=st.integers(1, 30))
def test_what_is_left_out_is_never_drawn(logits, position, k) -> None:
    filtered = keep_top_k(logits, k)
    assert draw(filtered, seed=1, sample=0, position=position) in kept(filtered)


@pytest.mark.parametrize("number", [0.0, 1 - 2**-53])
def test_the_ends_of_the_random_interval(number: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rounding must not lead to a token of chance 0, before the first or after the last."""

    class Rigged:
        def __init__(self, bits: np.random.Philox) -> None: ...

        def random(self) -> float:
            return number

    monkeypatch.setattr(np.random, "Generator", Rigged)
    logits = np.array([-np.inf, -np.inf, *np.linspace(0, 1, 11), -np.inf, -np.inf])
    assert draw(logits, seed=0, sample=0, position=0) == (12 if number else 2)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("seed", [0, 2**53, 2**63, 2**64 - 2, 2**64, 2**200])
def test_every_seed_is_another_one_or_refused(seed: int) -> None:
    try:
        seeds = [Sampling(seed=seed).seed, Sampling(seed=seed + 1).seed]
    except UserError:
        assert seed >= 2**63
        return
    drawn = {draw(np.zeros(100_000), seed=s, sample=0, position=0) for s in seeds}
    assert len(drawn) == 2


# -- engines for tests ---------------------------------------------------------------------------


class Script:
    """An engine whose likeliest next tokens are written down beforehand."""

    def __init__(self, tokens: Sequence[int], vocab_size: int, context_length: int = 1000) -> None:
        self.tokens, self.vocab_size, self.given = list(tokens), vocab_size, 0
        self.config = tiny_config(vocab_size=vocab_size, context_length=context_length)

    def start(self, tokens: np.ndarray) -> np.ndarray:
        return self._next(len(tokens))

    def step(self, tokens: np.ndarray) -> np.ndarray:
        return self._next(len(tokens))

    def _next(self, batch: int) -> np.ndarray:
        logits = np.zeros((batch, self.vocab_size), np.float32)
        logits[:, self.tokens[self.given]] = 50.0
        self.given += 1
        return logits


def written(text: str, tokenizer: Tokenizer, **options: Any) -> list[Piece]:
    """The pieces that come when the model wants to write `text`."""
    tokens = tokenizer.encode(text, special=True)
    how = Sampling(**{"temperature": 0, "max_new_tokens": len(tokens), **options})
    return list(stream(Script(tokens, tokenizer.vocab_size), tokenizer, [0], how))


def text_of(pieces: list[Piece], sample: int = 0) -> str:
    return "".join(piece.text for piece in pieces if piece.sample == sample)


class Uncached:
    """An engine that keeps the tokens and computes everything anew for each."""

    def __init__(self, model: GPT) -> None:
        self.model, self.config = model, model.config

    def start(self, tokens: np.ndarray) -> np.ndarray:
        self.tokens = tokens
        with torch.inference_mode():
            return self.model(torch.from_numpy(self.tokens))[:, -1].numpy()

    def step(self, tokens: np.ndarray) -> np.ndarray:
        return self.start(np.concatenate([self.tokens, tokens[:, None]], axis=1))


class OneByOne:
    """An engine that computes every row of the batch by itself."""

    def __init__(self, model: GPT) -> None:
        self.model, self.config = model, model.config

    def start(self, tokens: np.ndarray) -> np.ndarray:
        self.engines = [ReferenceEngine(self.model) for _ in tokens]
        rows = zip(self.engines, tokens, strict=True)
        return np.concatenate([engine.start(row[None]) for engine, row in rows])

    def step(self, tokens: np.ndarray) -> np.ndarray:
        rows = zip(self.engines, tokens, strict=True)
        return np.concatenate([engine.step(row[None]) for engine, row in rows])


def char_tokenizer() -> CharTokenizer:
    return CharTokenizer.from_characters(LETTERS)  # 36 and <unk>: as large as tiny_config's


def tokens_of(engine, prompt: list[int], n: int, **options: Any) -> list[int]:
    """The ids drawn, read from the text (one character each)."""
    tokenizer = CharTokenizer.from_characters([chr(0x4E00 + i) for i in range(36)])
    [piece] = complete(engine, tokenizer, prompt, Sampling(max_new_tokens=n, **options))
    return tokenizer.encode(piece.text.replace("<unk>", "?"))


# -- length, stops, ends -------------------------------------------------------------------------


def test_greedy_takes_the_likeliest() -> None:
    pieces = written("hello there", char_tokenizer())
    assert text_of(pieces) == "hello there"
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length"


def test_no_new_tokens_is_no_text() -> None:
    tokenizer = char_tokenizer()
    script = Script([], tokenizer.vocab_size)
    how = Sampling(max_new_tokens=0, num_samples=3)
    assert list(stream(script, tokenizer, [1], how)) == [Piece(i, "", "length") for i in range(3)]
    assert script.given == 0  # the model was not even asked


def test_no_more_is_computed_than_is_needed() -> None:
    tokenizer = char_tokenizer()
    script = Script(tokenizer.encode("abcdef"), tokenizer.vocab_size)
    complete(script, tokenizer, [1], Sampling(max_new_tokens=4, temperature=0))
    assert script.given == 4


@pytest.mark.parametrize("stop", ["nd", "end", "e", "the end", " the e"])
def test_stop_strings_end_the_text_before_them(stop: str) -> None:
    text = "here comes the end of it"
    pieces = written(text, char_tokenizer(), stop=(stop,))
    assert text_of(pieces) == text[: text.index(stop)]
    assert pieces[-1].finish_reason == "stop"
    assert sum(piece.finish_reason is not None for piece in pieces) == 1


def test_the_stop_string_that_comes_first_counts() -> None:
    assert text_of(written("one two three", char_tokenizer(), stop=("three", "wo"))) == "one t"
    # Both end with the same character: the one that begins earlier wins.
    for stop in (("bc", "abc"), ("abc", "bc")):
        assert text_of(written("xxabcxx", char_tokenizer(), stop=stop)) == "xx"


@given(
    text=st.text("ab é😀", max_size=30),
    stops=st.lists(st.text("ab é😀", min_size=1, max_size=5), max_size=3),
)
def test_no_streamed_prefix_holds_a_stop_or_its_beginning(text: str, stops: list[str]) -> None:
    """Over bytes, so that a stop string spans several tokens and characters come in parts."""
    pieces = written(text + "z", byte_tokenizer(), stop=tuple(stops))
    whole = text + "z"
    # The stop string that is complete first ends the text; of several, the longest one.
    ends = [whole.index(stop) + len(stop) for stop in stops if stop in whole]
    seen = whole[: min(ends, default=len(whole))]
    places = [seen.index(stop) for stop in stops if stop in seen]
    expected = whole[: min(places)] if places else whole
    assert text_of(pieces) == expected
    assert pieces[-1].finish_reason == ("stop" if places else "length")
    shown = ""
    for piece in pieces:
        shown += piece.text
        assert expected.startswith(shown)  # nothing is ever taken back
        assert "\ufffd" not in piece.text


def test_text_is_shown_as_soon_as_no_stop_can_begin_in_it() -> None:
    pieces = [piece.text for piece in written("abcabd", char_tokenizer(), stop=("abd",))]
    assert pieces == ["abc", ""]  # "ab" waits for what follows
    pieces = [piece.text for piece in written("abxy", char_tokenizer(), stop=("abd",))]
    assert pieces == ["abx", "y", ""]


def test_what_was_held_back_comes_at_the_end() -> None:
    assert text_of(written("all of it sto", char_tokenizer(), stop=("stop",))) == "all of it sto"


def test_end_of_text_ends_and_is_not_shown() -> None:
    pieces = written("done<|endoftext|>more", byte_tokenizer(), stop=("nex",))
    assert text_of(pieces) == "done"
    assert pieces[-1].finish_reason == "end_of_text"


def test_half_a_character_at_the_end_is_shown_as_such() -> None:
    pieces = written("aé", byte_tokenizer(), max_new_tokens=2)
    assert text_of(pieces) == "a\ufffd"


def test_tokens_beyond_the_tokenizer_are_not_drawn() -> None:
    """Published models pad their vocabulary (Qwen3 by 267 ids that mean nothing)."""
    tokenizer = char_tokenizer()
    script = Script([tokenizer.vocab_size + 2, 3, 3], tokenizer.vocab_size + 5)
    [piece] = complete(script, tokenizer, [1], Sampling(max_new_tokens=3, temperature=0))
    assert len(piece.text) in (2, 3)


# -- prompts -------------------------------------------------------------------------------------


@both_shapes
def test_an_empty_prompt_starts_from_the_separator(shape: str) -> None:
    model = tiny_model(tiny_config(shape))
    newline = char_tokenizer().encode("\n")
    how = Sampling(max_new_tokens=20)
    empty = complete(ReferenceEngine(model), char_tokenizer(), [], how)
    assert empty == complete(ReferenceEngine(model), char_tokenizer(), newline, how)
    large = tiny_model(tiny_config(shape, vocab_size=257))
    empty = complete(ReferenceEngine(large), byte_tokenizer(), [], how)
    assert empty == complete(ReferenceEngine(large), byte_tokenizer(), [256], how)


@both_shapes
def test_of_a_long_prompt_the_last_context_counts(shape: str) -> None:
    model = tiny_model(tiny_config(shape))
    prompt = np.random.default_rng(0).integers(37, size=50).tolist()
    how = Sampling(max_new_tokens=25)
    long = complete(ReferenceEngine(model), char_tokenizer(), prompt, how)
    assert long == complete(ReferenceEngine(model), char_tokenizer(), prompt[-13:], how)
    assert long != complete(ReferenceEngine(model), char_tokenizer(), prompt[:13], how)
    assert len(prompt) == 50  # the caller's list is not touched


def test_the_repetition_penalty_sees_prompt_and_completion() -> None:
    """Strong enough, no token comes twice until all have been there."""
    model = tiny_model(tiny_config("modern"))
    prompt = [3, 4, 5]
    ids = tokens_of(ReferenceEngine(model), prompt, 30, temperature=0, repetition_penalty=1e9)
    positive = model(torch.tensor([prompt]))[0, -1] > 0
    assert positive.any()
    assert not set(ids[:1]) & set(prompt)
    free = tokens_of(ReferenceEngine(model), prompt, 30, temperature=0)
    assert len(set(ids)) > len(set(free))


# -- many samples, equal engines -----------------------------------------------------------------


@both_shapes
def test_the_same_seed_gives_the_same_text(shape: str) -> None:
    engine = ReferenceEngine(tiny_model(tiny_config(shape)))
    texts = [complete(engine, char_tokenizer(), [1, 2], Sampling(max_new_tokens=40, seed=seed))
             for seed in (5, 6, 5)]  # fmt: skip
    assert texts[0] == texts[2]
    assert texts[0] != texts[1]


@both_shapes
def test_a_row_of_a_batch_is_what_it_would_be_alone(shape: str) -> None:
    model, tokenizer = tiny_model(tiny_config(shape)), char_tokenizer()
    # One row stops early, so that finished rows run beside unfinished ones.
    how = Sampling(max_new_tokens=40, num_samples=4, seed=7, top_k=20, stop=("s",))
    together = complete(ReferenceEngine(model), tokenizer, [1, 2], how)
    assert together == complete(OneByOne(model), tokenizer, [1, 2], how)
    assert len({piece.text for piece in together}) >= 3
    assert {piece.finish_reason for piece in together} == {"stop", "length"}
    for n in (1, 3):  # and fewer samples are the first ones
        fewer = Sampling(max_new_tokens=40, num_samples=n, seed=7, top_k=20, stop=("s",))
        assert complete(ReferenceEngine(model), tokenizer, [1, 2], fewer) == together[:n]


def test_complete_is_what_was_streamed() -> None:
    engine, how = ReferenceEngine(tiny_model(tiny_config())), Sampling(num_samples=3, stop=("a",))
    pieces = list(stream(engine, char_tokenizer(), [1], how))
    whole = complete(engine, char_tokenizer(), [1], how)
    assert [text_of(pieces, i) for i in range(3)] == [piece.text for piece in whole]
    ends = [piece for piece in pieces if piece.finish_reason]
    assert sorted(piece.sample for piece in ends) == [0, 1, 2]


# -- the sliding window --------------------------------------------------------------------------


def by_the_rule(model: GPT, prompt: list[int], n: int) -> list[int]:
    """Greedy ids, with what the model sees at each step written out: the context fills up,
    then only the newest half of it is kept, and it fills up again."""
    limit = model.config.context_length
    visible, ids = prompt[-limit:], []
    for _ in range(n):
        if len(visible) > limit:
            visible = visible[-max(1, limit // 2) :]
        with torch.inference_mode():
            ids.append(int(model(torch.tensor([visible]))[0, -1].argmax()))
        visible = [*visible, ids[-1]]
    return ids


@both_shapes
@pytest.mark.parametrize("context_length", [1, 2, 3, 12, 13])
@pytest.mark.parametrize("prompt_length", [1, 5, 13, 40])
def test_sliding_with_a_cache_is_sliding_without(
    shape: str, context_length: int, prompt_length: int
) -> None:
    model = tiny_model(tiny_config(shape, context_length=context_length), seed=7)
    prompt = np.random.default_rng(1).integers(36, size=prompt_length).tolist()
    n = max(12, 3 * context_length)
    cached = tokens_of(ReferenceEngine(model), prompt, n, temperature=0)
    assert cached == tokens_of(Uncached(model), prompt, n, temperature=0)
    assert cached == by_the_rule(model, prompt, n)
    assert len(cached) == n


def test_the_window_is_half_a_context() -> None:
    tokens = np.arange(26).reshape(2, 13)
    assert window(tokens, 13).tolist() == [list(range(7, 13)), list(range(20, 26))]
    assert window(tokens, 1).shape == (2, 1)


def test_sampling_leaves_the_model_as_it_was() -> None:
    model = tiny_model(tiny_config("modern", dropout=0.5)).train()
    first = tokens_of(ReferenceEngine(model), [1], 20, seed=2)
    assert model.training
    assert first == tokens_of(ReferenceEngine(model.eval()), [1], 20, seed=2)
    assert not model.training


# -- the same by way of glassgpt.load(...).generate ----------------------------------------------


def loaded(config: ModelConfig, tokenizer: Tokenizer | None = None) -> LoadedModel:
    weights = weights_of(tiny_model(config))
    checkpoint = Checkpoint(config, weights, tokenizer or char_tokenizer())
    return LoadedModel(checkpoint, device="cpu")


def test_generate_takes_text_or_ids() -> None:
    model = loaded(tiny_config())
    piece = model.generate("hello", max_new_tokens=15, seed=4)
    assert piece == model.generate(model.tokenizer.encode("hello"), max_new_tokens=15, seed=4)
    streamed = model.generate("hello", max_new_tokens=15, seed=4, stream=True)
    assert text_of(list(streamed)) == piece.text
    several = model.generate("hello", max_new_tokens=15, seed=4, num_samples=2)
    assert several[0] == piece


def test_a_prompt_may_hold_the_end_of_text() -> None:
    model = loaded(tiny_config(vocab_size=257), byte_tokenizer())
    piece = model.generate("a<|endoftext|>b", max_new_tokens=9)
    assert piece == model.generate([97, 256, 98], max_new_tokens=9)


def test_generate_refuses_what_it_can_not_do() -> None:
    model = loaded(tiny_config())
    with pytest.raises(UserError, match="'temperatur'.*Did you mean 'temperature'"):
        model.generate("x", temperatur=0.5)
    for ids in ([37], [-1], [3, 99]):
        with pytest.raises(UserError, match="outside the vocabulary of 37"):
            model.generate(ids)
    note = unknown_note(model.tokenizer, "größe")
    assert "'ö' 'ß'" in note
    assert unknown_note(model.tokenizer, "good") is None


def test_a_model_of_nan_says_so() -> None:
    config = tiny_config()
    weights = weights_of(tiny_model(config))
    weights["final_norm.weight"][3] = np.nan
    model = LoadedModel(Checkpoint(config, weights, char_tokenizer()), device="cpu")
    with pytest.raises(UserError, match="NaN"):
        model.generate("hello", max_new_tokens=3)


def test_the_smallest_temperature_is_greedy() -> None:
    logits = np.array([1.0, 3.0, 2.0])
    for temperature in (5e-324, 1e-320, 1e-300):
        assert draw(filter_logits(logits, [], Sampling(temperature=temperature)),
                    seed=1, sample=0, position=0) == 1  # fmt: skip


def test_a_prompt_of_padded_ids_is_no_crash() -> None:
    """A vocabulary padded to a round number has ids that the tokenizer never makes."""
    model = loaded(tiny_config(vocab_size=40), CharTokenizer.from_characters("abc"))
    assert model.generate([39, 1], max_new_tokens=3, repetition_penalty=1.2).text  # type: ignore


@pytest.mark.parametrize("prompt", [None, 3, ["a"], [0.5]])
def test_prompts_of_other_types_are_refused(prompt: Any) -> None:
    with pytest.raises(UserError, match="text or a list of token ids"):
        loaded(tiny_config()).generate(prompt)


def test_many_samples_come_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory can't hold side by side comes one after the other, and is the same text."""
    model = loaded(tiny_config(vocab_size=28), CharTokenizer.from_characters(LETTERS[:27]))
    together = model.generate("abc", num_samples=7, max_new_tokens=5)
    per_row = 2 * 2 * 3 * 4 * 13  # keys and values x layers x heads x head_dim x context
    monkeypatch.setattr(generate, "_CACHE_NUMBERS", 2 * per_row)
    assert model.generate("abc", num_samples=7, max_new_tokens=5) == together
    with pytest.raises(UserError, match="num_samples"):
        Sampling(num_samples=10**9)
