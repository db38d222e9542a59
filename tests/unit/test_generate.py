"""Completions: stop rules, streaming, batches of prompts and samples, the sliding window."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from conftest import tiny_config, tiny_model, weights_of
from glassgpt.api import LoadedModel
from glassgpt.checkpoints.run_directory import Checkpoint
from glassgpt.config import ModelConfig, Sampling
from glassgpt.errors import UserError
from glassgpt.inference import generate
from glassgpt.inference.engines.reference import ReferenceEngine
from glassgpt.inference.generate import Piece, complete, context_start, stream
from glassgpt.model import GPT
from glassgpt.tokenizers.tokenizer import CharTokenizer, Tokenizer, byte_tokenizer, unknown_note

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?\n-:;'"
both_shapes = pytest.mark.parametrize("shape", ["gpt2", "modern"])


# -- engines for tests ---------------------------------------------------------------------------


class Rows:
    """An engine that keeps each row's tokens, and notes who read how much at once."""

    def __init__(self, config: ModelConfig) -> None:
        self.config = config
        self.reads: list[dict[int, int]] = []  # of each call: row -> number of tokens
        self.copies: list[tuple[int, list[int]]] = []

    def open(self, n_rows: int) -> None:
        self.rows: list[list[int]] = [[] for _ in range(n_rows)]

    def read(self, rows: Sequence[int], tokens: Sequence[np.ndarray]) -> np.ndarray:
        self.reads.append({row: len(new) for row, new in zip(rows, tokens, strict=True)})
        assert len(self.reads[-1]) == len(rows)  # none is listed twice
        for row, new in zip(rows, tokens, strict=True):
            self.rows[row] = [*self.rows[row], *new.tolist()]
            assert 1 <= len(self.rows[row]) <= self.config.context_length
        return np.stack([self.logits_after(self.rows[row]) for row in rows])

    def rewind(self, row: int, length: int = 0) -> None:
        self.rows[row] = self.rows[row][:length]

    def copy(self, source: int, targets: Sequence[int]) -> None:
        self.copies.append((source, list(targets)))
        for target in targets:
            self.rows[target] = self.rows[source]


class Script(Rows):
    """Writes down beforehand what is likeliest: prompt [i] continues with the i-th script."""

    def __init__(self, *scripts: Sequence[int], vocab_size: int) -> None:
        super().__init__(tiny_config(vocab_size=vocab_size, context_length=1000))
        self.scripts = scripts

    def logits_after(self, tokens: list[int]) -> np.ndarray:
        logits = np.zeros(self.config.vocab_size, np.float32)
        token = self.scripts[tokens[0]][len(tokens) - 1]
        logits[token] = 50.0 if token != BROKEN else np.nan
        return logits


BROKEN = -1  # in a script: here the model's logits hold a NaN


class Uncached(Rows):
    """Computes everything anew for each token."""

    def __init__(self, model: GPT) -> None:
        super().__init__(model.config)
        self.model = model

    def logits_after(self, tokens: list[int]) -> np.ndarray:
        with torch.inference_mode():
            return self.model(torch.tensor([tokens]))[0, -1].numpy()


def written(text: str, tokenizer: Tokenizer, **options: Any) -> list[Piece]:
    """The pieces that come when the model wants to write `text`."""
    tokens = tokenizer.encode(text, special=True)
    how = Sampling(**{"temperature": 0, "max_new_tokens": len(tokens), **options})
    return list(stream(Script(tokens, vocab_size=tokenizer.vocab_size), tokenizer, [[0]], how))


def text_of(pieces: list[Piece], sample: int = 0) -> str:
    return "".join(piece.text for piece in pieces if piece.sample == sample)


def char_tokenizer() -> CharTokenizer:
    return CharTokenizer.from_characters(LETTERS)  # 36 and <unk>: as large as tiny_config's


def tokens_of(engine, prompt: list[int], n: int, **options: Any) -> list[int]:
    """The ids drawn, read from the text (one character each)."""
    tokenizer = CharTokenizer.from_characters([chr(0x4E00 + i) for i in range(36)])
    [piece] = complete(engine, tokenizer, [prompt], Sampling(max_new_tokens=n, **options))
    return tokenizer.encode(piece.text.replace("<unk>", "?"))


# -- length, stops, ends -------------------------------------------------------------------------


def test_greedy_takes_the_likeliest() -> None:
    pieces = written("hello there", char_tokenizer())
    assert text_of(pieces) == "hello there"
    assert [piece.finish_reason for piece in pieces[:-1]] == [None] * (len(pieces) - 1)
    assert pieces[-1].finish_reason == "length"


