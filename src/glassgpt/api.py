"""A trained model in Python: `m = glassgpt.load("runs/book"); print(m.generate("Once").text)`

The command line is a thin layer over this. torch is imported when the model is first needed.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Iterator, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from glassgpt.checkpoints.load import load_pretrained
from glassgpt.checkpoints.run_directory import Checkpoint, require_language_model
from glassgpt.config import DEVICES, EngineName, ModelConfig, Sampling, WeightPrecision
from glassgpt.errors import UserError, nearest
from glassgpt.inference.engines import Engine
from glassgpt.inference.engines.choose import build_engine
from glassgpt.inference.generate import Piece, complete, stream
from glassgpt.system import Reporter
from glassgpt.tokenizers.tokenizer import Tokenizer

if TYPE_CHECKING:
    from glassgpt.interpret.trace import Trace
    from glassgpt.model import GPT


Prompt = str | Sequence[int]
_ENGINE_OPTIONS = ("engine", "weights", "threads")


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
        wanted = engine, weights, threads, compile
        if self._engine is None or self._engine[0] != wanted:
            self._engine = None  # before the next one: only one copy of the weights at a time
            built = build_engine(
                self.checkpoint,
                device=self.device,
                engine=engine,
                weights=weights,
                threads=threads,
                compile=compile,
                reporter=reporter,
            )
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
                size = self.config.vocab_size
                raise UserError(f"token {token} is outside the vocabulary of {size}")
        return tokens

    def generate(self, prompt: Prompt = "", **options: Any) -> Piece:
        """Continue `prompt`: the text is in `.text`, why it ended in `.finish_reason`.

        `options` are the fields of `glassgpt.config.Sampling`, and `engine`, `weights` and
        `threads` as in `engine`.
        """
        return complete(*self._what_to_write([prompt], 1, options))[0]

    def generate_many(
        self, prompts: Sequence[Prompt], *, n: int = 1, **options: Any
    ) -> list[Piece]:
        """Continue each prompt `n` times, side by side: each as it would continue alone.

        Returns the pieces prompt by prompt; `.prompt` and `.sample` count from 0. The first sample
        of a prompt is what `generate` gives.
        """
        if isinstance(prompts, str):
            raise UserError(f"generate_many takes a list of prompts; of one: [{prompts!r}]")
        return complete(*self._what_to_write(prompts, n, options))

    def stream(self, *prompts: Prompt, n: int = 1, **options: Any) -> Iterator[Piece]:
        """The same texts as `generate_many` gives, in pieces as they are written.

        Of several texts the pieces come mixed; `.prompt` and `.sample` say which text has grown.
        """
        return stream(*self._what_to_write(prompts or [""], n, options))

    def _what_to_write(
        self, prompts: Sequence[Prompt], n: int, options: dict[str, Any]
    ) -> tuple[Engine, Tokenizer, list[list[int]], Sampling, tuple[int, ...]]:
        """The arguments of `complete` and `stream`."""
        choice = {name: options.pop(name) for name in _ENGINE_OPTIONS if name in options}
        if "num_samples" in options:
            raise UserError("num_samples: several texts come from generate_many(prompts, n=...)")
        names = Sampling.__dataclass_fields__
        for name in options:
            if name not in names:
                raise UserError(f"unknown option {name!r}.{nearest(name, names)}")
        ids = [self.encode_prompt(prompt) for prompt in prompts]
        how = Sampling(**options, num_samples=n)
        return self.engine(**choice), self.tokenizer, ids, how, self.checkpoint.ends

    def answer(self, messages: Sequence[dict[str, str]], **options: Any) -> str:
        """What the assistant says next, in a conversation of {"role": ..., "content": ...}.

        `options` as for `generate`. Raises `UserError` for a model without a chat template.
        """
        if self.checkpoint.chat_template is None:
            raise UserError(
                f"{self.name} has no chat template; finetune it on conversations: "
                f"glassgpt finetune {self.name} chats.jsonl"
            )
        from glassgpt.tokenizers.chat_template import Chat, Said

        chat = Chat(self.checkpoint.chat_template, self.tokenizer)
        ids = chat.prompt([Said(one["role"], one["content"]) for one in messages])
        return self.generate(ids, **options).text

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
            try_this = f'glassgpt sample {self.name} --prompt "..."'
            raise UserError(f"{self.name} is no classifier: it continues a text ({try_this})")
        from glassgpt.inference.classify import label_probabilities

        texts = [texts] if isinstance(texts, str) else texts
        rows = label_probabilities(self.model, self.tokenizer, texts).tolist()
        pairs = (zip(self.labels, row, strict=True) for row in rows)
        return [dict(sorted(pair, key=lambda one: -one[1])) for pair in pairs]
