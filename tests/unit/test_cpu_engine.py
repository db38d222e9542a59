"""inference/engines/cpu.py gives the logits of model.py, whatever its rows have been through."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import time
from collections import Counter
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import long_texts, tiny_config, tiny_model
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError
from glassgpt.inference.engines import Engine, cpu
from glassgpt.inference.engines.cpu import NumbaEngine, NumpyEngine, precision_of
from glassgpt.inference.engines.reference import ReferenceEngine
from glassgpt.inference.kernels import compiled
from glassgpt.inference.kernels.compiled import kernel_folder
from glassgpt.inference.kernels.quantize import quantize
from glassgpt.tokenizers.tokenizer import CharTokenizer
from listener import Listener

CONTEXT = 150  # more than two blocks of _BLOCK tokens
# n_embd and n_hidden on both sides of a span of 256 columns, and no multiple of anything.
LARGE: dict[str, Any] = dict(n_layer=2, vocab_size=301, n_embd=300, n_head=5, n_hidden=530)
CONFIGS = {
    "gpt2": tiny_config("gpt2", context_length=CONTEXT),
    "gelu": tiny_config("gpt2", context_length=CONTEXT, activation="gelu", bias=False),
    "relu": tiny_config("gpt2", context_length=CONTEXT, activation="relu"),
    "gpt2-large": ModelConfig.from_shape("gpt2", **LARGE, context_length=CONTEXT),
    "qwen3": tiny_config("modern", context_length=CONTEXT),
    "qwen3-large": ModelConfig.from_shape(
        "modern", **LARGE | dict(n_head=6, head_dim=18), n_kv_head=2, context_length=CONTEXT
    ),
    "llama": tiny_config(
        "modern", context_length=CONTEXT, qk_norm=False, n_kv_head=1, tie_embeddings=False
    ),
    "bigram": tiny_config("modern", context_length=CONTEXT, n_layer=0),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
every_engine = pytest.mark.parametrize("make", [NumbaEngine, NumpyEngine])
quantised = pytest.mark.parametrize("precision", ["int8", "int4"])


@cache
def weights_of(config: ModelConfig) -> dict[str, np.ndarray]:
    """Random weights under which logits are a few units large, in every width."""
    state = tiny_model(config).state_dict()
    weights = {name: state[name].numpy().copy() for name in config.weight_shapes}
    if config.n_embd > 100:
        for name, array in weights.items():
            if array.ndim > 1:
                weights[name] = array / 3
    return weights


def model_of(config: ModelConfig):
    from glassgpt.model import GPT

    return GPT.from_weights(config, weights_of(config))


def engines(make: Any, config: ModelConfig) -> tuple[Engine, Engine]:
    return ReferenceEngine(model_of(config)), make(config, weights_of(config))


def tokens(config: ModelConfig, *lengths: int, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng([seed, *lengths])
    return [rng.integers(config.vocab_size, size=length) for length in lengths]


@pytest.fixture(autouse=True)
def many_threads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads share even the smallest pass, and the memory has to grow."""
    monkeypatch.setattr(cpu, "_WORTH_A_THREAD", 1)
    monkeypatch.setattr(cpu, "_FIRST_CAPACITY", 8)
    monkeypatch.setattr(cpu, "usable_cores", lambda: 3)


# -- float32: the reference's logits -------------------------------------------------------------


@every_engine
@every_config
def test_rows_of_any_history_have_the_references_logits(make: Any, config: ModelConfig) -> None:
    """Prompts of different lengths, steps of some rows, rewinding, copying, in random order."""
    both, rng = engines(make, config), np.random.default_rng(7)
    lengths = [0] * 5
    for engine in both:
        engine.open(5)
    for turn in range(14):
        rows = rng.permutation(5)[: rng.integers(1, 6)].tolist()
        for row in rows:
            if lengths[row] > 70 or rng.random() < 0.2:
                lengths[row] = int(rng.integers(0, min(70, lengths[row]) + 1))
                for engine in both:
                    engine.rewind(row, lengths[row])
        most = 1 if turn % 3 else 70
        new = tokens(config, *(int(n) for n in rng.integers(1, most + 1, size=len(rows))),
                     seed=turn)  # fmt: skip
        every = turn % 4 == 3
        expected, found = (np.array(e.read(rows, new, every=every)) for e in both)
        assert found.dtype == np.float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=1e-4)
        for row, some in zip(rows, new, strict=True):
            lengths[row] += len(some)
        if turn % 5 == 4:
            source, *targets = rng.permutation(5)[:3].tolist()
            for target in targets:
                lengths[target] = lengths[source]
            for engine in both:
                engine.copy(source, targets)


