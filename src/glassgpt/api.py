"""A trained model in Python: `m = glassgpt.load("runs/book"); print(m.generate("Once").text)`

The command line is a thin layer over this. torch is imported when the model is first needed.
"""

from __future__ import annotations

import logging
import operator
import sys
from collections import defaultdict
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glassgpt.checkpoints.load import load_pretrained
from glassgpt.checkpoints.run_directory import Checkpoint, require_language_model
from glassgpt.config import DEVICES, EngineName, ModelConfig, Sampling, WeightPrecision
from glassgpt.errors import UserError, nearest
from glassgpt.inference.engines import Engine
from glassgpt.inference.engines.choose import build_engine, check_choice
from glassgpt.inference.generate import Piece, complete, stream
from glassgpt.reporting.terminal import aligned
from glassgpt.system import Reporter
from glassgpt.tokenizers.tokenizer import Tokenizer, unknown_note

if TYPE_CHECKING:
    from glassgpt.interpret.trace import Trace
    from glassgpt.model import GPT


Prompt = str | Sequence[int]


class _Logged(Reporter):
    """Notes become warnings of the logger "glassgpt", which Python prints unless told otherwise."""

    def say(self, text: str = "") -> None:
        logging.getLogger("glassgpt").warning(text)


_LOGGED = _Logged()


class LoadedModel:
    """Weights, tokenizer and config of a run directory."""

    def __init__(
        self, checkpoint: Checkpoint, device: str = "auto", name: str | Path = "this model"
    ) -> None:
        if device not in DEVICES:
            raise UserError(f"device={device!r}: choose from {', '.join(DEVICES)}")
        self.checkpoint, self.device, self.name = checkpoint, device, name
        self.config: ModelConfig = checkpoint.config
        self.tokenizer: Tokenizer = checkpoint.tokenizer
        self._engine: tuple[tuple, Engine] | None = None

    @classmethod
    def from_folder(cls, path: str | Path, device: str = "auto") -> LoadedModel:
        return cls(load_pretrained(path), device, path)

    @property
    def labels(self) -> tuple[str, ...]:
        """The classes of a classifier; () of a model that writes text."""
        return self.checkpoint.labels

    @cached_property
    def model(self) -> GPT:
        """The torch module, in evaluation mode: `m.model(tokens)` gives logits (B, T, V), of a
        classifier (B, T, n_classes)."""
        from glassgpt.inference.engines.choose import torch_model

        return torch_model(self.checkpoint, self.device)

    def engine(
        self,
        engine: EngineName = "auto",
        weights: WeightPrecision = "float32",
        threads: int | None = None,
        *,
        compile: bool | None = False,
        reporter: Reporter = _LOGGED,
    ) -> Engine:
        """What computes when text is generated, with rows of its own; the last one's weights are
        kept. On a GPU, `compile` makes steps faster after half a minute of preparation."""
        require_language_model(self.checkpoint, self.name)
        threads = check_choice(self.device, engine, weights, threads)
        wanted = engine, weights, threads, compile
        if self._engine is None or self._engine[0] != wanted:
            self._engine = None  # before the next one: only one copy of the weights at a time
            built = build_engine(self.checkpoint, device=self.device, engine=engine,
                                 weights=weights, threads=threads, compile=compile,
                                 reporter=reporter)  # fmt: skip
            self._engine = wanted, built
        return self._engine[1].another()

    def encode_prompt(self, prompt: str | Sequence[int]) -> list[int]:
        """Text or ids -> ids; raises `UserError` for ids outside the vocabulary."""
        if isinstance(prompt, str):
            return self.tokenizer.encode(prompt, special=True)
        try:
            tokens = [operator.index(token) for token in prompt]
        except TypeError:
            raise UserError(f"prompt={prompt!r} must be text or a list of token ids") from None
        for token in tokens:
            if not 0 <= token < self.config.vocab_size:
                raise UserError(f"token {token} is outside the vocabulary of "
                                f"{self.config.vocab_size}")  # fmt: skip
        return tokens

    def generate(
        self,
        prompt: Prompt | Sequence[Prompt] = "",
        *,
        stream: bool = False,
        engine: EngineName = "auto",
        weights: WeightPrecision = "float32",
        threads: int | None = None,
        **options: Any,
    ) -> Piece | list[Piece] | list[list[Piece]] | Iterator[Piece]:
        """Continue `prompt`; options are the fields of `glassgpt.inference.generate.Sampling`.

        engine: "numba", "numpy", "torch", "gpu", or what is fastest here; weights: "float32",
        "int8", "int4", on a GPU "bfloat16".
        Returns a `Piece` (`.text`, `.finish_reason`), or a list of them for num_samples > 1. Of
        a list of prompts, each continues as it would alone: returns a list of what each gives.
        With `stream=True`, an iterator of pieces as they come (`.prompt`, `.sample`: of which).
        """
        names = Sampling.__dataclass_fields__
        for name in options:
            if name not in names:
                raise UserError(f"unknown option {name!r}.{nearest(name, names)}")
        how = Sampling(**options)
        several = _is_several(prompt)
        prompts = [self.encode_prompt(one) for one in (prompt if several else [prompt])]  # type: ignore
        chosen = self.engine(engine, weights, threads)
        if stream:
            return _stream(chosen, self.tokenizer, prompts, how, self.checkpoint.ends)
        pieces = complete(chosen, self.tokenizer, prompts, how, self.checkpoint.ends)
        n = how.num_samples
        starts = range(0, len(pieces), n)
        completed = [pieces[i : i + n] for i in starts] if n > 1 else pieces
        return completed if several else completed[0]

    def answer(self, messages: Sequence[dict[str, str]], **options: Any) -> str:
        """What the assistant says next, in a conversation of {"role": ..., "content": ...}.

        `options` as for `generate`. Raises `UserError` for a model without a chat template.
        """
        if self.checkpoint.chat_template is None:
            raise UserError(f"{self.name} has no chat template; finetune it on conversations: "
                            f"glassgpt finetune {self.name} chats.jsonl")  # fmt: skip
        from glassgpt.tokenizers.chat_template import Chat, Said

        chat = Chat(self.checkpoint.chat_template, self.tokenizer)
        ids = chat.prompt([Said(one["role"], one["content"]) for one in messages])
        piece = self.generate(ids, **options)
        assert isinstance(piece, Piece)
        return piece.text

    def trace(self, prompt: Prompt, *, off: Sequence[str] = ()) -> Trace:
        """What the model computes while it reads a text: every activation by name, as arrays.

        m.trace("To be")["blocks.0.pattern"] is (1, H, T, T). `off`: parts to switch off, "3.h2".
        Raises `UserError` for an empty text, and for one that is longer than the context.
        """
        import torch

        from glassgpt.interpret.lens import without
        from glassgpt.interpret.trace import record

        ids = torch.tensor([self.encode_prompt(prompt)], device=self.model.head.weight.device)
        return record(self.model, ids, edits=without(off, self.config), loss=True)

    def classify(self, texts: str | Sequence[str]) -> list[dict[str, float]]:
        """For each text (or the one) the probability of every label, most likely first.

        What does not fit in the context is not read. Raises `UserError` for a model that is no
        classifier, and for an empty text.
        """
        if not self.labels:
            raise UserError(f"{self.name} is no classifier: it continues a text "
                            f'(glassgpt sample {self.name} --prompt "...")')  # fmt: skip
        from glassgpt.inference.classify import probabilities

        texts = [texts] if isinstance(texts, str) else texts
        rows = probabilities(self.model, self.tokenizer, texts).tolist()
        pairs = (zip(self.labels, row, strict=True) for row in rows)
        return [dict(sorted(pair, key=lambda one: -one[1])) for pair in pairs]


