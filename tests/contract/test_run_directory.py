"""The layout that a run directory promises, after a training of three steps."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig

import glassgpt
from glassgpt.config import ModelConfig
from glassgpt.options import names_of

TEXT = "The quick brown fox jumps over the lazy dog; nobody knows why. " * 30
MODEL = {"config.json", "model.safetensors", "generation_config.json", "tokenizer.json",
         "tokenizer_config.json", "glassgpt.json"}  # fmt: skip


@pytest.fixture(scope="module", params=["gpt2", "modern"])
def run(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("run")
    (folder / "fox.txt").write_text(TEXT)
    result = glassgpt.train(
        str(folder / "fox.txt"), out=str(folder / "fox"), shape=request.param, n_layer=2, n_head=3,
        n_embd=24, context_length=16, batch_tokens=80, max_steps=3, eval_interval=2,
        log_interval=1, warmup_steps=1, sample_tokens=20, threads=1, device="cpu", seed=5,
        snapshots=True,
    )  # fmt: skip
    assert result.finished
    assert result.run == folder / "fox"
    return result.run


def test_files(run: Path) -> None:
    top = {path.name for path in run.iterdir()}
    shown = {"metrics.jsonl", "samples.md", "report.md", "loss.png"}
    assert top == MODEL | shown | {"checkpoints", "snapshots"}
    assert [path.name for path in (run / "checkpoints").iterdir()] == ["last"]
    last = {path.name for path in (run / "checkpoints" / "last").iterdir()}
    assert last == MODEL | {"optimizer.safetensors", "state.json"}
    kept = {
        path.name: {file.name for file in path.iterdir()} for path in (run / "snapshots").iterdir()
    }
    assert kept == {f"00000{step}": MODEL for step in (0, 1, 2, 3)}


def test_metrics(run: Path) -> None:
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    common = {"step", "tokens", "seconds"}
    training = [row for row in rows if "train_loss" in row]
    evaluations = [row for row in rows if "val_loss" in row]
    assert len(training) + len(evaluations) == len(rows)
    assert [row["step"] for row in training] == [1, 2, 3]
    assert [row["step"] for row in evaluations] == [0, 2, 3]
    for row in training:
        assert row.keys() == common | {"train_loss", "lr", "grad_norm", "tokens_per_second"}
        assert row["lr"] > 0
    for row in evaluations:
        assert row.keys() == common | {"val_loss"}
    assert all(row["tokens"] == 80 * row["step"] for row in rows)
    assert [row["seconds"] for row in rows] == sorted(row["seconds"] for row in rows)
    assert evaluations[0]["val_loss"] == pytest.approx(np.log(30), abs=0.3)  # guessing


def test_glassgpt_json(run: Path) -> None:
    about = json.loads((run / "glassgpt.json").read_text())
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    best = min((row["val_loss"], row["step"]) for row in rows if "val_loss" in row)
    assert about["schema_version"] == 1
    assert (about["best_val_loss"], about["step"]) == best
    assert about["glassgpt_version"] == glassgpt.__version__
    assert about["torch_version"] == torch.__version__
    assert about["model"].keys() == names_of(ModelConfig)
    assert about["model"]["n_embd"] == 24
    assert about["train"]["max_steps"] == 3
    assert about["options"]["seed"] == 5
    assert len(about["data"]["fingerprint"]) == 16
    last = json.loads((run / "checkpoints" / "last" / "glassgpt.json").read_text())
    assert last["step"] == 3
    state = json.loads((run / "checkpoints" / "last" / "state.json").read_text())
    assert state["step"] == 3
    assert state["best_val_loss"] == best[0]


def test_the_rest_is_to_be_looked_at(run: Path) -> None:
    samples = (run / "samples.md").read_text()
    assert [line for line in samples.splitlines() if line.startswith("## ")] == [
        "## step 0", "## step 2", "## step 3",
    ]  # fmt: skip
    assert (run / "loss.png").read_bytes().startswith(b"\x89PNG\r\n")
    report = (run / "report.md").read_text()
    assert report.startswith("# fox\n")
    assert "240 (3 steps)" in report


def test_no_pickle_and_nothing_half_written(run: Path) -> None:
    for path in run.rglob("*"):
        if path.is_file():
            assert path.suffix in {".json", ".jsonl", ".safetensors", ".md", ".png"}
            assert "partial" not in path.name
            if path.suffix == ".json":
                json.loads(path.read_text("utf-8"))
            if path.suffix == ".safetensors":
                assert load_file(path)


@pytest.mark.parametrize("part", [".", "checkpoints/last", "snapshots/000002"])
def test_transformers_loads_it_as_it_lies(run: Path, part: str) -> None:
    ours = glassgpt.load(str(run / part))
    ours.device = "cpu"
    theirs = AutoModelForCausalLM.from_pretrained(run / part)
    tokenizer = AutoTokenizer.from_pretrained(run / part)
    assert GenerationConfig.from_pretrained(run / part).do_sample is True
    ids = tokenizer("The lazy fox", return_tensors="pt")["input_ids"]
    assert ids[0].tolist() == ours.tokenizer.encode("The lazy fox")
    with torch.inference_mode():
        torch.testing.assert_close(ours.model(ids), theirs(ids).logits, rtol=0, atol=1e-5)
    assert theirs.config.vocab_size == len(tokenizer)
