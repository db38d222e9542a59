"""Rows that several texts share: the same loss and gradients as of each text alone."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import tiny_config, tiny_model
from glassgpt import runtime
from glassgpt.config import TrainConfig
from glassgpt.data.batches import IGNORE
from glassgpt.model import GPT, CausalSelfAttention, attention_by_hand
from glassgpt.training.fused.step import FusedStep
from glassgpt.training.loss import NextTokenLoss
from glassgpt.training.step import TrainingStep

T, V = 13, 37
SHAPES: dict[str, Any] = {
    "gpt2": tiny_config("gpt2"),
    "grouped": tiny_config(),
    "llama": tiny_config(qk_norm=False),
    "fusible": tiny_config(n_kv_head=6),
    "untied": tiny_config(tie_embeddings=False),
}
LENGTHS = [[5, 1, 4], [13], [2, 9]]  # of the texts of each row; the rest is filled up


def texts(seed: int = 2) -> list[list[tuple[np.ndarray, np.ndarray]]]:
    """(tokens, targets) of every text; of each the first target does not count."""
    generator, found = np.random.default_rng(seed), []
    for lengths in LENGTHS:
        found.append([])
        for n in lengths:
            targets = generator.integers(V, size=n)
            targets[: n // 2] = IGNORE
            found[-1].append((generator.integers(V, size=n), targets))
    return found


def packed() -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The same as three rows: tokens, targets, positions."""
    shape = len(LENGTHS), T
    tokens, targets = np.zeros(shape, np.int64), np.full(shape, IGNORE)
    positions = np.zeros(shape, np.int64)
    for row, parts in enumerate(texts()):
        at = 0
        for ids, wanted in parts:
            n = len(ids)
            tokens[row, at : at + n], targets[row, at : at + n] = ids, wanted
            positions[row, at : at + n] = np.arange(n)
            at += n
        positions[row, at:] = np.arange(T - at)
    return tokens, targets, positions


def gradients_of(model: GPT) -> dict[str, torch.Tensor]:
    found = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    model.zero_grad(set_to_none=True)
    return found


def alone(model: GPT) -> tuple[float, dict[str, torch.Tensor]]:
    """Loss and gradients of every text in a row of its own, summed."""
    total = torch.zeros(())
    for ids, wanted in (text for row in texts() for text in row):
        logits = model(torch.from_numpy(ids)[None])[0]
        total = total + F.cross_entropy(logits, torch.from_numpy(wanted), reduction="sum",
                                        ignore_index=IGNORE)  # fmt: skip
    total.backward()
    return total.item(), gradients_of(model)


def assert_same(found: tuple, expected: tuple) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, gradient in expected[1].items():
        torch.testing.assert_close(found[1][name], gradient, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("by_hand", [False, True])
@pytest.mark.parametrize("chunk_logits", [1 << 20, 3 * V])
@pytest.mark.parametrize("shape", SHAPES)
def test_sharing_a_row_changes_nothing(shape, chunk_logits, by_hand, monkeypatch) -> None:
    if by_hand:
        monkeypatch.setattr(CausalSelfAttention, "attend", staticmethod(attention_by_hand))
    model = tiny_model(SHAPES[shape])
    loss = NextTokenLoss(model, chunk_logits=chunk_logits)
    value = loss(*(torch.from_numpy(array) for array in packed()))
    value.backward()
    assert_same((value.item(), gradients_of(model)), alone(model))


@pytest.mark.parametrize("shape", SHAPES)
def test_without_positions_texts_would_see_each_other(shape: str) -> None:
    loss = NextTokenLoss(tiny_model(SHAPES[shape]))
    tokens, targets, positions = (torch.from_numpy(array) for array in packed())
    assert loss(tokens, targets).item() != pytest.approx(loss(tokens, targets, positions).item())


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("at_once", [1, 2, 3])
def test_steps_over_packed_rows(threads: int, at_once: int) -> None:
    model = tiny_model(SHAPES["fusible"]).train()
    config = TrainConfig(dtype="float32", device="cpu", threads=threads, micro_batch_size=at_once)
    step = TrainingStep(model, config, runtime.start(config), packed=True)
    assert not isinstance(step.steps[0], FusedStep)
    expected, n = alone(model), sum((array != IGNORE).sum() for array in [packed()[1]])
    loss = step.gradients(packed()).item()
    found = {name: gradient * n for name, gradient in gradients_of(model).items()}
    assert_same((loss * n, found), expected)
    assert step.losses(packed()) == pytest.approx(expected[0], rel=1e-5)
    step.close()


@pytest.mark.parametrize("chunk_logits", [1 << 20, 3 * V])
def test_what_is_frozen_gets_no_gradient(chunk_logits: int) -> None:
    model = tiny_model(SHAPES["untied"])
    expected = alone(model)
    frozen = {"head.weight", "blocks.0.attn.qkv.weight"}
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name not in frozen)
    value = NextTokenLoss(model, chunk_logits=chunk_logits)(*map(torch.from_numpy, packed()))
    value.backward()
    rest = {name: g for name, g in expected[1].items() if name not in frozen}
    assert_same((value.item(), gradients_of(model)), (expected[0], rest))


def test_a_head_for_classes_and_their_weights() -> None:
    model = tiny_model(SHAPES["fusible"])
    model.head = torch.nn.Linear(model.config.n_embd, 3, bias=False)
    tokens, targets, positions = packed()
    targets[targets != IGNORE] %= 3
    weights = torch.tensor([0.5, 2.0, 3.5])
    batch = [torch.from_numpy(array) for array in (tokens, targets, positions)]
    losses = []
    for label in range(3):
        of_one = torch.where(batch[1] == label, label, IGNORE)
        losses.append(NextTokenLoss(model)(batch[0], of_one, batch[2]).item())
    weighted = NextTokenLoss(model, class_weights=weights)(*batch).item()
    assert weighted == pytest.approx(0.5 * losses[0] + 2 * losses[1] + 3.5 * losses[2], rel=1e-5)
    assert NextTokenLoss(model)(*batch).item() == pytest.approx(sum(losses), rel=1e-5)


@pytest.mark.parametrize("change", ["frozen", "head"])
def test_the_fused_step_takes_whole_models_alone(change: str) -> None:
    config = TrainConfig(dtype="float32", device="cpu", threads=1)
    machine = runtime.start(config)
    model = tiny_model(SHAPES["fusible"])
    kinds = [TrainingStep(model, config, machine).steps[0]]
    if change == "frozen":
        model.final_norm.requires_grad_(False)
    else:
        model.head = torch.nn.Linear(model.config.n_embd, 3, bias=False)
    kinds.append(TrainingStep(model, config, machine).steps[0])
    assert [isinstance(step, FusedStep) for step in kinds] == [True, False]
