"""The same logits as `peft` on top of `transformers`, in both directions, on tiny models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
)

from conftest import tiny_config, tiny_model, weights_of
from glassgpt.checkpoints.load import load_pretrained
from glassgpt.checkpoints.run_directory import Checkpoint, save_adapter, save_model
from glassgpt.errors import UserError
from glassgpt.finetuning.lora import LoRA, adapter_tensors, add_lora
from glassgpt.model import GPT
from glassgpt.tokenizers.tokenizer import CharTokenizer, to_files

peft: Any = pytest.importorskip("peft", reason="left out: adapters against peft (pip install peft)")

TOKENIZER = CharTokenizer.from_characters("abcdefghijklmnopqrstuvwxyz .,!?\n-:;'")
CLOSE: dict[str, Any] = dict(rtol=0, atol=1e-5)
OURS = {
    "gpt2": tiny_config("gpt2"),
    "gpt2-no-bias": tiny_config("gpt2", bias=False),
    "llama": tiny_config("modern", qk_norm=False, tie_embeddings=False),
    "llama-one-kv-head": tiny_config("modern", qk_norm=False, n_kv_head=1),
    "qwen3": tiny_config("modern"),
}
GPT2 = dict(vocab_size=41, n_positions=14, n_embd=15, n_layer=2, n_head=3, n_inner=26,
            initializer_range=0.2)  # fmt: skip
LLAMA = dict(vocab_size=41, hidden_size=18, intermediate_size=28, num_hidden_layers=2,
             num_attention_heads=6, num_key_value_heads=3, head_dim=4, rms_norm_eps=1e-4,
             max_position_embeddings=14, initializer_range=0.2)  # fmt: skip
THEIRS: dict[str, Any] = {
    "gpt2": lambda: GPT2LMHeadModel(GPT2Config(**GPT2)),
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**LLAMA)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**LLAMA, tie_word_embeddings=True)),
}
ALL_OF_LLAMA = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def some_tokens(vocab_size: int) -> torch.Tensor:
    return torch.randint(vocab_size, (3, 11), generator=torch.Generator().manual_seed(9))


def randomize(model: torch.nn.Module, seed: int) -> None:
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)


# -- ours, read by peft --------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("targets", [(), ("qkv", "down"), ("out", "up")], ids=str)
@pytest.mark.parametrize("name", OURS)
def test_peft_reads_our_adapters(tmp_path: Path, name: str, targets: tuple[str, ...]) -> None:
    config, tokens = OURS[name], some_tokens(37)
    model = tiny_model(config)
    save_model(tmp_path / "base", Checkpoint(config, weights_of(model), TOKENIZER))
    unadapted = model(tokens).detach()
    add_lora(model, LoRA(5, 7.0, targets))
    randomize(model, seed=1)
    save_adapter(tmp_path / "adapter", config, adapter_tensors(model), alpha=7.0, dropout=0.2,
                 base=str(tmp_path / "base"))  # fmt: skip
    base = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    theirs = peft.PeftModel.from_pretrained(base, tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(theirs(tokens).logits, model(tokens), **CLOSE)
    assert (model(tokens) - unadapted).abs().max() > 0.01
    found = peft.get_peft_model_state_dict(theirs)
    assert len(found) == len(adapter_tensors(model))  # PEFT has found modules for no others
    again = peft.AutoPeftModelForCausalLM.from_pretrained(tmp_path / "adapter").eval()
    with torch.no_grad():
        torch.testing.assert_close(again(tokens).logits, model(tokens), **CLOSE)


# -- peft's, read by us --------------------------------------------------------------------------


def saved_by_peft(
    folder: Path, name: str, embeddings: Any = "auto", **options: Any
) -> torch.Tensor:
    """`folder`/adapter on `folder`/base, random both; the logits that they give together."""
    torch.manual_seed(2)
    base = THEIRS[name]().eval()
    base.save_pretrained(folder / "base")
    for file, content in to_files(TOKENIZER).items():
        (folder / "base" / file).write_bytes(content)
    config = peft.LoraConfig(task_type="CAUSAL_LM", **{"r": 5, "lora_alpha": 7, **options})
    base = AutoModelForCausalLM.from_pretrained(folder / "base")
    model = peft.get_peft_model(base, config).eval()
    randomize(model, seed=3)
    model.save_pretrained(folder / "adapter", save_embedding_layers=embeddings)
    with torch.no_grad():
        return model(some_tokens(41)).logits


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("gpt2", dict(target_modules=["c_attn", "c_proj", "c_fc"])),
        ("gpt2", dict()),  # what PEFT chooses: c_attn
        ("llama", dict(target_modules=ALL_OF_LLAMA)),
        ("llama", dict(target_modules=["q_proj", "v_proj"])),
        ("llama", dict(target_modules="all-linear", lora_dropout=0.3)),
        ("llama", dict(target_modules=["k_proj", "lm_head"], embeddings=False)),
        ("llama", dict(layers_to_transform=[1])),
        ("qwen3", dict(target_modules=ALL_OF_LLAMA, use_rslora=True)),
        ("qwen3", dict(target_modules=["q_proj", "v_proj"], init_lora_weights="gaussian")),
        (
            "qwen3",
            dict(
                target_modules=ALL_OF_LLAMA,
                rank_pattern={"k_proj": 3, "layers.1.self_attn.q_proj": 4},
                alpha_pattern={"up_proj": 19, r"layers\.0\..*v_proj": 2},
            ),
        ),
    ],
    ids=str,
)
@torch.no_grad()
def test_we_read_pefts_adapters(tmp_path: Path, name: str, options: dict[str, Any]) -> None:
    expected = saved_by_peft(tmp_path, name, **options)
    base, adapted = (load_pretrained(tmp_path / folder) for folder in ("base", "adapter"))
    model = GPT.from_weights(adapted.config, adapted.weights)
    torch.testing.assert_close(model(some_tokens(41)), expected, **CLOSE)
    plain = GPT.from_weights(base.config, base.weights)
    assert (plain(some_tokens(41)) - expected).abs().max() > 0.01


@pytest.mark.parametrize(
    ("name", "options", "says"),
    [
        ("llama", dict(use_dora=True), "use_dora"),
        ("gpt2", dict(bias="lora_only"), "bias 'lora_only'"),
        ("qwen3", dict(lora_bias=True), "lora_bias"),
        ("llama", dict(modules_to_save=["lm_head"]), "modules_to_save"),
        ("llama", dict(init_lora_weights="pissa"), "'pissa' changes the base"),
        ("llama", dict(target_modules=["embed_tokens", "q_proj"]), "embed_tokens.* is nothing"),
        ("llama", dict(target_modules=["lm_head"]), "lm_head.base_layer.weight is nothing"),
        ("qwen3", dict(trainable_token_indices=[3]), "trainable_token_indices"),
    ],
    ids=str,
)
def test_what_we_can_not_compute_is_refused(
    tmp_path: Path, name: str, options: dict[str, Any], says: str
) -> None:
    """Otherwise the logits would be wrong without a word."""
    saved_by_peft(tmp_path, name, **options)
    with pytest.raises(UserError, match=says):
        load_pretrained(tmp_path / "adapter")
