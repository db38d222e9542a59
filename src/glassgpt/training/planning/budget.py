"""Which model to train in the time there is: the rule behind `--budget`.

    text = TextStatistics(tokens=1_000_000, vocab_size=65, bits_per_token=2.4)
    choose(candidates(text, {}), text, seconds=300, measured={}).model

A larger model learns more from each token, and sees fewer of them. The rule takes a ladder of
shapes, from 0.1 to 100 million parameters, and computes for each how many tokens it would see in
the time, and what loss a law fitted to our own runs expects of that (benchmarks/sweep.py measures
and fits, docs/sweep.png shows it). This module knows arithmetic only, and no machine.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from glassgpt.config import ENDLESS, ModelConfig
from glassgpt.errors import UserError
from glassgpt.options import Options

# (n_layer, n_embd, context_length), each somewhat more work per token than the one before.
LADDER = (
    (2, 64, 64), (2, 96, 64), (3, 96, 128), (3, 128, 128), (4, 128, 128), (4, 160, 128),
    (5, 160, 128), (5, 192, 128), (6, 192, 128), (6, 224, 256), (6, 256, 256), (8, 256, 256),
    (8, 320, 256), (8, 384, 256), (10, 512, 512), (12, 640, 512), (12, 768, 1024),
)  # fmt: skip
_WIDEST_SMALL_HEADS = 256  # n_embd up to which heads are 32 wide; beyond it, 64


@dataclass(frozen=True)
class TextStatistics:
    """What the rule needs to know of a text."""

    tokens: int  # to train on, once through
    vocab_size: int
    bits_per_token: float  # as bzip2 packs them: how hard the text is to predict


@dataclass(frozen=True)
class Law:
    """Expected loss = scale * (floor + a / N^alpha + b / D^beta), in nats per token.

    N parameters outside the embeddings, D tokens seen. Repeated tokens teach less each time
    (arXiv:2305.16264, eq. 5): D counts as U + U r (1 - exp(-R / r)) after R repetitions of U.
    """

    floor: float
    a: float
    alpha: float
    b: float
    beta: float
    repetitions: float  # r: after so many, a repeated token teaches 1/e of what a new one does

    def __call__(
        self, n_parameters: float, tokens: float, text: TextStatistics, scale: float
    ) -> float:
        once = min(tokens, text.tokens)
        repeated = max(0.0, tokens / text.tokens - 1)
        seen = once + once * self.repetitions * (1 - math.exp(-repeated / self.repetitions))
        return scale * (self.floor + self.a / n_parameters**self.alpha + self.b / seen**self.beta)


# Fitted by benchmarks/sweep.py to characters of tiny Shakespeare; `scale` adapts it to other texts.
CHARACTERS = Law(floor=1.335, a=380.0, alpha=0.647, b=1570.0, beta=0.648, repetitions=6.8)
_BITS_OF_SHAKESPEARE = 2.50  # per character, as bzip2 packs it: `bits_per_token` of that text
# Hoffmann et al. (arXiv:2203.15556, approach 3): web text in BPE tokens, models of any size.
WEB_TEXT = Law(floor=1.69, a=406.4, alpha=0.34, b=410.7, beta=0.28, repetitions=15.4)
_LARGE_VOCABULARY = 1 << 14  # tokens; beyond it, the law of web text holds
# (pressure, dropout): up to which product of epochs and parameters per token how much is dropped.
_DROPOUT = ((8, 0.0), (20, 0.05), (60, 0.1), (200, 0.15), (math.inf, 0.2))
_TYPICAL_SPEED = 250e9  # multiplications and additions per second, before one is measured


@dataclass(frozen=True)
class Choice:
    """A shape, how to train it, and what to expect."""

    model: ModelConfig
    train: Options  # options of training, and dropout
    token_seconds: float
    tokens: float
    loss: float  # expected, nats per token


def inner_parameters(model: ModelConfig) -> int:
    """All but the embeddings, which hold no rules of the text."""
    return model.n_parameters - model.vocab_size * model.n_embd * (2 - model.tie_embeddings)


def expected_loss(model: ModelConfig, tokens: float, text: TextStatistics) -> float:
    """What `train --budget` reaches with this model after so many tokens, in nats per token."""
    n = max(1, inner_parameters(model))
    if text.vocab_size > _LARGE_VOCABULARY:
        return WEB_TEXT(n, tokens, text, 1.0)
    return CHARACTERS(n, tokens, text, text.bits_per_token / _BITS_OF_SHAKESPEARE)


def candidates(text: TextStatistics, fixed: Options) -> list[ModelConfig]:
    """The ladder's shapes with the options in `fixed` as they are, each once, as far as the text
    is long enough for them."""
    shapes: dict[ModelConfig, None] = {}
    refused: UserError | None = None
    for n_layer, n_embd, context_length in LADDER:
        wished: Options = dict(n_layer=n_layer, context_length=context_length)
        wished |= dict(n_embd=n_embd) | dict(fixed)
        wished.setdefault("n_head", _heads(wished["n_embd"]))
        try:
            wished["vocab_size"] = text.vocab_size
            config = ModelConfig.from_shape(**wished)
        except UserError as error:
            refused = error
        else:
            shapes[config] = None
    if refused is not None and not shapes:
        raise refused
    long_enough = [model for model in shapes if model.context_length < text.tokens]
    if not long_enough:
        raise UserError(f"{text.tokens} tokens are too few to train on")
    return long_enough


def _heads(width: int) -> int:
    """So many heads that each is 32 wide, or 64 in wide models, or somewhat more."""
    most = width // (32 if width <= _WIDEST_SMALL_HEADS else 64)
    evenly = (n for n in range(most, 0, -1) if width % n == 0 and width // n % 2 == 0)
    return next(evenly, 1)


def training_options(model: ModelConfig, tokens: float, text: TextStatistics) -> Options:
    """How to train `model` on about so many tokens: batch, rates, decay, dropout.

    Dropout keeps a text from being learned by heart by a model that has room for it and sees it
    often; where one of the two is missing, it only slows the learning down (docs/LOG.md).
    """
    # Muon's products cost as much at every step: wide models need more tokens to be worth one.
    batch = 2048 if model.n_embd < 192 else 4096
    pressure = tokens / text.tokens * inner_parameters(model) / text.tokens
    dropout = next(share for most, share in _DROPOUT if pressure <= most)
    return dict(
        optimizer="muon",
        batch_tokens=batch,
        learning_rate=0.012,
        muon_learning_rate=0.02,
        schedule="linear",
        min_learning_rate=0.0,
        warmup_steps=20,
        weight_decay=0.1,
        dropout=dropout,
        max_steps=ENDLESS,
    )


def choose(
    shapes: Sequence[ModelConfig],
    text: TextStatistics,
    seconds: float,
    measured: Mapping[ModelConfig, float],
) -> Choice:
    """The best of the `shapes` for so many seconds of training.

    `measured` holds seconds per token of some; those of the others are guessed from them. Whoever
    can measure does so with the shape chosen, and asks again until it is a measured one.
    """
    choices = [_choice(model, _seconds(model, measured), seconds, text) for model in shapes]
    return min(choices, key=lambda choice: choice.loss)


def _choice(
    model: ModelConfig, token_seconds: float, seconds: float, text: TextStatistics
) -> Choice:
    tokens = max(1.0, seconds / token_seconds)
    train = training_options(model, tokens, text)
    return Choice(model, train, token_seconds, tokens, expected_loss(model, tokens, text))


def _seconds(model: ModelConfig, measured: Mapping[ModelConfig, float]) -> float:
    """Of one token, by the work in it and by the speed of the measured shape nearest in width.

    Narrow products use less of a processor: width / (width + 64) of its speed, roughly.
    """
    if model in measured:
        return measured[model]
    if not measured:
        return _work(model) / _TYPICAL_SPEED
    near = min(measured, key=lambda other: abs(math.log(other.n_embd / model.n_embd)))
    return measured[near] * _work(model) / _work(near)


def _work(model: ModelConfig) -> float:
    return model.flops_per_token() * (1 + 64 / model.n_embd)
