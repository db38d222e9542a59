"""Figures: how they are made and saved (PNG, SVG, HTML), and those of runs: losses, confusions.

    loss_curves(Path("loss.svg"), [Curve("book", rows)])     # rows: those of metrics.jsonl

matplotlib is imported when a figure is made. This module knows plain numbers, no model.
"""

from __future__ import annotations

import contextlib
import functools
import html
import io
import math
import re
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from glassgpt.errors import UserError
from glassgpt.reporting.run_log import read_metrics
from glassgpt.system import write_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

X = Literal["step", "tokens", "time"]
_MARKERS = "os^DvP*X"  # runs differ in marker and colour
_LABEL_WIDTH = 24  # characters of a label beside a matrix
_LINES = (("train_loss", "training"), ("val_loss", "validation"), ("keep_loss", "text to keep"))
# Colours that colour-blind people can tell apart, also in print: those of Okabe and Ito
# (jfly.uni-koeln.de/color) without yellow, which is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SUFFIXES = (".png", ".svg", ".html")
_FONTS = (
    "DejaVu Sans",
    "Noto Sans CJK SC",
    "Noto Sans CJK JP",
    "Noto Sans CJK KR",
    "PingFang SC",
    "Hiragino Sans",
    "Apple SD Gothic Neo",
    "Microsoft YaHei",
    "Yu Gothic",
    "Malgun Gothic",
    "WenQuanYi Micro Hei",
    "WenQuanYi Zen Hei",
    "Noto Sans",
)


# -- every figure --------------------------------------------------------------------------------


def check_target(target: Path, overwrite: bool) -> None:
    """Raises `UserError`, before any work is done, for a name that no figure can have."""
    if target.suffix.lower() not in _SUFFIXES:
        raise UserError(
            f"{target}: a figure is a {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}; "
            "end --out with one of these"
        )
    if target.is_dir():
        raise UserError(f"{target} is a folder; name a file")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is no folder; make it, or choose another --out")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; --overwrite replaces it, --out names another file")


@contextlib.contextmanager
def style() -> Iterator[None]:
    """The settings of matplotlib while a figure is made."""
    import matplotlib

    with matplotlib.rc_context(
        {
            "font.family": _fonts(),
            "svg.fonttype": "none",  # text stays text: searched, copied, in the viewer's fonts
            "svg.hashsalt": "glassgpt",  # the same figure is the same file
        }
    ):
        yield


def new_figure(width: float, height: float) -> Figure:
    """An empty white figure; sizes in inches."""
    from matplotlib.figure import Figure  # pyplot would keep figures, and choose a display

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(figure: Figure, target: Path, title: str, about: str = "") -> None:
    """Write a PNG, an SVG, or a page of HTML that needs no other file."""
    kind, buffer = target.suffix.lower().removeprefix("."), io.BytesIO()
    metadata = {"Title": title, **({} if kind == "png" else {"Date": None, "Creator": None})}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # letters that the font lacks
        figure.savefig(buffer, format="svg" if kind == "html" else kind, dpi=120, metadata=metadata)
    content = buffer.getvalue()
    if kind == "html":
        svg = re.sub(r"<metadata>.*?</metadata>", "", content.decode(), flags=re.DOTALL)
        content = _page(svg, title, about).encode("utf-8", "replace")
    write_file(target, content)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px system-ui, sans-serif; margin: 1.5rem auto; max-width: {width}px; \
