"""Which engine for this model on this machine?

engine = build_engine(load_pretrained("runs/book"), weights="int8")
"""

from __future__ import annotations

from glassgpt.checkpoint import Checkpoint
from glassgpt.config import EngineName, WeightPrecision
from glassgpt.engine import Engine


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
