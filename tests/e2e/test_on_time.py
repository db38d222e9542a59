"""`--budget`, `plan --budget` and `bench train` as a user types them: whole processes, real time.

A busy machine makes everything late, so nothing here asserts how long something took: that is
measured by `benchmarks/budget.py time`.
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import glassgpt
from conftest import refuse
from glassgpt.checkpoints.run_directory import load_model
from glassgpt.cli.app import main
from glassgpt.cli.demo import demo
from glassgpt.reporting.run_log import read_metrics
from glassgpt.training.run import train
from listener import Listener

pytestmark = pytest.mark.slow

SHAPE = ["--n-layer", "1", "--n-head", "2", "--n-embd", "32", "--context-length", "32"]
SMALL = [*SHAPE, "--threads", "1", "--device", "cpu", "--sample-tokens", "20",
         "--log-interval", "1"]  # fmt: skip
HERE = dict(threads=1, device="cpu", sample_tokens=20, log_interval=1)  # the same, in this process


@pytest.fixture(scope="module")
def book(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "book.txt"
    path.write_text("The cat sat on the mat, and the dog ate the hat. Nobody knows why. " * 600)
    for shape in ("modern", "gpt2"):  # compiles the kernels, which takes longer than our budgets
        train(path, out=path.parent / shape, shape=shape, n_layer=1, n_head=2, n_embd=32,
              context_length=32, batch_tokens=64, max_steps=1, eval_batches=1, **HERE)  # fmt: skip
    return path


@pytest.fixture(scope="module")
def run(book: Path) -> Path:
    """A run of eight seconds that nothing disturbed."""
    result = train(book, out=book.parent / "run", budget="8s", n_layer=1, n_head=2, n_embd=32,
                   context_length=32, **HERE)  # fmt: skip
    return result.run


def command(*arguments: object) -> list[str]:
    return [sys.executable, "-m", "glassgpt", *map(str, arguments)]


def glassgpt_process(*arguments: object, **options) -> subprocess.CompletedProcess:
    return subprocess.run(command(*arguments), capture_output=True, text=True, timeout=300,
                          **options)  # fmt: skip


def rows_of(run: Path, key: str) -> list[dict]:
    return [row for row in read_metrics(run / "metrics.jsonl") if key in row]


def state_of(run: Path) -> dict:
    return json.loads((run / "checkpoints/last/state.json").read_text())


def is_complete(run: Path) -> None:
    """The decay is over, the last model was evaluated, the report says what was planned."""
    rates = [row["lr"] for row in rows_of(run, "lr")]
    assert rates[-1] < max(rates) / 5
    last = rows_of(run, "val_loss")[-1]
    assert last["step"] == state_of(run)["step"]
    assert load_model(run).info["best_val_loss"] <= last["val_loss"]
    report = (run / "report.md").read_text()
    planned, reached = re.search(r"^\| tokens seen \| (\S+) \| (\S+) ", report, re.M).groups()
    assert int(planned.replace(",", "")) > 0
    assert int(reached.replace(",", "")) == last["tokens"]
    assert (run / "loss.png").exists()


# -- from the first second to the last -----------------------------------------------------------


def test_a_budget_with_a_shape(run):
    is_complete(run)
    about = load_model(run)
    assert (about.config.n_layer, about.config.n_embd, about.config.context_length) == (1, 32, 32)
    assert about.info["train"]["budget"] == "8s"
    ours, theirs = glassgpt.load(str(run)), AutoModelForCausalLM.from_pretrained(run)
    assert theirs.num_parameters() == about.config.n_parameters
    text = "The dog sat"
    assert AutoTokenizer.from_pretrained(run)(text)["input_ids"] == ours.tokenizer.encode(text)
    evaluations = rows_of(run, "val_loss")
    assert evaluations[-1]["val_loss"] < 1  # it learns the sentence
    assert "## step 0" in (run / "samples.md").read_text()


def test_the_budget_is_used_up(run, capsys):
    assert "more --budget goes on" in refuse(capsys, "train", "--resume", run)


def test_a_budget_alone_chooses_the_shape(book, tmp_path):
    done = glassgpt_process("train", book, "--budget", "20s", "--log-interval", 1, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    is_complete(tmp_path / "runs/book")
    shape = re.search(r"plan: (\d+) layers, (\d+) wide, context (\d+)", done.stderr).groups()
    config = load_model(tmp_path / "runs/book").config
    assert tuple(map(int, shape)) == (config.n_layer, config.n_embd, config.context_length)
    assert re.search(r"expected \d+\.\d\d after .* reached \d+\.\d{3} after", done.stderr)
    assert "twice the time would be expected to give" in done.stderr


def test_a_preset_keeps_its_shape(book, tmp_path):
    result = train(book, preset="bigram", budget="8s", out=tmp_path / "run", **HERE)
    config = load_model(result.run).config
    assert (config.n_layer, config.n_embd, config.context_length) == (0, 64, 64)
    is_complete(result.run)


@pytest.mark.parametrize("shape", ["modern", "gpt2"])
def test_a_base_keeps_its_shape(book, tmp_path, shape):
    base = book.parent / shape
    result = train(book, init_from=base, budget="8s", out=tmp_path / "tuned", **HERE)
    config, before = (load_model(path).config for path in (result.run, base))
    assert dataclasses.replace(config, dropout=0.0) == before
    is_complete(result.run)


def test_a_limit_of_steps_inside_the_budget(book, tmp_path):
    result = train(book, out=tmp_path / "run", budget="2m", max_steps=60, n_layer=1, n_head=2,
                   n_embd=32, context_length=32, **HERE)  # fmt: skip
    assert (result.step, result.finished) == (60, True)
    is_complete(result.run)


def test_two_processes_end_together(book, tmp_path):
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone",
                "--nproc-per-node", "2", *command("train", book, "--budget", "20s", *SMALL,
                                                  "--out", tmp_path / "run")[1:]]  # fmt: skip
    done = subprocess.run(torchrun, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stderr.count("plan: ") == 1
    is_complete(tmp_path / "run")


# -- interrupted ---------------------------------------------------------------------------------


@pytest.mark.parametrize("how", [signal.SIGTERM, signal.SIGKILL])
def test_a_resumed_budget_has_the_time_that_was_left(book, tmp_path, how):
    run = tmp_path / "run"
    process = subprocess.Popen(
        command("train", book, "--budget", "25s", *SMALL, "--out", run),
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    while process.poll() is None and not _rows(run):
        time.sleep(0.02)
    process.send_signal(how)
    stderr = process.communicate(timeout=60)[1]
    assert process.returncode == (143 if how == signal.SIGTERM else -signal.SIGKILL), stderr
    assert not (run / "report.md").exists()
    before = state_of(run)
    assert before["plan"]["seconds"] == 25
    assert 0 < before["seconds"] < 25
    time.sleep(1)  # a pause does not count
    result = train(resume=run)
    assert result.finished
    assert result.step > before["step"]
    assert before["seconds"] < result.seconds
    assert state_of(run)["plan"] == before["plan"]
    is_complete(run)


def _rows(run: Path) -> list[dict]:
    try:
        return read_metrics(run / "metrics.jsonl")
    except OSError:
        return []


# -- what is refused -----------------------------------------------------------------------------


def test_budgets_that_can_not_be(book, tmp_path, capsys):
    out = ["--out", tmp_path / "run"]
    assert "budget=1s is too short" in refuse(capsys, "train", book, "--budget", "1s", *out)
    for text in ("soon", "5 minutes", "-5m", "0"):
        assert "is no duration; write 30s, 5m or 1h30m" in refuse(
            capsys, "train", book, f"--budget={text}", *out)  # fmt: skip
    assert "is no amount of memory" in refuse(capsys, "train", book, "--memory", "much", *out)
    said = refuse(capsys, "train", book, "--budget", "1h", "--memory", "1MB", *out)
    assert "memory" in said
    (tmp_path / "short.txt").write_text("short")
    assert "too few" in refuse(capsys, "train", tmp_path / "short.txt", "--budget", "1h", *out)
    said = refuse(capsys, "train", book, "--budget", "1h", "--n-embd", 101, *out)
    assert "even" in said
    assert not (tmp_path / "run").exists()


# -- plan ----------------------------------------------------------------------------------------


def test_a_plan_trains_nothing(book, tmp_path):
    options = ["--n-layer", 1, "--n-embd", 64]
    done = glassgpt_process("plan", book, "--budget", "1m", *options, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert re.search(r"plan: 1 layers, 64 wide, .* expected loss \d\.\d\d", done.stderr)
    said = {line[:19].strip(): line[19:] for line in done.stdout.splitlines()}
    assert said["time"] == "1m 00s"
    assert said["model"].startswith("1 layers, 2 heads, 64 wide")
    assert re.search(r"\d tokens/s", said["speed"])
    assert re.fullmatch(r"\d\.\d\d nats per token", said["expected loss"])
    assert float(said["in twice the time"]) <= float(said["expected loss"].split()[0])
    for name in ("context-length", "dropout", "learning-rate", "batch-tokens"):
        assert f"--{name} " in said["chosen"]
    assert "max-steps" not in said["chosen"]
    assert os.listdir(tmp_path) == []


def test_what_a_plan_of_a_budget_refuses(book, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for elsewhere in (["--gpu", "A100"], ["--gpus", 8], ["--mfu", 0.4]):
        assert "without --gpu" in refuse(capsys, "plan", book, "--budget", "5m", *elsewhere)
    assert "nothing to train on" in refuse(capsys, "plan", "--budget", "5m")
    assert "is no duration" in refuse(capsys, "plan", book, "--budget", "5min")
    assert "memory" in refuse(capsys, "plan", book, "--budget", "5m", "--memory", "1MB")
    assert os.listdir(tmp_path) == []


# -- demo ----------------------------------------------------------------------------------------


def test_the_demo_is_a_budget(tmp_path, monkeypatch):
    reporter = Listener()
    said = reporter.said
    monkeypatch.chdir(tmp_path)
    result = demo(reporter, budget="10s", n_layer=1, n_embd=64, log_interval=1)
    told = "\n".join(said)
    assert "using the Python manual" in told
    assert re.search(r"^plan: 1 layers, 64 wide", told, flags=re.M)
    assert "twice the time would be expected to give" in told
    assert f"{result.run / 'report.md'}" in told
    assert result.best_val_loss < result.first_val_loss - 0.5
    is_complete(tmp_path / result.run)


# -- bench train ---------------------------------------------------------------------------------


def bench(capsys, *arguments: object) -> dict[str, list[str]]:
    """The printed table: name -> the cells behind it; the line below it under "tokens/s"."""
    capsys.readouterr()
    main([str(argument) for argument in ("bench", "train", *arguments)])
    *rows, below = capsys.readouterr().out.splitlines()
    table = [re.split(r"  +", row.strip()) for row in rows]
    return {name: cells for name, *cells in table} | {"tokens/s": [below]}


@pytest.mark.parametrize("what", ["run", "preset"])
def test_the_parts_of_a_step_add_up(run, capsys, what):
    arguments = [run] if what == "run" else ["--preset", "shakespeare-cpu", "--n-layer", "1"]
    said = bench(capsys, *arguments, "--seconds", "0.2", "--threads", 1, "--device", "cpu",
                 "--batch-tokens", "640")  # fmt: skip
    assert said["a step"] == ["ms", "share"]
    parts = [said[name] for name in ("data", "forward", "backward", "optimizer")]
    [together] = said["together"]
    total = sum(float(milliseconds) for milliseconds, _ in parts)
    assert total == pytest.approx(float(together.replace(",", "")), abs=0.03)
    assert sum(int(share.rstrip("%")) for _, share in parts) == pytest.approx(100, abs=2)
    assert float(said["evaluation of 640 tokens"][0]) > 0
    speed = re.match(r"([\d,]+) tokens/s in (float32|bfloat16) · [\d,]+ GFLOP/s, (\d+)% \(MFU\)",
                     said["tokens/s"][0])  # fmt: skip
    per_second = 640 / (float(together.replace(",", "")) / 1e3)
    assert int(speed[1].replace(",", "")) == pytest.approx(per_second, rel=0.02)


def test_what_bench_refuses(run, capsys, tmp_path):
    for options in (["--n-layer", 3], ["--preset", "bigram"], ["--batch-tokens", 64]):
        assert "no options of training" in refuse(capsys, "bench", "decode", run, *options)
    assert "needs a RUN" in refuse(capsys, "bench", "decode")
    assert "does not exist" in refuse(capsys, "bench", "train", tmp_path / "nowhere")
    assert "seconds=0" in refuse(capsys, "bench", "train", "--seconds", 0)
    assert "no preset" in refuse(capsys, "bench", "train", "--preset", "gpt9")
