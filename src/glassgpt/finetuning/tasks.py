"""What finetuning is for: other text, conversations or labels; of whole models or of adapters.

    task = LabelTask(labels=("good", "bad"), val=data.val, ...); print(task.show(model))

A task says what is shown on the way and what is kept: always a checkpoint that other programs load
as it is. It does not know how a step is taken.
"""

from __future__ import annotations

import dataclasses
from collections import ChainMap
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassgpt.checkpoints import run_directory as ckpt
from glassgpt.checkpoints.tensors import Lazy
from glassgpt.config import Sampling, TrainConfig
from glassgpt.data.batches import IGNORE, Split
from glassgpt.data.examples import Conversation, Turn
from glassgpt.finetuning.lora import LoRA, adapter_tensors, merged_weights
from glassgpt.inference.classify import class_logits, metrics, metrics_table
from glassgpt.inference.generate import complete
from glassgpt.model import GPT
from glassgpt.reporting.plots import confusion, guessing_loss
from glassgpt.system import Json
from glassgpt.tokenizers.chat_template import Chat
from glassgpt.tokenizers.tokenizer import Tokenizer, to_files
from glassgpt.training.task import TextTask


class FinetuneTask(TextTask):
    """Predict the next token of a text that is new to the base; with LoRA, by adapters alone."""

    verb = "finetune"

    def __init__(
        self,
        tokenizer: Tokenizer,
        config: TrainConfig,
        *,
        base: ckpt.Checkpoint,
        base_name: str,
        layer_decay: float = 1.0,
        lora: LoRA | None = None,
        pretraining: Json | None = None,
    ) -> None:
        """`pretraining`: optimizer and rates of the base's first training; they are saved, so that
        the result can be finetuned in turn."""
        super().__init__(tokenizer, config)
        self.pretraining = pretraining or {}
        self.base_fingerprint = None if lora is None else ckpt.model_fingerprint(base)
        self.base_name, self.lora, self.layer_decay = base_name, lora, layer_decay
        self.chat_template, self.ends = base.chat_template, base.ends
        self.n_new = tokenizer.vocab_size - base.tokenizer.vocab_size
        self.dropout = 0.0 if lora is None else lora.dropout

    def checkpoint(self, model: GPT, info: Json) -> ckpt.Checkpoint:
        """The model with its adapters added to the weights, so that any program can load it."""
        info = info | {"pretraining": self.pretraining}
        return ckpt.Checkpoint(
            model.config, merged_weights(model), self.tokenizer, info, self.chat_template, self.ends
        )

    def state(self) -> Json:
        return super().state() | {"base": self.base_fingerprint}

    def beside(self, model: GPT) -> str | None:
        """A note for people: on the adapter, or on tokens that can't be learned."""
        if self.lora is not None and not _is_adapter_alone(model):
            return (
                "note: the head learns as well (new tokens or classes), which is more than an "
                "adapter: only the merged model is kept"
            )
        frozen = not model.token_embedding.weight.requires_grad
        if self.lora is None and frozen and self.n_new:
            return (
                f"note: the embeddings are frozen, so the template's {self.n_new} new tokens "
                "stay what they are: the mean of the others"
            )
        return None

    def to_resume(
        self, model: GPT, info: Json
    ) -> tuple[ckpt.Checkpoint | None, dict[str, np.ndarray]]:
        if self.lora is None:
            return super().to_resume(model, info)
        return None, {
            f"learning.{name}": np.asarray(p.detach().cpu())
            for name, p in model.named_parameters()
            if p.requires_grad
        }

    def restore(
        self, model: GPT, saved: ckpt.Checkpoint | None, tensors: Mapping[str, np.ndarray]
    ) -> None:
        if saved is not None:
            super().restore(model, saved, tensors)
            return
        with torch.no_grad():
            for name, p in model.named_parameters():
                if p.requires_grad:
                    p.copy_(torch.from_numpy(np.array(tensors[f"learning.{name}"])))

    def save(self, folder: Path, model: GPT, info: Json) -> None:
        super().save(folder, model, info)
        if self.lora is not None and _is_adapter_alone(model):
            tensors = adapter_tensors(model)
            files, template = {}, self.chat_template
            if template is not None:
                files = to_files(
                    self.tokenizer, model.config.context_length, chat_template=template
                )
            ckpt.save_adapter(
                folder / "adapter",
                model.config,
                tensors,
                alpha=self.lora.alpha,
                dropout=self.lora.dropout,
                base=self.base_name,
                tokenizer_files=files,
            )


