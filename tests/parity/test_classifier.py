"""Classifiers as transformers has them: its pipeline reads our folders, we read its own."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    GPT2Config,
    GPT2ForSequenceClassification,
    LlamaConfig,
    LlamaForSequenceClassification,
    Qwen3Config,
    Qwen3ForSequenceClassification,
    pipeline,
)

import glassgpt
from conftest import classifier_weights, tiny_config, tiny_model
from glassgpt.checkpoints.run_directory import Checkpoint, load_model, save_model
from glassgpt.checkpoints.tensors import SafeTensors
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError
from glassgpt.inference.classify import classifier, encode_text, set_score_head
from glassgpt.tokenizers.tokenizer import CharTokenizer, Tokenizer, from_spec, to_files, train_bpe

LABELS = ("ham", "spam", "not sure / 好")
CORPUS = "What a wonderful film, the best I have seen! A waste of time: bad, dull and far too long."
TEXTS = ["a", "What a film!", CORPUS, "the end<|endoftext|>", "<|endoftext|>", CORPUS[::-1][:19],
         "bad", "  spaces  ", "unknown: ж\n"]  # fmt: skip
END = "<|endoftext|>"


def char() -> Tokenizer:
    """Characters, with an end of text that the model got for padding."""
    spec = CharTokenizer.from_characters(CORPUS).spec
    vocab = spec["model"]["vocab"]
    end = {"id": len(vocab), "content": END, "single_word": False, "lstrip": False,
           "rstrip": False, "normalized": False, "special": True}  # fmt: skip
    model = spec["model"] | {"vocab": vocab | {END: len(vocab)}}
    return from_spec(spec | {"added_tokens": [end], "model": model})


def bpe() -> Tokenizer:
    return train_bpe([CORPUS * 3], 300)


def begins() -> Tokenizer:
    """With a token before every text, as Llama has one."""
    spec = bpe().spec
    end = spec["model"]["vocab"][END]
    begin, one, two = ({kind: {"id": name, "type_id": 0}} for kind, name in
                       [("SpecialToken", END), ("Sequence", "A"), ("Sequence", "B")])  # fmt: skip
    step = {"type": "TemplateProcessing", "single": [begin, one], "pair": [begin, one, two],
            "special_tokens": {END: {"id": END, "ids": [end], "tokens": [END]}}}  # fmt: skip
    return from_spec(spec | {"post_processor": step})


OURS = {
    "gpt2": (tiny_config("gpt2"), bpe),
    "gpt2-char": (tiny_config("gpt2", bias=False), char),
    "gpt2-untied": (tiny_config("gpt2", tie_embeddings=False), begins),
    "llama": (tiny_config("modern", qk_norm=False), bpe),
    "llama-untied": (tiny_config("modern", qk_norm=False, tie_embeddings=False), begins),
    "qwen3": (tiny_config("modern"), char),
    "qwen3-untied": (tiny_config("modern", tie_embeddings=False, rope_theta=40.0), bpe),
}
KINDS = {"gpt2": "GPT2ForSequenceClassification", "llama": "LlamaForSequenceClassification",
         "qwen3": "Qwen3ForSequenceClassification"}  # fmt: skip


def save_ours(folder: Path, config: ModelConfig, tokenizer: Tokenizer) -> Checkpoint:
    """A random classifier that is sure of its labels, so that a mistake anywhere shows."""
    config = ModelConfig(**vars(config) | {"vocab_size": tokenizer.vocab_size})
    model = tiny_model(config, seed=3)
    set_score_head(model, len(LABELS))
    generator = torch.Generator().manual_seed(8)
    with torch.no_grad():
        model.head.weight.copy_(torch.randn(model.head.weight.shape, generator=generator))
    checkpoint = Checkpoint(config, classifier_weights(model), tokenizer, labels=LABELS)
    save_model(folder, checkpoint)
    return checkpoint


# -- ours, read by transformers ------------------------------------------------------------------


@pytest.mark.parametrize("name", OURS)
def test_the_pipeline_reads_a_run_directory(tmp_path: Path, name: str) -> None:
    config, make = OURS[name]
    save_ours(tmp_path, config, make())
    theirs, report = AutoModelForSequenceClassification.from_pretrained(
        tmp_path, output_loading_info=True
    )
    assert type(theirs).__name__ == KINDS[config.family]
    assert not any(report.values()), report  # no weight is missing, left over or misshapen
    ask = pipeline("text-classification", str(tmp_path), top_k=None)
    ours = glassgpt.load(tmp_path)
    assert ours.labels == LABELS
    batched, alone = ours.classify(TEXTS), [ours.classify(text)[0] for text in TEXTS]
    for batch_size, found in ((1, batched), (4, alone), (4, batched)):
        answers = ask(TEXTS, truncation=True, batch_size=batch_size)
        for mine, other in zip(found, answers, strict=True):
            assert list(mine) == [one["label"] for one in other]
            for one in other:
                assert mine[one["label"]] == pytest.approx(one["score"], abs=1e-4)
    assert np.ptp([found["spam"] for found in batched]) > 0.01  # not the same for every text


@pytest.mark.parametrize("make", [char, bpe, begins])
def test_both_read_the_same_tokens(tmp_path: Path, make) -> None:
    """Also where a text holds the name of a special token."""
    tokenizer = make()
    save_ours(tmp_path, tiny_config("gpt2"), tokenizer)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    assert theirs.pad_token_id == tokenizer.end_of_text
    for text in TEXTS:
        assert theirs(text)["input_ids"] == encode_text(tokenizer, text)
        assert theirs(text, truncation=True)["input_ids"] == encode_text(tokenizer, text, 13)


def test_characters_without_an_end_of_text(tmp_path: Path) -> None:
    """Nothing to pad with: transformers asks one text at a time, we several."""
    save_ours(tmp_path, tiny_config("modern"), CharTokenizer.from_characters(CORPUS))
    found = glassgpt.load(tmp_path).classify(TEXTS)
    ask = pipeline("text-classification", str(tmp_path))
    for mine, other in zip(found, ask(TEXTS, truncation=True), strict=True):
        label, probability = next(iter(mine.items()))
        assert (label, probability) == (other["label"], pytest.approx(other["score"], abs=1e-4))


@pytest.mark.parametrize("name", OURS)
def test_saved_and_loaded_is_the_same(tmp_path: Path, name: str) -> None:
    config, make = OURS[name]
    first = save_ours(tmp_path / "first", config, make())
    second = load_model(tmp_path / "first")
    assert (second.labels, second.config) == (first.labels, first.config)
    assert second.weights.keys() == first.weights.keys()
    for weight in first.weights:
        assert np.array_equal(first.weights[weight], second.weights[weight])
    save_model(tmp_path / "second", second)
    for path in (tmp_path / "first").glob("*.json"):
        assert path.read_bytes() == (tmp_path / "second" / path.name).read_bytes(), path.name


# -- theirs, read by us --------------------------------------------------------------------------

GPT2 = dict(vocab_size=41, n_positions=14, n_embd=15, n_layer=2, n_head=3, n_inner=26,
            initializer_range=0.2)  # fmt: skip
LLAMA = dict(vocab_size=41, hidden_size=18, intermediate_size=28, num_hidden_layers=2,
             num_attention_heads=6, num_key_value_heads=3, head_dim=4,
             max_position_embeddings=14, initializer_range=0.2)  # fmt: skip
NAMED = dict(id2label={0: "no", 1: "yes", 2: "so"}, label2id={"no": 0, "yes": 1, "so": 2})
THEIRS = {
    "gpt2": lambda: GPT2ForSequenceClassification(GPT2Config(**GPT2, **NAMED)),
    "gpt2-two": lambda: GPT2ForSequenceClassification(GPT2Config(**GPT2)),
    "llama-five": lambda: LlamaForSequenceClassification(LlamaConfig(**LLAMA, num_labels=5)),
    "llama-tied": lambda: LlamaForSequenceClassification(
        LlamaConfig(**LLAMA, **NAMED, tie_word_embeddings=True)
    ),
    "qwen3": lambda: Qwen3ForSequenceClassification(Qwen3Config(**LLAMA, **NAMED)),
}


def save_theirs(folder: Path, model) -> None:
    model.eval().save_pretrained(folder)
    for name, content in to_files(CharTokenizer.from_characters("abc")).items():
        (folder / name).write_bytes(content)


@pytest.mark.parametrize("name", THEIRS)
@torch.inference_mode()
def test_we_read_what_transformers_saves(tmp_path: Path, name: str) -> None:
    torch.manual_seed(1)
    theirs = THEIRS[name]()
    save_theirs(tmp_path, theirs)
    checkpoint = load_model(tmp_path)
    assert checkpoint.labels == tuple(theirs.config.id2label.values())
    ours = classifier(checkpoint.config, checkpoint.weights)
    tokens = torch.randint(41, (1, 14), generator=torch.Generator().manual_seed(9))
    torch.testing.assert_close(ours(tokens)[:, -1], theirs(tokens).logits, rtol=0, atol=1e-4)
    save_model(tmp_path / "ours", checkpoint)
    first, second = (SafeTensors([f / "model.safetensors"]) for f in (tmp_path, tmp_path / "ours"))
    assert first.keys() == second.keys()
    assert all(np.array_equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (dict(num_labels=1), "1 labels with problem_type None are not supported"),
        (dict(problem_type="multi_label_classification"), "multi_label_classification"),
        (dict(id2label={0: "same", 1: "same"}), "the same name"),
    ],
)
def test_what_is_no_choice_of_one_label_is_refused(tmp_path: Path, changes, message) -> None:
    save_theirs(tmp_path, GPT2ForSequenceClassification(GPT2Config(**GPT2, **changes)))
    with pytest.raises(UserError, match=message):
        load_model(tmp_path)


def test_labels_and_head_must_belong_together(tmp_path: Path) -> None:
    save_ours(tmp_path, tiny_config("modern"), bpe())
    values = json.loads((tmp_path / "config.json").read_text())
    for names, message in [({"0": "a", "1": "b"}, r"score.weight has shape \(3, 18\)"),
                           ({"0": "a", "2": "b"}, "an id is missing"),
                           (["a", "b"], "malformed")]:  # fmt: skip
        (tmp_path / "config.json").write_text(json.dumps(values | {"id2label": names}))
        with pytest.raises(UserError, match=message):
            load_model(tmp_path)
