"""The ONNX graph, run by ONNX Runtime, is the torch model, with any past, batch and length."""

from __future__ import annotations

import errno
import os
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch

from conftest import tiny_config, tiny_model
from glassgpt.cache import KVCache
from glassgpt.checkpoints.onnx import _save, onnx_difference, write_onnx
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError
from glassgpt.model import GPT, attention_by_hand

pytestmark = pytest.mark.slow

CONFIGS = {
    "gpt2": tiny_config("gpt2", activation="gelu", n_layer=1),
    "gpt2-untied": tiny_config("gpt2", tie_embeddings=False, bias=False),
    "qwen3": tiny_config("modern"),
    "llama-untied": tiny_config("modern", qk_norm=False, tie_embeddings=False),
}


@pytest.fixture(scope="module", params=CONFIGS)
def exported(
    request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, GPT]:
    model = tiny_model(CONFIGS[request.param], seed=3)
    path = tmp_path_factory.mktemp("onnx") / "model.onnx"
    write_onnx(path, model)
    return path, model


def run_chunks(path: Path, config: ModelConfig, tokens: np.ndarray, sizes: list[int]) -> np.ndarray:
    """(B, T) -> (B, T, V), fed in chunks of these sizes through the cache."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    past_names = [i.name for i in session.get_inputs() if i.name != "input_ids"]
    shape = (len(tokens), config.n_kv_head, 0, config.head_dim)
    past = {name: np.zeros(shape, dtype=np.float32) for name in past_names}
    outputs = [o.name for o in session.get_outputs()]
    logits = []
    for new in np.split(tokens, np.cumsum(sizes)[:-1], axis=1):
        results = dict(zip(outputs, session.run(None, {"input_ids": new, **past}), strict=True))
        logits.append(results.pop("logits"))
        past = {n: results[n.replace("past_key_values", "present")] for n in past_names}
    return np.concatenate(logits, axis=1)


@pytest.mark.slow
@pytest.mark.parametrize("batch", [1, 2, 5])
@pytest.mark.parametrize(
    "sizes", [[1], [13], [1] * 13, [5, 1, 1, 1], [3, 4, 1, 2], [1, 12], [12, 1]], ids=str
)
def test_equals_torch(exported: tuple[Path, GPT], batch: int, sizes: list[int]) -> None:
    path, model = exported
    shape = (batch, sum(sizes))
    tokens = np.random.default_rng(1).integers(model.config.vocab_size, size=shape)
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)).numpy()
    logits = run_chunks(path, model.config, tokens, sizes)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)


def test_present_is_the_cache_of_torch(exported: tuple[Path, GPT]) -> None:
    path, model = exported
    config = model.config
    tokens = np.arange(6).reshape(2, 3)
    cache = KVCache(config, batch=2)
    with torch.inference_mode():
        model(torch.from_numpy(tokens), cache=cache)
    empty = np.zeros((2, config.n_kv_head, 0, config.head_dim), dtype=np.float32)
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    past = {i.name: empty for i in session.get_inputs()[1:]}
    for layer in range(config.n_layer):
        for part, ours in (("key", cache.keys), ("value", cache.values)):
            name = f"present.{layer}.{part}"
            [present] = session.run([name], {"input_ids": tokens, **past})
            np.testing.assert_allclose(present, ours[layer, :, :, :3].numpy(), atol=1e-5)


def test_the_graph_says_what_it_is(exported: tuple[Path, GPT]) -> None:
    path, model = exported
    config = model.config
    onnx.checker.check_model(str(path), full_check=True)
    graph = onnx.load(path)
    about = {entry.key: entry.value for entry in graph.metadata_props}
    assert about["context_length"] == str(config.context_length)
    assert about["family"] == config.family
    assert about["vocab_size"] == str(config.vocab_size)
    shapes = {
        value.name: [d.dim_param or d.dim_value for d in value.type.tensor_type.shape.dim]
        for value in (*graph.graph.input, *graph.graph.output)
    }
    last, kv = config.n_layer - 1, (config.n_kv_head, config.head_dim)
    assert shapes["input_ids"] == ["batch", "tokens"]
    assert shapes[f"past_key_values.{last}.value"] == ["batch", kv[0], "past", kv[1]]
    assert shapes["logits"] == ["batch", "tokens", config.vocab_size]
    assert shapes[f"present.{last}.key"] in (
        ["batch", kv[0], "past + tokens", kv[1]],
        ["batch", kv[0], "tokens + past", kv[1]],
    )
    assert len(shapes) == 2 + 4 * config.n_layer


def test_every_weight_is_stored_once(exported: tuple[Path, GPT]) -> None:
    path, model = exported
    stored = [onnx.numpy_helper.to_array(t) for t in onnx.load(path).graph.initializer]
    for name, parameter in model.named_parameters():
        weight = parameter.detach().numpy()
        same = [a for a in stored if a.shape == weight.shape and np.array_equal(a, weight)]
        turned = [a for a in stored if a.shape == weight.T.shape and np.array_equal(a, weight.T)]
        assert len(same) + (len(turned) if weight.ndim == 2 else 0) == 1, name
    assert sum(a.size for a in stored) < 1.1 * model.config.n_parameters + 200  # and nothing else


def test_onnx_difference(exported: tuple[Path, GPT]) -> None:
    path, model = exported
    assert onnx_difference(path, model) < 1e-5
    other = tiny_model(model.config, seed=4)
    assert onnx_difference(path, other) > 0.1
    with torch.no_grad():
        other.head.weight.fill_(torch.nan)
    assert np.isnan(onnx_difference(path, other))


@pytest.mark.slow
def test_the_smallest_context(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    model = tiny_model(tiny_config("gpt2", context_length=4, n_layer=1))
    write_onnx(tmp_path / "model.onnx", model)
    assert capfd.readouterr() == ("", "")  # and the exporter has kept its remarks to itself
    assert onnx_difference(tmp_path / "model.onnx", model) < 1e-5


@pytest.mark.parametrize("fields", [dict(n_layer=0), dict(context_length=3)])
def test_what_has_no_free_past_is_refused(fields: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="at least 1 layer and a context of 4"):
        write_onnx(tmp_path / "model.onnx", GPT(tiny_config(**fields)))
    assert not list(tmp_path.iterdir())


@pytest.mark.slow
def test_large_weights_lie_beside_the_graph(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also with the model as it stands in training, which is left as it was."""
    model = tiny_model(tiny_config(n_layer=1, dropout=0.5)).train()
    model.blocks[0].attn.attend = attention_by_hand  # type: ignore[union-attr]
    weights = [p.detach().clone() for p in model.parameters()]
    path = tmp_path / "model.onnx"
    with monkeypatch.context() as patch:
        patch.setattr("glassgpt.checkpoints.onnx.ONE_FILE_LIMIT", 100)
        write_onnx(path, model)
    assert sorted(os.listdir(tmp_path)) == ["model.onnx", "model.onnx.data"]
    size = path.with_name("model.onnx.data").stat().st_size
    assert 3.5 < size / model.config.n_parameters < 5  # bytes; the graph keeps the norms
    assert onnx_difference(path, model) < 1e-5
    assert model.training
    assert vars(model.blocks[0].attn)["attend"] is attention_by_hand
    for before, after in zip(weights, model.parameters(), strict=True):
        assert torch.equal(before, after)

    write_onnx(path, model)  # now in one file: the other is not left behind
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert onnx_difference(path, model) < 1e-5


class FullDisk:
    def save(self, destination: Path, **_: Any) -> None:
        destination.write_bytes(b"half")
        raise OSError(errno.ENOSPC, "No space left on device", str(destination))


def test_a_full_disk_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"old")
    with pytest.raises(UserError, match="no space left"):
        _save(path, FullDisk(), external_data=False)  # type: ignore[arg-type]
    assert os.listdir(tmp_path) == ["model.onnx"]
    assert path.read_bytes() == b"old"
    with pytest.raises(UserError, match="does not exist"):
        _save(tmp_path / "no" / "model.onnx", FullDisk(), external_data=False)  # type: ignore


@pytest.mark.parametrize("missing", ["onnx", "onnxscript.optimizer", "onnxruntime"])
def test_missing_packages_are_named(
    missing: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, missing, None)
    model = tiny_model(tiny_config(n_layer=1))
    needy = onnx_difference if missing == "onnxruntime" else write_onnx
    with pytest.raises(UserError, match="needs: pip install") as error:
        needy(tmp_path / "model.onnx", model)
    assert "\n" not in str(error.value)
