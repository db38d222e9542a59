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
import math
import shlex
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from pathlib import Path
from threading import RLock
from typing import Any, TypeVar

import numpy as np
import torch

from glassgpt.api import LoadedModel
from glassgpt.checkpoints.run_directory import require_language_model, snapshots
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError, nearest
from glassgpt.inference.generate import draw_token, filter_logits, first_tokens, probabilities
from glassgpt.interpret.explain import Cell, Sum, explain
from glassgpt.interpret.lens import (
    attribution,
    combine,
    find_part,
    logit_lens,
    patch_map,
    patched,
    without,
)
from glassgpt.interpret.trace import Edit, record, shapes_of, source
from glassgpt.model import GPT
from glassgpt.reporting.run_log import read_metrics
from glassgpt.studio.drawing import Reader, distribution, in_context
from glassgpt.studio.held_trace import HeldTrace, MissingError
from glassgpt.studio.requests import (
    DistributionRequest,
    PatchMapRequest,
    SampleRequest,
    TraceRequest,
    Which,
)
from glassgpt.studio.words import describe, likeliest, merges, next_tokens, text_of
from glassgpt.tokenizers.tokenizer import Tokenizer, unknown_note

_MOST_BYTES = 1 << 30  # of held traces; the newest one is held anyway
_MOST_MODELS = 3  # in memory, beside the one or two that were named
_MOST_POSITIONS = 128  # of the lens in one answer: each is a whole vocabulary, L + 1 times
_MOST_SAMPLES = 1 << 32  # whose random numbers differ
_MOST_READERS = 4  # with a key/value cache each
_STILL_RUNNING = 60.0  # seconds since the last line of metrics.jsonl
_MOST_FLOPS = 5e12  # of a map of patches: about a minute on two cores

F_ = TypeVar("F_", bound=Callable[..., Any])


