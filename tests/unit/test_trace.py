"""The trace: every activation of a pass, under its name, as torch computes it."""

from __future__ import annotations

import doctest
import math
import random
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch.utils.flop_counter import FlopCounterMode

from conftest import tiny_config, tiny_model
from glassgpt.cache import KVCache
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError
from glassgpt.interpret import activations
from glassgpt.interpret.activations import ACTIVATIONS, sizes, split_name, symbols_of
from glassgpt.interpret.operations import source
from glassgpt.interpret.trace import record, record_attention, record_shapes
from glassgpt.model import GPT, attention, attention_by_hand

FAMILIES = {
    "gpt2": dict(shape="gpt2"),
    "relu": dict(shape="gpt2", activation="relu"),
    "exact gelu": dict(shape="gpt2", activation="gelu", tie_embeddings=False),
    "no bias": dict(shape="gpt2", bias=False),
    "qwen3": dict(shape="modern"),
    "all heads": dict(shape="modern", n_kv_head=6),
    "llama": dict(shape="modern", qk_norm=False),
    "bigram": dict(shape="gpt2", n_layer=0),
}


@pytest.fixture(params=FAMILIES)
def model(request: pytest.FixtureRequest) -> GPT:
    return tiny_model(tiny_config(**FAMILIES[request.param]))


def some_tokens(config: ModelConfig, batch: int = 2, n: int = 7) -> torch.Tensor:
    return torch.randint(config.vocab_size, (batch, n), generator=torch.Generator().manual_seed(3))


def test_logits_are_those_of_the_model(model: GPT) -> None:
    tokens = some_tokens(model.config)
    with torch.no_grad():
        torch.testing.assert_close(record(model, tokens).tensor("logits"), model(tokens))


def test_every_activation_of_a_block_follows_from_those_before(model: GPT) -> None:
    """Each by torch's own words, from the activations that it is made of."""
    config, trace = model.config, record(model, some_tokens(model.config))
    weights = dict(model.named_parameters())
    for i in range(config.n_layer):

        def of(name: str, i: int = i) -> torch.Tensor:
            return trace.tensor(f"blocks.{i}.{name}")

        def linear(x: torch.Tensor, name: str, i: int = i) -> torch.Tensor:
            name = f"blocks.{i}.{name}"
            return F.linear(x, weights[f"{name}.weight"], weights.get(f"{name}.bias"))

        H, D, g = config.n_head, config.head_dim, config.n_head // config.n_kv_head
        k, v = (t.repeat_interleave(g, dim=1) for t in (of("k"), of("v")))
        seen = torch.ones(7, 7, dtype=torch.bool).tril()
        expected = {
            "qkv": linear(of("attn_in"), "attn.qkv"),
            "raw_scores": torch.einsum("bhtd,bhsd->bhts", of("q"), k),
            "scores": of("raw_scores") / math.sqrt(D),
            "masked_scores": torch.where(seen, of("scores"), -math.inf),
            "pattern": of("masked_scores").softmax(-1),
            "head_out": torch.einsum("bhts,bhsd->bhtd", of("pattern"), v),
            "attn_out": linear(of("head_out").transpose(1, 2).reshape(2, 7, H * D), "attn.out"),
            "resid_mid": of("resid_pre") + of("attn_out"),
            "mlp_up": linear(of("mlp_in"), "mlp.up"),
            "mlp_out": linear(of("mlp_hidden"), "mlp.down"),
            "resid_post": of("resid_mid") + of("mlp_out"),
        }
        for name, value in expected.items():
            torch.testing.assert_close(of(name), value, msg=f"{name} of block {i}")
        block = model.blocks[i]
        assert torch.equal(of("attn_in"), block.attn_norm(of("resid_pre")))  # type: ignore
        assert torch.equal(of("mlp_in"), block.mlp_norm(of("resid_mid")))  # type: ignore
        plain = of("qkv").view(2, 7, -1, D).transpose(1, 2)
        torch.testing.assert_close(of("v"), plain[:, H + config.n_kv_head :])
        assert of("q").shape == (2, H, 7, D)
        assert of("k").shape == (2, config.n_kv_head, 7, D)


def test_loss_is_that_of_each_token_but_the_first(model: GPT) -> None:
    tokens = some_tokens(model.config)
    trace = record(model, tokens, loss=True)
    log = trace.tensor("logits").log_softmax(-1)
    expected = -log[:, :-1].gather(2, tokens[:, 1:, None])[..., 0]
    torch.testing.assert_close(trace.tensor("loss"), expected)


def test_attention_is_put_back_and_the_mode_too() -> None:
    model = tiny_model(tiny_config()).train()
    record(model, some_tokens(model.config))
    assert model.training
    assert all(block.attn.attend is attention for block in model.blocks)
    with pytest.raises(UserError):
        record(model, some_tokens(model.config), edits={"blocks.9.q": lambda x: x})
    assert all(block.attn.attend is attention for block in model.blocks)


