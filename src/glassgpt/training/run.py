"""From options to a trained model: `train(data="book.txt", max_steps=500, out="runs/book")`

Resolves options, opens (or prepares) the data, claims the run directory or resumes it, and hands
over to the loop in training/loop.py. `finetune` takes the same way, by the same `Request` and
`TrainingSession`. This module does not know how a step is taken.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shlex
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock

from glassgpt import runtime
from glassgpt.checkpoints.load import load_pretrained, tokenizer_file
from glassgpt.checkpoints.run_directory import (
    Checkpoint,
    Resumed,
    RunDirectory,
    require_language_model,
)
from glassgpt.config import DataConfig, ModelConfig, TrainConfig
from glassgpt.data import sources
from glassgpt.data.dataset import Dataset, is_prepared, load_data
from glassgpt.data.prepare import data_key, prepare
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.model import GPT, crop_positions, load_weights
from glassgpt.options import Options, make_config, names_of, resolve_options
from glassgpt.reporting.run_log import Expectation, require_loggers
from glassgpt.reporting.terminal import program
from glassgpt.system import SILENT, Reporter, cache_dir
from glassgpt.training.loop import Trainer, TrainResult
from glassgpt.training.planning.planner import budget_table, plan_budget
from glassgpt.training.task import TextTask

Names = str | Path | Sequence[str | Path] | None  # of texts, folders, corpora or prepared data

# A base forgets what it knows at the learning rates of a new model.
GENTLE = 0.1


@explain_os_errors("go on")
def train(
    data: Names = None,
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
    request = Request.make(
        "train",
        data,
        options,
        preset=preset,
        config=config,
        base=init_from,
        resume=resume,
        overwrite=overwrite,
        reporter=reporter,
        began=began,
    )
    with contextlib.ExitStack() as held:
        saved, base = request.resumed(held), None
        if saved is not None:
            if not request.data and is_prepared(path := saved.state["data_path"]):
                request = dataclasses.replace(request, data=(path,), asked=frozenset())
            given = request.options_after(saved)
            if given.get("init_from") and saved.checkpoint:  # the cache may have lost the base's
                given["tokenizer"] = tokenizer_file(saved.checkpoint.tokenizer)
        else:
            given = request.options_after(None)
            if request.base is not None:
                base = require_language_model(load_pretrained(request.base, reporter), request.base)
                given = _options_for(base, request.base, given, request.asked)
        session = TrainingSession.start(request, given, saved, held)
        with _hint_of_moved_text(request if saved is not None else None):
            dataset = session.open_data(request.asked)
        session.check_same_data(dataset)
        if saved is None:
            session.options |= _stored_options(given["data"]) or {}
        expected = session.plan_budget(dataset, base) if saved is None else None
        return session.fit(_make_trainer(session, dataset, base, expected))


@explain_os_errors("go on")
def budget_plan(
    data: Names = None,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    reporter: Reporter = SILENT,
    **options: Any,
) -> str:
    """What `train` with a budget would do, as a table: the model, its options, what to expect.

    Prepares the text, as training does, and measures a few steps; trains nothing.
    """
    request = Request.make("train", data, options, preset=preset, config=config, reporter=reporter)
    with contextlib.ExitStack() as held:
        session = TrainingSession.start(request, request.options_after(None), None, held)
        dataset = session.open_data(request.asked)
        expected = session.plan_budget(dataset, None)
        assert expected is not None
        model = _model_config(session, dataset, None)
        return budget_table(model, session.options, expected, session.machine)


# -- what was asked ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Request:
    """What the caller of `train` or `finetune` wants."""

    verb: str
    data: tuple[str, ...]  # names; () where an option or the run to resume says it
    options: Options  # of preset, file and caller, checked
    asked: frozenset[str]  # options that file or caller named; a preset asks for nothing by name
    base: str | None = None  # the model to begin with
    resume: str | None = None  # the run directory to continue
    overwrite: bool = False
    reporter: Reporter = SILENT
    began: float = 0.0  # when a budget started to run (time.monotonic)

    @classmethod
    def make(
        cls,
        verb: str,
        data: Names,
        options: Options,
        *,
        preset: str | None,
        config: str | Path | None,
        base: str | Path | None = None,
        resume: str | Path | None = None,
        overwrite: bool = False,
        reporter: Reporter = SILENT,
        began: float | None = None,
    ) -> Request:
        """Resolves and checks the options; raises `UserError` for those that can't be."""
        given = resolve_options(options, preset=preset, config=config, verb=verb)
        asked = frozenset(resolve_options(options, config=config, verb=verb))
        request = cls(
            verb,
            tuple(names_in(data)),
            given,
            asked,
            base=None if base is None else os.fspath(base),
            resume=None if resume is None else os.fspath(resume),
            overwrite=overwrite,
            reporter=reporter,
            began=began or time.monotonic(),
        )
        if resume is not None:
            request._check_resumable()
        return request

    def _check_resumable(self) -> None:
        """A run goes on where it is, as what it is: only the training options may change."""
        may_change = names_of(TrainConfig) - {"out"}
        fixed = {name for name in self.options if name not in may_change}
        fixed |= {"overwrite"} if self.overwrite else set()
        fixed |= {"from"} if self.base is not None else set()
        if fixed:
            raise UserError(
                f"{', '.join(sorted(fixed))} can't change when resuming {self.resume}; "
                "leave it out, or start a new run"
            )

    def resumed(self, held: contextlib.ExitStack) -> Resumed | None:
        """Where the run to resume stopped; it is held for this process. None for a new run."""
        if self.resume is None:
            return None
        is_main = int(os.environ.get("RANK", 0)) == 0
        return held.enter_context(
            RunDirectory(Path(self.resume)).resume(self.verb, is_main=is_main)
        )

    def options_after(self, saved: Resumed | None) -> Options:
        """All options by name: those of the run that is resumed, replaced by those given now."""
        given = dict(self.options)
        if saved is not None:
            given = saved.state["options"] | given | {"out": self.resume}
        if self.base is not None:
            given["init_from"] = self.base
        given["data"] = self.data or tuple(given.get("data") or ())
        if not given["data"]:
            raise UserError("nothing to train on; name a text file, a folder or a corpus")
        counted = sorted({"eval_interval", "checkpoint_interval"} & self.asked)
        if given.get("budget") and counted:
            raise UserError(
                f"{counted[0]} counts steps; with a --budget the clock decides, so leave it out"
            )
        return given


