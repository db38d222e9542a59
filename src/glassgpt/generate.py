"""From a prompt to text: filters on logits, the sampler, stop rules, streaming.

    for piece in stream(engine, tokenizer, tokenizer.encode("Once"), Sampling(temperature=0.8)):
        print(piece.text, end="")

The filters are pure functions on NumPy arrays; any engine gives the same text for the same
logits, because the random numbers depend on (seed, sample, position) alone. This room knows
no model and no torch.
"""

from __future__ import annotations

import codecs
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from glassgpt.config import Sampling
from glassgpt.engine import Engine
from glassgpt.errors import UserError
from glassgpt.tokenizer import Tokenizer

_CACHE_NUMBERS = 1 << 28  # keys and values of the samples that grow side by side: 1 GB in float32
FinishReason = Literal["length", "stop", "end_of_text"]


@dataclass(frozen=True)
class Piece:
    """Text that sample number `sample` has grown by; the last one says why it ended."""

    sample: int
    text: str
    finish_reason: FinishReason | None = None


# -- filters: logits (V,) in, logits (V,) out; what is left out becomes -inf ----------------------


def penalize_repetition(logits: np.ndarray, seen: np.ndarray, penalty: float) -> np.ndarray:
    """Lower the tokens in `seen` (ids): CTRL, arXiv:1909.05858, section 4.1."""
    logits = np.array(logits, dtype=np.float64)
    seen = seen[seen < len(logits)]  # a padded vocabulary has ids that none draws
    logits[seen] = np.where(logits[seen] > 0, logits[seen] / penalty, logits[seen] * penalty)
    return logits


def keep_top_k(logits: np.ndarray, k: int) -> np.ndarray:
    """Exactly the k largest; of equal ones the lowest ids."""
    if k >= len(logits):
        return logits
    least = np.partition(logits, -k)[-k]  # a sort of GPT-2's vocabulary takes ten times as long
    above, equal = np.flatnonzero(logits > least), np.flatnonzero(logits == least)
    return _keep(logits, np.concatenate([above, equal[: k - len(above)]]))


def keep_top_p(logits: np.ndarray, p: float) -> np.ndarray:
    """The fewest tokens whose probabilities reach p (nucleus sampling, arXiv:1904.09751)."""
    if p >= 1:
        return logits
    left = np.flatnonzero(logits > -np.inf)  # few after top-k
    values = logits[left]
    chance = probabilities(values)
    # Sorting GPT-2's vocabulary takes 5 ms. So tokens go by steps of 1/16 below the likeliest,
    # and only those of the step on which p is reached are sorted.
    step = np.minimum(16 * (values.max() - values), 2000).astype(np.int64)
    last = np.searchsorted(np.cumsum(np.bincount(step, chance)), p)
    above, border = np.flatnonzero(step < last), np.flatnonzero(step == last)
    border = border[np.argsort(-values[border], kind="stable")]
    n = int(np.searchsorted(chance[above].sum() + np.cumsum(chance[border]), p)) + 1
    return _keep(logits, left[np.concatenate([above, border[:n]])])


def keep_min_p(logits: np.ndarray, p: float) -> np.ndarray:
    """Tokens at least p times as likely as the likeliest (arXiv:2407.01082)."""
    return np.where(logits >= logits.max() + np.log(p), logits, -np.inf)


