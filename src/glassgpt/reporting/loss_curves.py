"""Figures of runs: losses against steps, tokens or time; which classes are taken for which.

    loss_curves(Path("loss.svg"), [Curve("book", rows)])     # rows: those of metrics.jsonl

Knows metrics.jsonl and plain numbers, no model.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from glassgpt.errors import UserError
from glassgpt.reporting.canvas import COLOURS, new_figure, readable, save, shortened, style
from glassgpt.reporting.run_log import read_metrics

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

X = Literal["step", "tokens", "time"]
_MARKERS = "os^DvP*X"  # a second difference, beside the colour
_LABEL_WIDTH = 24  # characters of a label beside a matrix
_LINES = (("train_loss", "training"), ("val_loss", "validation"), ("keep_loss", "text to keep"))


# -- losses --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """A run and what to call it."""

    label: str
    rows: Sequence[dict[str, Any]]  # of metrics.jsonl
    guessing: tuple[float, str] | None = None  # the loss of guessing with equal chance, its name

    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the best evaluation; None before the first."""
        return min(self._values("step", "val_loss"), key=lambda point: point[1], default=None)

    def points(self, x: X, loss: str, *, above: float = -math.inf) -> list[tuple[float, float]]:
        """(x, loss) of every row that has both as finite numbers, x above a bound."""
        field = "seconds" if x == "time" else x
        return [point for point in self._values(field, loss) if point[0] > above]

    def _values(self, x: str, y: str) -> list[tuple[Any, Any]]:
        pairs = ((row.get(x), row.get(y)) for row in self.rows)
        return [pair for pair in pairs if all(map(_is_number, pair))]


def loss_curve(run: Path, *, guessing: tuple[float, str], per: str = "token") -> None:
    """loss.png: training and validation loss of a run against its steps, and a line at the loss of
    guessing with equal chance, with its name."""
    curve = Curve(shortened(run.resolve().name, 60), read_metrics(run / "metrics.jsonl"), guessing)
    loss_curves(run / "loss.png", [curve], per=per)


def loss_curves(
    target: Path,
    curves: Sequence[Curve],
    *,
    x: X = "step",
    log_x: bool = False,
    log_y: bool = False,
    per: str = "token",
    about: str = "",
) -> None:
    """The losses of some runs (nats per `per`), a colour for each, the best evaluations marked.

    The suffix of `target` decides what is written; `about` is the text below a page of HTML.
    Raises `UserError` where no run has a point to draw.
    """
    with style():
        figure = new_figure(8, 5 + 0.25 * (len(curves) if len(curves) > 1 else 0))
        axes = figure.subplots()
        above = 0.0 if log_x else -math.inf  # a logarithm has no place for step 0
        scale, axis = _time_unit(curves) if x == "time" else (1.0, _AXES[x])
        drawn = [_draw(axes, i, curve, x, scale, above, len(curves) == 1, target)
                 for i, curve in enumerate(curves)]  # fmt: skip
        if not any(drawn):
            where = f"{x} on a logarithmic axis" if log_x else x
            raise UserError(f"no losses to draw against {where}: the runs have just begun, or "
                            "their metrics.jsonl lacks it")  # fmt: skip
        if len(curves) > 1:
            _explain_lines(axes, set().union(*drawn))
        lines = dict.fromkeys(curve.guessing for curve in curves if curve.guessing)
        for (loss, name), dash in zip(lines, _dashes(), strict=False):
            axes.axhline(loss, color="0.4", linewidth=1, linestyle=dash, label=name)
        _name_axes(axes, x, axis, per, log_x, log_y)
        if len(curves) == 1:
            axes.set_title(readable(curves[0].label, target), parse_math=False)
        _legend(figure, axes)
        title = f"Loss of {', '.join(curve.label for curve in curves)}"
        save(figure, target, title, about)


def _draw(
    axes: Axes, i: int, curve: Curve, x: X, scale: float, above: float, alone: bool, target: Path
) -> set[str]:
    """One run's lines -> which of its losses there were."""
    drawn: set[str] = set()
    marker = _MARKERS[i % len(_MARKERS)]
    for j, (loss, name) in enumerate(_LINES):
        colour = COLOURS[(j if alone else i) % len(COLOURS)]
        points = [(at / scale, y) for at, y in curve.points(x, loss, above=above)]
        if not points:
            continue
        drawn.add(loss)
        dot = "." if len(points) == 1 else ""
        how: dict[str, Any] = dict(color=colour, label=name if alone else None)
        if loss == "train_loss":
            if alone:  # among several, the noise of each would hide the others
                axes.plot(*zip(*points, strict=True), color=colour, alpha=0.25, linewidth=0.8)
                how["label"] = f"{name} (smoothed)"
            axes.plot(*zip(*_smooth(points), strict=True), marker=dot, lw=1.1,
                      alpha=0.9 if alone else 0.5, **how)  # fmt: skip
        elif loss == "keep_loss":
            axes.plot(*zip(*points, strict=True), marker=dot, ls="-.", lw=1.3, **how)
        else:
            axes.plot(*zip(*points, strict=True), marker=marker, ls="--" if alone else "-",
                      lw=1.4, markersize=4.5, markerfacecolor="white", **how)  # fmt: skip
    colour = COLOURS[(1 if alone else i) % len(COLOURS)]
    best = curve.best()
    note = f"best {best[1]:.3f} at step {best[0]:,}" if best else "no evaluation yet"
    label = note if alone else f"{readable(curve.label, target)}: {note}"
    at = [(place / scale, y) for place, y in curve.points(x, "val_loss", above=above)]
    lowest = min(at, key=lambda point: point[1], default=None)
    if lowest and best:
        axes.plot(*lowest, marker=marker, markersize=9, color=colour, markeredgecolor="black",
                  linestyle="none" if alone else "-", zorder=3, label=label)  # fmt: skip
    elif not alone:
        axes.plot([], [], color=colour, marker=marker, label=label)
    return drawn


