"""Everything that a page asks about a model, as plain functions: names and numbers in and out.

    session = Session("runs/book"); session.trace(TraceRequest(text="Once"))["trace"]

Answers are dicts, lists and arrays. One question is answered at a time: a model under watch is in
a state that no second thread may see. This room knows no HTTP and no page.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import numpy as np
import torch

from glassgpt.api import LoadedModel
from glassgpt.checkpoint import require_language_model
from glassgpt.errors import UserError
from glassgpt.explain import explain
from glassgpt.explore.held import HeldTrace, Missing
from glassgpt.generate import first_tokens
from glassgpt.lens import Fill, attribution, combine, logit_lens, patch_map, patched, without
from glassgpt.tokenizer import Tokenizer, unknown_note
from glassgpt.trace import Edit, record, shapes_of, source

_MOST_BYTES = 1 << 30  # of held traces; the newest one is held anyway
_MOST_MODELS = 3  # in memory, beside the one or two that were named
_TOP = 20

F_ = TypeVar("F_", bound=Callable[..., Any])


class NotHeld(UserError):
    """A trace that made room for newer ones: ask for it anew."""


@dataclass(frozen=True)
class Which:
    """Which model: `a` or `b`, perhaps early in its training, perhaps without some parts."""

    model: str = "a"
    snapshot: int | None = None
    off: list[str] = field(default_factory=list)
    fill: Fill = "zero"


@dataclass(frozen=True)
class Patch:
    """Parts that are taken from a pass over another text."""

    parts: list[str]
    text: str | None = None
    tokens: list[int] | None = None


@dataclass(frozen=True)
class TraceRequest(Which):
    text: str = ""
    tokens: list[int] | None = None  # instead of the text
    patch: Patch | None = None


def one_at_a_time(method: F_) -> F_:
    """A method of `Session` that no other thread enters meanwhile."""

    @functools.wraps(method)
    def alone(self: Session, *args: Any, **kwargs: Any) -> Any:
        with self.lock:
            return method(self, *args, **kwargs)

    return alone  # type: ignore[return-value]


class Session:
    """One model, or two that are compared, and the passes that were asked for lately."""

    def __init__(self, run: str, other: str | None = None, device: str = "auto") -> None:
        self.lock = RLock()
        self.runs = {"a": run} | ({} if other is None else {"b": other})
        self._folders = [Path(run) for run in self.runs.values() if Path(run).exists()]
        self.device = device
        self._models: OrderedDict[tuple[str, int | None], LoadedModel] = OrderedDict()
        self._traces: OrderedDict[str, HeldTrace] = OrderedDict()
        for key in self.runs:
            self.loaded(Which(key)).model  # noqa: B018  (now: the files may go while we explore)

    # -- models ----------------------------------------------------------------------------------

    @one_at_a_time
    def loaded(self, which: Which) -> LoadedModel:
        """The model that is asked for; a snapshot is read when it is first wanted."""
        if which.model not in self.runs:
            raise Missing(f"there is no model {which.model!r}; there are {', '.join(self.runs)}")
        key = which.model, which.snapshot
        if key not in self._models:
            run = Path(self.runs[which.model])
            name: str | Path = self.runs[which.model]
            if which.snapshot is not None:
                self.check_files()
                name = run / "snapshots" / str(which.snapshot)
                if which.snapshot not in snapshots(run):
                    raise Missing(f"{run} has no snapshot {which.snapshot}; it has "
                                  f"{', '.join(map(str, snapshots(run))) or 'none'}")  # fmt: skip
            model = LoadedModel.from_folder(name, self.device)
            require_language_model(model.checkpoint, name)
            self._models[key] = model
            extra = [key for key in self._models if key[1] is not None]
            for old in extra[:-_MOST_MODELS]:
                del self._models[old]
        self._models.move_to_end(key)
        return self._models[key]

    def check_files(self) -> None:
        """Raises `UserError` when a run directory has gone since it was loaded."""
        for folder in self._folders:
            if not folder.exists():
                raise UserError(f"{folder} is gone: it was deleted or moved while this page was "
                                "open; put it back, or explore another run")  # fmt: skip

    @one_at_a_time
    def model(self) -> dict[str, Any]:
        """What the model is, and every operation of a pass with its lines in model.py."""
        loaded = self.loaded(Which())
        config, tokenizer = loaded.config, loaded.tokenizer
        of_two = shapes_of(config, 2).operations  # so that there is a loss
        operations = [_operation(op) for op in of_two if op.layer in (None, 0)]
        run = Path(self.runs["a"])
        return {
            "name": _name(self.runs["a"]),
            "models": [{"key": key, "name": _name(run),
                        "parameters": self.loaded(Which(key)).config.n_parameters}
                       for key, run in self.runs.items()],
            "family": config.family, "config": dataclasses.asdict(config),
            "parameters": config.n_parameters, "vocab_size": config.vocab_size,
            "context_length": config.context_length,
            "tokenizer": {"kind": tokenizer.kind, "end_of_text": tokenizer.end_of_text},
            "labels": list(loaded.labels), "operations": operations,
            "source": {"file": "model.py", "text": source()}, "legend": LEGEND,
            "cache_bytes_per_token": cache_bytes(loaded), "snapshots": snapshots(run),
            "training": (run / "metrics.jsonl").exists(),
        }  # fmt: skip

    # -- traces ----------------------------------------------------------------------------------

    @one_at_a_time
    def trace(self, asked: TraceRequest) -> dict[str, Any]:
        """Run the model over a text, or remember that it was."""
        began = time.monotonic()
        self.check_files()
        loaded = self.loaded(asked)
        tokens = self.tokens(loaded, asked.text, asked.tokens)
        wanted = dataclasses.replace(asked, text="", tokens=tokens)
        text = json.dumps(dataclasses.asdict(wanted), sort_keys=True)
        key = hashlib.sha256(text.encode()).hexdigest()[:16]
        if key not in self._traces:
            edits = self.edits(loaded, asked, tokens)
            self._traces[key] = HeldTrace(loaded.model, _batch(loaded, tokens), edits)
            self._make_room()
        self._traces.move_to_end(key)
        held = self._traces[key]
        note = None if asked.tokens is not None else unknown_note(loaded.tokenizer, asked.text)
        return {
            "trace": key, "tokens": [describe(loaded.tokenizer, token) for token in tokens],
            "note": note,
            "activations": [{"name": name, "shape": held.shape(name), "symbols": symbols}
                            for name, symbols in held.symbols.items()],
            "maps": {"side": held.maps.shape[-1], "layers": loaded.config.n_layer,
                     "heads": loaded.config.n_head},
            "next": next_tokens(loaded.tokenizer, held.last_logits),
            "seconds": time.monotonic() - began,
        }  # fmt: skip

    def tokens(self, loaded: LoadedModel, text: str, tokens: Sequence[int] | None) -> list[int]:
        """Ids of a text, as `glassgpt sample` reads a prompt; checked against the context."""
        found = loaded.encode_prompt(text if tokens is None else tokens)
        found = found or first_tokens(loaded.tokenizer)
        if len(found) > (limit := loaded.config.context_length):
            raise UserError(f"the text has {len(found):,} tokens, but the model's context holds "
                            f"{limit:,}; shorten it")  # fmt: skip
        return found

    def edits(self, loaded: LoadedModel, asked: Which, tokens: Sequence[int]) -> dict[str, Edit]:
        """What is switched off, and taken from another text."""
        edits = without(asked.off, loaded.config, asked.fill)
        patch = getattr(asked, "patch", None)
        if patch is None:
            return edits
        other = self.tokens(loaded, patch.text or "", patch.tokens)
        if len(other) != len(tokens):
            raise UserError(f"the other text has {len(other)} tokens and this one {len(tokens)}; "
                            "patching needs as many")  # fmt: skip
        of_other = record(loaded.model, _batch(loaded, other), keep=PATCHABLE)
        return combine(patched(of_other, patch.parts), edits)

    def held(self, key: str) -> HeldTrace:
        """A trace by its id; raises `NotHeld`."""
        if key not in self._traces:
            raise NotHeld(f"trace {key} is no longer held; ask for it anew")
        self._traces.move_to_end(key)
        return self._traces[key]

    def _make_room(self) -> None:
        while len(self._traces) > 1 and sum(t.n_bytes for t in self._traces.values()) > _MOST_BYTES:
            self._traces.popitem(last=False)

    # -- what a trace holds ----------------------------------------------------------------------

    @one_at_a_time
    def maps(self, key: str) -> np.ndarray:
        return self.held(key).maps

    @one_at_a_time
    def tensor(
        self, key: str, name: str, head: int | None = None, rows: str = "", columns: str = ""
    ) -> np.ndarray:
        """An activation or a window of it (rows="0:64"), float32."""
        held = self.held(key)
        found = held.read(name, head, _slice(rows))
        if columns:
            found = found[..., _slice(columns)] if found.dim() > 1 else found
        return np.ascontiguousarray(found.numpy())


# -- tokens --------------------------------------------------------------------------------------

LEGEND = {"B": "batch: texts side by side", "T": "tokens", "S": "tokens that can be seen",
          "C": "width of the residual stream", "H": "heads", "K": "key/value heads",
          "D": "dimensions of a head", "F": "width of the MLP", "V": "vocabulary",
          "L": "blocks"}  # fmt: skip
PATCHABLE = ("token_embedding", "position_embedding", "resid_pre", "attn_in", "qkv", "q", "k", "v",
             "head_out", "attn_out", "resid_mid", "mlp_in", "mlp_hidden", "mlp_out", "resid_post",
             "final")  # fmt: skip


def token_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """b"" for the ids with which a vocabulary is padded."""
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""


def text_of(tokenizer: Tokenizer, token: int) -> str:
    return token_bytes(tokenizer, token).decode("utf-8", "replace")


def describe(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    content = token_bytes(tokenizer, token)
    return {"id": token, "text": content.decode("utf-8", "replace"), "bytes": list(content),
            "special": token in tokenizer.special.values()}  # fmt: skip


def next_tokens(tokenizer: Tokenizer, logits: np.ndarray, n: int = _TOP) -> dict[str, Any]:
    """The likeliest ones, and the entropy in nats of all. logits (V,)"""
    chance = _softmax(logits)
    best = np.argsort(-chance, kind="stable")[:n]
    top = [{"id": int(i), "text": text_of(tokenizer, int(i)), "p": float(chance[i]),
            "logit": float(logits[i])} for i in best]  # fmt: skip
    return {"top": top, "entropy": entropy(chance)}


def _softmax(logits: np.ndarray) -> np.ndarray:
    weights = np.exp(np.subtract(logits, logits.max(), dtype=np.float64))
    return weights / weights.sum()


def entropy(chance: np.ndarray) -> float:
    there = chance[chance > 0]
    return float(-(there * np.log(there)).sum())


def cache_bytes(loaded: LoadedModel) -> int:
    config = loaded.config
    numbers = 2 * config.n_layer * config.n_kv_head * config.head_dim
    return numbers * loaded.model.head.weight.element_size()


def snapshots(run: Path) -> list[int]:
    """The steps of which a run kept a model."""
    found = (run / "snapshots").glob("*/config.json")
    return sorted(int(path.parent.name) for path in found if path.parent.name.isdigit())


def _name(run: str) -> str:
    return Path(run).resolve().name if Path(run).exists() else run


def _batch(loaded: LoadedModel, tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([tokens], device=loaded.model.head.weight.device)


def _slice(text: str) -> slice:
    """ "3:7" as Python reads it."""
    first, _, end = text.partition(":")
    try:
        return slice(int(first) if first else None, int(end) if end else None)
    except ValueError:
        raise UserError(f"{text!r} is no range; write 0:64") from None


def _operation(op: Any) -> dict[str, Any]:
    return {"name": op.name, "layer": op.layer, "activation": op.activation,
            "lines": list(op.lines), "symbols": list(op.symbols),
            "inputs": [list(one) for one in op.inputs_symbols], "parameters": op.parameters,
            "flops_per_token": op.flops / 2}  # fmt: skip