_stream = stream  # `generate` has an argument of the same name


def _is_several(prompt: object) -> bool:
    """Whether this is a list of prompts; a list of ids, also an empty one, is a single one."""
    if isinstance(prompt, str) or not isinstance(prompt, Sequence):
        return False
    return any(isinstance(one, (Sequence, np.ndarray)) for one in prompt)


def print_labels(model: LoadedModel, text: str) -> None:
    """What `glassgpt sample --text` shows: labels on stdout, notes on stderr."""
    from glassgpt.inference.classify import encode_text

    found = model.classify(text)[0]
    note = unknown_note(model.tokenizer, text)
    if note:
        print(f"note: {note}", file=sys.stderr)
    if len(encode_text(model.tokenizer, text)) > model.config.context_length:
        print(f"note: only the first {model.config.context_length} tokens of the text are read",
              file=sys.stderr)  # fmt: skip
    print(aligned([(label, f"{probability:.4f}") for label, probability in found.items()]))


def print_samples(
    model: LoadedModel, engine: Engine, prompt: str, how: Sampling, *, show_prompt: bool
) -> None:
    """What `glassgpt sample` shows: text on stdout as it comes, notes on stderr."""
    note = unknown_note(model.tokenizer, prompt)
    if note:
        print(f"note: {note}", file=sys.stderr)
    prompts = [model.encode_prompt(prompt)]
    opening = prompt if show_prompt else ""
    if how.num_samples == 1:
        print(opening, end="", flush=True)
        reason = None
        for piece in stream(engine, model.tokenizer, prompts, how, model.checkpoint.ends):
            print(piece.text, end="", flush=True)
            reason = piece.finish_reason or reason
        print(flush=True)
        print(f"[{reason}]", file=sys.stderr)
        return
    texts, reasons, shown = defaultdict(str), {}, 0
    for piece in stream(engine, model.tokenizer, prompts, how, model.checkpoint.ends):
        texts[piece.sample] += piece.text
        if piece.finish_reason:
            reasons[piece.sample] = piece.finish_reason
        while shown in reasons:  # in order, each as soon as it can be
            print(f"--- sample {shown + 1} [{reasons[shown]}]")
            print(opening + texts.pop(shown), flush=True)
            shown += 1
