"""Which engine for this model on this machine?

engine = build_engine(load_pretrained("runs/book"), weights="int8")
"""

from __future__ import annotations

from typing import Literal

from glassgpt.checkpoint import Checkpoint
from glassgpt.engine import Engine

EngineName = Literal["auto", "numba", "numpy", "torch", "gpu"]
WeightPrecision = Literal["float32", "int8", "int4"]


def build_engine(
    checkpoint: Checkpoint,
    *,
    device: str = "auto",
    engine: EngineName = "auto",
    weights: WeightPrecision = "float32",
    threads: int | None = None,
) -> Engine:
    """An engine with this checkpoint's weights."""
    from glassgpt.engine.reference import ReferenceEngine
    from glassgpt.model import GPT

    return ReferenceEngine(GPT.from_weights(checkpoint.config, checkpoint.weights))