@every_engine
@every_config
def test_cached_is_uncached(make: Any, config: ModelConfig) -> None:
    [text], engine = tokens(config, CONTEXT), make(config, weights_of(config))
    engine.open(2)
    whole = np.array(engine.read([1], [text], every=True))
    pieces = [text[:1], text[1:2], text[2:90], text[90:91], text[91:]]
    parts = [np.array(engine.read([0], [piece], every=True)) for piece in pieces]
    np.testing.assert_allclose(np.concatenate(parts), whole, rtol=0, atol=2e-5)


@pytest.mark.slow
@every_engine
@pytest.mark.parametrize("shape", ["gpt2", "qwen3", "llama"])
def test_greedy_text_is_the_references(make: Any, shape: str) -> None:
    """200 tokens, in a context of 13 and in one that holds them all; and one more with a seed."""
    for context in (13, 250):
        both = engines(make, replace(CONFIGS[shape], context_length=context))
        expected, found = map(long_texts, both)
        assert found == expected


@pytest.mark.slow
@pytest.mark.parametrize("threads", [1, 2, 5])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    config = CONFIGS["gpt2-large"]
    new, found = tokens(config, 1, 17, 66), []
    for number in (3, threads):
        for precision in ("float32", "int8", "int4"):
            engine = NumbaEngine(config, weights_of(config), precision, threads=number)
            engine.open(3)
            found.append(np.array(engine.read([0, 1, 2], new)))
    for one, other in zip(found[:3], found[3:], strict=True):
        np.testing.assert_array_equal(one, other)


@every_engine
def test_one_position_more_than_the_context(make: Any) -> None:
    config = tiny_config("gpt2")
    engine = make(config, weights_of(config))
    engine.open(1)
    engine.read([0], tokens(config, 13))
    with pytest.raises(AssertionError, match="more than the context"):
        engine.read([0], tokens(config, 1))


