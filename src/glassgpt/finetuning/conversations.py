"""Many conversations as examples to learn from: framed, cut to the context, counted.

    examples, counts = encode_all(Chat(template, tokenizer), conversations, context_length=1024)

How one conversation becomes ids is chat.py's business; where they come from, data/examples.py's.
"""

from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import chain, takewhile
from typing import NamedTuple, Protocol

import numpy as np

from glassgpt.data.batches import IGNORE
from glassgpt.errors import UserError
from glassgpt.tokenizers.chat_template import Chat, LossOn, Message

Example = tuple[np.ndarray, np.ndarray]  # tokens and targets, (n,) int64 each


class Dialogue(Protocol):
    @property
    def turns(self) -> Sequence[Message]: ...
    @property
    def where(self) -> str: ...  # file and line, for messages


@dataclass
class Counts:
    """What became of the conversations; and of the examples: their turns, tokens and so on."""

    conversations: int = 0
    cut: int = 0  # conversations longer than the context
    left_out: int = 0  # exchanges that alone are longer than it
    nothing_learned: int = 0  # conversations in which nothing is to be learned
    examples: int = 0
    turns: int = 0
    tokens: int = 0
    learned: int = 0  # of the tokens
    longest: int = 0  # tokens of an example


def encode_all(
    chat: Chat,
    conversations: Iterable[Dialogue],
    context_length: int,
    loss_on: LossOn = "assistant",
) -> tuple[list[Example], Counts]:
    """Examples of up to `context_length` tokens; targets are the tokens behind, or IGNORE.

    What is longer is cut between exchanges, and each piece begins with the system's turn; with
    loss on the last turn there is one piece, the end. Raises `UserError`, with the place, for what
    the template refuses.
    """
    examples: list[Example] = []
    counts = Counts()
    for conversation in conversations:
        try:
            pieces = _pieces(chat, conversation.turns, context_length, loss_on, counts)
        except UserError as error:
            raise UserError(f"{conversation.where}: {error}") from error
        learning = [piece for piece in pieces if any(piece.learned[1:])]
        for turns, ids, learned in learning:
            targets = np.where(learned, ids, IGNORE)[1:]
            examples.append((np.array(ids[:-1]), targets))
            counts.turns += len(turns)
            counts.tokens += len(targets)
            counts.learned += sum(learned[1:])
            counts.longest = max(counts.longest, len(targets))
        counts.conversations += 1
        counts.nothing_learned += not learning
        counts.examples += len(learning)
    return examples, counts


class _Piece(NamedTuple):
    turns: Sequence[Message]
    ids: list[int]
    learned: list[bool]


def _pieces(
    chat: Chat, turns: Sequence[Message], context_length: int, loss_on: LossOn, counts: Counts
) -> list[_Piece]:
    """The conversation, or the pieces of it that fit into the context."""

    def piece(*some: Sequence[Message]) -> _Piece | None:
        """None for what does not fit: clear without a look where there are more turns than
        tokens, so that no endless conversation is rendered whole."""
        turns = list(chain.from_iterable(some))
        if len(turns) > context_length:
            return None
        ids, learned = chat.encode(turns, loss_on)
        return _Piece(turns, ids, learned) if len(ids) <= context_length + 1 else None

    if whole := piece(turns):
        return [whole]
    counts.cut += 1
    opening, rest = exchanges(turns)
    while rest and all(turn.role != "assistant" for turn in rest[-1]):
        rest.pop()
    pieces = []
    while rest:
        last = loss_on == "last"  # then the end is what counts

        def first(n: int, rest=rest, last=last) -> _Piece | None:
            return piece(opening, *(rest[-n:] if last else rest[:n]))

        n = _most(lambda n, first=first: first(n) is not None, len(rest))
        pieces += [found] if n and (found := first(n)) else []
        counts.left_out += n == 0
        rest = [] if last else rest[max(n, 1) :]
    return pieces


def exchanges(turns: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system's turns at the beginning, and the others by what is asked and answered."""
    opening = list(takewhile(lambda turn: turn.role == "system", turns))
    found: list[list[Message]] = []
    for turn in turns[len(opening) :]:
        if not found or (turn.role == "user" and found[-1][-1].role != "user"):
            found.append([])
        found[-1].append(turn)
    return opening, found


def _most(fits: Callable[[int], bool], most: int) -> int:
    """The largest n up to `most` with `fits(n)`; what fits, fits with less, too. It looks at small
    numbers first: a look takes the longer the larger n is."""
    fitting, n = 0, 1
    while n <= most and fits(n):
        fitting, n = n, 2 * n
    between = range(fitting + 1, min(n, most + 1))
    return fitting + bisect_left(between, True, key=lambda n: not fits(n))
