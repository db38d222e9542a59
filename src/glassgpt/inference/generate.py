"""From logits to text: filters, the random choice of a token, stop rules, streaming.

    for piece in stream(engine, tokenizer, [tokenizer.encode("Once")], Sampling(temperature=0.8)):
        print(piece.text, end="")

Filters are pure functions of NumPy arrays; random numbers depend on (seed, sample, position) alone.
So engines with equal logits write equal texts, and a prompt continues in a batch as it does alone.
This module knows neither models nor torch.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from glassgpt.config import Sampling
from glassgpt.errors import UserError
from glassgpt.inference.engines import Engine
from glassgpt.tokenizers.tokenizer import IncrementalDecoder, Tokenizer

_CACHE_NUMBERS = 1 << 28  # keys and values of all texts written side by side: 1 GB in float32
FinishReason = Literal["length", "stop", "end_of_text"]


@dataclass(frozen=True)
class Piece:
    """What has been added to one text; the last piece of a text says why it ended."""

    sample: int  # which of the samples of its prompt, from 0
    text: str
    finish_reason: FinishReason | None = None
    prompt: int = 0  # which of the prompts, from 0


# -- filters: logits (V,) -> logits (V,); a token that is ruled out gets -inf ---------------------


def penalize_repetition(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Lower the logits of the ids in `seen` (CTRL, arXiv:1909.05858, section 4.1)."""
    logits = np.array(logits, dtype=np.float64)
    seen = seen[seen < len(logits)]  # a padded vocabulary has ids that are never drawn
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Keep exactly the k largest; of equal logits, those with the lowest ids."""
    if k >= len(logits):
        return logits
    least = np.partition(logits, -k)[-k]  # ten times as fast as sorting GPT-2's vocabulary
    above, equal = np.flatnonzero(logits > least), np.flatnonzero(logits == least)
    return _keep(logits, np.concatenate([above, equal[: k - len(above)]]))


def keep_top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Keep the fewest tokens whose probabilities add up to p (nucleus: arXiv:1904.09751)."""
    if p >= 1:
        return logits
    values = logits[left := np.flatnonzero(logits > -np.inf)]  # few after top-k
    chance = probabilities(values)
    # Sorting GPT-2's vocabulary would take 5 ms. Instead, tokens are grouped by how far they are
    # below the likeliest one, in steps of 1/16, and only the group in which p is reached is sorted.
    step = np.minimum(16 * (values.max() - values), 2000).astype(np.int64)
    last = np.searchsorted(np.cumsum(np.bincount(step, chance)), p)
    above, border = np.flatnonzero(step < last), np.flatnonzero(step == last)
    border = border[np.argsort(-values[border], kind="stable")]
    n = int(np.searchsorted(chance[above].sum() + np.cumsum(chance[border]), p)) + 1
    return _keep(logits, left[np.concatenate([above, border[:n]])])


def keep_min_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Keep the tokens that are at least p times as likely as the likeliest (arXiv:2407.01082)."""
    return np.where(logits >= logits.max() + np.log(p), logits, -np.inf)


def _keep(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    filtered = np.full_like(logits, -np.inf)
    filtered[ids] = logits[ids]
    return filtered


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of (V,) logits in float64."""
    weights = np.exp(np.subtract(logits, logits.max(), dtype=np.float64))
    return weights / weights.sum()


def filter_logits(logits: np.ndarray, seen: Collection[int], how: Sampling) -> np.ndarray:
    """Apply all filters of `how`, in order; `seen` are the ids for the repetition penalty.

    Temperature 0 keeps only the likeliest token. Raises `UserError` for NaN and infinity.
    """
    largest = logits.max()  # NaN if there is one anywhere
    if not np.isfinite(largest):
        what = "NaN" if np.isnan(largest) else "infinite"
        raise UserError(f"the model's logits are {what}: its weights are broken")
    if how.repetition_penalty is not None:
        ids = np.fromiter(seen, dtype=np.int64, count=len(seen))
        logits = penalize_repetition(logits, ids, how.repetition_penalty)
    if how.temperature < 1e-100:  # dividing would overflow; only the likeliest has a chance
        return _keep(logits, np.array([logits.argmax()]))
    logits = np.divide(logits, how.temperature, dtype=np.float64)
    if how.top_k is not None:
        logits = keep_top_k(logits, how.top_k)
    if how.top_p is not None:
        logits = keep_top_p(logits, how.top_p)
    if how.min_p is not None:
        logits = keep_min_p(logits, how.min_p)
    return logits


