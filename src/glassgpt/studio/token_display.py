"""Tokens as a page shows them: their text, their bytes, how BPE built them, which are likely next.

show_token(tokenizer, 5); next_tokens(tokenizer, logits)
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from glassgpt.inference.generate import probabilities
from glassgpt.tokenizers.tokenizer import Tokenizer
from glassgpt.tokenizers.tokenizer_json import byte_alphabet, merge_pair


@dataclass(frozen=True)
class ShownToken:
    id: int
    text: str  # U+FFFD where the token is only a part of a character


@dataclass(frozen=True)
class TokenOfText(ShownToken):
    bytes: list[int]
    special: bool


@dataclass(frozen=True)
class NextToken(ShownToken):
    p: float
    logit: float


@dataclass(frozen=True)
class NextTokens:
    top: list[NextToken]
    entropy: float  # nats, over all tokens


def show_token(tokenizer: Tokenizer, token: int) -> TokenOfText:
    content = list(shown_bytes(tokenizer, token))
    special = token in tokenizer.special.values()
    return TokenOfText(token, text_of(tokenizer, token), content, special)


def text_of(tokenizer: Tokenizer, token: int) -> str:
    return shown_bytes(tokenizer, token).decode("utf-8", "replace")


def shown_bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """b"" for the ids that only pad the vocabulary."""
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""


def next_tokens(tokenizer: Tokenizer, logits: np.ndarray) -> NextTokens:
    """The 20 likeliest tokens, and the entropy of all. logits (V,)"""
    chance = probabilities(logits)
    top = [
        NextToken(i, text_of(tokenizer, i), float(chance[i]), float(logits[i]))
        for i in likeliest(chance, 20)
    ]
    return NextTokens(top, entropy(chance))


def likeliest(chance: np.ndarray, n: int) -> list[int]:
    """Ids of the n largest, largest first; of equal ones the lowest ids."""
    n = max(0, min(n, len(chance)))
    some = np.flatnonzero(chance >= np.partition(chance, -n)[-n])  # sorting all would take longer
    return some[np.argsort(-chance[some], kind="stable")][:n].tolist()


def entropy(chance: np.ndarray) -> float:
    """In nats."""
    possible = chance[chance > 0]
    return abs(float((possible * np.log(possible)).sum()))


def merges(tokenizer: Tokenizer, token: int) -> list[list[str]]:
    """How BPE builds a token: [left, right, whole], first merge first; [] without merges."""
    model = tokenizer.spec["model"]
    if not model.get("merges") or token in tokenizer.special.values():
        return []
    name = next((name for name, i in model["vocab"].items() if i == token), "")
    ranks = {merge_pair(merge): rank for rank, merge in enumerate(model["merges"])}
    parts, found = list(name), []
    while len(parts) > 1:
        pairs = list(zip(parts, parts[1:], strict=False))
        best = min(pairs, key=lambda two: ranks.get(two, len(ranks)))
        if best not in ranks:
            break
        at = pairs.index(best)
        parts[at : at + 2] = ["".join(best)]
        found.append([_plain(tokenizer, one) for one in (*best, "".join(best))])
    return found


def _plain(tokenizer: Tokenizer, name: str) -> str:
    """A token as text, not as the vocabulary file writes it."""
    alphabet = {char: byte for byte, char in enumerate(byte_alphabet())}
    if "ByteLevel" in str(tokenizer.spec.get("decoder")) and all(c in alphabet for c in name):
        return bytes(alphabet[char] for char in name).decode("utf-8", "replace")
    return name.replace("\u2581", " ")
