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
from glassgpt.training import step as step_module
from glassgpt.training.fused.step import FusedStep
from glassgpt.training.step import AutogradStep, StepPlan, TrainingStep, share_weights
from listener import Listener

ROWS, T = 6, 11
HERE = runtime.Machine(torch.device("cpu"), torch.float32)
Gradients = dict[str, torch.Tensor]


def fusible(**fields: Any) -> ModelConfig:
    return tiny_config(n_kv_head=6, **fields)


WAYS: dict[str, Callable[..., ModelConfig]] = {
    "fused": fusible,
    "grouped-queries": tiny_config,
    "gpt2": lambda **fields: tiny_config("gpt2", **fields),
}
every_way = pytest.mark.parametrize("way", WAYS)


def make_step(way: str, *, threads: int = 1, said: list[str] | None = None,
                dropout: float = 0.0, **options: Any) -> TrainingStep:  # fmt: skip
    """In float32, for ROWS rows; every call makes the same weights."""
    options = {"dtype": "float32", "device": "cpu", "threads": threads, **options}
    options["batch_tokens"] = ROWS * tiny_config().context_length
    config, reporter = TrainConfig(**options), Listener()
    if said is not None:
        reporter.said = said
    model = tiny_model(WAYS[way](dropout=dropout)).train()
    made = TrainingStep(model, config, runtime.start(config), reporter=reporter)
    assert isinstance(made.steps[0], FusedStep) is (way == "fused" and config.compile != "on")
    return made


def rows(seed: int = 3) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and targets (ROWS, T); of the last row, none carries loss."""
    generator = np.random.default_rng(seed)
    tokens, targets = generator.integers(0, 37, (2, ROWS, T))
    targets[generator.random((ROWS, T)) < 0.2] = IGNORE
    targets[-1] = IGNORE
    return tokens, targets


def gradients(step: TrainingStep, key: int = 0) -> tuple[float, Gradients]:
    """Of a step, taken away from the model."""
    loss = step.gradients(rows(), key).item()
    found = {n: p.grad for n, p in step.model.named_parameters() if p.grad is not None}
    assert len(found) == len(list(step.model.parameters()))
    step.model.zero_grad(set_to_none=True)
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
        step = make_step(way)
        tokens, targets = rows()
        logits = step.model(torch.from_numpy(tokens)).flatten(0, 1)
        loss = torch.nn.functional.cross_entropy(logits, torch.from_numpy(targets).flatten(),
                                                 ignore_index=IGNORE)  # fmt: skip
        loss.backward()
        expected = {n: p.grad for n, p in step.model.named_parameters() if p.grad is not None}
        step.model.zero_grad(set_to_none=True)
        assert_same(gradients(step), (loss.item(), expected))
        assert step.losses((tokens, targets)) == pytest.approx(
            loss.item() * np.count_nonzero(targets != IGNORE), rel=1e-5
        )


@every_way
@pytest.mark.parametrize("at_once", [1, 4, 5])
def test_accumulation_is_the_big_batch(way, at_once):
    assert_same(gradients(make_step(way, micro_batch_size=at_once)), gradients(make_step(way)))


@every_way
@pytest.mark.parametrize("threads", [2, 4])
def test_rows_on_several_cores_are_the_rows_on_one(way, threads):
    """micro_batch_size=5: the second share of rows is one row, for the first thread."""
    one = gradients(make_step(way))
    step = make_step(way, threads=threads, micro_batch_size=5)
    assert len(step.steps) == step.workers.n == threads
    for _ in range(2):  # and again, with gradients and rooms that were in use
        assert_same(gradients(step), one)
        leftovers = [p.grad for model in step.models[1:] for p in model.parameters()]
        assert leftovers == [None] * len(leftovers)
    assert step.losses(rows()) == pytest.approx(make_step(way).losses(rows()), rel=1e-6)
    step.close()


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


def test_workers_keep_the_order_and_wait_for_all():
    workers, done = runtime.Workers(3), []
    squares = [workers.submit(pow, i, 2) for i in range(7)]
    assert workers.results(squares) == [i * i for i in range(7)]

    def late() -> None:
        time.sleep(0.05)
        done.append(True)

    with pytest.raises(ZeroDivisionError):
        workers.results([workers.submit(divmod, 1, 0), workers.submit(late)])
    assert done
    workers.close()


@pytest.mark.slow
@every_way
@pytest.mark.parametrize("threads", [1, 2])
def test_out_of_memory_halves_the_micro_batch_and_keeps_the_step(monkeypatch, way, threads):
    """The allocator's own error, raised where it would be; a real one is in tests/e2e."""
    whole, said, most, held = gradients(make_step(way)), [], 2, []

    class Memory:
        pass

    step = make_step(way, threads=threads, said=said)
    for kind in (FusedStep, AutogradStep):

        def call(share_step, batch, *arguments, real=kind.__call__):
            size = step.plan.micro_batch_size
            assert not any(memory() for before, memory in held if before > size)
            if len(batch[0]) > most:
                mine = Memory()
                held.append((size, weakref.ref(mine)))
                raise torch.OutOfMemoryError("out of memory")
            loss = real(share_step, batch, *arguments)
            if size == ROWS:  # another way to end: half-way
                raise RuntimeError("DefaultCPUAllocator: can't allocate memory")
            return loss

        monkeypatch.setattr(kind, "__call__", call)
    assert_same(gradients(step), whole)
    sizes = [3, 2] if threads == 1 else [3]  # rows of both threads together
    assert step.plan.micro_batch_size == step.fits_in_memory == sizes[-1]
    assert said == [f"out of memory: going on with micro_batch_size={size}, same tokens per step"
                    for size in sizes]  # fmt: skip
    most = 0
    with pytest.raises(UserError, match="smaller --micro-batch-size"):
        gradients(step)
    step.close()


