"""GPTs you can see through: train, sample and understand GPT models on the machine you have.

>>> import glassgpt
>>> model = glassgpt.load("runs/book")                    # doctest: +SKIP
>>> print(model.generate("Once upon a time").text)        # doctest: +SKIP

Importing the package imports no torch; it comes when a model is first used.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from glassgpt.errors import UserError as UserError

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

    from glassgpt.api import LoadedModel as LoadedModel
    from glassgpt.training.run import TrainResult

__version__ = "0.1.0"
STARTED = time.monotonic()  # of the process, nearly: from here a --budget counts


def load(path: str | Path, *, device: str = "auto") -> LoadedModel:
    """A model from its run directory, or a published one by name; see `glassgpt.api.LoadedModel`.

    Also "gpt2", "OWNER/MODEL" on the hub, "openai:124M", and nanoGPT's ckpt.pt.
    """
    from glassgpt.api import LoadedModel

    return LoadedModel.from_folder(path, device)


def train(data: str | Path | Sequence[str | Path] | None = None, **options: Any) -> TrainResult:
    """Train a GPT; the options of `glassgpt train` by name. See `glassgpt.training.run.train`."""
    from glassgpt.training.run import train as run

    return run(data, **options)


def finetune(base: str | Path, data: Any = None, **options: Any) -> TrainResult:
    """Train a model further; the options of `glassgpt finetune` by name. See
    `glassgpt.finetuning.run.finetune`."""
    from glassgpt.finetuning.run import finetune as run

    return run(base, data, **options)
