"""What a page may ask, field by field; `explorer.py` answers.

TraceRequest(text="Once upon a time", off=["3.mlp"])
"""

from __future__ import annotations

from dataclasses import dataclass, field

from glassgpt.interpret.lens import Fill


@dataclass(frozen=True)
class Which:
    """Which model: `a` or `b`, perhaps early in its training, perhaps without some parts."""

    model: str = "a"
    snapshot: int | None = None
    off: list[str] = field(default_factory=list)
    fill: Fill = "zero"


@dataclass(frozen=True)
class Patch:
    """Parts whose activations are taken from a pass over another text."""

    parts: list[str]
    text: str | None = None
    tokens: list[int] | None = None


@dataclass(frozen=True)
class TraceRequest(Which):
    text: str = ""
    tokens: list[int] | None = None  # instead of the text
    patch: Patch | None = None


@dataclass(frozen=True)
class Filters:
    """The fields of `Sampling` that a page sets; with their defaults, no filter does anything."""

    repetition_penalty: float | None = None
    temperature: float = 1.0
    top_k: int | None = None
    top_p: float | None = None
    min_p: float | None = None


@dataclass(frozen=True)
class DistributionRequest(Filters):
    position: int = -1
    show: int = 60
    seen: list[int] | None = None  # what the repetition penalty lowers; None: the text


@dataclass(frozen=True)
class SampleRequest(Which, Filters):
    prompt: list[int] = field(default_factory=list)
    new: list[int] = field(default_factory=list)  # tokens that were already drawn after the prompt
    n: int = 1
    seed: int = 1337
    sample: int = 0
    max_new_tokens: int | None = None


@dataclass(frozen=True)
class PatchMapRequest:
    tokens: list[int]
    other: list[int]
    token: int
    name: str = "resid_post"
    model: str = "a"
    snapshot: int | None = None
