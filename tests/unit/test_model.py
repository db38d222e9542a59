"""model.py: causality, the cache, batching, initialisation, gradients, learning."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch
import torch.nn.functional as F

from conftest import tiny_config, tiny_model, weights_of
from glassgpt.cache import KVCache
from glassgpt.config import ModelConfig
from glassgpt.model import (
    GPT,
    CausalSelfAttention,
    attention,
    attention_by_hand,
    crop_positions,
    load_weights,
    rotary_angles,
    rotate,
)

CONFIGS = {
    "gpt2": tiny_config("gpt2"),
    "gpt2-no-bias": tiny_config("gpt2", bias=False, activation="gelu", tie_embeddings=False),
    "qwen3": tiny_config("modern"),
    "llama": tiny_config("modern", qk_norm=False, n_kv_head=1, tie_embeddings=False),
    "bigram": tiny_config("modern", n_layer=0),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
both_shapes = pytest.mark.parametrize("shape", ["gpt2", "modern"])


def random_tokens(config: ModelConfig, B: int, T: int, seed: int = 1) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(config.vocab_size, (B, T), generator=generator)


def assert_close(actual: torch.Tensor, expected: torch.Tensor, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(actual, expected, rtol=0, atol=tolerance)


# -- what a decoder must not and must do ---------------------------------------------------------


@every_config
@torch.inference_mode()
def test_no_position_sees_the_future(config: ModelConfig) -> None:
    model = tiny_model(config)
    tokens = random_tokens(config, B=3, T=11)
    before = model(tokens)
    assert before.shape == (3, 11, config.vocab_size)
    for t in range(11):
        changed = tokens.clone()
        changed[1, t] = (changed[1, t] + 5) % config.vocab_size
        after = model(changed)
        assert torch.equal(after[1, :t], before[1, :t])  # to the last bit
        assert torch.equal(after[[0, 2]], before[[0, 2]])  # rows are no business of each other
        assert not torch.allclose(after[1, t], before[1, t], atol=1e-3)


@every_config
@torch.inference_mode()
def test_later_positions_see_the_past(config: ModelConfig) -> None:
    """The other half of causality: but for a bigram, each earlier token matters to the last."""
    model = tiny_model(config)
    tokens = random_tokens(config, B=1, T=11)
    before = model(tokens)[0, -1]
    for t in range(10):
        changed = tokens.clone()
        changed[0, t] = (changed[0, t] + 5) % config.vocab_size
        same = torch.equal(model(changed)[0, -1], before)
        assert same == (config.n_layer == 0)


@both_shapes
@torch.inference_mode()
def test_order_matters(shape: str) -> None:
    """Positions are told apart: the same earlier tokens in another order are another text."""
    model = tiny_model(tiny_config(shape, n_layer=1))
    logits = model(torch.tensor([[3, 8, 21, 5], [8, 3, 21, 5]]))[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 1e-3


@torch.inference_mode()
def test_rotary_scores_depend_on_the_distance_only() -> None:
    angles = rotary_angles(tiny_config("modern", context_length=29)).float().repeat(1, 2)
    q, k = torch.randn(2, 1, 1, 1, 4, generator=torch.Generator().manual_seed(3))

    def score(query_at: int, key_at: int) -> torch.Tensor:
        places = (q, angles[query_at : query_at + 1]), (k, angles[key_at : key_at + 1])
        turned = [rotate(x, angle.cos(), angle.sin()) for x, angle in places]
        return (turned[0] * turned[1]).sum()

    for distance in (0, 1, 6):
        first = score(distance, 0)
        for shift in (3, 11, 22):
            assert_close(score(distance + shift, shift), first)
    assert abs(score(6, 0) - score(1, 0)) > 1e-3


# -- attention -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("T", "S"), [(7, 7), (1, 1), (1, 9), (3, 9), (8, 9)])
@torch.inference_mode()
def test_fused_attention_is_attention_by_hand(T: int, S: int) -> None:
    generator = torch.Generator().manual_seed(S)
    q, k, v = (torch.randn(2, 3, n, 5, generator=generator) for n in (T, S, S))
    by_hand = attention_by_hand(q, k, v)
    assert_close(attention(q, k, v), by_hand)
    # Both against the definition, one query at a time: query t stands at position S - T + t.
    for t in range(T):
        seen = S - T + t + 1
        scores = torch.einsum("bhd,bhsd->bhs", q[:, :, t], k[:, :, :seen]) / math.sqrt(5)
        expected = torch.einsum("bhs,bhsd->bhd", scores.softmax(-1), v[:, :, :seen])
        assert_close(by_hand[:, :, t], expected)


@every_config
@torch.inference_mode()
def test_model_with_attention_by_hand(config: ModelConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    model, tokens = tiny_model(config), random_tokens(config, B=2, T=12)
    cache = KVCache(config, batch=2)
    fused = model(tokens)
    calls = []

    def watched(*arguments: torch.Tensor) -> torch.Tensor:
        calls.append(arguments[0].size(-2))
        return attention_by_hand(*arguments)

    monkeypatch.setattr(CausalSelfAttention, "attend", staticmethod(watched))
    assert_close(model(tokens), fused)
    model(tokens[:, :5], cache=cache)
    assert_close(model(tokens[:, 5:], cache=cache), fused[:, 5:])
    assert calls == [12] * config.n_layer + [5] * config.n_layer + [7] * config.n_layer


# -- the cache, batches, positions ---------------------------------------------------------------


@every_config
@pytest.mark.parametrize("chunks", [[13], [1] * 13, [4, 1, 6, 2], [1, 11, 1]], ids=str)
@torch.inference_mode()
def test_cached_is_uncached(config: ModelConfig, chunks: list[int]) -> None:
    model, tokens = tiny_model(config), random_tokens(config, B=3, T=13)
    expected = model(tokens)
    cache = KVCache(config, batch=3)
    for _ in range(2):  # the second time over what the first has left behind
        cache.length = 0
        parts = [model(part, cache=cache) for part in tokens.split(chunks, dim=1)]
        assert_close(torch.cat(parts, dim=1), expected)
        assert cache.length == 13


def test_a_full_cache_takes_no_more() -> None:
    config = tiny_config("modern")
    model, cache = tiny_model(config), KVCache(config, batch=1, capacity=6)
    assert cache.capacity == 6
    with torch.inference_mode():
        model(random_tokens(config, B=1, T=4), cache=cache)
        with pytest.raises(AssertionError, match="7 positions do not fit in a cache of 6"):
            model(random_tokens(config, B=1, T=3), cache=cache)


@torch.inference_mode()
def test_a_cache_grows_as_it_is_needed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glassgpt.cache._FIRST_CAPACITY", 2)
    config = tiny_config("modern")
    model, tokens = tiny_model(config), random_tokens(config, B=3, T=13)
    cache, parts, capacities = KVCache(config, batch=3), [], []
    for part in tokens.split([2, 1, 2, 4, 4], dim=1):
        parts.append(model(part, cache=cache))
        capacities.append(cache.capacity)
    assert_close(torch.cat(parts, dim=1), model(tokens))
    assert capacities == [2, 4, 8, 13, 13]  # doubled, up to the context


@torch.inference_mode()
def test_the_clone_of_a_cache_goes_its_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("glassgpt.cache._FIRST_CAPACITY", 6)
    config = tiny_config("modern")
    model, tokens, others = tiny_model(config), *random_tokens(config, B=2, T=9)[:, None]
    cache = KVCache(config, batch=1)
    model(tokens[:, :4], cache=cache)
    clone = cache.clone()
    others[:, :4] = tokens[:, :4]
    for end in (5, 9):  # within what both have allocated, and beyond
        start = clone.length
        ours = model(tokens[:, start:end], cache=cache)
        theirs = model(others[:, start:end], cache=clone)
        assert_close(ours, model(tokens[:, :end])[:, start:])
        assert_close(theirs, model(others[:, :end])[:, start:])


@every_config
def test_more_than_the_context_is_refused(config: ModelConfig) -> None:
    with pytest.raises(AssertionError, match="14 positions"):
        tiny_model(config)(random_tokens(config, B=1, T=14))


@every_config
@torch.inference_mode()
def test_batched_is_single(config: ModelConfig) -> None:
    model, tokens = tiny_model(config), random_tokens(config, B=5, T=9)
    together = model(tokens)
    for row, logits in zip(tokens, together, strict=True):
        assert_close(model(row[None])[0], logits)


@every_config
@torch.inference_mode()
def test_positions_select(config: ModelConfig) -> None:
    model, tokens = tiny_model(config), random_tokens(config, B=2, T=9)
    every = model(tokens)
    for positions in (slice(-1, None), slice(2, 7, 2), torch.tensor([8, 0, 3])):
        chosen = model(tokens, positions=positions)
        assert_close(chosen, every[:, positions])
        assert chosen.shape[1] < 9


@every_config
@torch.inference_mode()
def test_a_shorter_context_keeps_the_first_positions(config: ModelConfig) -> None:
    whole, tokens = tiny_model(config), random_tokens(config, B=2, T=6)
    shorter = dataclasses.replace(config, context_length=6)
    model = GPT(shorter).eval()
    load_weights(model, crop_positions(weights_of(whole), shorter))
    assert torch.equal(model(tokens), whole(tokens))
    with pytest.raises(AssertionError):
        model(random_tokens(config, B=2, T=7))


@every_config
@torch.inference_mode()
def test_from_weights_is_the_model(config: ModelConfig) -> None:
    source, tokens = tiny_model(config), random_tokens(config, B=2, T=9)
    copy = GPT.from_weights(config, weights_of(source))
    assert torch.equal(copy(tokens), source(tokens))
    assert not copy.training
    assert all(p.requires_grad and p.device.type == "cpu" for p in copy.parameters())
    assert (copy.head.weight is copy.token_embedding.weight) == config.tie_embeddings
    assert copy.state_dict().keys() == source.state_dict().keys()


@torch.inference_mode()
def test_bigram_knows_the_last_token_only() -> None:
    config = CONFIGS["bigram"]
    model = tiny_model(config)
    table = model(torch.arange(config.vocab_size)[:, None])[:, 0]  # (V, V)
    tokens = random_tokens(config, B=3, T=12)
    assert_close(model(tokens), table[tokens])
    assert table.std(dim=0).min() > 1e-3  # and does know it


# -- weights -------------------------------------------------------------------------------------


def test_tied_embeddings_are_one_tensor() -> None:
    tied, untied = GPT(tiny_config("gpt2")), GPT(tiny_config("gpt2", tie_embeddings=False))
    assert tied.head.weight is tied.token_embedding.weight
    assert untied.head.weight is not untied.token_embedding.weight
    assert not torch.equal(untied.head.weight, untied.token_embedding.weight)


@every_config
@torch.inference_mode()
def test_load_weights_makes_an_equal_model(config: ModelConfig) -> None:
    source, copy = tiny_model(config, seed=4), GPT(config).eval()
    load_weights(copy, weights_of(source))
    tokens = random_tokens(config, B=2, T=10)
    assert torch.equal(copy(tokens), source(tokens))
    assert (copy.head.weight is copy.token_embedding.weight) == config.tie_embeddings


@pytest.mark.parametrize("n_layer", [1, 8])
@both_shapes
def test_initial_weights(shape: str, n_layer: int) -> None:
    """Every matrix N(0, 0.02); those that write to the residual stream smaller by sqrt(2L)."""
    torch.manual_seed(n_layer)
    width = {"gpt2": dict(n_embd=60, n_hidden=110), "modern": dict(n_embd=70, n_hidden=90)}[shape]
    model = GPT(tiny_config(shape, n_layer=n_layer, tie_embeddings=False, **width))
    shrunk = 0
    for name, parameter in model.named_parameters():
        if parameter.dim() == 1:
            assert torch.all(parameter == (0.0 if name.endswith("bias") else 1.0)), name
            continue
        std = 0.02
        if name.endswith(("attn.out.weight", "mlp.down.weight")):
            std, shrunk = 0.02 / math.sqrt(2 * n_layer), shrunk + 1
        error = 5 / math.sqrt(2 * parameter.numel())  # five standard errors of an estimated std
        assert parameter.std().item() == pytest.approx(std, rel=error), name
        assert abs(parameter.mean().item()) < 5 * std / math.sqrt(parameter.numel()), name
    assert shrunk == 2 * n_layer


def test_an_untrained_model_guesses() -> None:
    """At the start every token is about equally likely, so the loss is ln V."""
    config = tiny_config("modern", vocab_size=300, n_layer=4)
    torch.manual_seed(0)
    tokens = random_tokens(config, B=8, T=13)
    with torch.inference_mode():
        loss = F.cross_entropy(GPT(config)(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
    assert loss.item() == pytest.approx(math.log(300), abs=0.05)


# -- learning ------------------------------------------------------------------------------------


@every_config
def test_gradient_reaches_every_parameter(config: ModelConfig) -> None:
    model = tiny_model(config)
    tokens = random_tokens(config, B=4, T=13)
    F.cross_entropy(model(tokens).flatten(0, 1), tokens.roll(-1, 1).flatten()).backward()
    for name, parameter in model.named_parameters():
        assert parameter.grad is not None, name
        gradient = parameter.grad
        if name.endswith("attn.qkv.bias"):
            # A key bias shifts all scores of a query alike, which the softmax ignores.
            q, k, v = gradient.chunk(3)
            assert k.abs().max() < 1e-6
            gradient = torch.cat((q, v))
        if name == "token_embedding.weight" and not config.tie_embeddings:
            gradient = gradient[tokens.unique()]  # the others were not there
        assert torch.all(gradient != 0), name


@both_shapes
def test_overfits_one_batch(shape: str) -> None:
    config = tiny_config(shape)
    torch.manual_seed(0)
    model = GPT(config)
    tokens = random_tokens(config, B=4, T=13)
    assert len(tokens[:, 0].unique()) == 4  # otherwise the first targets can't be known
    optimizer = torch.optim.AdamW(model.parameters(), lr=2e-2)
    for _ in range(120):
        loss = F.cross_entropy(model(tokens[:, :-1]).flatten(0, 1), tokens[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.item() < 0.05


@both_shapes
@torch.no_grad()
def test_dropout_in_training_only(shape: str) -> None:
    config = tiny_config(shape, dropout=0.3)
    model, plain = tiny_model(config), tiny_model(tiny_config(shape))
    tokens = random_tokens(config, B=2, T=9)
    assert torch.equal(model(tokens), plain(tokens))  # in evaluation it is not there
    model.train()
    torch.manual_seed(1)
    first, second = model(tokens), model(tokens)
    assert not torch.allclose(first, second, atol=1e-3)
    torch.manual_seed(1)
    assert torch.equal(model(tokens), first)
    assert torch.equal(model.eval()(tokens), plain(tokens))


@pytest.mark.parametrize("attend", [attention, attention_by_hand])
def test_attention_drops_patterns_and_keeps_their_mean(attend, monkeypatch) -> None:
    generator = torch.Generator().manual_seed(0)
    q, k = torch.randn(2, 1, 1, 400, 4, generator=generator)
    ones = torch.ones(1, 1, 400, 4)
    torch.manual_seed(2)
    sums = attend(q, k, ones, 0.5)[0, 0, :, 0]  # each the sum of what is left of a pattern row
    assert sums.std() > 0.05
    assert sums[100:].mean().item() == pytest.approx(1.0, abs=0.05)
