"""Gradients and losses of a batch: the same however its rows are cut and spread over threads."""

from __future__ import annotations

import sys
import time
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch

from conftest import tiny_config, tiny_model
from glassgpt import runtime
from glassgpt.config import ModelConfig, TrainConfig
from glassgpt.data.batches import IGNORE
from glassgpt.errors import UserError
from glassgpt.inference.kernels.compiled import load_kernels
from glassgpt.model import GPT
from glassgpt.training import step as room
from glassgpt.training.fused.step import FusedStep
from glassgpt.training.planning.costs import useful_workers
from glassgpt.training.step import AutogradStep, Passes
from glassgpt.training.workers import Workers, share_weights
from listener import Listener

ROWS, T = 6, 11
Gradients = dict[str, torch.Tensor]


def fusible(**fields: Any) -> ModelConfig:
    return tiny_config(n_kv_head=6, **fields)


WAYS: dict[str, Callable[..., ModelConfig]] = {
    "fused": fusible,
    "grouped-queries": tiny_config,
    "gpt2": lambda **fields: tiny_config("gpt2", **fields),
}
every_way = pytest.mark.parametrize("way", WAYS)


def make_passes(way: str, *, threads: int = 1, said: list[str] | None = None,
                dropout: float = 0.0, **options: Any) -> Passes:  # fmt: skip
    """In float32, for ROWS rows; every call makes the same weights."""
    options = {"dtype": "float32", "device": "cpu", "threads": threads, **options}
    config, reporter = TrainConfig(**options), Listener()
    if said is not None:
        reporter.said = said
    model = tiny_model(WAYS[way](dropout=dropout)).train()
    made = Passes(model, config, runtime.start(config), rows=ROWS, reporter=reporter)
    assert isinstance(made.steps[0], FusedStep) is (way == "fused" and config.compile != "on")
    return made


