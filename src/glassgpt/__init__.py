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
    from glassgpt.data.dataset import Dataset
    from glassgpt.reporting.run_log import TrainResult
    from glassgpt.system import Reporter
    from glassgpt.training.run import Names

__version__ = "0.1.0"
STARTED = time.monotonic()  # of the process, nearly: from here a --budget counts


def load(path: str | Path, *, device: str = "auto") -> LoadedModel:
    """A model from its run directory, or a published one by name; see `glassgpt.api.LoadedModel`.

    Also "gpt2", "OWNER/MODEL" on the hub, "openai:124M", and nanoGPT's ckpt.pt.
    """
    from glassgpt.api import LoadedModel

    return LoadedModel.from_folder(path, device)


def train(
    data: Names = None,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    resume: str | Path | None = None,
    init_from: str | Path | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **options: Any,
) -> TrainResult:
    """Train a GPT on `data`; `options` are those of `glassgpt train`, by name.

    `reporter` is told what happens; without one, nothing is said. See
    `glassgpt.training.run.train`.
    """
    from glassgpt.system import SILENT
    from glassgpt.training.run import train as run

    return run(
        data,
        preset=preset,
        config=config,
        resume=resume,
        init_from=init_from,
        overwrite=overwrite,
        reporter=reporter or SILENT,
        **options,
    )


def finetune(
    base: str | Path | None = None,
    data: Names = None,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
    reporter: Reporter | None = None,
    **options: Any,
) -> TrainResult:
    """Train the model `base` further; `options` are those of `glassgpt finetune`, by name.

    See `glassgpt.finetuning.run.finetune`.
    """
    from glassgpt.finetuning.run import finetune as run
    from glassgpt.system import SILENT

    return run(
        base,
        data,
        preset=preset,
        config=config,
        resume=resume,
        overwrite=overwrite,
        reporter=reporter or SILENT,
        **options,
    )


def prepare(
    data: str | Path | Sequence[str | Path],
    *,
    tokenizer: str | None = None,
    val_fraction: float | None = None,
    val: str | Path | None = None,
    text_field: str | None = None,
    max_tokens: int | None = None,
    reporter: Reporter | None = None,
) -> Dataset:
    """Texts, folders, corpora as tokens: `.train` and `.val` to draw batches from, `.tokenizer`.

    The options are those of `glassgpt prepare`. Tokens are kept in the cache, once for the same
    text; a folder that `glassgpt prepare` made is opened as it is. Raises `UserError` for anything
    the caller can put right.

    >>> data = glassgpt.prepare("book.txt", tokenizer="bpe:512")        # doctest: +SKIP
    >>> tokens, targets, *_ = data.train.batch(0, seed=1, n=4, T=16)    # doctest: +SKIP
    """
    from glassgpt.config import DataConfig
    from glassgpt.system import SILENT
    from glassgpt.training.run import names_in, open_data

    given = dict(
        tokenizer=tokenizer,
        val_fraction=val_fraction,
        val=val,
        text_field=text_field,
        max_tokens=max_tokens,
    )
    asked = {name: value for name, value in given.items() if value is not None}
    config = DataConfig(**asked)  # type: ignore[arg-type]  # it checks the types itself
    return open_data(names_in(data), config, frozenset(asked), reporter=reporter or SILENT)