@pytest.mark.slow
def test_an_evaluation_that_ends_the_memory_takes_fewer_rows_and_other_errors_pass(monkeypatch):
    step, asked = make_step("fused"), []
    expected, real = step.losses(rows()), step_module.summed_loss
    batch = [np.concatenate([array] * 4) for array in rows()]

    def summed_loss(loss: Any, rows: Any, machine: Any) -> torch.Tensor:
        asked.append(len(rows[0]))
        if len(rows[0]) > 13:
            raise MemoryError
        return real(loss, rows, machine)

    monkeypatch.setattr(step_module, "summed_loss", summed_loss)
    assert step.evaluation_rows == 24
    assert step.losses(batch) == pytest.approx(4 * expected)
    assert asked == [24, 12, 12]  # four times the rows of a step, then of half of it
    assert step.plan.micro_batch_size == 3
    monkeypatch.setattr(step_module, "summed_loss", lambda *_: 1 // 0)
    with pytest.raises(ZeroDivisionError):
        step.losses(batch)


# -- dropout -------------------------------------------------------------------------------------


@pytest.mark.parametrize("threads", [1, 2])
def test_evaluation_keeps_no_graph(monkeypatch, threads):
    """In no thread: each has a switch of its own."""
    step, kept = make_step("fused", threads=threads), []
    real = step_module.summed_loss
    monkeypatch.setattr(
        step_module, "summed_loss", lambda *a: kept.append((loss := real(*a)).requires_grad) or loss
    )
    step.losses(rows())
    assert kept == [False] * threads
    step.close()


@every_way
def test_evaluation_drops_nothing(way):
    step = make_step(way, dropout=0.5)
    expected = make_step(way).losses(rows())
    first = step.losses(rows())
    assert first == pytest.approx(expected, rel=1e-6)
    assert all(model.training for model in step.models)
    n_targets = np.count_nonzero(rows()[1] != IGNORE)
    torch.manual_seed(1)
    assert abs(gradients(step)[0] * n_targets - expected) > 1e-3 * expected


def test_seeds_are_those_of_splitmix64():
    """The generator's first output from the state 0, as published with it; order matters."""
    assert runtime.seed_of(0) == 0xE220A8397B1DCDAF
    seeds = {runtime.seed_of(*numbers) for numbers in [(1, 2), (2, 1), (1,), (1, 2, 0), (-1, 2)]}
    assert len(seeds) == 5
    assert all(0 <= seed < 1 << 64 for seed in seeds)


def test_fused_dropout_is_a_function_of_the_key_in_every_thread():
    """Whoever is faster, and whatever torch's generator says; each micro-batch drops others."""
    step = make_step("fused", dropout=0.3, threads=2)
    first, again, other = (gradients(step, key) for key in (1, 1, 2))
    assert first[0] == again[0] != other[0]
    assert all(torch.equal(first[1][name], again[1][name]) for name in first[1])
    step.close()
    seen = []
    step = make_step("fused", dropout=0.3, micro_batch_size=2)
    [share_step] = step.steps
    step.steps = [lambda *a: seen.append(a[2]) or share_step(*a)]  # type: ignore[list-item]
    step.gradients(rows(), key=1)
    assert len(set(seen)) == 3


# -- the plan ------------------------------------------------------------------------------------


def test_more_threads_than_rows_or_memory_do_not_pay():
    large = ModelConfig.from_shape("gpt2", vocab_size=50257, n_layer=12, n_head=12, n_embd=768)

    def workers(model: ModelConfig, threads: int, rows: int) -> int:
        torch.set_num_threads(threads)
        train = TrainConfig(batch_tokens=rows * model.context_length, compile="off")
        return StepPlan.decide(model, train, HERE).workers

    assert workers(tiny_config("gpt2"), 16, 5) == 5
    assert workers(large, 2, 12) == 2
    assert workers(large, 16, 64) == 1


@pytest.mark.parametrize("threads", [1, 2, 3])
@pytest.mark.parametrize("n", [1, 2, 5])
@pytest.mark.parametrize("options", [{}, {"micro_batch_size": 2}, {"dtype": "float32"},
                                     {"compile": "on"}])  # fmt: skip
def test_the_plan_is_followed(threads, n, options):
    for config in [fusible(), tiny_config("gpt2", dropout=0.1), tiny_config(), fusible(n_layer=0)]:
        torch.set_num_threads(threads)
        train = TrainConfig(batch_tokens=n * config.context_length, **options)
        plan = StepPlan.decide(config, train, HERE)
        step = TrainingStep(GPT(config), train, HERE)
        step.close()
        assert step.plan == plan
        assert plan.fused == isinstance(step.steps[0], FusedStep)
        assert (plan.rows, plan.micro_batch_size) == (n, min(n, options.get("micro_batch_size", n)))
        assert len(step.steps) == len(step.models) == step.workers.n == plan.workers
        if step.weights is not None:
            assert str(step.weights.dtype) == f"torch.{plan.precision}"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "auto"])