def test_no_new_tokens_is_no_text() -> None:
    tokenizer = char_tokenizer()
    script = Script(vocab_size=tokenizer.vocab_size)
    how = Sampling(max_new_tokens=0, num_samples=3)
    expected = [Piece(i, "", "length", prompt) for prompt in range(2) for i in range(3)]
    assert list(stream(script, tokenizer, [[1], []], how)) == expected
    assert complete(script, tokenizer, [[1], []], how) == expected
    assert script.reads == []  # the model was not even asked


def test_no_more_is_computed_than_is_needed() -> None:
    tokenizer = char_tokenizer()
    script = Script(tokenizer.encode("abcdef"), vocab_size=tokenizer.vocab_size)
    complete(script, tokenizer, [[0]], Sampling(max_new_tokens=4, temperature=0))
    assert script.reads == [{0: 1}] * 4


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
    script = Script([tokenizer.vocab_size + 2, 3, 3], vocab_size=tokenizer.vocab_size + 5)
    [piece] = complete(script, tokenizer, [[0]], Sampling(max_new_tokens=3, temperature=0))
    assert len(piece.text) in (2, 3)


# -- prompts -------------------------------------------------------------------------------------


@both_shapes
def test_an_empty_prompt_starts_from_the_separator(shape: str) -> None:
    for tokenizer, start in ((char_tokenizer(), "\n"), (byte_tokenizer(), "<|endoftext|>")):
        [separator] = tokenizer.encode(start, special=True)
        model = tiny_model(tiny_config(shape, vocab_size=tokenizer.vocab_size))
        engine, how = Uncached(model), Sampling(max_new_tokens=20)
        empty, same, again = complete(engine, tokenizer, [[], [separator], []], how)
        assert empty.text == same.text == again.text
        assert engine.reads[0] == {0: 1}  # once for all of them
        assert complete(engine, tokenizer, [[]], how) == [empty]


@both_shapes
def test_of_a_long_prompt_the_last_context_counts(shape: str) -> None:
    model = tiny_model(tiny_config(shape))
    prompt = np.random.default_rng(0).integers(37, size=50).tolist()
    how = Sampling(max_new_tokens=25)
    prompts = [prompt, prompt[-13:], prompt[:13]]
    long, end, beginning = complete(ReferenceEngine(model), char_tokenizer(), prompts, how)
    assert long.text == end.text != beginning.text
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


def test_the_repetition_penalty_does_not_see_the_separator() -> None:
    """A text may well begin with what an empty prompt starts from; here it is the likeliest."""
    tokenizer = char_tokenizer()
    [newline] = tokenizer.encode("\n")
    script = Script(*[[newline] * 2] * 37, vocab_size=37)
    how = Sampling(max_new_tokens=1, repetition_penalty=1e9)
    empty, given = complete(script, tokenizer, [[], [newline]], how)
    assert empty.text == "\n" != given.text


# -- many samples, many prompts ------------------------------------------------------------------


@both_shapes
def test_the_same_seed_gives_the_same_text(shape: str) -> None:
    engine = ReferenceEngine(tiny_model(tiny_config(shape)))
    texts = [complete(engine, char_tokenizer(), [[1, 2]], Sampling(max_new_tokens=40, seed=seed))
             for seed in (5, 6, 5)]  # fmt: skip
    assert texts[0] == texts[2]
    assert texts[0] != texts[1]


# Rows that slide at different moments, or at once; that are the same; longer than the context.
PROMPTS = [[1, 2], [], list(range(30)), [3] * 13, [1, 2], list(range(12)), [35]]


@pytest.mark.slow
@both_shapes
@pytest.mark.parametrize("context_length", [1, 2, 13])
@pytest.mark.parametrize("engine_of", [ReferenceEngine, Uncached])
def test_a_prompt_of_a_batch_continues_as_it_would_alone(
    shape: str, context_length: int, engine_of: Any
) -> None:
    model = tiny_model(tiny_config(shape, context_length=context_length))
    tokenizer, engine = char_tokenizer(), engine_of(model)
    how = Sampling(max_new_tokens=30, num_samples=3, seed=7, top_k=20)
    some = complete(engine, tokenizer, PROMPTS[:1], how)[1].text[9:12]
    how = replace(how, stop=(some,))  # so that others grow on beside rows that have finished
    together = complete(engine, tokenizer, PROMPTS, how)
    wanted = [(prompt, i) for prompt in range(len(PROMPTS)) for i in range(3)]
    assert [(piece.prompt, piece.sample) for piece in together] == wanted
    for i, prompt in enumerate(PROMPTS):
        alone = complete(ReferenceEngine(model), tokenizer, [prompt], how)
        assert together[3 * i : 3 * i + 3] == [replace(piece, prompt=i) for piece in alone]
    assert together[0].text == together[12].text != together[1].text
    assert {piece.finish_reason for piece in together} == {"stop", "length"}
    fewer = complete(engine, tokenizer, PROMPTS, replace(how, num_samples=1))
    assert fewer == together[::3]  # the first samples of each


