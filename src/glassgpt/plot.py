"""Figures of runs. `loss_curve(Path("runs/book"), guessing=(4.17, "guessing"))`

Knows metrics.jsonl and plain numbers, no model.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glassgpt.errors import explain_os_errors
from glassgpt.runlog import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_LABEL_WIDTH = 24  # characters of a label beside a matrix


def loss_curve(run: Path, *, guessing: tuple[float, str]) -> None:
    """loss.png: training and validation loss of a run against its steps, and a line at the loss of
    guessing with equal chance, with its name."""
    from matplotlib.figure import Figure  # pyplot would keep figures, and choose a display

    rows = read_metrics(run / "metrics.jsonl")
    figure = Figure(figsize=(8, 5), layout="tight")
    axes = figure.subplots()
    train, val = (
        [(row["step"], row[name]) for row in rows if row.get(name) is not None]
        for name in ("train_loss", "val_loss")
    )
    if train:
        axes.plot(*zip(*train, strict=True), color="C0", alpha=0.25, linewidth=0.8)
        axes.plot(*zip(*_smooth(train), strict=True), color="C0", label="training")
    if val:
        axes.plot(*zip(*val, strict=True), "o--", color="C0", markersize=4,
                  markerfacecolor="white", label="validation")  # fmt: skip
        step, best = min(val, key=lambda point: point[1])
        axes.annotate(f"{best:.3f}", (step, best), textcoords="offset points",
                      xytext=(0, 8), ha="center", color="C0")  # fmt: skip
    axes.axhline(guessing[0], color="gray", linewidth=0.8, linestyle=":", label=guessing[1])
    axes.set_xlabel("step")
    axes.set_ylabel("loss (nats per token)")
    axes.grid(alpha=0.2)
    axes.legend()
    _save(figure, run / "loss.png")


def confusion(path: Path, matrix: np.ndarray, labels: Sequence[str]) -> None:
    """Which classes are taken for which, as a picture: `matrix` (n, n) counts examples of class i
    (a row) that were guessed to be j; every cell also shows its share of the row."""
    from matplotlib.figure import Figure

    n, total = len(labels), matrix.sum(axis=1, keepdims=True)
    share = matrix / np.maximum(total, 1)  # (n, n)
    cell = min(max(0.5, 4 / n), 30 / n)  # inches, so that numbers can be read among 60 classes
    figure = Figure(figsize=(n * cell + 3, n * cell + 2), layout="constrained")
    axes = figure.subplots()
    edges = np.arange(n + 1) - 0.5
    cells = axes.pcolormesh(edges, edges, share, cmap="Blues", vmin=0, vmax=1,  # by lightness:
                            edgecolors="lightgray", linewidth=0.3)  # for all eyes  # fmt: skip
    axes.set_aspect("equal")
    axes.invert_yaxis()
    for i, j in np.argwhere(matrix > 0) if cell >= 0.5 else ():
        text = f"{matrix[i, j]:,}\n{share[i, j]:.0%}"
        colour = "white" if share[i, j] > 0.5 else "black"
        axes.text(j, i, text, ha="center", va="center", color=colour, fontsize=min(11, 14 * cell),
                  clip_on=True)  # so that the layout need not measure it  # fmt: skip
    shown = [" ".join(label.split()) for label in labels]
    shown = [s if len(s) <= _LABEL_WIDTH else f"{s[: _LABEL_WIDTH - 1]}…" for s in shown]
    how: dict[str, Any] = {"fontsize": min(10, 20 * cell), "parse_math": False}
    upright = 90 if max(map(len, shown)) > 12 * cell else 0
    axes.set_xticks(range(n), shown, rotation=upright, **how)
    axes.set_yticks(range(n), shown, **how)
    axes.set_xlabel("predicted class")
    axes.set_ylabel("true class")
    right = matrix.trace()
    axes.set_title(f"{right:,} of {matrix.sum():,} right")
    bar = figure.colorbar(cells, ax=axes, shrink=0.6, format="{x:.0%}")
    bar.set_label("share of the true class")
    _save(figure, path)


def _save(figure: Figure, target: Path) -> None:
    """All of the picture or what was there before."""
    temporary = target.with_name(f".partial-{target.name}")
    with explain_os_errors(f"write {target}"), warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # letters that the font lacks
        figure.savefig(temporary, dpi=120)
        temporary.replace(target)


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential average over about a fortieth of the curve, its start-up bias removed as in
    Adam; a longer memory would lag behind where the loss falls fast."""
    memory, average, smoothed = 1 - 1 / max(2.0, len(points) / 40), 0.0, []
    for count, (x, y) in enumerate(points, start=1):
        average = memory * average + (1 - memory) * y
        smoothed.append((x, average / (1 - memory**count)))
    return smoothed
