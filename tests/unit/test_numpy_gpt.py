"""The NumPy model is the torch model; GPT-2 in it is short; it needs no torch."""

from __future__ import annotations

import ast
import inspect
import json
import subprocess
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import tiny_config, tiny_model, weights_of
from glassgpt import numpy_gpt
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError

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
@pytest.mark.parametrize("sizes", [[1] * 13, [2, 2, 2, 2, 2, 2, 1], [7, 1, 1, 4], [1, 12]], ids=str)
def test_with_a_cache_equals_torch(config: ModelConfig, sizes: list[int]) -> None:
    model, weights = tiny_model(config, seed=6), weights_of(tiny_model(config, seed=6))
    tokens = np.random.default_rng(2).integers(config.vocab_size, size=sum(sizes))
    with torch.inference_mode():
        expected = model(torch.from_numpy(tokens)[None])[0].numpy()
    cache = numpy_gpt.Cache()
    chunks = [
        numpy_gpt.forward(new, weights, config, cache)
        for new in np.split(tokens, np.cumsum(sizes)[:-1])
    ]
    assert [len(chunk) for chunk in chunks] == sizes
    assert cache.length == len(tokens)
    logits = np.concatenate(chunks)
    assert logits.dtype == np.float32
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-5)
    uncached = numpy_gpt.forward(tokens, weights, config)
    np.testing.assert_allclose(logits, uncached, rtol=0, atol=1e-5)


@every_config
def test_positions(config: ModelConfig) -> None:
    weights, tokens = weights_of(tiny_model(config)), np.arange(9)
    logits = numpy_gpt.forward(tokens, weights, config)
    last = numpy_gpt.forward(tokens, weights, config, positions=slice(-1, None))
    np.testing.assert_allclose(last, logits[-1:], rtol=0, atol=1e-5)


@every_config
@pytest.mark.parametrize("prompt", [[5], [3, 1, 4, 1, 5]], ids=len)
def test_generates_the_likeliest_tokens(config: ModelConfig, prompt: list[int]) -> None:
    model = tiny_model(config, seed=7)
    before, n_tokens = list(prompt), config.context_length - len(prompt)
    expected = list(prompt)
    with torch.inference_mode():
        for _ in range(n_tokens):
            expected.append(int(model(torch.tensor([expected]))[0, -1].argmax()))
    for use_cache in (True, False):
        arguments = (prompt, weights_of(model), config, n_tokens)
        new = numpy_gpt.generate(*arguments, use_cache=use_cache)
        assert before + new == expected
        assert prompt == before  # the caller's list is left as it was
    assert numpy_gpt.generate(prompt, weights_of(model), config, 0) == []


def test_a_cache_is_used_unless_told_otherwise(monkeypatch: pytest.MonkeyPatch) -> None:
    config = CONFIGS["gpt2"]
    weights, lengths, real = weights_of(tiny_model(config)), [], numpy_gpt.gpt2

    def counting(tokens: np.ndarray, *rest: object) -> np.ndarray:
        lengths.append(len(tokens))
        return real(tokens, *rest)  # type: ignore[arg-type]

    monkeypatch.setattr(numpy_gpt, "gpt2", counting)
    numpy_gpt.generate([1, 2, 3], weights, config, 4)
    numpy_gpt.generate([1, 2, 3], weights, config, 4, use_cache=False)
    assert lengths == [3, 1, 1, 1] + [3, 4, 5, 6]


def test_prompts_that_do_not_fit_are_refused() -> None:
    config = CONFIGS["qwen3"]
    weights = weights_of(tiny_model(config))
    for prompt, n_tokens in (([], 3), ([1] * 13, 1), ([1, 2], 12)):
        with pytest.raises(UserError, match="context holds"):
            numpy_gpt.generate(prompt, weights, config, n_tokens)


class ReadOnly(Mapping[str, np.ndarray]):
    """The least a mapping can be; its `get` is the one it inherits."""

    def __init__(self, content: dict[str, np.ndarray]) -> None:
        self.content = content

    def __getitem__(self, name: str) -> np.ndarray:
        return self.content[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self.content)

    def __len__(self) -> int:
        return len(self.content)


@every_config
def test_any_mapping_will_do(config: ModelConfig) -> None:
    weights = weights_of(tiny_model(config))
    logits = numpy_gpt.forward(np.arange(9), ReadOnly(weights), config)
    np.testing.assert_array_equal(logits, numpy_gpt.forward(np.arange(9), weights, config))


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
    functions = {f.name: f for f in ast.walk(ast.parse(source)) if isinstance(f, ast.FunctionDef)}
    first, last = functions["gelu"].lineno, functions["gpt2"].end_lineno
    inside = [f for f in functions.values() if first <= f.lineno <= last]
    assert {"attention", "extend", "layer_norm", "linear", "softmax"} < {f.name for f in inside}
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


GOLDEN = Path(__file__).parents[1] / "golden"
EXPECTED = json.loads((GOLDEN / "expected.json").read_text())
# Runs the module as `python -m` does, then says which of the large packages were imported.
RUN = """
import runpy, sys
try:
    runpy.run_module("glassgpt.numpy_gpt", run_name="__main__", alter_sys=True)
finally:
    print(sorted({"torch", "transformers"} & set(sys.modules)), file=sys.stderr)
"""


def command(*arguments: str, through: tuple[str, ...] = ("-c", RUN)):
    model = ("--model", str(GOLDEN / "modern"))
    return subprocess.run(
        [sys.executable, *through, *arguments, *model], capture_output=True, text=True
    )


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--no-cache"]], ids=str)
def test_the_command_line(options: list[str]) -> None:
    prompt = EXPECTED["prompt"]
    result = command(prompt, "--n-tokens", "20", *options)
    assert result.returncode == 0, result.stderr
    assert result.stdout == prompt + EXPECTED["greedy"][:20] + "\n"
    assert result.stderr == "[]\n"  # neither torch nor transformers
    short = command(prompt, "--n-tokens", "2", *options, through=("-m", "glassgpt.numpy_gpt"))
    assert (short.stdout, short.stderr) == (prompt + EXPECTED["greedy"][:2] + "\n", "")


def test_the_command_line_says_what_is_wrong() -> None:
    result = command("The", "--n-tokens", "5000", through=("-m", "glassgpt.numpy_gpt"))
    assert result.returncode == 2
    assert result.stdout == ""
    assert result.stderr.startswith("glassgpt.numpy_gpt: 3 tokens of prompt and 5000 new ones")
    assert result.stderr.count("\n") == 1