def draw_token(logits: np.ndarray, *, seed: int, sample: int, position: int) -> int:
    """Draw a token id from (V,) logits; the random number depends on the rest alone."""
    generator = np.random.Generator(np.random.Philox(key=[seed, sample], counter=position))
    ids = np.flatnonzero(logits > -np.inf)
    cumulative = np.cumsum(probabilities(logits[ids]))
    index = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
    return int(ids[min(index, len(ids) - 1)])


# -- the loop ------------------------------------------------------------------------------------


def context_start(n_prompt: int, n_tokens: int, context_length: int) -> int:
    """From which of `n_tokens` on the model sees a text whose first `n_prompt` are the prompt.

    A text that outgrows the context restarts with its newest half, so that reading it again, the
    expensive part, happens rarely. Then it grows until the context is full once more.
    """
    start, half = max(0, n_prompt - context_length), max(1, context_length // 2)
    too_many = n_tokens - start - context_length
    if too_many <= 0:
        return start
    return n_tokens - half - (too_many - 1) % (context_length - half + 1)


def stream(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    ends: Collection[int] = (),
) -> Iterator[Piece]:
    """Continue each prompt (ids) `how.num_samples` times, as many texts at once as fit in memory.

    Yields text as soon as its characters are complete and no stop string can begin in it. An empty
    prompt means `first_tokens`; of a prompt longer than the context, the model sees the end. `ends`
    are ids that end a text, besides the tokenizer's own. Raises `UserError` for broken logits.
    """
    config = engine.config
    longest = max(map(len, prompts), default=0) + how.max_new_tokens
    positions = min(config.context_length, max(256, 2 * longest))  # engines double their room
    per_row = 2 * config.n_layer * config.n_kv_head * config.head_dim * positions
    together = max(1, _CACHE_NUMBERS // max(per_row, config.vocab_size))
    wanted = list(itertools.product(range(len(prompts)), range(how.num_samples)))
    for first in range(0, len(wanted), together):
        batch = enumerate(wanted[first : first + together])
        rows = [_Row(i, *which, prompts[which[0]], tokenizer, how, ends) for i, which in batch]
        try:
            yield from _grow(engine, rows, how)
        except MemoryError as error:
            raise UserError(
                f"{len(rows)} texts of up to {longest:,} tokens do not fit in memory; "
                "ask for fewer or for shorter ones"
            ) from error


def _grow(engine: Engine, rows: list[_Row], how: Sampling) -> Iterator[Piece]:
    """Write one batch of texts to the end; a text that is finished costs nothing more."""
    for position in range(how.max_new_tokens):
        if position == 0:
            engine.open(len(rows))
            logits = _read_prompts(engine, rows)
        else:
            new = [_next_tokens(engine, row) for row in rows]
            logits = engine.read([row.number for row in rows], new)
        for row, its_logits in zip(rows, logits, strict=True):
            yield from row.take(row.choose(its_logits, position))
        rows = [row for row in rows if not row.finished]
        if not rows:
            return
    yield from (row.piece(row.flush(), "length") for row in rows)


def _read_prompts(engine: Engine, rows: list[_Row]) -> list[np.ndarray]:
    """Logits (V,) after each row's prompt; a prompt that rows share is read once and copied."""
    sharing: dict[tuple[int, ...], list[_Row]] = defaultdict(list)
    for row in rows:
        row.start = context_start(row.n_prompt, row.n_prompt, engine.config.context_length)
        sharing[tuple(row.tokens[row.start :])].append(row)
    readers = [row.number for row, *_ in sharing.values()]
    logits = engine.read(readers, [np.array(tokens) for tokens in sharing])
    after: dict[int, np.ndarray] = {}
    for (reader, *others), its_logits in zip(sharing.values(), logits, strict=True):
        if others:
            engine.copy(reader.number, [row.number for row in others])
        after |= {row.number: its_logits for row in (reader, *others)}
    return [after[row.number] for row in rows]


def _next_tokens(engine: Engine, row: _Row) -> np.ndarray:
    """What the row reads next: its newest token or, when its context was full, the newest half."""
    start = context_start(row.n_prompt, len(row.tokens), engine.config.context_length)
    if start == row.start:
        return np.array(row.tokens[-1:])
    engine.rewind(row.number)
    row.start = start
    return np.array(row.tokens[start:])


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    ends: Collection[int] = (),
) -> list[Piece]:
    """The finished texts, each in one `Piece`, prompt by prompt and sample by sample."""
    wanted = itertools.product(range(len(prompts)), range(how.num_samples))
    texts = {(prompt, sample): Piece(sample, "", None, prompt) for prompt, sample in wanted}
    for piece in stream(engine, tokenizer, prompts, how, ends):
        which = piece.prompt, piece.sample
        texts[which] = replace(piece, text=texts[which].text + piece.text)
    return list(texts.values())


def first_tokens(tokenizer: Tokenizer) -> list[int]:
    """What an empty prompt stands for: the separator of documents; without one, a line break."""
    separator = tokenizer.end_of_text
    return tokenizer.encode("\n") if separator is None else [separator]


class _Row:
    """A text that is being written: its tokens, and what of it is not yet shown."""

    def __init__(
        self,
        number: int,
        prompt: int,
        sample: int,
        tokens: Sequence[int],
        tokenizer: Tokenizer,
        how: Sampling,
        ends: Collection[int],
    ) -> None:
        self.number, self.prompt, self.sample, self.how = number, prompt, sample, how
        self.tokens = list(tokens) or first_tokens(tokenizer)
        self.seen = set(tokens)  # for the repetition penalty, which spares `first_tokens`
        self.n_prompt = len(self.tokens)
        self.start = 0  # the first of `tokens` that the engine's row holds
        self.vocab_size = tokenizer.vocab_size
        self.decoder = IncrementalDecoder(tokenizer)
        self.ends = {tokenizer.end_of_text, *ends}
        self.held = ""  # text that may turn out to begin a stop string
        self.finished = False

    def choose(self, logits: np.ndarray, position: int) -> int:
        try:
            logits = filter_logits(logits[: self.vocab_size], self.seen, self.how)
        except UserError as error:
            where = f"prompt {self.prompt + 1}, sample {self.sample + 1}, token {position + 1}"
            raise UserError(f"{where}: {error}") from None
        return draw_token(logits, seed=self.how.seed, sample=self.sample, position=position)

    def take(self, token: int) -> Iterator[Piece]:
        self.tokens.append(token)
        self.seen.add(token)
        if token in self.ends:
            self.finished = True
            yield self.piece(self.flush(), "end_of_text")
            return
        self.held += self.decoder.push(token)
        found = [at for stop in self.how.stop if (at := self.held.find(stop)) >= 0]
        if found:
            self.finished = True
            yield self.piece(self.held[: min(found)], "stop")
            return
        shown = len(self.held) - self._possible_stop()
        text, self.held = self.held[:shown], self.held[shown:]
        if text:
            yield self.piece(text)

    def flush(self) -> str:
        return self.held + self.decoder.flush()

    def piece(self, text: str, finish_reason: FinishReason | None = None) -> Piece:
        return Piece(self.sample, text, finish_reason, self.prompt)

    def _possible_stop(self) -> int:
        """Length of the longest end of `held` with which a stop string begins."""
        longest = max((len(stop) for stop in self.how.stop), default=1) - 1
        for n in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-n:]) for stop in self.how.stop):
                return n
        return 0
