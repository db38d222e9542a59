"""Figures of runs. `loss_curve([Path("runs/book")], Path("loss.png"))`

Reads metrics.jsonl only; knows no model.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path

from glassgpt.errors import UserError
from glassgpt.runlog import read_metrics


def loss_curve(
    runs: Sequence[Path], target: Path, *, vocab_size: int | None = None, x: str = "step"
) -> None:
    """Training and validation loss of `runs` against "step", "tokens" or "seconds".

    With `vocab_size`, a line at ln(V): the loss of guessing every token with equal chance.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(figsize=(8, 5))
    for index, run in enumerate(runs):
        rows = read_metrics(run / "metrics.jsonl")
        color = f"C{index}"
        label = f"{run.name} " if len(runs) > 1 else ""
        train = [(row[x], row["train_loss"]) for row in rows if row.get("train_loss") is not None]
        val = [(row[x], row["val_loss"]) for row in rows if row.get("val_loss") is not None]
        if not train and not val:
            raise UserError(f"{run / 'metrics.jsonl'} holds no losses yet")
        if train:
            axes.plot(*zip(*train, strict=True), color=color, alpha=0.25, linewidth=0.8)
            axes.plot(*zip(*_smooth(train), strict=True), color=color, label=f"{label}training")
        if val:
            axes.plot(*zip(*val, strict=True), "o--", color=color, markersize=4,
                      markerfacecolor="white", label=f"{label}validation")  # fmt: skip
            step, best = min(val, key=lambda point: point[1])
            axes.annotate(f"{best:.3f}", (step, best), textcoords="offset points",
                          xytext=(0, 8), ha="center", color=color)  # fmt: skip
    if vocab_size is not None:
        guessing = math.log(vocab_size)
        label = f"guessing: ln({vocab_size:,}) = {guessing:.2f}"
        axes.axhline(guessing, color="gray", linewidth=0.8, linestyle=":", label=label)
    axes.set_xlabel({"step": "step", "tokens": "tokens", "seconds": "seconds"}[x])
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.2)
    axes.legend()
    figure.tight_layout()
    temporary = target.with_name(f".partial-{target.name}")
    figure.savefig(temporary, dpi=120)
    plt.close(figure)
    temporary.replace(target)


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential average over about a fortieth of the curve, its start-up bias removed as in
    Adam; a longer memory would lag behind where the loss falls fast."""
    memory, average, smoothed = 1 - 1 / max(2.0, len(points) / 40), 0.0, []
    for count, (x, y) in enumerate(points, start=1):
        average = memory * average + (1 - memory) * y
        smoothed.append((x, average / (1 - memory**count)))
    return smoothed