def names_in(data: Names) -> list[str]:
    """One name, several or none -> a list of names."""
    names = [data] if isinstance(data, (str, os.PathLike)) or data is None else data
    try:
        return [os.fspath(name) for name in names if name is not None]
    except TypeError:
        raise UserError(f"data={data!r} must be a name, a path, or a list of them") from None


# -- what serves it ------------------------------------------------------------------------------


@dataclass
class TrainingSession:
    """One training from its options to its result, and what it holds meanwhile."""

    request: Request
    options: Options  # all that are decided so far; the run directory keeps them
    saved: Resumed | None
    held: contextlib.ExitStack  # let go at the end: the run's lock, processes, threads
    machine: runtime.Machine

    @classmethod
    def start(
        cls, request: Request, options: Options, saved: Resumed | None, held: contextlib.ExitStack
    ) -> TrainingSession:
        """Choose device, threads and processes; raises `UserError` for impossible options."""
        config = make_config(TrainConfig, options)
        require_loggers(tensorboard=config.tensorboard, wandb=config.wandb)
        held.callback(torch.set_num_threads, torch.get_num_threads())  # the caller's
        machine = runtime.start(config)
        held.callback(runtime.stop)
        return cls(request, options, saved, held, machine)

    @property
    def config(self) -> TrainConfig:
        return make_config(TrainConfig, self.options)

    @property
    def reporter(self) -> Reporter:
        return self.request.reporter

    def open_data(self, asked: frozenset[str] = frozenset()) -> Dataset:
        """The data that the options name."""
        config = make_config(DataConfig, self.options)
        return open_data(self.options["data"], config, asked, self.machine, self.reporter)

    def check_same_data(self, data: Dataset) -> None:
        """A run is resumed with the data that it began with."""
        if self.saved is not None and self.saved.state["data_fingerprint"] != data.fingerprint:
            raise UserError(
                f"{self.options['data'][0]}, or how it is read, has changed since "
                f"{self.request.resume} was started; resume with the same data, or start anew"
            )

    def plan_budget(self, data: Dataset, base: Checkpoint | None) -> Expectation | None:
        """With a budget, complete the options to make the best of it; what to expect of that."""
        if self.config.budget is None:
            return None
        work = partial(
            plan_budget,
            self.options,
            data,
            self.machine,
            began=self.request.began,
            reporter=self.reporter,
            asked=set(self.request.asked),
            base=base and base.config,
        )
        self.options, expected = self.machine.on_main(work)
        return expected

    def claim(self) -> RunDirectory:
        """The run directory, held for this process; what was there before is still there."""
        return self.machine.on_main(self._claim)

    def _claim(self) -> RunDirectory:
        given = self.options
        if given.get("out"):
            run = RunDirectory(Path(given["out"]))
        else:
            run = RunDirectory.named_after(given["data"][0])
        if self.saved is None:
            inputs = [*given["data"], *(given.get(name) for name in ("val", "init_from", "keep"))]
            self.held.enter_context(run.claim(self.request.overwrite, filter(None, inputs)))
        return run

    @contextlib.contextmanager
    def seeded(self, model: ModelConfig) -> Iterator[None]:
        """The model is made in here: its random weights follow from the seed, and what torch says
        of memory, in several ways, is one `UserError`."""
        torch.manual_seed(self.config.seed)
        try:
            yield
        except (RuntimeError, MemoryError) as error:
            if not runtime.is_out_of_memory(error):
                raise
            raise UserError(
                f"a model of {model.n_parameters:,} parameters does not fit in memory; "
                "make it smaller"
            ) from error

    def trainer(
        self,
        run: RunDirectory,
        model: GPT,
        data: Dataset,
        *,
        task: TextTask | None = None,
        expected: Expectation | None = None,
    ) -> Trainer:
        """The loop of this training, before its first step; or where it stopped, by `fit`."""
        return Trainer(
            run.path,
            model,
            self.config,
            data,
            self.machine,
            self.reporter,
            self.options,
            task=task,
            began=self.request.began,
            plan=expected,
        )

    def fit(self, trainer: Trainer) -> TrainResult:
        """Train to the end, from the beginning or from where the run stopped."""
        if self.saved is not None:
            trainer.restore(self.saved.checkpoint, self.saved.tensors, self.saved.state)
        elif self.machine.is_main:  # an old run goes only now, when nothing keeps the new one back
            RunDirectory(trainer.run).empty()
        result = trainer.fit()
        self.machine.barrier()  # a process that leaves early takes the others' connections down
        return result


