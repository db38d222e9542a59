"""Conclusions from activations: they must add up, and do nothing where nothing is changed."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from test_trace import FAMILIES, some_tokens

from conftest import tiny_config, tiny_model
from glassgpt.errors import UserError
from glassgpt.interpret.activations import stream_names
from glassgpt.interpret.lens import (
    attribution,
    combine,
    find_part,
    logit_lens,
    patch_map,
    patched,
    without,
)
from glassgpt.interpret.trace import record
from glassgpt.model import GPT


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> GPT:
    fields: dict[str, Any] = FAMILIES[request.param]
    return tiny_model(tiny_config(**fields))


def test_the_last_row_of_the_lens_is_the_output(model: GPT) -> None:
    trace = record(model, some_tokens(model.config))
    rows = dict(logit_lens(model, trace))
    assert list(rows) == stream_names(model.config)
    assert torch.equal(rows[stream_names(model.config)[-1]], trace.tensor("logits"))


def test_a_row_of_the_lens_is_a_model_that_ends_there() -> None:
    model = tiny_model(tiny_config(n_layer=3))
    tokens = some_tokens(model.config)
    rows = list(logit_lens(model, record(model, tokens), slice(2, 5)))
    skipped = record(model, tokens, edits=without(["1", "2"], model.config))
    torch.testing.assert_close(rows[1][1], skipped.tensor("logits")[:, 2:5])


def test_contributions_add_up_to_the_logit(model: GPT) -> None:
    trace = record(model, some_tokens(model.config))
    logits = trace.tensor("logits")[0]
    for position in (0, 4, -1):
        for token in (0, 5, 36):
            total = sum(value for _, value in attribution(model, trace, token, position=position))
            assert total == pytest.approx(logits[position, token].item(), abs=1e-4)
        parts = attribution(model, trace, 5, position=position, against=36)
        difference = (logits[position, 5] - logits[position, 36]).item()
        assert sum(value for _, value in parts) == pytest.approx(difference, abs=1e-4)
    names = [name for name, _ in attribution(model, trace, 0)]
    assert len(names) == len(set(names))
    assert sum(".h" in name for name in names) == model.config.n_layer * model.config.n_head


def test_nothing_switched_off_changes_nothing(model: GPT) -> None:
    tokens = some_tokens(model.config)
    plain = record(model, tokens)
    edited = record(model, tokens, edits=without([], model.config))
    for name, value in plain.activations.items():
        assert torch.equal(edited.tensor(name), value)


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_a_part_that_is_off_is_like_weights_that_are_zero(fill: str) -> None:
    for fields in (dict(shape="gpt2", bias=False), dict(shape="modern")):
        model = tiny_model(tiny_config(**fields))
        tokens, config = some_tokens(model.config), model.config
        for part in ("1", "0.attn", "1.mlp", "1.h2", "0.h0"):
            edited = record(model, tokens, edits=without([part], config, fill))  # type: ignore
            found = find_part(part, config)
            for name in found.activations:
                value, before = edited.tensor(name), record(model, tokens).tensor(name)
                if found.head is not None:
                    others = [h for h in range(config.n_head) if h != found.head]
                    torch.testing.assert_close(value[:, others], before[:, others])
                    value, before = value[:, found.head], before[:, found.head]
                wanted = torch.zeros_like(value) if fill == "zero" else before.mean((0, 1))
                if part != "1":  # of a block the attention changes what the MLP gives
                    torch.testing.assert_close(value, wanted.expand_as(value))
            if fill == "zero":
                torch.testing.assert_close(
                    edited.tensor("logits"), _with_zero_weights(model, part)(tokens)
                )


@torch.no_grad()
def _with_zero_weights(model: GPT, part: str) -> GPT:
    copy = GPT(model.config).eval()
    copy.load_state_dict(model.state_dict())
    found, D = find_part(part, model.config), model.config.head_dim
    block: Any = copy.blocks[found.layer]
    if found.kind in ("block", "attn"):
        block.attn.out.weight.zero_()
    if found.kind in ("block", "mlp"):
        block.mlp.down.weight.zero_()
    if found.head is not None:
        block.attn.out.weight[:, found.head * D : (found.head + 1) * D] = 0
    return copy.requires_grad_(False)


def test_patching_a_text_with_itself_changes_nothing(model: GPT) -> None:
    tokens = some_tokens(model.config, batch=1)
    trace = record(model, tokens)
    L = model.config.n_layer
    parts = [f"{i}{kind}" for i in range(L) for kind in ("", ".attn", ".mlp", ".h1")]
    edited = record(model, tokens, edits=patched(trace, [*parts, *trace.activations]))
    for name, value in trace.activations.items():
        assert torch.equal(edited.tensor(name), value)


def test_patching_everything_gives_the_other_text() -> None:
    model = tiny_model(tiny_config(n_layer=2))
    one, other = some_tokens(model.config, batch=2).split(1)
    source = record(model, other)
    edited = record(model, one, edits=patched(source, ["blocks.0.resid_pre"]))
    assert torch.equal(edited.tensor("logits"), source.tensor("logits"))
    head = record(model, one, edits=patched(source, ["1.h2"]))
    torch.testing.assert_close(
        head.tensor("blocks.1.head_out")[:, 2], source.tensor("blocks.1.head_out")[:, 2]
    )
    assert not torch.allclose(head.tensor("logits"), source.tensor("logits"))


def test_the_patch_map_is_one_pass_for_each_cell() -> None:
    model = tiny_model(tiny_config(n_layer=2))
    one, other = some_tokens(model.config, batch=2, n=5).split(1)
    source = record(model, other)
    found, before = patch_map(model, one, source, 7), record(model, one)["logits"][0, -1, 7]
    assert found.shape == (2, 5)
    for layer in range(2):
        for t in range(5):
            name = f"blocks.{layer}.resid_post"

            def edit(x: torch.Tensor, t: int = t, name: str = name) -> torch.Tensor:
                x = x.clone()
                x[:, t] = source.tensor(name)[:, t]
                return x

            after = record(model, one, edits={name: edit})["logits"][0, -1, 7]
            assert found[layer, t] == pytest.approx(after - before, abs=1e-5)
    assert (patch_map(model, one, record(model, one), 7) == pytest.approx(0, abs=1e-6)) is True


def test_edits_that_meet_are_made_one_after_the_other() -> None:
    both = combine({"a": lambda x: x + 1}, {"b": lambda x: x}, {"a": lambda x: x * 2})
    assert set(both) == {"a", "b"}
    assert both["a"](torch.tensor(3.0)) == 8.0


@pytest.mark.parametrize(
    ("part", "says"),
    [
        ("9", "there is no block 9; the model has 2"),
        ("1.h6", "there is no head 6; each block has 6"),
        ("1.heads", "'1.heads' is no part of a model"),
        ("", "'' is no part of a model"),
        ("-1", "'-1' is no part of a model"),
    ],
)
def test_parts_that_are_not_there(part: str, says: str) -> None:
    with pytest.raises(UserError, match=says):
        find_part(part, tiny_config())


def test_texts_of_different_lengths_and_tokens_outside() -> None:
    model = tiny_model(tiny_config())
    short, long = (record(model, some_tokens(model.config, batch=1, n=n)) for n in (4, 6))
    with pytest.raises(UserError, match="texts with as many tokens"):
        record(model, some_tokens(model.config, batch=1, n=6), edits=patched(short, ["0.mlp"]))
    with pytest.raises(UserError, match="texts with as many tokens"):
        patch_map(model, some_tokens(model.config, batch=1, n=6), short, 3)
    with pytest.raises(UserError, match="token 37 is outside the vocabulary of 37"):
        attribution(model, long, 37)
