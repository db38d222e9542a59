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
import time
from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from glassgpt import runtime
from glassgpt.checkpoints import run_directory as ckpt
from glassgpt.checkpoints.load import load_pretrained, tokenizer_file
from glassgpt.config import DataConfig, ModelConfig, TrainConfig
from glassgpt.data import sources
from glassgpt.data.batches import Dataset, is_prepared, load_data
from glassgpt.data.prepare import data_key, prepare
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.model import GPT, crop_positions, load_weights
from glassgpt.options import names_of, resolve_options, split_options
from glassgpt.reporting.run_log import require_loggers
from glassgpt.reporting.terminal import program
from glassgpt.system import SILENT, Reporter, cache_dir, exclusive
from glassgpt.training.loop import Trainer, TrainResult
from glassgpt.training.planning.planner import budget_table, plan_budget

# All that a run directory may hold: --overwrite deletes nothing that somebody else put there.
_MODEL_FILES = (
    r"(config|generation_config|tokenizer|tokenizer_config|glassgpt)\.json|model\.safetensors"
)
_RUN_FILES = re.compile(
    rf"\.?({_MODEL_FILES}|metrics\.jsonl|samples\.md|report\.md)(\.partial)?"
    r"|(\.partial-)?(loss|confusion)\.png|adapter|checkpoints|snapshots|tensorboard|wandb|\.lock"
)
# Those that only we write: a downloaded model has none of them.
_OWN_FILES = {"glassgpt.json", "metrics.jsonl", "checkpoints"}


@explain_os_errors("go on")
def train(
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    resume: str | Path | None = None,
    init_from: str | Path | None = None,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
    began: float | None = None,
    **options: Any,
) -> TrainResult:
    """Train a GPT on `data` (a prepared folder, text files, folders, corpora).

    Takes every option of `glassgpt train` by its field name. `resume` continues a run directory
    from its newest checkpoint; `init_from` begins with the weights and the tokenizer of a model
    (anything that `glassgpt.load` takes). A `budget` is counted from `began` (time.monotonic) or
    from this call. Raises `UserError` for anything the caller can put right.
    """
    began = began or time.monotonic()
    names = names_in(data)
    given = resolve_options(options, preset=preset, config=config)
    asked = set(resolve_options(options, config=config))  # a preset asks for nothing by name
    with contextlib.ExitStack() as held:
        saved = base = None
        if resume is not None:
            check_resumable(given, resume, overwrite, init_from)
            saved = hold_and_load(resume, held, "train")
            given = saved[2]["options"] | given | {"out": os.fspath(resume)}
            if given.get("init_from"):  # the base's tokenizer, which the cache may have lost
                given["tokenizer"] = tokenizer_file(saved[0].tokenizer)
            if not names and is_prepared(saved[2]["data_path"]):
                names, asked = [saved[2]["data_path"]], set()
        elif init_from is not None:
            base = ckpt.require_language_model(load_pretrained(init_from, reporter), init_from)
            given = _options_for(base, given, asked, os.fspath(init_from))
        given["data"] = required(names or given.get("data"))
        check_pace(given, asked)
        config_now = split_options(given)[2]
        require_loggers(tensorboard=config_now.tensorboard, wandb=config_now.wandb)
        held.callback(torch.set_num_threads, torch.get_num_threads())  # the caller's
        machine = runtime.start(config_now)
        held.callback(runtime.stop)
        with _hint_of_moved_text(resume if saved is not None and not names else None):
            dataset = open_data(given, asked, machine, reporter)
        if saved is None:
            given |= _stored_options(given["data"]) or {}
        elif saved[2]["data_fingerprint"] != dataset.fingerprint:
            raise UserError(f"{given['data'][0]} has changed since {resume} was started; "
                            "resume with the same data, or start anew")  # fmt: skip
        clock: dict[str, Any] = {"began": began}
        if config_now.budget is not None and saved is None:
            how = dict(began=began, reporter=reporter, asked=asked, base=base and base.config)
            work = partial(plan_budget, given, dataset, machine, **how)
            given, clock["plan"] = machine.on_main(work)
        trainer = _make_trainer(given, dataset, machine, reporter, saved, base, overwrite, held,
                                **clock)  # fmt: skip
        result = trainer.fit()
        machine.barrier()  # who leaves early takes the others' connections down
        return result


