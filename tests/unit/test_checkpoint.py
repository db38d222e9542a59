"""The run directory: exact, atomic, and damage to it is noticed."""

from __future__ import annotations

import dataclasses
import json
import os
import random
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from conftest import tiny_config
from glassgpt.checkpoints import run_directory as ckpt
from glassgpt.checkpoints.run_directory import (
    Checkpoint,
    find_model,
    find_training,
    load_model,
    load_training,
    save_model,
    save_training,
)
from glassgpt.checkpoints.tensors import SafeTensors, write_tensors
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError
from glassgpt.system import write_file
from glassgpt.tokenizers.tokenizer import CharTokenizer, byte_tokenizer, tokenizer_fingerprint

CHARACTERS = "abcdefghijklmnopqrstuvwxyz .,!?\n-:;'"  # 36, and <unk>


def tiny_checkpoint(shape: str = "modern", seed: int = 0, **fields: Any) -> Checkpoint:
    config = tiny_config(shape, **fields)
    generator = np.random.default_rng(seed)
    weights = {
        name: generator.normal(size=size).astype(np.float32)
        for name, size in config.weight_shapes.items()
    }
    return Checkpoint(config, weights, CharTokenizer.from_characters(CHARACTERS), {"step": seed})


def assert_equal(loaded: dict[str, np.ndarray], saved: dict[str, np.ndarray]) -> None:
    assert loaded.keys() == saved.keys()
    for name, array in saved.items():
        assert loaded[name].dtype == array.dtype
        np.testing.assert_array_equal(loaded[name], array, err_msg=name)


@pytest.fixture
def saved(tmp_path: Path) -> Path:
    save_model(tmp_path / "run", tiny_checkpoint())
    return tmp_path / "run"


# -- there and back ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("shape", "fields"),
    [
        ("gpt2", {}),
        ("gpt2", dict(bias=False, dropout=0.25, activation="relu", norm_eps=3e-5)),
        ("gpt2", dict(tie_embeddings=False, n_hidden=19)),
        ("modern", {}),
        ("modern", dict(qk_norm=False, n_kv_head=1, rope_theta=777.0)),
        ("modern", dict(tie_embeddings=False, dropout=0.1)),
        ("modern", dict(n_layer=0)),
    ],
)
def test_saved_and_loaded_is_the_same(tmp_path: Path, shape: str, fields: dict) -> None:
    checkpoint = tiny_checkpoint(shape, **fields)
    save_model(tmp_path / "deep" / "run", checkpoint)
    loaded = load_model(tmp_path / "deep" / "run")
    assert loaded.config == checkpoint.config
    assert_equal(loaded.weights, checkpoint.weights)
    assert tokenizer_fingerprint(loaded.tokenizer) == tokenizer_fingerprint(checkpoint.tokenizer)
    assert loaded.info["step"] == 0
    assert loaded.info["model"] == dataclasses.asdict(checkpoint.config)


def test_saving_again_replaces_everything(saved: Path) -> None:
    other = tiny_checkpoint("gpt2", seed=3)
    save_model(saved, other)
    assert load_model(saved).config == other.config
    assert_equal(load_model(saved).weights, other.weights)


def test_the_files_are_the_promised_ones_and_no_pickle(tmp_path: Path) -> None:
    model = {"config.json", "generation_config.json", "glassgpt.json", "model.safetensors",
             "tokenizer.json", "tokenizer_config.json"}  # fmt: skip
    save_model(tmp_path, tiny_checkpoint())
    assert {path.name for path in tmp_path.iterdir()} == model
    save_training(tmp_path, tiny_checkpoint(), {"a": np.ones(3)}, {"step": 1})
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["last"]
    last = tmp_path / "checkpoints" / "last"
    names = {path.name for path in last.iterdir()}
    assert names == model | {"optimizer.safetensors", "state.json"}
    for path in [*tmp_path.glob("*.*"), *last.glob("*.*")]:
        if path.suffix == ".json":
            json.loads(path.read_bytes())
        else:  # the length of a JSON header, then the header
            content = path.read_bytes()
            json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])


