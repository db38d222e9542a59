"""Answers to everything that a page asks about a model, or about two that are compared.

    explorer = Explorer("runs/book"); explorer.trace(TraceRequest(text="Once")).trace

Requests and numbers go in; dataclasses and arrays come out, which `server.py` sends. Only one
thread at a time may ask: while a model is traced, it is in a state that no other may see. This
module knows no HTTP and no page.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
import shlex
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glassgpt.api import LoadedModel
from glassgpt.checkpoints.run_directory import require_language_model, run_name, snapshots
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError, nearest
from glassgpt.inference.generate import first_tokens
from glassgpt.interpret.activations import LEGEND, PATCHABLE
from glassgpt.interpret.lens import combine, find_part, patch_map, patched, without
from glassgpt.interpret.operations import Edit, Operation, source
from glassgpt.interpret.trace import record, record_shapes
from glassgpt.model import GPT
from glassgpt.studio import sampling
from glassgpt.studio.held_trace import MissingError, as_batch
from glassgpt.studio.requests import PatchMapRequest, SampleRequest, TraceRequest, Which
from glassgpt.studio.shown_trace import CompareAnswer, ShownTrace
from glassgpt.studio.token_display import NextTokens, TokenOfText, merges, next_tokens, show_token
from glassgpt.studio.training import TrainingAnswer, training_curve
from glassgpt.tokenizers.tokenizer import unknown_note

_MOST_BYTES = 1 << 30  # of all held traces; the newest one is held even if it is larger
_MOST_MODELS = 3  # snapshots in memory, beside the one or two models that were named
_MOST_READERS = 4  # each has a key/value cache
_MOST_FLOPS = 5e12  # of a map of patches: about a minute on two cores


class NotHeldError(UserError):
    """A trace that was dropped to make room for newer ones; the page can ask for it again."""


@dataclass(frozen=True)
class NamedModel:
    key: str
    name: str
    run: str  # as it is written on a command line
    parameters: int


@dataclass(frozen=True)
class ShownOperation:
    name: str
    layer: int | None
    activation: str | None
    lines: Sequence[int]
    symbols: Sequence[str]
    inputs: Sequence[Sequence[str]]
    parameters: int
    flops_per_token: float


@dataclass(frozen=True)
class ModelAnswer:
    """What a model is, and every operation of a pass with its lines in model.py."""

    name: str
    models: list[NamedModel]
    family: str
    config: ModelConfig
    parameters: int
    vocab_size: int
    context_length: int
    tokenizer: dict[str, str | int | None]
    labels: Sequence[str]
    operations: list[ShownOperation]
    source: dict[str, str]
    legend: dict[str, str]
    cache_bytes_per_token: int
    snapshots: list[int]
    training: bool


@dataclass(frozen=True)
class HeldActivation:
    name: str
    shape: list[int]
    symbols: Sequence[str]  # what each number of the shape stands for


@dataclass(frozen=True)
class TraceAnswer:
    trace: str  # the key by which later questions name it
    tokens: list[TokenOfText]
    note: str | None  # about characters that the tokenizer does not know
    activations: list[HeldActivation]
    maps: dict[str, int]
    next: NextTokens
    seconds: float


@dataclass(frozen=True)
class TokenAnswer(TokenOfText):
    merges: list[list[str]]


class Explorer:
    """The models, and the traces and caches of the latest questions about them."""

    def __init__(self, run: str, other: str | None = None, device: str = "auto") -> None:
        self.runs = {"a": run} | ({} if other is None else {"b": other})
        self.device = device
        self._folders = [Path(run) for run in self.runs.values() if Path(run).exists()]
        # In all three, what was used last comes last, and the first is the first to be dropped.
        self._models: dict[tuple[str, int | None], LoadedModel] = {}
        self._traces: dict[str, ShownTrace] = {}
        self._readers: dict[tuple, sampling.PrefixReader] = {}
        for key in self.runs:
            self.loaded(Which(key)).model  # noqa: B018  (now, as the files may be deleted later)

    # -- models ----------------------------------------------------------------------------------

    def loaded(self, which: Which) -> LoadedModel:
        """The model that is asked for; a snapshot is read when it is first wanted."""
        if which.model not in self.runs:
            known = ", ".join(self.runs)
            raise MissingError(f"there is no model {which.model!r}; there are {known}")
        key = which.model, which.snapshot
        if key in self._models:
            self._models[key] = self._models.pop(key)
            return self._models[key]
        path: str | Path = self.runs[which.model]
        if which.snapshot is not None:
            self.check_files()
            kept = snapshots(path)
            if which.snapshot not in kept:
                there = ", ".join(map(str, kept)) or "none"
                raise MissingError(f"{path} has no snapshot {which.snapshot}; it has {there}")
            path = kept[which.snapshot]
        loaded = LoadedModel.from_folder(path, self.device)
        require_language_model(loaded.checkpoint, path)
        self._models[key] = loaded
        of_snapshots = [key for key in self._models if key[1] is not None]
        for old in of_snapshots[:-_MOST_MODELS]:
            self._forget(self._models.pop(old).model)
        return loaded

    def _forget(self, model: GPT) -> None:
        """Drop what would keep the model's weights in memory."""
        traces, readers = self._traces.items(), self._readers.items()
        self._traces = {key: one for key, one in traces if one.model is not model}
        self._readers = {key: one for key, one in readers if one.model is not model}

    def check_files(self) -> None:
        """Raises `UserError` when a run directory has gone since it was loaded."""
        for folder in self._folders:
            if not folder.exists():
                raise UserError(
                    f"{folder} is gone: it was deleted or moved while this page was open; put it "
                    "back, or explore another run"
                )

    def model(self) -> ModelAnswer:
        loaded = self.loaded(Which())
        config, tokenizer = loaded.config, loaded.tokenizer
        operations = record_shapes(config, 2).operations  # two tokens, so that there is a loss
        run = Path(self.runs["a"])
        return ModelAnswer(
            name=run_name(self.runs["a"]),
            models=[self._named(key) for key in self.runs],
            family=config.family,
            config=config,
            parameters=config.n_parameters,
            vocab_size=config.vocab_size,
            context_length=config.context_length,
            tokenizer={"kind": tokenizer.kind, "end_of_text": tokenizer.end_of_text},
            labels=loaded.labels,
            operations=[_shown(op) for op in operations if op.layer in (None, 0)],
            source={"file": "model.py", "text": source()},
            legend=LEGEND,
            cache_bytes_per_token=sampling.cache_bytes_per_token(loaded),
            snapshots=list(snapshots(run)),
            training=(run / "metrics.jsonl").exists(),
        )

    def _named(self, key: str) -> NamedModel:
        run = self.runs[key]
        n_parameters = self.loaded(Which(key)).config.n_parameters
        return NamedModel(key, run_name(run), shlex.quote(str(Path(run))), n_parameters)

    def training(self) -> TrainingAnswer:
        self.check_files()
        guessing = math.log(self.loaded(Which()).config.vocab_size)
        return training_curve(Path(self.runs["a"]), guessing)

    def token(self, token: int, model: str = "a") -> TokenAnswer:
        """A token, and how BPE builds it."""
        loaded = self.loaded(Which(model))
        size, tokenizer = loaded.config.vocab_size, loaded.tokenizer
        if not 0 <= token < size:
            raise MissingError(f"token {token} is outside the vocabulary of {size}")
        shown = show_token(tokenizer, token)
        return TokenAnswer(**vars(shown), merges=merges(tokenizer, token))

    # -- traces ----------------------------------------------------------------------------------

    def trace(self, asked: TraceRequest) -> TraceAnswer:
        """Trace the model while it reads a text, unless a trace of this is still held."""
        began = time.monotonic()
        self.check_files()
        loaded = self.loaded(asked)
        config, tokenizer = loaded.config, loaded.tokenizer
        tokens = self.tokens(loaded, asked.text, asked.tokens)
        wanted = dataclasses.replace(asked, text="", tokens=tokens)
        text = json.dumps(dataclasses.asdict(wanted), sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if key not in self._traces:
            self._traces[key] = ShownTrace(loaded, tokens, self.edits(loaded, asked, tokens))
            self._make_room()
        held = self.held(key)
        return TraceAnswer(
            key,
            tokens=[show_token(tokenizer, token) for token in tokens],
            note=unknown_note(tokenizer, asked.text) if asked.tokens is None else None,
            activations=[
                HeldActivation(name, held.shape(name), symbols)
                for name, symbols in held.symbols.items()
            ],
            maps={"side": held.maps.shape[-1], "layers": config.n_layer, "heads": config.n_head},
            next=next_tokens(tokenizer, held.next_logits),
            seconds=time.monotonic() - began,
        )

    def tokens(self, loaded: LoadedModel, text: str, tokens: Sequence[int] | None) -> list[int]:
        """Ids of a text, as `glassgpt sample` reads a prompt; raises `UserError` for more than the
        context holds."""
        found = loaded.encode_prompt(text if tokens is None else tokens)
        found = found or first_tokens(loaded.tokenizer)
        if len(found) > (limit := loaded.config.context_length):
            raise UserError(
                f"the text has {len(found):,} tokens, but the model's context holds {limit:,}; "
                "shorten it"
            )
        return found

    def edits(
        self, loaded: LoadedModel, asked: TraceRequest, tokens: Sequence[int]
    ) -> dict[str, Edit]:
        """Edits for what is switched off, and for what is taken from another text."""
        edits, patch = without(asked.off, loaded.config, asked.fill), asked.patch
        if patch is None:
            return edits
        other = self.tokens(loaded, patch.text or "", patch.tokens)
        if len(other) != len(tokens):
            raise UserError(
                f"the other text has {len(other)} tokens and this one {len(tokens)}; patching "
                "needs as many in both"
            )
        names = {name for part in patch.parts for name in _activations(part, loaded.config)}
        keep = {name.rpartition(".")[2] for name in names}
        of_other = record(loaded.model, as_batch(loaded.model, other), keep=keep)
        return combine(patched(of_other, patch.parts), edits)

    def held(self, key: str) -> ShownTrace:
        """A trace by the key that `trace` gave it; raises `NotHeldError`."""
        if key not in self._traces:
            raise NotHeldError(f"trace {key} is no longer held; ask for it anew")
        self._traces[key] = self._traces.pop(key)
        return self._traces[key]

    def _make_room(self) -> None:
        for key in [*self._traces][:-1]:
            if sum(held.n_bytes for held in self._traces.values()) <= _MOST_BYTES:
                return
            del self._traces[key]

    def compare(self, a: str, b: str) -> CompareAnswer:
        return self.held(a).compare(self.held(b))

    def patch_map(self, asked: PatchMapRequest) -> np.ndarray:
        """How much each block and position of another text moves a logit: (L, T) float32."""
        loaded = self.loaded(Which(asked.model, asked.snapshot))
        tokens, other = (self.tokens(loaded, "", ids) for ids in (asked.tokens, asked.other))
        config, T = loaded.config, len(tokens)
        if 2 * config.n_layer * T**2 * config.n_parameters > _MOST_FLOPS:
            raise UserError(
                f"{T} tokens take {config.n_layer} passes over {T}² tokens, too long with this "
                "model; shorten both texts"
            )
        if asked.name not in PATCHABLE or "embedding" in asked.name:
            raise MissingError(f"{asked.name!r} can't be patched;{nearest(asked.name, PATCHABLE)}")
        if not 0 <= asked.token < config.vocab_size:
            raise UserError(f"token {asked.token} is outside the vocabulary of {config.vocab_size}")
        batch, other = (as_batch(loaded.model, ids) for ids in (tokens, other))
        of_other = record(loaded.model, other, keep=["token_embedding", asked.name])
        return patch_map(loaded.model, batch, of_other, asked.token, asked.name)

    # -- sampling --------------------------------------------------------------------------------

    def sample(self, asked: SampleRequest) -> sampling.SampleAnswer:
        loaded = self.loaded(asked)
        return sampling.draw_tokens(loaded, self._reader(loaded, asked), asked)

    def _reader(self, loaded: LoadedModel, asked: Which) -> sampling.PrefixReader:
        """The model in this state, with the cache of the last question about it."""
        key = asked.model, asked.snapshot, tuple(asked.off), asked.fill
        reader = self._readers.pop(key, None)
        if reader is None:
            edits = without(asked.off, loaded.config, asked.fill)
            caching = not edits or asked.fill != "mean"  # a mean depends on the whole text
            reader = sampling.PrefixReader(loaded.model, edits, caching=caching)
        self._readers[key] = reader
        for old in [*self._readers][:-_MOST_READERS]:
            del self._readers[old]
        return reader


def _activations(part: str, config: ModelConfig) -> list[str]:
    """The activations of a part of a model; `part` may also name one of them."""
    if part.rpartition(".")[2] in PATCHABLE:
        return [part]
    return find_part(part, config).activations


def _shown(op: Operation) -> ShownOperation:
    place = (op.name, op.layer, op.activation, op.lines)
    flops = op.flops / 2  # two tokens are read
    return ShownOperation(*place, op.symbols, op.inputs_symbols, op.parameters, flops)
