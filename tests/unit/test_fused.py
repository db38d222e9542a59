"""fused/ gives the loss and the gradients of model.py with autograd, whatever shape and rows."""

from __future__ import annotations

import copy
import math
import sys
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import tiny_config, tiny_model
from glassgpt.config import ModelConfig, RopeScaling
from glassgpt.data.batches import IGNORE
from glassgpt.inference.kernels.compiled import load_kernels
from glassgpt.model import GPT
from glassgpt.training.fused import step
from glassgpt.training.fused.step import FusedStep, RoundedWeights, can_fuse

Gradients = dict[str, torch.Tensor]


def fusible(**fields: Any) -> ModelConfig:
    """Every dimension of another size; the heads together are wider than the residual stream."""
    return tiny_config(**{"n_head": 6, "n_kv_head": fields.get("n_head", 6), **fields})


CONFIGS = {
    "tied": fusible(),
    "untied": fusible(tie_embeddings=False),
    "odd-heads": fusible(n_head=5),
    "one-head": fusible(n_head=1, head_dim=20, n_layer=1, tie_embeddings=False),
    "three-layers": fusible(n_head=3, head_dim=8, n_layer=3, n_hidden=7),
    "eps": fusible(norm_eps=0.3),
    "stretched": fusible(rope_theta=9.0, rope_scaling=RopeScaling(kind="linear", factor=1.7)),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def rows(config: ModelConfig, B: int = 3, T: int = 11, ignored: float = 0.2, seed: int = 1) -> Any:
    """Random tokens and targets (B, T), some of which carry no loss."""
    generator = np.random.default_rng(seed)
    tokens, targets = generator.integers(0, config.vocab_size, (2, B, T))
    targets[generator.random((B, T)) < ignored] = IGNORE
    return tokens, targets


def fused_step(model: GPT, dtype: torch.dtype = torch.float32) -> FusedStep:
    return FusedStep(model, RoundedWeights(model, dtype))


def gradients(model: GPT) -> Gradients:
    """What the parameters hold, which is taken away from them."""
    found = {}
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        found[name], parameter.grad = parameter.grad.clone(), None
    return found


def fused(model: GPT, tokens: Any, targets: Any, scale: float = 1.0, key: int = 0,
          dtype: torch.dtype = torch.float32) -> tuple[float, Gradients]:  # fmt: skip
    loss = fused_step(model, dtype)((tokens, targets), scale, key)
    return loss, gradients(model)


def autograd(model: GPT, tokens: Any, targets: Any, scale: float = 1.0,
             dtype: torch.dtype = torch.float64) -> tuple[float, Gradients]:  # fmt: skip
    """The same by model.py. In float64, what is left of a difference is the other's rounding."""
    model = copy.deepcopy(model).to(torch.float64 if dtype == torch.float64 else torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
        logits = model(torch.from_numpy(tokens)).flatten(0, 1)
    loss = summed_loss(logits.to(torch.promote_types(dtype, torch.float32)), targets)
    (loss * scale).backward()
    return loss.item(), gradients(model)


def summed_loss(logits: torch.Tensor, targets: np.ndarray) -> torch.Tensor:
    """In nats; logits (N, V), targets (B, T)."""
    return F.cross_entropy(logits, torch.from_numpy(targets).flatten(), ignore_index=IGNORE,
                           reduction="sum")  # fmt: skip


def distance(found: torch.Tensor, expected: torch.Tensor) -> float:
    """Relative to the length of what was expected."""
    return ((found.double() - expected).norm() / expected.norm()).item()


def cosine(found: torch.Tensor, expected: torch.Tensor) -> float:
    return F.cosine_similarity(found.double().flatten(), expected.flatten(), dim=0).item()


def assert_same(found: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=2e-6, abs=1e-9)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.norm() > 0, name
        assert distance(found[1][name], gradient.double()) < 1e-5, name


# -- the reference -------------------------------------------------------------------------------


@pytest.mark.slow
@every_config
@pytest.mark.parametrize(("B", "T"), [(3, 11), (2, 13), (1, 5)])
def test_in_float32_it_is_autograd(config: ModelConfig, B: int, T: int) -> None:
    model, batch = tiny_model(config), rows(config, B, T)
    assert_same(fused(model, *batch, scale=0.3), autograd(model, *batch, scale=0.3))


@every_config
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # torch has no fused norm for autocast
def test_in_bfloat16_it_is_as_close_as_autograd(config: ModelConfig) -> None:
    model, batch = tiny_model(config), rows(config, 5)
    exact_loss, exact = autograd(model, *batch)
    loss, found = fused(model, *batch, dtype=torch.bfloat16)
    _, theirs = autograd(model, *batch, dtype=torch.bfloat16)
    assert loss == pytest.approx(exact_loss, rel=5e-3)
    for name, gradient in exact.items():
        assert distance(found[name], gradient) < 0.1, name
        assert cosine(found[name], gradient) > 0.997, name
    whole, expected, limit = (torch.cat([g.flatten() for g in gradients.values()])
                              for gradients in (found, exact, theirs))  # fmt: skip
    assert distance(whole, expected) < 0.035
    assert distance(whole, expected) < 1.5 * distance(limit, expected)


@settings(max_examples=40)
@given(data=st.data())
def test_any_shape_is_autograd(data: st.DataObject) -> None:
    def number(low: int, high: int) -> int:
        return data.draw(st.integers(low, high))

    n_head = number(1, 4)
    config = fusible(
        n_head=n_head, head_dim=2 * number(1, 4), n_embd=number(2, 9), n_hidden=number(1, 9),
        vocab_size=number(2, 9), n_layer=number(1, 2), tie_embeddings=data.draw(st.booleans()),
    )  # fmt: skip
    model = tiny_model(config, seed=number(0, 9))
    batch = rows(config, number(1, 4), number(1, 13), data.draw(st.sampled_from([0.0, 0.5])))
    (loss, found), (expected_loss, expected) = fused(model, *batch), autograd(model, *batch)
    assert loss == pytest.approx(expected_loss, rel=1e-5, abs=1e-5)
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name].double(), gradient, rtol=1e-4,
                                   atol=1e-5 * largest, msg=name)  # fmt: skip


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_targets_that_are_all_ignored_give_nothing(dtype: torch.dtype) -> None:
    model = tiny_model(CONFIGS["untied"])
    loss, found = fused(model, *rows(model.config, ignored=1.0), dtype=dtype)
    assert loss == 0
    assert all(gradient.eq(0).all() for gradient in found.values())


