"""The NumPy model is the torch model; GPT-2 in it is short; it needs no torch."""

from __future__ import annotations

import ast
import inspect
import subprocess
import sys
from collections.abc import Iterator

import numpy as np
import pytest
import torch

from conftest import tiny_config, tiny_model, weights_of
from glassgpt import numpy_gpt
from glassgpt.config import ModelConfig

CONFIGS = {
    "gpt2": tiny_config("gpt2"),  # an odd head_dim of 5
    "gpt2-gelu": tiny_config("gpt2", activation="gelu"),
    "gpt2-relu": tiny_config("gpt2", activation="relu"),
    "gpt2-no-bias": tiny_config("gpt2", bias=False),
    "gpt2-untied": tiny_config("gpt2", tie_embeddings=False, n_layer=3, norm_eps=0.1),
    "qwen3": tiny_config("modern"),
    "qwen3-untied": tiny_config("modern", tie_embeddings=False, norm_eps=0.1),
    "qwen3-one-kv-head": tiny_config("modern", n_kv_head=1, rope_theta=30.0),
    "llama": tiny_config("modern", qk_norm=False),
    "llama-no-groups": tiny_config("modern", qk_norm=False, n_kv_head=6, head_dim=2),
    "bigram": tiny_config("modern", n_layer=0),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture
def default_dtype(request: pytest.FixtureRequest) -> Iterator[torch.dtype]:
    torch.set_default_dtype(request.param)
    yield request.param
    torch.set_default_dtype(torch.float32)


@every_config
@pytest.mark.parametrize(
    ("default_dtype", "tolerance"),
    [(torch.float32, 1e-5), (torch.float64, 1e-10)],
    indirect=["default_dtype"],
    ids=["float32", "float64"],
)
def test_equals_torch(config: ModelConfig, default_dtype: torch.dtype, tolerance: float) -> None:
    model = tiny_model(config, seed=5)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=config.context_length)
    for length in (1, 8, config.context_length):
        with torch.inference_mode():
            expected = model(torch.from_numpy(tokens[None, :length]))[0].numpy()
        logits = numpy_gpt.forward(tokens[:length], weights_of(model), config)
        assert logits.dtype == expected.dtype  # the weights' precision, nowhere lost or gained
        np.testing.assert_allclose(logits, expected, rtol=0, atol=tolerance)


@every_config
def test_every_weight_matters(config: ModelConfig) -> None:
    """Without this, a part that both models leave out would go unnoticed."""
    weights = weights_of(tiny_model(config))
    tokens = np.arange(11)
    before = numpy_gpt.forward(tokens, weights, config)
    for name, weight in weights.items():
        changed = weights | {name: weight + np.random.default_rng(1).normal(size=weight.shape)}
        after = numpy_gpt.forward(tokens, changed, config)
        assert np.abs(after - before).max() > 1e-3, name


def test_gpt2_takes_sixty_lines_of_code() -> None:
    source = inspect.getsource(numpy_gpt)
    lines = source.splitlines()
    functions = {f.name: f for f in ast.parse(source).body if isinstance(f, ast.FunctionDef)}
    first, last = functions["gelu"].lineno, functions["gpt2"].end_lineno
    inside = [f for f in functions.values() if first <= f.lineno <= last]
    assert {"attention", "layer_norm", "linear", "softmax"} < {f.name for f in inside}
    docstrings = {
        number
        for function in inside
        if ast.get_docstring(function)
        for number in range(function.body[0].lineno, function.body[0].end_lineno + 1)
    }
    code = [
        number
        for number in range(first, last + 1)
        if lines[number - 1].strip()
        and not lines[number - 1].lstrip().startswith("#")
        and number not in docstrings
    ]
    assert 20 < len(code) <= 60


def test_needs_no_torch() -> None:
    check = "import sys, glassgpt.numpy_gpt; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", check]).returncode == 0
