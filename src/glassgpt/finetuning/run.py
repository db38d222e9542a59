"""From a model that knows something to one that does something: `glassgpt finetune BASE DATA`

    finetune("runs/book", "chats.jsonl", out="runs/partner")

Decides which weights learn and how fast, and hands over to the loop in trainer.py, the same as for
`train`. What DATA hold is found out in finetune_data.py, what it is for stands in
finetune_tasks.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
import os
import time
from collections import ChainMap
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassgpt import runtime
from glassgpt.checkpoints.load import load_pretrained
from glassgpt.checkpoints.run_directory import Checkpoint, fingerprint
from glassgpt.config import ENDLESS, FinetuneConfig, ModelConfig, TrainConfig
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.finetuning.data import Lesson, open_lesson
from glassgpt.finetuning.lora import LoRA, add_lora
from glassgpt.finetuning.tasks import ChatTask, FinetuneTask, LabelTask
from glassgpt.inference.classify import class_weights, set_score_head
from glassgpt.model import GPT, crop_positions
from glassgpt.options import names_of, resolve_options, split_options
from glassgpt.reporting.run_log import TrainResult, require_loggers
from glassgpt.system import SILENT, Reporter
from glassgpt.tokenizers.tokenizer import Tokenizer
from glassgpt.training.loop import Trainer
from glassgpt.training.run import (
    check_pace,
    check_resumable,
    empty,
    explain_memory,
    hold_and_load,
    names_in,
    own_run,
    required,
)

_GENTLE = 0.1  # times the learning rate that the base was trained with, not to forget what it knows
_UNKNOWN_BASE = {"optimizer": "adamw", "learning_rate": 5e-4}  # before it is made gentle
_PATIENCE = 3  # evaluations without a new best


@explain_os_errors("go on")
def finetune(
    base: str | Path | None = None,
    data: str | Path | Sequence[str | Path] | None = None,
    *,
    preset: str | None = None,
    config: str | Path | None = None,
    resume: str | Path | None = None,
    overwrite: bool = False,
    reporter: Reporter = SILENT,
    began: float | None = None,
    **options: Any,
) -> TrainResult:
    """Train the model `base` (anything that `glassgpt.load` takes) further, on `data`.

    Takes every option of `glassgpt finetune` by its field name; what is left open follows the base
    and the data. `resume` continues a run directory. Raises `UserError` for anything the caller
    can put right.
    """
    began = began or time.monotonic()
    if resume is not None and data is None:  # the one thing named is where the data are now
        base, data = None, base
    given = resolve_options(options, preset=preset, config=config, verb="finetune")
    with contextlib.ExitStack() as held:
        saved = None
        if resume is not None:
            _check_resumable(given, resume, overwrite, base)
            saved = hold_and_load(resume, held, "finetune")
            given = saved[2]["options"] | given | {"out": os.fspath(resume)}
        elif base is None:
            raise UserError("nothing to finetune; name a run directory or a model, then the data")
        else:
            given["init_from"] = os.fspath(base)
        given["data"] = required(names_in(data) or given.get("data"))
        check_pace(given, set(options))
        job = _job(given)
        model_base = saved[0] if saved and saved[0] else load_pretrained(given["init_from"])
        held.callback(torch.set_num_threads, torch.get_num_threads())  # the caller's
        machine = runtime.start(split_options(given)[2])
        held.callback(runtime.stop)
        if saved and saved[0] is None:
            _check_same_base(model_base, saved[2], given["init_from"], resume)
        lesson = open_lesson(given, job, model_base, machine, reporter)
        if saved is None:
            given = _complete(given, job, model_base, lesson, machine)
        elif saved[2]["data_fingerprint"] != lesson.data.fingerprint:
            raise UserError(f"{given['data'][0]}, or how it is read, has changed since {resume} "
                            "was started; resume with the same, or start anew")  # fmt: skip
        for line in lesson.report:
            reporter.say(line)
        trainer = _make_trainer(given, job, model_base, lesson, machine, reporter, saved,
                                overwrite, held, began)  # fmt: skip
        result = trainer.fit()
        machine.barrier()  # who leaves early takes the others' connections down
        return result


def _job(given: dict[str, Any]) -> FinetuneConfig:
    train = split_options(given | {"max_steps": given.get("max_steps", 1)})[2]
    require_loggers(tensorboard=train.tensorboard, wandb=train.wandb)
    return FinetuneConfig(**{name: given[name] for name in names_of(FinetuneConfig) & set(given)})


def _check_resumable(
    given: dict[str, Any], run: str | Path, overwrite: bool, base: str | Path | None
) -> None:
    fixed = sorted(names_of(FinetuneConfig) & set(given))
    if fixed:
        raise UserError(f"{', '.join(fixed)} can't change when resuming {run}; leave it out, or "
                        "start a new run")  # fmt: skip
    check_resumable(given, run, overwrite, base)


def _check_same_base(
    base: Checkpoint, state: dict[str, Any], name: str, run: str | Path | None
) -> None:
    """An adapter is a correction to certain weights, and means nothing beside others."""
    if state.get("base") not in (None, fingerprint(base)):  # older runs don't know theirs
        raise UserError(f"{name} has changed since {run} was started, and its adapter belongs to "
                        "the old weights; bring them back, or start anew")  # fmt: skip


# -- how -----------------------------------------------------------------------------------------


def _complete(
    given: dict[str, Any],
    job: FinetuneConfig,
    base: Checkpoint,
    lesson: Lesson,
    machine: runtime.Machine,
) -> dict[str, Any]:
    """`given`, with what follows from the base and the data where nobody said otherwise."""
    theirs = _pretraining(base)
    usual, wanted = TrainConfig(), {"optimizer": theirs.get("optimizer", "adamw")}
    gentle = _GENTLE if job.lora_rank is None else 1.0  # an adapter begins at nothing
    for name in ("learning_rate", "muon_learning_rate"):
        wanted[name] = gentle * theirs.get(name, getattr(usual, name))
    if job.lora_rank is not None:
        wanted["optimizer"] = "adamw"
    T = given.get("context_length", base.config.context_length)
    n_rows = lesson.data.train.count(T)
    batch_tokens = given.get("batch_tokens", min(usual.batch_tokens, n_rows * T))
    rows = max(1, round(batch_tokens / T / machine.world)) * machine.world
    steps = math.ceil(job.epochs * n_rows / rows)
    if given.get("budget"):
        steps = ENDLESS
    steps = given.get("max_steps", steps)
    pace = 1000 if steps == ENDLESS else steps
    wanted |= {"batch_tokens": batch_tokens, "max_steps": steps, "patience": _PATIENCE}
    wanted |= {"warmup_steps": min(100, pace // 10), "eval_interval": max(1, pace // 10)}
    return wanted | given


def _pretraining(base: Checkpoint) -> dict[str, Any]:
    """Optimizer and learning rates by which the base learned from nothing, as far as is known.

    A rate that was made gentle once is not made gentler with every finetuning that follows.
    """
    info = base.info
    theirs = info.get("pretraining") or info.get("train", _UNKNOWN_BASE)
    begun = "pretraining" not in info and (info.get("options") or {}).get("init_from")
    names = ("optimizer",) if begun else ("optimizer", "learning_rate", "muon_learning_rate")
    return {name: theirs[name] for name in names if name in theirs}


def _make_trainer(
    given: dict[str, Any],
    job: FinetuneConfig,
    base: Checkpoint,
    lesson: Lesson,
    machine: runtime.Machine,
    reporter: Reporter,
    saved: tuple | None,
    overwrite: bool,
    held: contextlib.ExitStack,
    began: float,
) -> Trainer:
    config = split_options(given)[2]
    wanted = {name: given[name] for name in ("context_length", "dropout") if name in given}
    tokenizer = lesson.data.tokenizer
    vocab_size = max(base.config.vocab_size, tokenizer.vocab_size)
    shape = dataclasses.replace(base.config, vocab_size=vocab_size, **wanted)
    if lesson.kind == "text":
        lesson.data.check_fits(shape.context_length)
    run = machine.on_main(lambda: own_run(given, saved is not None, overwrite, held))
    lora = LoRA.from_config(job) if job.lora_rank is not None else None
    with explain_memory(shape):
        torch.manual_seed(config.seed)
        model = _model(base, shape, tokenizer, lesson, job, lora).to(machine.device)
        task = _task(lesson, job, lora, config, base, given, machine.device)
        trainer = Trainer(run, model, config, lesson.data, machine, reporter, given, task=task,
                          began=began)  # fmt: skip
    reporter.say(_what_learns(model))
    if note := task.beside(model):
        reporter.say(note)
    if saved is not None:
        trainer.restore(*saved)
    elif machine.is_main:
        empty(run)  # an old run goes only now, when nothing keeps the new one from starting
    return trainer


def _model(
    base: Checkpoint,
    shape: ModelConfig,
    tokenizer: Tokenizer,
    lesson: Lesson,
    job: FinetuneConfig,
    lora: LoRA | None,
) -> GPT:
    """The base with what the lesson needs: rows for new tokens, a head for classes, adapters."""
    n_old, n_new = base.tokenizer.vocab_size, tokenizer.vocab_size
    weights = _with_new_tokens(crop_positions(base.weights, shape), n_old, n_new, shape)
    if base.labels and not shape.tie_embeddings:  # a classifier has no other head than its own
        weights = ChainMap({"head.weight": weights["token_embedding.weight"]}, dict(weights))
    model = GPT.from_weights(shape, weights).train()
    if lesson.kind == "labels":
        set_score_head(model, len(lesson.labels))
        if base.labels:
            with torch.no_grad():
                model.head.weight.copy_(torch.from_numpy(np.array(base.weights["score.weight"])))
    if lora is None:
        _freeze(model, job.freeze)
        return model
    if job.freeze is not None:
        raise UserError("--freeze is for training without --lora-rank, which freezes everything")
    add_lora(model, lora)
    if lesson.kind == "labels":
        model.head.requires_grad_(True)
    if n_new > n_old and lesson.kind != "labels":
        model.token_embedding.requires_grad_(True)  # else the new tokens would learn nothing
        model.head.requires_grad_(True)
    return model


def _with_new_tokens(
    weights: Mapping[str, np.ndarray], n_old: int, n_new: int, shape: ModelConfig
) -> Mapping[str, np.ndarray]:
    """Tables with a row for every token; a new one's is the mean of the others, so that it is no
    surprise to the model (Hewitt, "Initializing New Word Embeddings", 2021). Rows that fill up a
    vocabulary and belong to no token stay as they are."""
    tables = {}
    for name in ("token_embedding.weight", "head.weight"):
        if n_new > n_old and name in shape.weight_shapes and name in weights:
            old, table = weights[name], np.empty((shape.vocab_size, shape.n_embd), np.float32)
            table[: len(old)] = old
            table[n_old:n_new] = old[:n_old].mean(axis=0)
            tables[name] = table
    return ChainMap(tables, weights) if tables else weights  # type: ignore[arg-type]


def _freeze(model: GPT, what: str | None) -> None:
    """Let a part of the model stay as it is. A tied head is its embedding, and shares its lot."""
    if what is None:
        return
    blocks = list(model.blocks)
    if what == "body":
        for parameter in model.parameters():
            parameter.requires_grad_(False)
        model.head.requires_grad_(True)
        return
    if what != "embeddings" and not (what.isdecimal() and int(what) <= len(blocks)):
        raise UserError(f"freeze={what!r}: write embeddings, body, or the number of first blocks, "
                        f"at most {len(blocks)}")  # fmt: skip
    frozen = [model.token_embedding, model.position_embedding]
    frozen += blocks[: int(what)] if what.isdecimal() else []
    for module in frozen:
        if module is not None:
            module.requires_grad_(False)


def _what_learns(model: GPT) -> str:
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n = sum(p.numel() for p in model.parameters())
    return f"learning: {learning:,} of {n:,} parameters ({learning / n:.1%})"


def _task(
    lesson: Lesson,
    job: FinetuneConfig,
    lora: LoRA | None,
    config: TrainConfig,
    base: Checkpoint,
    given: dict[str, Any],
    device: torch.device,
) -> FinetuneTask:
    common: dict[str, Any] = dict(
        tokenizer=lesson.data.tokenizer, config=config, base=base, base_name=given["init_from"],
        layer_decay=job.layer_decay, lora=lora, pretraining=_pretraining(base),
    )  # fmt: skip
    if lesson.kind == "conversations":
        assert lesson.chat is not None
        return ChatTask(**common, chat=lesson.chat, questions=lesson.questions)
    if lesson.kind == "labels":
        weights = None
        if job.class_weights:
            assert lesson.counts is not None
            weights = torch.from_numpy(class_weights(lesson.counts)).float().to(device)
        return LabelTask(**common, labels=lesson.labels, val=lesson.data.val, class_weights=weights)
    return FinetuneTask(**common)