def test_a_training_state_comes_back_exactly(tmp_path: Path) -> None:
    checkpoint = tiny_checkpoint("gpt2")
    optimizer = {
        "exp_avg.x": np.random.default_rng(0).normal(size=(3, 5)).astype(np.float32),
        "exp_avg_sq.x": np.array([1e-38, 3e38, -0.0], np.float32),
        "step.x": np.array(7.0, np.float32),
    }
    state = {"step": 12, "loss": 0.1 + 0.2, "nothing": None, "nested": {"a": [1, "é"]}}
    save_training(tmp_path, checkpoint, optimizer, state)
    model, loaded_optimizer, loaded_state = load_training(tmp_path)
    assert_equal(model.weights, checkpoint.weights)
    assert_equal(loaded_optimizer, optimizer)
    assert np.signbit(loaded_optimizer["exp_avg_sq.x"][2])
    assert loaded_state == state


def test_find_model_prefers_the_best_and_falls_back_to_the_newest(tmp_path: Path) -> None:
    save_training(tmp_path, tiny_checkpoint(seed=1), {}, {})
    assert find_model(tmp_path) == tmp_path / "checkpoints" / "last"
    assert find_model(str(tmp_path / "checkpoints" / "last")) == tmp_path / "checkpoints" / "last"
    save_model(tmp_path, tiny_checkpoint(seed=2))
    assert find_model(tmp_path) == tmp_path
    assert load_model(tmp_path).info["step"] == 2


# -- damage --------------------------------------------------------------------------------------


def flip(path: Path, byte: int, bit: int) -> None:
    content = bytearray(path.read_bytes())
    content[byte] ^= 1 << bit
    path.write_bytes(content)


def data_begins(path: Path) -> int:
    return 8 + int.from_bytes(path.read_bytes()[:8], "little")


@pytest.mark.parametrize("seed", range(20))
def test_a_flipped_bit_in_the_weights_is_noticed(saved: Path, seed: int) -> None:
    path, generator = saved / "model.safetensors", random.Random(seed)
    first, end = data_begins(path), path.stat().st_size
    place = [first, end - 1][seed] if seed < 2 else generator.randrange(first, end)
    flip(path, place, generator.randrange(8))
    with pytest.raises(UserError, match=r"model\.safetensors is .*damaged"):
        load_model(saved)


def test_a_flipped_bit_in_the_header_changes_nothing_or_is_noticed(tmp_path: Path) -> None:
    path, generator = tmp_path / "tensors", random.Random(0)
    whole = {"a.weight": np.arange(6, dtype=np.float32).reshape(2, 3), "b": np.ones(5, np.int64)}
    write_tensors(path, whole)
    content, noticed = path.read_bytes(), 0
    for byte in range(data_begins(path)):
        flip(path, byte, generator.randrange(8))
        try:
            assert_equal(SafeTensors([path]), whole)
        except UserError:
            noticed += 1
        path.write_bytes(content)
    assert noticed > data_begins(path) // 2


def test_tensors_of_any_layout_are_written_as_they_are(tmp_path: Path) -> None:
    """A transposed view, a strided one, a scalar, an empty one, an array of one dimension."""
    base = np.arange(12, dtype=np.float32).reshape(3, 4)
    tensors = {"view": base.T, "strided": base[:, ::2], "scalar": np.array(3.5, np.float32),
               "empty": np.zeros((0, 3), np.float32), "reversed": base[0, ::-1]}  # fmt: skip
    write_tensors(tmp_path / "tensors", tensors)
    assert_equal(SafeTensors([tmp_path / "tensors"]), tensors)