def rows(seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets (ROWS, T); of the last row, none carries loss."""
    generator = np.random.default_rng(seed)
    tokens, targets = generator.integers(0, 37, (2, ROWS, T))
    targets[generator.random((ROWS, T)) < 0.2] = IGNORE
    targets[-1] = IGNORE
    return tokens, targets


def gradients(passes: Passes, key: int = 0) -> tuple[float, Gradients]:
    """Of a step, taken away from the model."""
    loss = passes.gradients(*rows(), key=key).item()
    found = {n: p.grad for n, p in passes.model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(passes.model.parameters()))
    passes.model.zero_grad(set_to_none=True)
    return loss, found


def assert_same(found: tuple[float, Gradients], expected: tuple[float, Gradients]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        assert gradient.abs().max() > 1e-4, name
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_every_way_gives_the_mean_over_the_targets_that_count():
    """By hand, for the shape that is fused; the others are asked in the same words."""
    for way in WAYS:
        passes = make_passes(way)
        tokens, targets = rows()
        logits = passes.model(torch.from_numpy(tokens)).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets).flatten(),
                                                 ignore_index=IGNORE)  # fmt: skip
        loss.backward()
        expected = {n: p.grad for n, p in passes.model.named_parameters() if p.grad is not None}
        passes.model.zero_grad(set_to_none=True)
        assert_same(gradients(passes), (loss.item(), expected))
        assert passes.losses(tokens, targets) == pytest.approx(
            loss.item() * np.count_nonzero(targets != IGNORE), rel=1e-5
        )


@every_way
@pytest.mark.parametrize("at_once", [1, 4, 5])
def test_accumulation_is_the_big_batch(way, at_once):
    assert_same(gradients(make_passes(way, micro_batch_size=at_once)), gradients(make_passes(way)))


@every_way
@pytest.mark.parametrize("threads", [2, 4])
def test_rows_on_several_cores_are_the_rows_on_one(way, threads):
    """micro_batch_size=5: the second share of rows is one row, for the first thread."""
    one = gradients(make_passes(way))
    passes = make_passes(way, threads=threads, micro_batch_size=5)
    assert len(passes.steps) == passes.workers.n == threads
    for _ in range(2):  # and again, with gradients and rooms that were in use
        assert_same(gradients(passes), one)
        leftovers = [p.grad for step in passes.steps[1:] for p in step.model.parameters()]
        assert leftovers == [None] * len(leftovers)
    assert passes.losses(*rows()) == pytest.approx(make_passes(way).losses(*rows()), rel=1e-6)
    passes.close()


def test_steps_share_weights_not_gradients():
    model = GPT(tiny_config("gpt2"))
    other = share_weights(model)
    assert isinstance(other, GPT)
    with torch.no_grad():
        model.token_embedding.weight.add_(1.0)
    assert other.token_embedding.weight.data_ptr() == model.token_embedding.weight.data_ptr()
    assert other.head.weight is other.token_embedding.weight  # tied there, too
    other(torch.zeros(1, 1, dtype=torch.int64)).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    assert useful_workers(16, 5, 1000) == 5
    assert useful_workers(2, 12, 124_000_000) == 2
    assert useful_workers(16, 64, 124_000_000) == 1


def test_workers_keep_the_order_and_wait_for_all():
    workers, done = Workers(3), []
    assert workers.run([lambda i=i: i * i for i in range(7)]) == [i * i for i in range(7)]

    def late() -> None:
        time.sleep(0.05)
        done.append(True)

    with pytest.raises(ZeroDivisionError):
        workers.run([lambda: 1 // 0, late])
    assert done
    workers.close()


@pytest.mark.slow
@every_way
@pytest.mark.parametrize("threads", [1, 2])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(monkeypatch, way, threads):
    """The allocator's own error, raised where it would be; a real one is in tests/e2e."""
    whole, said, most, held = gradients(make_passes(way)), [], 2, []

    class Memory:
        pass

    passes = make_passes(way, threads=threads, said=said)
    for kind in (FusedStep, AutogradStep):

        def call(step, tokens, *arguments, real=kind.__call__):
            size = passes.micro_batch_size
            assert not any(memory() for before, memory in held if before > size)
            if len(tokens) > most:
                mine = Memory()
                held.append((size, weakref.ref(mine)))
                raise torch.OutOfMemoryError("out of memory")
            loss = real(step, tokens, *arguments)
            if size == ROWS:  # another way to end: half-way
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return loss

        monkeypatch.setattr(kind, "__call__", call)
    assert_same(gradients(passes), whole)
    sizes = [3, 2] if threads == 1 else [3]  # rows of both threads together
    assert passes.micro_batch_size == passes.fits_in_memory == sizes[-1]
    assert said == [f"out of memory: going on with micro_batch_size={size}, same tokens per step"
                    for size in sizes]  # fmt: skip
    most = 0
    with pytest.raises(UserError, match="smaller --micro-batch-size"):
        gradients(passes)
    passes.close()


@pytest.mark.slow
def test_an_evaluation_that_ends_the_memory_takes_fewer_rows_and_other_errors_pass():
    passes, asked = make_passes("fused"), []

    def work(n: int) -> int:
        asked.append(n)
        if n > 13:
            raise MemoryError
        return n

    assert passes.evaluate(work) == 12
    assert asked == [24, 12]  # four times the rows of a step, then of half of it
    assert passes.micro_batch_size == 3
    with pytest.raises(ZeroDivisionError):
        passes.evaluate(lambda n: n // 0)


# -- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_evaluation_keeps_no_graph(monkeypatch, threads):
    """In no thread: each has a switch of its own."""
    passes, kept = make_passes("fused", threads=threads), []
    real = room.summed_loss
    monkeypatch.setattr(
        room, "summed_loss", lambda *a: kept.append((loss := real(*a)).requires_grad) or loss
    )
    passes.losses(*rows())
    assert kept == [False] * threads
    passes.close()


@every_way
def test_evaluation_drops_nothing(way):
    passes = make_passes(way, dropout=0.5)
    expected = make_passes(way).losses(*rows())
    first = passes.evaluate(lambda n: passes.losses(*rows()))
    assert first == pytest.approx(expected, rel=1e-6)
    assert all(step.model.training for step in passes.steps)
    n_targets = np.count_nonzero(rows()[1] != IGNORE)
    torch.manual_seed(1)
    assert abs(gradients(passes)[0] * n_targets - expected) > 1e-3 * expected


def test_fused_dropout_is_a_function_of_the_key_in_every_thread():
    """Whoever is faster, and whatever torch's generator says; each micro-batch drops others."""
    passes = make_passes("fused", dropout=0.3, threads=2)
    first, again, other = (gradients(passes, key) for key in (1, 1, 2))
    assert first[0] == again[0] != other[0]
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    passes.close()
    seen = []
    passes = make_passes("fused", dropout=0.3, micro_batch_size=2)
    [step] = passes.steps
    passes.steps = [lambda *a: seen.append(a[3]) or step(*a)]  # type: ignore[list-item]
    passes.gradients(*rows(), key=1)
    assert len(set(seen)) == 3


# -- which way -----------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_the_precision_asked_for(dtype):
    passes = make_passes("fused", dtype=dtype)
    low = dtype == "bfloat16" or (dtype == "auto" and room.multiplies_bfloat16())
    assert passes.precision == ("bfloat16" if low else "float32")
    assert passes.weights is not None
    assert passes.weights.head.dtype == (torch.bfloat16 if low else torch.float32)
    assert make_passes("gpt2").precision == "float32"


def test_changed_weights_are_seen():
    passes = make_passes("fused", threads=2)
    with torch.no_grad():
        for parameter in passes.model.parameters():
            parameter.mul_(0.9)
    passes.weights_changed()
    changed = gradients(passes)
    passes.steps = [AutogradStep(passes.model, passes.machine, passes.scaler)]
    assert_same(changed, gradients(passes))
    passes.close()


@every_way
def test_getting_ready_leaves_no_gradients(way):
    said: list[str] = []
    passes = make_passes(way, threads=2, said=said)
    passes.compile(*rows())
    assert all(p.grad is None for step in passes.steps for p in step.model.parameters())
    assert not any("warning" in line for line in said)
    assert_same(gradients(passes), gradients(make_passes(way)))
    passes.close()


def test_without_numba_autograd_does_it_and_says_nothing(monkeypatch):
    expected = gradients(make_passes("fused"))
    monkeypatch.setitem(sys.modules, "numba", None)
    load_kernels.cache_clear()
    config = TrainConfig(dtype="float32", device="cpu", threads=2)
    reporter = Listener()
    passes = Passes(tiny_model(fusible()).train(), config, runtime.start(config), rows=ROWS,
                    reporter=reporter)  # fmt: skip
    passes.compile(*rows())
    assert [type(step) for step in passes.steps] == [AutogradStep] * 2
    assert passes.precision == "float32"
    assert_same(gradients(passes), expected)
    assert not reporter.said
    passes.close()


@pytest.mark.parametrize(("dropout", "steps"), [(0.0, 2), (0.3, 1)])
def test_a_compiler_that_fails_leaves_autograd_on_all_cores(monkeypatch, dropout, steps):
    """On one with dropout, where threads would draw from torch's generator in any order."""
    said: list[str] = []
    passes = make_passes("fused", threads=2, said=said, dropout=dropout)

    def fail(*arguments: Any) -> None:
        raise SystemError("no LLVM")

    monkeypatch.setattr(FusedStep, "__call__", fail)
    passes.compile(*rows())
    assert [type(step) for step in passes.steps] == [AutogradStep] * steps
    assert said[-1] == ("warning: the fused step does not work here (numba can't compile: "
                        "no LLVM); training goes on without it")  # fmt: skip
    passes.weights_changed()
    monkeypatch.undo()
    found = gradients(passes)
    assert dropout or assert_same(found, gradients(make_passes("fused"))) is None
    passes.close()


@pytest.mark.parametrize("when", ["wrapping", "calling"])
def test_a_torch_compile_that_fails_leaves_what_was_there(monkeypatch, when):
    """Also what averages gradients over processes, which the model itself would not."""
    said: list[str] = []
    passes = make_passes("fused", compile="on", said=said)

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no compiler\nat all")

    def compile(model: Any, **options: Any) -> Any:
        return fail if when == "calling" else fail()

    [step] = passes.steps
    assert isinstance(step, AutogradStep)
    step.called = wrapped = lambda *batch: step.plain(*batch)
    monkeypatch.setattr(torch, "compile", compile)
    passes.compile(*rows())
    assert said == ["warning: torch.compile does not work here (no compiler); training goes on "
                    "without it"]  # fmt: skip
    assert passes.steps[0].called is wrapped  # type: ignore[attr-defined]
    assert not passes.compiled
    assert_same(gradients(passes), gradients(make_passes("fused")))
