"""inference/engines/gpu.py gives the logits of the reference engine, whatever its rows were.

On the CPU, and on a GPU where there is one.
"""

from __future__ import annotations

import shutil
import warnings
from collections.abc import Iterator
from dataclasses import replace

import numpy as np
import pytest
import torch

from conftest import long_texts, tiny_config, tiny_model
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError
from glassgpt.inference.engines import Engine, gpu
from glassgpt.inference.engines.gpu import GpuEngine
from glassgpt.inference.engines.reference import ReferenceEngine
from glassgpt.model import CausalSelfAttention, attention_by_hand

CONTEXT = 31  # 32 places: one more than a full text
CONFIGS = {
    "gpt2": tiny_config("gpt2", context_length=CONTEXT),
    "qwen3": tiny_config("modern", context_length=CONTEXT),
    "llama": tiny_config(
        "modern", context_length=CONTEXT, qk_norm=False, n_kv_head=1, tie_embeddings=False
    ),
    "bigram": tiny_config("modern", context_length=CONTEXT, n_layer=0),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
GPUS = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available()}
every_device = pytest.mark.parametrize("device", ["cpu", *(name for name in GPUS if GPUS[name])])
needs_a_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")),
    reason="left out: torch.compile needs a C++ compiler here",
)


@pytest.fixture(autouse=True)
def small_sizes(monkeypatch: pytest.MonkeyPatch) -> None:
    """So small that tiny texts grow out of them."""
    monkeypatch.setattr(gpu, "_FIRST_CAPACITY", 8)
    monkeypatch.setattr(gpu, "_BLOCK", 6)
    monkeypatch.setattr(gpu, "_PASS_TOKENS", 13)


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch.compiler.reset()


def pair(config: ModelConfig, device: str = "cpu", **options: bool) -> tuple[Engine, GpuEngine]:
    model = tiny_model(config).to(device)
    return ReferenceEngine(model), GpuEngine(model, **{"compile": False, **options})


def both_read(engines: tuple[Engine, GpuEngine], rows, tokens, every: bool = False) -> np.ndarray:
    expected, logits = (engine.read(rows, tokens, every=every) for engine in engines)
    assert logits.dtype == np.float32
    assert logits.shape == expected.shape
    np.testing.assert_allclose(logits, expected, rtol=0, atol=1e-4)
    return logits


def random_texts(rng: np.random.Generator, *lengths: int) -> list[np.ndarray]:
    return [rng.integers(37, size=n) for n in lengths]


# -- the same as the reference -------------------------------------------------------------------


@every_device
@every_config
@pytest.mark.parametrize("seed", range(3))
def test_any_history_is_that_of_the_reference(config: ModelConfig, seed: int, device: str) -> None:
    engines = pair(config, device)
    rng = np.random.default_rng(seed)
    for n_rows in (5, 5, 2):
        lengths = [0] * n_rows
        for engine in engines:
            engine.open(n_rows)
        for _ in range(25):
            row = int(rng.integers(n_rows))
            match rng.integers(6):
                case 0:
                    lengths[row] = int(rng.integers(lengths[row] + 1))
                    for engine in engines:
                        engine.rewind(row, lengths[row])
                case 1:
                    targets = [i for i in range(n_rows) if i != row and rng.random() < 0.5]
                    for engine in engines:
                        engine.copy(row, targets)
                    lengths = [lengths[row if i in targets else i] for i in range(n_rows)]
                case kind:
                    most = 1 if kind < 4 else 20
                    rows = [int(i) for i in rng.permutation(n_rows) if lengths[i] < CONTEXT]
                    rows = rows[: rng.integers(1, n_rows + 1)]
                    new = [int(rng.integers(min(most, CONTEXT - lengths[i]))) + 1 for i in rows]
                    if rows:
                        texts = random_texts(rng, *new)
                        both_read(engines, rows, texts, every=bool(rng.integers(2)))
                    for i, n in zip(rows, new, strict=True):
                        lengths[i] += n
            assert engines[1].lengths == lengths


@every_device
@every_config
def test_a_whole_batch_in_step(config: ModelConfig, device: str) -> None:
    engines, rng = pair(config, device), np.random.default_rng(1)
    for engine in engines:
        engine.open(4)
    both_read(engines, range(4), random_texts(rng, 7, 1, 3, 12))
    for _ in range(CONTEXT - 12):
        both_read(engines, range(4), random_texts(rng, 1, 1, 1, 1))


@every_device
@pytest.mark.parametrize("shape", ["gpt2", "qwen3"])
def test_rows_not_listed_are_left_alone(shape: str, device: str) -> None:
    """To the last bit, also where a row is empty, or as full as can be."""
    _, engine = pair(CONFIGS[shape], device)
    rng = np.random.default_rng(2)
    engine.open(4)
    engine.read([0, 1, 3], random_texts(rng, 5, CONTEXT, 2))
    before = [keys[1, :, :CONTEXT].clone() for keys in (*engine.keys, *engine.values)]
    engine.read([0, 3], random_texts(rng, 1, 1))
    engine.read([3, 0], random_texts(rng, 4, 9))
    engine.read([2], random_texts(rng, 1))
    after = [keys[1, :, :CONTEXT] for keys in (*engine.keys, *engine.values)]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert engine.lengths == [15, CONTEXT, 1, 7]


