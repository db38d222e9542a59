"""loss.py: the plain cross-entropy and its gradients, however little memory it is given."""

from __future__ import annotations

import copy
import dataclasses
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from conftest import tiny_config, tiny_model
from glassgpt.model import GPT
from glassgpt.training.loss import NextTokenLoss

B, T, V = 5, 11, 211
CHUNK = 21 * V  # 55 rows make four chunks: three of 14, and one of 13
PLAIN: dict[str, Any] = dict(chunk_logits=B * T * V, pad_vocab_to=None)
OPTIONS: dict[str, dict[str, Any]] = {
    "one chunk": PLAIN,
    "chunked": {**PLAIN, "chunk_logits": CHUNK},
    "row by row": {**PLAIN, "chunk_logits": 1},
    "padded": {**PLAIN, "chunk_logits": 2 * B * T * V, "pad_vocab_to": 8},
    "recomputed": {**PLAIN, "recompute": True},
    "all": {"chunk_logits": CHUNK, "pad_vocab_to": 8, "recompute": True},
}
MODELS = {
    "gpt2": tiny_config("gpt2", vocab_size=V),
    "modern": tiny_config("modern", vocab_size=V),
    "untied": tiny_config("modern", vocab_size=V, tie_embeddings=False),
}
every_option = pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
every_model = pytest.mark.parametrize("config", MODELS.values(), ids=MODELS)
needs_a_compiler = pytest.mark.skipif(
    not (shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")),
    reason="left out: torch.compile needs a C++ compiler here",
)
LossFunction = Callable[[torch.Tensor, torch.Tensor], torch.Tensor]


def batch(seed: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    """Tokens, and targets of which here and there, and in the whole third chunk, none counts."""
    generator = torch.Generator().manual_seed(seed)
    tokens, targets = torch.randint(V, (2, B, T), generator=generator)
    targets[0, 3] = targets[4, 10] = -100
    targets.view(-1)[27:43] = -100
    return tokens, targets


def plain(model: GPT) -> LossFunction:
    def loss(tokens: torch.Tensor, targets: torch.Tensor) -> torch.Tensor:
        logits = model(tokens).float().flatten(0, 1)
        return F.cross_entropy(logits, targets.flatten(), ignore_index=-100, reduction="sum")

    return loss


def step(
    loss: LossFunction, model: GPT, scale: float = 0.125, dtype: torch.dtype | None = None
) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """The loss, and the gradients of its `scale`-fold (exact: a power of two)."""
    model.zero_grad(set_to_none=True)
    with torch.autocast("cpu", dtype=dtype, enabled=dtype is not None):
        value = loss(*batch())
    assert value.shape == ()
    assert value.dtype == torch.float32
    (scale * value).backward()
    gradients = {name: p.grad / scale for name, p in model.named_parameters() if p.grad is not None}
    return value.detach(), gradients


def assert_same(
    actual: tuple[torch.Tensor, dict[str, torch.Tensor]],
    expected: tuple[torch.Tensor, dict[str, torch.Tensor]],
    tolerance: float = 2e-6,
) -> None:
    """Relative to the size of the tensor: single small numbers are sums of large ones."""
    torch.testing.assert_close(actual[0], expected[0], rtol=tolerance, atol=0)
    assert actual[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        error = (actual[1][name] - gradient).norm() / gradient.norm()
        assert error < tolerance, f"{name}: {error:.1e}"


class LargestTensor(TorchDispatchMode):
    """Numbers in the largest tensor that any operation returned."""

    numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self.numbers = max(self.numbers, tensor.numel())
        return result


# -- the same numbers ----------------------------------------------------------------------------


@every_model
@every_option
def test_loss_and_gradients_are_those_of_the_plain_path(
    options: dict[str, Any], config: Any
) -> None:
    model = tiny_model(config).train()
    expected = step(plain(model), model)
    assert len(expected[1]) == len(list(model.parameters()))
    loss = NextTokenLoss(model, **options)
    assert_same(step(loss, model), expected)
    with torch.no_grad():
        torch.testing.assert_close(loss(*batch()), expected[0], rtol=1e-6, atol=0)


def test_one_chunk_is_the_plain_path_to_the_last_bit() -> None:
    model = tiny_model(MODELS["gpt2"])
    actual, expected = step(NextTokenLoss(model), model), step(plain(model), model)
    assert torch.equal(actual[0], expected[0])
    assert all(torch.equal(actual[1][name], expected[1][name]) for name in expected[1])


@every_option
def test_where_no_target_counts_nothing_is_learned(options: dict[str, Any]) -> None:
    model = tiny_model(MODELS["untied"]).train()
    loss = NextTokenLoss(model, **options)(batch()[0], torch.full((B, T), -100))
    loss.backward()
    assert loss == 0
    assert all(not p.grad.any() for p in model.parameters() if p.grad is not None)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@every_model
@pytest.mark.filterwarnings("ignore:Mismatch dtype")  # of RMSNorm under autocast on a CPU
def test_under_autocast(config: Any, dtype: torch.dtype) -> None:
    """Scaled as for float16: a gradient is taken before its scale is known."""
    model = tiny_model(config).train()
    rounding, scale = torch.finfo(dtype).eps, 2.0**12
    expected = step(plain(model), model, scale, dtype)
    for name, options in OPTIONS.items():
        actual = step(NextTokenLoss(model, **options), model, scale, dtype)
        assert_same(actual, expected, tolerance=2 * rounding)
        exact = name in ("one chunk", "recomputed")
        assert torch.equal(actual[0], expected[0]) or not exact


# -- less memory ---------------------------------------------------------------------------------


@every_model
def test_no_tensor_holds_the_logits_of_all_rows(config: Any) -> None:
    model = tiny_model(config)
    assert model.head.weight.numel() < CHUNK
    with LargestTensor() as seen:
        step(plain(model), model)
    assert seen.numbers == B * T * V
    for options in (OPTIONS["chunked"], OPTIONS["all"]):
        loss = NextTokenLoss(model, **options)
        with LargestTensor() as seen:
            step(loss, model)
            with torch.no_grad():
                loss(*batch())
        assert 14 * V <= seen.numbers <= CHUNK


def test_recomputing_keeps_the_input_of_each_block_and_no_more() -> None:
    def kept(n_layer: int, recompute: bool) -> int:
        model = tiny_model(tiny_config("modern", vocab_size=V, n_layer=n_layer)).train()
        numbers: list[int] = []

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            numbers.append(tensor.numel())
            return tensor

        NextTokenLoss(model, recompute=True)  # the latest word counts
        loss = NextTokenLoss(model, recompute=recompute)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss(*batch())
        return sum(numbers)

    block_input = B * T * 18
    assert kept(5, recompute=True) - kept(4, recompute=True) == block_input
    assert kept(5, recompute=False) - kept(4, recompute=False) > 10 * block_input


@every_model
def test_dropout_drops_the_same_numbers_again(config: Any) -> None:
    model = tiny_model(dataclasses.replace(config, dropout=0.3)).train()
    results = []
    for recompute in (False, True):
        loss = NextTokenLoss(model, **{**OPTIONS["chunked"], "recompute": recompute})
        torch.manual_seed(4)
        results.append(step(loss, model))
    assert_same(*results)
    torch.manual_seed(5)
    assert step(loss, model)[0] != results[0][0]


def test_the_model_stays_what_it_was() -> None:
    """Its names, its evaluation, and its copies: each of them recomputes its own blocks."""
    untouched, model = tiny_model(MODELS["modern"]), tiny_model(MODELS["modern"])
    loss = NextTokenLoss(model, recompute=True)
    assert list(model.state_dict()) == list(untouched.state_dict())
    assert {id(p) for p in loss.parameters()} == {id(p) for p in model.parameters()}
    tokens, _ = batch()
    assert torch.equal(model(tokens), untouched(tokens))
    other = copy.deepcopy(loss).train()
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.mul_(1.5)
    changed = copy.deepcopy(untouched).train()
    changed.load_state_dict(other.model.state_dict())
    assert_same(step(other, other.model), step(plain(changed), changed))
    assert torch.equal(model(tokens), untouched(tokens))
    assert all(p.grad is None for p in model.parameters())


# -- wrapped -------------------------------------------------------------------------------------


@pytest.fixture
def fresh_compiler() -> Iterator[None]:
    torch.compiler.reset()
    yield
    torch.compiler.reset()


@pytest.mark.slow
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_one_chunk_is_one_graph() -> None:
    model = tiny_model(MODELS["modern"]).train()
    loss: Any = NextTokenLoss(model, **{**OPTIONS["padded"], "recompute": True})
    traced = torch.compile(loss, dynamic=False, backend="aot_eager", fullgraph=True)
    assert_same(step(traced, model), step(plain(model), model))


@pytest.mark.slow
@needs_a_compiler
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.filterwarnings("ignore")
def test_chunks_are_compiled_once() -> None:
    model = tiny_model(tiny_config("gpt2", vocab_size=V, n_layer=0)).train()
    loss: Any = NextTokenLoss(model, **OPTIONS["all"])
    compiled = torch.compile(loss, dynamic=False)
    assert_same(step(compiled, model), step(plain(model), model))
    with torch._dynamo.config.patch(error_on_recompile=True):
        compiled(*batch(seed=2)).backward()


def test_distributed(tmp_path: Path) -> None:
    rendezvous = (tmp_path / "rendezvous").as_uri()
    dist.init_process_group("gloo", init_method=rendezvous, rank=0, world_size=1)
    try:
        model = tiny_model(MODELS["gpt2"]).train()
        loss = DistributedDataParallel(NextTokenLoss(model, **OPTIONS["all"]))
        actual = step(loss, model)
    finally:
        dist.destroy_process_group()
    assert_same(actual, step(plain(model), model))
