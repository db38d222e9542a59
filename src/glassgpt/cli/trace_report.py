"""What `glassgpt trace` shows: a model and a text in, tables and figures out.

    print("\\n".join(Reading(glassgpt.load("runs/book"), "To be or not").lens()))

The numbers come from the room interpret; this module chooses what to say of them and how. It knows
no command line.
"""

from __future__ import annotations

from functools import cached_property
from pathlib import Path

import numpy as np
import torch

from glassgpt.api import LoadedModel
from glassgpt.checkpoints.run_directory import require_language_model
from glassgpt.cli.arguments import Changes
from glassgpt.cli.figures import MAX_TOKENS, label_of
from glassgpt.config import ModelConfig
from glassgpt.data.prepare import estimate_size
from glassgpt.errors import UserError
from glassgpt.inference.generate import first_tokens
from glassgpt.interpret import figures
from glassgpt.interpret.activations import KEPT
from glassgpt.interpret.lens import (
    attribution,
    combine,
    logit_lens,
    patch_map,
    patched,
    without,
)
from glassgpt.interpret.trace import Trace, record, record_shapes
from glassgpt.options import resolve_options, split_options
from glassgpt.reporting.terminal import aligned
from glassgpt.tokenizers.tokenizer import unknown_note

_SHOWN = 5  # tokens of a distribution
_PARTS = 20  # of an attribution
_MOST_TEXTS = 1 << 20  # side by side: more is a slip of the keyboard
_AS_IT_IS = Changes()


def describe_preset(
    preset: str | None,
    options: dict[str, object],
    n_tokens: int = 10,
    batch: int = 1,
    *,
    layer: int | None = None,
    every: bool = False,
) -> str:
    """The operations of a model without weights: the one that `train` would make of the options."""
    _check_layer(layer, every)
    given = resolve_options(options, preset=preset)
    shape, data = split_options(given)[:2]
    text = estimate_size([], data)
    config = ModelConfig.from_shape(shape.pop("shape"), vocab_size=text.vocab_size, **shape)
    if not 1 <= n_tokens <= config.context_length:
        raise UserError(f"tokens={n_tokens}; the context holds 1 to {config.context_length}")
    if not 1 <= batch <= _MOST_TEXTS:
        raise UserError(f"batch={batch} must be 1 to {_MOST_TEXTS:,}")
    table = record_shapes(config, n_tokens, batch).table(layer, every=every)
    return f"{table}\nvocabulary of {text.vocab_size:,} tokens ({data.tokenizer})"


def _check_layer(layer: int | None, every: bool) -> None:
    if layer is not None and every:
        raise UserError("--layer shows one block and --every all; give one of them")