def _explain_lines(axes: Axes, drawn: set[str]) -> None:
    """Entries of the legend for what is alike in all runs."""
    kinds: dict[str, dict[str, Any]] = {
        "train_loss": dict(lw=1.1, alpha=0.7, label="training (smoothed)"),
        "val_loss": dict(marker="o", markerfacecolor="white", label="validation, best filled"),
        "keep_loss": dict(linestyle="-.", label="text to keep"),
    }
    for loss, how in kinds.items():
        if loss in drawn:
            axes.plot([], [], color="0.35", **how)


_AXES = {"step": "step (updates of the weights)", "tokens": "tokens trained on"}


def _time_unit(curves: Sequence[Curve]) -> tuple[float, str]:
    """Seconds in a unit that suits the longest run, and the axis's name."""
    longest = max((at for curve in curves for loss, _ in _LINES
                   for at, _ in curve.points("time", loss)), default=0.0)  # fmt: skip
    units = ((7200, 3600.0, "hours"), (120, 60.0, "minutes"), (0, 1.0, "seconds"))
    scale, unit = next((scale, unit) for least, scale, unit in units if longest >= least)
    return scale, f"time ({unit})"


def _name_axes(axes: Axes, x: X, name: str, per: str, log_x: bool, log_y: bool) -> None:
    from matplotlib.ticker import EngFormatter, LogLocator, MaxNLocator, NullLocator

    if log_x:
        axes.set_xscale("log")
        axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
    elif axes.dataLim.x1 == 0:  # an evaluation before the first step, and nothing else
        axes.set_xlim(-0.05, 1)
    if log_y:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(MaxNLocator(10, steps=[1, 2, 5, 10]))
        axes.yaxis.set_major_formatter("{x:.3g}")
    for axis, log in ((axes.xaxis, log_x), (axes.yaxis, log_y)):
        if log:
            axis.set_minor_locator(NullLocator())
    if x == "step":
        axes.xaxis.set_major_formatter("{x:,.0f}")
        if not log_x:
            axes.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    else:
        axes.xaxis.set_major_formatter(EngFormatter(sep="") if x == "tokens" else "{x:g}")
    axes.set_xlabel(name + ", logarithmic" * log_x)
    axes.set_ylabel(f"loss (nats per {per})" + ", logarithmic" * log_y)
    axes.grid(alpha=0.25)


def _legend(figure: Figure, axes: Axes) -> None:
    """Below the picture, where it hides nothing."""
    entries, labels = axes.get_legend_handles_labels()
    wide = max(map(len, labels)) > 45
    columns = 1 if wide else len(labels) if len(labels) <= 4 else 2
    legend = figure.legend(entries, labels, loc="outside lower center", fontsize=9, frameon=False,
                           ncols=columns)  # fmt: skip
    for text in legend.get_texts():
        text.set_parse_math(False)


def _dashes() -> Iterator[Any]:
    """Dotted first, then more and more dashed."""
    yield ":"
    for length in range(3, 99, 3):
        yield (0, (length, 2))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential average over about a fortieth of the curve, its start-up bias removed as in
    Adam; a longer memory would lag behind where the loss falls fast."""
    memory, average, smoothed = 1 - 1 / max(1.0, len(points) / 40), 0.0, []
    for count, (x, y) in enumerate(points, start=1):
        average = memory * average + (1 - memory) * y
        smoothed.append((x, average / (1 - memory**count)))
    return smoothed


# -- classes -------------------------------------------------------------------------------------


@style()
def confusion(path: Path, matrix: np.ndarray, labels: Sequence[str]) -> None:
    """Which classes are taken for which, as a picture: `matrix` (n, n) counts examples of class i
    (a row) that were guessed to be j; every cell also shows its share of the row."""
    n, total = len(labels), matrix.sum(axis=1, keepdims=True)
    share = matrix / np.maximum(total, 1)  # (n, n)
    cell = min(max(0.5, 4 / n), 30 / n)  # inches, so that numbers can be read among 60 classes
    figure = new_figure(n * cell + 3, n * cell + 2)
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
    save(figure, path, "Confusion matrix")
