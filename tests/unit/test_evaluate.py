"""The exact loss of a text: against cross-entropy on model.py, window by window."""

from __future__ import annotations

import io
import math
import string
import sys

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import tiny_config, tiny_model
from glassgpt.errors import UserError
from glassgpt.evaluation import text_loss as evaluate
from glassgpt.evaluation.text_loss import (
    TextLoss,
    cross_entropies,
    loss_table,
    read_text,
    text_loss,
    windows,
)
from glassgpt.inference.engines.reference import ReferenceEngine
from glassgpt.tokenizers.tokenizer import CharTokenizer, byte_tokenizer
from listener import Listener

LETTERS = string.ascii_lowercase + string.digits  # 36, and <unk>
TOKENIZER = CharTokenizer.from_characters(LETTERS)
CONTEXT = 13  # odd, so that half of it is no exact half


def random_text(length: int, seed: int = 0) -> str:
    rng = np.random.default_rng(seed)
    return "".join(rng.choice(list(LETTERS), size=length))


def engine(shape: str = "modern", **fields) -> ReferenceEngine:
    return ReferenceEngine(tiny_model(tiny_config(shape, **fields)))


@torch.inference_mode()
def direct_loss(model, tokens: list[int]) -> float:
    """Of the last token, given the others."""
    ids = torch.tensor(tokens)
    return F.cross_entropy(model(ids[None, :-1])[0, -1], ids[-1]).item()


@pytest.mark.slow
@pytest.mark.parametrize("shape", ["gpt2", "modern"])
@pytest.mark.parametrize("length", [2, 3, CONTEXT, CONTEXT + 1])
def test_a_text_within_the_context(shape: str, length: int) -> None:
    """With one token more than the context, all but the last are read."""
    built, text = engine(shape), random_text(length)
    ids = torch.tensor(TOKENIZER.encode(text))
    with torch.inference_mode():
        expected = F.cross_entropy(built.model(ids[None, :-1])[0], ids[1:])
    found = text_loss(built, TOKENIZER, text)
    assert found.loss == pytest.approx(expected.item(), abs=1e-5)
    assert found.n_tokens == found.n_bytes == length - 1