padding: 0 1rem }}
figure {{ margin: 0; padding: .5rem; background: white; border-radius: 8px; overflow-x: auto }}
svg {{ display: block; width: 100%; height: auto }}
pre {{ overflow-x: auto }}
</style>
<figure>
{svg}
</figure>
{about}</html>
"""


def _page(svg: str, title: str, about: str) -> str:
    """A page around the picture, which stays white in dark mode: its colours need that."""
    width = round(float(re.search(r'width="([\d.]+)pt"', svg).group(1)) * 1.6)  # type: ignore
    about = f"<pre>{html.escape(about)}</pre>\n" if about else ""
    return _PAGE.format(
        title=html.escape(title), svg=svg[svg.index("<svg") :].strip(), about=about, width=width
    )


@functools.cache
def _fonts() -> list[str]:
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    return [name for name in _FONTS if name in installed]


def readable(text: str, target: Path) -> str:
    """`text` as a figure can show it: in a PNG, a character that no installed font has becomes its
    code point (U+4E2D). SVG and HTML use the fonts of whoever looks at them."""
    if text.isascii() or target.suffix.lower() != ".png":
        return text
    from matplotlib.font_manager import findfont, get_font

    fonts = [get_font(findfont(name)) for name in _fonts()]
    return "".join(
        char if any(font.get_char_index(ord(char)) for font in fonts) else f"U+{ord(char):04X}"
        for char in text
    )


def font_note(texts: Iterable[str], target: Path) -> str | None:
    """A note about the characters in `texts` that `target` can only show as code points."""
    missing = sorted({char for text in texts for char in text if readable(char, target) != char})
    if not missing:
        return None
    return (
        f"note: {len(missing)} characters appear as code points (U+...), since no font here "
        "has them; --out with .svg or .html leaves them to the viewer's fonts"
    )


def shortened(text: str, width: int) -> str:
    """`text` on one line of at most `width` characters, with "…" for what is left out."""
    text = " ".join(text.split())
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - half]}…{text[-half:]}"


# -- losses --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Curve:
    """The losses of a run, and its name in the legend."""

    label: str
    rows: Sequence[dict[str, float]]  # of metrics.jsonl
    guessing: tuple[float, str] | None = None  # the loss of guessing with equal chance, its name

    def best(self) -> tuple[int, float] | None:
        """(step, loss) of the best evaluation; None before the first."""
        return min(self._values("step", "val_loss"), key=lambda point: point[1], default=None)

    def points(self, x: X, loss: str, *, above: float = -math.inf) -> list[tuple[float, float]]:
        """(x, loss) of the rows that have both as finite numbers, where x > `above`."""
        field = "seconds" if x == "time" else x
        return [point for point in self._values(field, loss) if point[0] > above]

    def _values(self, x: str, y: str) -> list[tuple[Any, Any]]:
        pairs = ((row.get(x), row.get(y)) for row in self.rows)
        return [pair for pair in pairs if all(map(_is_number, pair))]


def guessing_loss(n: int, what: str = "") -> tuple[float, str]:
    """The loss of choosing among `n` with equal chance, and its name: "guessing: ln(65) = 4.17"."""
    return math.log(n), f"guessing: ln({n:,}{what}) = {math.log(n):.2f}"


def loss_curve(run: Path, *, guessing: tuple[float, str], per: str = "token") -> None:
    """Draw loss.png of a run: training and validation loss against steps, and a line at the loss of
    guessing with equal chance."""
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
    """Draw the losses of runs (nats per `per`), a colour for each, with the best evaluation marked.

    The suffix of `target` chooses the format; `about` is text below the figure on a page of HTML.
    Raises `UserError` if no run has a point to draw.
    """
    with style():
        figure = new_figure(8, 5 + 0.25 * (len(curves) if len(curves) > 1 else 0))
        axes = figure.subplots()
        above = 0.0 if log_x else -math.inf  # a logarithm has no place for step 0
        scale, axis = _time_unit(curves) if x == "time" else (1.0, _AXES[x])
        drawn = [
            _draw(axes, i, curve, x, scale, above, len(curves) == 1, target)
            for i, curve in enumerate(curves)
        ]
        if not any(drawn):
            where = f"{x} on a logarithmic axis" if log_x else x
            raise UserError(
                f"no losses to draw against {where}: the runs have just begun, or "
                "their metrics.jsonl lacks it"
            )
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
    """Draw the lines of one run; returns the names of the losses that it had."""
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
            axes.plot(
                *zip(*_smooth(points), strict=True),
                marker=dot,
                lw=1.1,
                alpha=0.9 if alone else 0.5,
                **how,
            )
        elif loss == "keep_loss":
            axes.plot(*zip(*points, strict=True), marker=dot, ls="-.", lw=1.3, **how)
        else:
            axes.plot(
                *zip(*points, strict=True),
                marker=marker,
                ls="--" if alone else "-",
                lw=1.4,
                markersize=4.5,
                markerfacecolor="white",
                **how,
            )
    colour = COLOURS[(1 if alone else i) % len(COLOURS)]
    best = curve.best()
    note = f"best {best[1]:.3f} at step {best[0]:,}" if best else "no evaluation yet"
    label = note if alone else f"{readable(curve.label, target)}: {note}"
    at = [(place / scale, y) for place, y in curve.points(x, "val_loss", above=above)]
    lowest = min(at, key=lambda point: point[1], default=None)
    if lowest and best:
        axes.plot(
            *lowest,
            marker=marker,
            markersize=9,
            color=colour,
            markeredgecolor="black",
            linestyle="none" if alone else "-",
            zorder=3,
            label=label,
        )
    elif not alone:
        axes.plot([], [], color=colour, marker=marker, label=label)
    return drawn


def _explain_lines(axes: Axes, drawn: set[str]) -> None:
    """Legend entries for the kinds of lines, which are the same for all runs."""
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
    """Seconds in the unit of time that suits the longest run, and the name of the axis."""
    times = [at for curve in curves for loss, _ in _LINES for at, _ in curve.points("time", loss)]
    longest = max(times, default=0.0)
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
    """Put the legend below the axes, where it hides nothing."""
    entries, labels = axes.get_legend_handles_labels()
    wide = max(map(len, labels)) > 45
    columns = 1 if wide else len(labels) if len(labels) <= 4 else 2
    legend = figure.legend(
        entries, labels, loc="outside lower center", fontsize=9, frameon=False, ncols=columns
    )
    for text in legend.get_texts():
        text.set_parse_math(False)


def _dashes() -> Iterator[Any]:
    """Line styles: dotted, then with longer and longer dashes."""
    yield ":"
    for length in range(3, 99, 3):
        yield (0, (length, 2))


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and math.isfinite(value)


def _smooth(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """Exponential average over about 1/40 of the curve, without bias at the start (as in Adam). A
    longer average would lag behind where the loss falls fast."""
    memory, average, smoothed = 1 - 1 / max(1.0, len(points) / 40), 0.0, []
    for count, (x, y) in enumerate(points, start=1):
        average = memory * average + (1 - memory) * y
        smoothed.append((x, average / (1 - memory**count)))
    return smoothed


# -- classes -------------------------------------------------------------------------------------


@style()
def confusion(path: Path, matrix: np.ndarray, labels: Sequence[str]) -> None:
    """Draw a confusion matrix: `matrix` (n, n) counts the examples of class i (a row) that were
    guessed to be j; every cell also shows its share of the row."""
    n, total = len(labels), matrix.sum(axis=1, keepdims=True)
    share = matrix / np.maximum(total, 1)  # (n, n)
    cell = min(max(0.5, 4 / n), 30 / n)  # inches, so that numbers can be read among 60 classes
    figure = new_figure(n * cell + 3, n * cell + 2)
    axes = figure.subplots()
    edges = np.arange(n + 1) - 0.5
    cells = axes.pcolormesh(
        edges,
        edges,
        share,
        cmap="Blues",
        vmin=0,
        vmax=1,  # by lightness:
        edgecolors="lightgray",
        linewidth=0.3,
    )  # for all eyes
    axes.set_aspect("equal")
    axes.invert_yaxis()
    for i, j in np.argwhere(matrix > 0) if cell >= 0.5 else ():
        text = f"{matrix[i, j]:,}\n{share[i, j]:.0%}"
        colour = "white" if share[i, j] > 0.5 else "black"
        axes.text(
            j,
            i,
            text,
            ha="center",
            va="center",
            color=colour,
            fontsize=min(11, 14 * cell),
            clip_on=True,
        )  # so that the layout need not measure it
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
