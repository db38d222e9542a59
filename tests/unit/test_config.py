"""Precedence, names and types of options; what an architecture may be; its size and price."""

from __future__ import annotations

import dataclasses
import math
import random
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

import glassgpt.config
from conftest import tiny_config
from glassgpt.config import DataConfig, ModelConfig, Sampling, TrainConfig
from glassgpt.errors import UserError
from glassgpt.model import GPT, CausalSelfAttention, attention_by_hand
from glassgpt.options import (
    check_options,
    names_of,
    option_types,
    preset_names,
    resolve_options,
    split_options,
)

PRESETS = Path(glassgpt.__file__).parent / "training" / "presets"


def random_config(seed: int) -> ModelConfig:
    """A valid architecture, any of the three families, with unusual numbers everywhere."""
    draw = random.Random(seed)
    fields: dict[str, Any] = dict(
        vocab_size=draw.randint(2, 99),
        context_length=draw.randint(1, 30),
        n_layer=draw.randint(0, 3),
        n_hidden=draw.randint(1, 50),
        tie_embeddings=draw.random() < 0.5,
    )
    if draw.random() < 0.5:
        fields |= dict(bias=draw.random() < 0.5, n_head=(heads := draw.randint(1, 5)))
        fields |= dict(n_embd=heads * draw.randint(1, 7))
        fields |= dict(activation=draw.choice(["relu", "gelu", "gelu_tanh"]))
        return ModelConfig.from_shape("gpt2", **fields)
    groups = draw.randint(1, 3)
    fields |= dict(n_kv_head=groups, n_head=(heads := groups * draw.randint(1, 4)))
    fields |= dict(head_dim=2 * draw.randint(1, 5), qk_norm=draw.random() < 0.5)
    fields |= dict(n_embd=draw.randint(1, 40) if fields["qk_norm"] else heads * draw.randint(1, 7))
    return ModelConfig.from_shape("modern", **fields)


# -- precedence ----------------------------------------------------------------------------------


def test_precedence_is_defaults_preset_file_given(tmp_path: Path) -> None:
    preset = tomllib.loads((PRESETS / "textbook-bpe.toml").read_text())
    file = tmp_path / "run.toml"
    file.write_text("max-steps = 11\nn_layer = 7\n")
    options = resolve_options({"n_layer": 9}, preset="textbook-bpe", config=file)
    assert options == preset | {"max_steps": 11, "n_layer": 9, "data": (preset["data"],)}
    assert preset["n_layer"] != 9
    assert preset["max_steps"] != 11
    model, data, train = split_options(options)
    assert model["n_layer"] == 9  # given beats the file
    assert train.max_steps == 11  # the file beats the preset
    assert train.warmup_steps == preset["warmup_steps"] != TrainConfig.warmup_steps  # it beats this
    assert train.grad_clip == TrainConfig.grad_clip  # what nobody mentions
    assert data.val_fraction == DataConfig.val_fraction


def test_split_options_gives_every_option_one_place() -> None:
    parts = [names_of(cls) for cls in (ModelConfig, DataConfig, TrainConfig)]
    assert sum(map(len, parts)) == len(set().union(*parts))
    assert set().union(*parts) | {"data", "shape"} == set(option_types()) | {
        "vocab_size",
        "rope_scaling",
    }


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_resolves(name: str) -> None:
    options = resolve_options({}, preset=name)
    assert options == resolve_options(options)  # nothing was renamed or converted on the way
    model, data, train = split_options(options)
    config = ModelConfig.from_shape(model.pop("shape"), vocab_size=65, **model)
    assert train.batch_tokens >= config.context_length
    assert data.tokenizer in ("char", "byte", "gpt2") or data.tokenizer.startswith("bpe:")
    assert train.warmup_steps < train.max_steps
    for field, value in options.items():  # each line of the file has an effect where it belongs
        for part in (config, data, train):
            if field in names_of(type(part)):
                assert getattr(part, field) == value


