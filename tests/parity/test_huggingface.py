"""The same logits, ids and text as `transformers`, in both directions, on tiny random models."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

import glassgpt
from conftest import tiny_config, tiny_model, weights_of
from glassgpt.checkpoints.run_directory import Checkpoint, load_model, save_model
from glassgpt.checkpoints.tensors import SafeTensors, write_tensors
from glassgpt.config import ModelConfig, RopeScaling
from glassgpt.errors import UserError
from glassgpt.model import GPT, load_weights
from glassgpt.tokenizers.tokenizer import CharTokenizer, to_files
from glassgpt.tokenizers.vocabulary import build_tokenizer

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?\n-:;'"  # 36 and <unk>: the 37 of tiny_config
TEXT = (
    "The Wizard said: \"I can't help you, dear; we'll see!\" 1900, 1,234.5 ...\n\n"
    "  Zwölf Boxkämpfer jagen Viktor\r\n\t你好，世界。 😀👩‍👩‍👧 e\u0301 naïve <|endoftext|>\n"
)

# Against a context of 13: the first pair keeps its frequency, the last is slowed, one lies between.
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=0.5, high_freq_factor=1.8,
                     original_context_length=12)  # fmt: skip
OURS = {
    "gpt2": tiny_config("gpt2"),
    "gpt2-no-bias": tiny_config("gpt2", bias=False),
    "gpt2-untied": tiny_config("gpt2", tie_embeddings=False, norm_eps=0.03),
    "gpt2-gelu": tiny_config("gpt2", activation="gelu", dropout=0.2),
    "gpt2-relu": tiny_config("gpt2", activation="relu"),
    "llama": tiny_config("modern", qk_norm=False),
    "llama-untied": tiny_config("modern", qk_norm=False, tie_embeddings=False, norm_eps=0.03),
    "llama-one-kv-head": tiny_config("modern", qk_norm=False, n_kv_head=1),
    "qwen3": tiny_config("modern"),
    "qwen3-untied": tiny_config("modern", tie_embeddings=False, dropout=0.2, rope_theta=40.0),
    "qwen3-no-groups": tiny_config("modern", n_kv_head=6),
    "bigram": tiny_config("modern", n_layer=0),
    "llama-linear": tiny_config(
        "modern", qk_norm=False, rope_scaling=RopeScaling(kind="linear", factor=2.5)
    ),
    "llama-llama3": tiny_config("modern", qk_norm=False, rope_theta=90.0, rope_scaling=LLAMA3),
    "qwen3-llama3": tiny_config("modern", tie_embeddings=False, rope_scaling=LLAMA3),
}
ARCHITECTURES = {"gpt2": "GPT2LMHeadModel", "llama": "LlamaForCausalLM",
                 "qwen3": "Qwen3ForCausalLM"}  # fmt: skip


def random_tokens(vocab_size: int, B: int = 3, T: int = 12) -> torch.Tensor:
    return torch.randint(vocab_size, (B, T), generator=torch.Generator().manual_seed(9))


def save_ours(folder: Path, config: ModelConfig, tokenizer: Any = None) -> GPT:
    model = tiny_model(config, seed=3)
    tokenizer = tokenizer or CharTokenizer.from_characters(LETTERS)
    save_model(folder, Checkpoint(config, weights_of(model), tokenizer))
    return model


# -- ours, read by transformers ------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
@torch.inference_mode()
def test_transformers_reads_a_run_directory(tmp_path: Path, name: str) -> None:
    config = OURS[name]
    ours = save_ours(tmp_path, config)
    theirs, report = AutoModelForCausalLM.from_pretrained(tmp_path, output_loading_info=True)
    assert type(theirs).__name__ == ARCHITECTURES[config.family]
    assert not any(report.values()), report  # no weight is missing, left over or misshapen
    tokens = random_tokens(config.vocab_size)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    assert theirs.num_parameters() >= config.n_parameters
    text = AutoTokenizer.from_pretrained(tmp_path)
    assert text.model_max_length == config.context_length


@torch.inference_mode()
def test_every_position_of_the_context_agrees(tmp_path: Path) -> None:
    """Rotary angles far from 0, and the last learned position."""
    for shape in ("gpt2", "modern"):
        config = tiny_config(shape, context_length=300)
        ours = save_ours(tmp_path / shape, config)
        theirs = AutoModelForCausalLM.from_pretrained(tmp_path / shape)
        tokens = random_tokens(config.vocab_size, B=1, T=300)
        torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


# -- theirs, read by us --------------------------------------------------------------------------

GPT2 = dict(vocab_size=41, n_positions=14, n_embd=15, n_layer=2, n_head=3, n_inner=26,
            initializer_range=0.2)  # fmt: skip
LLAMA = dict(vocab_size=41, hidden_size=18, intermediate_size=28, num_hidden_layers=2,
             num_attention_heads=6, num_key_value_heads=3, head_dim=4, rms_norm_eps=1e-4,
             max_position_embeddings=14, initializer_range=0.2)  # fmt: skip
THEIRS = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "gpt2-inner": lambda: GPT2LMHeadModel(GPT2Config(**GPT2 | dict(n_inner=None))),
    "gpt2-relu": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, activation_function="relu")),
    "gpt2-untied": lambda: GPT2LMHeadModel(GPT2Config(**GPT2, tie_word_embeddings=False)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "llama-tied": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, tie_word_embeddings=True)),
    "llama-plain": lambda: LlamaForCausalLM(
        LlamaConfig(**LLAMA | dict(num_key_value_heads=None, head_dim=None, hidden_size=24))
    ),
    "llama-linear": lambda: LlamaForCausalLM(
        LlamaConfig(
            **LLAMA, rope_parameters={"rope_type": "linear", "factor": 3.0, "rope_theta": 1e4}
        )
    ),
    "llama-llama3": lambda: LlamaForCausalLM(
        LlamaConfig(
            **LLAMA | {"head_dim": 8},
            rope_parameters={
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 12,
                "rope_theta": 50.0,
            },
        )
    ),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA)),
    "qwen3-theta": lambda: Qwen3ForCausalLM(
        Qwen3Config(**LLAMA, rope_parameters={"rope_type": "default", "rope_theta": 55.0})
    ),
    "qwen3-tied": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, tie_word_embeddings=True)),
}


def save_theirs(folder: Path, model: Any) -> None:
    """With random norms and biases too: as made, they are ones and zeros."""
    generator = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for parameter in model.parameters():
            noise = torch.randn(parameter.shape, generator=generator).to(parameter.dtype)
            parameter.add_(0.2 * noise if parameter.dim() < 2 else 0)
    model.eval().save_pretrained(folder)
    for name, content in to_files(CharTokenizer.from_characters(LETTERS)).items():
        (folder / name).write_bytes(content)


def read_by_us(folder: Path) -> GPT:
    checkpoint = load_model(folder)
    model = GPT(checkpoint.config).eval()
    load_weights(model, checkpoint.weights)
    return model


@pytest.mark.parametrize("name", THEIRS)
@torch.inference_mode()
def test_we_read_what_transformers_saves(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    theirs = THEIRS[name]()
    save_theirs(tmp_path, theirs)
    ours = read_by_us(tmp_path)
    assert ARCHITECTURES[ours.config.family] == type(theirs).__name__
    assert ours.config.context_length == 14
    tokens = random_tokens(41)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    assert ours.config.n_parameters == sum(p.numel() for p in theirs.parameters())


@pytest.mark.parametrize("name", ["gpt2", "gpt2-untied", "llama", "llama-llama3", "qwen3-tied"])
def test_to_theirs_and_back_is_exact(tmp_path: Path, name: str) -> None:
    torch.manual_seed(2)
    save_theirs(tmp_path / "theirs", THEIRS[name]())
    checkpoint = load_model(tmp_path / "theirs")
    save_model(tmp_path / "ours", checkpoint)
    first, second = (SafeTensors([tmp_path / f / "model.safetensors"]) for f in ("theirs", "ours"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@torch.inference_mode()
def test_we_read_half_precision(tmp_path: Path, dtype: torch.dtype) -> None:
    """Most published checkpoints are bfloat16."""
    torch.manual_seed(1)
    theirs = Qwen3ForCausalLM(Qwen3Config(**LLAMA)).to(dtype)
    save_theirs(tmp_path, theirs)
    assert json.loads((tmp_path / "config.json").read_text())["dtype"] in str(dtype)
    # We compute in float32 with the rounded weights; so does transformers, asked for it.
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    ours, tokens = read_by_us(tmp_path), random_tokens(41)
    torch.testing.assert_close(ours(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)


LONG = dict(max_position_embeddings=256)


@pytest.mark.parametrize("name", ["gpt2", "llama", "llama3", "qwen3", "qwen3-tied"])
@torch.inference_mode()
def test_greedy_text_of_200_tokens_is_theirs(tmp_path: Path, name: str) -> None:
    torch.manual_seed(5)
    llama3 = {"rope_type": "llama3", "factor": 4.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
              "original_max_position_embeddings": 64, "rope_theta": 1e4}  # fmt: skip
    theirs = {
        "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2 | dict(n_positions=256))),
        "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA | LONG)),
        "llama3": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA | LONG, rope_parameters=llama3)),
        "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA | LONG)),
        "qwen3-tied": lambda: Qwen3ForCausalLM(
            Qwen3Config(**LLAMA | LONG, tie_word_embeddings=True)
        ),
    }[name]()
    save_theirs(tmp_path, theirs)
    assert greedy_ours(tmp_path, [3, 1, 4]) == greedy_theirs(theirs, [3, 1, 4])


def greedy_ours(folder: Path, prompt: list[int], n: int = 200) -> list[int]:
    engine = glassgpt.load(folder).engine("torch")
    engine.open(1)
    tokens, new = [], prompt
    while len(tokens) < n:
        tokens.append(int(engine.read([0], [np.array(new)]).argmax()))
        new = tokens[-1:]
    return tokens


def greedy_theirs(model: Any, prompt: list[int], n: int = 200) -> list[int]:
    out = model.generate(torch.tensor([prompt]), max_new_tokens=n, min_new_tokens=n,
                         do_sample=False, pad_token_id=0)  # fmt: skip
    return out[0, len(prompt) :].tolist()


@pytest.mark.slow
@torch.inference_mode()
def test_a_full_size_gpt2(tmp_path: Path) -> None:
    """124 million random weights: logits, and 200 greedy tokens, as transformers has them."""
    torch.manual_seed(6)
    theirs = GPT2LMHeadModel(GPT2Config(initializer_range=0.05)).eval()
    theirs.save_pretrained(tmp_path)
    for name, content in to_files(CharTokenizer.from_characters(LETTERS)).items():
        (tmp_path / name).write_bytes(content)
    ours = glassgpt.load(tmp_path)
    assert ours.config.n_parameters == 124_439_808
    tokens = random_tokens(50257, B=1, T=70)
    torch.testing.assert_close(ours.model(tokens), theirs(tokens).logits, rtol=0, atol=1e-4)
    prompt = tokens[0, :20].tolist()
    assert greedy_ours(tmp_path, prompt) == greedy_theirs(theirs, prompt)


@torch.inference_mode()
def test_we_read_shards(tmp_path: Path) -> None:
    torch.manual_seed(1)
    theirs = LlamaForCausalLM(LlamaConfig(**LLAMA))
    save_theirs(tmp_path, theirs)
    whole = SafeTensors([tmp_path / "model.safetensors"])
    (tmp_path / "model.safetensors").unlink()
    theirs.save_pretrained(tmp_path, max_shard_size=4000)
    shards = sorted(tmp_path.glob("model-*.safetensors"))
    assert len(shards) > 2
    assert not (tmp_path / "model.safetensors").exists()
    tokens = random_tokens(41)
    torch.testing.assert_close(
        read_by_us(tmp_path)(tokens), theirs(tokens).logits, rtol=0, atol=1e-4
    )
    assert set(SafeTensors(shards)) == set(whole)
    shards[1].unlink()
    with pytest.raises(UserError, match=f"{shards[1].name} is missing"):
        load_model(tmp_path)


@torch.inference_mode()
def test_we_read_gpt2_as_openai_published_it(tmp_path: Path) -> None:
    """On the hub its tensors lack "transformer." and the causal masks are among them."""
    torch.manual_seed(1)
    theirs = GPT2LMHeadModel(GPT2Config(**GPT2))
    save_theirs(tmp_path, theirs)
    path = tmp_path / "model.safetensors"
    tensors = {k.removeprefix("transformer."): v for k, v in SafeTensors([path]).items()}
    tensors |= {f"h.{layer}.attn.bias": np.tril(np.ones((1, 1, 14, 14), np.float32))
                for layer in range(2)}  # fmt: skip
    write_tensors(path, tensors)
    tokens = random_tokens(41)
    torch.testing.assert_close(
        read_by_us(tmp_path)(tokens), theirs(tokens).logits, rtol=0, atol=1e-4
    )


@pytest.mark.parametrize(
    ("model", "field"),
    [
        (lambda: GPT2LMHeadModel(GPT2Config(**GPT2, activation_function="silu")), "silu"),
        (
            lambda: GPT2LMHeadModel(GPT2Config(**GPT2, scale_attn_by_inverse_layer_idx=True)),
            "scale_attn_by_inverse_layer_idx",
        ),
        (
            lambda: GPT2LMHeadModel(GPT2Config(**GPT2, scale_attn_weights=False)),
            "scale_attn_weights",
        ),
        (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, attention_bias=True)), "bias"),
        (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, mlp_bias=True)), "bias"),
        (lambda: LlamaForCausalLM(LlamaConfig(**LLAMA, hidden_act="gelu")), "hidden_act"),
        (
            lambda: LlamaForCausalLM(
                LlamaConfig(
                    **LLAMA,
                    rope_parameters={"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
                )
            ),
            "dynamic",
        ),
        (lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, hidden_act="relu")), "hidden_act"),
        (
            lambda: Qwen3ForCausalLM(
                Qwen3Config(**LLAMA, use_sliding_window=True, sliding_window=3, max_window_layers=0)
            ),
            "sliding",
        ),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_variants_that_we_can_not_compute_are_refused(tmp_path: Path, model, field: str) -> None:
    """Otherwise the logits would be wrong without a word."""
    save_theirs(tmp_path, model())
    with pytest.raises(UserError, match=field):
        load_model(tmp_path)


def test_other_architectures_are_refused_by_name(tmp_path: Path) -> None:
    config = transformers.GPTNeoXConfig(
        vocab_size=41, hidden_size=8, num_hidden_layers=1, num_attention_heads=2,
        intermediate_size=9,
    )  # fmt: skip
    save_theirs(tmp_path, transformers.GPTNeoXForCausalLM(config))
    with pytest.raises(UserError, match="'gpt_neox' is not supported"):
        load_model(tmp_path)


# -- tokenizers ----------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["char", "byte", "gpt2", "bpe:400"])
def test_auto_tokenizer_gives_the_same_ids(tmp_path: Path, kind: str) -> None:
    known = TEXT.replace("<|endoftext|>", "")
    tokenizer = build_tokenizer(kind, lambda: iter([known * 3]))
    save_ours(tmp_path, tiny_config("gpt2", vocab_size=tokenizer.vocab_size), tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    texts = [TEXT, known, known[::-1], "", " ", "\n", "\r\n\r\n", "x" * 300, " " * 40 + "y",
             "unknown: ж ⅷ", "<|endoftext|>", "a<|endoftext|><|endoftext|> b", "<unk>",
             "  spaces  before , punctuation . ' s"]  # fmt: skip
    for text in texts:
        ids = tokenizer.encode(text, special=True)
        assert theirs(text)["input_ids"] == ids
        assert theirs.decode(ids) == tokenizer.decode(ids)
    assert len(theirs) == tokenizer.vocab_size
    assert theirs.eos_token_id == tokenizer.end_of_text


# -- generation ----------------------------------------------------------------------------------


@pytest.mark.parametrize("shape", ["gpt2", "modern"])
def test_greedy_text_is_transformers_generate(tmp_path: Path, shape: str) -> None:
    save_ours(tmp_path, tiny_config(shape, context_length=64, tie_embeddings=False))
    model, theirs = glassgpt.load(str(tmp_path)), AutoModelForCausalLM.from_pretrained(tmp_path)
    prompt = "what comes next"
    ids = torch.tensor([model.tokenizer.encode(prompt)])
    expected = theirs.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=40,
                               do_sample=False, pad_token_id=0)[0, ids.size(1) :]  # fmt: skip
    piece = model.generate(prompt, max_new_tokens=40, temperature=0)
    assert len(expected) == 40
    assert len(set(expected.tolist())) > 3  # not the same token for ever
    assert piece.text == model.tokenizer.decode(expected.tolist())
    text = AutoTokenizer.from_pretrained(tmp_path).decode(expected)
    assert piece.text == text


@pytest.mark.parametrize("shape", ["gpt2", "modern"])
def test_both_stop_at_the_end_of_text(tmp_path: Path, shape: str) -> None:
    """Which id it is stands in generation_config.json."""
    tokenizer = build_tokenizer("byte", lambda: iter(()))
    config = tiny_config(shape, context_length=64, vocab_size=257, tie_embeddings=False)
    ours = save_ours(tmp_path, config, tokenizer)
    prompt, drawn = [1, 2, 3], []
    with torch.inference_mode():
        while len(drawn) < 3 or drawn[-1] in drawn[:-1]:
            drawn.append(int(ours(torch.tensor([prompt + drawn]))[0, -1].argmax()))
    assert 256 not in drawn
    # With two rows of the head exchanged, the last of these tokens is the end of text.
    weights = weights_of(ours)
    weights["head.weight"][[drawn[-1], 256]] = weights["head.weight"][[256, drawn[-1]]]
    save_model(tmp_path, Checkpoint(config, weights, tokenizer))
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path)
    ids = torch.tensor([prompt])
    result = theirs.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                             max_new_tokens=30)  # fmt: skip
    assert result[0].tolist() == [*prompt, *drawn[:-1], 256]
    piece = glassgpt.load(str(tmp_path)).generate(prompt, max_new_tokens=30, temperature=0)
    assert piece.finish_reason == "end_of_text"
    assert piece.text == tokenizer.decode(drawn[:-1])