class NotHeldError(UserError):
    """A trace that made room for newer ones: ask for it anew."""


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
        self._traces: OrderedDict[str, tuple[HeldTrace, Tokenizer]] = OrderedDict()
        self._readers: OrderedDict[tuple, Reader] = OrderedDict()
        for key in self.runs:
            self.loaded(Which(key)).model  # noqa: B018  (now: the files may go while we explore)

    # -- models ----------------------------------------------------------------------------------

    @one_at_a_time
    def loaded(self, which: Which) -> LoadedModel:
        """The model that is asked for; a snapshot is read when it is first wanted."""
        if which.model not in self.runs:
            raise MissingError(
                f"there is no model {which.model!r}; there are {', '.join(self.runs)}"
            )
        key = which.model, which.snapshot
        if key not in self._models:
            run = Path(self.runs[which.model])
            name: str | Path = self.runs[which.model]
            if which.snapshot is not None:
                self.check_files()
                kept = snapshots(run)
                if which.snapshot not in kept:
                    raise MissingError(f"{run} has no snapshot {which.snapshot}; it has "
                                       f"{', '.join(map(str, kept)) or 'none'}")  # fmt: skip
                name = kept[which.snapshot]
            model = LoadedModel.from_folder(name, self.device)
            require_language_model(model.checkpoint, name)
            self._models[key] = model
            extra = [key for key in self._models if key[1] is not None]
            for old in extra[:-_MOST_MODELS]:
                self._forget(self._models.pop(old).model)
        self._models.move_to_end(key)
        return self._models[key]

    def _forget(self, model: GPT) -> None:
        """Let go of what would keep its weights in memory."""
        for key in [key for key, (held, _) in self._traces.items() if held.model is model]:
            del self._traces[key]
        for which in [which for which, reader in self._readers.items() if reader.model is model]:
            del self._readers[which]

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
            "models": [{"key": key, "name": _name(run), "run": shlex.quote(str(run)),
                        "parameters": self.loaded(Which(key)).config.n_parameters}
                       for key, run in self.runs.items()],
            "family": config.family, "config": dataclasses.asdict(config),
            "parameters": config.n_parameters, "vocab_size": config.vocab_size,
            "context_length": config.context_length,
            "tokenizer": {"kind": tokenizer.kind, "end_of_text": tokenizer.end_of_text},
            "labels": list(loaded.labels), "operations": operations,
            "source": {"file": "model.py", "text": source()}, "legend": LEGEND,
            "cache_bytes_per_token": cache_bytes(loaded), "snapshots": list(snapshots(run)),
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
            held = HeldTrace(loaded.model, _batch(loaded, tokens), edits)
            self._traces[key] = held, loaded.tokenizer
            self._make_room()
        self._traces.move_to_end(key)
        held, _ = self._traces[key]
        note = None if asked.tokens is not None else unknown_note(loaded.tokenizer, asked.text)
        return {
            "trace": key, "tokens": [describe(loaded.tokenizer, token) for token in tokens],
            "note": note,
            "activations": [{"name": name, "shape": held.shape(name), "symbols": symbols}
                            for name, symbols in held.symbols.items()],
            "maps": {"side": held.maps.shape[-1], "layers": loaded.config.n_layer,
                     "heads": loaded.config.n_head},
            "next": next_tokens(loaded.tokenizer,
                                held.last_logits[: loaded.tokenizer.vocab_size]),
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
        names = {name for part in patch.parts for name in _activations(part, loaded.config)}
        of_other = record(loaded.model, _batch(loaded, other),
                          keep={name.rpartition(".")[2] for name in names})  # fmt: skip
        of_other.activations = {name: of_other.activations[name]
                                for name in names & of_other.activations.keys()}  # fmt: skip
        return combine(patched(of_other, patch.parts), edits)

    def held(self, key: str) -> tuple[HeldTrace, Tokenizer]:
        """A trace by its id, and how its tokens are read; raises `NotHeldError`."""
        if key not in self._traces:
            raise NotHeldError(f"trace {key} is no longer held; ask for it anew")
        self._traces.move_to_end(key)
        return self._traces[key]

    def _make_room(self) -> None:
        while (
            len(self._traces) > 1 and sum(t.n_bytes for t, _ in self._traces.values()) > _MOST_BYTES
        ):
            self._traces.popitem(last=False)

    # -- what a trace holds ----------------------------------------------------------------------

    @one_at_a_time
    def maps(self, key: str) -> np.ndarray:
        return self.held(key)[0].maps

    @one_at_a_time
    def tensor(
        self, key: str, name: str, head: int | None = None, rows: str = "", columns: str = ""
    ) -> np.ndarray:
        """An activation or a window of it (rows="0:64"), float32."""
        held, _ = self.held(key)
        found = held.read(name, head, _slice(rows))
        if columns:
            found = found[..., _slice(columns)] if found.dim() > 1 else found
        return np.ascontiguousarray(found.numpy())

    @one_at_a_time
    def cell(self, key: str, name: str, index: Sequence[int]) -> dict[str, Any]:
        """Where one number comes from."""
        held, _ = self.held(key)
        at = held.check_cell(name, index)
        ids = held.tokens[0].tolist()
        origin = explain(held.model, ids, held.read, name, at, held.edits)
        return {"name": name, "index": list(at), "value": origin.value, "how": origin.how,
                "formula": origin.formula, **_sum(origin.sum), "difference": origin.difference,
                "denominator": origin.denominator and _sum(origin.denominator)}  # fmt: skip

    @one_at_a_time
    def lens(
        self, key: str, first: int | None = None, end: int | None = None, k: int = 5
    ) -> dict[str, Any]:
        """What the head would say after each block, at the positions first to end."""
        held, tokenizer = self.held(key)
        if k < 1:
            raise UserError(f"k={k}: the lens shows 1 token or more")
        T = held.n_tokens
        end = T if end is None else min(end, T)
        first = max(0, end - 24) if first is None else max(0, first)
        if not 0 < end - first <= _MOST_POSITIONS:
            raise UserError(f"positions {first} to {end}: the lens shows 1 to {_MOST_POSITIONS}")
        rows: list[dict[str, Any]] = []
        V = tokenizer.vocab_size  # a padded vocabulary has ids that none draws
        final = held.read("logits", None, slice(first, end))[:, :V].argmax(-1).tolist()
        for name, logits in logit_lens(held.model, held, slice(first, end)):
            chance = logits[0, :, :V].float().cpu().softmax(-1)  # (T', V)
            best = chance.topk(min(k, chance.size(-1)))
            spread = torch.special.entr(chance).sum(-1).tolist()
            positions = [
                {"top": [{"id": i, "text": text_of(tokenizer, i), "p": p}
                         for i, p in zip(ids, some, strict=True)],
                 "entropy": spread[t], "p_final": chance[t, final[t]].item()}
                for t, (ids, some) in enumerate(zip(best.indices.tolist(), best.values.tolist(),
                                                    strict=True))]  # fmt: skip
            label = "embedding" if name.endswith("resid_pre") else f"block {name.split('.')[1]}"
            rows.append({"name": name, "label": label, "positions": positions})
        return {"from": first, "to": end, "rows": rows, "final": final}

    @one_at_a_time
    def attribution(
        self, key: str, position: int = -1, token: int | None = None, against: int | None = None
    ) -> dict[str, Any]:
        """Who wrote a logit; of the likeliest token where none is named."""
        held, _ = self.held(key)
        position = _position(held, position)
        logits = held.read("logits", None, slice(position, position + 1))[0]
        token = int(logits.argmax()) if token is None else token
        parts = attribution(held.model, held, token, position=position, against=against)
        value = logits[token] - (0 if against is None else logits[against])
        return {"token": token, "against": against, "position": position, "logit": value.item(),
                "parts": [part._asdict() for part in parts]}  # fmt: skip

    @one_at_a_time
    def loss(self, key: str) -> dict[str, Any]:
        """How surprised the model is by each token; nats."""
        held, tokenizer = self.held(key)
        ids = held.tokens[0, 1:].tolist()
        losses, ranks, entropies = held.surprise()
        n_bytes = sum(len(describe(tokenizer, token)["bytes"]) for token in ids)
        bits = float(losses.sum()) / math.log(2)
        return {"loss": [None, *losses.tolist()], "rank": [None, *map(int, ranks)],
                "entropy": [None, *entropies.tolist()],
                "mean": float(losses.mean()) if ids else None,
                "bits_per_byte": bits / n_bytes if n_bytes else None}  # fmt: skip

    @one_at_a_time
    def distribution(self, key: str, asked: DistributionRequest) -> dict[str, Any]:
        """What every filter of sampling does to the tokens behind a position."""
        held, tokenizer = self.held(key)
        position = _position(held, asked.position)
        logits = held.last_logits
        if position < held.n_tokens - 1:
            logits = held.read("logits", None, slice(position, position + 1))[0].numpy()
        seen = held.tokens[0, : position + 1].tolist() if asked.seen is None else asked.seen
        return distribution(tokenizer, logits[: tokenizer.vocab_size], set(seen), asked.sampling(),
                            asked.show)  # fmt: skip

    def compare(self, a: str, b: str) -> dict[str, Any]:
        """Two traces side by side: what is next, and the losses where the texts are as long."""
        with self.lock:
            (one, tokenizer), (other, its) = self.held(a), self.held(b)
            if its.spec != tokenizer.spec:
                raise UserError("the two models have different tokenizers, so their tokens can't "
                                "be compared")  # fmt: skip
            p, q = (probabilities(held.last_logits[: tokenizer.vocab_size])
                    for held in (one, other))  # fmt: skip
            tiny = np.finfo(np.float64).tiny
            kl = float((p * (np.log(p + tiny) - np.log(q + tiny))).sum())
            tokens = [{"id": int(i), "text": text_of(tokenizer, int(i)), "a": float(p[i]),
                       "b": float(q[i])} for i in likeliest(np.maximum(p, q), 20)]  # fmt: skip
            loss = None
            if one.n_tokens == other.n_tokens:
                loss = {"a": self.loss(a)["loss"], "b": self.loss(b)["loss"]}
        return {"next": {"kl": kl, "tokens": tokens}, "loss": loss}

    # -- other questions -------------------------------------------------------------------------

    @one_at_a_time
    def sample(self, asked: SampleRequest) -> dict[str, Any]:
        """The next tokens, as `glassgpt sample` draws them with the same seed."""
        loaded, how = self.loaded(asked), asked.sampling(asked.seed)
        if not 0 <= asked.n <= _MOST_POSITIONS:
            raise UserError(f"n={asked.n}: 0 to {_MOST_POSITIONS} tokens at a time")
        if not 0 <= asked.sample < _MOST_SAMPLES:
            raise UserError(f"sample={asked.sample} must be 0 to {_MOST_SAMPLES - 1:,}")
        tokenizer, n_new = loaded.tokenizer, len(asked.new)
        prompt = loaded.encode_prompt(asked.prompt) or first_tokens(tokenizer)
        tokens = prompt + loaded.encode_prompt(asked.new)
        seen, drawn, finish = {*asked.prompt, *asked.new}, [], None
        reader, ends = self._reader(loaded, asked), {tokenizer.end_of_text, *loaded.checkpoint.ends}
        for position in range(n_new, n_new + asked.n):
            if asked.max_new_tokens is not None and position >= asked.max_new_tokens:
                break
            held = in_context(len(prompt), tokens, loaded.config.context_length)
            logits, reused = reader.logits(held)
            logits = logits[: tokenizer.vocab_size]
            filtered = filter_logits(logits, seen, how)
            token = draw_token(filtered, seed=how.seed, sample=asked.sample, position=position)
            drawn.append({
                "id": token, "text": text_of(tokenizer, token),
                "p": float(probabilities(logits)[token]),
                "final": float(probabilities(filtered)[token]), "computed": len(held) - reused,
                "reused": reused, "cache_bytes": len(held) * cache_bytes(loaded),
            })  # fmt: skip
            tokens.append(token)
            seen.add(token)
            if token in ends:
                finish = "end_of_text"
                break
        if finish is None and n_new + len(drawn) == asked.max_new_tokens:
            finish = "length"
        return {"tokens": drawn, "finish": finish}

    def _reader(self, loaded: LoadedModel, asked: Which) -> Reader:
        """With the cache of the last question about this model in this state."""
        key = asked.model, asked.snapshot, tuple(asked.off), asked.fill
        if key not in self._readers:
            edits = without(asked.off, loaded.config, asked.fill)
            self._readers[key] = Reader(loaded.model, edits,
                                        forgets=bool(edits) and asked.fill == "mean")  # fmt: skip
            while len(self._readers) > _MOST_READERS:
                self._readers.popitem(last=False)
        self._readers.move_to_end(key)
        return self._readers[key]

    @one_at_a_time
    def patch_map(self, asked: PatchMapRequest) -> np.ndarray:
        """How much each block and position of another text moves a logit: (L, T) float32."""
        loaded = self.loaded(Which(asked.model, asked.snapshot))
        tokens, other = (self.tokens(loaded, "", ids) for ids in (asked.tokens, asked.other))
        config, T = loaded.config, len(tokens)
        if 2 * config.n_layer * T**2 * config.n_parameters > _MOST_FLOPS:
            raise UserError(f"{T} tokens take {config.n_layer} passes over {T}² tokens, too long "
                            "with this model; shorten both texts")  # fmt: skip
        if asked.name not in PATCHABLE or "embedding" in asked.name:
            raise MissingError(f"{asked.name!r} can't be patched;{nearest(asked.name, PATCHABLE)}")
        source = record(loaded.model, _batch(loaded, other),
                        keep=["token_embedding", asked.name])  # fmt: skip
        if not 0 <= asked.token < config.vocab_size:
            raise UserError(f"token {asked.token} is outside the vocabulary of {config.vocab_size}")
        return patch_map(loaded.model, _batch(loaded, tokens), source, asked.token, asked.name)

    @one_at_a_time
    def token(self, token: int, model: str = "a") -> dict[str, Any]:
        """A token, and how BPE builds it."""
        loaded = self.loaded(Which(model))
        if not 0 <= token < loaded.config.vocab_size:
            raise MissingError(f"token {token} is outside the vocabulary of "
                               f"{loaded.config.vocab_size}")  # fmt: skip
        return describe(loaded.tokenizer, token) | {"merges": merges(loaded.tokenizer, token)}

    def training(self) -> dict[str, Any]:
        """The curve of the run, as far as it has come."""
        self.check_files()
        run = Path(self.runs["a"])
        path, names = (
            run / "metrics.jsonl",
            ["step", "tokens", "seconds", "train_loss", "val_loss", "lr"],
        )
        rows, running = [], False
        if path.exists():
            rows = [{name: row.get(name) for name in names} for row in read_metrics(path)]
            running = time.time() - path.stat().st_mtime < _STILL_RUNNING
        step = -(-len(rows) // 800)  # evaluations stay, of the others every so-manieth
        rows = [row for i, row in enumerate(rows) if i % max(1, step) == 0
                or row["val_loss"] is not None][-1000:]  # fmt: skip
        return {"running": running, "rows": rows, "snapshots": list(snapshots(run)),
                "guessing": math.log(self.loaded(Which()).config.vocab_size)}  # fmt: skip


# -- for all of them -------------------------------------------------------------------------------

LEGEND = {"B": "batch: texts side by side", "T": "tokens", "S": "tokens that can be seen",
          "C": "width of the residual stream", "H": "heads", "K": "key/value heads",
          "D": "dimensions of a head", "F": "width of the MLP", "V": "vocabulary",
          "L": "blocks"}  # fmt: skip
PATCHABLE = ("token_embedding", "position_embedding", "attn_in", "qkv", "q", "k", "v", "head_out",
             "attn_out", "resid_mid", "mlp_in", "mlp_hidden", "mlp_out", "resid_post")  # fmt: skip


def _activations(part: str, config: ModelConfig) -> list[str]:
    """What a part gives; an activation's name stands for itself."""
    if part.rpartition(".")[2] in PATCHABLE:
        return [part]
    return find_part(part, config).activations


def cache_bytes(loaded: LoadedModel) -> int:
    config = loaded.config
    numbers = 2 * config.n_layer * config.n_kv_head * config.head_dim
    return numbers * loaded.model.head.weight.element_size()


def _name(run: str) -> str:
    return Path(run).resolve().name if Path(run).exists() else run


def _batch(loaded: LoadedModel, tokens: Sequence[int]) -> torch.Tensor:
    return torch.tensor([tokens], device=loaded.model.head.weight.device)


def _position(held: HeldTrace, position: int) -> int:
    """Counted from the front; raises `MissingError`."""
    if not -held.n_tokens <= position < held.n_tokens:
        raise MissingError(f"there is no position {position}; the text has {held.n_tokens} tokens")
    return position % held.n_tokens


def _slice(text: str) -> slice:
    """ "3:7" as Python reads it."""
    first, _, end = text.partition(":")
    try:
        return slice(int(first) if first else None, int(end) if end else None)
    except ValueError:
        raise UserError(f"{text!r} is no range; write 0:64") from None


def _sum(found: Sum) -> dict[str, Any]:
    def cell(source: Cell | None) -> dict[str, Any] | None:
        return source and {"name": source[0], "index": list(source[1])}

    terms = [{"label": term.label, "value": term.value, "factors": term.factors,
              "sources": [cell(source) for source in term.sources],
              "from": cell(next(filter(None, term.sources), None))}
             for term in found.terms]  # fmt: skip
    return {"terms": terms, "rest": {"count": found.rest_count, "value": found.rest},
            "total": found.total}  # fmt: skip


def _operation(op: Any) -> dict[str, Any]:
    return {"name": op.name, "layer": op.layer, "activation": op.activation,
            "lines": list(op.lines), "symbols": list(op.symbols),
            "inputs": [list(one) for one in op.inputs_symbols], "parameters": op.parameters,
            "flops_per_token": op.flops / 2}  # fmt: skip