def _keep(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    filtered = np.full_like(logits, -np.inf)
    filtered[ids] = logits[ids]
    return filtered


def probabilities(logits: np.ndarray) -> np.ndarray:
    """Softmax of (V,) logits in float64."""
    weights = np.subtract(logits, logits.max(), dtype=np.float64)
    np.exp(weights, out=weights)
    weights /= weights.sum()
    return weights


def filter_logits(logits: np.ndarray, seen: Collection[int], how: Sampling) -> np.ndarray:
    """All filters of `how`, in order; `seen`: ids for the repetition penalty, in any order.

    Temperature 0 leaves only the likeliest token. Raises `UserError` for NaN and infinity.
    """
    largest = logits.max()  # NaN if there is one anywhere
    if not np.isfinite(largest):
        what = "NaN" if np.isnan(largest) else "infinite"
        raise UserError(f"the model's logits are {what}: its weights are broken")
    if how.repetition_penalty is not None:
        ids = np.fromiter(seen, dtype=np.int64, count=len(seen))
        logits = penalize_repetition(logits, ids, how.repetition_penalty)
    if how.temperature < 1e-100:  # the quotient would overflow, and nothing else has a chance
        return _keep(logits, np.array([logits.argmax()]))
    logits = np.divide(logits, how.temperature, dtype=np.float64)
    if how.top_k is not None:
        logits = keep_top_k(logits, how.top_k)
    if how.top_p is not None:
        logits = keep_top_p(logits, how.top_p)
    if how.min_p is not None:
        logits = keep_min_p(logits, how.min_p)
    return logits


def draw(logits: np.ndarray, *, seed: int, sample: int, position: int) -> int:
    """One token id from (V,) logits; the random number is a function of its three coordinates."""
    generator = np.random.Generator(np.random.Philox(key=[seed, sample], counter=position))
    ids = np.flatnonzero(logits > -np.inf)
    cumulative = np.cumsum(probabilities(logits[ids]))
    index = np.searchsorted(cumulative, generator.random() * cumulative[-1], side="right")
    return int(ids[min(index, len(ids) - 1)])


# -- the loop ------------------------------------------------------------------------------------


def window(tokens: np.ndarray, context_length: int) -> np.ndarray:
    """What the model sees when it is fed anew: at most half a context of the newest tokens.

    Every engine slides in the same way: when the context is full, it starts again with the last
    `context_length // 2` tokens, so that the price of re-reading is paid rarely.
    """
    return tokens[:, -max(1, context_length // 2) :]


def stream(
    engine: Engine, tokenizer: Tokenizer, prompt: Sequence[int], how: Sampling
) -> Iterator[Piece]:
    """Grow `how.num_samples` completions of `prompt` (token ids), as many side by side as
    memory should hold.

    Yields text as soon as whole characters are there and no stop string can begin in it. An
    empty prompt starts from the document separator, or from a line break where there is none.
    """
    config = engine.config
    per_row = 2 * config.n_layer * config.n_kv_head * config.head_dim * config.context_length
    together = max(1, _CACHE_NUMBERS // max(per_row, config.vocab_size))
    for first in range(0, how.num_samples, together):
        samples = range(first, min(how.num_samples, first + together))
        rows = [_Row(i, list(prompt), tokenizer, how) for i in samples]
        yield from _grow(engine, tokenizer, rows, how)


def _grow(engine: Engine, tokenizer: Tokenizer, rows: list[_Row], how: Sampling) -> Iterator[Piece]:
    """One batch of completions, to the end."""
    if how.max_new_tokens == 0:
        yield from (Piece(row.index, "", "length") for row in rows)
        return
    limit = engine.config.context_length
    start = rows[0].seen or _first_tokens(tokenizer)
    tokens = np.array([start] * len(rows))
    logits = engine.start(tokens[:, -limit:])
    length = min(len(start), limit)
    for position in range(how.max_new_tokens):
        chosen = np.zeros(len(rows), dtype=np.int64)
        for i, row in enumerate(rows):
            if not row.finished:
                chosen[i] = row.choose(logits[i], position)
                yield from row.take(int(chosen[i]))
        if all(row.finished for row in rows):
            return
        if position + 1 == how.max_new_tokens:
            break
        tokens = np.concatenate([tokens[:, -limit:], chosen[:, None]], axis=1)
        if length == limit:
            tokens = window(tokens, limit)
            logits, length = engine.start(tokens), tokens.shape[1]
        else:
            logits, length = engine.step(chosen), length + 1
    for row in rows:
        if not row.finished:
            yield Piece(row.index, row.flush(), "length")


def complete(
    engine: Engine, tokenizer: Tokenizer, prompt: Sequence[int], how: Sampling
) -> list[Piece]:
    """The finished completions, one `Piece` per sample with all of its text."""
    texts = [""] * how.num_samples
    reasons: list[FinishReason | None] = [None] * how.num_samples
    for piece in stream(engine, tokenizer, prompt, how):
        texts[piece.sample] += piece.text
        reasons[piece.sample] = piece.finish_reason or reasons[piece.sample]
    return [Piece(i, text, reasons[i]) for i, text in enumerate(texts)]


def _first_tokens(tokenizer: Tokenizer) -> list[int]:
    if tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    return tokenizer.encode("\n")


class IncrementalDecoder:
    """Turns a stream of ids into text as soon as whole characters are there.

    >>> from glassgpt.tokenizer import byte_tokenizer
    >>> tok = byte_tokenizer(); decoder = IncrementalDecoder(tok)
    >>> [decoder.push(token) for token in tok.encode("é")], decoder.flush()
    (['', 'é'], '')
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a character is unfinished."""
        return self._utf8.decode(self._bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that never was finished."""
        return self._utf8.decode(b"", final=True)


class _Row:
    """One completion in the making."""

    def __init__(self, index: int, prompt: list[int], tokenizer: Tokenizer, how: Sampling) -> None:
        self.index, self.seen, self.how = index, prompt, how
        self.vocab_size = tokenizer.vocab_size
        self.decoder = IncrementalDecoder(tokenizer)
        self.end_of_text = tokenizer.end_of_text
        self.held = ""  # text that may be the beginning of a stop string
        self.finished = False

    def choose(self, logits: np.ndarray, position: int) -> int:
        logits = filter_logits(logits[: self.vocab_size], self.seen, self.how)
        return draw(logits, seed=self.how.seed, sample=self.index, position=position)

    def take(self, token: int) -> Iterator[Piece]:
        self.seen.append(token)
        if token == self.end_of_text:
            self.finished = True
            yield Piece(self.index, self.flush(), "end_of_text")
            return
        self.held += self.decoder.push(token)
        found = [at for stop in self.how.stop if (at := self.held.find(stop)) >= 0]
        if found:
            self.finished = True
            yield Piece(self.index, self.held[: min(found)], "stop")
            return
        keep = self._possible_stop()
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
        if text:
            yield Piece(self.index, text)

    def flush(self) -> str:
        return self.held + self.decoder.flush()

    def _possible_stop(self) -> int:
        """Length of the longest end of `held` with which a stop string begins."""
        longest = max((len(stop) for stop in self.how.stop), default=1) - 1
        for n in range(min(longest, len(self.held)), 0, -1):
            if any(stop.startswith(self.held[-n:]) for stop in self.how.stop):
                return n
        return 0
