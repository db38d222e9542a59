"""The exact loss of a text, and what quantised weights add to it.

    found = text_loss(engine, tokenizer, text); print(found.loss, found.bits_per_byte)

Every token of the text but the first is predicted once. This module asks an `Engine` for logits; it
knows neither models nor torch.
"""

from __future__ import annotations

import math
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from glassgpt.checkpoints.run_directory import Checkpoint
from glassgpt.config import EngineName, WeightPrecision
from glassgpt.data.texts import decode
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.inference.engines import Engine
from glassgpt.inference.engines.choose import build_engine
from glassgpt.reporting.terminal import aligned
from glassgpt.system import SILENT, Reporter
from glassgpt.tokenizers.tokenizer import Tokenizer

_BLOCK = 256  # tokens read at once: their logits are 50 MB with GPT-2's vocabulary


@dataclass(frozen=True)
class TextLoss:
    """How well a text was predicted."""

    loss: float  # nats per token, mean over the predicted tokens
    n_tokens: int  # predicted
    n_bytes: int  # of the text that these tokens stand for, in UTF-8

    @property
    def perplexity(self) -> float:
        return math.exp(self.loss) if self.loss < 700 else math.inf

    @property
    def bits_per_byte(self) -> float:
        """Comparable between tokenizers, as loss and perplexity are not."""
        return self.loss * self.n_tokens / math.log(2) / max(1, self.n_bytes)


def read_text(name: str) -> str:
    """The text of a file, or with "-" of standard input; UTF-8, or UTF-16 where its mark says so.

    Raises `UserError` for a file that is missing, empty, binary or in another encoding.
    """
    with explain_os_errors(f"read {name}"):
        if name == "-":
            text = "".join(decode(sys.stdin.buffer, "standard input"))  # type: ignore[arg-type]
        else:
            with open(name, "rb") as file:
                text = "".join(decode(file, name))
    if not text:
        raise UserError(f"{'standard input' if name == '-' else name} is empty")
    return text


def text_loss(
    engine: Engine,
    tokenizer: Tokenizer,
    text: str,
    *,
    max_tokens: int | None = None,
    reporter: Reporter = SILENT,
) -> TextLoss:
    """The mean loss of every token of `text` but the first, given those before it.

    A text longer than the context is read in windows that overlap by half: each window after the
    first predicts its second half only, so every token but the first ones of the text has half
    a context before it at least. `<|endoftext|>` is read as the token between documents. With
    `max_tokens`, only so many tokens of the text are looked at. Raises `UserError` for less than
    two tokens, and for logits that are not numbers.
    """
    if max_tokens is not None and max_tokens < 2:
        raise UserError(f"max_tokens={max_tokens} must be at least 2: the first is not predicted")
    tokens = np.array(tokenizer.encode(text, special=True)[:max_tokens], dtype=np.int64)
    if len(tokens) < 2:
        raise UserError(
            f"the text has {len(tokens)} of the two tokens that a loss takes at least: "
            "the first is not predicted"
        )
    total, done, targets = 0.0, 0, tokens[1:]
    engine.open(1)
    for start, counts_from, end in windows(len(targets), engine.config.context_length):
        engine.rewind(0)
        for i, stop in _blocks(start, counts_from):
            engine.read([0], [tokens[i:stop]])
        for i, stop in _blocks(counts_from, end):
            logits = engine.read([0], [tokens[i:stop]], every=True)  # (T, V)
            total += float(cross_entropies(logits, targets[i:stop]).sum())
            done += stop - i
            if not math.isfinite(total):
                raise UserError("the model's logits are not numbers (NaN): its weights are broken")
            progress = f"{done:,} of {len(targets):,} tokens, loss {total / done:.4f}"
            reporter.status(f"{engine.name}: {progress}")
    ids, counts = np.unique(targets, return_counts=True)
    lengths = [len(tokenizer.token_bytes(int(token))) for token in ids]
    return TextLoss(total / len(targets), len(targets), int(counts @ lengths))


def windows(n_targets: int, context_length: int) -> Iterator[tuple[int, int, int]]:
    """(start, counts_from, end): read the tokens start to end; those from counts_from on predict.

    The token at i predicts the one at i + 1, so that counts_from to end, over all windows, are
    0 to n_targets without gap or overlap.
    """
    stride = max(1, context_length // 2)
    start, counts_from = 0, 0
    while counts_from < n_targets:
        end = min(start + context_length, n_targets)
        yield start, counts_from, end
        start, counts_from = start + stride, end


@np.errstate(over="ignore", invalid="ignore")  # `text_loss` says in words what is wrong
def cross_entropies(logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """Cross-entropy of each row: (T, V) float32, (T,) -> (T,) float64, in nats."""
    largest = logits.max(axis=1, keepdims=True)
    shifted = logits - largest  # (T, V)
    chosen = np.take_along_axis(shifted, targets[:, None], axis=1)[:, 0].astype(np.float64)
    return np.log(np.exp(shifted, out=shifted).sum(axis=1, dtype=np.float64)) - chosen


def _blocks(start: int, end: int) -> Iterator[tuple[int, int]]:
    return ((i, min(i + _BLOCK, end)) for i in range(start, end, _BLOCK))


# -- what does quantisation cost? ----------------------------------------------------------------


def compare_weights(
    checkpoint: Checkpoint,
    text: str,
    weights: Sequence[WeightPrecision],
    *,
    engine: EngineName = "auto",
    device: str = "auto",
    threads: int | None = None,
    max_tokens: int | None = None,
    reporter: Reporter = SILENT,
) -> dict[WeightPrecision, TextLoss]:
    """The same text under the same model, its weights held with each precision in turn."""
    found = {}
    for precision in weights:
        built = build_engine(
            checkpoint,
            device=device,
            engine=engine,
            weights=precision,
            threads=threads,
            reporter=reporter,
        )
        found[precision] = text_loss(
            built, checkpoint.tokenizer, text, max_tokens=max_tokens, reporter=reporter
        )
        del built  # before the next one: only one copy of the weights at a time
    return found


def loss_table(found: dict[WeightPrecision, TextLoss]) -> str:
    """One line for each precision; beside float32 also by how much the loss is higher."""
    exact = found.get("float32")
    compared = exact is not None and len(found) > 1
    header = ["weights", "loss", "perplexity", "bits per byte", "tokens"]
    rows = [header + ["loss against float32"] * compared]
    for precision, it in found.items():
        row = [precision, f"{it.loss:.4f}", f"{it.perplexity:,.3f}"]
        row += [f"{it.bits_per_byte:.4f}", f"{it.n_tokens:,}"]
        if exact is not None and compared:
            row.append(f"{it.loss / exact.loss - 1:+.3%}" if it is not exact else "")
        rows.append(row)
    return aligned(rows)
