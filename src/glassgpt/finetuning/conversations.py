"""Many conversations as examples to learn from: framed, cut to the context, counted.

    examples, counts = encode_all(Chat(template, tokenizer), conversations, context_length=1024)

One conversation becomes ids in tokenizers/chat_template.py; data/examples.py reads them from files.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
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
    """What became of the conversations, and how large the examples are."""

    conversations: int = 0
    cut: int = 0  # conversations that are longer than the context
    left_out: int = 0  # exchanges that are longer than the context by themselves
    nothing_learned: int = 0  # conversations without a token that counts for the loss
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
    """Examples of up to `context_length` tokens; a target is the next token, or IGNORE.

    Longer conversations are cut between exchanges, and each piece begins with the system's turn;
    with loss on the last turn there is only one piece, the end. Raises `UserError`, which names the
    file and line, for what the template refuses.
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

    def encode(turns: Sequence[Message]) -> _Piece | None:
        """None for what does not fit. More turns than tokens never fit, so a very long
        conversation is not rendered whole."""
        if len(turns) > context_length:
            return None
        ids, learned = chat.encode(turns, loss_on)
        return _Piece(turns, ids, learned) if len(ids) <= context_length + 1 else None

    if whole := encode(turns):
        return [whole]
    counts.cut += 1
    opening, rest = exchanges(turns)
    while rest and all(turn.role != "assistant" for turn in rest[-1]):
        rest.pop()
    from_the_end = loss_on == "last"
    pieces = []
    while rest:
        piece, n = None, 0  # of the first n exchanges that are left, or the last n
        while n < len(rest):
            some = rest[-n - 1 :] if from_the_end else rest[: n + 1]
            longer = encode([*opening, *chain.from_iterable(some)])
            if longer is None:
                break
            piece, n = longer, n + 1
        pieces += [piece] if piece else []
        counts.left_out += piece is None
        rest = [] if from_the_end else rest[max(n, 1) :]
    return pieces


def exchanges(turns: Sequence[Message]) -> tuple[list[Message], list[list[Message]]]:
    """The system's turns at the beginning, and the exchanges: a question with its answers each."""
    opening = list(takewhile(lambda turn: turn.role == "system", turns))
    found: list[list[Message]] = []
    for turn in turns[len(opening) :]:
        if not found or (turn.role == "user" and found[-1][-1].role != "user"):
            found.append([])
        found[-1].append(turn)
    return opening, found
