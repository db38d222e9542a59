"""Tokens as a page shows them: text, bytes, how BPE put them together, what is likely next.

describe(tokenizer, 5); next_tokens(tokenizer, logits)
"""

from __future__ import annotations

from typing import Any

import numpy as np

from glassgpt.inference.generate import probabilities
from glassgpt.tokenizers.tokenizer import Tokenizer
from glassgpt.tokenizers.tokenizer_json import byte_alphabet, pair


def text_of(tokenizer: Tokenizer, token: int) -> str:
    """Half a character shows as U+FFFD."""
    return _bytes(tokenizer, token).decode("utf-8", "replace")


def describe(tokenizer: Tokenizer, token: int) -> dict[str, Any]:
    return {"id": token, "text": text_of(tokenizer, token),
            "bytes": list(_bytes(tokenizer, token)),
            "special": token in tokenizer.special.values()}  # fmt: skip


def next_tokens(tokenizer: Tokenizer, logits: np.ndarray, n: int = 20) -> dict[str, Any]:
    """The likeliest tokens, and the entropy of all in nats. logits (V,)"""
    chance = probabilities(logits)
    top = [{"id": int(i), "text": text_of(tokenizer, int(i)), "p": float(chance[i]),
            "logit": float(logits[i])} for i in likeliest(chance, n)]  # fmt: skip
    return {"top": top, "entropy": entropy(chance)}


def likeliest(chance: np.ndarray, n: int) -> np.ndarray:
    """Ids of the n largest, largest first; of equal ones the lowest ids."""
    n = max(0, min(n, len(chance)))
    some = np.flatnonzero(chance >= np.partition(chance, -n)[-n])  # all would have to be sorted
    return some[np.argsort(-chance[some], kind="stable")][:n]


def entropy(chance: np.ndarray) -> float:
    there = chance[chance > 0]
    return abs(float((there * np.log(there)).sum()))


def merges(tokenizer: Tokenizer, token: int) -> list[list[str]]:
    """How BPE builds a token: [left, right, whole], first merge first; [] where it doesn't."""
    model = tokenizer.spec["model"]
    if not model.get("merges") or token in tokenizer.special.values():
        return []
    name = next((name for name, i in model["vocab"].items() if i == token), "")
    ranks = {pair(merge): rank for rank, merge in enumerate(model["merges"])}
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


def _bytes(tokenizer: Tokenizer, token: int) -> bytes:
    """b"" for the ids with which a vocabulary is filled up."""
    return tokenizer.token_bytes(token) if token < tokenizer.vocab_size else b""
