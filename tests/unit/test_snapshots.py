"""Snapshots: the model of some steps, kept while training goes on as it would without them."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file

import glassgpt
from conftest import refuse, tiny_config
from glassgpt.checkpoints.load import load_pretrained
from glassgpt.checkpoints.run_directory import (
    Checkpoint,
    load_model,
    rewind_snapshots,
    save_snapshot,
    snapshots,
)
from glassgpt.config import TrainConfig
from glassgpt.errors import UserError
from glassgpt.finetuning.run import finetune
from glassgpt.reporting.run_log import read_metrics
from glassgpt.tokenizers.tokenizer import CharTokenizer
from glassgpt.training.run import train
from glassgpt.training.schedule import Clock
from listener import Listener

TINY = dict(n_layer=1, n_head=2, n_embd=12, context_length=11, batch_tokens=66, max_steps=13,
            eval_interval=5, log_interval=1, sample_tokens=5, warmup_steps=2, learning_rate=1e-2,
            threads=1, device="cpu")  # fmt: skip
STEPS = [0, 1, 2, 3, 4, 6, 8, 11, 13]  # of which the last is the end


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    path = tmp_path_factory.mktemp("text") / "fox.txt"
    path.write_text("The quick brown fox jumps over the lazy dog; nobody knows why. " * 40)
    return str(path)


@pytest.fixture(scope="module")
def full(text, tmp_path_factory) -> Path:
    run = tmp_path_factory.mktemp("full") / "run"
    return train(text, out=run, snapshots=True, **TINY).run


def same_weights(a: Path, b: Path) -> bool:
    a, b = load_model(a).weights, load_model(b).weights
    assert a.keys() == b.keys()
    return all(np.array_equal(a[name], b[name]) for name in a)


def same_training(a: Path, b: Path) -> bool:
    losses = [[(row["step"], row.get("train_loss"), row.get("val_loss"), row.get("grad_norm"))
               for row in read_metrics(run / "metrics.jsonl")] for run in (a, b)]  # fmt: skip
    first, second = (load_file(run / "checkpoints/last/optimizer.safetensors") for run in (a, b))
    assert first.keys() == second.keys()
    return losses[0] == losses[1] and all(np.array_equal(first[n], second[n]) for n in first)


# -- what is kept --------------------------------------------------------------------------------


def test_which_steps(text) -> None:
    timer = Clock(TrainConfig(snapshots=True), began=0.0)
    assert [step for step in range(200) if timer.snapshot_is_due(step)] == [
        0, 1, 2, 3, 4, 6, 8, 11, 16, 23, 32, 45, 64, 91, 128, 181,
    ]  # fmt: skip
    later = [step for step in range(60_000, 600_000) if timer.snapshot_is_due(step)]
    assert len(later) == 7
    assert not any(map(Clock(TrainConfig(), began=0.0).snapshot_is_due, range(99)))


@pytest.mark.slow
def test_each_is_the_model_of_its_step(full, text, tmp_path) -> None:
    there = snapshots(full)
    assert list(there) == STEPS
    assert sorted(path.name for path in (full / "snapshots").iterdir()) == \
        [f"{step:06}" for step in STEPS]  # fmt: skip
    assert [load_model(path).info["step"] for path in there.values()] == STEPS
    assert same_weights(there[13], full / "checkpoints/last")
    assert not same_weights(there[0], there[1])
    for step in (3, 8):  # trained no further than that
        run = train(text, out=tmp_path / str(step), **{**TINY, "max_steps": step,
                    "decay_steps": 13}).run  # fmt: skip
        assert same_weights(there[step], run / "checkpoints/last")
    ours = glassgpt.load(str(there[8]))
    assert len(ours.generate("The ", max_new_tokens=5, seed=1, engine="numpy").text) >= 5


def test_training_is_the_same_with_and_without(full, text, tmp_path) -> None:
    run = train(text, out=tmp_path / "run", **TINY).run
    assert same_training(run, full)
    assert not (run / "snapshots").exists()
    assert snapshots(run) == snapshots(tmp_path / "nowhere") == {}


@pytest.mark.slow
@pytest.mark.parametrize(("what", "way"), [
    ("text", {}), ("text", dict(lora_rank=2, lora_dropout=0.2)), ("labels", dict(lora_rank=2)),
])  # fmt: skip
def test_finetuning_keeps_whole_models(full, text, tmp_path, what, way) -> None:
    data = Path(text)
    if what == "labels":
        data = tmp_path / "labels.csv"
        pairs = [(a, b) for a in ("fox", "dog", "nobody", "lazy") for b in ("the", "over", "why")]
        rows = [f"{a} {b},{'odd' if len(a + b) % 2 else 'even'}\n" for a, b in pairs]
        data.write_text("text,label\n" + "".join(rows))
    options = dict(max_steps=5, eval_interval=2, log_interval=1, batch_tokens=44, sample_tokens=3,
                   patience=None, learning_rate=1e-2, threads=1, **way)  # fmt: skip
    with_, without = (
        finetune(full, data, out=tmp_path / name, snapshots=name == "with", **options).run
        for name in ("with", "without")
    )
    assert same_training(with_, without)
    there = snapshots(with_)
    assert list(there) == [0, 1, 2, 3, 4, 5]
    first, last = (load_pretrained(there[step]) for step in (0, 5))
    assert last.labels == (("even", "odd") if what == "labels" else ())
    base = load_model(full).weights
    body = [name for name in first.weights if name.startswith("blocks")]
    assert all(np.array_equal(first.weights[name], base[name]) for name in body)
    assert any(not np.array_equal(last.weights[name], base[name]) for name in body)


def test_patience_ends_with_a_snapshot(text, tmp_path) -> None:
    still = {**TINY, "learning_rate": 1e-9, "muon_learning_rate": 1e-9, "weight_decay": 0.0,
             "max_steps": 400, "patience": 1, "eval_interval": 9}  # fmt: skip
    result = train(text, out=tmp_path / "run", snapshots=True, **still)
    assert max(snapshots(result.run)) == result.step


# -- interrupted, resumed, replaced --------------------------------------------------------------


@pytest.mark.slow
def test_steps_that_are_done_again_give_new_snapshots(full, text, tmp_path) -> None:
    run = tmp_path / "run"
    part = {**TINY, "max_steps": 5, "decay_steps": 13}
    train(text, out=run, snapshots=True, **part)
    assert list(snapshots(run)) == [0, 1, 2, 3, 4, 5]
    for name in ("000006", "000009", ".next"):  # it was killed after step 9
        shutil.copytree(run / "snapshots/000002", run / "snapshots" / name)
    train(resume=run, max_steps=13)
    assert list(snapshots(run)) == sorted([*STEPS, 5])  # where the first session ended
    assert not (run / "snapshots/.next").exists()
    assert all(same_weights(snapshots(run)[step], snapshots(full)[step]) for step in STEPS)
    shutil.copytree(run / "snapshots/000002", run / "snapshots/000014")
    train(resume=run, max_steps=17, snapshots=False)  # nor does an old one stay
    assert max(snapshots(run)) == 13


@pytest.mark.slow
def test_overwriting_knows_them_as_its_own(text, tmp_path) -> None:
    run = train(text, out=tmp_path / "run", snapshots=True, **TINY).run
    (run / "snapshots/.next").mkdir()
    train(text, out=run, overwrite=True, **TINY)
    assert not (run / "snapshots").exists()
    (run / "snapshots/000001").mkdir(parents=True)
    (run / "snapshots/favourite").mkdir()
    with pytest.raises(UserError, match="snapshots/favourite"):
        train(text, out=run, overwrite=True, **TINY)


def tiny_snapshot(step: int) -> Checkpoint:
    config = tiny_config(n_layer=1)
    weights = {n: np.full(s, step, np.float32) for n, s in config.weight_shapes.items()}
    return Checkpoint(config, weights, CharTokenizer.from_characters("abc"), {"step": step})


class Killed(BaseException):
    """Stands for the process being gone."""


@pytest.mark.parametrize("what", ["saving", "rewinding"])
def test_killed_at_any_moment_only_whole_ones_are_found(tmp_path, monkeypatch, what) -> None:
    rename, kills = os.replace, 0
    for kill_at in range(1, 30):
        run = tmp_path / str(kill_at)
        for step in (0, 1000, 1_000_000):
            save_snapshot(run, step, tiny_snapshot(step))
        calls = 0

        def replace(source: Path, target: Path) -> None:
            nonlocal calls
            calls += 1
            if calls == kill_at:  # noqa: B023
                raise Killed
            rename(source, target)

        def rmtree(folder: Path, **_: Any) -> None:
            for path in folder.glob("c*"):  # it gets no further
                path.unlink()

        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", replace)
            patch.setattr(os, "fsync", lambda file: None)
            patch.setattr(shutil, "rmtree", rmtree if what == "saving" else shutil.rmtree)
            try:
                if what == "saving":
                    save_snapshot(run, 2000, tiny_snapshot(2000))
                else:
                    rewind_snapshots(run, 0)
                done = True
            except Killed:
                done, kills = False, kills + 1
        for step, folder in snapshots(run).items():
            loaded = load_model(folder)
            assert loaded.info["step"] == step
            assert all(np.all(weight == step) for weight in loaded.weights.values())
        assert list(snapshots(run)) == sorted(snapshots(run))
        rewind_snapshots(run, 1000)
        assert {path.name for path in (run / "snapshots").iterdir()} <= {"000000", "001000"}
        if done:
            break
    assert kills >= (7 if what == "saving" else 2)


# -- no room, no time ----------------------------------------------------------------------------


@pytest.mark.slow
def test_a_full_disk_costs_snapshots_and_nothing_else(text, small_disk, tmp_path) -> None:
    """The folder lies on a disk of its own, with room for a few of them."""
    options = {**TINY, "n_embd": 64}
    whole = train(text, out=tmp_path / "whole", **options).run
    run = train(text, out=tmp_path / "run", **{**options, "max_steps": 1, "decay_steps": 13}).run
    (run / "snapshots").symlink_to(small_disk)
    listener = Listener()
    train(resume=run, max_steps=13, snapshots=True, reporter=listener)
    there, said = list(snapshots(run)), [line for line in listener.said if "snapshot" in line]
    assert there == STEPS[1 : 1 + len(there)]
    assert len(there) in range(1, len(STEPS) - 1)
    assert len(said) == len(STEPS) - 1 - len(there)
    for line in said:
        assert line.startswith("no snapshot of step ")
        assert "no space left on device" in line
        assert "\n" not in line
    assert all(load_model(path) for path in snapshots(run).values())
    assert not (small_disk / ".next").exists()
    assert same_weights(run / "checkpoints/last", whole / "checkpoints/last")


def test_a_budget_keeps_time_for_the_last_one(monkeypatch) -> None:
    ends = {}
    for wanted in (False, True):
        timer = Clock(TrainConfig(budget="60s", snapshots=wanted), began=0.0)
        timer.saw_saving(1.0)
        timer.saw_snapshot(4.0)  # an adapter's model is larger than what it saves to go on
        ends[wanted] = timer.training_ends
    assert ends[True] == pytest.approx(ends[False] - 4)


@pytest.mark.slow
def test_with_a_budget(text, tmp_path) -> None:
    shape = dict(n_layer=1, n_head=2, n_embd=12, context_length=11)
    result = train(text, out=tmp_path / "run", budget="4s", snapshots=True, **shape, threads=1,
                   device="cpu", sample_tokens=5)  # fmt: skip
    there = snapshots(result.run)
    assert list(there)[:5] == [0, 1, 2, 3, 4][: len(there)]
    assert max(there) == result.step
    assert same_weights(there[result.step], result.run / "checkpoints/last")
    state = json.loads((result.run / "checkpoints/last/state.json").read_text())
    assert state["step"] == result.step


def test_a_snapshot_is_no_run_to_resume(full, capsys) -> None:
    assert "no checkpoint to resume from" in refuse(
        capsys, "train", "--resume", snapshots(full)[8], "--max-steps", 20
    )
