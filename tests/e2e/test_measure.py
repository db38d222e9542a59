"""`glassgpt eval` and `glassgpt bench decode` as a user types them."""

from __future__ import annotations

import re
import subprocess
import sys
from pathlib import Path

import pytest

from glassgpt.cli.app import main

pytestmark = pytest.mark.slow

RUN = Path(__file__).parents[1] / "golden" / "modern"
TEXT = "The small bird slept under the table by the fire. " * 5


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "held-out.txt"
    path.write_text(TEXT)
    return path


def refused(capsys, *arguments: object) -> str:
    """The command must end with status 2 and one line, which is returned."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as ended:
        main([str(argument) for argument in arguments])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert len(said.splitlines()) == 1
    return said


def test_eval_prints_a_table(text, capsys):
    main(["eval", str(RUN), str(text)])
    header, row = capsys.readouterr().out.splitlines()
    assert header.split("  ")[0] == "weights"
    precision, loss, perplexity, bits, tokens = row.split()
    assert (precision, int(tokens)) == ("float32", len(TEXT) - 1)
    assert 0 < float(loss) < 3.5
    assert float(loss) / float(bits) == pytest.approx(0.6931, abs=1e-3)  # a byte a character
    assert float(perplexity) > 1


def test_eval_of_standard_input(text):
    command = [sys.executable, "-m", "glassgpt", "eval", str(RUN), "-", "--max-tokens", "60"]
    done = subprocess.run(command, input=TEXT, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].split()[-1] == "59"


@pytest.mark.parametrize("weights", [["all"], ["float32", "int8", "int4"]])
def test_eval_compares_precisions(text, capsys, weights):
    main(["eval", str(RUN), str(text), "--weights", *weights, "--max-tokens", "100"])
    header, *rows = capsys.readouterr().out.splitlines()
    assert header.endswith("loss against float32")
    assert [row.split()[0] for row in rows] == ["float32", "int8", "int4"]
    assert not rows[0].endswith("%")
    assert all(re.search(r"[+-]\d+\.\d{3}%$", row) for row in rows[1:])


def test_eval_names_unknown_characters(text, capsys):
    text.write_text("The €at")
    main(["eval", str(RUN), str(text)])
    said = capsys.readouterr()
    assert "'€'" in said.err
    assert said.out.splitlines()[1].split()[-1] == "6"


def test_texts_that_eval_refuses(text, tmp_path, capsys):
    def eval_of(content: bytes) -> str:
        text.write_bytes(content)
        return refused(capsys, "eval", RUN, text)

    assert "is empty" in eval_of(b"")
    assert "has 1 of the two tokens" in eval_of(b"T")
    assert "not UTF-8" in eval_of("Größe".encode("latin-1"))
    assert "does not exist" in refused(capsys, "eval", RUN, tmp_path / "missing.txt")
    assert "folder" in refused(capsys, "eval", RUN, tmp_path)
    text.write_text(TEXT)
    assert "does not exist" in refused(capsys, "eval", tmp_path / "nowhere", text)
    assert "int2" in refused(capsys, "eval", RUN, text, "--weights", "int2")
    assert "max_tokens=0" in refused(capsys, "eval", RUN, text, "--max-tokens", "0")


def test_bench_decode_prints_a_table(capsys):
    main(["bench", "decode", str(RUN), "--engine", "torch", "--weights", "float32", "--threads",
          "1", "--prompt-tokens", "3", "20", "--new-tokens", "2"])  # fmt: skip
    header, row, memory = capsys.readouterr().out.splitlines()
    assert re.findall(r"prompt of \d+|batch \d+", header) == [
        "prompt of 3", "prompt of 20", "batch 1", "batch 8",
    ]  # fmt: skip
    assert row.startswith("torch float32 ")
    assert row.endswith("%")
    assert re.fullmatch(r"memory speed: \d+\.\d GB/s", memory)


def test_what_bench_refuses(tmp_path, capsys):
    assert "does not exist" in refused(capsys, "bench", "decode", tmp_path / "nowhere")
    assert "threads=0" in refused(capsys, "bench", "decode", RUN, "--threads", "0")
    assert "new_tokens=0" in refused(capsys, "bench", "decode", RUN, "--new-tokens", "0")
    assert "decode" in refused(capsys, "bench", "encode", RUN)
