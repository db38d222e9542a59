"""What `glassgpt trace` shows: a model and a text in, tables and figures out.

    print("\\n".join(look(glassgpt.load("runs/book"), "To be or not", show="lens")))

The numbers come from trace.py and lens.py, the pictures from plot_inside.py; this room chooses
what to say of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch

from glassgpt.api import LoadedModel
from glassgpt.checkpoints.run_directory import require_language_model
from glassgpt.cli.figures import MAX_TOKENS, label_of
from glassgpt.config import ModelConfig
from glassgpt.data.glance import look_at
from glassgpt.errors import UserError
from glassgpt.interpret import figures as plot_inside
from glassgpt.interpret import lens
from glassgpt.interpret.activations import KEPT
from glassgpt.interpret.trace import Trace, record, shapes_of
from glassgpt.options import resolve_options, split_options
from glassgpt.reporting.canvas import check_target
from glassgpt.reporting.terminal import aligned
from glassgpt.tokenizers.tokenizer import begin_of_text, unknown_note

Show = Literal["operations", "lens", "attribution", "loss", "patch"]
_SHOWN = 5  # tokens of a distribution
_PARTS = 20  # of an attribution
_MOST_TEXTS = 1 << 20  # side by side


def describe_preset(
    preset: str | None, options: dict[str, Any], n_tokens: int = 10, batch: int = 1,
    *, layer: int | None = None, every: bool = False,
) -> str:  # fmt: skip
    """The table of a model without weights: what `train` with these options would make."""
    given = resolve_options(options, preset=preset)
    shape, data = split_options(given)[:2]
    text = look_at([], data)
    config = ModelConfig.from_shape(shape.pop("shape"), vocab_size=text.vocab_size, **shape)
    if not 1 <= n_tokens <= config.context_length:
        raise UserError(f"tokens={n_tokens}; the context holds 1 to {config.context_length}")
    if not 1 <= batch <= _MOST_TEXTS:
        raise UserError(f"batch={batch} must be 1 to {_MOST_TEXTS:,}")
    table = shapes_of(config, n_tokens, batch).table(layer, every=every)
    return f"{table}\nvocabulary of {text.vocab_size:,} tokens ({data.tokenizer})"


def look(
    model: LoadedModel,
    text: str,
    *,
    show: Show = "operations",
    layer: int | None = None,
    every: bool = False,
    off: Sequence[str] = (),
    fill: lens.Fill = "zero",
    patch_from: str | None = None,
    parts: Sequence[str] = (),
    token: str | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> list[str]:
    """Lines that say what happens in `model` while it reads `text`; with `out` also a figure.

    Raises `UserError` for what the model does not have and for options that don't go together.
    """
    require_language_model(model.checkpoint, model.name)
    if out is not None:
        if show == "operations":
            raise UserError("operations are a table; a figure shows lens, attribution, loss or "
                            "patch (--show)")  # fmt: skip
        check_target(Path(out), overwrite)
    if parts and patch_from is None:
        raise UserError("--parts says what to take from another text; name it with --patch-from")
    if show == "patch" and (patch_from is None or parts):
        raise UserError("--show patch tries every place in turn: give --patch-from, no --parts")
    if patch_from is not None and not parts and show != "patch":
        raise UserError("--patch-from names a text; say with --parts what to take from it, or "
                        "--show patch")  # fmt: skip
    if show != "operations" and (layer is not None or every):
        raise UserError(f"--layer and --every choose operations; --show {show} has all layers")
    if layer is not None and every:
        raise UserError("--layer shows one block and --every all; give one of them")
    if token is not None and show not in ("attribution", "patch"):
        raise UserError("--token goes with --show attribution or patch")
    looked = _Looked(model, text, off, fill, patch_from, parts)
    lines = looked.notes + (looked.effect() if looked.edits else [])
    lines += getattr(looked, show)(*([layer, every] if show == "operations" else [token]))
    if out is not None:
        getattr(looked, f"draw_{show}")(Path(out), token)
        n, only = looked.tokens.size(1), f"; only the first {MAX_TOKENS} tokens are drawn"
        lines.append(f"figure: {out}" + (only if n > MAX_TOKENS and show != "attribution" else ""))
    return lines


class _Looked:
    """A model that has read a text, perhaps with parts switched off or taken from elsewhere."""

    def __init__(
        self, loaded: LoadedModel, text: str, off: Sequence[str], fill: lens.Fill,
        patch_from: str | None, parts: Sequence[str],
    ) -> None:  # fmt: skip
        self.loaded, self.model, self.config = loaded, loaded.model, loaded.config
        self.tokens, self.notes = self._read(text)
        self.labels = [self.label(token) for token in self.tokens[0].tolist()]
        edits = [lens.without(off, self.config, fill)]
        self.other = None
        if patch_from is not None:
            self.other_tokens, more = self._read(patch_from)
            self.notes += more
            self.other = record(self.model, self.other_tokens)
            if parts:
                edits.append(lens.patched(self.other, parts))
        self.edits = lens.combine(*edits)

    def _read(self, text: str) -> tuple[torch.Tensor, list[str]]:
        """Tokens (1, T), and what to know of them; an empty text is the token before texts."""
        tokenizer, note = self.loaded.tokenizer, unknown_note(self.loaded.tokenizer, text)
        ids = self.loaded.encode_prompt(text)
        if not ids:
            first = begin_of_text(tokenizer)
            ids = tokenizer.encode("\n") if first is None else [first]
        notes, limit = [f"note: {note}"] if note else [], self.config.context_length
        if len(ids) > limit:
            notes.append(f"note: only the first {limit} of {len(ids):,} tokens are read")
        return torch.tensor([ids[:limit]], device=self.model.head.weight.device), notes

    def label(self, token: int) -> str:
        return label_of(self.loaded.tokenizer, token)

    @cached_property
    def trace(self) -> Trace:
        return record(self.model, self.tokens, edits=self.edits, loss=True, keep=KEPT)

    # -- what to say -----------------------------------------------------------------------------

    def effect(self) -> list[str]:
        """Next token and loss, without and with the edits."""
        plain = record(self.model, self.tokens, keep=["logits", "loss"], loss=True)
        lines = []
        for name, trace in (("as it is", plain), ("changed", self.trace)):
            likely = self._likely(trace.tensor("logits")[0, -1])
            shown = "  ".join(f"{label} {p:.3f}" for label, p in likely)
            loss = ""
            if "loss" in trace.activations:
                loss = f"loss {trace.tensor('loss').mean().item():.4f} · "
            lines.append(f"{name}: {loss}next {shown}")
        return [*lines, ""]

    def _likely(self, logits: torch.Tensor) -> list[tuple[str, float]]:
        chances, ids = logits.softmax(-1).topk(min(_SHOWN, logits.numel()))
        return [(self.label(i), p) for i, p in zip(ids.tolist(), chances.tolist(), strict=True)]

    def operations(self, layer: int | None, every: bool) -> list[str]:
        trace = record(self.model, self.tokens, edits=self.edits, loss=True, statistics=True,
                       keep=())  # fmt: skip
        return trace.table(layer, every=every).splitlines()

    def lens(self, token: str | None) -> list[str]:
        """What the head would write after the last token, read from each layer's stream."""
        rows = [["read from", *(f"choice {i + 1}" for i in range(_SHOWN))]]
        for name, logits in lens.logit_lens(self.model, self.trace, slice(-1, None)):
            likely = self._likely(logits[0, -1])
            rows.append([name, *(f"{label} {p:.3f}" for label, p in likely)])
        width = max(map(len, rows))
        return aligned([row + [""] * (width - len(row)) for row in rows], left=width).splitlines()

    def _token(self, token: str | None) -> int:
        """The token that is asked about; the likeliest next one."""
        if token is None:
            return int(self.trace.tensor("logits")[0, -1].argmax())
        ids = self.loaded.encode_prompt(token)
        if len(ids) != 1:
            raise UserError(f"--token {token!r} is {len(ids)} tokens for this model; name one")
        return ids[0]

    def attribution(self, token: str | None) -> list[str]:
        """Who wrote the logit of a token."""
        parts = self._contributions(token)
        ordered = sorted(parts, key=lambda part: -abs(part.value))
        rows = [["part", "adds"], *([name, f"{value:+.4f}"] for name, value in ordered[:_PARTS])]
        if rest := ordered[_PARTS:]:
            rows.append([f"{len(rest)} more", f"{sum(part.value for part in rest):+.4f}"])
        rows.append([f"logit of {self.label(self._token(token))}",
                     f"{sum(part.value for part in parts):+.4f}"])  # fmt: skip
        return aligned(rows).splitlines()

    def _contributions(self, token: str | None) -> list[lens.Contribution]:
        return lens.attribution(self.model, self.trace, self._token(token))

    def loss(self, token: str | None) -> list[str]:
        """How surprised the model is by each token, in nats."""
        losses, ranks = self._losses()
        rows = [["token", "loss", "rank"]]
        rows += [
            [label, f"{loss:.4f}", f"{rank:,}"]
            for label, loss, rank in zip(self.labels[1:], losses, ranks, strict=True)
        ]
        rows.append(["mean", f"{losses.mean():.4f}", ""])
        return aligned(rows).splitlines()

    def _losses(self) -> tuple[np.ndarray, np.ndarray]:
        """Of each token but the first: its loss, and how many were likelier, plus one."""
        if self.tokens.size(1) < 2:
            raise UserError("a loss takes two tokens at least: the first is not predicted")
        logits = self.trace.tensor("logits")[0, :-1]  # (T - 1, V)
        chosen = logits.gather(1, self.tokens[0, 1:, None])
        ranks = 1 + (logits > chosen).sum(dim=1)
        return self.trace["loss"][0], ranks.cpu().numpy()

    def patch(self, token: str | None) -> list[str]:
        """Where the other text's stream moves the logit of a token."""
        moved = self._moved(token)
        rows = [["after block", *self.labels]]
        rows += [[str(layer), *(f"{x:+.2f}" for x in row)] for layer, row in enumerate(moved)]
        shown = self.label(self._token(token))
        return [f"logit of {shown}, when one place is taken from the other text:",
                *aligned(rows).splitlines()]  # fmt: skip

    @cached_property
    def _maps(self) -> dict[int, np.ndarray]:
        return {}

    def _moved(self, token: str | None) -> np.ndarray:
        assert self.other is not None
        chosen = self._token(token)
        if chosen not in self._maps:
            self._maps[chosen] = lens.patch_map(self.model, self.tokens, self.other, chosen)
        return self._maps[chosen]

    # -- what to draw ----------------------------------------------------------------------------

    def draw_lens(self, target: Path, token: str | None) -> None:
        chances, words = [], []
        for _, logits in lens.logit_lens(self.model, self.trace):
            best, ids = logits[0, :MAX_TOKENS].softmax(-1).max(dim=-1)  # (T,) each
            chances.append(best.cpu().numpy())
            words.append([self.label(i) for i in ids.tolist()])
        rows = ["embedding", *(f"block {i}" for i in range(self.config.n_layer))]
        plot_inside.grid(target, np.stack(chances), rows, self.labels[:MAX_TOKENS], cells=words,
                         title="Logit lens: what the head would write, read after each block",
                         x="token that was read", bar="probability of the likeliest next token",
                         limits=(0, 1))  # fmt: skip

    def draw_patch(self, target: Path, token: str | None) -> None:
        rows = [f"block {i}" for i in range(self.config.n_layer)]
        shown = self.label(self._token(token))
        plot_inside.grid(target, self._moved(token)[:, :MAX_TOKENS], rows, self.labels[:MAX_TOKENS],
                         title=f"Patching: how much one place from the other text moves {shown}",
                         x="token whose place is taken",
                         bar=f"change of the logit of {shown}")  # fmt: skip

    def draw_attribution(self, target: Path, token: str | None) -> None:
        parts = sorted(self._contributions(token), key=lambda part: -abs(part.value))[:_PARTS]
        shown = self.label(self._token(token))
        plot_inside.bars(target, [part.value for part in parts], [part.part for part in parts],
                         title=f"Who wrote the logit of {shown}",
                         x="added to the logit")  # fmt: skip

    def draw_loss(self, target: Path, token: str | None) -> None:
        losses, _ = self._losses()
        plot_inside.bars(target, losses[:MAX_TOKENS].tolist(), self.labels[1 : MAX_TOKENS + 1],
                         title=f"Loss of each token, {losses.mean():.3f} on average",
                         x="loss (nats)", guess=float(np.log(self.config.vocab_size)))  # fmt: skip
