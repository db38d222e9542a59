"""A classifier on the command line: `sample --text`, and what does not go with one."""

from __future__ import annotations

import io
import sys
from pathlib import Path

import pytest

import glassgpt
from conftest import classifier_weights, refuse, tiny_config, tiny_model, weights_of
from glassgpt.checkpoints.run_directory import Checkpoint, save_model
from glassgpt.cli.app import main
from glassgpt.inference.classify import set_score_head
from glassgpt.tokenizers.tokenizer import CharTokenizer, byte_tokenizer

pytestmark = pytest.mark.slow

LABELS = ("very bad", "bad", "good")
TEXT = "A good film."


@pytest.fixture
def run(tmp_path: Path) -> Path:
    config = tiny_config("modern", vocab_size=257)
    model = tiny_model(config)
    set_score_head(model, len(LABELS))
    weights = classifier_weights(model)
    weights["score.weight"] *= 40
    save_model(tmp_path / "run", Checkpoint(config, weights, byte_tokenizer(), labels=LABELS))
    return tmp_path / "run"


@pytest.fixture
def writer(tmp_path: Path) -> Path:
    """A model that is no classifier."""
    config = tiny_config("modern")
    tokenizer = CharTokenizer.from_characters("abc")
    save_model(tmp_path / "w", Checkpoint(config, weights_of(tiny_model(config)), tokenizer))
    return tmp_path / "w"


def test_labels_most_likely_first(run: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    main(["sample", str(run), "--text", TEXT])
    said = capsys.readouterr()
    rows = [line.rsplit(maxsplit=1) for line in said.out.splitlines()]
    expected = glassgpt.load(run).classify([TEXT])[0]
    assert [(label, float(p)) for label, p in rows] == [
        (label, pytest.approx(p, abs=1e-4)) for label, p in expected.items()
    ]
    assert {label for label, _ in rows} == set(LABELS)
    probabilities = list(expected.values())
    assert probabilities == sorted(probabilities, reverse=True)
    assert probabilities[0] > 0.4
    assert said.err == ""
    (tmp_path / "text.txt").write_text(TEXT + "\n")  # the last line end is not read
    main(["sample", str(run), "--text", f"@{tmp_path / 'text.txt'}"])
    assert capsys.readouterr().out == said.out
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(TEXT.encode() + b"\r\n")))
    main(["sample", str(run), "--text", "-"])
    assert capsys.readouterr().out == said.out
    main(["sample", str(run), "--text", TEXT + " and more than the context holds"])
    assert "only the first 13 tokens" in capsys.readouterr().err


def test_what_does_not_go_together(run: Path, writer: Path, tmp_path: Path, capsys) -> None:
    (tmp_path / "book.txt").write_text(TEXT)
    for command in (["sample", run], ["sample", run, "--prompt", "x"],
                    ["eval", run, tmp_path / "book.txt"],
                    ["export", run, "--to", "gguf", "--out", tmp_path / "x.gguf"],
                    ["train", tmp_path / "book.txt", "--from", run],
                    ["bench", "decode", run]):  # fmt: skip
        said = refuse(capsys, *command)
        assert f"{run} is a classifier (3 labels)" in said
        assert f"glassgpt sample {run} --text" in said
    assert f"{writer} is no classifier" in refuse(capsys, "sample", writer, "--text", "abc")
    assert "do not go with it" in refuse(capsys, "sample", run, "--text", "a", "--prompt", "b")
    assert "do not go with it" in refuse(capsys, "sample", run, "--text", "a", "--top-k", 3)
    assert "text 1 is empty" in refuse(capsys, "sample", run, "--text", "")
    assert "does not exist" in refuse(capsys, "sample", run, "--text", f"@{tmp_path / 'no.txt'}")


def test_in_python(run: Path, writer: Path) -> None:
    model = glassgpt.load(run)
    assert model.labels == LABELS
    assert len(model.classify([TEXT, "x", "yz"])) == 3
    assert model.classify([]) == []
    with pytest.raises(glassgpt.UserError, match="is a classifier"):
        model.generate("A good")
    assert glassgpt.load(writer).labels == ()
    with pytest.raises(glassgpt.UserError, match="is no classifier"):
        glassgpt.load(writer).classify(TEXT)