# -- names and types -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "right"),
    [("n_layers", "n_layer"), ("learnig-rate", "learning_rate"), ("tokeniser", "tokenizer"),
     ("batch_token", "batch_tokens"), ("shap", "shape")],
)  # fmt: skip
def test_misspelt_names_are_answered_with_the_nearest(wrong: str, right: str) -> None:
    with pytest.raises(UserError, match=f"'{wrong}'.*Did you mean '{right}'"):
        resolve_options({wrong: 1})


def test_misspelt_names_say_where(tmp_path: Path) -> None:
    file = tmp_path / "mine.toml"
    file.write_text("n_heads = 4")
    with pytest.raises(UserError, match=r"'n_heads' in .*mine\.toml.*'n_head'"):
        resolve_options({}, config=file)
    with pytest.raises(UserError, match="'shakespear-char'.*Did you mean 'shakespeare-char'"):
        resolve_options({}, preset="shakespear-char")
    with pytest.raises(UserError, match="'n_layers'.*Did you mean 'n_layer'"):
        ModelConfig.from_shape("gpt2", vocab_size=5, n_layers=2)
    with pytest.raises(UserError, match="gpt2, modern"):
        ModelConfig.from_shape("gpt3", vocab_size=5)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    "options",
    [
        dict(n_layer="6"), dict(n_layer=6.0), dict(n_layer=True), dict(n_layer=None),
        dict(learning_rate="1e-3"), dict(learning_rate=True), dict(bias=1), dict(bias="yes"),
        dict(shape="gpt3"), dict(schedule="cosin"), dict(tokenizer=3), dict(out=7),
        dict(norm=["layernorm"]), dict(data={"a": 1}), dict(compile=True),
    ],
)  # fmt: skip
def test_wrong_types_are_refused_by_name(options: dict[str, Any]) -> None:
    [name] = options
    with pytest.raises(UserError, match=f"{name}="):
        check_options(options, "the options")


def test_numbers_take_the_type_of_their_field() -> None:
    checked = check_options({"learning-rate": 1, "grad_clip": "none", "patience": None}, "here")
    assert checked == {"learning_rate": 1.0, "grad_clip": None, "patience": None}
    assert type(checked["learning_rate"]) is float


@pytest.mark.parametrize("content", [b"n_layer = ", b"\xff\xfe", b"= 3", b"n_layer = 1\nn_layer=2"])
def test_damaged_files_are_refused_by_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "broken.toml"
    file.write_bytes(content)
    with pytest.raises(UserError, match=r"broken\.toml is not valid TOML"):
        resolve_options({}, config=file)
    with pytest.raises(UserError, match="missing"):
        resolve_options({}, config=tmp_path / "missing.toml")


@pytest.mark.parametrize(
    ("cls", "name", "values"),
    [
        (TrainConfig, "max_steps", [0, -1]),
        (TrainConfig, "batch_tokens", [0]),
        (TrainConfig, "eval_interval", [0]),
        (TrainConfig, "log_interval", [0]),
        (TrainConfig, "micro_batch_size", [0]),
        (TrainConfig, "patience", [0]),
        (TrainConfig, "decay_steps", [0]),
        (TrainConfig, "threads", [0, 100_000]),
        (TrainConfig, "seed", [-1, 1 << 63, 1 << 70]),
        (TrainConfig, "min_learning_rate", [-1e-9, 1.0]),
        (TrainConfig, "warmup_steps", [-1]),
        (TrainConfig, "weight_decay", [-0.1, math.nan]),
        (TrainConfig, "learning_rate", [0.0, -1.0, math.nan, math.inf]),
        (TrainConfig, "beta1", [1.0, -0.1, math.nan]),
        (TrainConfig, "beta2", [1.0, 2.0]),
        (TrainConfig, "grad_clip", [0.0, -1.0, math.nan]),
        (DataConfig, "val_fraction", [0.0, 1.0, -0.5, math.nan]),
        (DataConfig, "max_tokens", [0]),
        (Sampling, "max_new_tokens", [-1]),
        (Sampling, "num_samples", [0, 1 << 40]),
        (Sampling, "temperature", [-0.1, math.nan]),
        (Sampling, "top_k", [0, -5]),
        (Sampling, "top_p", [0.0, 1.1, math.nan]),
        (Sampling, "min_p", [0.0, 1.1]),
        (Sampling, "repetition_penalty", [0.0, -1.0, math.nan]),
        (Sampling, "stop", [("ok", "")]),
    ],
)
def test_values_out_of_range_are_refused(cls: type, name: str, values: list[Any]) -> None:
    cls()  # the defaults are fine
    for value in values:
        with pytest.raises(UserError, match="stop string" if name == "stop" else name):
            cls(**{name: value})


