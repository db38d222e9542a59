"""A model as one `.npz` file, which NumPy alone can read.

    write_numpy(Path("book.npz"), checkpoint.config, checkpoint.weights)

It holds every weight under its name in model.py, and the config as JSON in `config.json`:

    file = np.load("book.npz")                    # a mapping; each weight is read when asked for
    config = ModelConfig(**json.loads(str(file["config.json"])))
    logits = numpy_gpt.forward(np.array([5, 8, 13]), file, config)

This module knows no tokenizer and no torch.
"""

from __future__ import annotations

import dataclasses
import json
import zipfile
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from glassgpt.config import ModelConfig
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.system import replacing


def write_numpy(path: Path, config: ModelConfig, weights: Mapping[str, np.ndarray]) -> None:
    """Write `path` whole or not at all; one weight at a time is asked for and in memory."""
    with replacing(path) as file, zipfile.ZipFile(file, "w") as archive:
        about = json.dumps(dataclasses.asdict(config))
        _write_member(archive, "config.json", np.array(about))
        for name in config.weight_shapes:
            _write_member(archive, name, weights[name])


def _write_member(archive: zipfile.ZipFile, name: str, array: np.ndarray) -> None:
    with archive.open(f"{name}.npy", "w", force_zip64=True) as member:
        np.lib.format.write_array(member, array, allow_pickle=False)


def read_numpy(path: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """Raises `UserError` when the file is missing, damaged, or not what `write_numpy` wrote."""
    with explain_os_errors(f"read {path}"):
        path.stat()
        try:
            with np.load(path, allow_pickle=False) as file:
                config = ModelConfig(**json.loads(str(file["config.json"])))
                weights = {name: file[name] for name in config.weight_shapes}
        except (zipfile.BadZipFile, ValueError, KeyError, TypeError, EOFError) as error:
            raise UserError(f"{path} is damaged, or no exported model: {error}") from error
    for name, shape in config.weight_shapes.items():
        if weights[name].shape != shape:
            raise UserError(f"{path}: {name} is {weights[name].shape}, but should be {shape}")
    return config, weights
