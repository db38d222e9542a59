"""LoRA: an adapted model is the plain one with b @ a added, and only a and b learn."""

from __future__ import annotations

import copy
import weakref
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

import glassgpt.finetuning.lora
from conftest import tiny_config, tiny_model, weights_of
from glassgpt.checkpoints.peft import apply_adapter, to_peft
from glassgpt.checkpoints.tensors import SafeTensors, write_tensors
from glassgpt.config import LORA_TARGETS, FinetuneConfig, ModelConfig
from glassgpt.errors import UserError
from glassgpt.finetuning.lora import (
    AdaptedLinear,
    LoRA,
    adapter_tensors,
    add_lora,
    merged_weights,
)
from glassgpt.model import GPT
from glassgpt.training.loss import NextTokenLoss
from glassgpt.training.step import share_weights

SHAPES = {
    "gpt2": tiny_config("gpt2"),
    "gpt2-no-bias": tiny_config("gpt2", bias=False),
    "gpt2-untied": tiny_config("gpt2", tie_embeddings=False),
    "modern": tiny_config("modern"),
    "llama": tiny_config("modern", qk_norm=False),
    "llama-untied": tiny_config("modern", qk_norm=False, tie_embeddings=False),
    "llama-one-kv-head": tiny_config("modern", qk_norm=False, n_kv_head=1),
}
LORAS = {
    "all": LoRA(rank=5, alpha=7.0),
    "few": LoRA(rank=2, alpha=3.0, targets=("qkv", "down")),
    "bfloat16": LoRA(rank=5, alpha=7.0, base_weights="bfloat16"),
    "int8": LoRA(rank=5, alpha=7.0, targets=("up", "out"), base_weights="int8"),
}
CLOSE: dict[str, Any] = dict(rtol=0, atol=1e-5)


def adapted_model(config: ModelConfig, lora: LoRA, seed: int = 0) -> GPT:
    """With pairs that are random, both of them."""
    model = tiny_model(config, seed)
    torch.manual_seed(seed)
    add_lora(model, lora)
    with torch.no_grad():
        for parameter in learned(model).values():
            parameter.normal_(std=0.3)
    return model


def learned(model: GPT) -> dict[str, torch.nn.Parameter]:
    return {name: p for name, p in model.named_parameters() if p.requires_grad}


@torch.no_grad()
def set_learned(model: GPT, tensors: Mapping[str, np.ndarray]) -> None:
    for name, parameter in learned(model).items():
        parameter.copy_(torch.from_numpy(np.array(tensors[name])))


def matrices(model: GPT) -> dict[str, AdaptedLinear]:
    return {n: m for n, m in model.named_modules() if isinstance(m, AdaptedLinear)}


def some_tokens(config: ModelConfig, B: int = 4, T: int = 11) -> torch.Tensor:
    return torch.randint(config.vocab_size, (B, T), generator=torch.Generator().manual_seed(9))


# -- what it computes ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("name", SHAPES)
@torch.no_grad()
def test_a_plain_model_with_the_merged_weights_computes_the_same(name: str, lora: str) -> None:
    config = SHAPES[name]
    model, tokens = adapted_model(config, LORAS[lora]), some_tokens(config)
    weights = merged_weights(model)
    assert {n: weights[n].shape for n in weights} == config.weight_shapes
    assert {weights[n].dtype for n in weights} == {np.dtype(np.float32)}
    plain, before = GPT.from_weights(config, weights), tiny_model(config)
    torch.testing.assert_close(model(tokens), plain(tokens), **CLOSE)
    assert (plain(tokens) - before(tokens)).abs().max() > 0.01


@pytest.mark.slow
@given(
    rank=st.integers(1, 40), alpha=st.floats(0.1, 1000), shape=st.sampled_from([*SHAPES]),
    targets=st.sets(st.sampled_from(["qkv", "out", "up", "down"])), dropout=st.floats(0, 0.9),
    training=st.booleans(),
)  # fmt: skip
@torch.no_grad()
def test_a_new_adapter_changes_nothing(rank, alpha, shape, targets, dropout, training) -> None:
    config = SHAPES[shape]
    model, tokens = tiny_model(config), some_tokens(config)
    expected, weights = model(tokens), weights_of(model)
    add_lora(model, LoRA(rank, alpha, tuple(targets), dropout))
    torch.testing.assert_close(model.train(training)(tokens), expected, rtol=0, atol=0)
    assert all(np.array_equal(array, weights[n]) for n, array in merged_weights(model).items())