@pytest.mark.parametrize("config", [CONFIGS["tied"], CONFIGS["untied"]], ids=["tied", "untied"])
@pytest.mark.parametrize(("at_once", "expected"), [(4 * 37 + 5, 4), (36, 1), (37 * 33, 33)])
def test_a_vocabulary_too_large_for_all_logits(monkeypatch, config, at_once, expected) -> None:
    monkeypatch.setattr(step, "FUSED_LOGITS", at_once)
    model, batch = tiny_model(config), rows(config)  # 33 rows of logits
    reference, made = autograd(model, *batch), fused_step(model)
    assert_same((made(batch, 1.0), gradients(model)), reference)
    assert made.workspace is not None
    assert made.workspace.logits.tensor.shape == (expected, 37)


# -- one step after the other --------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_is_left_of_another_batch(dtype: torch.dtype) -> None:
    """Memory is used again for the same shape, made anew for another, and never seen through."""
    model = tiny_model(fusible(dropout=0.3))
    used = fused_step(model, dtype)
    for number, (B, T) in enumerate([(3, 11), (3, 11), (2, 13), (4, 1), (3, 11)]):
        batch = rows(model.config, B, T, seed=number)
        again = used(batch, 1.0, number), gradients(model)
        anew = fused(model, *batch, key=number, dtype=dtype)
        assert again[0] == anew[0]
        assert all(torch.equal(again[1][name], anew[1][name]) for name in anew[1])