# -- architectures -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "fields", "reason"),
    [
        ("gpt2", dict(norm="rmsnorm"), "norm=rmsnorm, position=learned"),
        ("gpt2", dict(position="rope", head_dim=6), "norm=layernorm, position=rope"),
        ("gpt2", dict(qk_norm=True), "qk_norm=True"),
        ("gpt2", dict(activation="swiglu"), "swiglu"),
        ("gpt2", dict(n_kv_head=1), "n_kv_head"),
        ("gpt2", dict(head_dim=4), "head_dim"),
        ("gpt2", dict(norm="rmsnorm", position="rope", head_dim=6, activation="swiglu"), "no bias"),
        ("modern", dict(norm="layernorm"), "norm=layernorm, position=rope"),
        ("modern", dict(position="learned"), "norm=rmsnorm, position=learned"),
        ("modern", dict(norm="layernorm", position="learned"), "qk_norm=True"),
        ("modern", dict(norm="layernorm", position="learned", qk_norm=False), "swiglu"),
        ("modern", dict(activation="gelu"), "swiglu"),
        ("modern", dict(activation="relu"), "swiglu"),
        ("modern", dict(bias=True), "no bias"),
        ("modern", dict(n_kv_head=4), "n_head=6 is not a multiple of n_kv_head=4"),
        ("modern", dict(n_kv_head=12), "not a multiple"),
        ("modern", dict(head_dim=5), "head_dim=5 must be even"),
        ("modern", dict(qk_norm=False, n_embd=20), "n_embd=20"),  # transformers' Llama refuses it
        ("modern", dict(n_head=0), "n_head=0"),
        ("modern", dict(n_kv_head=0), "n_kv_head=0"),
        ("modern", dict(vocab_size=0), "vocab_size=0"),
        ("modern", dict(context_length=0), "context_length=0"),
        ("modern", dict(n_embd=0), "n_embd=0"),
        ("modern", dict(n_hidden=0), "n_hidden=0"),
        ("modern", dict(head_dim=0), "head_dim=0"),
        ("modern", dict(n_layer=-1), "n_layer=-1"),
        ("modern", dict(dropout=1.0), "dropout=1.0"),
        ("gpt2", dict(dropout=-0.1), "dropout=-0.1"),
        ("gpt2", dict(dropout=math.nan), "dropout=nan"),
        ("modern", dict(rope_theta=0.0), "rope_theta=0.0"),
        ("modern", dict(rope_theta=-10.0), "rope_theta=-10.0"),
        ("modern", dict(norm_eps=-1e-6), "norm_eps=-1e-06"),
        ("gpt2", dict(norm_eps=math.nan), "norm_eps=nan"),
    ],
)
def test_impossible_architectures_are_refused(
    shape: str, fields: dict[str, Any], reason: str
) -> None:
    with pytest.raises(UserError, match=reason):
        tiny_config(shape, **fields)


def test_heads_that_do_not_divide_the_width_get_a_remedy() -> None:
    with pytest.raises(UserError, match=r"n_embd=20.*n_head=6.*n_embd=24"):
        ModelConfig.from_shape("modern", vocab_size=5, n_embd=20, n_head=6)


def test_family_follows_from_the_switches_alone() -> None:
    assert tiny_config("gpt2").family == "gpt2"
    assert tiny_config("gpt2", bias=False, activation="relu").family == "gpt2"
    assert tiny_config("modern").family == "qwen3"
    assert tiny_config("modern", qk_norm=False).family == "llama"