def test_a_shared_prompt_is_read_once() -> None:
    engine, prompts = Uncached(tiny_model(tiny_config())), [[4, 5, 6], [7, 8], [4, 5, 6]]
    complete(engine, char_tokenizer(), prompts, Sampling(max_new_tokens=2, num_samples=2))
    assert engine.reads == [{0: 3, 2: 2}, dict.fromkeys(range(6), 1)]
    assert engine.copies == [(0, [1, 4, 5]), (2, [3])]


def test_rows_that_have_finished_are_not_fed() -> None:
    """Here the one in the middle by a stop string, and the last by the end of the text."""
    tokenizer = byte_tokenizer()
    texts = ["abcdefgh", "ab|defgh", "abcd<|endoftext|>fgh"]
    script = Script(*(tokenizer.encode(text, special=True) for text in texts), vocab_size=257)
    how = Sampling(max_new_tokens=6, temperature=0, stop=("|",))
    assert complete(script, tokenizer, [[0], [1], [2]], how) == [
        Piece(0, "abcdef", "length", 0), Piece(0, "ab", "stop", 1),
        Piece(0, "abcd", "end_of_text", 2),
    ]  # fmt: skip
    assert [sorted(read) for read in script.reads] == [[0, 1, 2]] * 3 + [[0, 2]] * 2 + [[0]]


def test_without_prompts_there_is_nothing() -> None:
    assert complete(Script(vocab_size=37), char_tokenizer(), [], Sampling(num_samples=3)) == []


def test_text_comes_before_the_error_that_ends_it() -> None:
    tokenizer = char_tokenizer()
    broken = [*tokenizer.encode("de"), BROKEN]
    script = Script(tokenizer.encode("abc"), broken, vocab_size=tokenizer.vocab_size)
    how, texts = Sampling(max_new_tokens=9, temperature=0), ["", ""]

    def read_all() -> None:
        for piece in stream(script, tokenizer, [[0], [1]], how):
            texts[piece.prompt] += piece.text

    with pytest.raises(UserError, match="^prompt 2, sample 1, token 3: .* NaN: its weights"):
        read_all()
    assert texts == ["abc", "de"]


@pytest.mark.slow
def test_complete_is_what_was_streamed() -> None:
    engine, how = ReferenceEngine(tiny_model(tiny_config())), Sampling(num_samples=3, stop=("a",))
    pieces = list(stream(engine, char_tokenizer(), [[1]], how))
    whole = complete(engine, char_tokenizer(), [[1]], how)
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


