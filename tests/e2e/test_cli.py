"""The command line as people type it: whole processes, real files, real signals."""

from __future__ import annotations

import gzip
import json
import os
import random
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from conftest import refuse
from glassgpt.checkpoints.run_directory import load_model, snapshots
from glassgpt.cli.app import main
from glassgpt.reporting.run_log import read_metrics

pytestmark = pytest.mark.slow


def tiny(**changes: object) -> list[str]:
    """Options of a run that takes a moment."""
    options = dict(n_layer=1, n_head=2, n_embd=12, context_length=9, batch_tokens=54, max_steps=6,
                   eval_interval=3, log_interval=1, sample_tokens=3, threads=1)  # fmt: skip
    pairs = ((f"--{name.replace('_', '-')}", str(v)) for name, v in (options | changes).items())
    return [word for pair in pairs for word in pair]


TINY = tiny()
SENTENCE = "The cat sat on the mat, and the dog ate the hat. "


def glassgpt(*arguments: object, **options) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "glassgpt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=300, **options)


@pytest.fixture
def book(tmp_path: Path) -> Path:
    path = tmp_path / "book.txt"
    path.write_text(SENTENCE * 60)
    return path


@pytest.fixture
def run(tmp_path: Path, book: Path) -> Path:
    main(["train", str(book), "--out", str(tmp_path / "run"), *TINY])
    return tmp_path / "run"


# -- the way things should go --------------------------------------------------------------------