@pytest.mark.parametrize("missing", [0, 1, 2])
def test_a_missing_thread_stops_nobody(missing: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ctrl-C in one, or no memory in another, while the others wait at a meeting; then it goes on
    as before."""
    config = CONFIGS["qwen3"]
    engine = NumbaEngine(config, weights_of(config), threads=3)
    engine.open(1)
    [text] = tokens(config, 9)
    expected = np.array(engine.read([0], [text]))
    compiled = engine._team.forward

    def fails(me: int, *arguments: Any) -> None:
        if me == missing:
            raise KeyboardInterrupt if me == 0 else MemoryError
        compiled(me, *arguments)

    monkeypatch.setattr(engine._team, "forward", fails)
    engine.rewind(0)
    with pytest.raises((KeyboardInterrupt, MemoryError)):
        engine.read([0], [text])
    monkeypatch.undo()
    np.testing.assert_array_equal(engine.read([0], [text]), expected)


@every_engine
def test_several_threads_of_python_share_weights(make: Any) -> None:
    config, found = CONFIGS["qwen3"], {}
    shared, texts = make(config, weights_of(config)), tokens(config, *[40] * 4)

    def run(number: int) -> None:
        engine = shared.another()
        engine.open(1)
        steps = [np.array(engine.read([0], [texts[0][i : i + 1]])) for i in range(40)]
        found[number] = np.concatenate(steps)

    workers = [threading.Thread(target=run, args=(i,)) for i in range(4)]
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for logits in found.values():
        np.testing.assert_array_equal(logits, found[0])
    assert len(found) == 4


@every_engine
def test_after_nan_the_next_text_is_whole(make: Any) -> None:
    config = CONFIGS["gpt2"]  # its heads are narrower than a vector
    weights = {name: array.copy() for name, array in weights_of(config).items()}
    weights["position_embedding.weight"][9] = np.nan
    engine = make(config, weights)
    [text] = tokens(config, 12)
    found = []
    for length in (7, 12, 7):
        engine.open(1)
        found.append(np.array(engine.read([0], [text[:length]])))
    assert np.isnan(found[1]).all()
    np.testing.assert_array_equal(found[2], found[0])


@every_engine
def test_what_an_engine_has_not_got(make: Any) -> None:
    config = tiny_config("gpt2")
    engine = make(config, weights_of(config))
    engine.open(1)
    engine.read([0], tokens(config, 3))
    with pytest.raises(AssertionError):
        engine.rewind(0, 4)
    with pytest.raises((AssertionError, IndexError)):
        engine.read([0], [np.array([config.vocab_size])])


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(os, "fork"), reason="left out: this system has no fork")
def test_a_forked_process_has_threads_of_its_own() -> None:
    script = """
import os, sys
from conftest import tiny_config
import numpy as np
from glassgpt.inference.engines import cpu
cpu._WORTH_A_THREAD = 1
config = tiny_config("gpt2")
weights = {name: np.ones(shape, np.float32) for name, shape in config.weight_shapes.items()}
engine = cpu.NumbaEngine(config, weights, threads=3)
def read():
    engine.open(1)
    return engine.read([0], [np.array([1, 2, 3])]).tolist()
expected = read()
child = os.fork()
if child == 0:
    os._exit(0 if read() == expected else 1)
sys.exit(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]))
"""
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1])}
    subprocess.run([sys.executable, "-c", script], env=environment, check=True, timeout=120)


# -- int8 and int4 -------------------------------------------------------------------------------


@quantised
def test_keys_beyond_float16_stay_finite(precision: Any) -> None:
    config = CONFIGS["gpt2"]
    weights = {name: array.copy() for name, array in weights_of(config).items()}
    weights["blocks.0.attn.qkv.bias"][15:30] = 7e4
    engine = NumbaEngine(config, weights, precision)
    engine.open(1)
    assert np.isfinite(engine.read([0], tokens(config, 5))).all()


@quantised
@every_config
def test_quantised_is_the_model_with_rounded_weights(config: ModelConfig, precision: Any) -> None:
    """Kernels, NumPy and model.py with `dequantize`d weights: as near as activations of 16 bits
    and a cache of float16 allow, which is far nearer than the rounding of the weights."""
    rounded = {}
    for name, array in weights_of(config).items():
        stored = precision_of(name, config, precision)
        rounded[name] = array
        if stored != "float32":
            rounded[name] = quantize(array, stored).dequantize()[:, : array.shape[1]]
    exact = NumpyEngine(config, weights_of(config))
    expected, compiled = NumpyEngine(config, rounded), NumbaEngine(
        config, weights_of(config), precision
    )  # fmt: skip
    numpy = NumpyEngine(config, weights_of(config), precision)
    new, found = tokens(config, 70, 1, 6, 33), []
    for engine in (exact, expected, numpy, compiled):
        engine.open(4)
        engine.read(range(4), tokens(config, 3, 4, 1, 2, seed=2))
        found.append(np.array(engine.read(range(4), new, every=True)))
    np.testing.assert_allclose(found[2], found[1], rtol=0, atol=1e-4)
    cost = np.abs(found[1] - found[0]).mean()
    assert np.abs(found[3] - found[1]).mean() < 0.05 * cost
    assert cost > 1e-3


@quantised
def test_a_token_alone_is_a_token_among_others(precision: Any) -> None:
    config = CONFIGS["gpt2-large"]
    engine = NumbaEngine(config, weights_of(config), precision)
    new = tokens(config, *[1] * 11)
    engine.open(11)
    together = np.array(engine.read(range(11), new))
    engine.open(11)
    alone = np.concatenate([np.array(engine.read([i], [new[i]])) for i in range(11)])
    np.testing.assert_allclose(together, alone, rtol=0, atol=1e-5)


@quantised
def test_bytes_per_token(precision: Any) -> None:
    config = ModelConfig.from_shape("gpt2", vocab_size=3200, n_embd=320, n_head=5, n_layer=2,
                                    context_length=20)  # fmt: skip
    weights = {name: np.ones(shape, np.float32) for name, shape in config.weight_shapes.items()}
    blocks, head = 12 * 320 * 320 * 2, 3200 * 320
    counted = NumbaEngine(config, weights, precision).bytes_per_token
    scales = {"int8": 4 * 9 * 320 * 2, "int4": blocks // 32 * 2}[precision] + 4 * 3200
    assert counted == blocks // {"int8": 1, "int4": 2}[precision] + head + scales


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@quantised
@every_engine
def test_broken_weights_are_not_quantised(make: Any, precision: Any, bad: float) -> None:
    config = tiny_config("gpt2")
    weights = {name: array.copy() for name, array in weights_of(config).items()}
    weights["blocks.1.mlp.up.weight"][3, 2] = bad
    with pytest.raises(UserError, match="can't be quantised"):
        make(config, weights, precision)


@pytest.mark.parametrize("precision", ["float32", "int8", "int4"])
@every_engine
def test_nan_reaches_the_logits(make: Any, precision: Any) -> None:
    """A bias is kept in float32, so that nothing refuses it on loading."""
    for name in ("blocks.0.attn.qkv.bias", "blocks.1.mlp.up.bias", "final_norm.bias"):
        config = tiny_config("gpt2")
        weights = {key: array.copy() for key, array in weights_of(config).items()}
        weights[name][-1] = np.nan
        engine = make(config, weights, precision)
        engine.open(1)
        assert np.isnan(engine.read([0], [np.array([3, 4, 5, 6, 7])])).all()


# -- other processors, other machines ------------------------------------------------------------

SHORTER = {"avx2": "+avx,+avx2,+fma,+f16c,+sse4.2", "sse": "+sse4.2"}


@pytest.mark.slow
@pytest.mark.parametrize("processor", SHORTER)
def test_processors_with_shorter_vectors(processor: str, tmp_path: Path) -> None:
    """The same program compiled for less than this machine has, in a process of its own."""
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[1])!r})
sys.path.insert(0, {str(Path(__file__).parent)!r})
import numpy as np
from test_cpu_engine import CONFIGS, NumbaEngine, tokens, weights_of
config = CONFIGS["qwen3-large"]
for precision in ("float32", "int8", "int4"):
    engine = NumbaEngine(config, weights_of(config), precision, threads=2)
    engine.open(2)
    np.save({str(tmp_path)!r} + f"/{{precision}}.npy", engine.read([0, 1], tokens(config, 1, 9)))
"""
    here = os.environ | {"NUMBA_CPU_NAME": "generic", "NUMBA_CPU_FEATURES": SHORTER[processor],
                         "GLASSGPT_CACHE": str(tmp_path)}  # fmt: skip
    subprocess.run([sys.executable, "-c", script], env=here, check=True)
    config = CONFIGS["qwen3-large"]
    for precision in ("float32", "int8", "int4"):
        engine = NumbaEngine(config, weights_of(config), precision)
        engine.open(2)
        expected = engine.read([0, 1], tokens(config, 1, 9))
        found = np.load(tmp_path / f"{precision}.npy")
        near = 1e-4 if precision == "float32" else 0.02  # there, the cache is float32
        np.testing.assert_allclose(found, expected, rtol=0, atol=near)