def test_derived_fields() -> None:
    gpt2 = ModelConfig.from_shape("gpt2", vocab_size=5, n_embd=24, n_head=3)
    assert (gpt2.n_kv_head, gpt2.head_dim, gpt2.n_hidden) == (3, 8, 96)
    modern = ModelConfig.from_shape("modern", vocab_size=5, n_embd=24, n_head=3)
    assert (modern.n_kv_head, modern.head_dim, modern.n_hidden) == (3, 8, 64)
    with pytest.raises(dataclasses.FrozenInstanceError):
        modern.n_embd = 5  # type: ignore[misc]


@pytest.mark.parametrize("seed", range(10))
def test_weight_shapes_and_count_are_those_of_the_real_model(seed: int) -> None:
    config = random_config(seed)
    model = GPT(config)
    parameters = {name: tuple(p.shape) for name, p in model.named_parameters()}
    assert config.weight_shapes == parameters
    assert config.n_parameters == sum(p.numel() for p in model.parameters())
    saved = set(model.state_dict())  # what a checkpoint holds: the same, and the tied head
    assert saved == set(parameters) | {"head.weight"}


def test_random_configs_cover_the_families() -> None:
    configs = [random_config(seed) for seed in range(10)]
    assert {config.family for config in configs} == {"gpt2", "llama", "qwen3"}
    assert {config.tie_embeddings for config in configs} == {True, False}
    assert any(config.n_layer == 0 for config in configs)


def test_gpt2_has_the_published_size() -> None:
    fields = dict(context_length=1024, n_layer=12, n_head=12, n_embd=768)
    gpt2 = ModelConfig.from_shape("gpt2", vocab_size=50257, **fields)
    assert gpt2.n_parameters == 124_439_808


@pytest.mark.parametrize(
    "config",
    [
        tiny_config("gpt2"),
        tiny_config("gpt2", bias=False, tie_embeddings=False, n_layer=3),
        tiny_config("modern"),
        tiny_config("modern", n_layer=0),
    ],
    ids=["gpt2", "gpt2-untied", "modern", "bigram"],
)
@pytest.mark.parametrize("T", [13, 7])
def test_flops_per_token_is_what_torch_counts(
    config: ModelConfig, T: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    # Both count matrix products only, so there is nothing to tolerate. By hand, because the
    # counter knows the fused kernels of GPUs only.
    monkeypatch.setattr(CausalSelfAttention, "attend", staticmethod(attention_by_hand))
    model, tokens = GPT(config), torch.randint(config.vocab_size, (3, T))
    with FlopCounterMode(display=False) as counter:
        model(tokens).sum().backward()
    assert counter.get_total_flops() == config.flops_per_token(T) * tokens.numel()
    if config.context_length == T:
        assert config.flops_per_token() == config.flops_per_token(T)


def test_files_say_what_is_wrong_with_them(tmp_path: Path) -> None:
    def refused(text: str) -> str:
        (tmp_path / "run.toml").write_text(text)
        with pytest.raises(UserError) as error:
            resolve_options({}, config=tmp_path / "run.toml")
        return str(error.value)

    assert "no tables such as [train]" in refused("[train]\nmax_steps = 3\n")
    assert "max_steps stands twice" in refused("max-steps = 3\nmax_steps = 4\n")
    assert "finite" in refused("weight_decay = nan\n")
    assert "finite" in refused("learning_rate = inf\n")
    (tmp_path / "run.toml").write_text('data = ["a.txt", "b.txt"]\n')
    assert resolve_options({}, config=tmp_path / "run.toml")["data"] == ("a.txt", "b.txt")


def test_paths_and_single_strings_are_taken() -> None:
    assert TrainConfig(out=Path("runs") / "x").out == "runs/x"  # type: ignore[arg-type]
    assert type(Sampling(max_new_tokens=np.int64(5)).max_new_tokens) is int
    assert Sampling(temperature=np.float32(0.5)).temperature == 0.5  # type: ignore[arg-type]
    with pytest.raises(UserError, match="batch_tokens is too large"):
        TrainConfig(batch_tokens=10**30)
    assert Sampling(stop="end").stop == ("end",)  # type: ignore[arg-type]
    for wrong in (dict(stop=3), dict(temperature="hot"), dict(max_new_tokens=2.5), dict(seed=None)):
        with pytest.raises(UserError, match=next(iter(wrong))):
            Sampling(**wrong)