def test_merged_weights_of_a_plain_model_are_its_weights() -> None:
    model = tiny_model(SHAPES["modern"])
    assert all(np.array_equal(merged_weights(model)[n], w) for n, w in weights_of(model).items())


def test_seeds_repeat_and_begin_like_pefts() -> None:
    pairs = []
    for seed in (1, 1, 2):
        model = tiny_model(SHAPES["modern"])
        torch.manual_seed(seed)
        add_lora(model, LORAS["all"])
        pairs.append(adapter_tensors(model))
    assert all(np.array_equal(pairs[0][n], pairs[1][n]) for n in pairs[0])
    assert not any(np.array_equal(pairs[0][n], pairs[2][n]) for n in pairs[0] if ".a." in n)
    for n, array in pairs[0].items():
        limit = array.shape[1] ** -0.5 if ".a." in n else 0
        assert limit * 0.8 <= np.abs(array).max() <= limit


# -- learning ------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("name", ["gpt2", "modern", "llama-untied"])
def test_gradients_are_those_of_the_dense_formula(name: str, lora: str) -> None:
    """W + factor * b @ a written out, by autograd; nothing frozen has a gradient."""
    config = SHAPES[name]
    model, tokens = adapted_model(config, LORAS[lora]), some_tokens(config)
    plain, leaves, dense = tiny_model(config), {}, {}
    for path, module in matrices(model).items():
        weight = module.weight.detach().float()
        if module.scale is not None:
            weight = weight * module.scale.detach()
        for i in range(len(module.a)):
            leaves[f"{path}.a.{i}"] = module.a[i].detach().clone().requires_grad_()
            leaves[f"{path}.b.{i}"] = module.b[i].detach().clone().requires_grad_()
        products = [leaves[f"{path}.b.{i}"] @ leaves[f"{path}.a.{i}"] for i in range(len(module.a))]
        factor = LORAS[lora].alpha / LORAS[lora].rank
        dense[f"{path}.weight"] = weight + factor * torch.cat(products) if products else weight
    expected = torch.func.functional_call(plain, dense, (tokens,))
    logits = model(tokens)
    torch.testing.assert_close(logits, expected, **CLOSE)
    targets = some_tokens(config).roll(1).flatten()
    F.cross_entropy(expected.flatten(0, 1), targets).backward()
    F.cross_entropy(logits.flatten(0, 1), targets).backward()
    assert learned(model).keys() == leaves.keys()
    for n, parameter in model.named_parameters():
        if n in leaves:
            torch.testing.assert_close(parameter.grad, leaves[n].grad, **CLOSE)
            assert parameter.grad is not None
            assert parameter.grad.abs().max() > 1e-4
        else:
            assert parameter.grad is None