@contextlib.contextmanager
def _hint_of_moved_text(resume: str | Path | None) -> Iterator[None]:
    """An error of the data of a run to `resume` says what to do when they are elsewhere now."""
    try:
        yield
    except UserError as error:
        if resume is None:
            raise
        raise UserError(f"{error}; if the text has moved: {program()} train NEW-PATH --resume "
                        f"{shlex.quote(os.fspath(resume))}") from error  # fmt: skip


@explain_os_errors("go on")
def plan(
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    reporter: Reporter = SILENT,
    **options: Any,
) -> str:
    """What `train` with a budget would do, as a table: the model, its options, what to expect.

    Prepares the text, as training does, and measures a few steps; trains nothing.
    """
    began = time.monotonic()
    given = resolve_options(options, preset=preset, config=config)
    asked = set(resolve_options(options, config=config))
    given["data"] = required(names_in(data) or given.get("data"))
    with contextlib.ExitStack() as held:
        held.callback(torch.set_num_threads, torch.get_num_threads())
        machine = runtime.start(split_options(given)[2])
        held.callback(runtime.stop)
        dataset = open_data(given, asked, machine, reporter)
        given, expected = plan_budget(given, dataset, machine, began=began, reporter=reporter,
                                      asked=asked)  # fmt: skip
        return budget_table(_model_config(given, dataset, None, None), given, expected, machine)


def hold_and_load(run: str | Path, held: contextlib.ExitStack, verb: str) -> tuple:
    """What `ckpt.load_training` gives; locked before it is read, lest another process moves on."""
    if int(os.environ.get("RANK", 0)) == 0:
        folder = ckpt.find_training(run).parents[1]
        held.enter_context(exclusive(folder, folder / ".lock"))
    saved = ckpt.load_training(run)
    if (made_by := saved[2].get("verb", "train")) != verb:
        raise UserError(f"{run} was made by {made_by}; go on with: {program()} {made_by} --resume "
                        f"{shlex.quote(os.fspath(run))}")  # fmt: skip
    return saved


def _make_trainer(
    given: dict[str, Any],
    data: Dataset,
    machine: runtime.Machine,
    reporter: Reporter,
    saved: tuple | None,
    base: ckpt.Checkpoint | None,
    overwrite: bool,
    held: contextlib.ExitStack,
    **clock: Any,
) -> Trainer:
    """A trainer that is ready to go, in a run directory of its own."""
    config, model_config = split_options(given)[2], _model_config(given, data, saved, base)
    data.check_fits(model_config.context_length)
    run = machine.on_main(lambda: own_run(given, saved is not None, overwrite, held))
    with explain_memory(model_config):
        torch.manual_seed(config.seed)
        model = GPT(model_config).to(machine.device)
        if base is not None:
            load_weights(model, crop_positions(base.weights, model_config))
        trainer = Trainer(run, model, config, data, machine, reporter, given, **clock)
    if saved is not None:
        trainer.restore(*saved)
    elif machine.is_main:
        empty(run)  # an old run goes only now, when nothing keeps the new one from starting
    return trainer


def own_run(
    given: dict[str, Any], resumed: bool, overwrite: bool, held: contextlib.ExitStack
) -> Path:
    """The run directory, held for this process alone; what was there before is there still."""
    run = Path(given["out"]) if given.get("out") else new_folder(given["data"][0])
    if not resumed:
        if overwrite:
            inputs = [*given["data"], *(given.get(name) for name in ("val", "init_from", "keep"))]
            _check_outside(run, [name for name in inputs if name])
        held.enter_context(_own(run, overwrite))
    return run


