"""Adapters on disk: a folder beside its base is a model; what we can't compute is refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import glassgpt
from conftest import refuse, tiny_config, tiny_model, weights_of
from glassgpt.checkpoints import load
from glassgpt.checkpoints.load import load_pretrained
from glassgpt.checkpoints.run_directory import (
    Checkpoint,
    is_adapter,
    save_adapter,
    save_model,
)
from glassgpt.checkpoints.tensors import SafeTensors, write_tensors
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError
from glassgpt.finetuning.lora import LoRA, adapter_tensors, add_lora, merged_weights
from glassgpt.system import write_json
from glassgpt.tokenizers.tokenizer import CharTokenizer

SHAPES = {
    "gpt2": tiny_config("gpt2"),
    "llama": tiny_config("modern", qk_norm=False, tie_embeddings=False),
    "qwen3": tiny_config("modern"),
}
TOKENIZER = CharTokenizer.from_characters("abcdefghijklmnopqrstuvwxyz .,!?\n-:;'")


def save_both(folder: Path, config: ModelConfig, base: str = "base") -> dict[str, np.ndarray]:
    """`folder`/base and `folder`/adapter; the weights that they are together."""
    model = tiny_model(config)
    save_model(folder / "base", Checkpoint(config, weights_of(model), TOKENIZER))
    add_lora(model, LoRA(5, 7.0))
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.3)
    tensors = adapter_tensors(model)
    save_adapter(folder / "adapter", config, tensors, alpha=7.0, dropout=0.1, base=base)
    return {name: array.copy() for name, array in merged_weights(model).items()}


@pytest.fixture
def adapter(tmp_path: Path) -> Path:
    save_both(tmp_path, SHAPES["qwen3"], base="../base")
    return tmp_path / "adapter"


# -- found -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_an_adapter_is_its_base_with_the_pairs_added(tmp_path: Path, name: str) -> None:
    expected = save_both(tmp_path, SHAPES[name], base=str(tmp_path / "base"))
    assert is_adapter(tmp_path / "adapter")
    assert not is_adapter(tmp_path / "base")
    loaded = load_pretrained(tmp_path / "adapter")
    assert loaded.config == SHAPES[name]
    assert set(loaded.weights) == set(expected)
    for weight, array in expected.items():
        np.testing.assert_allclose(loaded.weights[weight], array, rtol=0, atol=1e-6)
    assert loaded.tokenizer.encode("a b") == TOKENIZER.encode("a b")
    assert str(tmp_path / "adapter") in loaded.info["source"]


@pytest.mark.slow
def test_a_base_beside_the_adapter_or_beside_us(
    tmp_path: Path, adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = glassgpt.load(adapter).generate("a b", max_new_tokens=20, temperature=0).text
    assert text != glassgpt.load(adapter.parent / "base").generate("a b", max_new_tokens=20).text
    shutil.move(tmp_path / "base", adapter / "base")
    rewrite(adapter, base_model_name_or_path="base")
    assert glassgpt.load(adapter).generate("a b", max_new_tokens=20, temperature=0).text == text
    shutil.move(adapter / "base", tmp_path / "base")
    monkeypatch.chdir(tmp_path)
    loaded = glassgpt.load(Path("adapter"))
    assert loaded.generate("a b", max_new_tokens=20, temperature=0).text == text


def test_adapters_and_bases_by_their_published_names(
    adapter: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    published = {"someone/adapter": adapter, "someone/base": adapter.parent / "base"}
    monkeypatch.setattr(load, "fetch_published", published.__getitem__)
    rewrite(adapter, base_model_name_or_path="someone/base")
    loaded = load_pretrained("someone/adapter")
    assert loaded.config == SHAPES["qwen3"]
    assert loaded.info["source"].endswith("of someone/base")
    assert load._is_complete(adapter)
    (adapter / "adapter_model.safetensors").unlink()
    assert not load._is_complete(adapter)


def test_rank_stabilised_scales_and_those_of_single_matrices(tmp_path: Path, adapter: Path) -> None:
    plain, base = load_pretrained(adapter), load_pretrained(tmp_path / "base")
    ours = {"blocks.0.mlp.up.weight": 2.0, "blocks.1.mlp.up.weight": 3.0,
            "blocks.0.mlp.down.weight": 1.0}  # fmt: skip
    rewrite(adapter, alpha_pattern={"layers.1.mlp.up_proj": 21.0, "up_proj": 14.0})
    patterned = load_pretrained(adapter)
    rewrite(adapter, alpha_pattern=None, use_rslora=True)
    stabilised = load_pretrained(adapter)
    for name, times in ours.items():
        change = plain.weights[name] - base.weights[name]
        for checkpoint, factor in ((patterned, times), (stabilised, 5**0.5)):
            found = checkpoint.weights[name] - base.weights[name]
            np.testing.assert_allclose(found, factor * change, rtol=0, atol=1e-6)


def test_half_precision_adapters(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    tensors = {name: t.astype(np.float16) for name, t in SafeTensors([path]).items()}
    expected = load_pretrained(adapter).weights["blocks.1.attn.qkv.weight"]
    write_tensors(path, tensors)
    found = load_pretrained(adapter).weights["blocks.1.attn.qkv.weight"]
    assert found.dtype == np.float32
    np.testing.assert_allclose(found, expected, rtol=0, atol=5e-3)


# -- refused ---------------------------------------------------------------------------------------


def rewrite(adapter: Path, **changes: Any) -> None:
    path = adapter / "adapter_config.json"
    write_json(path, json.loads(path.read_text()) | changes)


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (dict(peft_type="IA3"), "'IA3' is not supported; LORA is"),
        (dict(use_dora=True), "use_dora is not supported; merge it"),
        (dict(modules_to_save=["score"]), "modules_to_save is not supported"),
        (dict(bias="all"), "bias 'all' is not supported; none is"),
        (dict(init_lora_weights="pissa_niter_4"), "'pissa_niter_4' changes the base"),
        (dict(lora_alpha="x"), "adapter_config.json is malformed"),
        (dict(lora_alpha=None), "adapter_config.json is malformed"),
        (dict(alpha_pattern={"(": 1}), "adapter_config.json is malformed"),
        (dict(alpha_pattern=[1]), "adapter_config.json is malformed"),
        (dict(base_model_name_or_path=None), "base_model_name_or_path is missing"),
        (dict(base_model_name_or_path="../adapter"), "is an adapter itself"),
        (dict(base_model_name_or_path="."), "is an adapter itself"),
        (dict(base_model_name_or_path="/no/where"), "an adapter of '/no/where': /no/where does"),
    ],
    ids=str,
)
def test_what_we_can_not_compute_is_refused(
    capsys: pytest.CaptureFixture, adapter: Path, changes: dict[str, Any], says: str
) -> None:
    rewrite(adapter, **changes)
    line = refuse(capsys, "sample", adapter)
    assert says in line
    assert str(adapter) in line


LAYER = "base_model.model.model.layers.1."


@pytest.mark.parametrize(
    ("tensors", "says"),
    [
        ({LAYER + "mlp.up_proj.lora_A.weight": (5, 17)}, r"up_proj has lora_A \(5, 17\)"),
        ({LAYER + "mlp.up_proj.lora_B.weight": (28, 4)}, r"lora_B \(28, 4\); here .* \(28, r\)$"),
        ({LAYER + "mlp.up_proj.lora_A.weight": None}, "up_proj has lora_A None"),
        ({LAYER + "mlp.up_proj.lora_A.weight": (0, 18)}, "up_proj has lora_A"),
        ({LAYER + "mlp.up_proj.lora_magnitude_vector": (28,)}, "lora_magnitude_vector is nothing"),
        ({LAYER + "mlp.side_proj.lora_A.weight": (5, 18)}, "side_proj.lora_A.weight is nothing"),
        ({"base_model.model.lm_head.lora_A.weight": (5, 18)}, "lm_head.lora_A.weight is nothing"),
        ({"base_model.model.model.layers.2.mlp.up_proj.lora_A.weight": (5, 18)}, "layers.2"),
        (None, "holds no tensors"),
    ],
    ids=str,
)
def test_tensors_that_fit_no_matrix_are_refused(
    adapter: Path, tensors: dict[str, Any] | None, says: str
) -> None:
    path = adapter / "adapter_model.safetensors"
    changed = {n: np.array(t) for n, t in SafeTensors([path]).items()}
    for name, shape in (tensors or {}).items():
        changed |= {name: np.ones(shape or (), np.float32)}
        if shape is None:
            del changed[name]
    write_tensors(path, {} if tensors is None else changed)
    with pytest.raises(UserError, match=says):
        load_pretrained(adapter)


def test_damage_is_noticed(adapter: Path) -> None:
    path = adapter / "adapter_model.safetensors"
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    with pytest.raises(UserError, match="damaged"):
        load_pretrained(adapter)
    path.unlink()
    with pytest.raises(UserError, match="adapter_model.safetensors: it does not exist"):
        load_pretrained(adapter)
    (adapter / "adapter_config.json").write_text("{")
    with pytest.raises(UserError, match="adapter_config.json is damaged"):
        load_pretrained(adapter)
