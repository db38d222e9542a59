"""From options to a trained model: `train(data="book.txt", max_steps=500, out="runs/book")`

Resolves options, opens (or prepares) the data, makes the run directory or reopens it, and hands
over to the loop in trainer.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import re
import shlex
import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from glassgpt import checkpoint as ckpt
from glassgpt import runtime
from glassgpt.config import (
    DataConfig,
    ModelConfig,
    TrainConfig,
    names_of,
    resolve_options,
    split_options,
)
from glassgpt.data import sources
from glassgpt.data.batches import Dataset, is_prepared, load_data
from glassgpt.data.download import cache_dir
from glassgpt.data.prepare import data_key, prepare
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.model import crop_positions, load_weights
from glassgpt.pretrained import load_pretrained, tokenizer_file
from glassgpt.runlog import ByteProgress, Progress, program
from glassgpt.system import exclusive
from glassgpt.trainer import Trainer, TrainResult

# All that a run directory may hold: --overwrite deletes nothing that somebody else put there.
_RUN_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|glassgpt)\.json|model\.safetensors"
    r"|metrics\.jsonl|samples\.md|loss\.png|checkpoints|tensorboard|wandb|\.lock|\..*partial.*"
)


def train(
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    resume: str | Path | None = None,
    init_from: str | Path | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
    **options: Any,
) -> TrainResult:
    """Train a GPT on `data` (a prepared folder, text files, folders, corpora).

    Takes every option of `glassgpt train` by its field name. `resume` continues a run directory
    from its newest checkpoint; `init_from` begins with the weights and the tokenizer of a model
    (anything that `glassgpt.load` takes). Raises `UserError` for anything the caller can put right.
    """
    progress = progress or Progress()
    given = resolve_options(options, preset=preset, config=config)
    asked = set(resolve_options(options, config=config))  # a preset asks for nothing by name
    saved = base = None
    if init_from is not None:
        if resume is not None:
            raise UserError("a run that is resumed goes on from its own weights; leave out --from")
        base = load_pretrained(init_from, progress)
        given = _options_for(base, given, asked, os.fspath(init_from))
    if resume is not None:
        saved = ckpt.load_training(resume)
        _check_resumable(given, resume, overwrite)
        given = saved[2]["options"] | given | {"out": str(resume)}
    names = [data] if isinstance(data, (str, os.PathLike)) else list(data or ())
    names = [os.fspath(name) for name in names]
    if saved is not None and not names and is_prepared(saved[2]["data_path"]):
        names = [saved[2]["data_path"]]
    named = names or list(given.get("data") or ())
    if not named:
        raise UserError("nothing to train on; name a text file, a folder or a corpus")
    model_options, data_config, train_config = split_options(given)
    threads = torch.get_num_threads()
    machine = runtime.start(train_config)
    try:
        try:
            dataset = _open_data(named, data_config, asked, machine, progress)
        except UserError as error:
            if saved is None or names:
                raise
            raise UserError(f"{error}; if the text has moved: {program()} train NEW-PATH --resume "
                            f"{shlex.quote(str(resume))}") from error  # fmt: skip
        if base is not None:
            given["data"] = tuple(named)
            model_config = _adopt(dataset, base, model_options, str(init_from))
        elif saved is not None:
            model_config = saved[0].config
            if saved[2]["data_fingerprint"] != dataset.fingerprint:
                raise UserError(f"{named[0]} has changed since {resume} was started; "
                                "resume with the same data, or start anew")  # fmt: skip
        else:
            given["data"] = tuple(named)
            model_config = ModelConfig.from_shape(
                model_options.pop("shape"), vocab_size=dataset.tokenizer.vocab_size, **model_options
            )
        dataset.check_fits(model_config.context_length)
        with contextlib.ExitStack() as held:
            run = Path(train_config.out or "")
            if machine.is_main:
                run = run if train_config.out else new_folder(named[0])
                held.enter_context(_own(run, overwrite, resuming=saved is not None))
            run = machine.share(run)
            trainer = Trainer(run, model_config, train_config, dataset, machine, progress, given)
            if base is not None:
                load_weights(trainer.model, crop_positions(base.weights, model_config))
            if saved is not None:
                trainer.restore(*saved)
            result = trainer.fit()
            machine.barrier()  # who leaves early takes the others' connections down
            return result
    finally:
        torch.set_num_threads(threads)  # the caller's, who may go on
        runtime.stop()


def _check_resumable(given: dict[str, Any], run: str | Path, overwrite: bool) -> None:
    """A run goes on where it is, as what it is: only the training options may change."""
    fixed = {"shape", "out", *names_of(ModelConfig), *names_of(DataConfig)} & set(given)
    fixed |= {"overwrite"} if overwrite else set()
    if fixed:
        raise UserError(f"{', '.join(sorted(fixed))} can't change when resuming {run}; "
                        "leave it out, or start a new run")  # fmt: skip


def _options_for(
    base: ckpt.Checkpoint, given: dict[str, Any], asked: set[str], name: str
) -> dict[str, Any]:
    """The options of a training that begins with `base`, which decides shape and tokenizer."""
    own = {"shape", "tokenizer", *names_of(ModelConfig)} - {"context_length", "dropout"}
    if wrong := sorted(own & asked):
        raise UserError(f"{', '.join(wrong)} can't be chosen with --from {name}, whose weights "
                        "decide; leave it out")  # fmt: skip
    gentle = {"learning_rate": TrainConfig().learning_rate / 10}  # not to forget what it knows
    kept = {key: value for key, value in given.items() if key not in own}
    return gentle | kept | {"tokenizer": tokenizer_file(base.tokenizer), "init_from": name}


def _adopt(data: Dataset, base: ckpt.Checkpoint, options: dict[str, Any], name: str) -> ModelConfig:
    """The config of `base` with the context and dropout asked for; `data` take its tokenizer."""
    theirs, ours = base.tokenizer, data.tokenizer
    same = theirs.vocab_size == ours.vocab_size and all(
        theirs.token_bytes(i) == ours.token_bytes(i) for i in range(ours.vocab_size)
    )
    if not same:
        raise UserError(f"{data.path} was prepared with another tokenizer than that of {name}; "
                        f"prepare it with --tokenizer {tokenizer_file(theirs)}")  # fmt: skip
    data.tokenizer = theirs
    limit, wanted = base.config.context_length, options.get("context_length")
    if wanted is not None and wanted > limit:
        raise UserError(f"context_length={wanted} is longer than the {limit} positions of {name}")
    chosen = {key: options[key] for key in ("context_length", "dropout") if key in options}
    return dataclasses.replace(base.config, **chosen)


def _open_data(
    names: list[str],
    config: DataConfig,
    asked: set[str],
    machine: runtime.Machine,
    progress: Progress,
) -> Dataset:
    """Prepared data as it is; text is prepared first, into the cache, once per content.

    `asked`: the options that the user named, which prepared data can't follow any more.
    """
    if len(names) == 1 and is_prepared(names[0]):
        _check_prepared_as_asked(names[0], config, asked)
        return load_data(names[0])
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
    return load_data(machine.share(folder))


def _check_prepared_as_asked(folder: str, config: DataConfig, asked: set[str]) -> None:
    try:
        stored = json.loads((Path(folder) / "meta.json").read_bytes()).get("options", {})
    except (OSError, ValueError):  # nanoGPT's folder; a damaged one is reported on loading
        stored = {}
    for name in sorted(asked & names_of(DataConfig)):
        if stored.get(name, "") != getattr(config, name):
            raise UserError(f"{folder} is prepared already, so {name}={getattr(config, name)} "
                            "can't be followed; prepare the text anew with it")  # fmt: skip


def new_folder(data: str) -> Path:
    """Make runs/book, or runs/book-2 when that is taken; of two processes each gets its own."""
    stem = re.sub(r"[^\w.-]+", "-", Path(data).name.split(".")[0]).strip("-.") or "model"
    for n in range(1, 1_000_000):
        path = Path("runs") / (stem if n == 1 else f"{stem}-{n}")
        with explain_os_errors(f"write {path}"):
            path.parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
    raise UserError(f"runs/{stem} is taken a million times; choose an --out")


@contextlib.contextmanager
def _own(run: Path, overwrite: bool, *, resuming: bool) -> Iterator[None]:
    """Hold the run directory for this process; unless `resuming`, new or emptied."""
    with explain_os_errors(f"write {run}"):
        if not resuming:
            _check_replaceable(run, overwrite)
        run.mkdir(parents=True, exist_ok=True)
    with exclusive(run, run / ".lock"):
        with explain_os_errors(f"write {run}"):
            for path in run.iterdir() if not resuming else ():
                if path.is_dir() and not path.is_symlink():
                    shutil.rmtree(path)
                elif path.name != ".lock":
                    path.unlink()
        yield


def _check_replaceable(run: Path, overwrite: bool) -> None:
    there = {path.name for path in run.iterdir()} - {".lock"} if run.is_dir() else set()
    if not there and not run.is_file():
        return
    if not overwrite:
        raise UserError(f"{run} exists already; continue it with --resume {shlex.quote(str(run))}, "
                        "choose another --out, or say --overwrite")  # fmt: skip
    foreign = sorted(name for name in there if not _RUN_FILES.fullmatch(name))
    if run.is_file() or foreign:
        what = f"no training wrote {foreign[0]}" if foreign else "it is a file"
        raise UserError(f"{run} is no run directory ({what}); --overwrite leaves it alone")
