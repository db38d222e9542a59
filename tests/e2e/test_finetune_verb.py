"""`glassgpt finetune` as a user types it: killed, resumed, loaded by other programs."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from glassgpt.checkpoints.run_directory import load_model
from glassgpt.reporting.run_log import read_metrics

pytestmark = pytest.mark.slow

BASE = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--context-length", "64",
        "--max-steps", "30", "--batch-tokens", "512", "--sample-tokens", "0"]  # fmt: skip
HOW = ["--max-steps", "160", "--eval-interval", "40", "--checkpoint-interval", "7",
       "--batch-tokens", "256", "--log-interval", "1", "--sample-tokens", "8",
       "--patience", "none"]  # fmt: skip


def glassgpt(*arguments: object) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "glassgpt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("base") / "run"
    done = glassgpt("train", "python-manual", "--max-tokens", 50_000, *BASE, "--out", run)
    assert done.returncode == 0, done.stderr
    return run


@pytest.fixture(scope="module")
def chats(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("chats") / "sums.jsonl"
    sums = [(a, b) for a in range(10) for b in range(10)]
    path.write_text("".join(
        json.dumps({"messages": [{"role": "user", "content": f"{a} + {b}?"},
                                 {"role": "assistant", "content": f"{a + b}"}]}) + "\n"
        for a, b in sums
    ))  # fmt: skip
    return path


LORA = ["--lora-rank", "2", "--lora-dropout", "0.1", "--threads", "1"]


@pytest.mark.parametrize("how", [[], LORA], ids=["full", "lora"])
def test_killed_and_never_the_worse(base, chats, tmp_path, how) -> None:
    """kill -9 at random moments: every resume has the uninterrupted run's losses, bit for bit."""
    command = ["finetune", base, chats, *HOW, *how, "--out"]
    assert glassgpt(*command, tmp_path / "whole").returncode == 0
    run, moments, arguments = tmp_path / "run", random.Random(3), [*command, tmp_path / "run"]
    for _ in range(3):
        process = subprocess.Popen([sys.executable, "-m", "glassgpt", *map(str, arguments)],
                                   stderr=subprocess.PIPE, text=True)  # fmt: skip
        mark = _last_step(run) + moments.randint(10, 40)
        while process.poll() is None and _last_step(run) < mark:
            time.sleep(0.002)
        process.kill()
        stderr = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, stderr
        load_model(run)  # whole, and with the right checksum
        arguments = ["finetune", "--resume", run]
    assert glassgpt(*arguments).returncode == 0
    whole, resumed = (_numbers(path) for path in (tmp_path / "whole", run))
    assert whole == resumed
    assert len(whole) == 160 + 5


def _last_step(run: Path) -> int:
    try:
        return read_metrics(run / "metrics.jsonl")[-1]["step"]
    except (OSError, IndexError):
        return 0


def _numbers(run: Path) -> list[tuple]:
    rows = read_metrics(run / "metrics.jsonl")
    return [(r["step"], r.get("train_loss"), r.get("val_loss"), r.get("grad_norm")) for r in rows]


def test_the_result_says_what_is_next(base, chats, tmp_path) -> None:
    done = glassgpt("finetune", base, chats, "--max-steps", 4, "--out", tmp_path / "run")
    assert done.returncode == 0, done.stderr
    for part in ("messages", "learning: ", "chat ", "best val loss"):
        assert part in done.stderr, done.stderr


def test_two_processes_learn_what_one_does(base, chats, tmp_path) -> None:
    how = ["--max-steps", "6", "--eval-interval", "3", "--batch-tokens", "256", "--optimizer",
           "adamw", "--log-interval", "1", "--sample-tokens", "0", "--device", "cpu"]  # fmt: skip
    command = ["finetune", str(base), str(chats), *how, "--out"]
    assert glassgpt(*command, tmp_path / "one").returncode == 0
    two = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2",
           "-m", "glassgpt", *command, str(tmp_path / "two")]  # fmt: skip
    done = subprocess.run(two, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    one, two = (_numbers(tmp_path / name) for name in ("one", "two"))
    assert len(one) == len(two)
    for a, b in zip(one, two, strict=True):
        assert a[0] == b[0]
        assert [x is None for x in a] == [x is None for x in b]
        assert [x for x in a if x is not None] == pytest.approx([x for x in b if x is not None],
                                                               rel=2e-3)  # fmt: skip


def test_transformers_and_peft_load_the_result(base, tmp_path) -> None:
    import torch

    transformers = pytest.importorskip("transformers", reason="left out: needs transformers")
    peft = pytest.importorskip("peft", reason="left out: needs peft")
    text = tmp_path / "text.txt"
    text.write_text("to be or not to be, that is the question. " * 40)
    run = tmp_path / "run"
    done = glassgpt("finetune", base, text, "--lora-rank", 2, "--max-steps", 20, "--out", run)
    assert done.returncode == 0, done.stderr
    ids = torch.arange(20)[None]
    merged = transformers.AutoModelForCausalLM.from_pretrained(run)
    beside = peft.PeftModel.from_pretrained(
        transformers.AutoModelForCausalLM.from_pretrained(base), str(run / "adapter")
    )
    with torch.no_grad():
        torch.testing.assert_close(merged(ids).logits, beside(ids).logits, rtol=0, atol=1e-4)
