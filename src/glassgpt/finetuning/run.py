"""From a base model to a finetuned one: `glassgpt finetune BASE DATA`

    finetune("runs/book", "chats.jsonl", out="runs/partner")

Decides which weights learn and how fast, and hands over to the same loop as `train`. What the data
hold is found out in finetuning/data.py; what they are learned for is in finetuning/tasks.py.
"""

from __future__ import annotations

import contextlib
import dataclasses
import math
from collections import ChainMap
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassgpt.checkpoints.load import load_pretrained
from glassgpt.checkpoints.run_directory import Checkpoint, model_fingerprint
from glassgpt.config import ENDLESS, FinetuneConfig, ModelConfig, TrainConfig
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.finetuning.data import FinetuneData, open_finetune_data
from glassgpt.finetuning.lora import LoRA, add_lora
from glassgpt.finetuning.tasks import ChatTask, FinetuneTask, LabelTask
from glassgpt.inference.classify import class_weights, set_score_head
from glassgpt.model import GPT, crop_positions
from glassgpt.options import Options, make_config
from glassgpt.reporting.run_log import TrainResult
from glassgpt.system import SILENT, Json, Reporter
from glassgpt.training.loop import Trainer
from glassgpt.training.run import GENTLE, Names, Request, TrainingSession

_UNKNOWN_BASE = {"optimizer": "adamw", "learning_rate": 5e-4}  # how others usually train theirs
_PATIENCE = 3  # evaluations without a new best, after which training stops