@contextlib.contextmanager
def explain_memory(config: ModelConfig) -> Iterator[None]:
    """What torch says of memory in many ways, as one `UserError`."""
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        if not runtime.is_out_of_memory(error):
            raise
        raise UserError(f"a model of {config.n_parameters:,} parameters does not fit in "
                        "memory; make it smaller") from error  # fmt: skip


def check_pace(given: dict[str, Any], asked: set[str]) -> None:
    """With a budget, the clock says when to evaluate and to save."""
    counted = sorted({"eval_interval", "checkpoint_interval"} & asked)
    if given.get("budget") and counted:
        raise UserError(f"{counted[0]} counts steps; with a --budget the clock decides, so leave "
                        "it out")  # fmt: skip


def required(names: Sequence[str] | None) -> tuple[str, ...]:
    if not names:
        raise UserError("nothing to train on; name a text file, a folder or a corpus")
    return tuple(names)


def names_in(data: Any) -> list[str]:
    names = [data] if isinstance(data, (str, os.PathLike)) or data is None else data
    try:
        return [os.fspath(name) for name in names if name is not None]
    except TypeError:
        raise UserError(f"data={data!r} must be a name, a path, or a list of them") from None


def _model_config(
    given: dict[str, Any], data: Dataset, saved: tuple | None, base: ckpt.Checkpoint | None
) -> ModelConfig:
    if saved is not None:
        return saved[0].config
    options = split_options(given)[0]
    if base is not None:
        return adopt(data, base, options, given["init_from"])
    return ModelConfig.from_shape(
        options.pop("shape"), vocab_size=data.tokenizer.vocab_size, **options
    )


def check_resumable(
    given: dict[str, Any], run: str | Path, overwrite: bool, init_from: str | Path | None
) -> None:
    """A run goes on where it is, as what it is: only the training options may change."""
    fixed = {"shape", "out", "data", *names_of(ModelConfig), *names_of(DataConfig)} & set(given)
    fixed |= {"overwrite"} if overwrite else set()
    fixed |= {"from"} if init_from is not None else set()
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
    usual = TrainConfig()
    gentle = {name: getattr(usual, name) / 10  # not to forget what it knows
              for name in ("learning_rate", "muon_learning_rate")}  # fmt: skip
    kept = {key: value for key, value in given.items() if key not in own}
    if kept.get("context_length", 0) > base.config.context_length and "context_length" not in asked:
        del kept["context_length"]  # a preset's wish
    return gentle | kept | {"tokenizer": tokenizer_file(base.tokenizer), "init_from": name}


def adopt(data: Dataset, base: ckpt.Checkpoint, options: dict[str, Any], name: str) -> ModelConfig:
    """The config of `base` with the context and dropout asked for; `data` take its tokenizer."""
    adopt_tokenizer(data, base, name)
    limit, wanted = base.config.context_length, options.get("context_length")
    if wanted is not None and wanted > limit:
        raise UserError(f"context_length={wanted} is longer than the {limit} positions of {name}")
    chosen = {key: options[key] for key in ("context_length", "dropout") if key in options}
    return dataclasses.replace(base.config, **chosen)


def adopt_tokenizer(data: Dataset, base: ckpt.Checkpoint, name: str) -> None:
    """`data` take the tokenizer of `base`, which must be the one that made them."""
    theirs, ours = base.tokenizer, data.tokenizer
    same = theirs.vocab_size == ours.vocab_size and all(
        theirs.token_bytes(i) == ours.token_bytes(i) for i in range(ours.vocab_size)
    )
    if not same:
        raise UserError(f"{data.path} was prepared with another tokenizer than that of {name}; "
                        f"prepare it with --tokenizer {tokenizer_file(theirs)}")  # fmt: skip
    data.tokenizer = theirs