@pytest.mark.parametrize("context", [1, 2, 5, 12, 13])
@pytest.mark.parametrize("length", [2, 14, 15, 20, 41])
@pytest.mark.parametrize("block", [2, 256])
def test_windows_against_a_loop(monkeypatch, context: int, length: int, block: int) -> None:
    """Each token by itself: in which window is it the first time?"""
    monkeypatch.setattr(evaluate, "_BLOCK", block)
    built, text = engine(context_length=context), random_text(length, seed=length)
    tokens, half, losses = TOKENIZER.encode(text), max(1, context // 2), []
    for target in range(1, length):
        start = 0
        while start + context < target:
            start += half
        losses.append(direct_loss(built.model, tokens[start : target + 1]))
        assert start == 0 or target - start > context - half  # half a context before it
    found = text_loss(built, TOKENIZER, text)
    assert found.n_tokens == length - 1
    assert found.loss == pytest.approx(np.mean(losses), abs=1e-5)


def test_every_target_is_counted_once() -> None:
    for context in range(1, 9):
        for n in range(1, 40):
            counted = []
            for start, counts_from, end in windows(n, context):
                assert start <= counts_from < end <= start + context
                counted += range(counts_from, end)
            assert counted == list(range(n))


def test_max_tokens_is_a_shorter_text() -> None:
    built, text = engine(), random_text(60)
    cut = text_loss(built, TOKENIZER, text, max_tokens=31)
    assert cut == text_loss(built, TOKENIZER, text[:31])
    assert cut.n_tokens == 30
    assert text_loss(built, TOKENIZER, text, max_tokens=1000).n_tokens == 59


def test_bits_per_byte_and_perplexity() -> None:
    """Of bytes and characters: é is one token of two bytes here, two tokens there."""
    accents = CharTokenizer.from_characters("aéß")
    found = text_loss(engine(vocab_size=4), accents, "aéaßé")
    assert (found.n_tokens, found.n_bytes) == (4, 7)
    assert found.bits_per_byte == pytest.approx(found.loss * 4 / math.log(2) / 7)
    assert found.perplexity == pytest.approx(math.exp(found.loss))
    found = text_loss(engine(vocab_size=257), byte_tokenizer(), "aéaßé")
    assert (found.n_tokens, found.n_bytes) == (7, 7)
    assert TextLoss(math.log(256), 5, 5).bits_per_byte == pytest.approx(8)
    assert TextLoss(1e4, 5, 5).perplexity == math.inf


def test_the_token_between_documents() -> None:
    """<|endoftext|> in the text is one token, as in training, and not thirteen bytes."""
    found = text_loss(engine(vocab_size=257), byte_tokenizer(), "ab<|endoftext|>c")
    assert found.n_tokens == 3


def test_cross_entropies_of_extreme_logits() -> None:
    logits = np.array([[1e4, 0, -1e4], [0, 0, 0], [-1e38, 1e38, 0]], dtype=np.float32)
    found = cross_entropies(logits, np.array([1, 2, 1]))
    np.testing.assert_allclose(found, [1e4, math.log(3), 0])


def test_the_status_line_names_engine_and_place() -> None:
    reporter = Listener()
    text_loss(engine(), TOKENIZER, random_text(1000), reporter=reporter)
    assert reporter.shown[-1].startswith("torch float32: 999 of 999 tokens, loss ")


@pytest.mark.parametrize("text", ["", "a"])
def test_a_text_too_short(text: str) -> None:
    with pytest.raises(UserError, match=f"has {len(text)} of the two tokens"):
        text_loss(engine(), TOKENIZER, text)


def test_bad_numbers() -> None:
    with pytest.raises(UserError, match="max_tokens=1 must be at least 2"):
        text_loss(engine(), TOKENIZER, "abc", max_tokens=1)
    broken = engine()
    with torch.no_grad():
        broken.model.head.weight[3] = torch.nan
    with pytest.raises(UserError, match="its weights are broken"):
        text_loss(broken, TOKENIZER, "abc")


def test_reading_a_text(tmp_path, monkeypatch) -> None:
    path = tmp_path / "text.txt"
    path.write_bytes("Größe\r\n".encode())
    assert read_text(str(path)) == "Größe\r\n"
    path.write_bytes("Größe".encode("utf-16"))
    assert read_text(str(path)) == "Größe"
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b"abc"))))
    assert read_text("-") == "abc"


def test_texts_that_can_not_be_read(tmp_path, monkeypatch) -> None:
    def refused(content: bytes | None, reason: str) -> None:
        path = tmp_path / "text.txt"
        path.unlink(missing_ok=True)
        if content is not None:
            path.write_bytes(content)
        with pytest.raises(UserError, match=reason) as raised:
            read_text(str(path))
        assert str(path) in str(raised.value)

    refused(None, "does not exist")
    refused(b"", "is empty")
    refused("Größe".encode("latin-1"), "not UTF-8 at byte 2")
    refused(bytes(range(256)), "binary")
    with pytest.raises(UserError, match="that is a folder"):
        read_text(str(tmp_path))
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BufferedReader(io.BytesIO(b""))))
    with pytest.raises(UserError, match="standard input is empty"):
        read_text("-")


def test_the_table_compares_with_float32() -> None:
    exact, worse = TextLoss(2.0, 9, 12), TextLoss(2.01, 9, 12)
    header, first, second = loss_table({"float32": exact, "int8": worse}).splitlines()
    assert header.endswith("loss against float32")
    assert first.split() == ["float32", "2.0000", "7.389", "2.1640", "9"]
    assert second.split() == ["int8", "2.0100", "7.463", "2.1749", "9", "+0.500%"]
    for alone in ({"float32": exact}, {"int8": worse}, {"int8": worse, "int4": worse}):
        assert "against" not in loss_table(alone)