@explain_os_errors("go on")
def finetune(
    base: str | Path | None = None,
    data: Names = None,
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
    if resume is not None and data is None:  # the one thing named is where the data are now
        base, data = None, base
    request = Request.make(
        "finetune",
        data,
        options,
        preset=preset,
        config=config,
        base=base,
        resume=resume,
        overwrite=overwrite,
        reporter=reporter,
        began=began,
    )
    if resume is None and base is None:
        raise UserError("nothing to finetune; name a run directory or a model, then the data")
    with contextlib.ExitStack() as held:
        saved = request.resumed(held)
        given = request.options_after(saved)
        finetune_config = make_config(FinetuneConfig, given)
        model_base = saved and saved.checkpoint
        if model_base is None:
            model_base = load_pretrained(given["init_from"])
            if saved is not None:
                _check_same_base(model_base, saved.state, request)
        session = TrainingSession.start(request, given, saved, held)
        examples = open_finetune_data(session, finetune_config, model_base)
        session.check_same_data(examples.data)
        if saved is None:
            session.options = _completed(session, finetune_config, model_base, examples)
        for line in examples.report:
            reporter.say(line)
        plan = FinetunePlan.make(session, finetune_config, model_base, examples)
        return session.fit(_make_trainer(session, plan))


def _check_same_base(base: Checkpoint, state: Json, request: Request) -> None:
    """An adapter is a correction to certain weights, and means nothing beside others."""
    if state.get("base") not in (None, model_fingerprint(base)):  # older runs don't know theirs
        raise UserError(
            f"{state['options']['init_from']} has changed since {request.resume} was started, and "
            "its adapter belongs to the old weights; bring them back, or start anew"
        )


def _completed(
    session: TrainingSession, config: FinetuneConfig, base: Checkpoint, examples: FinetuneData
) -> Options:
    """The options, with what follows from the base and the data where nobody said otherwise."""
    given, world, usual = session.options, session.machine.world, TrainConfig()
    before, with_adapters = _pretraining(base), config.lora_rank is not None
    gentle = 1.0 if with_adapters else GENTLE  # an adapter starts as no change at all
    wanted: Options = {
        name: gentle * before.get(name, getattr(usual, name))
        for name in ("learning_rate", "muon_learning_rate")
    }
    wanted["optimizer"] = "adamw" if with_adapters else before.get("optimizer", "adamw")
    T = given.get("context_length", base.config.context_length)
    n_rows = examples.data.train.count(T)
    batch_tokens = given.get("batch_tokens", min(usual.batch_tokens, n_rows * T))
    rows = max(1, round(batch_tokens / T / world)) * world
    steps = ENDLESS if given.get("budget") else math.ceil(config.epochs * n_rows / rows)
    steps = given.get("max_steps", steps)
    pace = 1000 if steps == ENDLESS else steps
    wanted |= {"batch_tokens": batch_tokens, "max_steps": steps, "patience": _PATIENCE}
    wanted |= {"warmup_steps": min(100, pace // 10), "eval_interval": max(1, pace // 10)}
    return wanted | given


def _pretraining(base: Checkpoint) -> Json:
    """Optimizer and learning rates by which the base learned from nothing, as far as is known.

    A rate that was made gentle once is not made gentler with every finetuning that follows.
    """
    info = base.info
    theirs = info.get("pretraining") or info.get("train", _UNKNOWN_BASE)
    begun = "pretraining" not in info and (info.get("options") or {}).get("init_from")
    names = ("optimizer",) if begun else ("optimizer", "learning_rate", "muon_learning_rate")
    return {name: theirs[name] for name in names if name in theirs}


def _make_trainer(session: TrainingSession, plan: FinetunePlan) -> Trainer:
    """The planned model, ready to be trained in a run directory of its own."""
    if plan.examples.kind == "text":
        plan.examples.data.check_fits(plan.shape.context_length)
    run, device = session.claim(), session.machine.device
    with session.seeded(plan.shape):
        model = plan.model().to(device)
        task = plan.task(device)
        trainer = session.trainer(run, model, plan.examples.data, task=task)
    learning = sum(p.numel() for p in model.parameters() if p.requires_grad)
    n = sum(p.numel() for p in model.parameters())
    session.reporter.say(f"learning: {learning:,} of {n:,} parameters ({learning / n:.1%})")
    if note := task.beside(model):
        session.reporter.say(note)
    return trainer


@dataclass(frozen=True)
class FinetunePlan:
    """How a base becomes another model: all that decides which weights there are and learn."""

    base: Checkpoint
    base_name: str
    config: FinetuneConfig
    train: TrainConfig
    examples: FinetuneData
    shape: ModelConfig  # the base's, with rows for new tokens and the context and dropout wanted
    lora: LoRA | None

    @classmethod
    def make(
        cls,
        session: TrainingSession,
        config: FinetuneConfig,
        base: Checkpoint,
        examples: FinetuneData,
    ) -> FinetunePlan:
        given = session.options
        wanted = {name: given[name] for name in ("context_length", "dropout") if name in given}
        vocab_size = max(base.config.vocab_size, examples.data.tokenizer.vocab_size)
        shape = dataclasses.replace(base.config, vocab_size=vocab_size, **wanted)
        lora = LoRA.from_config(config) if config.lora_rank is not None else None
        return cls(base, given["init_from"], config, session.config, examples, shape, lora)

    def model(self) -> GPT:
        """The base with what the task needs: rows for new tokens, a head for classes, adapters."""
        base, shape, labels = self.base, self.shape, self.examples.labels
        weights = self._with_new_tokens(crop_positions(base.weights, shape))
        if base.labels and not shape.tie_embeddings:  # a classifier has no head for tokens
            weights = ChainMap({"head.weight": weights["token_embedding.weight"]}, dict(weights))
        model = GPT.from_weights(shape, weights).train()
        if labels:
            set_score_head(model, len(labels))
            if base.labels:
                score = torch.from_numpy(np.array(base.weights["score.weight"]))
                with torch.no_grad():
                    model.head.weight.copy_(score)
        if self.lora is None:
            if self.config.freeze is not None:
                _freeze(model, self.config.freeze)
            return model
        if self.config.freeze is not None:
            raise UserError(
                "--freeze is for training without --lora-rank, which freezes everything"
            )
        add_lora(model, self.lora)
        if labels:
            model.head.requires_grad_(True)
        elif self._n_new_tokens:  # else the new tokens would learn nothing
            model.token_embedding.requires_grad_(True)
            model.head.requires_grad_(True)
        return model

    @property
    def _n_new_tokens(self) -> int:
        return self.examples.data.tokenizer.vocab_size - self.base.tokenizer.vocab_size

    def _with_new_tokens(self, weights: Mapping[str, np.ndarray]) -> Mapping[str, np.ndarray]:
        """Tables with a row for every token. A new token's is the mean of the others, so that it
        does not disturb the model (Hewitt, "Initializing New Word Embeddings", 2021). Rows that
        only fill up a vocabulary, and belong to no token, stay as they are."""
        if self._n_new_tokens <= 0:
            return weights
        shape, n_old, tables = self.shape, self.base.tokenizer.vocab_size, {}
        for name in {"token_embedding.weight", "head.weight"} & set(shape.weight_shapes):
            if name in weights:
                old, table = weights[name], np.empty((shape.vocab_size, shape.n_embd), np.float32)
                table[: len(old)] = old
                table[n_old : n_old + self._n_new_tokens] = old[:n_old].mean(axis=0)
                tables[name] = table
        return ChainMap(tables, weights)  # type: ignore[arg-type]  # read when asked for

    def task(self, device: torch.device) -> FinetuneTask:
        """What the training is for."""
        examples = self.examples
        common: dict[str, Any] = dict(
            tokenizer=examples.data.tokenizer,
            config=self.train,
            base=self.base,
            base_name=self.base_name,
            layer_decay=self.config.layer_decay,
            lora=self.lora,
            pretraining=_pretraining(self.base),
        )
        if examples.chat is not None:
            return ChatTask(**common, chat=examples.chat, questions=examples.questions)
        if examples.labels:
            weights = None
            if self.config.class_weights:
                assert examples.counts is not None
                weights = torch.from_numpy(class_weights(examples.counts)).float().to(device)
            val = examples.data.val
            return LabelTask(**common, labels=examples.labels, val=val, class_weights=weights)
        return FinetuneTask(**common)


def _freeze(model: GPT, what: str) -> None:
    """Let a part of the model stay as it is. A tied head is the embedding, and freezes with it."""
    blocks = list(model.blocks)
    if what == "body":
        model.requires_grad_(False)
        model.head.requires_grad_(True)
        return
    if what != "embeddings" and not (what.isdecimal() and int(what) <= len(blocks)):
        raise UserError(
            f"freeze={what!r}: write embeddings, body, or the number of first blocks, "
            f"at most {len(blocks)}"
        )
    frozen = [model.token_embedding, model.position_embedding]
    frozen += blocks[: int(what)] if what.isdecimal() else []
    for module in frozen:
        if module is not None:
            module.requires_grad_(False)
