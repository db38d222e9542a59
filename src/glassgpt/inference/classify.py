"""Classifiers: a GPT whose head reads the last token of a text and says which class it is.

    set_score_head(model, n_classes=2)
    print(label_probabilities(model, tokenizer, ["A great film."]))

Also how good their guesses are: accuracy, F1, confusions. This module knows no files and no
training; `reporting.plots.confusion` draws the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn

from glassgpt.cache import Packing
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError
from glassgpt.model import GPT
from glassgpt.reporting.terminal import aligned
from glassgpt.runtime import to_device
from glassgpt.tokenizers.tokenizer import Tokenizer, tokens_before

_BATCH_TOKENS = 8192  # tokens read at once, padding included
_LABEL_WIDTH = 40  # characters of a label that tables show


# -- the model -----------------------------------------------------------------------------------


def set_score_head(model: GPT, n_classes: int) -> None:
    """Replace the head by a new one, drawn from N(0, 0.02): logits are then (B, T, n_classes).

    A tied embedding is left as it is: it still reads tokens.
    """
    old = model.head.weight
    head = nn.Linear(model.config.n_embd, n_classes, bias=False)
    nn.init.normal_(head.weight, std=0.02)
    model.head = head.to(old.device, old.dtype)


def classifier(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> GPT:
    """A model in evaluation mode; its head is the weight "score.weight" (n_classes, C)."""
    # There are no weights for a head that writes tokens; a tied model does not ask for them.
    model = GPT.from_weights(replace(config, tie_embeddings=True), weights)
    model.config = config
    score = torch.from_numpy(np.array(weights["score.weight"], dtype=np.float32))
    model.head = nn.Linear(config.n_embd, len(score), bias=False, device="meta")
    model.head.weight = nn.Parameter(score)
    return model.eval()


# -- what it says --------------------------------------------------------------------------------


def encode_text(tokenizer: Tokenizer, text: str, context_length: int | None = None) -> list[int]:
    """The ids of a text, cut to the first `context_length`; [] for an empty text.

    As in transformers with truncation: Llama's begin-of-text token comes first and counts, and
    "<|endoftext|>" inside a text is ordinary text.
    """
    if not text:
        return []
    return [*tokens_before(tokenizer.spec), *tokenizer.encode(text)][:context_length]


def label_probabilities(model: GPT, tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """(n, n_classes) float64, each row sums to 1. Raises `UserError` for an empty text."""
    examples = [encode_text(tokenizer, text, model.config.context_length) for text in texts]
    if [] in examples:
        raise UserError(f"text {examples.index([]) + 1} is empty: there is nothing to classify")
    return example_probabilities(model, examples)


def example_probabilities(model: GPT, examples: Sequence[Sequence[int]]) -> np.ndarray:
    """The same for token ids (none of them empty); (n, n_classes) float64.

    Texts of similar length share a batch. They are padded on the right: causal attention sees
    no padding from their last tokens.
    """
    logits = torch.empty(len(examples), len(model.head.weight), dtype=torch.float64)
    for rows in _batches([len(example) for example in examples]):
        longest = max(len(examples[row]) for row in rows)
        tokens = np.zeros((len(rows), longest), dtype=np.int64)
        last = np.zeros((len(rows), longest), dtype=bool)
        for i, row in enumerate(rows):
            tokens[i, : len(examples[row])] = examples[row]
            last[i, len(examples[row]) - 1] = True
        logits[rows] = class_logits(model, tokens, last).double()
    return logits.softmax(dim=-1).numpy()


@torch.inference_mode()
def class_logits(
    model: GPT, tokens: np.ndarray, last: np.ndarray, positions: np.ndarray | None = None
) -> torch.Tensor:
    """What the head says at the positions that are True in `last` (B, T): (n, n_classes), on the
    CPU. With `positions` (B, T), rows hold several texts side by side. Dropout is off meanwhile."""
    device, was_training = model.head.weight.device, model.training
    packing = None if positions is None else Packing(to_device(positions, device))
    model.eval()
    try:
        hidden = model.hidden(to_device(tokens, device), packing)  # (B, T, C)
        return model.head(hidden[torch.from_numpy(last).to(device)]).cpu()
    finally:
        model.train(was_training)


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Rows to read together, the longest first: if memory is too small, that shows at once."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while order:
        n = max(1, _BATCH_TOKENS // lengths[order[0]])
        yield order[:n]
        del order[:n]


# -- how good it is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metrics:
    """How well the classes of n examples were guessed; the arrays are (n_classes,)."""

    accuracy: float  # share of the examples that were guessed right
    macro_f1: float  # mean F1 of the classes, however rare
    precision: np.ndarray  # of the examples guessed to be of a class, the share that is
    recall: np.ndarray  # of the examples of a class, the share that was found
    f1: np.ndarray  # their harmonic mean
    support: np.ndarray  # int64, examples of each class
    confusion: np.ndarray  # (n_classes, n_classes) int64: examples of class i guessed to be j


def metrics(
    truth: Sequence[int] | np.ndarray, predicted: Sequence[int] | np.ndarray, n_classes: int
) -> Metrics:
    """The usual measures, equal to scikit-learn's with zero_division=0.

    A class that was never guessed has precision 0, a class without examples recall 0. Classes with
    neither examples nor guesses do not count in the macro F1.
    """
    confusion = np.zeros((n_classes, n_classes), dtype=np.int64)
    np.add.at(confusion, (np.asarray(truth, np.int64), np.asarray(predicted, np.int64)), 1)
    right, support, guessed = confusion.diagonal(), confusion.sum(axis=1), confusion.sum(axis=0)
    f1 = _share(2 * right, support + guessed)
    occurs = support + guessed > 0
    return Metrics(
        accuracy=float(_share(right.sum(), support.sum())),
        macro_f1=float(_share(f1.sum(), occurs.sum())),
        precision=_share(right, guessed),
        recall=_share(right, support),
        f1=f1,
        support=support,
        confusion=confusion,
    )


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)


def metrics_table(found: Metrics, labels: Sequence[str]) -> str:
    """Plain text: a line for each class, then macro F1 and accuracy."""
    rows = [["class", "precision", "recall", "F1", "examples"]]
    columns = (found.precision, found.recall, found.f1)
    for i, label in enumerate(labels):
        shown = " ".join(label.split())[:_LABEL_WIDTH]
        rows.append([shown, *(f"{column[i]:.3f}" for column in columns), f"{found.support[i]:,}"])
    rows.append(["macro F1", "", "", f"{found.macro_f1:.3f}", ""])
    rows.append(["accuracy", "", "", f"{found.accuracy:.3f}", f"{found.support.sum():,}"])
    return aligned(rows)


def class_weights(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """The weight of each class in the loss, from its number of examples: n / (classes * count).

    Every class that occurs then has the same share of the loss, and the mean weight of an example
    is 1. Classes without examples have weight 0 and are not counted. float32
    """
    number = np.asarray(counts, dtype=np.float64)
    occurring = number > 0
    weights = number.sum() / (occurring.sum() * np.where(occurring, number, 1.0))
    return np.where(occurring, weights, 0.0).astype(np.float32)