@every_config
def test_attention_by_hand_sees_the_same_rows(
    config: ModelConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, rng = pair(config), np.random.default_rng(3)
    for engine in engines:
        engine.open(2)
    monkeypatch.setattr(CausalSelfAttention, "attend", staticmethod(attention_by_hand))
    both_read(engines, [0, 1], random_texts(rng, 3, 9), every=True)
    both_read(engines, [1, 0], random_texts(rng, 1, 1))
    both_read(engines, [1, 0], random_texts(rng, 2, 8), every=True)


def test_bfloat16_stays_bfloat16() -> None:
    model = tiny_model(CONFIGS["qwen3"]).bfloat16()
    engines = ReferenceEngine(model), GpuEngine(model)
    assert engines[1].name == "cpu bfloat16"
    assert engines[1].bytes_per_token == 2 * model.config.n_decoding_weights
    for engine in engines:
        engine.open(2)
    texts = random_texts(np.random.default_rng(4), 9, 4)
    expected, logits = (engine.read([0, 1], texts) for engine in engines)
    assert logits.dtype == np.float32
    assert engines[1].keys[0].dtype == torch.bfloat16
    np.testing.assert_allclose(logits, expected, atol=0.1)


def test_a_model_in_training_is_read_without_dropout() -> None:
    config = tiny_config("modern", context_length=CONTEXT, dropout=0.5)
    engines = pair(config)
    engines[1].model.train()
    for engine in engines:
        engine.open(1)
    both_read(engines, [0], random_texts(np.random.default_rng(5), 9))
    both_read(engines, [0], random_texts(np.random.default_rng(6), 1))
    assert engines[1].model.training


# -- memory --------------------------------------------------------------------------------------


def test_the_memory_grows_with_the_longest_text_and_is_used_again() -> None:
    _, engine = pair(CONFIGS["gpt2"])
    rng, capacities = np.random.default_rng(7), []
    engine.open(3)
    for _ in range(CONTEXT):
        engine.read([1], random_texts(rng, 1))
        capacities.append(engine.capacity)
    # One place more than the text, which no text uses; never much more than the context.
    assert capacities == [8] * 7 + [16] * 8 + [32] * 16
    assert engine.keys[0].shape == (4, 3, 32, 5)
    before = engine.keys[0].data_ptr()
    engine.open(4)
    engine.read([0], random_texts(rng, 1))
    assert engine.keys[0].data_ptr() == before
    engine.open(1)
    engine.read([0], random_texts(rng, 1))
    assert engine.keys[0].shape == (1, 3, 8, 5)


def test_the_last_growth_is_to_the_context(monkeypatch: pytest.MonkeyPatch) -> None:
    """Not to the next power of two, and not once more for the last token."""
    config = tiny_config("gpt2", context_length=33)
    _, engine = pair(config)
    engine.open(1)
    engine.read([0], random_texts(np.random.default_rng(8), 32))
    assert engine.capacity == 40
    engine.read([0], random_texts(np.random.default_rng(8), 1))
    assert engine.capacity == 40


def test_more_than_the_context_is_refused() -> None:
    _, engine = pair(CONFIGS["gpt2"])
    engine.open(2)
    engine.read([1], random_texts(np.random.default_rng(9), CONTEXT))
    with pytest.raises(AssertionError, match="32 positions, but the context is 31"):
        engine.read([0, 1], random_texts(np.random.default_rng(9), 1, 1))
    assert engine.lengths == [0, CONTEXT]


@pytest.mark.parametrize("n", [1, 6])
def test_out_of_memory_is_explained_and_changes_nothing(
    n: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    engines, rng = pair(CONFIGS["gpt2"]), np.random.default_rng(10)
    for engine in engines:
        engine.open(2)
    both_read(engines, [0, 1], random_texts(rng, 5, 3))
    engines[1].model.train()

    def no_memory(*arguments, **options):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3 GiB")

    with monkeypatch.context() as patch:
        patch.setattr(gpu, "_to_host", no_memory)
        with pytest.raises(UserError, match=f"^2 texts of up to {5 + n} tokens do not fit"):
            engines[1].read([0, 1], random_texts(rng, n, n))
    assert engines[1].model.training
    assert engines[1].lengths == [5, 3]
    both_read(engines, [0, 1], random_texts(rng, 1, 1))


def test_passes_cover_every_token_once_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    rng = np.random.default_rng(11)
    for _ in range(50):
        lengths = [int(n) for n in rng.integers(1, 30, size=rng.integers(1, 9))]
        read = [0] * len(lengths)
        for members, block in gpu._passes(lengths):
            width = block.stop - block.start
            assert width <= 6
            assert len(members) * width <= 13
            for i in members:
                assert read[i] == block.start
                read[i] = min(lengths[i], block.stop)
        assert read == lengths


# -- compiled ------------------------------------------------------------------------------------


@pytest.mark.slow
@needs_a_compiler
@every_device
@pytest.mark.parametrize("shape", ["gpt2", "qwen3"])
@pytest.mark.usefixtures("fresh_compiler")
def test_a_compiled_step_is_compiled_once(
    shape: str, device: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gpu, "_FIRST_CAPACITY", 16)
    engines = pair(CONFIGS[shape], device, compile=True)
    counts = torch._dynamo.utils.counters["stats"]
    rng = np.random.default_rng(12)
    for engine in engines:
        engine.open(3)
    both_read(engines, [0, 1, 2], random_texts(rng, 1, 2, 2))
    assert counts["unique_graphs"] == 0  # many tokens at once are not
    both_read(engines, [0, 1, 2], random_texts(rng, 1, 1, 1))
    assert counts["unique_graphs"] == 1
    with torch._dynamo.config.patch(error_on_recompile=True):
        for rows in ([0, 1, 2], [2, 0], [2], [1, 2]):
            both_read(engines, rows, random_texts(rng, *[1] * len(rows)))
        for engine in engines:
            engine.rewind(1, 2)
            engine.copy(1, [0])
        both_read(engines, [0, 1, 2], random_texts(rng, 1, 1, 1))
        for engine in engines:
            engine.open(4)
        both_read(engines, [3, 0], random_texts(rng, 1, 1))
        both_read(engines, [3, 0], random_texts(rng, 2, 3))
        both_read(engines, [3, 0], random_texts(rng, 1, 1))
    assert counts["unique_graphs"] == 1


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.usefixtures("fresh_compiler")
def test_any_number_of_sizes_is_compiled() -> None:
    """Torch would refuse after 8 of them, here after 1."""
    engines = pair(CONFIGS["bigram"], compile=True)
    rng = np.random.default_rng(13)
    with torch._dynamo.config.patch(recompile_limit=1):
        for engine in engines:
            engine.open(4)
        for rows in ([0], [1], [3]):
            both_read(engines, rows, random_texts(rng, 1))
        both_read(engines, [0], random_texts(rng, 9))
        both_read(engines, [0], random_texts(rng, 1))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] == 4


def test_where_compiling_fails_it_is_done_without(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken():
        def run(*arguments):
            raise AssertionError("no C compiler\nand more")

        return run

    monkeypatch.setattr(gpu, "_compiled", broken)
    monkeypatch.setattr(gpu, "_can_compile", lambda device: True)
    model, rng = tiny_model(CONFIGS["gpt2"]), np.random.default_rng(14)
    engines = ReferenceEngine(model), GpuEngine(model)
    for engine in engines:
        engine.open(1)
    with pytest.warns(UserWarning, match=r"does not work here \(no C compiler\); decoding goes on"):
        both_read(engines, [0], random_texts(rng, 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        both_read(engines, [0], random_texts(rng, 1))
    engine = GpuEngine(model, compile=True)
    engine.open(1)
    with pytest.raises(AssertionError, match="no C compiler"):
        engine.read([0], random_texts(rng, 1))


def test_only_cuda_with_triton_compiles_by_itself(monkeypatch: pytest.MonkeyPatch) -> None:
    there = [False]
    monkeypatch.setattr(gpu.importlib.util, "find_spec", lambda name: there[0] or None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (8, 0))
    assert not gpu._can_compile(torch.device("cuda"))
    there[0] = True
    assert gpu._can_compile(torch.device("cuda"))
    assert not gpu._can_compile(torch.device("mps"))
    assert not gpu._can_compile(torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (6, 1))
    assert not gpu._can_compile(torch.device("cuda"))


@pytest.mark.slow
@every_device
@pytest.mark.parametrize("context", [13, 250])
@pytest.mark.parametrize("name", ["gpt2", "qwen3", "llama"])
def test_texts_are_the_references(name: str, context: int, device: str) -> None:
    """200 greedy tokens and samples of a seed, in a context that slides and one that holds all."""
    both = pair(replace(CONFIGS[name], context_length=context), device)
    expected, found = map(long_texts, both)
    assert found == expected


@every_device
def test_two_texts_at_a_time(device: str) -> None:
    """`another` shares the weights; what one reads is no business of the other."""
    first, second = pair(CONFIGS["qwen3"], device)
    first, alone = second.another(), first
    for engine in (alone, first, second):
        engine.open(1)
    text, other = np.arange(9), np.arange(9)[::-1].copy()
    for i in range(9):
        expected = alone.read([0], [text[i : i + 1]])
        second.read([0], [other[i : i + 1]])
        np.testing.assert_allclose(first.read([0], [text[i : i + 1]]), expected, rtol=0, atol=1e-4)