# -- the model -----------------------------------------------------------------------------------


def _make_trainer(
    session: TrainingSession,
    data: Dataset,
    base: Checkpoint | None,
    expected: Expectation | None,
) -> Trainer:
    """A new model, or `base`, ready to be trained in a run directory of its own."""
    config = _model_config(session, data, base)
    data.check_fits(config.context_length)
    run = session.claim()
    with session.seeded(config):
        model = GPT(config).to(session.machine.device)
        if base is not None:
            load_weights(model, crop_positions(base.weights, config))
        return session.trainer(run, model, data, expected=expected)


def _model_config(session: TrainingSession, data: Dataset, base: Checkpoint | None) -> ModelConfig:
    given = session.options
    if session.saved is not None and session.saved.checkpoint is not None:
        return session.saved.checkpoint.config
    if base is None:
        own = {name: given[name] for name in names_of(ModelConfig) & set(given)}
        shape = given.get("shape", "modern")
        return ModelConfig.from_shape(shape, vocab_size=data.tokenizer.vocab_size, **own)
    name = given["init_from"]
    adopt_tokenizer(data, base, name)
    limit, wanted = base.config.context_length, given.get("context_length")
    if wanted is not None and wanted > limit:
        raise UserError(f"context_length={wanted} is longer than the {limit} positions of {name}")
    chosen = {key: given[key] for key in ("context_length", "dropout") if key in given}
    return dataclasses.replace(base.config, **chosen)


