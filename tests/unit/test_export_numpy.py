"""A model as an .npz file: NumPy alone reads it, and it is whole or absent."""

from __future__ import annotations

import json
import os
import tracemalloc
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest

from conftest import tiny_config, tiny_model, weights_of
from glassgpt import numpy_gpt
from glassgpt.checkpoints.npz import read_numpy, write_numpy
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError


class Lazy(Mapping[str, np.ndarray]):
    """Weights that come into being when asked for; remembers how often that was."""

    def __init__(self, config: ModelConfig) -> None:
        self.shapes, self.asked = config.weight_shapes, []

    def __getitem__(self, name: str) -> np.ndarray:
        self.asked.append(name)
        return np.ones(self.shapes[name], dtype=np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@pytest.mark.parametrize(
    "config",
    [
        tiny_config("gpt2"),
        tiny_config("gpt2", bias=False, tie_embeddings=False, dropout=0.25),
        tiny_config("modern", qk_norm=False),
        tiny_config("modern", n_layer=0),
    ],
    ids=["gpt2", "gpt2-untied", "llama", "bigram"],
)
def test_round_trip(config: ModelConfig, tmp_path: Path) -> None:
    weights = weights_of(tiny_model(config))
    path = tmp_path / "model.npz"
    write_numpy(path, config, {name: np.asfortranarray(w) for name, w in weights.items()})
    again, read = read_numpy(path)
    assert again == config
    assert read.keys() == weights.keys()
    for name, weight in weights.items():
        assert read[name].dtype == weight.dtype
        np.testing.assert_array_equal(read[name], weight)
    assert os.listdir(tmp_path) == ["model.npz"]


def test_the_example_of_the_docstring(tmp_path: Path) -> None:
    config = tiny_config()
    weights = weights_of(tiny_model(config))
    write_numpy(tmp_path / "book.npz", config, weights)
    file = np.load(tmp_path / "book.npz")
    assert ModelConfig(**json.loads(str(file["config.json"]))) == config
    logits = numpy_gpt.forward(np.array([5, 8, 13]), file, config)
    expected = numpy_gpt.forward(np.array([5, 8, 13]), weights, config)
    np.testing.assert_array_equal(logits, expected)


def test_nothing_is_compressed(tmp_path: Path) -> None:
    config = tiny_config()
    write_numpy(tmp_path / "model.npz", config, weights_of(tiny_model(config)))
    with zipfile.ZipFile(tmp_path / "model.npz") as archive:
        assert {member.compress_type for member in archive.infolist()} == {zipfile.ZIP_STORED}


def test_one_weight_at_a_time_is_in_memory(tmp_path: Path) -> None:
    config = ModelConfig.from_shape("gpt2", vocab_size=512, n_layer=12, n_embd=256)
    weights = Lazy(config)
    largest = max(4 * np.prod(shape) for shape in weights.shapes.values())
    tracemalloc.start()
    write_numpy(tmp_path / "model.npz", config, weights)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert (tmp_path / "model.npz").stat().st_size > 30 * largest
    assert peak < 4 * largest
    assert weights.asked == list(config.weight_shapes)


def test_what_fails_leaves_nothing_behind(tmp_path: Path) -> None:
    config = tiny_config()
    path = tmp_path / "model.npz"
    weights = weights_of(tiny_model(config))
    del weights["final_norm.weight"]
    with pytest.raises(KeyError):
        write_numpy(path, config, weights)
    assert not os.listdir(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        write_numpy(tmp_path / "no" / "model.npz", config, weights)


def test_what_is_no_exported_model(tmp_path: Path) -> None:
    path = tmp_path / "model.npz"
    with pytest.raises(UserError, match="does not exist"):
        read_numpy(path)
    np.savez(path, a=np.zeros(3))
    with pytest.raises(UserError, match="no exported model"):
        read_numpy(path)
    np.savez(path, **{"config.json": np.array({"a": "pickle"}, dtype=object)})  # type: ignore
    with pytest.raises(UserError, match="no exported model"):
        read_numpy(path)
    path.write_bytes(b"")
    with pytest.raises(UserError, match="no exported model"):
        read_numpy(path)
    np.save(tmp_path / "array.npy", np.zeros(3))
    with pytest.raises(UserError, match="no exported model"):
        read_numpy(tmp_path / "array.npy")


def test_damage_is_noticed(tmp_path: Path) -> None:
    config = tiny_config()
    path = tmp_path / "model.npz"
    weights = weights_of(tiny_model(config))
    write_numpy(path, config, weights)
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="is damaged"):
        read_numpy(path)
    at = whole.index(weights["blocks.0.attn.out.weight"].tobytes())
    path.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    with pytest.raises(UserError, match="is damaged"):
        read_numpy(path)
    write_numpy(path, config, weights | {"final_norm.weight": np.zeros(5, dtype=np.float32)})
    with pytest.raises(UserError, match="final_norm.weight"):
        read_numpy(path)