class Reading:
    """A model that reads a text, perhaps with parts switched off or taken from another text.

    Each view returns lines of text: first what is to be known of the text and of the changes, then
    the view itself. With a `target`, it also draws a figure there.
    """

    def __init__(self, loaded: LoadedModel, text: str, changes: Changes = _AS_IT_IS) -> None:
        require_language_model(loaded.checkpoint, loaded.name)
        if changes.parts and changes.patch_from is None:
            raise UserError(
                "--parts says what to take from another text; name it with --patch-from"
            )
        if changes.patch_from is not None and not changes.parts:
            raise UserError(
                "--patch-from names a text; say with --parts what to take from it, or "
                "try every place in turn: glassgpt trace patch"
            )
        self.loaded, self.model, self.config = loaded, loaded.model, loaded.config
        self.notes: list[str] = []
        self.tokens = self._read(text)
        self.labels = [self.label(token) for token in self.tokens[0].tolist()]
        edits = [without(changes.off, self.config, changes.fill)]
        if changes.patch_from is not None:
            other = record(self.model, self._read(changes.patch_from))
            edits.append(patched(other, changes.parts))
        self.edits = combine(*edits)

    def _read(self, text: str) -> torch.Tensor:
        """Tokens (1, T); of an empty text, the token that stands before texts."""
        tokenizer, limit = self.loaded.tokenizer, self.config.context_length
        if note := unknown_note(tokenizer, text):
            self.notes.append(f"note: {note}")
        ids = self.loaded.encode_prompt(text) or first_tokens(tokenizer)
        if len(ids) > limit:
            self.notes.append(f"note: only the first {limit} of {len(ids):,} tokens are read")
        return torch.tensor([ids[:limit]], device=self.model.head.weight.device)

    def label(self, token: int) -> str:
        return label_of(self.loaded.tokenizer, token)

    @cached_property
    def trace(self) -> Trace:
        return record(self.model, self.tokens, edits=self.edits, loss=True, keep=KEPT)

    # -- the views -------------------------------------------------------------------------------

    def operations(self, layer: int | None = None, *, every: bool = False) -> list[str]:
        """Every operation of the pass, with shapes, parameters, FLOPs and what its numbers are."""
        _check_layer(layer, every)
        trace = record(
            self.model, self.tokens, edits=self.edits, loss=True, statistics=True, keep=()
        )
        return self._said(trace.table(layer, every=every).splitlines())

    def lens(self, target: Path | None = None) -> list[str]:
        """What the head would write after the last token, read from each layer's stream."""
        rows = [["read from", *(f"choice {i + 1}" for i in range(_SHOWN))]]
        for name, logits in logit_lens(self.model, self.trace, slice(-1, None)):
            rows.append([name, *self._likely(logits[0, -1])])
        width = max(map(len, rows))
        lines = aligned([row + [""] * (width - len(row)) for row in rows], left=width)
        if target is not None:
            self._draw_lens(target)
        return self._said(lines.splitlines(), target)

    def _draw_lens(self, target: Path) -> None:
        chances, words = [], []
        for _, logits in logit_lens(self.model, self.trace):
            best, ids = logits[0, :MAX_TOKENS].softmax(-1).max(dim=-1)  # (T,) each
            chances.append(best.cpu().numpy())
            words.append([self.label(i) for i in ids.tolist()])
        figures.draw_grid(
            target,
            np.stack(chances),
            ["embedding", *(f"block {i}" for i in range(self.config.n_layer))],
            self.labels[:MAX_TOKENS],
            cells=words,
            title="Logit lens: what the head would write, read after each block",
            x="token that was read",
            bar="probability of the likeliest next token",
            limits=(0, 1),
        )

    def attribution(self, token: str | None = None, target: Path | None = None) -> list[str]:
        """Which part added how much to the logit of a token, or of the likeliest next one."""
        chosen = self._token(token)
        parts = attribution(self.model, self.trace, chosen)
        ordered = sorted(parts, key=lambda part: -abs(part.value))
        first, rest, whole = ordered[:_PARTS], ordered[_PARTS:], f"logit of {self.label(chosen)}"
        rows = [["part", "adds"], *([name, f"{value:+.4f}"] for name, value in first)]
        if rest:
            rows.append([f"{len(rest)} more", f"{sum(part.value for part in rest):+.4f}"])
        rows.append([whole, f"{sum(part.value for part in parts):+.4f}"])
        if target is not None:
            figures.draw_bars(
                target,
                [part.value for part in first],
                [part.part for part in first],
                title=f"Who wrote the {whole}",
                x="added to the logit",
            )
        return self._said(aligned(rows).splitlines(), target, of_tokens=False)

    def loss(self, target: Path | None = None) -> list[str]:
        """How surprised the model is by each token but the first, in nats, and how many tokens it
        held to be likelier, plus one."""
        if self.tokens.size(1) < 2:
            raise UserError("a loss takes two tokens at least: the first is not predicted")
        losses = self.trace["loss"][0]  # (T - 1,)
        logits = self.trace.tensor("logits")[0, :-1]  # (T - 1, V)
        chosen = logits.gather(1, self.tokens[0, 1:, None])
        ranks = (1 + (logits > chosen).sum(dim=1)).tolist()
        rows = [["token", "loss", "rank"]]
        for label, loss, rank in zip(self.labels[1:], losses, ranks, strict=True):
            rows.append([label, f"{loss:.4f}", f"{rank:,}"])
        rows.append(["mean", f"{losses.mean():.4f}", ""])
        if target is not None:
            figures.draw_bars(
                target,
                losses[:MAX_TOKENS].tolist(),
                self.labels[1 : MAX_TOKENS + 1],
                title=f"Loss of each token, {losses.mean():.3f} on average",
                x="loss (nats)",
                guess=float(np.log(self.config.vocab_size)),
            )
        return self._said(aligned(rows).splitlines(), target)

    def patch(self, other: str, token: str | None = None, target: Path | None = None) -> list[str]:
        """How much each place of each block's stream, taken from the pass over `other`, moves the
        logit of a token."""
        source = record(self.model, self._read(other), keep=("token_embedding", "resid_post"))
        chosen = self._token(token)
        moved = patch_map(self.model, self.tokens, source, chosen)  # (L, T)
        shown = self.label(chosen)
        rows = [["after block", *self.labels]]
        rows += [[str(layer), *(f"{x:+.2f}" for x in row)] for layer, row in enumerate(moved)]
        if target is not None:
            figures.draw_grid(
                target,
                moved[:, :MAX_TOKENS],
                [f"block {i}" for i in range(self.config.n_layer)],
                self.labels[:MAX_TOKENS],
                title=f"Patching: how much one place from the other text moves {shown}",
                x="token whose place is taken",
                bar=f"change of the logit of {shown}",
            )
        says = f"logit of {shown}, when one place is taken from the other text:"
        return self._said([says, *aligned(rows).splitlines()], target)

    # -- what they share -------------------------------------------------------------------------

    def _said(
        self, view: list[str], target: Path | None = None, *, of_tokens: bool = True
    ) -> list[str]:
        lines = [*self.notes, *(self._effect() if self.edits else []), *view]
        if target is not None:
            cut = of_tokens and self.tokens.size(1) > MAX_TOKENS
            only = f"; only the first {MAX_TOKENS} tokens are drawn" if cut else ""
            lines.append(f"figure: {target}{only}")
        return lines

    def _effect(self) -> list[str]:
        """Next token and loss, without and with the changes."""
        plain = record(self.model, self.tokens, keep=["logits", "loss"], loss=True)
        lines = []
        for name, trace in (("as it is", plain), ("changed", self.trace)):
            loss = ""
            if "loss" in trace.activations:
                loss = f"loss {trace.tensor('loss').mean().item():.4f} · "
            likely = "  ".join(self._likely(trace.tensor("logits")[0, -1]))
            lines.append(f"{name}: {loss}next {likely}")
        return [*lines, ""]

    def _likely(self, logits: torch.Tensor) -> list[str]:
        """The likeliest next tokens with their probabilities."""
        chances, ids = logits.softmax(-1).topk(min(_SHOWN, logits.numel()))
        found = zip(ids.tolist(), chances.tolist(), strict=True)
        return [f"{self.label(i)} {chance:.3f}" for i, chance in found]

    def _token(self, token: str | None) -> int:
        """The token that is asked about; by default the likeliest next one."""
        if token is None:
            return int(self.trace.tensor("logits")[0, -1].argmax())
        ids = self.loaded.encode_prompt(token)
        if len(ids) != 1:
            raise UserError(f"--token {token!r} is {len(ids)} tokens for this model; name one")
        return ids[0]
