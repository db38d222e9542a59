"""From prompts to text: filters on logits, the sampler, stop rules, streaming.

    for piece in stream(engine, tokenizer, [tokenizer.encode("Once")], Sampling(temperature=0.8)):
        print(piece.text, end="")

The filters are pure functions on NumPy arrays; any engine gives the same text for the same
logits, because the random numbers depend on (seed, sample, position) alone. So a prompt of a
batch continues as it would alone. This room knows no model and no torch.
"""

from __future__ import annotations

import codecs
import itertools
from collections import defaultdict
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from glassgpt.config import Sampling
from glassgpt.errors import UserError
from glassgpt.inference.engines import Engine
from glassgpt.tokenizers.tokenizer import Tokenizer

_CACHE_NUMBERS = 1 << 28  # keys and values of the rows that grow side by side: 1 GB in float32
FinishReason = Literal["length", "stop", "end_of_text"]


@dataclass(frozen=True)
class Piece:
    """Text that sample number `sample` of a prompt has grown by; its last one says why it ended."""

    sample: int
    text: str
    finish_reason: FinishReason | None = None
    prompt: int = 0  # of several, in their order


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


def window(tokens: Sequence[int], context_length: int) -> Sequence[int]:
    """What the model sees when it is fed anew: at most half a context of the newest tokens.

    Every row slides in the same way: when its context is full, it starts again with the last
    `context_length // 2` tokens, so that the price of re-reading is paid rarely.
    """
    return tokens[-max(1, context_length // 2) :]


def stream(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    ends: Collection[int] = (),
) -> Iterator[Piece]:
    """Grow `how.num_samples` completions of each prompt (token ids), as many side by side as
    memory should hold. `ends`: ids that end a text, beside the tokenizer's own.

    Yields text as soon as whole characters are there and no stop string can begin in it. An
    empty prompt starts from the document separator, or from a line break where there is none;
    of one longer than the context the model sees the end. Raises `UserError` as soon as
    logits are NaN or infinite; what was yielded until then is good text.
    """
    config = engine.config
    longest = max(map(len, prompts), default=0) + how.max_new_tokens
    positions = min(config.context_length, max(256, 2 * longest))  # engines double their room
    per_row = 2 * config.n_layer * config.n_kv_head * config.head_dim * positions
    together = max(1, _CACHE_NUMBERS // max(per_row, config.vocab_size))
    wanted = list(itertools.product(range(len(prompts)), range(how.num_samples)))
    for first in range(0, len(wanted), together):
        rows = [
            _Row(number, prompt, sample, prompts[prompt], tokenizer, how, ends)
            for number, (prompt, sample) in enumerate(wanted[first : first + together])
        ]
        try:
            yield from _grow(engine, rows, how)
        except MemoryError as error:
            raise UserError(f"{len(rows)} texts of up to {longest:,} tokens do not fit in memory; "
                            "ask for fewer or for shorter ones") from error  # fmt: skip


def _grow(engine: Engine, rows: list[_Row], how: Sampling) -> Iterator[Piece]:
    """One batch of completions, to the end; a row that has finished costs nothing more."""
    if how.max_new_tokens == 0:
        yield from (row.piece("", "length") for row in rows)
        return
    engine.open(len(rows))
    logits = _read_prompts(engine, rows)
    for position in range(how.max_new_tokens):
        if position > 0:
            new = [_next_tokens(engine, row) for row in rows]
            logits = list(engine.read([row.number for row in rows], new))
        for row, its_logits in zip(rows, logits, strict=True):
            yield from row.take(row.choose(its_logits, position))
        rows = [row for row in rows if not row.finished]
        if not rows:
            return
    for row in rows:
        yield row.piece(row.flush(), "length")


def _read_prompts(engine: Engine, rows: list[_Row]) -> list[np.ndarray]:
    """Logits (V,) after each row's prompt; one that rows share is read once and copied."""
    sharing: dict[tuple[int, ...], list[_Row]] = defaultdict(list)
    for row in rows:
        sharing[tuple(row.tokens[-engine.config.context_length :])].append(row)
    readers = [row.number for row, *_ in sharing.values()]
    logits = engine.read(readers, [np.array(tokens) for tokens in sharing])
    after: dict[int, np.ndarray] = {}
    for (tokens, (reader, *others)), its_logits in zip(sharing.items(), logits, strict=True):
        if others:
            engine.copy(reader.number, [row.number for row in others])
        for row in (reader, *others):
            row.length, after[row.number] = len(tokens), its_logits
    return [after[row.number] for row in rows]


def _next_tokens(engine: Engine, row: _Row) -> np.ndarray:
    """What the row reads next: its newest token or, when its context is full, the window."""
    limit = engine.config.context_length
    new = row.tokens[-1:]
    if row.length == limit:
        engine.rewind(row.number)
        row.length, new = 0, window(row.tokens, limit)
    row.length += len(new)
    return np.array(new)


def complete(
    engine: Engine,
    tokenizer: Tokenizer,
    prompts: Sequence[Sequence[int]],
    how: Sampling,
    ends: Collection[int] = (),
) -> list[Piece]:
    """The finished completions, prompt by prompt and sample by sample: one `Piece` with all of
    the text for each."""
    wanted = list(itertools.product(range(len(prompts)), range(how.num_samples)))
    texts = dict.fromkeys(wanted, "")
    reasons: dict[tuple[int, int], FinishReason | None] = {}
    for piece in stream(engine, tokenizer, prompts, how, ends):
        texts[piece.prompt, piece.sample] += piece.text
        reasons[piece.prompt, piece.sample] = piece.finish_reason
    return [Piece(i, texts[prompt, i], reasons[prompt, i], prompt) for prompt, i in wanted]


def first_tokens(tokenizer: Tokenizer) -> list[int]:
    """What a text begins with when nothing else is given."""
    if tokenizer.end_of_text is not None:
        return [tokenizer.end_of_text]
    return tokenizer.encode("\n")


class IncrementalDecoder:
    """Turns a stream of ids into text as soon as whole characters are there.

    >>> from glassgpt.tokenizers.tokenizer import byte_tokenizer
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
    """One completion in the making: its tokens, and the text that is not yet shown."""

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
        self.seen = set(tokens)  # what the repetition penalty lowers: not the token before a text
        self.length = 0  # how many tokens the engine's row holds; it slides when they are too many
        self.vocab_size = tokenizer.vocab_size
        self.decoder = IncrementalDecoder(tokenizer)
        self.ends = {tokenizer.end_of_text, *ends}
        self.held = ""  # text that may be the beginning of a stop string
        self.finished = False

    def choose(self, logits: np.ndarray, position: int) -> int:
        try:
            logits = filter_logits(logits[: self.vocab_size], self.seen, self.how)
        except UserError as error:
            where = f"prompt {self.prompt + 1}, sample {self.sample + 1}, token {position + 1}"
            raise UserError(f"{where}: {error}") from None
        return draw(logits, seed=self.how.seed, sample=self.sample, position=position)

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
        keep = self._possible_stop()
        text, self.held = self.held[: len(self.held) - keep], self.held[len(self.held) - keep :]
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