def test_prepare_train_sample_from_the_shell(tmp_path, book):
    done = glassgpt("prepare", book, "--out", "data", "--tokenizer", "bpe:280", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "documents    1" in done.stdout
    done = glassgpt("train", "data", *TINY, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "best val loss" in done.stderr
    assert (tmp_path / "runs/data/model.safetensors").exists()
    done = glassgpt("sample", "runs/data", "--prompt", "The cat", "--max-new-tokens", 20,
                    "--temperature", 0, cwd=tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("The cat")
    assert "[length]" in done.stderr
    done = glassgpt("train", "data", *TINY, cwd=tmp_path)  # a second run takes the next free name
    assert (tmp_path / "runs/data-2/model.safetensors").exists(), done.stderr


def test_prompts_from_file_and_standard_input(run, tmp_path):
    (tmp_path / "prompt.txt").write_text("the dog")
    options = ["--max-new-tokens", "12", "--seed", "3"]
    outputs = [
        glassgpt("sample", run, "--prompt", "the dog", *options).stdout,
        glassgpt("sample", run, "--prompt", f"@{tmp_path / 'prompt.txt'}", *options).stdout,
        glassgpt("sample", run, "--prompt", "-", *options, input="the dog").stdout,
    ]
    assert outputs[0] == outputs[1] == outputs[2]
    assert outputs[0].startswith("the dog")
    alone = glassgpt("sample", run, "--prompt", "the dog", "--completion-only", *options).stdout
    assert "the dog" + alone == outputs[0]


def test_sampling_options(run, capsys):
    main(["sample", str(run), "--prompt", "The €at", "--num-samples", "3", "--max-new-tokens",
          "30", "--top-k", "5", "--top-p", "0.9", "--min-p", "0.01", "--repetition-penalty", "1.1",
          "--stop", "zzz", "--stop", "\n"])  # fmt: skip
    said = capsys.readouterr()
    assert said.out.count("--- sample") == 3
    assert "'€'" in said.err
    main(["sample", str(run), "--prompt", "The", "--max-new-tokens", "0"])
    assert capsys.readouterr().out == "The\n"


def test_a_preset_a_file_and_the_command_line(tmp_path, book, capsys):
    (tmp_path / "run.toml").write_text("n-layer = 1\nn_embd = 12\nn_head = 3\nmax_steps = 4\n")
    main(["train", str(book), "--preset", "bigram", "--config", str(tmp_path / "run.toml"),
          "--n-head", "2", "--context-length", "8", "--batch-tokens", "32",
          "--out", str(tmp_path / "run")])  # fmt: skip
    about = json.loads((tmp_path / "run/glassgpt.json").read_text())
    assert about["model"]["n_head"] == 2  # command line
    assert about["model"]["n_layer"] == 1  # file
    assert about["train"]["warmup_steps"] == 20  # preset
    assert about["train"]["beta1"] == 0.9  # default
    assert about["step"] <= 4


def test_killed_ten_times_and_never_the_worse(tmp_path, book):
    """kill -9 at random moments: every resume has the uninterrupted run's losses, bit for bit."""
    options = tiny(max_steps=1500, eval_interval=100, checkpoint_interval=7)
    assert glassgpt("train", book, "--out", tmp_path / "whole", *options).returncode == 0
    run, kills, moments = tmp_path / "run", 0, random.Random(11)
    command = ["train", book, "--out", run, *options]
    while kills < 10:
        process = subprocess.Popen([sys.executable, "-m", "glassgpt", *map(str, command)],
                                   stderr=subprocess.PIPE, text=True)  # fmt: skip
        mark = _last_step(run) + moments.randint(1, 130)
        while process.poll() is None and _last_step(run) < mark:
            time.sleep(0.002)
        time.sleep(moments.random() * 0.05)
        process.kill()
        stderr = process.communicate()[1]
        assert process.returncode == -signal.SIGKILL, stderr
        kills += 1
        load_model(run)  # whole, and with the right checksum
        command = ["train", "--resume", run]
    assert glassgpt("train", "--resume", run).returncode == 0
    whole, resumed = (_numbers(path) for path in (tmp_path / "whole", run))
    assert whole == resumed
    assert len(whole) == 1500 + 16


def _last_step(run: Path) -> int:
    try:
        return read_metrics(run / "metrics.jsonl")[-1]["step"]
    except (OSError, IndexError):
        return 0


def _numbers(run: Path) -> list[tuple]:
    rows = read_metrics(run / "metrics.jsonl")
    return [(r["step"], r.get("train_loss"), r.get("val_loss"), r.get("grad_norm")) for r in rows]


def test_two_processes_compute_what_one_does(tmp_path, book):
    # Not Muon, which makes small gradients as large as others, and so their rounding errors, too.
    options = tiny(max_steps=8, eval_interval=4, device="cpu", optimizer="adamw", dtype="float32")
    assert glassgpt("train", book, "--out", tmp_path / "one", *options).returncode == 0
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", "-m", "glassgpt", "train", str(book),
               "--out", str(tmp_path / "two"), "--snapshots", *options]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert list(snapshots(tmp_path / "two")) == [0, 1, 2, 3, 4, 6, 8]
    one, two = (_numbers(tmp_path / name) for name in ("one", "two"))
    assert [row[0] for row in one] == [row[0] for row in two]
    flat = [np.array([x or 0.0 for row in rows for x in row]) for rows in (one, two)]
    np.testing.assert_allclose(flat[0], flat[1], rtol=2e-5)
    assert glassgpt("sample", tmp_path / "two", "--max-new-tokens", 3).returncode == 0


def test_an_error_of_one_process_ends_all_with_one_line(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone",
               "--nproc-per-node", "2", "-m", "glassgpt", "train", str(tmp_path / "missing.txt"),
               *tiny(device="cpu")]  # fmt: skip
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode != 0
    ours = [line for line in done.stderr.splitlines() if "glassgpt" in line and "missing" in line]
    assert len([line for line in ours if line.startswith("glassgpt: ")]) == 1
    assert "Connection closed" not in done.stderr


def test_real_out_of_memory_halves_the_micro_batch(tmp_path):
    text = tmp_path / "long.txt"
    text.write_text(SENTENCE * 400)
    code = f"""
import resource, torch
from glassgpt.training.run import train
from glassgpt.system import Reporter
class Show(Reporter):
    def say(self, text=""): print(text)
size = next(int(l.split()[1]) for l in open("/proc/self/status") if l.startswith("VmSize"))
resource.setrlimit(resource.RLIMIT_AS, (size * 1024 + (900 << 20), resource.RLIM_INFINITY))
r = train({str(text)!r}, out={str(tmp_path / "run")!r}, n_layer=1, n_head=2, n_embd=32,
      context_length=64, batch_tokens=1 << 19, max_steps=1, eval_batches=1, sample_tokens=0,
      threads=1, device="cpu", reporter=Show())
print("finished at", r.step)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "out of memory: going on with micro_batch_size=" in done.stdout
    assert "finished at 1" in done.stdout


def test_output_into_a_closed_pipe_is_no_traceback(run):
    command = f"{sys.executable} -m glassgpt sample {run} --max-new-tokens 3000 | head -c 5"
    done = subprocess.run(command, shell=True, capture_output=True, text=True, timeout=120)
    assert "Traceback" not in done.stderr


def test_an_interrupted_training_says_so_to_the_shell(tmp_path, book):
    command = [sys.executable, "-m", "glassgpt", "train", str(book), "--out", str(tmp_path / "run"),
               *tiny(max_steps=100_000, eval_interval=1000)]  # fmt: skip
    for sent, status in ((signal.SIGINT, 130), (signal.SIGTERM, 143)):
        process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        before = _last_step(tmp_path / "run")
        while process.poll() is None and _last_step(tmp_path / "run") < before + 5:
            time.sleep(0.01)
        process.send_signal(sent)
        stderr = process.communicate(timeout=60)[1]
        assert process.returncode == status, stderr
        assert "go on with" in stderr
        assert "next:" not in stderr
        command = [sys.executable, "-m", "glassgpt", "train", "--resume", str(tmp_path / "run")]


def test_a_terminal_without_the_characters(tmp_path):
    (tmp_path / "greek.txt").write_text("αβγδ ".replace(" ", "") * 300, encoding="utf-8")
    ascii_only = {**os.environ, "PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}
    done = glassgpt("train", "greek.txt", "--out", "run", *TINY, "--sample-prompt", "αz",
                    cwd=tmp_path, env=ascii_only)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "note: --sample-prompt" in done.stderr
    done = glassgpt("sample", "run", "--prompt", "α", cwd=tmp_path, env=ascii_only)
    assert done.returncode == 0, done.stderr
    assert re.fullmatch(r"(\?|<unk>|\n)+", done.stdout)


def test_a_sample_prompt_of_bad_bytes(tmp_path, book):
    done = subprocess.run(
        [sys.executable, "-m", "glassgpt", "train", book, "--out", tmp_path / "run", *TINY,
         "--sample-prompt", b"T\xffe"], capture_output=True)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "## step 6" in (tmp_path / "run/samples.md").read_text()


# -- bad input: one line, status 2, nothing damaged ----------------------------------------------


def test_texts_that_cannot_be_used(tmp_path, book, capsys):
    def file(name: str, content: bytes) -> Path:
        (tmp_path / name).write_bytes(content)
        return tmp_path / name

    def train(path: object, **changes: object) -> str:
        return refuse(capsys, "train", path, "--out", tmp_path / "run", *tiny(**changes))

    assert "does not exist" in train(tmp_path / "missing.txt")
    assert "empty" in train(file("empty.txt", b""))
    assert "binary" in train(file("data.bin", bytes(range(256)) * 20))
    assert "use more text" in train(file("x.txt", b"x"))
    assert "too few" in train(file("short.txt", b"short"), context_length=500)
    assert "not UTF-8" in train(file("latin.txt", "Größe".encode("latin-1") * 50))
    lines = b'{"text": "one"}\n{"body": "two", "id": 3}\n'
    line = train(file("a.jsonl", lines))
    assert "2" in line
    assert "body" in line
    assert "--text-field" in line or "text_field" in line
    assert "a.jsonl" in train(file("a.jsonl", b'{"text": "one"}\n{"text": oops\n'))
    cut = gzip.compress(os.urandom(900).hex().encode())[:300]
    assert "cut short" in train(file("cut.txt.gz", cut))
    assert not (tmp_path / "run").exists()


def test_wrong_options(tmp_path, book, run, capsys):
    out = ["--out", tmp_path / "other"]
    line = refuse(capsys, "train", book, *out, "--n-embd", "100", "--n-head", "3")
    assert "n_embd=100" in line
    assert "n_head=3" in line
    assert "--learning-rate" in refuse(capsys, "train", book, *out, "--learning-rte", "1")
    assert "'abc'" in refuse(capsys, "train", book, *out, "--max-steps", "abc").replace('"', "'")
    assert "shakespeare-char" in refuse(capsys, "train", book, *out, "--preset", "shakespeare-chr")
    assert "bpe:N" in refuse(capsys, "train", book, *out, "--tokenizer", "bpe")
    assert "exists already" in refuse(capsys, "train", book, "--out", run, *TINY)
    assert "exists already" in refuse(capsys, "prepare", book, "--out", run)
    assert "demo" in refuse(capsys, "dmo")
    (tmp_path / "bad.toml").write_text("n_layr = 3\n")
    assert "'n_layer'" in refuse(capsys, "train", book, *out, "--config", tmp_path / "bad.toml")
    (tmp_path / "bad.toml").write_text("n_layer = \n")
    assert "not valid TOML" in refuse(
        capsys, "train", book, *out, "--config", tmp_path / "bad.toml"
    )
    main(["sample", str(run), "--stop", "-a", "--max-new-tokens", "2"])
    assert "top_p" in refuse(capsys, "sample", run, "--top-p", "1.5")
    assert "num_samples" in refuse(capsys, "sample", run, "--num-samples", "1000000000")
    assert "threads" in refuse(capsys, "train", book, *out, "--threads", "100000")
    assert "seed" in refuse(capsys, "train", book, *out, "--seed", str(1 << 64))
    assert "workers" in refuse(capsys, "prepare", book, *out, "--workers", "-1")
    assert "does not exist" in refuse(capsys, "sample", tmp_path / "nowhere")
    assert "holds no model" in refuse(capsys, "sample", tmp_path)
    assert "does not exist" in refuse(capsys, "sample", run, "--prompt", "@missing.txt")
    assert not (tmp_path / "other").exists()


def test_damaged_checkpoints(run, capsys):
    weights = run / "model.safetensors"
    good = weights.read_bytes()
    weights.write_bytes(good[: len(good) // 2])
    assert "truncated or damaged" in refuse(capsys, "sample", run)
    flipped = bytearray(good)
    flipped[-100] ^= 4
    weights.write_bytes(flipped)
    assert "checksum" in refuse(capsys, "sample", run)
    weights.write_bytes(good)
    (run / "checkpoints/last/optimizer.safetensors").write_bytes(b"nothing")
    assert "damaged" in refuse(capsys, "train", "--resume", run, "--max-steps", "9")
    (run / "config.json").write_text("{")
    assert "config.json" in refuse(capsys, "sample", run)


def test_data_of_another_tokenizer(tmp_path, book, capsys):
    main(["prepare", str(book), "--out", str(tmp_path / "data")])
    main(["prepare", str(book), "--out", str(tmp_path / "bytes"), "--tokenizer", "byte"])
    os.replace(tmp_path / "bytes/tokenizer.json", tmp_path / "data/tokenizer.json")
    line = refuse(capsys, "train", tmp_path / "data", "--out", tmp_path / "run", *TINY)
    assert "another tokenizer" in line


def test_no_network(tmp_path, capsys):
    line = refuse(capsys, "train", "shakespeare", "--out", tmp_path / "run", *TINY)
    assert "shakespeare" in line
    assert "http" in line
    assert not (tmp_path / "run").exists()


def test_disk_full(small_disk, tmp_path, book, capsys):
    line = refuse(capsys, "train", book, "--out", small_disk / "run", *tiny(n_embd=256))
    assert "no space left" in line
    big = tmp_path / "big.txt"
    big.write_text(SENTENCE * 30_000)
    assert "no space left" in refuse(capsys, "prepare", big, "--out", small_disk / "data")
    assert not (small_disk / "data").exists()


def test_disk_full_in_the_middle_keeps_the_last_checkpoint(small_disk, tmp_path, book, capsys):
    run = small_disk / "run"
    main(["train", str(book), "--out", str(run), *TINY])
    free = os.statvfs(small_disk)
    (small_disk / "other").write_bytes(b"x" * (free.f_bavail * free.f_frsize - 4096))
    line = refuse(capsys, "train", "--resume", run, "--max-steps", "500")
    assert "no space left" in line
    (small_disk / "other").unlink()
    main(["train", "--resume", str(run), "--max-steps", "500"])
    assert _last_step(run) == 500


def test_read_only_folder(small_disk, tmp_path, book, capsys):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    for verb in ("train", "prepare"):
        line = refuse(capsys, verb, book, "--out", small_disk / "out")
        assert re.search("read-only|permission", line)


def test_demo_without_a_network(tmp_path, monkeypatch):
    from glassgpt.cli.demo import demo
    from listener import Listener

    reporter = Listener()
    said = reporter.said
    monkeypatch.chdir(tmp_path)
    demo(reporter, max_steps=3, eval_batches=2, sample_tokens=20)
    told = "\n".join(said)
    assert "using the Python manual" in told
    assert "Before training it wrote" in told
    assert re.search(r"Validation loss fell from [\d.]+ to [\d.]+ nats", told)
    assert (tmp_path / "runs/demo/loss.png").exists()
    assert (tmp_path / "runs/demo/model.safetensors").exists()
    assert told.count("  glassgpt ") + told.count("bin/glassgpt ") == 3


def test_tensorboard_and_wandb_without_an_account(tmp_path, book):
    environment = {k: v for k, v in os.environ.items() if not k.startswith("WANDB")}
    done = glassgpt("train", book, "--out", tmp_path / "run", *TINY, "--tensorboard", "--wandb",
                    env=environment | {"WANDB_SILENT": "true"})  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert list((tmp_path / "run/tensorboard").glob("events.*"))
    [offline] = (tmp_path / "run/wandb").glob("offline-run-*")
    assert list(offline.glob("*.wandb"))


def test_two_trainings_of_the_same_new_text_at_once(tmp_path, book):
    book.write_text(f"{SENTENCE * 20000} {tmp_path}")  # new to the cache
    commands = [[sys.executable, "-m", "glassgpt", "train", str(book), "--tokenizer", "bpe:300",
                 "--out", str(tmp_path / name), *TINY, "--eval-batches", "2"]
                for name in ("a", "b")]  # fmt: skip
    both = [subprocess.Popen(c, stderr=subprocess.PIPE, text=True) for c in commands]
    for process in both:
        stderr = process.communicate(timeout=120)[1]
        assert process.returncode == 0, stderr
    assert _numbers(tmp_path / "a") == _numbers(tmp_path / "b")