def _options_for(base: Checkpoint, name: str, given: Options, asked: frozenset[str]) -> Options:
    """The options of a training that begins with `base`, which decides shape and tokenizer."""
    own = {"shape", "tokenizer", *names_of(ModelConfig)} - {"context_length", "dropout"}
    if wrong := sorted(own & asked):
        raise UserError(
            f"{', '.join(wrong)} can't be chosen with --from {name}, whose weights decide; "
            "leave it out"
        )
    usual = TrainConfig()
    rates = {key: GENTLE * getattr(usual, key) for key in ("learning_rate", "muon_learning_rate")}
    kept = {key: value for key, value in given.items() if key not in own}
    if kept.get("context_length", 0) > base.config.context_length and "context_length" not in asked:
        del kept["context_length"]  # a preset's wish
    return rates | kept | {"tokenizer": tokenizer_file(base.tokenizer)}


# -- data ----------------------------------------------------------------------------------------


def open_data(
    names: Sequence[str],
    config: DataConfig,
    asked: frozenset[str] = frozenset(),
    machine: runtime.Machine | None = None,
    reporter: Reporter = SILENT,
) -> Dataset:
    """Prepared data as it is; text is prepared first, into the cache, once per content.

    `asked`: the options that the user named, which prepared data can't follow any more. With
    several processes, the main one of `machine` prepares.
    """
    stored = _stored_options(names)
    if stored is not None:
        for name in sorted(asked & names_of(DataConfig)):
            if stored.get(name, "") != (wanted := getattr(config, name)):
                raise UserError(
                    f"{names[0]} is prepared already, so {name}={wanted} can't be followed; "
                    "prepare the text anew with it"
                )
        return load_data(names[0])
    find_or_make = partial(_find_or_prepare, names, config, reporter)
    return load_data(machine.on_main(find_or_make) if machine else find_or_make())


def _find_or_prepare(names: Sequence[str], config: DataConfig, reporter: Reporter) -> Path:
    """The folder in the cache with these texts as tokens."""
    inputs = sources.resolve(names, reporter=reporter)
    inputs += sources.resolve([config.val]) if config.val is not None else []
    key = data_key([sources.stamp_of(source) for source in inputs], config)
    folder = cache_dir() / "data" / key
    if is_prepared(folder):
        return folder
    with explain_os_errors(f"write {folder}"):
        folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.with_suffix(".lock")):  # a second training of the same text waits
        if not is_prepared(folder):
            prepare(names, folder, config, overwrite=True, reporter=reporter)
    return folder


def _stored_options(names: Sequence[str]) -> Options | None:
    """With what options prepared data were made ({} for nanoGPT's); None for anything else."""
    if len(names) > 1 or not is_prepared(names[0]):
        return None
    try:
        stored = json.loads((Path(names[0]) / "meta.json").read_bytes())["options"]
        return stored if isinstance(stored, dict) else {}
    except (OSError, ValueError, KeyError, TypeError):  # a damaged one is reported on loading
        return {}


def adopt_tokenizer(data: Dataset, base: Checkpoint, name: str) -> None:
    """`data` take the tokenizer of `base`, which must be the one that made them."""
    theirs, ours = base.tokenizer, data.tokenizer
    same = theirs.vocab_size == ours.vocab_size and all(
        theirs.token_bytes(i) == ours.token_bytes(i) for i in range(ours.vocab_size)
    )
    if not same:
        raise UserError(
            f"{data.path} was prepared with another tokenizer than that of {name}; "
            f"prepare it with --tokenizer {tokenizer_file(theirs)}"
        )
    data.tokenizer = theirs


@contextlib.contextmanager
def _hint_of_moved_text(request: Request | None) -> Iterator[None]:
    """An error about the data of a run to resume says what to do when the text is elsewhere now."""
    try:
        yield
    except UserError as error:
        if request is None or request.data or request.resume is None:
            raise
        raise UserError(
            f"{error}; if the text has moved: {program()} train NEW-PATH --resume "
            f"{shlex.quote(request.resume)}"
        ) from error
