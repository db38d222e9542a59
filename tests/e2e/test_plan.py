"""`glassgpt plan` as a user types it."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from glassgpt.cli.app import main

pytestmark = pytest.mark.slow

TINY = ["--n-layer", "1", "--n-head", "2", "--n-embd", "16", "--context-length", "8",
        "--batch-tokens", "32", "--threads", "1"]  # fmt: skip


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text("abcdefghij" * 100)
    return path


def plan(capsys, *arguments: object) -> dict[str, str]:
    """The printed table: name -> the rest of the line."""
    capsys.readouterr()
    main(["plan", *map(str, arguments)])
    lines = capsys.readouterr().out.splitlines()
    return dict(re.split(r" +", line.strip(), maxsplit=1) for line in lines)


def refused(capsys, *arguments: object) -> str:
    """The command must end with status 2 and one line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main(["plan", *map(str, arguments)])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert len(said.splitlines()) == 1
    return said


def test_gpt2_on_eight_cards(capsys):
    said = plan(capsys, "--preset", "gpt2-124m", "--gpu", "a100", "--gpus", 8, "--mfu", 0.4,
                "--price", "1.80")  # fmt: skip
    assert said["parameters"].startswith("124,337,664 (embeddings 39.4 M, attention 28.3 M")
    assert said["tokens"].startswith("600,000 steps of 491,520: 294.9 billion")
    assert said["fits"].startswith("yes, in the 40.0 GB of one; up to --micro-batch-size ")
    parts = [float(said[name]) for name in ("weights", "gradients", "optimizer", "activations",
                                            "other")]  # fmt: skip
    assert sum(parts) == pytest.approx(float(said["memory"].split()[0]), abs=0.03)
    days = float(re.search(r"\(([\d.]+) days\)", said["time"]).group(1))
    hours = float(said["GPU-hours"].replace(",", ""))
    dollars = float(said["price"].split()[0].strip("$").replace(",", ""))
    assert days == pytest.approx(2.9, abs=0.05)
    assert hours == pytest.approx(8 * 24 * days, rel=0.02)
    assert dollars == pytest.approx(1.8 * hours, rel=1e-3)


def test_what_does_not_fit_is_told_what_would(capsys):
    options = ["--preset", "gpt2-124m", "--gpu", "T4"]
    said = plan(capsys, *options, "--micro-batch-size", 64)
    [rows] = re.findall(r"not in the 16.0 GB of one; --micro-batch-size (\d+) would", said["fits"])
    assert plan(capsys, *options, "--micro-batch-size", rows)["fits"].startswith("yes")
    assert plan(capsys, *options, "--n-layer", 900)["fits"].startswith("no, not even one sequence")


def test_a_text_on_this_machine(capsys, book):
    said = plan(capsys, book, *TINY, "--max-steps", 90, "--price", 2)
    assert "vocabulary 11" in said["model"]  # ten letters and <unk>
    assert said["tokens"] == "90 steps of 32: 2,880, 3.2 epochs of 900"
    assert "measured" in said["speed"]
    assert "GPU-hours" not in said
    assert said["price"].startswith("$0.0")
    assert not list(book.parent.glob("runs"))


def test_prepared_data_are_counted(capsys, book, tmp_path):
    main(["prepare", str(book), "--out", str(tmp_path / "data"), "--tokenizer", "bpe:260"])
    said = plan(capsys, tmp_path / "data", *TINY, "--gpu", "L4")
    assert "vocabulary 260" in said["model"]
    assert "epochs of" in said["tokens"]
    unprepared = plan(capsys, book, *TINY, "--gpu", "L4", "--tokenizer", "bpe:270")
    assert "vocabulary 270" in unprepared["model"]
    assert "epochs unknown: the text is not prepared yet" in unprepared["tokens"]
    main(["train", str(book), *TINY, "--max-steps", "1", "--tokenizer", "bpe:265", "--out",
          str(tmp_path / "run")])  # fmt: skip
    cached = plan(capsys, book, *TINY, "--gpu", "L4", "--tokenizer", "bpe:265")
    assert "epochs of" in cached["tokens"]


def test_what_plan_refuses(capsys, tmp_path):
    assert "Did you mean 'A100'" in refused(capsys, "--gpu", "A1000")
    assert "price=-1" in refused(capsys, "--gpu", "A100", "--price", -1)
    assert "mfu=0.0" in refused(capsys, "--gpu", "A100", "--mfu", 0)
    assert "mfu=1.5" in refused(capsys, "--gpu", "A100", "--mfu", 1.5)
    assert "mfu=0.5 needs --gpu" in refused(capsys, "--mfu", 0.5)
    assert "gpus=8 needs --gpu" in refused(capsys, "--gpus", 8)
    assert "gpus=0" in refused(capsys, "--gpu", "A100", "--gpus", 0)
    assert "no preset" in refused(capsys, "--preset", "gpt")
    assert "--n-layer" in refused(capsys, "--n-lyer", 3)
    assert "n_embd" in refused(capsys, "--gpu", "A100", "--n-embd", 30, "--n-head", 4)
    (tmp_path / "empty.txt").touch()
    assert "is empty" in refused(capsys, tmp_path / "empty.txt", "--gpu", "A100")
    assert "tokenizer" in refused(capsys, "--gpu", "A100", "--tokenizer", "chars")
