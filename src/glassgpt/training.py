"""From options to a trained model: `train(data="book.txt", max_steps=500, out="runs/book")`

Resolves options, opens (or prepares) the data, makes the run directory or reopens it, and hands
over to the loop in trainer.py.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from glassgpt import checkpoint as ckpt
from glassgpt import runtime
from glassgpt.config import DataConfig, ModelConfig, names_of, resolve_options, split_options
from glassgpt.data import sources
from glassgpt.data.batches import Dataset, is_prepared, load_data
from glassgpt.data.download import cache_dir
from glassgpt.data.prepare import data_key, prepare
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.runlog import ByteProgress, Progress
from glassgpt.trainer import Trainer, TrainResult


def train(
    data: str | list[str] | None = None,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> TrainResult:
    """Train a GPT on `data` (a prepared folder, text files, folders, corpora).

    Takes every option of `glassgpt train` by its field name. `resume` continues a run directory
    from its newest checkpoint. Raises `UserError` for anything the caller can put right.
    """
    progress = progress or Progress()
    names = [data] if isinstance(data, str) else list(data or [])
    options = resolve_options(options, preset=preset, config=config)
    saved = None
    if resume is not None:
        saved = ckpt.load_training(resume)
        fixed = {"shape", "tokenizer", *names_of(ModelConfig)} & set(options)
        if fixed:
            raise UserError(f"{', '.join(sorted(fixed))} can't change when resuming {resume}; "
                            "leave it out, or start a new run")  # fmt: skip
        options = saved[2]["options"] | options | {"out": str(resume)}
    if not names and options.get("data"):
        names = options["data"] if isinstance(options["data"], list) else [options["data"]]
    if not names:
        raise UserError("nothing to train on; name a text file, a folder or a corpus")
    model_options, data_config, train_config = split_options(options)
    threads = torch.get_num_threads()
    machine = runtime.start(train_config)
    try:
        dataset = _open_data(names, data_config, saved, machine, progress)
        if saved is not None:
            model_config = saved[0].config
            if saved[2]["data_fingerprint"] != dataset.fingerprint:
                raise UserError(f"{names[0]} has changed since {resume} was started; "
                                "resume with the same data, or start anew")  # fmt: skip
        else:
            model_config = ModelConfig.from_shape(
                model_options.pop("shape"), vocab_size=dataset.tokenizer.vocab_size, **model_options
            )
        dataset.check_fits(model_config.context_length)
        run = Path(train_config.out) if train_config.out else free_name(names[0])
        if saved is None and machine.is_main:
            _make_run_folder(run, overwrite)
        machine.barrier()
        options = {**options, "data": names}
        trainer = Trainer(run, model_config, train_config, dataset, machine, progress, options)
        if saved is not None:
            trainer.restore(*saved)
        result = trainer.fit()
        machine.barrier()  # who leaves early takes the others' connections down
        return result
    finally:
        torch.set_num_threads(threads)  # the caller's, who may go on
        runtime.stop()


def _open_data(
    names: list[str],
    config: DataConfig,
    saved: tuple | None,
    machine: runtime.Machine,
    progress: Progress,
) -> Dataset:
    """Prepared data as it is; text is prepared first, into the cache, once per content."""
    if len(names) == 1 and is_prepared(names[0]):
        return load_data(names[0])
    if saved is not None and is_prepared(saved[2]["data_path"]):
        return load_data(saved[2]["data_path"])
    tell, folder = ByteProgress(progress), Path()
    if machine.is_main:
        inputs = sources.resolve(names, progress=tell)
        inputs += sources.resolve([config.val]) if config.val else []
        key = data_key([sources.fingerprint(source) for source in inputs], config)
        folder = cache_dir() / "data" / key
        with explain_os_errors(f"write {folder}"):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # a second training of the same text waits
            if not is_prepared(folder):
                prepare(names, folder, config, overwrite=True, progress=tell)
    if machine.world > 1:
        shared = [str(folder) if machine.is_main else ""]
        torch.distributed.broadcast_object_list(shared)
        folder = Path(shared[0])
    return load_data(folder)


def free_name(data: str) -> Path:
    """runs/book, or runs/book-2 when that is taken."""
    stem = Path(data).name.split(".")[0] or "model"
    names = (Path("runs") / (stem if n == 1 else f"{stem}-{n}") for n in range(1, 1_000_000))
    return next(path for path in names if not path.exists())


def _make_run_folder(run: Path, overwrite: bool) -> None:
    with explain_os_errors(f"write {run}"):
        if run.exists() and (not run.is_dir() or any(run.iterdir())):
            if not overwrite:
                raise UserError(f"{run} exists already; continue it with --resume {run}, choose "
                                "another --out, or say --overwrite")  # fmt: skip
            if not run.is_dir() or not (run / "glassgpt.json").exists():
                raise UserError(f"{run} is no run directory; --overwrite leaves it alone")
            shutil.rmtree(run)
        run.mkdir(parents=True, exist_ok=True)