def test_dx_passes_through_the_frozen_matrix() -> None:
    """Of a matrix without pairs too."""
    for precision in ("float32", "bfloat16", "int8"):
        linear = torch.nn.Linear(6, 9)
        module = AdaptedLinear(linear, LoRA(3, 4.0, base_weights=precision), rows=())
        x = torch.randn(2, 5, 6, requires_grad=True)
        dy = torch.randn(2, 5, 9)
        module(x).backward(dy)
        torch.testing.assert_close(x.grad, dy @ module.dense(), **CLOSE)
        assert module.bias is not None
        torch.testing.assert_close(module(x), x @ module.dense().T + module.bias, **CLOSE)
        torch.testing.assert_close(
            module.dense(), linear.weight.detach(),
            rtol=2**-8 if precision == "bfloat16" else 0,
            atol=linear.weight.abs().max().item() / 250 if precision == "int8" else 0,
        )  # fmt: skip


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_no_restored_copy_of_a_matrix_lives_until_the_backward_pass(
    precision: Any, autocast: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = SHAPES["modern"]
    model = adapted_model(config, LoRA(5, 7.0, base_weights=precision)).train()
    shapes = {tuple(module.weight.shape) for module in matrices(model).values()}
    frozen = {p.untyped_storage().data_ptr() for p in model.parameters()}
    saved, made, restore = [], [], glassgpt.finetuning.lora._restored

    def spy(*arguments: Any) -> torch.Tensor:
        made.append(weakref.ref(result := restore(*arguments)))
        return result

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        like_one = tuple(tensor.shape) in shapes or tuple(tensor.shape)[::-1] in shapes
        if like_one and tensor.untyped_storage().data_ptr() not in frozen:
            saved.append(tuple(tensor.shape))
        return tensor

    monkeypatch.setattr(glassgpt.finetuning.lora, "_restored", spy)
    with (
        torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor),
        torch.autocast("cpu", torch.bfloat16, enabled=autocast),
    ):
        loss = model(some_tokens(config)).float().square().mean()
    assert not saved
    assert len(made) == len(matrices(model))
    restored = [ref() for ref in made if ref() is not None]  # nor otherwise than by autograd
    assert all(tensor.untyped_storage().data_ptr() in frozen for tensor in restored)
    loss.backward()
    assert all(p.grad is not None and p.grad.dtype == p.dtype for p in learned(model).values())


@pytest.mark.parametrize("precision", ["float32", "bfloat16", "int8"])
def test_in_bfloat16_it_is_the_plain_model_in_bfloat16(precision: str) -> None:
    config = SHAPES["gpt2"]
    model = adapted_model(config, LoRA(5, 1e-9, base_weights=precision))
    plain, tokens = GPT.from_weights(config, merged_weights(model)), some_tokens(config)
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        assert torch.equal(model(tokens), plain(tokens))
        assert matrices(model)["blocks.1.mlp.up"](torch.ones(1, 15)).dtype == torch.bfloat16


def test_dropout_is_of_the_pairs_and_of_training() -> None:
    config = SHAPES["modern"]
    model, tokens = adapted_model(config, LoRA(5, 7.0, dropout=0.4)), some_tokens(config)
    plain = adapted_model(config, LORAS["all"])
    set_learned(plain, adapter_tensors(model))
    assert torch.equal(model(tokens), plain(tokens))
    model.train()
    assert not torch.equal(model(tokens), model(tokens))
    module, x = matrices(model)["blocks.0.mlp.down"], torch.randn(1, 28).expand(20_000, -1)
    with torch.no_grad():
        many, expected = module(x), x[0] @ module.dense().T
        # What is left is made larger, so that the mean stays.
        assert ((many.mean(dim=0) - expected).abs() < 5 * many.std(dim=0) / 20_000**0.5).all()
        assert (many.std(dim=0) > 0.01).all()
        for b in module.b:
            b.zero_()
        assert torch.equal(module(x), F.linear(x, module.weight))


def test_it_learns_by_recomputing_as_well() -> None:
    config = SHAPES["modern"]
    gradients = []
    for recompute in (False, True):
        model = adapted_model(config, LORAS["int8"]).train()
        tokens = some_tokens(config)
        NextTokenLoss(model, recompute=recompute)(tokens, tokens.roll(-1)).backward()
        gradients.append([p.grad for p in learned(model).values()])
    for one, other in zip(*gradients, strict=True):
        torch.testing.assert_close(one, other, **CLOSE)


# -- memory, copies, files -----------------------------------------------------------------------


@pytest.mark.parametrize("lora", LORAS)
def test_workers_share_what_is_frozen(lora: str) -> None:
    model = adapted_model(SHAPES["modern"], LORAS[lora])
    other, tokens = share_weights(model), some_tokens(SHAPES["modern"])
    theirs = dict(other.named_parameters())
    for n, parameter in model.named_parameters():
        assert theirs[n].data_ptr() == parameter.data_ptr()
        assert theirs[n].dtype == parameter.dtype
        assert theirs[n].requires_grad == parameter.requires_grad
    assert not list(matrices(model)["blocks.0.attn.qkv"].buffers())
    other(tokens).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    copied = copy.deepcopy(model)
    with torch.no_grad():
        for parameter in learned(model).values():
            parameter.zero_()
    assert torch.equal(other(tokens), model(tokens))
    assert not torch.equal(copied(tokens), model(tokens))


