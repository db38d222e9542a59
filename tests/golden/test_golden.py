"""A committed checkpoint still says, to the letter, what it said when it was made (make.py)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import glassgpt
from glassgpt import numpy_gpt
from glassgpt.api import LoadedModel

FOLDER = Path(__file__).parent
EXPECTED: dict[str, Any] = json.loads((FOLDER / "expected.json").read_text())


@pytest.fixture
def model() -> LoadedModel:
    loaded = glassgpt.load(str(FOLDER / "modern"))
    loaded.device = "cpu"
    return loaded


def sentence_ids(model: LoadedModel) -> np.ndarray:
    ids = model.tokenizer.encode(EXPECTED["sentence"])
    return np.array(ids[: model.config.context_length])


def test_loss(model: LoadedModel) -> None:
    ids = torch.from_numpy(sentence_ids(model))
    with torch.inference_mode():
        loss = F.cross_entropy(model.model(ids[None])[0, :-1], ids[1:])
    assert loss.item() == pytest.approx(EXPECTED["loss"], abs=1e-5)


def test_loss_in_numpy(model: LoadedModel) -> None:
    ids = sentence_ids(model)
    logits = numpy_gpt.forward(ids, model.checkpoint.weights, model.config)[:-1]
    chances = numpy_gpt.softmax(logits)[np.arange(len(ids) - 1), ids[1:]]
    assert -np.log(chances).mean() == pytest.approx(EXPECTED["loss"], abs=1e-5)


def test_greedy_text(model: LoadedModel) -> None:
    piece = model.generate(EXPECTED["prompt"], max_new_tokens=60, temperature=0)
    assert piece.text == EXPECTED["greedy"]
    assert len(piece.text) == 60 > model.config.context_length  # so the window slides


def test_sampled_text(model: LoadedModel) -> None:
    piece = model.generate(EXPECTED["prompt"], max_new_tokens=60, temperature=1.1, seed=7)
    assert piece.text == EXPECTED["sampled"]
    assert piece.text != EXPECTED["greedy"]


def test_the_checkpoint_is_small_and_has_learned(model: LoadedModel) -> None:
    files = [*(FOLDER / "modern").iterdir(), FOLDER / "expected.json"]
    assert sum(path.stat().st_size for path in files) < 150_000
    assert EXPECTED["loss"] < np.log(model.config.vocab_size) - 1  # far better than guessing
