"""Figures of runs. `loss_curve(Path("runs/book"), guessing=(4.17, "guessing"))`

Reads metrics.jsonl only; knows no model.
"""

from __future__ import annotations

from pathlib import Path

from glassgpt.errors import explain_os_errors
from glassgpt.runlog import read_metrics


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
    target = run / "loss.png"
    temporary = run / ".partial-loss.png"
    with explain_os_errors(f"write {target}"):
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