def test_the_frozen_matrices_take_as_many_bits_as_asked() -> None:
    sizes = {}
    for precision in ("float32", "bfloat16", "int8"):
        model = adapted_model(SHAPES["llama"], LoRA(1, 1.0, ("qkv",), base_weights=precision))
        sizes[precision] = sum(m.weight.nbytes for m in matrices(model).values())
        assert len(matrices(model)) == 2 * len(LORA_TARGETS)
        assert model.token_embedding.weight.dtype == torch.float32
    assert sizes["float32"] == 2 * sizes["bfloat16"] == 4 * sizes["int8"]


def test_a_float32_base_is_not_copied() -> None:
    model = tiny_model(SHAPES["gpt2"])
    before = {n: p.data_ptr() for n, p in model.named_parameters()}
    add_lora(model, LORAS["all"])
    assert all(dict(model.named_parameters())[n].data_ptr() == before[n] for n in before)


def test_a_saved_adapter_comes_back_bit_for_bit(tmp_path) -> None:
    config = SHAPES["modern"]
    model = adapted_model(config, LORAS["all"], seed=1)
    tensors = adapter_tensors(model)
    assert tensors["blocks.1.attn.qkv.a.2"].shape == (5, 18)
    rows = [len(tensors[f"blocks.1.attn.qkv.b.{i}"]) for i in range(3)]
    assert rows == [24, 12, 12]
    write_tensors(tmp_path / "adapter.safetensors", tensors)
    other = adapted_model(config, LORAS["all"], seed=0)
    other_base = tiny_model(config, seed=1)
    with torch.no_grad():
        for n, parameter in other_base.named_parameters():
            dict(other.named_parameters())[n].copy_(parameter)
    set_learned(other, SafeTensors([tmp_path / "adapter.safetensors"]))
    assert torch.equal(model(some_tokens(config)), other(some_tokens(config)))
    for parameter in learned(model).values():
        parameter.data.zero_()
    assert all(array.any() for array in tensors.values())  # copies


def test_what_the_options_say() -> None:
    options = FinetuneConfig(lora_rank=6, lora_targets=("up",), base_weights="int8")
    assert LoRA.from_config(options) == LoRA(6, 12.0, ("up",), 0.0, "int8")
    options = FinetuneConfig(lora_rank=6, lora_alpha=5, lora_dropout=0.25)
    assert LoRA.from_config(options) == LoRA(6, 5.0, (), 0.25, "float32")
    with pytest.raises(UserError, match="lora_targets=gate: this model has qkv, out, up, down$"):
        add_lora(tiny_model(SHAPES["gpt2"]), LoRA(6, 5.0, ("up", "gate")))
    with pytest.raises(UserError, match="without blocks"):
        add_lora(tiny_model(tiny_config("modern", n_layer=0)), LoRA(6, 5.0))


@pytest.mark.parametrize("lora", LORAS)
@pytest.mark.parametrize("name", SHAPES)
def test_as_pefts_it_is_the_same_adapter(name: str, lora: str) -> None:
    config = SHAPES[name]
    model = adapted_model(config, LORAS[lora])
    about, tensors = to_peft(
        config, adapter_tensors(model), alpha=LORAS[lora].alpha, dropout=0.1, base="gpt2"
    )
    assert about["r"] == LORAS[lora].rank
    expected = {n: array.copy() for n, array in merged_weights(model).items()}
    for n, parameter in learned(model).items():
        parameter.data.mul_(0 if ".b." in n else 1)
    bare = merged_weights(model)
    weights = apply_adapter(config, bare, about, tensors)
    assert set(weights) == set(expected)
    for n in expected:
        np.testing.assert_allclose(weights[n], expected[n], rtol=0, atol=1e-6)
        is_target = n.split(".")[-2] in (LORAS[lora].targets or LORA_TARGETS)
        touched = is_target and n.endswith("weight")
        assert np.array_equal(weights[n], bare[n]) != touched
