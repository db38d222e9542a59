"""The run directory: a Hugging Face checkpoint at the top, enough to resume below it.

    save_model("runs/book", model); checkpoint = load_model("runs/book")

Every file is written under a temporary name, flushed and renamed, and every tensor file carries
a checksum of its content: at any moment there is a valid checkpoint, and a damaged one is
noticed. Weights travel as NumPy arrays under the names of model.py; this room imports no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from glassgpt.config import ModelConfig
from glassgpt.convert.huggingface import (
    config_from_json,
    from_huggingface,
    labels_from_json,
    to_huggingface,
)
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.system import write_file
from glassgpt.tensors import SafeTensors, write_tensors
from glassgpt.tokenizer import Tokenizer, begin_of_text, load_tokenizer, to_files
from glassgpt.version import __version__

SCHEMA_VERSION = 1
LAST = Path("checkpoints") / "last"


@dataclass
class Checkpoint:
    """A model as it lies on disk: config, weights, tokenizer, and where it came from."""

    config: ModelConfig
    weights: Mapping[str, np.ndarray]  # names of model.py; read when they are asked for
    tokenizer: Tokenizer
    info: dict[str, Any] = field(default_factory=dict)  # glassgpt.json: step, losses, options
    chat_template: str | None = None  # Jinja, of a model that was finetuned on conversations
    ends: tuple[int, ...] = ()  # ids that end what it writes, beside the tokenizer's end_of_text
    labels: tuple[str, ...] = ()  # of a classifier, whose head is weights["score.weight"]


def require_language_model(checkpoint: Checkpoint, name: str | Path = "this model") -> Checkpoint:
    """`checkpoint`; raises `UserError` for a classifier, whose head knows no tokens."""
    if checkpoint.labels:
        raise UserError(f"{name} is a classifier ({len(checkpoint.labels)} labels) and predicts no "
                        f'tokens; ask it with: glassgpt sample {name} --text "..."')  # fmt: skip
    return checkpoint


# -- files ---------------------------------------------------------------------------------------


def write_json(path: Path, value: Any) -> None:
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Any:
    """Raises `UserError` when the file is missing, unreadable or no JSON."""
    with explain_os_errors(f"read {path}"):
        raw = path.read_bytes()
    try:
        value = json.loads(raw)
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; restore it or train again") from error


# -- models --------------------------------------------------------------------------------------


def save_model(folder: str | Path, checkpoint: Checkpoint) -> None:
    """Write config, weights, tokenizer and glassgpt.json; `transformers` loads the folder."""
    folder = Path(folder)
    with explain_os_errors(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    config, end = checkpoint.config, checkpoint.tokenizer.end_of_text
    labels = checkpoint.labels
    begin = begin_of_text(checkpoint.tokenizer)
    config_json, tensors = to_huggingface(config, checkpoint.weights, begin=begin, end=end,
                                          labels=labels)  # fmt: skip
    more = _for_classifying(checkpoint.tokenizer) if labels else {}
    for name, content in to_files(checkpoint.tokenizer, config.context_length, **more).items():
        write_file(folder / name, content)
    write_json(folder / "config.json", config_json)
    generation = {"bos_token_id": begin, "eos_token_id": end, "do_sample": True}
    write_json(folder / "generation_config.json", generation)
    write_tensors(folder / "model.safetensors", tensors)
    about = {
        "schema_version": SCHEMA_VERSION,
        "glassgpt_version": __version__,
        "model": dataclasses.asdict(config),
        **checkpoint.info,
    }
    write_json(folder / "glassgpt.json", about)


def _for_classifying(tokenizer: Tokenizer) -> dict[str, Any]:
    """For tokenizer_config.json: texts of a batch are padded, a special token in them is text."""
    values: dict[str, Any] = {"padding_side": "right", "split_special_tokens": True}
    if tokenizer.end_of_text is not None:
        values["pad_token"] = tokenizer.token_bytes(tokenizer.end_of_text).decode()
    return values


def load_model(path: str | Path) -> Checkpoint:
    """A run directory, its `checkpoints/last`, or any saved GPT-2, Llama or Qwen3 folder.

    Raises `UserError` when it is none, or damaged.
    """
    folder = find_model(path)
    config_json = read_json(folder / "config.json")
    info = read_json(folder / "glassgpt.json") if (folder / "glassgpt.json").exists() else {}
    if info.get("schema_version", SCHEMA_VERSION) not in range(SCHEMA_VERSION + 1):
        raise UserError(f"{folder} was written by a newer GlassGPT; update this one")
    config = config_from_json(config_json, str(folder / "config.json"))
    if "model" in info:  # says what config.json can't: dropout, and biases that are absent
        try:
            config = ModelConfig(**info["model"])
        except TypeError as error:
            raise UserError(f"{folder / 'glassgpt.json'} is damaged: {error}") from error
    labels = labels_from_json(config_json, str(folder / "config.json"))
    weights = from_huggingface(config, SafeTensors(_weight_files(folder)), str(folder), labels)
    tokenizer = load_tokenizer(folder)
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: its tokenizer has {tokenizer.vocab_size} tokens, "
            f"the model only {config.vocab_size}; they do not belong together"
        )
    return Checkpoint(config, weights, tokenizer, info, labels=labels)


def find_model(path: str | Path) -> Path:
    """The folder that holds the weights: `path` itself, or its newest checkpoint."""
    path = Path(path)
    if not path.exists():
        raise UserError(f"{path} does not exist; name a run directory (see: ls runs)")
    if not path.is_dir():
        raise UserError(f"{path} is a file; name the run directory that holds a model")
    for folder in (path, path / LAST):
        if (folder / "config.json").exists() and any(f.exists() for f in _weights_of(folder)):
            return folder
    if (path / "config.json").exists() and any(path.glob("*.bin")):
        raise UserError(f"{path} holds its weights as pickles (*.bin), which could run anything; "
                        "fetch the version with model.safetensors")  # fmt: skip
    raise UserError(f"{path} holds no model (no config.json with model.safetensors)")


def _weights_of(folder: Path) -> tuple[Path, Path]:
    """One file, or the list of several."""
    return folder / "model.safetensors", folder / "model.safetensors.index.json"


def _weight_files(folder: Path) -> list[Path]:
    single, index = _weights_of(folder)
    if single.exists():
        return [single]
    names = read_json(index).get("weight_map")
    shards = list(names.values()) if isinstance(names, dict) else []
    if not shards or not all(isinstance(name, str) for name in shards):
        raise UserError(f"{index} is damaged: it has no weight_map")
    files = [folder / Path(name).name for name in sorted(set(shards))]
    for file in files:
        if not file.exists():
            raise UserError(f"{file} is missing, though {index.name} names it; fetch it again")
    return files


# -- what resuming needs -------------------------------------------------------------------------


def save_training(
    run: Path, checkpoint: Checkpoint, optimizer: Mapping[str, np.ndarray], state: dict[str, Any]
) -> None:
    """Replace `checkpoints/last` by this moment of the training.

    The new folder is complete before the old one moves aside, so `find_training` always finds
    a whole one, whenever the process dies.
    """
    folder, new, old = _training_folders(run)
    with explain_os_errors(f"write {new}"):
        if not folder.exists():  # the process died between the two renames below
            with contextlib.suppress(UserError):
                os.replace(find_training(run), folder)
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        save_model(new, checkpoint)
        write_tensors(new / "optimizer.safetensors", optimizer)
        write_json(new / "state.json", state)  # written last: its presence means complete
        if folder.exists():
            shutil.rmtree(old, ignore_errors=True)
            os.replace(folder, old)
        os.replace(new, folder)
        shutil.rmtree(old, ignore_errors=True)


def find_training(run: str | Path) -> Path:
    """The newest complete training checkpoint of a run; raises `UserError` without one."""
    run = Path(run)
    if not run.is_dir():
        raise UserError(f"{run} does not exist; --resume takes the run directory")
    for folder in _training_folders(run):
        if (folder / "state.json").exists():
            return folder
    if (run / "state.json").exists():
        raise UserError(f"{run} is the checkpoint of a run; resume the run: {run.parent.parent}")
    raise UserError(f"{run} has no checkpoint to resume from; start again with another --out")


def load_training(run: str | Path) -> tuple[Checkpoint, Mapping[str, np.ndarray], dict[str, Any]]:
    """(model, optimizer tensors, state) of the newest training checkpoint."""
    folder = find_training(run)
    tensors = SafeTensors([folder / "optimizer.safetensors"])
    return load_model(folder), tensors, read_json(folder / "state.json")


def _training_folders(run: Path) -> tuple[Path, Path, Path]:
    """The current one, the one being written, the one being replaced; in order of trust."""
    return run / LAST, run / "checkpoints" / ".next", run / "checkpoints" / ".previous"
