"""Classifiers: a GPT whose head reads the last token of a text and tells classes apart.

    set_score_head(model, n_classes=2); print(probabilities(model, tokenizer, ["A great film."]))

Also how good their guesses are: accuracy, F1, confusions. This room knows no files, no training
and no names of runs; `plot.confusion` draws the matrix.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn as nn

from glassgpt.config import ModelConfig
from glassgpt.errors import UserError
from glassgpt.model import GPT
from glassgpt.reporting.terminal import aligned
from glassgpt.tokenizers.tokenizer import Tokenizer, tokens_before

_BATCH_TOKENS = 8192  # read at once, with padding
_LABEL_WIDTH = 40  # characters of a label that tables show


# -- the model -----------------------------------------------------------------------------------


def set_score_head(model: GPT, n_classes: int) -> None:
    """Replace the head by a new one, N(0, 0.02) by torch's seed: logits are then (B, T, n_classes).

    A tied embedding stays what it is: it still reads tokens.
    """
    old = model.head.weight
    head = nn.Linear(model.config.n_embd, n_classes, bias=False)
    nn.init.normal_(head.weight, std=0.02)
    model.head = head.to(old.device, old.dtype)


def classifier(config: ModelConfig, weights: Mapping[str, np.ndarray]) -> GPT:
    """The model with these weights, among them "score.weight" (n_classes, C); for evaluation."""
    # Tied, a model needs no weights of a head for tokens, and this one has none.
    model = GPT.from_weights(replace(config, tie_embeddings=True), weights)
    model.config = config
    score = torch.from_numpy(np.array(weights["score.weight"], dtype=np.float32))
    model.head = nn.Linear(config.n_embd, len(score), bias=False, device="meta")
    model.head.weight = nn.Parameter(score)
    return model.eval()


def weights_to_save(model: GPT) -> dict[str, np.ndarray]:
    """What a `Checkpoint` with labels takes: the body's weights and "score.weight"."""
    state = {name: tensor.detach().cpu().numpy() for name, tensor in model.state_dict().items()}
    body = {name: state[name] for name in model.config.weight_shapes if name != "head.weight"}
    return body | {"score.weight": state["head.weight"]}


# -- what it says --------------------------------------------------------------------------------


def encode_text(tokenizer: Tokenizer, text: str, context_length: int | None = None) -> list[int]:
    """The ids that are read of a text: the first `context_length` of them; of no text none.

    As transformers' tokenizer has them with truncation: what stands before every text (Llama's
    begin of text) counts, and "<|endoftext|>" inside a text is ordinary text.
    """
    if not text:
        return []
    return [*tokens_before(tokenizer.spec), *tokenizer.encode(text)][:context_length]


def probabilities(model: GPT, tokenizer: Tokenizer, texts: Sequence[str]) -> np.ndarray:
    """(n, n_classes) float64, each row sums to 1. Raises `UserError` for an empty text."""
    examples = [encode_text(tokenizer, text, model.config.context_length) for text in texts]
    if [] in examples:
        raise UserError(f"text {examples.index([]) + 1} is empty: there is nothing to classify")
    return example_probabilities(model, examples)


@torch.inference_mode()
def example_probabilities(model: GPT, examples: Sequence[Sequence[int]]) -> np.ndarray:
    """The same of token ids; (n, n_classes) float64. Dropout is off meanwhile.

    Texts of like length share a batch. They are padded on the right, where causal attention
    lets no token look.
    """
    weight, was_training = model.head.weight, model.training
    logits = torch.empty(len(examples), len(weight), dtype=torch.float64)
    model.eval()
    try:
        for rows in _batches([len(example) for example in examples]):
            lengths = [len(examples[row]) for row in rows]
            tokens = np.zeros((len(rows), max(lengths)), dtype=np.int64)
            for i, row in enumerate(rows):
                tokens[i, : lengths[i]] = examples[row]
            x = model.hidden(torch.from_numpy(tokens).to(weight.device))  # (B, T, C)
            last = x[range(len(rows)), [length - 1 for length in lengths]]  # (B, C)
            logits[rows] = model.head(last).double().cpu()  # (B, n_classes)
    finally:
        model.train(was_training)
    return logits.softmax(dim=-1).numpy()


def _batches(lengths: Sequence[int]) -> Iterator[list[int]]:
    """Which rows are read together: the longest first, so that memory is short at once or never."""
    order = sorted(range(len(lengths)), key=lambda row: -lengths[row])
    while order:
        n = max(1, _BATCH_TOKENS // lengths[order[0]])
        yield order[:n]
        del order[:n]


# -- how good it is ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Metrics:
    """What came of guessing the classes of n examples; the arrays are (n_classes,)."""

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
    """The usual measures, as scikit-learn has them with zero_division=0.

    A class that was never guessed has precision 0, one without examples recall 0. Classes with
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


def table(found: Metrics, labels: Sequence[str]) -> str:
    """A line for each class, then what it comes to; plain text."""
    rows = [["class", "precision", "recall", "F1", "examples"]]
    columns = (found.precision, found.recall, found.f1)
    for i, label in enumerate(labels):
        shown = " ".join(label.split())[:_LABEL_WIDTH]
        rows.append([shown, *(f"{column[i]:.3f}" for column in columns), f"{found.support[i]:,}"])
    rows.append(["macro F1", "", "", f"{found.macro_f1:.3f}", ""])
    rows.append(["accuracy", "", "", f"{found.accuracy:.3f}", f"{found.support.sum():,}"])
    return aligned(rows)


def class_weights(counts: Sequence[int] | np.ndarray) -> np.ndarray:
    """What a class weighs in the loss, by its number of examples: n / (classes * count), float32.

    So every class that occurs has the same share of the loss, and an example weighs 1 on the
    mean. Classes without examples, which no loss asks for, weigh 0 and are not counted.
    """
    number = np.asarray(counts, dtype=np.float64)
    occurring = number > 0
    weights = number.sum() / (occurring.sum() * np.where(occurring, number, 1.0))
    return np.where(occurring, weights, 0.0).astype(np.float32)
