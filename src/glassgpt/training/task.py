"""What a training is for: what it shows on its way, and what is kept of it.

    task = TextTask(tokenizer, config); print(task.show(model))

The loop knows of what it trains only "rows in, loss out"; the rest it asks a task. Those of
finetuning are in finetuning/tasks.py.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import torch

from glassgpt.checkpoints import run_directory as ckpt
from glassgpt.config import Sampling, TrainConfig
from glassgpt.inference.engines import Engine
from glassgpt.inference.generate import complete
from glassgpt.model import GPT, load_weights
from glassgpt.reporting.plots import guessing_loss
from glassgpt.system import Json
from glassgpt.tokenizers.tokenizer import Tokenizer, unknown_note

_SMALL = 20_000_000  # parameters: so few are quickly copied for sampling


class TextTask:
    """The next token of a text: it shows what the model writes, and keeps the model."""

    verb = "train"
    try_next = 'sample {run} --prompt "Once upon a time"'  # verb and options to try with the run
    layer_decay = 1.0
    dropout = 0.0  # beside that of the model
    class_weights: torch.Tensor | None = None  # of the loss, where labels are learned
    per = "token"  # what the loss is the mean of

    def __init__(self, tokenizer: Tokenizer, config: TrainConfig) -> None:
        self.tokenizer, self.config = tokenizer, config

    def guessing(self, model: GPT) -> tuple[float, str]:
        """The loss of guessing with equal chances, and its label in the loss curve."""
        return guessing_loss(len(model.head.weight))

    def state(self) -> Json:
        """What state.json says of the task."""
        return {"verb": self.verb}

    def note(self) -> str | None:
        """A note for people before the training begins."""
        note = unknown_note(self.tokenizer, self.config.sample_prompt or "")
        return f"note: --sample-prompt: {note}" if note else None

    def show(self, model: GPT) -> str:
        """A sample of what the model writes now; "" when none is wanted."""
        if not self.config.sample_tokens:
            return ""
        prompt = self.config.sample_prompt or ""
        ids = self.tokenizer.encode(prompt, special=True)
        how = Sampling(max_new_tokens=self.config.sample_tokens, temperature=0.8, top_k=200)
        [piece] = complete(self.engine(model), self.tokenizer, [ids], how)
        return prompt + piece.text

    def engine(self, model: GPT) -> Engine:
        """What writes the samples; on a CPU, torch is slow with small models."""
        from glassgpt.inference.engines.cpu import NumpyEngine
        from glassgpt.inference.engines.reference import ReferenceEngine

        on_cpu = next(model.parameters()).device.type == "cpu"
        if on_cpu and model.config.n_parameters < _SMALL:
            return NumpyEngine(model.config, self.checkpoint(model, {}).weights)
        return ReferenceEngine(model)

    def checkpoint(self, model: GPT, info: Json) -> ckpt.Checkpoint:
        """The model as it is saved; `info` goes into glassgpt.json."""
        weights = {
            name: tensor.detach().cpu().numpy()
            for name, tensor in model.state_dict().items()
            if name in model.config.weight_shapes
        }
        return ckpt.Checkpoint(model.config, weights, self.tokenizer, info)

    def to_resume(
        self, model: GPT, info: Json
    ) -> tuple[ckpt.Checkpoint | None, dict[str, np.ndarray]]:
        """What `restore` needs: a checkpoint, and tensors that are not in it."""
        return self.checkpoint(model, info), {}

    def restore(
        self, model: GPT, saved: ckpt.Checkpoint | None, tensors: Mapping[str, np.ndarray]
    ) -> None:
        assert saved is not None
        load_weights(model, saved.weights)

    def save(self, folder: Path, model: GPT, info: Json) -> None:
        """Make `folder` a run directory with this model."""
        ckpt.save_model(folder, self.checkpoint(model, info))
