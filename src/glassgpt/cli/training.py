"""The verbs that make models: demo, prepare, train, finetune, plan."""

from __future__ import annotations

import os
import shlex
from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Annotated, TypedDict

from cyclopts import Parameter

from glassgpt.cli.arguments import FinetuneOptions, PrepareOptions, TrainOptions
from glassgpt.config import DataConfig
from glassgpt.options import Options, preset_names, resolve_options

if TYPE_CHECKING:
    from glassgpt.training.loop import TrainResult


def demo_verb(*, out: str | None = None) -> None:
    """Train a small GPT on real text for about a minute and see what it has learned.

    Uses Shakespeare if it can be had within seconds, otherwise the reference manual that every
    Python carries: no network is needed. Prints samples before and after, and what to try next.

    Parameters
    ----------
    out:
        Run directory [runs/demo, runs/demo-2, ...].
    """
    from glassgpt.cli.demo import demo as run
    from glassgpt.reporting.terminal import Terminal

    _exit_status(run(Terminal(), out))


def prepare_verb(
    sources: Annotated[list[str], Parameter(negative_iterable=())],
    /,
    *,
    out: str,
    workers: int | None = None,
    overwrite: bool = False,
    options: Annotated[PrepareOptions, Parameter(name="*")] = {},  # noqa: B006
) -> None:
    """Turn text into token files that training can map into memory, however large.

    SOURCES are files, folders, globs or named corpora: shakespeare, wizard-of-oz,
    sales-textbook, tinystories, openwebtext, fineweb-edu, python-manual. Text, jsonl, csv, tsv
    and parquet are read, also inside gz, xz, bz2, zst, zip, tar and 7z, nested at will.

    For small texts this step is optional: `glassgpt train book.txt` does it by itself.

    Examples:

    glassgpt prepare book.txt --out data/book

    glassgpt prepare corpus/ more.jsonl.gz --text-field body --tokenizer bpe:8192 --out data/mine

    glassgpt prepare openwebtext --tokenizer gpt2 --val-fraction 0.0005 --out data/owt

    Parameters
    ----------
    sources:
        Files, folders, globs or corpora.
    out:
        Folder to write.
    workers:
        Threads that tokenize [all cores].
    overwrite:
        Replace OUT if it exists.
    """
    from glassgpt.data.prepare import prepare as run
    from glassgpt.reporting.terminal import Terminal

    terminal = Terminal()
    try:
        report = run(
            sources,
            out,
            DataConfig(**options),
            workers=workers,
            overwrite=overwrite,
            reporter=terminal,
        )
    finally:
        terminal.close()
    print(report.describe(out))


def train_verb(
    data: Annotated[list[str] | None, Parameter(negative_iterable=())] = None,
    /,
    *,
    preset: Annotated[
        str | None, Parameter(help=f"A packaged recipe: {', '.join(preset_names())}.")
    ] = None,
    config: str | None = None,
    resume: str | None = None,
    init_from: Annotated[str | None, Parameter(name="--from")] = None,
    overwrite: bool = False,
    options: Annotated[TrainOptions, Parameter(name="*")] = {},  # noqa: B006
) -> None:
    """Train a GPT on text and keep it as a run directory that other tools load as it is.

    DATA is a text file, a folder, a corpus (`shakespeare`), or a folder made by `prepare`.
    Ctrl-C stops after the step, saves, says how to go on, and ends with status 130. Every option
    can also stand in a TOML file; precedence: defaults < --preset < --config < command line.

    Examples:

    glassgpt train book.txt --budget 5m

    glassgpt train book.txt --tokenizer bpe:2048 --n-layer 6 --n-embd 256 --max-steps 5000

    glassgpt train --resume runs/book

    glassgpt train book.txt --from gpt2 --context-length 256 --max-steps 200

    torchrun --nproc-per-node 8 -m glassgpt train data/owt --preset gpt2-124m

    Parameters
    ----------
    data:
        What to train on.
    config:
        TOML file with options.
    resume:
        Run directory to continue; its options hold unless given anew.
    init_from:
        Begin with the weights and tokenizer of this model: a run directory, gpt2, OWNER/MODEL on
        the hub, openai:124M, nanoGPT's ckpt.pt. The learning rate is then a tenth of the usual.
    overwrite:
        Replace the run directory if it exists.
    """
    from glassgpt.training.run import train

    common = RunOptions(preset=preset, config=config, resume=resume, overwrite=overwrite)
    _run(partial(train, data, init_from=init_from), common, options)