@pytest.mark.parametrize("share", [0.0, 0.001, 0.02, 0.3, 0.9, 0.9999])
def test_truncated_weights_are_noticed(saved: Path, share: float) -> None:
    path = saved / "model.safetensors"
    path.write_bytes(path.read_bytes()[: int(share * path.stat().st_size)])
    with pytest.raises(UserError, match=r"model\.safetensors is truncated or damaged"):
        load_model(saved)


@pytest.mark.parametrize("name", ["config.json", "glassgpt.json", "tokenizer.json"])
@pytest.mark.parametrize(
    "damage",
    [
        lambda content: b"",
        lambda content: content[: len(content) // 2],
        lambda content: content[:-2],
        lambda content: b"\xff" + content,
        lambda content: b"\x00" * len(content),
        lambda content: b"[]",
        lambda content: b"null",
        lambda content: b"3",
        lambda content: b'"text"',
    ],
    ids=["empty", "half", "cut", "not UTF-8", "zeros", "list", "null", "number", "text"],
)
def test_damaged_json_is_noticed(saved: Path, name: str, damage: Callable[[bytes], bytes]) -> None:
    (saved / name).write_bytes(damage((saved / name).read_bytes()))
    with pytest.raises(UserError, match=name):
        load_model(saved)


@pytest.mark.parametrize(
    "change",
    [dict(n_layer=None), dict(n_layer="2"), dict(n_layers=2), dict(n_embd=21), dict(norm="none"),
     dict(vocab_size=36)],
    ids=str,
)  # fmt: skip
def test_a_config_that_does_not_fit_is_noticed(saved: Path, change: dict[str, Any]) -> None:
    path = saved / "glassgpt.json"
    info = json.loads(path.read_text())
    path.write_text(json.dumps(info | {"model": info["model"] | change}))
    with pytest.raises(UserError):
        load_model(saved)


@pytest.mark.parametrize("name", ["model_type", "vocab_size", "hidden_size", "num_hidden_layers"])
def test_config_json_without_a_value_is_noticed(saved: Path, name: str) -> None:
    (saved / "glassgpt.json").unlink()
    load_model(saved)  # config.json alone is enough
    values = json.loads((saved / "config.json").read_text())
    del values[name]
    (saved / "config.json").write_text(json.dumps(values))
    with pytest.raises(UserError, match=name):
        load_model(saved)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors", "tokenizer.json"])
def test_missing_files_are_noticed(saved: Path, name: str) -> None:
    (saved / name).unlink()
    with pytest.raises(UserError, match=name):
        load_model(saved)


def test_what_is_no_run_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("text")
    for path, message in [(tmp_path / "no", "does not exist"), (tmp_path / "file", "is a file"),
                          (tmp_path, "holds no model")]:  # fmt: skip
        with pytest.raises(UserError, match=message):
            load_model(path)


def test_a_tensor_that_is_missing_or_misshapen_is_named(saved: Path) -> None:
    path, name = saved / "model.safetensors", "model.layers.1.mlp.up_proj.weight"
    tensors = SafeTensors([path])
    write_tensors(path, {**tensors, name: np.ascontiguousarray(tensors[name].T)})
    with pytest.raises(UserError, match=f"{name} has shape \\(18, 28\\)"):
        load_model(saved)
    write_tensors(path, {key: tensor for key, tensor in tensors.items() if key != name})
    with pytest.raises(UserError, match=f"{name} is missing"):
        load_model(saved)


def test_biases_that_the_config_denies_are_noticed(tmp_path: Path) -> None:
    """A GPT-2 without biases is saved with biases of zero; trained further elsewhere, they grow."""
    save_model(tmp_path, tiny_checkpoint("gpt2", bias=False))
    path, name = tmp_path / "model.safetensors", "transformer.h.1.mlp.c_fc.bias"
    tensors = {key: np.array(tensor) for key, tensor in SafeTensors([path]).items()}
    assert not tensors[name].any()
    tensors[name][4] = 0.5
    write_tensors(path, tensors)
    with pytest.raises(UserError, match=f"{name} is not zero"):
        load_model(tmp_path)


def test_a_tokenizer_larger_than_the_model_is_noticed(tmp_path: Path) -> None:
    save_model(tmp_path, dataclasses.replace(tiny_checkpoint(), tokenizer=byte_tokenizer()))
    with pytest.raises(UserError, match="257 tokens, the model only 37"):
        load_model(tmp_path)


def test_a_newer_schema_is_refused(saved: Path) -> None:
    path = saved / "glassgpt.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"schema_version": 2}))
    with pytest.raises(UserError, match="newer GlassGPT"):
        load_model(saved)


@pytest.mark.parametrize("name", ["optimizer.safetensors", "state.json"])
def test_a_damaged_training_state_is_noticed(tmp_path: Path, name: str) -> None:
    save_training(tmp_path, tiny_checkpoint(), {"a": np.ones(30)}, {"step": 1})
    path = tmp_path / "checkpoints" / "last" / name
    path.write_bytes(path.read_bytes()[:-3])
    with pytest.raises(UserError, match=name):
        load_training(tmp_path)


# -- dying at any moment -------------------------------------------------------------------------


class Killed(BaseException):
    """Stands for the process being gone: nothing catches it."""


class KilledAt:
    """Lets the file system's calls pass, and dies at the one that is asked for.

    Renames happen or not; deleting a folder can also die half-way, in any order of its files: the
    worst one leaves state.json, which says "complete".
    """

    def __init__(self, patch: pytest.MonkeyPatch, at: int) -> None:
        self.at, self.calls = at, 0
        self.rename, self.delete = os.replace, shutil.rmtree
        patch.setattr(os, "fsync", lambda file: None)  # for speed
        patch.setattr(os, "replace", self.replace)
        patch.setattr(shutil, "rmtree", self.rmtree)

    def count(self) -> bool:
        self.calls += 1
        return self.calls == self.at

    def replace(self, source: Path, target: Path) -> None:
        if self.count():
            raise Killed
        self.rename(source, target)

    def rmtree(self, folder: Path, **options: Any) -> None:
        if self.count():
            raise Killed
        if folder.exists() and self.count():
            for path in folder.iterdir():
                if path.name != "state.json":
                    path.unlink()
            raise Killed
        self.delete(folder, **options)


def save_step(run: Path, step: int, config: ModelConfig, kill_at: int = 0) -> int | None:
    """Save a state in which everything depends on `step`; None when done, else calls made."""
    weights = {n: np.full(s, step, np.float32) for n, s in config.weight_shapes.items()}
    tokenizer = CharTokenizer.from_characters(CHARACTERS)
    checkpoint = Checkpoint(config, weights, tokenizer, {"step": step})
    with pytest.MonkeyPatch.context() as patch:
        disk = KilledAt(patch, kill_at)
        try:
            save_training(run, checkpoint, {"m": np.full(3, step)}, {"step": step})
        except Killed:
            return disk.calls
    return None


def whole_step(run: Path) -> int:
    """The step of the checkpoint that resuming would take; it must be whole."""
    checkpoint, optimizer, state = load_training(run)
    step = state["step"]
    assert checkpoint.info["step"] == step
    assert all(np.all(weight == step) for weight in checkpoint.weights.values())
    assert np.all(optimizer["m"] == step)
    return step


def test_killed_at_any_moment_there_is_a_whole_checkpoint(tmp_path: Path) -> None:
    config = tiny_config("modern", n_layer=1)
    kills = 0
    for kill_at in range(1, 100):
        run = tmp_path / str(kill_at)
        assert save_step(run, 1, config) is None
        done = save_step(run, 2, config, kill_at) is None
        assert whole_step(run) == 2 if done else whole_step(run) in (1, 2)
        assert save_step(run, 3, config) is None  # and the run can go on
        assert whole_step(run) == 3
        assert [path.name for path in (run / "checkpoints").iterdir()] == ["last"]
        if done:
            break
        kills += 1
    assert kills >= 12  # eight files, and the folders' exchange


def test_killed_in_the_first_save_there_is_a_whole_checkpoint_or_none(tmp_path: Path) -> None:
    config = tiny_config("modern", n_layer=1)
    outcomes = set()
    for kill_at in range(1, 100):
        run = tmp_path / str(kill_at)
        if save_step(run, 1, config, kill_at) is None:
            break
        try:
            outcomes.add(whole_step(run))
        except UserError:
            outcomes.add(0)
    assert outcomes == {0, 1}


@pytest.mark.slow
def test_killed_again_after_resuming_there_is_a_whole_checkpoint(tmp_path: Path) -> None:
    """The next save must not start by deleting the only whole checkpoint there is."""
    config = tiny_config("modern", n_layer=1)
    for start in (0, 1):  # 0: the first death was in the very first save
        for first in range(1, 100):
            base = tmp_path / f"{start}-{first}"
            base.mkdir()
            if start:
                save_step(base, 1, config)
            if save_step(base, 2, config, first) is None:
                break
            try:
                before = whole_step(base)
            except UserError:
                assert start == 0
                continue
            for second in range(1, 100):
                run = tmp_path / f"{start}-{first}-{second}"
                shutil.copytree(base, run)
                done = save_step(run, 3, config, second) is None
                assert whole_step(run) >= before
                shutil.rmtree(run)
                if done:
                    break


def test_incomplete_states_are_passed_over(tmp_path: Path) -> None:
    config = tiny_config("modern", n_layer=1)
    last, new, old = (tmp_path / "checkpoints" / name for name in ("last", ".next", ".previous"))
    save_step(tmp_path, 1, config)
    shutil.copytree(last, new)
    (new / "state.json").unlink()
    assert find_training(tmp_path) == last
    os.replace(last, old)  # (not reached by save_training, but the older one is whole)
    assert find_training(tmp_path) == old
    save_step(tmp_path, 2, config)
    os.replace(last, new)
    shutil.rmtree(old, ignore_errors=True)
    assert find_training(tmp_path) == new  # the only whole one
    (new / "state.json").unlink()
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        find_training(tmp_path)
    with pytest.raises(UserError, match="does not exist"):
        find_training(tmp_path / "nowhere")


# -- writing that fails --------------------------------------------------------------------------

FULL_DISK = """
import resource, sys
from pathlib import Path
from glassgpt.system import write_file
resource.setrlimit(resource.RLIMIT_FSIZE, (5000, 5000))
try:
    write_file(Path(sys.argv[1]), b"new" * 100_000)
except (OSError, ValueError):
    sys.exit(7)
"""


def test_a_write_that_fails_keeps_what_was_there(tmp_path: Path) -> None:
    """The kernel refuses to let the file grow, as it does when the disk is full."""
    path = tmp_path / "file"
    write_file(path, b"old")
    result = subprocess.run([sys.executable, "-c", FULL_DISK, str(path)], check=False)
    assert result.returncode == 7
    assert path.read_bytes() == b"old"
    assert list(tmp_path.iterdir()) == [path]  # nothing half-written is left
    write_file(path, b"new")
    assert path.read_bytes() == b"new"


def test_a_full_disk_is_a_user_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_model(tmp_path, tiny_checkpoint(seed=1))

    def full(file: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(ckpt.os, "fsync", full)
    with pytest.raises(UserError, match="no space left on device"):
        save_model(tmp_path, tiny_checkpoint(seed=2))
    monkeypatch.undo()
    assert load_model(tmp_path).info["step"] == 1
    assert_equal(load_model(tmp_path).weights, tiny_checkpoint(seed=1).weights)


def test_a_folder_that_is_a_file_is_a_user_error(tmp_path: Path) -> None:
    (tmp_path / "run").write_text("text")
    with pytest.raises(UserError, match="cannot write"):
        save_model(tmp_path / "run", tiny_checkpoint())
    assert (tmp_path / "run").read_text() == "text"