def test_attention_again_from_what_was_kept(model: GPT) -> None:
    trace = record(model, some_tokens(model.config))
    for i in range(model.config.n_layer):
        q, k, v = (trace.tensor(f"blocks.{i}.{name}") for name in "qkv")
        group = model.config.n_head // model.config.n_kv_head
        for head in range(model.config.n_head):
            key = slice(head // group, head // group + 1)
            again = record_attention(q[:, head : head + 1], k[:, key], v[:, key])
            assert set(again) == {"raw_scores", "scores", "masked_scores", "pattern", "head_out"}
            for name, value in again.items():
                one = trace.tensor(f"blocks.{i}.{name}")[:, head : head + 1]
                torch.testing.assert_close(value, one)


@pytest.mark.slow
def test_edits_take_the_place_of_a_value() -> None:
    for fields in FAMILIES.values():
        model = tiny_model(tiny_config(**fields))
        tokens = some_tokens(model.config)
        plain = record(model, tokens)
        for name in plain.activations:
            if name == "logits":
                continue
            changed = record(model, tokens, edits={name: lambda x: x * 0.5 + 0.25})
            torch.testing.assert_close(changed.tensor(name), plain.tensor(name) * 0.5 + 0.25)
            if name.rpartition(".")[2] not in ("raw_scores", "scores"):
                assert not torch.allclose(changed.tensor("logits"), plain.tensor("logits")), name


def test_an_edit_that_changes_nothing_changes_nothing(model: GPT) -> None:
    tokens = some_tokens(model.config)
    plain = record(model, tokens)
    edited = record(model, tokens, edits={name: torch.clone for name in plain.activations})
    for name, value in plain.activations.items():
        assert torch.equal(edited.tensor(name), value), name


def test_keep_holds_what_is_asked_for() -> None:
    model = tiny_model(tiny_config())
    trace = record(model, some_tokens(model.config), keep=["pattern", "logits"])
    assert set(trace.activations) == {"blocks.0.pattern", "blocks.1.pattern", "logits"}
    assert trace["blocks.1.pattern"].shape == (2, 6, 7, 7)


def test_behind_a_cache_only_the_new_tokens_are_computed() -> None:
    model = tiny_model(tiny_config())
    tokens = some_tokens(model.config, batch=1, n=9)
    whole, cache = record(model, tokens), KVCache(model.config, batch=1)
    record(model, tokens[:, :6], cache=cache)
    rest = record(model, tokens[:, 6:], cache=cache)
    assert rest.tensor("blocks.1.pattern").shape == (1, 6, 3, 9)
    torch.testing.assert_close(rest.tensor("logits"), whole.tensor("logits")[:, 6:])


def test_names_that_are_not_there_and_lengths_that_do_not_fit() -> None:
    model = tiny_model(tiny_config())
    trace = record(model, some_tokens(model.config))
    with pytest.raises(UserError, match="Did you mean 'blocks.1.pattern'"):
        trace.tensor("blocks.1.patern")
    with pytest.raises(UserError, match="no activation 'blocks.2.resid_pre'"):
        trace.tensor("blocks.2.resid_pre")
    with pytest.raises(UserError, match="holds 1 to 13"):
        record(model, some_tokens(model.config, n=14))
    with pytest.raises(UserError, match="holds 1 to 13"):
        record(model, torch.zeros(1, 0, dtype=torch.int64))


# -- operations: shapes, parameters, FLOPs --------------------------------------------------------


def random_configs() -> list[ModelConfig]:
    draw, found = random.Random(7), []
    for n in range(10):
        H = draw.choice([2, 4, 6])
        sizes = dict(n_layer=draw.randint(1, 4), n_head=H, n_embd=H * draw.choice([4, 6, 10]),
                     context_length=draw.randint(9, 40), vocab_size=draw.randint(11, 90),
                     tie_embeddings=draw.random() < 0.5)  # fmt: skip
        if n % 2:
            sizes |= dict(n_kv_head=draw.choice([1, H // 2, H]), qk_norm=draw.random() < 0.5)
        else:
            sizes |= dict(bias=draw.random() < 0.5, activation=draw.choice(["relu", "gelu_tanh"]))
        found.append(ModelConfig.from_shape("modern" if n % 2 else "gpt2", **sizes))
    return found


@pytest.mark.parametrize("config", random_configs(), ids=lambda c: f"{c.family}-{c.n_layer}")
def test_shapes_parameters_and_flops_are_the_real_ones(config: ModelConfig) -> None:
    model = tiny_model(config)
    tokens = some_tokens(config, batch=3, n=8)
    without_weights, trace = record_shapes(config, 8, batch=3), record(model, tokens, loss=True)
    assert len(without_weights.operations) == len(trace.operations)
    for real, symbolic in zip(trace.operations, without_weights.operations, strict=True):
        assert real == symbolic
        if real.activation is not None:
            assert real.output == tuple(trace.tensor(real.activation).shape)
    assert sum(op.parameters for op in trace.operations) == config.n_parameters
    for block in model.blocks:
        block.attn.attend = attention_by_hand  # type: ignore
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        model(tokens)
    assert sum(op.flops for op in trace.operations) == counter.get_total_flops()


@pytest.mark.parametrize("config", random_configs(), ids=lambda c: f"{c.family}-{c.n_layer}")
def test_symbols_mean_the_numbers_beside_them(config: ModelConfig) -> None:
    B, T, H, K, D = 3, 8, config.n_head, config.n_kv_head, config.head_dim
    values = {
        "B": B, "T": T, "S": T, "T-1": T - 1, "C": config.n_embd, "H": H, "K": K, "D": D,
        "F": config.n_hidden, "V": config.vocab_size, "D/2": D // 2, "1": 1, "3H": 3 * H,
        "3C": 3 * config.n_embd, "3HD": 3 * H * D, "H+2K": H + 2 * K, "(H+2K)D": (H + 2 * K) * D,
        "HD": H * D, "context": config.context_length,
    }  # fmt: skip
    for op in record_shapes(config, T, batch=B).operations:
        assert tuple(values[letter] for letter in op.symbols) == op.output, op
        for letters, shape in zip(op.inputs_symbols, op.inputs, strict=True):
            assert tuple(values[letter] for letter in letters) == shape, op


def test_operations_point_to_the_lines_of_model_py() -> None:
    lines = source().splitlines()
    for fields in FAMILIES.values():
        for op in record_shapes(tiny_config(**fields), 5).operations:
            first, last = op.lines
            text = "\n".join(lines[first - 1 : last])
            if op.activation and op.activation.endswith(".pattern"):
                assert "softmax" in text
            if op.name == "linear attn.qkv":
                assert "self.qkv(x)" in text
            if op.name == "linear mlp.down":
                assert "self.down(hidden)" in text


def test_the_table_of_activations_names_functions_and_lines_of_model_py() -> None:
    assert doctest.testmod(activations).failed == 0
    code, found = source().splitlines(), set()
    for fields in FAMILIES.values():
        config = tiny_config(**fields)
        table = symbols_of(config)
        letters = sizes(config, 5, batch=2)
        trace = record(tiny_model(config), some_tokens(config, n=5), loss=True)
        assert trace.activations.keys() <= table.keys()
        for name, symbols in table.items():
            value = trace.tensor(name)
            shape = [letters[letter] for letter in symbols]
            batch = [] if name == "position_embedding" else [2]
            assert list(value.shape) == batch + shape, name
        for operation in trace.operations:
            row = ACTIVATIONS.get(split_name(operation.activation or "")[1])
            if row is None or operation.lines == (0, 0):
                continue
            text = "\n".join(code[operation.lines[0] - 1 : operation.lines[1]])
            if row.name == "mlp_hidden" and operation.name == "gelu" and row.line not in text:
                assert "approximate" in text  # OpenAI's GELU
            elif not (row.name in "qkv" and operation.name == "split"):
                assert row.line in text, (row, text)
            found.add(row.name)
    assert ACTIVATIONS.keys() - found == {"loss", "resid_pre", "q_plain", "k_plain"}


@pytest.mark.slow
def test_a_large_config_without_weights() -> None:
    config = ModelConfig.from_shape("gpt2", vocab_size=50257, context_length=1024, n_layer=12,
                                    n_head=12, n_embd=768)  # fmt: skip
    trace = record_shapes(config, 10, batch=2)
    assert sum(op.parameters for op in trace.operations) == 124_439_808
    text = trace.table()
    assert "(B, H, T, D)" in text
    assert "(2, 12, 10, 64)" in text
    assert text.splitlines()[-1] == "blocks 0 to 11; the others have the same shapes"
    assert "124,439,808" in text
    assert text.count("attn.qkv") == 1
    assert trace.table(every=True).count("attn.qkv") == 12


def test_the_table_with_numbers() -> None:
    model = tiny_model(replace(tiny_config("gpt2"), n_layer=3))
    trace = record(model, some_tokens(model.config, batch=1), statistics=True, loss=True)
    found = {op.activation: op.statistics for op in trace.operations}["blocks.2.mlp_out"]
    assert found is not None
    mean, deviation, least, largest = found
    out = trace.tensor("blocks.2.mlp_out")
    assert mean == pytest.approx(out.mean().item())
    assert deviation == pytest.approx(out.std(correction=0).item(), rel=1e-5)
    assert (least, largest) == (out.min().item(), out.max().item())
    row = next(line for line in trace.table(2).splitlines() if " mlp_out " in line)
    assert f"{largest:.3g}" in row
    with pytest.raises(UserError, match="layer=3: the model has blocks 0 to 2"):
        trace.table(3)