def test_memory_of_another_shape_goes_before_new_is_taken(monkeypatch) -> None:
    """Where memory ended, half of the rows must not need what the whole has taken on top."""
    model = tiny_model(CONFIGS["tied"])
    made, make, held = fused_step(model), step.Workspace, []

    def watch(*arguments: Any) -> Any:
        held.append(made.workspace)
        return make(*arguments)

    monkeypatch.setattr(step, "Workspace", watch)
    for B in (4, 2):
        made(rows(model.config, B), 1.0)
    assert held == [None, None]


def test_gradients_of_several_calls_add_up() -> None:
    model, config = tiny_model(CONFIGS["tied"]), CONFIGS["tied"]
    tokens, targets = rows(config, 5)
    whole, parts = autograd(model, tokens, targets), fused_step(model)
    loss = sum(parts((tokens[part], targets[part]), 1.0) for part in (slice(2), slice(2, 5)))
    assert_same((loss, gradients(model)), whole)


def test_changed_weights_are_read_after_a_refresh() -> None:
    model, batch = tiny_model(CONFIGS["untied"]), rows(CONFIGS["untied"])
    made = fused_step(model)
    before = made(batch, 1.0)
    gradients(model)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(0.9)
    made.weights.refresh()
    assert_same((made(batch, 1.0), gradients(model)), autograd(model, *batch))
    assert made(batch, 1.0) != pytest.approx(before, rel=0.01)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("name", ["token_embedding", "attn.qkv", "k_norm", "mlp.gate", "head"])
def test_weights_beyond_all_bounds_are_noticed(dtype: torch.dtype, bad: float, name: str) -> None:
    """The loop stops where the loss or the norm of the gradients is not finite."""
    model = tiny_model(CONFIGS["untied"])
    with torch.no_grad():
        next(p for key, p in model.named_parameters() if name in key).fill_(bad)
    loss, found = fused(model, *rows(model.config), dtype=dtype)
    assert not math.isfinite(loss + sum(gradient.norm().item() for gradient in found.values()))


# -- rounding and dropout ------------------------------------------------------------------------


def kernels() -> Any:
    return load_kernels("glassgpt.training.fused.kernels")


def test_numbers_are_rounded_as_torch_rounds_them() -> None:
    """To the nearest bfloat16, ties to even, of all sizes; dropping nothing is only rounding."""
    bits = np.random.default_rng(0).integers(0, 1 << 32, 20_000, np.uint32)
    bits[:3000] &= np.uint32(0xFFFF0000)  # exact,
    bits[1000:3000] |= np.uint32(0x8000)  # and half-way between two
    numbers = bits.view(np.float32)
    numbers = np.concatenate([numbers[np.isfinite(numbers)], np.float32([0.0, -0.0, np.inf])])
    found = np.empty(len(numbers), np.uint16)
    kernels().drop(numbers, found, np.uint32(7), 0.0)
    expected = torch.from_numpy(numbers).bfloat16().view(torch.uint16).numpy()
    assert np.array_equal(found, expected)


def dropped(share: float, key: int, n: int = 100_000) -> np.ndarray:
    """What is left of ones."""
    ones = np.ones(n, np.float32)
    kernels().drop(ones, ones, np.uint32(key), share)
    return ones