def finetune_verb(
    base: str | None = None,
    data: Annotated[list[str] | None, Parameter(negative_iterable=())] = None,
    /,
    *,
    preset: Annotated[str | None, Parameter(help="A packaged recipe, as for `train`.")] = None,
    config: str | None = None,
    resume: str | None = None,
    overwrite: bool = False,
    options: Annotated[FinetuneOptions, Parameter(name="*")] = {},  # noqa: B006
) -> None:
    """Train a model further: on other text, into a chat partner, or into a classifier.

    BASE is a run directory or a published model, as for `sample`. DATA is text; conversations
    (jsonl with messages, conversations, instruction and output, or prompt and completion; csv and
    parquet with such columns; text with lines that begin with User: and Assistant:); or labelled
    texts (jsonl, csv, parquet with text and label). What it is is seen and said; --format forces
    it. The result is a run directory like any other. It stops when the validation loss no longer
    falls, and keeps the best.

    Examples:

    glassgpt finetune runs/book letters.txt

    glassgpt finetune gpt2 chats.jsonl --lora-rank 8 --out runs/partner

    glassgpt finetune runs/book reviews.csv --freeze 2 --epochs 5

    glassgpt finetune runs/book notes.txt --keep book.txt --replay 0.2

    glassgpt finetune --resume runs/partner

    Parameters
    ----------
    base:
        Model to begin with.
    data:
        What to train it on.
    config:
        TOML file with options.
    resume:
        Run directory to continue.
    overwrite:
        Replace the run directory if it exists.
    """
    from glassgpt.finetuning.run import finetune

    common = RunOptions(preset=preset, config=config, resume=resume, overwrite=overwrite)
    _run(partial(finetune, base, data), common, options)


class RunOptions(TypedDict):
    """What `train` and `finetune` take beside the options that a run keeps."""

    preset: str | None
    config: str | None
    resume: str | None
    overwrite: bool


def _run(work: Callable[..., TrainResult], common: RunOptions, options: Options) -> None:
    """Train as a process of its own: one of several tells people of it, and the status says how it
    ended."""
    from glassgpt import STARTED
    from glassgpt.reporting.terminal import Terminal, program
    from glassgpt.system import SILENT

    is_main = int(os.environ.get("RANK", 0)) == 0
    terminal = Terminal() if is_main else SILENT
    try:
        result = work(reporter=terminal, began=STARTED, **common, **options)
    finally:
        terminal.close()
    _exit_status(result)
    for line in result.summary:
        terminal.say(line)
    terminal.say(
        f"best val loss {result.best_val_loss:.4f} (at the start {result.first_val_loss:.4f})"
        f" · loss curve: {result.run / 'loss.png'}"
    )
    shown = shlex.quote(str(result.run))
    terminal.say(f"next: {program()} {result.try_next.format(run=shown)}")


def plan_verb(
    data: Annotated[list[str] | None, Parameter(negative_iterable=())] = None,
    /,
    *,
    preset: Annotated[str | None, Parameter(help="As for `train`.")] = None,
    config: str | None = None,
    gpu: str | None = None,
    gpus: int | None = None,
    mfu: float | None = None,
    price: float | None = None,
    options: Annotated[TrainOptions, Parameter(name="*")] = {},  # noqa: B006
) -> None:
    """Say what a training would take: memory, time and money, here or on the GPUs you name.

    Takes the options of `train` and trains nothing. With --budget it says what would be trained in
    that time (and --memory), and what loss to expect. Without --gpu a few real steps are measured
    on this machine; with it, time follows from the card's data sheet and the share --mfu of it.

    Examples:

    glassgpt plan book.txt --budget 5m

    glassgpt plan book.txt --budget 1h --memory 2GB

    glassgpt plan --preset gpt2-124m --gpu A100 --gpus 8 --mfu 0.4 --price 1.80

    Parameters
    ----------
    gpu:
        Card to plan for: H200, H100, A100, A100-80GB, L40S, L4, V100, T4, 4090, 3090.
    gpus:
        How many of them [1].
    mfu:
        Share of the card's peak that training reaches, 0 to 1 [0.3].
    price:
        Dollars for an hour of one GPU, or of this machine.
    """
    from glassgpt.errors import UserError
    from glassgpt.reporting.terminal import Terminal
    from glassgpt.training.planning import planner
    from glassgpt.training.run import budget_plan

    terminal = Terminal()
    where = {"preset": preset, "config": config}
    try:
        if resolve_options(options, **where).get("budget"):
            if gpu or gpus or mfu:
                raise UserError("a budget is planned by measuring: on this machine, without --gpu")
            table = budget_plan(data, **where, reporter=terminal, **options)
        else:
            how = dict(gpu=gpu, gpus=gpus, mfu=mfu, price=price)
            made = planner.make_plan(data, **where, **how, reporter=terminal, **options)
            table = planner.plan_table(made)
    finally:
        terminal.close()
    print(table)


def _exit_status(result: TrainResult) -> None:
    """An interrupted training ends as a shell says it: 130 after Ctrl-C, 143 after SIGTERM."""
    if result.signal is not None:
        raise SystemExit(128 + result.signal)
