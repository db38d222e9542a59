"""How the next token is drawn: every filter's effect, and the very tokens of `glassgpt sample`.

    stages(logits, seen, how); Reader(model).logits(tokens)

The filters and the random numbers are generate.py's; here they are watched, and the key/value
cache is kept from one question to the next.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch

from glassgpt.cache import KVCache
from glassgpt.config import Sampling
from glassgpt.inference.generate import context_start, filter_logits, probabilities
from glassgpt.interpret.trace import Bands, Edit, record
from glassgpt.model import GPT
from glassgpt.studio.words import entropy, likeliest, text_of
from glassgpt.tokenizers.tokenizer import Tokenizer

_OFF = dict(repetition_penalty=None, temperature=1.0, top_k=None, top_p=None, min_p=None)


@dataclass(frozen=True)
class Filters:
    """The fields of `Sampling` that a page sets."""

    repetition_penalty: float | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None

    def sampling(self, seed: int = 0) -> Sampling:
        """Raises `UserError` for values that make no sense."""
        return Sampling(**{name: getattr(self, name) for name in _OFF}, seed=seed)


def stages(
    logits: np.ndarray, seen: Collection[int], how: Sampling
) -> tuple[list[dict[str, Any]], np.ndarray, dict[int, str]]:
    """What each filter leaves, in their order; the probabilities (V,) after all of them; and for
    each token that was cut the filter that did it.

    A stage's `mass` is what its tokens had before it, `cut` the least of them.
    """
    before = probabilities(logits)
    found = [{"name": "all", "on": True, "kept": len(logits), "mass": 1.0,
              "entropy": entropy(before), "cut": None}]  # fmt: skip
    cut_by: dict[int, str] = {}
    names = list(_OFF)
    for i, name in enumerate(names):
        so_far = replace(how, **{later: _OFF[later] for later in names[i + 1 :]})
        filtered = filter_logits(logits, seen, so_far)
        after, kept = probabilities(filtered), filtered > -np.inf
        fewer = int(kept.sum()) < found[-1]["kept"]
        if fewer:
            for token in np.flatnonzero(~kept):
                cut_by.setdefault(int(token), name)
        found.append({"name": name, "on": getattr(how, name) != _OFF[name],
                      "kept": int(kept.sum()), "mass": float(before[kept].sum()),
                      "entropy": entropy(after),
                      "cut": float(before[kept].min()) if fewer else None})  # fmt: skip
        before = after
    return found, before, cut_by


def distribution(
    tokenizer: Tokenizer, logits: np.ndarray, seen: Collection[int], how: Sampling, show: int
) -> dict[str, Any]:
    """The stages, and the likeliest tokens with their probability before and after them."""
    steps, final, cut_by = stages(logits, seen, how)
    chance = probabilities(logits)
    tokens = [{"id": int(i), "text": text_of(tokenizer, int(i)), "logit": float(logits[i]),
               "p": float(chance[i]), "final": float(final[i]), "cut_by": cut_by.get(int(i))}
              for i in likeliest(chance, show)]  # fmt: skip
    return {"stages": steps, "tokens": tokens}


def in_context(n_prompt: int, tokens: Sequence[int], limit: int) -> list[int]:
    """What the model sees of a prompt and what was drawn behind it: as `generate.stream` has it,
    a full context starts again with its newest half."""
    return list(tokens[context_start(n_prompt, len(tokens), limit) :])


class Reader:
    """A model that remembers keys and values of what it read last."""

    def __init__(self, model: GPT, edits: dict[str, Edit], *, forgets: bool = False) -> None:
        self.model, self.edits = model, edits
        self.forgets = forgets  # what is put in place depends on the whole text
        self._cache: KVCache | None = None
        self._tokens: list[int] = []

    def logits(self, tokens: Sequence[int]) -> tuple[np.ndarray, int]:
        """Of what follows (V,), and how many tokens were in the cache already."""
        weight = self.model.head.weight
        reused = 0
        if not self.forgets:
            while reused < min(len(self._tokens), len(tokens) - 1):
                if self._tokens[reused] != tokens[reused]:
                    break
                reused += 1
            self._cache = self._cache or KVCache(self.model.config, 1, dtype=weight.dtype,
                                                 device=weight.device)  # fmt: skip
            self._cache.length = reused
        self._tokens = self._tokens[:reused]  # all that is there, should the pass fail
        new = torch.tensor([list(tokens[reused:])], device=weight.device)
        if self.edits:
            logits = record(self.model, new, edits=self.edits, keep=["logits"], cache=self._cache,
                            positions=slice(-1, None), bands=Bands()).tensor("logits")  # fmt: skip
        else:
            with torch.inference_mode():
                logits = self.model(new, cache=self._cache, positions=slice(-1, None))
        self._tokens = list(tokens)
        return logits[0, -1].float().cpu().numpy(), reused