@pytest.mark.parametrize("share", [0.05, 0.5, 0.9])
def test_the_share_is_dropped_and_the_rest_makes_up_for_it(share: float) -> None:
    n, keys = 100_000, [0, 1, 12345, 0xFFFFFFFF]
    masks = [dropped(share, key) for key in keys]
    for mask in masks:
        assert set(np.unique(mask)) == {0, np.float32(1) / (np.float32(1) - np.float32(share))}
        spread = math.sqrt(share * (1 - share) / n)
        assert abs((mask == 0).mean() - share) < 5 * spread
        assert mask.mean() == pytest.approx(1, abs=5 * spread / (1 - share))
    related = np.corrcoef([*masks, *(np.roll(masks[0], i) for i in (1, 2, 3))])
    assert abs(related - np.eye(len(related))).max() < 5 / math.sqrt(n)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_key_decides_what_is_dropped(dtype: torch.dtype) -> None:
    model, batch = tiny_model(fusible(dropout=0.2)), rows(fusible())
    first, again, other = (fused(model, *batch, key=key, dtype=dtype) for key in (8, 8, 9))
    assert first[0] == again[0]
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    assert abs(first[0] - other[0]) > 1e-3
    assert all(distance(other[1][name], first[1][name].double()) > 0.01 for name in first[1])


@pytest.mark.parametrize("tied", [True, False])
def test_gradients_under_dropout_are_the_slope_of_the_loss(tied: bool) -> None:
    """Along each parameter's gradient, and in a random direction of all parameters together."""
    model = tiny_model(fusible(dropout=0.3, tie_embeddings=tied))
    batch, key = rows(model.config, 4), 5
    _, found = fused(model, *batch, key=key)
    generator, parameters = torch.Generator().manual_seed(3), dict(model.named_parameters())

    def slope(directions: Gradients, h: float = 0.01) -> float:
        losses = []
        for sign in (1, -2, 1):  # ahead, behind, and back to where it was
            with torch.no_grad():
                for name, direction in directions.items():
                    parameters[name].add_(direction, alpha=sign * h)
            losses.append(fused(model, *batch, key=key)[0])
        return (losses[0] - losses[1]) / (2 * h)

    for name, gradient in found.items():
        length = gradient.norm().item()
        assert length > 0.01, name
        assert slope({name: gradient / length}) == pytest.approx(length, rel=5e-3), name
    every = {name: torch.randn(p.shape, generator=generator) for name, p in parameters.items()}
    every = {name: p / math.sqrt(model.config.n_parameters) for name, p in every.items()}
    expected = sum((found[name] * every[name]).sum().item() for name in found)
    assert slope(every) == pytest.approx(expected, rel=5e-3)


@pytest.mark.slow
def test_dropout_happens_where_it_does_in_the_model() -> None:
    """Over many masks, the mean loss and its spread are those of model.py in training."""
    share, n = 0.3, 150
    model = tiny_model(fusible(dropout=share))
    batch = rows(model.config, 16)
    theirs = []
    torch.manual_seed(0)
    for _ in range(n):
        with torch.no_grad():
            logits = model.train()(torch.from_numpy(batch[0])).flatten(0, 1)
            theirs.append(summed_loss(logits, batch[1]).item())
    made = fused_step(model)
    ours = [made(batch, 1.0, key) for key in range(n)]
    error = math.sqrt((np.var(ours) + np.var(theirs)) / n)
    assert abs(np.mean(ours) - np.mean(theirs)) < 4 * error
    assert np.std(ours) == pytest.approx(np.std(theirs), rel=0.3)


# -- when ----------------------------------------------------------------------------------------


def test_what_can_be_fused() -> None:
    assert all(can_fuse(config) for config in CONFIGS.values())
    assert not can_fuse(tiny_config("gpt2"))
    assert not can_fuse(tiny_config())  # grouped queries
    assert not can_fuse(fusible(qk_norm=False, n_embd=24))  # Llama's shape
    assert not can_fuse(fusible(n_layer=0))


def test_nothing_is_fused_without_a_compiler(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "numba", None)
    load_kernels.cache_clear()
    assert not can_fuse(CONFIGS["tied"])
    monkeypatch.undo()
    assert can_fuse(CONFIGS["tied"])
