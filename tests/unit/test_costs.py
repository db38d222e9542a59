"""What costs.py expects, against torch's own count, the real objects, and a measured process."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import tiny_config
from glassgpt import runtime
from glassgpt.config import ModelConfig, TrainConfig
from glassgpt.errors import UserError
from glassgpt.model import GPT
from glassgpt.options import resolve_options, split_options
from glassgpt.runtime import Machine, find_card
from glassgpt.training.fused.step import Workspace
from glassgpt.training.optimizers import make_optimizers
from glassgpt.training.planning import costs
from glassgpt.training.planning.costs import (
    largest_micro_batch,
    memory,
    parameters_by_part,
)
from glassgpt.training.step import StepPlan, rows_per_process

HERE = Machine(torch.device("cpu"), torch.float32)
CARD = Machine(torch.device("cuda"), torch.bfloat16)
EIGHT_CARDS = dataclasses.replace(CARD, world=8)
BENCHMARK = Path(__file__).parents[2] / "benchmarks" / "memory.py"


def gpt2_124m() -> tuple[ModelConfig, TrainConfig]:
    shape, _, train = split_options(resolve_options({}, preset="gpt2-124m"))
    return ModelConfig.from_shape(shape.pop("shape"), vocab_size=50257, **shape), train


def both(**fields: Any) -> list[ModelConfig]:
    return [tiny_config("gpt2", **fields), tiny_config("modern", **fields),
            tiny_config("modern", n_kv_head=6, **fields)]  # fmt: skip


def needed(model: ModelConfig, train: TrainConfig, machine: Machine = HERE) -> costs.Memory:
    return memory(model, train, StepPlan.decide(model, train, machine))


# -- the parts -----------------------------------------------------------------------------------


@pytest.mark.parametrize("machine", [HERE, CARD], ids=["cpu", "cuda"])
@pytest.mark.parametrize("optimizer", ["muon", "adamw"])
def test_the_parts_add_up(machine, optimizer):
    torch.set_num_threads(2)
    for model in both():
        need = needed(model, TrainConfig(optimizer=optimizer), machine)
        parts = dataclasses.asdict(need).values()
        assert all(isinstance(part, int) and part >= 0 for part in parts)
        assert sum(parts) == need.total
        assert need.weights == 4 * model.n_parameters
        assert sum(parameters_by_part(model).values()) == model.n_parameters


def test_more_rows_take_more_memory():
    torch.set_num_threads(2)
    for model in [*both(), ModelConfig.from_shape("gpt2", vocab_size=50257, n_layer=2)]:
        for machine in (HERE, CARD):
            totals = [
                needed(model, TrainConfig(batch_tokens=rows * model.context_length), machine).total
                for rows in (2, 3, 8, 100, 1000)
            ]
            assert totals == sorted(totals)
            assert totals[0] < totals[-1]


def test_the_optimizer_remembers_what_is_expected():
    for model in both():
        for name in ("muon", "adamw"):
            gpt, train = GPT(model), TrainConfig(optimizer=name)
            optimizers = make_optimizers(gpt, train)
            for parameter in gpt.parameters():
                parameter.grad = torch.ones_like(parameter)
            for optimizer in optimizers:
                optimizer.step()
            kept = [tensor for optimizer in optimizers for state in optimizer.state.values()
                    for tensor in state.values() if tensor.dim()]  # fmt: skip
            assert needed(model, train).optimizer == sum(t.nbytes for t in kept)


@pytest.mark.parametrize(
    ("shape", "dropout"),
    [("gpt2", 0.0), ("gpt2", 0.1), ("modern", 0.0), ("modern", 0.1), ("grouped", 0.0),
     ("llama", 0.0)],
)  # fmt: skip
def test_activations_are_what_torch_saves(shape, dropout):
    heads = {"n_head": 4, "n_embd": 32, "head_dim": 8, "n_kv_head": 2 if shape == "grouped" else 4}
    fields: dict[str, Any] = {"n_hidden": 80, "dropout": dropout, **heads}
    if shape == "llama":
        fields["qk_norm"] = False
    tokens, saved = 3 * 16, []
    for layers in (1, 2):
        model = tiny_config("gpt2" if shape == "gpt2" else "modern", n_layer=layers,
                            context_length=16, **fields)  # fmt: skip
        saved.append(saved_bytes(GPT(model), 3))
    expected = sum(costs.saved_per_token(model, 4, on_gpu=False)) * tokens
    # Statistics of the norms, a few bytes per token, are left out.
    assert saved[1] - saved[0] == pytest.approx(expected, rel=0.05)


def saved_bytes(model: GPT, rows: int) -> int:
    """Of all tensors that autograd keeps for the way back, each memory counted once."""
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    kept, found = [], {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        memory = tensor.untyped_storage()
        if memory.data_ptr() not in own:
            kept.append(tensor)  # so that no later one gets its place
            found[memory.data_ptr()] = memory.nbytes()
        return tensor

    tokens = torch.zeros(rows, model.config.context_length, dtype=torch.long)
    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        F.cross_entropy(model(tokens).flatten(0, 1), tokens.flatten())
    return sum(found.values())


def test_rooms_of_the_fused_step_are_counted_to_the_byte():
    [*_, model] = both(vocab_size=60000, n_layer=3)
    for width, dtype in ((2, torch.bfloat16), (4, torch.float32)):
        rooms = Workspace(model, 4, model.context_length, dtype)
        rooms_of = [rooms, *rooms.blocks]
        arrays = [part.array for room in rooms_of for part in vars(room).values()
                  if hasattr(part, "array")]  # fmt: skip
        precision = "bfloat16" if width == 2 else "float32"  # two threads: 4 and 3 rows
        plan = StepPlan("cpu", 1, 8, 7, precision, fused=True, workers=2)
        assert costs.workspace_bytes(model, plan) == sum(array.nbytes for array in arrays)


# -- measured ------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="left out: glibc's way with memory is assumed")
@pytest.mark.parametrize("shape", ["modern", "gpt2"])
def test_a_measured_training_takes_what_is_expected(shape):
    spec = importlib.util.spec_from_file_location("memory_benchmark", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    case = {"vocab_size": 65, "shape": shape, "threads": 2}
    if shape == "modern":  # compiling the kernels, once, takes memory of its own
        benchmark.measured(case | {"n_layer": 1, "n_embd": 16, "batch_tokens": 128})
    found = benchmark.compared(case)
    assert found["ratio"] == pytest.approx(1, abs=0.1), found


# -- GPUs ----------------------------------------------------------------------------------------


def test_nanogpts_four_days_are_a_plausible_share_of_eight_a100():
    """600,000 steps of 491,520 tokens; 6 N + 12 L H D T FLOP per token, by hand."""
    model, train = gpt2_124m()
    tokens = train.max_steps * train.batch_tokens
    by_hand = 6 * (124_337_664 - 1024 * 768 - 25 * 768) + 12 * 12 * 768 * 1024
    assert model.flops_per_token() == by_hand
    at_peak = costs.training_seconds(model, tokens, flops=8 * find_card("a100").flops, mfu=1.0)
    assert at_peak == pytest.approx(by_hand * tokens / (8 * 312e12))
    assert 0.25 < at_peak / (4 * 24 * 3600) < 0.35


def test_the_preset_for_a100_fits_in_40_gb():
    model, train = gpt2_124m()
    need = needed(model, train, EIGHT_CARDS)
    assert need.optimizer == 8 * model.n_parameters
    # The logits of 12 rows, three times in float32, would be more than all of it: they never are.
    assert need.activations < 3 * 4 * 12 * 1024 * 50257
    less = needed(model, dataclasses.replace(train, recompute=True), EIGHT_CARDS)
    assert less.activations < 0.5 * need.activations
    assert need.total < find_card("A100").memory
    wide = dataclasses.replace(EIGHT_CARDS, dtype=torch.float32)
    assert need.total < needed(model, train, wide).total


def test_the_largest_micro_batch_fits_and_one_more_does_not():
    model, train = gpt2_124m()
    for name in ("T4", "A100"):
        room = find_card(name).memory
        most = largest_micro_batch(model, train, EIGHT_CARDS, room)
        assert most is not None

        def total(rows: int) -> int:
            asked = dataclasses.replace(train, micro_batch_size=rows)
            return needed(model, asked, EIGHT_CARDS).total

        assert total(most) <= room
        assert most == rows_per_process(model, train, 8) or room < total(most + 1)
    assert largest_micro_batch(model, train, CARD, 10**9) is None


def test_cards_by_name():
    assert find_card("h100").flops == 989e12
    assert find_card("A100-80GB").memory == 80 * 10**9
    with pytest.raises(UserError, match="Did you mean 'H100'"):
        find_card("H10O")
    assert runtime.peak_flops("NVIDIA A100-SXM4-40GB") == 312e12
    assert runtime.peak_flops("NVIDIA L40S") == 362e12
    assert runtime.peak_flops("NVIDIA L4") == 121e12
    assert runtime.peak_flops("a card of the future") is None
    for i, card in enumerate(runtime.CARDS):  # or the shorter name would be found first
        assert not any(other.name in card.name for other in runtime.CARDS[:i])
    assert all(math.isfinite(card.flops) and card.memory > 1e10 for card in runtime.CARDS)
    assert np.isclose(find_card("4090").flops, 165e12)