def open_data(
    given: dict[str, Any],
    asked: set[str],
    machine: runtime.Machine,
    reporter: Reporter,
) -> Dataset:
    """Prepared data as it is; text is prepared first, into the cache, once per content.

    `asked`: the options that the user named, which prepared data can't follow any more.
    """
    names, config = given["data"], split_options(given)[1]
    stored = _stored_options(names)
    if stored is not None:
        for name in sorted(asked & names_of(DataConfig)):
            if stored.get(name, "") != getattr(config, name):
                raise UserError(f"{names[0]} is prepared already, so {name}="
                                f"{getattr(config, name)} can't be followed; prepare the text "
                                "anew with it")  # fmt: skip
        return load_data(names[0])

    def find_or_make() -> Path:
        inputs = sources.resolve(names, reporter=reporter)
        inputs += sources.resolve([config.val]) if config.val is not None else []
        key = data_key([sources.fingerprint(source) for source in inputs], config)
        folder = cache_dir() / "data" / key
        if is_prepared(folder):
            return folder
        with explain_os_errors(f"write {folder}"):
            folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # a second training of the same text waits
            if not is_prepared(folder):
                prepare(names, folder, config, overwrite=True, reporter=reporter)
        return folder

    return load_data(machine.on_main(find_or_make))


def _stored_options(names: Sequence[str]) -> dict[str, Any] | None:
    """With what options prepared data were made ({} for nanoGPT's); None for anything else."""
    if len(names) > 1 or not is_prepared(names[0]):
        return None
    try:
        stored = json.loads((Path(names[0]) / "meta.json").read_bytes())["options"]
        return stored if isinstance(stored, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):  # a damaged one is reported on loading
        return {}


def new_folder(data: str) -> Path:
    """Make runs/book, or runs/book-2 when that is taken; of two processes each gets its own."""
    stem = re.sub(r"[^\w.-]+", "-", Path(data).name.split(".")[0]).strip("-.")[:80] or "model"
    for n in range(1, 1_000_000):
        path = Path("runs") / (stem if n == 1 else f"{stem}-{n}")
        with explain_os_errors(f"write {path}"):
            path.parent.mkdir(exist_ok=True)
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
    raise UserError(f"runs/{stem} is taken a million times; choose an --out")


@contextlib.contextmanager
def _own(run: Path, overwrite: bool) -> Iterator[None]:
    """Hold the directory of a new run for this process; it may hold an old run to overwrite."""
    with explain_os_errors(f"write {run}"):
        _check_replaceable(run, overwrite)
        run.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(run, run / ".lock"):
            yield
    finally:
        with contextlib.suppress(OSError):  # where nothing was written, nothing is left
            run.rmdir()


def empty(run: Path) -> None:
    with explain_os_errors(f"write {run}"):
        for path in run.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            elif path.name != ".lock":
                path.unlink()


def _check_outside(run: Path, inputs: Sequence[str | Path]) -> None:
    """What is trained on must not lie in what would be overwritten."""
    place = Path(os.path.realpath(run))
    for name in inputs:
        if place in (path := Path(os.path.realpath(name)), *path.parents):
            raise UserError(f"{name} lies in {run}, which would be replaced; choose another --out")


def _check_replaceable(run: Path, overwrite: bool) -> None:
    there = {path.name for path in run.iterdir()} - {".lock"} if run.is_dir() else set()
    if not there and not run.is_file():
        return
    if not overwrite:
        raise UserError(f"{run} exists already; continue it with --resume {shlex.quote(str(run))}, "
                        "choose another --out, or say --overwrite")  # fmt: skip
    foreign = {name for name in there if not _RUN_FILES.fullmatch(name)}
    if (run / "checkpoints").is_dir():
        names = {path.name for path in (run / "checkpoints").iterdir()}
        foreign |= {f"checkpoints/{name}" for name in names - {"last", ".next", ".previous"}}
    if (run / "snapshots").is_dir():
        names = {path.name for path in (run / "snapshots").iterdir()} - {ckpt.UNFINISHED}
        foreign |= {f"snapshots/{name}" for name in names if not ckpt.SNAPSHOT.fullmatch(name)}
    if foreign or not there & _OWN_FILES:
        what = f"no training wrote {min(foreign)}" if foreign else "no training wrote it"
        raise UserError(f"{run} is no run directory ({what}); --overwrite leaves it alone")
