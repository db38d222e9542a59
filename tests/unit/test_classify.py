"""Classifiers: the head, what is read of a text, padding; measures against counts by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import classifier_weights, tiny_config, tiny_model
from glassgpt.errors import UserError
from glassgpt.inference import classify
from glassgpt.inference.classify import (
    class_weights,
    classifier,
    encode_text,
    example_probabilities,
    label_probabilities,
    metrics,
    metrics_table,
    set_score_head,
)
from glassgpt.model import GPT
from glassgpt.reporting import plots as plot
from glassgpt.tokenizers.tokenizer import byte_tokenizer, from_spec

SHAPES = {
    "gpt2": tiny_config("gpt2", dropout=0.3),
    "gpt2-untied": tiny_config("gpt2", tie_embeddings=False),
    "modern": tiny_config("modern"),
}


def tiny_classifier(name: str = "modern", n_classes: int = 5) -> GPT:
    model = tiny_model(SHAPES[name])
    torch.manual_seed(3)
    set_score_head(model, n_classes)
    with torch.no_grad():
        model.head.weight.mul_(30)  # so that the classes differ
    return model.eval()


# -- the head ------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", SHAPES)
def test_a_new_head(name: str) -> None:
    model = tiny_model(SHAPES[name])
    embedding = model.token_embedding.weight.detach().clone()
    torch.manual_seed(7)
    set_score_head(model, 211)
    first = model.head.weight.detach().clone()
    assert first.shape == (211, model.config.n_embd)
    assert first.std().item() == pytest.approx(0.02, rel=0.1)
    assert model.head.bias is None
    assert torch.equal(model.token_embedding.weight, embedding)
    assert model.token_embedding.weight is not model.head.weight
    assert model(torch.tensor([[1, 2, 3]])).shape == (1, 3, 211)
    torch.manual_seed(7)
    set_score_head(model, 211)
    assert torch.equal(model.head.weight, first)
    set_score_head(model, 211)
    assert not torch.equal(model.head.weight, first)


@pytest.mark.parametrize("name", SHAPES)
def test_saved_weights_make_the_same_classifier(name: str) -> None:
    model = tiny_classifier(name)
    weights = classifier_weights(model)
    body = SHAPES[name].weight_shapes.keys() - {"head.weight"}
    assert weights.keys() == body | {"score.weight"}
    state = torch.random.get_rng_state()
    again = classifier(SHAPES[name], weights)
    assert torch.equal(torch.random.get_rng_state(), state)  # nothing drawn
    assert again.config == SHAPES[name]
    assert not again.training
    tokens = torch.tensor([[5, 1, 36, 2]])
    assert torch.equal(again(tokens), model(tokens))


# -- what is read --------------------------------------------------------------------------------


def with_begin():
    """A byte tokenizer that puts <|endoftext|> before every text, as Llama does its own token."""
    step = {"type": "TemplateProcessing", "pair": [],
            "single": [{"SpecialToken": {"id": "<|endoftext|>", "type_id": 0}},
                       {"Sequence": {"id": "A", "type_id": 0}}],
            "special_tokens": {"<|endoftext|>": {"id": "<|endoftext|>", "ids": [256],
                                                 "tokens": ["<|endoftext|>"]}}}  # fmt: skip
    return from_spec(byte_tokenizer().spec | {"post_processor": step})


def test_what_is_read_of_a_text() -> None:
    plain, begins = byte_tokenizer(), with_begin()
    assert encode_text(plain, "abc") == [97, 98, 99]
    assert encode_text(begins, "abc") == [256, 97, 98, 99]
    for tokenizer in (plain, begins):
        assert encode_text(tokenizer, "") == []
        assert encode_text(tokenizer, "abcdef", 3) == encode_text(tokenizer, "abcdef")[:3]
        assert encode_text(tokenizer, "ab", 13) == encode_text(tokenizer, "ab")
    assert encode_text(plain, "a<|endoftext|>") == list(b"a<|endoftext|>")


@pytest.mark.parametrize("name", SHAPES)
def test_neither_padding_nor_company_changes_anything(name: str, monkeypatch) -> None:
    model = tiny_classifier(name)
    random = np.random.default_rng(0)
    examples = [random.integers(0, 37, n).tolist() for n in (1, 13, 4, 13, 2, 1, 9)]
    with torch.inference_mode():
        alone = [model(torch.tensor([e]))[0, -1].double().softmax(-1).numpy() for e in examples]
    model.train()  # dropout must be off, and on again afterwards
    for most in (8192, 26, 1):
        monkeypatch.setattr(classify, "_BATCH_TOKENS", most)
        found = example_probabilities(model, examples)
        assert found.shape == (7, 5)
        np.testing.assert_allclose(found, alone, rtol=0, atol=1e-5)
        np.testing.assert_allclose(found.sum(axis=1), 1)
    assert model.training
    assert np.ptp(found, axis=0).max() > 0.1  # the examples do differ
    assert example_probabilities(model, []).shape == (0, 5)


def test_texts_are_cut_at_the_context_and_empty_ones_refused() -> None:
    model = tiny_model(tiny_config("modern", vocab_size=257))
    set_score_head(model, 2)
    whole = "Just 13 bytes"
    found = label_probabilities(model, byte_tokenizer(), [whole, whole + " and more", whole[:-1]])
    np.testing.assert_allclose(found[0], found[1], rtol=0, atol=1e-6)
    assert abs(found[0] - found[2]).max() > 1e-4
    with pytest.raises(UserError, match="text 2 is empty"):
        label_probabilities(model, byte_tokenizer(), ["a", ""])


# -- measures ------------------------------------------------------------------------------------


def test_measures_by_hand() -> None:
    """Class 0: 3 examples, 2 found, 1 more taken for it. Class 3 is only guessed, 4 nowhere."""
    truth, predicted = [0, 0, 0, 1, 1, 2], [0, 0, 1, 1, 0, 3]
    found = metrics(truth, predicted, 5)
    assert found.confusion.tolist() == [
        [2, 1, 0, 0, 0],
        [1, 1, 0, 0, 0],
        [0, 0, 0, 1, 0],
        [0, 0, 0, 0, 0],
        [0, 0, 0, 0, 0],
    ]
    assert found.accuracy == 3 / 6
    assert found.precision.tolist() == [2 / 3, 1 / 2, 0, 0, 0]
    assert found.recall.tolist() == [2 / 3, 1 / 2, 0, 0, 0]
    assert found.f1.tolist() == [2 / 3, 1 / 2, 0, 0, 0]
    assert found.support.tolist() == [3, 2, 1, 0, 0]
    assert found.macro_f1 == pytest.approx((2 / 3 + 1 / 2 + 0 + 0) / 4)


def test_precision_and_recall_are_not_the_same() -> None:
    """Of 4 guesses of class 1 one is right, of its 2 examples one is found: F1 = 2 / (4 + 2)."""
    found = metrics([1, 1, 0, 0, 0], [1, 0, 1, 1, 1], 2)
    assert found.precision[1] == 1 / 4
    assert found.recall[1] == 1 / 2
    assert found.f1[1] == pytest.approx(2 / 6)
    assert found.confusion.tolist() == [[0, 3], [1, 1]]


def test_all_right_and_nothing_at_all() -> None:
    perfect = metrics([2, 0, 1], [2, 0, 1], 3)
    assert perfect.accuracy == perfect.macro_f1 == 1
    nothing = metrics([], [], 3)
    assert nothing.accuracy == nothing.macro_f1 == 0


def test_the_table() -> None:
    found = metrics([0, 0, 0, 1, 1], [0, 0, 1, 1, 0], 2)
    lines = metrics_table(found, ["bad\nword", "x" * 60]).splitlines()
    assert lines[0].split() == ["class", "precision", "recall", "F1", "examples"]
    assert lines[1].split() == ["bad", "word", "0.667", "0.667", "0.667", "3"]
    assert lines[2].split() == ["x" * 40, "0.500", "0.500", "0.500", "2"]
    assert lines[3].split() == ["macro", "F1", "0.583"]
    assert lines[4].split() == ["accuracy", "0.600", "5"]
    assert len(lines) == 5


def test_class_weights() -> None:
    assert class_weights([30, 10]).tolist() == pytest.approx([40 / (2 * 30), 40 / (2 * 10)])
    assert class_weights([7, 7, 7]).tolist() == [1, 1, 1]
    weights = class_weights([90, 0, 10])
    assert weights.dtype == np.float32
    assert weights.tolist() == pytest.approx([100 / 180, 0, 100 / 20])
    assert weights @ [90, 0, 10] == pytest.approx(100)  # an example weighs 1 on the mean


# -- the picture ---------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("error::UserWarning")  # of letters that the font lacks
@pytest.mark.parametrize("n", [2, 20, 61])
def test_a_picture_of_the_confusions(tmp_path: Path, n: int) -> None:
    matrix = 2000 * np.eye(n, dtype=int)
    matrix[0] = np.arange(n)
    matrix[1] = 0  # no example of this class
    labels = [f"$class_{i} 好 and more" for i in range(n)]
    plot.confusion(tmp_path / "confusion.png", matrix, labels)
    assert (tmp_path / "confusion.png").read_bytes().startswith(b"\x89PNG\r\n")
    assert [path.name for path in tmp_path.iterdir()] == ["confusion.png"]
    with pytest.raises(UserError, match="cannot write"):
        plot.confusion(tmp_path / "nowhere" / "c.png", matrix, labels)