def _is_adapter_alone(model: GPT) -> bool:
    """Whether embeddings and head are frozen: an adapter for the base is all that is learned."""
    parts = (model.token_embedding, model.head)
    return not any(p.requires_grad for part in parts for p in part.parameters())


class ChatTask(FinetuneTask):
    """Learn the assistant's words in conversations; shows what the model answers."""

    try_next = "chat {run}"

    def __init__(self, *, chat: Chat, questions: Sequence[Conversation], **common: Any) -> None:
        super().__init__(**common)
        self.chat, self.questions = chat, questions
        self.chat_template, self.ends = chat.template, chat.ends

    def show(self, model: GPT) -> str:
        """The likeliest answers to always the same questions, with the answers in the data."""
        if not self.config.sample_tokens:
            return ""
        asked = [_question(each.turns) for each in self.questions]
        prompts = [self.chat.prompt(turns) for turns, _ in asked]
        how = Sampling(max_new_tokens=self.config.sample_tokens, temperature=0.0)
        answers = complete(self.engine(model), self.tokenizer, prompts, how, ends=self.ends)
        parts = []
        for (turns, wanted), answer in zip(asked, answers, strict=True):
            lines = [f"{turn.role}: {turn.content}" for turn in turns]
            parts.append("\n".join([*lines, f"assistant: {answer.text}", f"(wanted: {wanted})"]))
        return "\n\n".join(parts)


def _question(turns: Sequence[Turn]) -> tuple[Sequence[Turn], str]:
    """What comes before the first answer of a conversation, and that answer."""
    at = next(i for i, turn in enumerate(turns) if turn.role == "assistant" and turn.content)
    return turns[:at], turns[at].content


class LabelTask(FinetuneTask):
    """Learn the label of a text; shows how many labels are right."""

    try_next = 'sample {run} --text "What is this?"'
    per = "text"

    def __init__(
        self,
        *,
        labels: tuple[str, ...],
        val: Split,
        class_weights: torch.Tensor | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.labels, self.val = labels, val
        self.class_weights = class_weights
        self._judged: tuple[np.ndarray, np.ndarray] | None = None  # true and predicted classes

    def guessing(self, model: GPT) -> tuple[float, str]:
        return guessing_loss(len(self.labels), " classes")

    def note(self) -> str | None:
        return None

    def show(self, model: GPT) -> str:
        """Accuracy and macro F1 on the validation texts, and the figures of each class."""
        truth, predicted = self._judged or self._judge(model)
        self._judged = None
        return metrics_table(metrics(truth, predicted, len(self.labels)), self.labels)

    def checkpoint(self, model: GPT, info: Json) -> ckpt.Checkpoint:
        saved = super().checkpoint(model, info)
        body = [name for name in model.config.weight_shapes if name != "head.weight"]
        head = model.head.weight.detach().cpu().numpy()
        weights = Lazy(
            {name: partial(saved.weights.__getitem__, name) for name in body}
            | {"score.weight": lambda: head}
        )
        return dataclasses.replace(
            saved, weights=weights, labels=self.labels, chat_template=None, ends=()
        )

    def restore(
        self, model: GPT, saved: ckpt.Checkpoint | None, tensors: Mapping[str, np.ndarray]
    ) -> None:
        if saved is not None:
            head = {"head.weight": saved.weights["score.weight"]}
            saved = dataclasses.replace(saved, weights=ChainMap(head, saved.weights))  # type: ignore
        super().restore(model, saved, tensors)

    def save(self, folder: Path, model: GPT, info: Json) -> None:
        super().save(folder, model, info)
        self._judged = self._judge(model)
        matrix = metrics(*self._judged, len(self.labels)).confusion
        confusion(folder / "confusion.png", matrix, self.labels)

    def _judge(self, model: GPT) -> tuple[np.ndarray, np.ndarray]:
        """The true and the predicted classes of the validation texts."""
        truth, predicted = [], []
        for tokens, targets, positions in self.val.windows(n=32, T=model.config.context_length):
            last = targets != IGNORE  # (B, T): the last token of a text has its class
            truth.append(targets[last])
            logits = class_logits(model, tokens, last, positions)
            predicted.append(logits.argmax(dim=-1).numpy())
        return np.concatenate(truth), np.concatenate(predicted)
