"""Every checkpoint format keeps the same promises: written, read back, the same logits; refused in
one line where it can't be.

A format that is added to `glassgpt.config.Format` is tested here once its suffix and
the tolerance of its numbers stand in the tables below. The run directory itself is
tested in test_run_directory.py.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import get_args

import pytest

import glassgpt
from conftest import refuse
from glassgpt.cli.app import main
from glassgpt.config import Format

FORMATS: tuple[str, ...] = get_args(Format)
SLOW = pytest.mark.slow
TO = [pytest.param(to, marks=[SLOW] if to == "onnx" else []) for to in FORMATS]  # torch's exporter
SUFFIXES = {"gguf": ".gguf", "onnx": ".onnx", "nanogpt": "-nanogpt", "numpy": ".npz"}
# The largest difference of a logit: other programs add up in another order; nanoGPT's GELU is the
# exact one, where GPT-2's is an approximation by tanh.
TOLERANCE = {"gguf": 1e-5, "onnx": 1e-4, "nanogpt": 0.01, "numpy": 0.0}
ROUNDED = {"F16": 0.01, "Q8_0": 0.05}
TEXT = "The cat sat on the mat, and the dog ate the hat. "
TINY = dict(n_layer=2, n_head=2, n_embd=32, context_length=16, batch_tokens=64, max_steps=4,
            eval_interval=4, threads=1, device="cpu", sample_tokens=0)  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A run of each shape, and a classifier."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "book.txt").write_text(TEXT * 60)
    (folder / "labels.csv").write_text(
        "text,label\na cat,good\na hat,good\nno mat,bad\nno dog,bad\n"
    )
    made = {
        shape: glassgpt.train(folder / "book.txt", out=str(folder / shape), shape=shape, **TINY).run
        for shape in ("gpt2", "modern")
    }
    judge = str(folder / "judge")
    made["judge"] = glassgpt.finetune(
        made["gpt2"], folder / "labels.csv", out=judge, max_steps=2, threads=1, device="cpu"
    ).run
    return made


def export(capsys, run: Path, *options: object) -> float:
    """The largest difference of a logit that the command measured."""
    capsys.readouterr()
    main(["export", str(run), *map(str, options)])
    found = re.search(r"largest difference in logits (\S+)", capsys.readouterr().out)
    assert found
    return float(found[1])


def expressible(shape: str, to: str) -> bool:
    return shape == "gpt2" or to != "nanogpt"


def test_every_format_has_a_tolerance() -> None:
    assert {*FORMATS} == TOLERANCE.keys() == SUFFIXES.keys()


@pytest.mark.parametrize("to", TO)
@pytest.mark.parametrize("shape", ["gpt2", "modern"])
def test_it_is_read_back_with_the_same_logits(runs, tmp_path, monkeypatch, capsys, shape, to):
    monkeypatch.chdir(tmp_path)
    if not expressible(shape, to):
        assert "can't express a model of the modern shape" in refuse(
            capsys, "export", runs[shape], "--to", to
        )
        assert list(tmp_path.iterdir()) == []
        return
    assert export(capsys, runs[shape], "--to", to) <= TOLERANCE[to]
    [made] = tmp_path.iterdir()  # nothing half-written beside it
    assert made.name == shape + SUFFIXES[to]
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    assert "exists already" in refuse(capsys, "export", runs[shape], "--to", to)
    assert {path: path.read_bytes() for path in before} == before
    assert export(capsys, runs[shape], "--to", to, "--overwrite") <= TOLERANCE[to]


@pytest.mark.parametrize("precision", ROUNDED)
@pytest.mark.parametrize("shape", ["gpt2", "modern"])
def test_rounded_weights_stay_near(runs, tmp_path, capsys, shape, precision):
    out = tmp_path / "model.gguf"
    options = ("--to", "gguf", "--precision", precision, "--out", out)
    assert export(capsys, runs[shape], *options) <= ROUNDED[precision]


@pytest.mark.parametrize("to", FORMATS)
def test_what_no_format_can_express(runs, tmp_path, capsys, to):
    out = tmp_path / "model"
    assert "classif" in refuse(capsys, "export", runs["judge"], "--to", to, "--out", out)
    assert "does not exist" in refuse(capsys, "export", tmp_path / "nowhere", "--to", to)
    if to != "nanogpt":  # which is a folder
        assert "is a folder" in refuse(capsys, "export", runs["gpt2"], "--to", to, "--out", "/tmp")
    if to != "gguf":
        rounded = ("--to", to, "--precision", "F16", "--out", out)
        assert "is for gguf" in refuse(capsys, "export", runs["gpt2"], *rounded)
    assert list(tmp_path.iterdir()) == []
