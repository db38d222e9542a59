"""A pass that is held and computed again, and where each of its numbers comes from."""

from __future__ import annotations

import itertools
import math
import random
from typing import Any

import pytest
import torch
from tests.conftest import tiny_config, tiny_model
from tests.unit.test_trace import FAMILIES, some_tokens

from glassgpt.errors import UserError
from glassgpt.interpret.explain import explain
from glassgpt.interpret.lens import attribution, logit_lens, without
from glassgpt.interpret.trace import record
from glassgpt.model import GPT
from glassgpt.studio.held_trace import SIDE, HeldTrace


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> GPT:
    fields: dict[str, Any] = FAMILIES[request.param]
    return tiny_model(tiny_config(**fields))


def whole(held: HeldTrace, name: str) -> torch.Tensor:
    """All heads of an activation."""
    if len(shape := held.shape(name)) < 3:
        return held.read(name)
    return torch.stack([held.read(name, head) for head in range(shape[0])])


def test_what_is_held_or_computed_again_is_what_a_trace_has(model: GPT) -> None:
    for parts in ([], ["0.h1", "1.mlp"] if model.config.n_layer else []):
        edits, tokens = without(parts, model.config, "mean"), some_tokens(model.config, batch=1)
        trace, held = record(model, tokens, edits=edits, loss=True), HeldTrace(model, tokens, edits)
        names = set(trace.activations) | {f"blocks.{i}.resid_pre" for i in range(2)}
        assert set(held.symbols) == (names if model.config.n_layer else set(trace.activations))
        for name in held.symbols:
            expected = trace.tensor(name)
            expected = expected if name == "position_embedding" else expected[0]
            assert held.shape(name) == list(expected.shape)
            torch.testing.assert_close(whole(held, name), expected, rtol=1e-5, atol=1e-6)


def test_bands_and_maps_of_a_longer_text() -> None:
    model = tiny_model(tiny_config(context_length=150))
    tokens = some_tokens(model.config, batch=1, n=143)
    held, trace = HeldTrace(model, tokens), record(model, tokens)
    torch.testing.assert_close(whole(held, "final"), trace.tensor("final")[0])
    size = -(-143 // SIDE)
    side = held.maps.shape[-1]
    assert held.maps.shape == (2, 6, side, side)
    for layer, head, row, column in itertools.product((0, 1), (0, 5), (0, 7, side - 1), (0, 3, 28)):
        pattern = trace.tensor(f"blocks.{layer}.pattern")[0, head]
        square = pattern[row * size : (row + 1) * size, column * size : (column + 1) * size]
        assert abs(held.maps[layer, head, row, column] - square.max().item() * 255) <= 0.501


def test_every_cell_is_the_sum_of_its_terms(model: GPT) -> None:
    """Of every activation some cells; and each factor is the number that its source holds."""
    tokens = some_tokens(model.config, batch=1)
    held, rng = HeldTrace(model, tokens), random.Random(5)
    for name in held.symbols:
        values = whole(held, name)
        for _ in range(12):
            at = tuple(rng.randrange(n) for n in values.shape)
            origin = explain(model, tokens[0].tolist(), held.read, name, at)
            assert origin.value == pytest.approx(values[at].item(), abs=1e-6)
            if origin.how == "mask":
                assert origin.value == origin.sum.total == -math.inf
                continue
            assert abs(origin.difference) < 1e-4 * max(1, abs(origin.value)), (name, at, origin)
            shares = [abs(term.value) for term in origin.sum.terms]
            assert 1 <= len(shares) <= 8
            for term in origin.sum.terms + (origin.denominator.terms if origin.denominator else []):
                assert term.value == pytest.approx(math.prod(term.factors), abs=1e-6)
                for factor, source in zip(term.factors, term.sources, strict=True):
                    if source is None or origin.denominator or "silu" in term.label:
                        continue
                    assert source[0] in held.symbols
                    there = abs(whole(held, source[0])[source[1]].item())
                    assert abs(factor) == pytest.approx(there, abs=1e-6), (name, term)


def test_a_long_sum_shows_the_largest_terms_and_counts_the_rest() -> None:
    model = tiny_model(tiny_config("gpt2", n_embd=30))
    tokens = some_tokens(model.config, batch=1)
    held = HeldTrace(model, tokens)
    origin = explain(model, tokens[0].tolist(), held.read, "blocks.1.qkv", (3, 7))
    attn = model.blocks[1].attn
    products = [*(held.read("blocks.1.attn_in")[3] * attn.qkv.weight[7]).tolist(),
                attn.qkv.bias[7].item()]  # fmt: skip
    products.sort(key=abs, reverse=True)
    assert [term.value for term in origin.sum.terms] == pytest.approx(products[:8])
    assert (origin.sum.rest_count, origin.sum.rest) == (23, pytest.approx(sum(products[8:])))


def test_a_cell_that_was_edited_says_so() -> None:
    model = tiny_model(tiny_config())
    tokens = some_tokens(model.config, batch=1)
    held = HeldTrace(model, tokens, without(["0.h1"], model.config))

    def how(name: str, *at: int) -> str:
        return explain(model, tokens[0].tolist(), held.read, name, at, held.edits).how

    assert how("blocks.0.head_out", 1, 3, 2) == "edited"
    assert how("blocks.0.head_out", 0, 3, 2) == "sum"
    assert how("blocks.0.attn_out", 3, 2) == "sum"


def test_the_lens_and_attribution_read_a_held_trace(model: GPT) -> None:
    parts = ["0.attn", "1.h2", "1.mlp"] if model.config.n_layer else []
    edits, tokens = without(parts, model.config, "mean"), some_tokens(model.config, batch=1)
    held = HeldTrace(model, tokens, edits)
    logits = record(model, tokens, edits=edits).tensor("logits")[0]
    *_, (_, last) = logit_lens(model, held)
    torch.testing.assert_close(last[0], logits)
    for position in (2, -1):
        total = sum(value for _, value in attribution(model, held, 5, position=position))
        assert total == pytest.approx(logits[position, 5].item(), abs=1e-4)


@pytest.mark.parametrize(("name", "index", "says"), [
    ("blocks.2.q", (0, 0, 0), "no activation 'blocks.2.q'"),
    ("blocks.1.q", (0, 0), "no cell"),
    ("blocks.1.q", (6, 0, 0), "no cell"),
    ("final", (0, -1), "no cell"),
])  # fmt: skip
def test_cells_that_are_not_there(name: str, index: tuple[int, ...], says: str) -> None:
    model = tiny_model(tiny_config())
    held = HeldTrace(model, some_tokens(model.config, batch=1))
    with pytest.raises(UserError, match=says):
        held.check_cell(name, index)