def test_the_precision_asked_for(dtype):
    step = make_step("fused", dtype=dtype)
    low = dtype == "bfloat16" or (dtype == "auto" and step_module.multiplies_bfloat16())
    assert step.plan.precision == ("bfloat16" if low else "float32")
    assert step.weights is not None
    assert step.weights.head.dtype == (torch.bfloat16 if low else torch.float32)
    assert make_step("gpt2").plan.precision == "float32"


def test_changed_weights_are_seen():
    step = make_step("fused", threads=2)
    with torch.no_grad():
        for parameter in step.model.parameters():
            parameter.mul_(0.9)
    step.weights_changed()
    changed = gradients(step)
    del step.models[1:]
    step.steps = [AutogradStep(step.plain_losses[0], step.machine, step.scaler)]
    assert_same(changed, gradients(step))
    step.close()


@every_way
def test_getting_ready_leaves_no_gradients(way):
    said: list[str] = []
    step = make_step(way, threads=2, said=said)
    step.compile(rows())
    assert all(p.grad is None for model in step.models for p in model.parameters())
    assert not any("warning" in line for line in said)
    assert_same(gradients(step), gradients(make_step(way)))
    step.close()


def test_without_numba_autograd_does_it_and_says_nothing(monkeypatch):
    expected = gradients(make_step("fused"))
    monkeypatch.setitem(sys.modules, "numba", None)
    load_kernels.cache_clear()
    config = TrainConfig(
        dtype="float32", device="cpu", threads=2, batch_tokens=ROWS * tiny_config().context_length
    )
    reporter = Listener()
    step = TrainingStep(tiny_model(fusible()).train(), config, runtime.start(config), 
                    reporter=reporter)  # fmt: skip
    step.compile(rows())
    assert [type(step) for step in step.steps] == [AutogradStep] * 2
    assert step.plan.precision == "float32"
    assert_same(gradients(step), expected)
    assert not reporter.said
    step.close()


@pytest.mark.parametrize(("dropout", "steps"), [(0.0, 2), (0.3, 1)])
def test_a_compiler_that_fails_leaves_autograd_on_all_cores(monkeypatch, dropout, steps):
    """On one with dropout, where threads would draw from torch's generator in any order."""
    said: list[str] = []
    step = make_step("fused", threads=2, said=said, dropout=dropout)

    def fail(*arguments: Any) -> None:
        raise SystemError("no LLVM")

    monkeypatch.setattr(FusedStep, "__call__", fail)
    step.compile(rows())
    assert [type(step) for step in step.steps] == [AutogradStep] * steps
    assert said[-1] == ("warning: the fused step does not work here (numba can't compile: "
                        "no LLVM); training goes on without it")  # fmt: skip
    step.weights_changed()
    monkeypatch.undo()
    found = gradients(step)
    assert dropout or assert_same(found, gradients(make_step("fused"))) is None
    step.close()


@pytest.mark.parametrize("when", ["wrapping", "calling"])
def test_a_torch_compile_that_fails_leaves_what_was_there(monkeypatch, when):
    """Also what averages gradients over processes, which the model itself would not."""
    said: list[str] = []
    step = make_step("fused", compile="on", said=said)

    def fail(*arguments: Any, **options: Any) -> None:
        raise RuntimeError("no compiler\nat all")

    def compile(model: Any, **options: Any) -> Any:
        return fail if when == "calling" else fail()

    [share_step] = step.steps
    assert isinstance(share_step, AutogradStep)
    share_step.loss = wrapped = lambda *batch: step.plain_losses[0](*batch)
    monkeypatch.setattr(torch, "compile", compile)
    step.compile(rows())
    assert said == ["warning: torch.compile does not work here (no compiler); training goes on "
                    "without it"]  # fmt: skip
    assert step.steps[0].loss is wrapped  # type: ignore[attr-defined]
    assert not step.compiled
    assert_same(gradients(step), gradients(make_step("fused")))
