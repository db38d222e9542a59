"""A trace that answers a page: tokens, numbers and where they come from, the logit lens, losses.

    shown = ShownTrace(loaded, tokens); shown.lens(first=0, end=12).rows[-1].positions[0].top

Answers are dataclasses and arrays; this module knows no HTTP.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from glassgpt.api import LoadedModel
from glassgpt.errors import UserError
from glassgpt.inference.generate import probabilities
from glassgpt.interpret.explain import Sum, explain
from glassgpt.interpret.lens import attribution, logit_lens
from glassgpt.interpret.operations import Edit
from glassgpt.studio.held_trace import HeldTrace, MissingError, as_batch
from glassgpt.studio.requests import DistributionRequest
from glassgpt.studio.sampling import Distribution, distribution, sampling_of
from glassgpt.studio.token_display import ShownToken, likeliest, shown_bytes, text_of

_MOST_POSITIONS = 128  # of the lens in one answer: each has a whole vocabulary, L + 1 times


@dataclass(frozen=True)
class CellIndex:
    name: str
    index: Sequence[int]


@dataclass(frozen=True)
class ShownTerm:
    label: str
    value: float
    factors: list[float]
    sources: list[CellIndex | None]
    from_: CellIndex | None  # the first source that is a cell


@dataclass(frozen=True)
class ShownSum:
    terms: list[ShownTerm]
    rest: dict[str, float]
    total: float


@dataclass(frozen=True)
class CellAnswer:
    name: str
    index: Sequence[int]
    value: float
    how: str
    formula: str
    terms: list[ShownTerm]
    rest: dict[str, float]
    total: float
    difference: float
    denominator: ShownSum | None


@dataclass(frozen=True)
class LensToken(ShownToken):
    p: float


@dataclass(frozen=True)
class LensPosition:
    top: list[LensToken]
    entropy: float
    p_final: float  # probability of the token that the last layer finds likeliest


@dataclass(frozen=True)
class LensRow:
    name: str
    label: str
    positions: list[LensPosition]


@dataclass(frozen=True)
class LensAnswer:
    from_: int
    to: int
    rows: list[LensRow]
    final: list[int]


@dataclass(frozen=True)
class AttributionAnswer:
    token: int
    against: int | None
    position: int
    logit: float
    parts: list[dict[str, str | float]]


@dataclass(frozen=True)
class LossAnswer:
    """For each token, in nats; None for the first, which nothing precedes."""

    loss: list[float | None]
    rank: list[int | None]
    entropy: list[float | None]
    mean: float | None
    bits_per_byte: float | None


@dataclass(frozen=True)
class ComparedToken(ShownToken):
    a: float
    b: float


@dataclass(frozen=True)
class CompareAnswer:
    next: dict[str, float | list[ComparedToken]]
    loss: dict[str, list[float | None]] | None  # None: the texts differ in length


class ShownTrace(HeldTrace):
    """A held trace with the tokenizer of its text."""

    def __init__(
        self, loaded: LoadedModel, tokens: Sequence[int], edits: Mapping[str, Edit] | None = None
    ) -> None:
        super().__init__(loaded.model, as_batch(loaded.model, tokens), edits)
        self.tokenizer = loaded.tokenizer
        # A padded vocabulary has ids that are never drawn.
        self.next_logits = self.last_logits[: loaded.tokenizer.vocab_size]

    def small_maps(self) -> np.ndarray:
        """Small pictures of all attention patterns: (L, H, side, side), 255 is all attention."""
        return self.maps

    def window(
        self, name: str, head: int | None = None, rows: str = "", columns: str = ""
    ) -> np.ndarray:
        """An activation, or the rows and columns of it that are named (rows="0:64"), float32."""
        found = self.read(name, head, _slice(rows))
        if columns and found.dim() > 1:
            found = found[..., _slice(columns)]
        return np.ascontiguousarray(found.numpy())

    def cell(self, name: str, index: str) -> CellAnswer:
        """Where one number of an activation comes from (index="0,3,5")."""
        try:
            given = [int(number) for number in index.split(",")]
        except ValueError:
            raise UserError(f"index={index!r}: write numbers, as in index=0,3,5") from None
        at, ids = self.check_cell(name, given), self.tokens[0].tolist()
        origin = explain(self.model, ids, self.read, name, at, self.edits)
        top, bottom = _shown(origin.sum), origin.denominator and _shown(origin.denominator)
        named = (name, at, origin.value, origin.how, origin.formula)
        return CellAnswer(*named, top.terms, top.rest, top.total, origin.difference, bottom)

    def lens(self, first: int | None = None, end: int | None = None, k: int = 5) -> LensAnswer:
        """What the head would say after each block, at the positions `first` to `end`."""
        if k < 1:
            raise UserError(f"k={k}: the lens shows 1 token or more")
        end = self.n_tokens if end is None else min(end, self.n_tokens)
        first = max(0, end - 24) if first is None else max(0, first)
        if not 0 < end - first <= _MOST_POSITIONS:
            raise UserError(f"positions {first} to {end}: the lens shows 1 to {_MOST_POSITIONS}")
        V, rows = self.tokenizer.vocab_size, []
        final = self.read("logits", None, slice(first, end))[:, :V].argmax(-1)  # (T',)
        for name, logits in logit_lens(self.model, self, slice(first, end)):
            chance = logits[0, :, :V].float().cpu().softmax(-1)  # (T', V)
            best, text = chance.topk(min(k, chance.size(-1))), partial(text_of, self.tokenizer)
            entropies = torch.special.entr(chance).sum(-1).tolist()
            finals = chance.gather(1, final[:, None])[:, 0].tolist()
            tops = [
                [LensToken(i, text(i), p) for i, p in zip(ids, some, strict=True)]
                for ids, some in zip(best.indices.tolist(), best.values.tolist(), strict=True)
            ]
            label = "embedding" if name.endswith("resid_pre") else f"block {name.split('.')[1]}"
            rows.append(LensRow(name, label, [*map(LensPosition, tops, entropies, finals)]))
        return LensAnswer(first, end, rows, final.tolist())

    def attribution(
        self, position: int = -1, token: int | None = None, against: int | None = None
    ) -> AttributionAnswer:
        """What each part added to a logit; to that of the likeliest token where none is named."""
        position = self._position(position)
        logits = self.read("logits", None, slice(position, position + 1))[0]
        token = int(logits.argmax()) if token is None else token
        found = attribution(self.model, self, token, position=position, against=against)
        value = logits[token] - (0 if against is None else logits[against])
        parts = [part._asdict() for part in found]
        return AttributionAnswer(token, against, position, value.item(), parts)

    def loss(self) -> LossAnswer:
        losses, ranks, entropies = self.surprise()
        n_bytes = sum(len(shown_bytes(self.tokenizer, i)) for i in self.tokens[0, 1:].tolist())
        return LossAnswer(
            [None, *losses.tolist()],
            [None, *map(int, ranks)],
            [None, *entropies.tolist()],
            mean=float(losses.mean()) if len(losses) else None,
            bits_per_byte=float(losses.sum()) / math.log(2) / n_bytes if n_bytes else None,
        )

    def distribution(self, asked: DistributionRequest) -> Distribution:
        """What each filter of sampling does to the tokens that may follow a position."""
        position, logits = self._position(asked.position), self.next_logits
        if position < self.n_tokens - 1:
            logits = self.read("logits", None, slice(position, position + 1))[0].numpy()
        seen = self.tokens[0, : position + 1].tolist() if asked.seen is None else asked.seen
        logits = logits[: self.tokenizer.vocab_size]
        return distribution(self.tokenizer, logits, set(seen), sampling_of(asked), asked.show)

    def compare(self, other: ShownTrace) -> CompareAnswer:
        """What is likely next in both, and the losses of all tokens."""
        if other.tokenizer.spec != self.tokenizer.spec:
            raise UserError(
                "the two models have different tokenizers, so their tokens can't be compared"
            )
        p, q = probabilities(self.next_logits), probabilities(other.next_logits)
        tiny = np.finfo(np.float64).tiny
        kl = float((p * (np.log(p + tiny) - np.log(q + tiny))).sum())
        tokens = [
            ComparedToken(i, text_of(self.tokenizer, i), float(p[i]), float(q[i]))
            for i in likeliest(np.maximum(p, q), 20)
        ]
        same = self.n_tokens == other.n_tokens
        loss = {"a": self.loss().loss, "b": other.loss().loss} if same else None
        return CompareAnswer({"kl": kl, "tokens": tokens}, loss)

    def _position(self, position: int) -> int:
        """Counted from the front, where it may be negative as in Python."""
        if not -self.n_tokens <= position < self.n_tokens:
            has = f"the text has {self.n_tokens} tokens"
            raise MissingError(f"there is no position {position}; {has}")
        return position % self.n_tokens


def _shown(found: Sum) -> ShownSum:
    terms = []
    for term in found.terms:
        sources = [source and CellIndex(*source) for source in term.sources]
        first = next(filter(None, sources), None)
        terms.append(ShownTerm(term.label, term.value, term.factors, sources, first))
    return ShownSum(terms, {"count": found.rest_count, "value": found.rest}, found.total)


def _slice(text: str) -> slice:
    """ "3:7" as Python reads it."""
    first, _, end = text.partition(":")
    try:
        return slice(int(first) if first else None, int(end) if end else None)
    except ValueError:
        raise UserError(f"{text!r} is no range; write 0:64") from None