@pytest.mark.parametrize("context", [1, 2, 3, 12, 13])
def test_a_text_that_outgrows_the_context_restarts_with_half(context: int) -> None:
    for n_prompt in range(1, 30):
        start, held = max(0, n_prompt - context), min(n_prompt, context)
        assert context_start(n_prompt, n_prompt, context) == start
        for n_tokens in range(n_prompt + 1, 60):  # one more each time
            held = max(1, context // 2) if held == context else held + 1
            assert context_start(n_prompt, n_tokens, context) == n_tokens - held


def test_sampling_leaves_the_model_as_it_was() -> None:
    model = tiny_model(tiny_config("modern", dropout=0.5)).train()
    first = tokens_of(ReferenceEngine(model), [1], 20, seed=2)
    assert model.training
    assert first == tokens_of(ReferenceEngine(model.eval()), [1], 20, seed=2)
    assert not model.training


# -- the same with glassgpt.load(...).generate ---------------------------------------------------


def loaded(config: ModelConfig, tokenizer: Tokenizer | None = None) -> LoadedModel:
    weights = weights_of(tiny_model(config))
    checkpoint = Checkpoint(config, weights, tokenizer or char_tokenizer())
    return LoadedModel(checkpoint, device="cpu")


def test_generate_takes_text_or_ids() -> None:
    model = loaded(tiny_config())
    piece = model.generate("hello", max_new_tokens=15, seed=4)
    assert piece == model.generate(model.tokenizer.encode("hello"), max_new_tokens=15, seed=4)
    streamed = model.stream("hello", max_new_tokens=15, seed=4)
    assert text_of(list(streamed)) == piece.text
    several = model.generate_many(["hello"], n=2, max_new_tokens=15, seed=4)
    assert several[0] == piece


def test_generate_takes_several_prompts() -> None:
    model = loaded(tiny_config())
    hello, a = model.tokenizer.encode("hello"), model.tokenizer.encode("a")
    alone = [model.generate(prompt, max_new_tokens=9) for prompt in ("hello", "", "a")]
    for prompts in (["hello", "", "a"], [hello, [], "a"], (tuple(hello), "", a)):
        pieces = model.generate_many(prompts, max_new_tokens=9)
        assert [piece.text for piece in pieces] == [piece.text for piece in alone]
        assert [piece.prompt for piece in pieces] == [0, 1, 2]
    several = model.generate_many(["hello", ""], n=2, max_new_tokens=9)
    assert [(piece.prompt, piece.sample) for piece in several] == [(0, 0), (0, 1), (1, 0), (1, 1)]
    one = model.generate_many([""], n=2, max_new_tokens=9)
    assert several[2:] == [replace(piece, prompt=1) for piece in one]
    streamed = list(model.stream("hello", "", n=2, max_new_tokens=9))
    assert text_of([piece for piece in streamed if piece.prompt == 1], 1) == several[3].text
    # A list of ids is a prompt, also an empty one; a text is no list of prompts.
    assert model.generate([], max_new_tokens=9) == alone[1]
    assert model.generate_many([[]], max_new_tokens=9) == [alone[1]]
    assert model.generate_many([]) == []
    with pytest.raises(UserError, match="takes a list of prompts"):
        model.generate_many("hello")


def test_a_prompt_may_hold_the_end_of_text() -> None:
    model = loaded(tiny_config(vocab_size=257), byte_tokenizer())
    piece = model.generate("a<|endoftext|>b", max_new_tokens=9)
    assert piece == model.generate([97, 256, 98], max_new_tokens=9)


def test_generate_refuses_what_it_can_not_do() -> None:
    model = loaded(tiny_config())
    with pytest.raises(UserError, match="'temperatur'.*Did you mean 'temperature'"):
        model.generate("x", temperatur=0.5)
    with pytest.raises(UserError, match="num_samples: .*generate_many"):
        model.generate("x", num_samples=2)
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


def test_a_prompt_of_padded_ids_is_no_crash() -> None:
    """A vocabulary padded to a round number has ids that the tokenizer never makes."""
    model = loaded(tiny_config(vocab_size=40), CharTokenizer.from_characters("abc"))
    assert model.generate([39, 1], max_new_tokens=3, repetition_penalty=1.2).text


@pytest.mark.parametrize("prompt", [None, 3, [None], [0.5], [["a"]], ["a", 3], [[1], None]])
def test_prompts_of_other_types_are_refused(prompt: Any) -> None:
    with pytest.raises(UserError, match="text or a list of token ids"):
        loaded(tiny_config()).generate(prompt)


def test_many_samples_come_in_groups(monkeypatch: pytest.MonkeyPatch) -> None:
    """What memory can't hold side by side comes one after the other, and is the same text."""
    model = loaded(tiny_config(vocab_size=28), CharTokenizer.from_characters(LETTERS[:27]))
    together = model.generate_many(["abc"], n=7, max_new_tokens=5)
    per_row = 2 * 2 * 3 * 4 * 13  # keys and values x layers x heads x head_dim x context
    monkeypatch.setattr(generate, "_CACHE_NUMBERS", 2 * per_row)
    assert model.generate_many(["abc"], n=7, max_new_tokens=5) == together
    engine, prompt = Uncached(model.model), model.tokenizer.encode("abc")
    how = Sampling(num_samples=3, max_new_tokens=5)
    pieces = complete(engine, model.tokenizer, [prompt, [7], prompt], how)
    assert pieces[:3] == together[:3]
    assert [piece.text for piece in pieces[6:]] == [piece.text for piece in together[:3]]
    assert [sorted(read) for read in engine.reads[::5]] == [[0], [0, 1], [0], [0], [0]]
    with pytest.raises(UserError, match="num_samples"):
        Sampling(num_samples=10**9)