@pytest.mark.slow
def test_compiled_code_is_kept_and_announced_once(tmp_path: Path) -> None:
    script = """
import sys
from conftest import tiny_config
from listener import Printer
import numpy as np
from glassgpt.inference.kernels.compiled import load_kernels
from glassgpt.inference.engines.cpu import NumbaEngine
config = tiny_config("gpt2")
weights = {name: np.ones(shape, np.float32) for name, shape in config.weight_shapes.items()}
engine = NumbaEngine(config, weights, reporter=Printer())
for _ in range(2):
    engine.open(1); engine.read([0], [np.array([1])])
forward = load_kernels("glassgpt.inference.kernels.forward").forward
print(sum(forward.stats.cache_hits.values()), "torch" in sys.modules)
"""
    environment = os.environ | {"GLASSGPT_CACHE": str(tmp_path),
                                "PYTHONPATH": str(Path(__file__).parents[1])}  # fmt: skip

    def run(**options: Any) -> list[str]:
        command = [sys.executable, "-c", script]
        done = subprocess.run(command, env=environment, check=True, capture_output=True, text=True,
                              **options)  # fmt: skip
        return done.stdout.splitlines()

    assert run() == ["compiling the float32 kernels, once on this machine ...", "0 False"]
    assert run() == ["1 False"]


