"""What the figures are made from: names, differing options, projections, attention patterns."""

from __future__ import annotations

import math
import re
from pathlib import Path

import numpy as np
import pytest

from glassgpt.cli.figures import KINDS, differences, label_of, short_names, token_kind
from glassgpt.interpret import figures
from glassgpt.tokenizers.tokenizer import CharTokenizer, byte_tokenizer, train_bpe


def test_names_are_as_short_as_they_can_be() -> None:
    folders = [Path("/x/a/book"), Path("/x/b/book"), Path("/x/a/poems"), Path("/x/book")]
    assert short_names(folders) == ["a/book", "b/book", "poems", "x/book"]
    [name] = short_names([Path("/x/" + "long" * 30)])
    assert len(name) == 48


def test_what_runs_differ_in() -> None:
    one = dict(options=dict(out="a", n_layer=2, seed=1), model=dict(n_layer=2),
               train=dict(seed=1, budget=None, learning_rate=0.002))  # fmt: skip
    other = dict(options=dict(out="b", learning_rate=1e-5, budget="5m"), model=dict(n_layer=2),
                 train=dict(seed=3, budget="5m", learning_rate=1e-5))  # fmt: skip
    assert differences([one, other]) == [
        "seed 1, learning_rate 0.002, budget off",
        "seed 3, learning_rate 1e-05, budget 5m",
    ]
    assert differences([one]) == [""]
    assert differences([one, {}]) == ["", ""]  # a run without glassgpt.json yet
    many = [dict(options=dict.fromkeys("abcd", i)) for i in (1, 2)]
    assert differences(many)[0] == "a 1, b 1, c 1, …"


def svg_texts(path: Path) -> list[str]:
    return re.findall(r"<text[^>]*>([^<]*)</text>", path.read_text())


def test_attention_names_tokens_axes_layers_and_heads(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    patterns = np.tril(rng.random((2, 3, 5, 5), dtype=np.float32))
    patterns /= patterns.sum(axis=-1, keepdims=True)
    tokens = ["The", "␣cat", "$x$", "好", "⏎"]
    figures.draw_attention(tmp_path / "a.svg", patterns, tokens, layers=[4, 7], title="my_model")
    shown = svg_texts(tmp_path / "a.svg")
    assert sorted(name for name in shown if name.startswith(("head", "layer"))) == [
        "head 0", "head 1", "head 2", "layer 4", "layer 7",
    ]  # fmt: skip
    for token in tokens:  # on the outer axes: below three columns, beside two rows
        assert shown.count(token) == 5
    for name in ("token that looks (query)", "token that is looked at (key)", "my_model",
                 "attention weight (rows sum to 1)"):  # fmt: skip
        assert name in shown


@pytest.mark.slow
@pytest.mark.parametrize(("L", "H", "T"), [(1, 1, 1), (1, 1, 10), (12, 12, 40), (1, 1, 128)])
def test_pictures_of_any_number_of_heads(tmp_path: Path, L: int, H: int, T: int) -> None:
    patterns = np.tril(np.full((L, H, T, T), 0.5, dtype=np.float32))
    figures.draw_attention(tmp_path / "a.png", patterns, ["a"] * T, title="x")
    header = (tmp_path / "a.png").read_bytes()[:24]
    assert all(300 < int.from_bytes(header[at : at + 4]) < 2500 for at in (16, 20))  # pixels


# -- embeddings ----------------------------------------------------------------------------------


def test_principal_components() -> None:
    rng = np.random.default_rng(1)
    table = rng.normal(size=(50, 3)) * [1, 10, 0.1] + 5
    points, shares = figures.principal_components(table)
    assert shares[0] > 0.95
    assert 0.99 < shares.sum() <= 1
    assert abs(np.corrcoef(points[:, 0], table[:, 1])[0, 1]) > 0.999
    np.testing.assert_allclose(points.mean(axis=0), 0, atol=1e-9)
    again, _ = figures.principal_components(-table)
    np.testing.assert_allclose(again, -points)  # the direction itself doesn't flip


@pytest.mark.parametrize(("V", "C"), [(1, 4), (2, 1), (300, 1), (5, 2)])
def test_tables_that_have_hardly_a_plane(tmp_path: Path, V: int, C: int) -> None:
    table = np.arange(V * C, dtype=np.float32).reshape(V, C) % 7
    points, shares = figures.principal_components(table)
    assert points.shape == (V, 2)
    assert all(map(math.isfinite, shares))
    kinds = list(KINDS)
    figures.draw_embedding(tmp_path / "e.png", table, ["a"] * V, [kinds[0]] * V, KINDS, title="x")


@pytest.mark.slow
def test_every_character_has_its_label(tmp_path: Path) -> None:
    """104 characters crowded in the middle: each label finds a place."""
    rng = np.random.default_rng(2)
    table = rng.standard_cauchy((104, 8)).astype(np.float32)
    labels = [f"t{i}" for i in range(104)]
    kinds = [list(KINDS)[i % len(KINDS)] for i in range(104)]
    positions = rng.normal(size=(16, 8))
    figures.draw_embedding(tmp_path / "e.svg", np.tanh(table), labels, kinds, KINDS,
                          positions=positions, title="x")  # fmt: skip
    shown = svg_texts(tmp_path / "e.svg")
    assert set(labels) <= set(shown)
    assert set(KINDS) <= set(shown)
    assert "cosine similarity" in shown
    assert [text for text in shown if text.startswith("principal component 1 (")]


# -- tokens as labels ----------------------------------------------------------------------------


def test_labels_and_kinds_of_tokens() -> None:
    chars = CharTokenizer.from_characters("aB7 \n.\t\r\x00好ß")
    found = {label_of(chars, i): token_kind(chars, i) for i in range(chars.vocab_size)}
    assert found == {
        "\\u0000": "part of a character, control", "⇥": "blank, line end, special",
        "⏎": "blank, line end, special", "\\r": "blank, line end, special",
        "␣": "blank, line end, special", ".": "punctuation, sign", "7": "number", "B": "Capital",
        "a": "lower case, other letters", "ß": "lower case, other letters",
        "好": "lower case, other letters", "<unk>": "blank, line end, special",
    }  # fmt: skip
    bytewise = byte_tokenizer()
    assert label_of(bytewise, 0xE5) == "\\xe5"
    assert token_kind(bytewise, 0xE5) == "part of a character, control"
    assert token_kind(bytewise, bytewise.vocab_size - 1) == "blank, line end, special"
    bpe = train_bpe(["the cat the cat " * 20], 270)
    labels = [label_of(bpe, i) for i in range(bpe.vocab_size)]
    assert "␣cat" in labels
    assert max(map(len, labels)) <= 14
