"""How the next token is drawn: what each filter leaves, and the tokens of `glassgpt sample`.

distribution(tokenizer, logits, seen, sampling, show=60); PrefixReader(model, {}).logits(tokens)

The filters and the random numbers are those of generate.py. Here their effect is written down, and
keys and values of what was read last are kept from one question to the next.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace

import numpy as np
import torch

from glassgpt.api import LoadedModel
from glassgpt.cache import KVCache
from glassgpt.config import Sampling
from glassgpt.errors import UserError
from glassgpt.inference.generate import (
    context_start,
    draw_token,
    filter_logits,
    first_tokens,
    probabilities,
)
from glassgpt.interpret.operations import Edit
from glassgpt.interpret.trace import Bands, record
from glassgpt.model import GPT
from glassgpt.studio.held_trace import as_batch
from glassgpt.studio.requests import Filters, SampleRequest
from glassgpt.studio.token_display import ShownToken, entropy, likeliest, text_of
from glassgpt.tokenizers.tokenizer import Tokenizer

_OFF = asdict(Filters())
_MOST_TOKENS = 128  # drawn in one answer, so that a page never waits long
_MOST_SAMPLES = 1 << 32  # numbers of samples whose random numbers differ


@dataclass(frozen=True)
class FilterStage:
    """What is left after a filter."""

    name: str
    on: bool
    kept: int  # tokens
    mass: float  # probability that the kept tokens had before this filter
    entropy: float
    cut: float | None  # the least probability that was kept; None if nothing was cut


@dataclass(frozen=True)
class FilteredToken(ShownToken):
    logit: float
    p: float
    final: float  # probability after all filters
    cut_by: str | None  # the filter that removed it


@dataclass(frozen=True)
class Distribution:
    stages: list[FilterStage]
    tokens: list[FilteredToken]


@dataclass(frozen=True)
class DrawnToken(ShownToken):
    p: float
    final: float
    computed: int  # tokens that this pass read
    reused: int  # tokens whose keys and values were in the cache
    cache_bytes: int


@dataclass(frozen=True)
class SampleAnswer:
    tokens: list[DrawnToken]
    finish: str | None


def sampling_of(filters: Filters, seed: int = 0) -> Sampling:
    """Raises `UserError` for values that make no sense."""
    return Sampling(**{name: getattr(filters, name) for name in _OFF}, seed=seed)


def distribution(
    tokenizer: Tokenizer, logits: np.ndarray, seen: Collection[int], how: Sampling, show: int
) -> Distribution:
    """What each filter leaves, in the order in which they apply, and the `show` likeliest tokens
    before and after all of them. logits (V,)"""
    chance = before = probabilities(logits)
    stages = [FilterStage("all", True, len(logits), 1.0, entropy(chance), None)]
    cut_by: dict[int, str] = {}
    so_far = replace(how, **_OFF)
    for name, off in _OFF.items():
        value = getattr(how, name)
        so_far = replace(so_far, **{name: value})
        filtered = filter_logits(logits, seen, so_far)
        after, kept = probabilities(filtered), filtered > -np.inf
        n_kept, least = int(kept.sum()), None
        if n_kept < stages[-1].kept:
            least = float(before[kept].min())
            for token in np.flatnonzero(~kept).tolist():
                cut_by.setdefault(token, name)
        mass = float(before[kept].sum())
        stages.append(FilterStage(name, value != off, n_kept, mass, entropy(after), least))
        before = after
    tokens = []
    for i in likeliest(chance, show):
        logit, p, final = float(logits[i]), float(chance[i]), float(before[i])
        tokens.append(FilteredToken(i, text_of(tokenizer, i), logit, p, final, cut_by.get(i)))
    return Distribution(stages, tokens)


def draw_tokens(loaded: LoadedModel, reader: PrefixReader, asked: SampleRequest) -> SampleAnswer:
    """The next tokens, as `glassgpt sample` draws them with the same seed."""
    how, tokenizer = sampling_of(asked, asked.seed), loaded.tokenizer
    if not 0 <= asked.n <= _MOST_TOKENS:
        raise UserError(f"n={asked.n}: 0 to {_MOST_TOKENS} tokens at a time")
    if not 0 <= asked.sample < _MOST_SAMPLES:
        raise UserError(f"sample={asked.sample} must be 0 to {_MOST_SAMPLES - 1:,}")
    prompt = loaded.encode_prompt(asked.prompt) or first_tokens(tokenizer)
    tokens = prompt + loaded.encode_prompt(asked.new)
    seen = {*asked.prompt, *asked.new}
    ends = {tokenizer.end_of_text, *loaded.checkpoint.ends}
    first, end = len(asked.new), len(asked.new) + asked.n
    if asked.max_new_tokens is not None:
        end = min(end, asked.max_new_tokens)
    drawn: list[DrawnToken] = []
    finish = None
    for position in range(first, end):
        visible = tokens[context_start(len(prompt), len(tokens), loaded.config.context_length) :]
        logits, reused = reader.logits(visible)
        logits = logits[: tokenizer.vocab_size]
        filtered = filter_logits(logits, seen, how)
        token = draw_token(filtered, seed=how.seed, sample=asked.sample, position=position)
        p, final = (float(probabilities(x)[token]) for x in (logits, filtered))
        computed, size = len(visible) - reused, len(visible) * cache_bytes_per_token(loaded)
        drawn.append(DrawnToken(token, text_of(tokenizer, token), p, final, computed, reused, size))
        tokens.append(token)
        seen.add(token)
        if token in ends:
            finish = "end_of_text"
            break
    if finish is None and first + len(drawn) == asked.max_new_tokens:
        finish = "length"
    return SampleAnswer(drawn, finish)


def cache_bytes_per_token(loaded: LoadedModel) -> int:
    config = loaded.config
    numbers = 2 * config.n_layer * config.n_kv_head * config.head_dim
    return numbers * loaded.model.head.weight.element_size()


class PrefixReader:
    """A model that keeps keys and values of what it read last, and reads only what is new."""

    def __init__(self, model: GPT, edits: Mapping[str, Edit], *, caching: bool = True) -> None:
        """`caching=False`: for edits whose values depend on the whole text."""
        self.model, self.edits = model, edits
        weight = model.head.weight
        self._cache = None
        if caching:
            self._cache = KVCache(model.config, 1, dtype=weight.dtype, device=weight.device)
        self._tokens: list[int] = []

    def logits(self, tokens: Sequence[int]) -> tuple[np.ndarray, int]:
        """The logits (V,) after the last token, and how many tokens were in the cache already."""
        reused = 0
        if self._cache is not None:
            most = min(len(self._tokens), len(tokens) - 1)
            while reused < most and self._tokens[reused] == tokens[reused]:
                reused += 1
            self._cache.length = reused
        self._tokens = self._tokens[:reused]  # all that the cache holds if the pass fails
        new = as_batch(self.model, tokens[reused:])
        last = slice(-1, None)
        if self.edits:
            trace = record(
                self.model,
                new,
                edits=self.edits,
                keep=["logits"],
                cache=self._cache,
                positions=last,
                bands=Bands(),
            )
            logits = trace.tensor("logits")
        else:
            with torch.inference_mode():
                logits = self.model(new, cache=self._cache, positions=last)
        self._tokens = list(tokens)
        return logits[0, -1].float().cpu().numpy(), reused