def test_every_shape_of_model_has_the_same_compiled_code(tmp_path: Path) -> None:
    """From files, whose arrays can't be written to; tied and untied."""
    from glassgpt.checkpoints.run_directory import Checkpoint, load_model, save_model

    folder, letters = kernel_folder(), [chr(97 + i) for i in range(36)]
    for name in ("gpt2", "qwen3", "llama", "bigram"):
        tokenizer = CharTokenizer.from_characters(letters)
        save_model(tmp_path / name, Checkpoint(CONFIGS[name], weights_of(CONFIGS[name]), tokenizer))
        loaded = load_model(tmp_path / name)
        for precision in ("float32", "int8", "int4"):
            NumbaEngine(loaded.config, loaded.weights, precision)
    found = Counter(path.parent for path in folder.rglob("forward.forward*.nbc"))
    assert max(found.values()) == 3  # in the folder of this checkout


@pytest.mark.slow
def test_a_disk_too_full_for_compiled_code(small_disk: Path) -> None:
    """It decodes all the same, and says why the next process will compile again."""
    script = """
from conftest import tiny_config
from listener import Printer
import numpy as np
from glassgpt.inference.engines.cpu import NumbaEngine
config = tiny_config("gpt2")
weights = {name: np.ones(shape, np.float32) for name, shape in config.weight_shapes.items()}
engine = NumbaEngine(config, weights, reporter=Printer())
engine.open(1)
print(engine.read([0], [np.array([1])]).shape)
"""
    (small_disk / "filler").write_bytes(bytes(1_040_000))
    environment = os.environ | {"GLASSGPT_CACHE": str(small_disk),
                                "PYTHONPATH": str(Path(__file__).parents[1])}  # fmt: skip
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True,
                          text=True)  # fmt: skip
    assert done.stdout.splitlines()[-1] == "(1, 37)", done.stderr
    assert "could not be kept" in done.stdout
    assert "Traceback" not in done.stderr


def test_a_cache_that_cant_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("not a folder")
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "file"))
    kernel_folder.cache_clear()
    try:
        folder = kernel_folder()
        assert folder.is_dir()
        assert tmp_path not in folder.parents
    finally:
        kernel_folder.cache_clear()


def test_old_compiled_code_goes_after_a_month(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path))
    for name, days in (("now", 0), ("used", 29), ("old", 31)):
        folder = tmp_path / "kernels" / name
        (folder / "code").mkdir(parents=True)
        then = time.time() - days * 24 * 3600
        os.utime(folder, (then, then))
    compiled._forget_old_code(tmp_path / "kernels" / "now")
    assert {path.name for path in (tmp_path / "kernels").iterdir()} == {"now", "used"}
    os.utime(tmp_path / "kernels" / "used", (0, 0))
    monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "other"))
    compiled._forget_old_code(tmp_path / "kernels" / "now")  # not in the cache: not ours to delete
    assert (tmp_path / "kernels" / "used").exists()


# -- the choice ----------------------------------------------------------------------------------


def test_the_faster_engine_is_measured_once(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from glassgpt.inference.engines import choose

    monkeypatch.setattr(choose, "kernel_folder", lambda: tmp_path)
    rates, reporter = [{"numba": 3.0, "numpy": 4.0}, {"numba": 5.0, "numpy": 4.0}], Listener()
    monkeypatch.setattr(choose, "measure", lambda *_: rates.pop(0))
    config = tiny_config("gpt2")
    for _ in range(3):
        assert choose.faster_engine(config, reporter) == "numpy"
    assert len(reporter.said) == 1
    longer = replace(config, context_length=99)  # of the same shape
    assert choose.faster_engine(longer) == "numpy"
    [record] = tmp_path.iterdir()
    record.write_text(json.dumps([]))  # damaged: measured anew
    assert choose.faster_engine(config) == "numba"
    rates.append({"numba": 3.0, "numpy": 4.0})  # with other cores it is another question
    monkeypatch.setattr(choose, "usable_cores", lambda: 999)
    assert choose.faster_engine(config) == "numpy"


def test_both_engines_are_really_measured() -> None:
    from glassgpt.inference.engines.choose import measure

    rates = measure(tiny_config("modern"))
    assert set(rates) == {"numba", "numpy"}
    assert min(rates.values()) > 0
