"""Pictures of what is inside a model: embeddings in two dimensions, attention, numbers by token.

    draw_attention(Path("attention.png"), patterns, ["The", "␣cat"], title="book")   # (L, H, T, T)

Knows arrays and labels; neither models nor tokenizers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glassgpt.reporting.plots import COLOURS, new_figure, readable, save, style

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

_TRIED = 2500  # labels for which a free place is looked for
_WIDE, _SMALLEST = 16, 0.7  # inches: of all panels together, and of one at least
# Where a label may stand: at its point, beside it, or some pixels away, at the end of a line.
_AROUND = [(1, 0), (-1, 0), (0, 1), (0, -1)]
_CORNERS = [(1, 1), (-1, 1), (1, -1), (-1, -1)]
_SIDES = [
    ((0, 0), 0),
    *((side, 0) for side in _AROUND),
    *((side, far) for far in (15, 30, 45, 60) for side in _AROUND + _CORNERS),
]
_FUTURE = "0.9"  # the grey of what no token may see


# -- embeddings ----------------------------------------------------------------------------------


@style()
def draw_embedding(
    target: Path,
    table: np.ndarray,
    labels: Sequence[str],
    kinds: Sequence[str],
    colours: Mapping[str, str],
    *,
    positions: np.ndarray | None = None,
    title: str,
) -> None:
    """The rows of `table` (V, C) where their two principal components put them, each a dot in the
    colour of its kind, with as many labels as fit, the first ones first; beside it, how alike the
    rows of `positions` (context_length, C) are."""
    figure = new_figure(9 if positions is None else 17, 8)
    panels = figure.subplots(1, 1 if positions is None else 2, squeeze=False)[0]
    points, shares = principal_components(table)
    axes: Axes = panels[0]
    axes.plot(*points.T, linestyle="none")  # sets the limits
    axes.margins(0.06)
    for component, name in enumerate((axes.set_xlabel, axes.set_ylabel)):
        name(f"principal component {component + 1} ({shares[component]:.0%} of the variance)")
    axes.grid(alpha=0.2)
    axes.set_title(
        readable(f"{title}: embeddings of {len(points):,} tokens, {table.shape[1]} wide", target),
        parse_math=False,
    )
    present = [kind for kind in colours if kind in set(kinds)]
    for kind in present:
        axes.scatter([], [], s=40, color=colours[kind], label=kind)
    axes.legend(loc="upper center", bbox_to_anchor=(0.5, -0.09), ncols=3, frameon=False)
    if positions is not None:
        _similarity(figure, panels[1], positions)
    figure.draw_without_rendering()  # the layout decides where points are, and what fits there
    hidden = _label(
        axes,
        points,
        [readable(label, target) for label in labels],
        [colours[kind] for kind in kinds],
    )
    size, alpha = float(np.clip(2000 / len(points), 3, 20)), np.clip(500 / len(points), 0.12, 0.5)
    for kind in present:
        mine = points[(np.array(kinds) == kind) & ~hidden]
        axes.scatter(
            *mine.T, s=size, color=colours[kind], alpha=alpha, lw=0, rasterized=len(points) > 5000
        )  # 50,000 circles are 10 MB of SVG
    save(figure, target, f"Embeddings of {title}")


def principal_components(table: np.ndarray, n: int = 2) -> tuple[np.ndarray, np.ndarray]:
    """(V, C) -> places (V, n) along the n directions of largest variance, and the share (n,) of
    the whole variance in each; of a narrower table, the missing ones are 0."""
    centred = table.astype(np.float64) - table.mean(axis=0, dtype=np.float64)
    variances, directions = np.linalg.eigh(centred.T @ centred)  # rising
    variances, directions = variances[::-1][:n], directions[:, ::-1][:, :n]
    # A direction and its opposite are the same: the largest entry is made positive.
    largest = directions[np.abs(directions).argmax(axis=0), np.arange(directions.shape[1])]
    points = centred @ (directions * np.sign(largest))
    missing = n - points.shape[1]
    shares = np.maximum(variances, 0) / max(float((centred**2).sum()), 1e-30)
    return np.pad(points, ((0, 0), (0, missing))), np.pad(shares, (0, missing))


def _similarity(figure: Figure, axes: Axes, positions: np.ndarray) -> None:
    lengths = np.linalg.norm(positions, axis=1, keepdims=True)
    unit = positions / np.maximum(lengths, 1e-30)
    picture = axes.imshow(unit @ unit.T, cmap="PuOr", vmin=-1, vmax=1)  # safe for all eyes
    axes.set_xlabel("position (tokens from the beginning)")
    axes.set_ylabel("position (tokens from the beginning)")
    axes.set_title(f"Position embeddings: how alike are {len(positions):,} positions?")
    figure.colorbar(picture, ax=axes, shrink=0.7, label="cosine similarity")


def _label(
    axes: Axes, points: np.ndarray, labels: Sequence[str], colours: Sequence[str]
) -> np.ndarray:
    """Write labels at or beside their points, wherever no other label stands yet -> which points
    (V,) lie under their own label."""
    figure = axes.get_figure()
    assert figure is not None
    pixel = figure.dpi / 72  # of a point
    places = axes.transData.transform(points)  # (V, 2) pixels
    size = 11 if len(points) < 200 else 8
    taken = np.empty((0, 4))  # left, bottom, right, top
    hidden = np.zeros(len(points), dtype=bool)
    for i in range(min(len(points), _TRIED)):
        room = np.array([_width(labels[i], size), size * 1.15]) * pixel
        for side, distance in _SIDES if len(points) < 200 else _SIDES[:5]:
            centre = places[i] + np.array(side) * (room / 2 + 2.5) + np.array(side) * distance
            box = np.concatenate([centre - room / 2, centre + room / 2])
            apart = (box[:2] > taken[:, 2:]).any(axis=1) | (box[2:] < taken[:, :2]).any(axis=1)
            if not apart.all():
                continue
            taken = np.vstack([taken, box])
            hidden[i] = side == (0, 0)
            leader = dict(arrowstyle="-", lw=0.5, color=colours[i], shrinkA=0, shrinkB=0)
            axes.annotate(
                labels[i],
                points[i],
                (centre - places[i]) / pixel,
                textcoords="offset points",
                ha="center",
                va="center",
                fontsize=size,
                color=colours[i],
                parse_math=False,
                annotation_clip=False,
                arrowprops=leader if distance else None,
                bbox=dict(facecolor="white", alpha=0.7, edgecolor="none", pad=0.3),
            )
            break
    return hidden


def _width(text: str, size: float) -> float:
    """Points, about: what is wide in most fonts is counted double."""
    return size * sum(1.0 if ord(char) > 0x2E7F else 0.66 for char in text)


# -- attention -----------------------------------------------------------------------------------


@style()
def draw_attention(
    target: Path,
    patterns: np.ndarray,
    tokens: Sequence[str],
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    title: str,
) -> None:
    """A panel for each layer (a row) and head (a column): which token (a row of the panel) gathers
    how much from which earlier one (a column).

    patterns (L, H, T, T), rows that sum to 1; `layers` and `heads` are their numbers [0, 1, ...].
    """
    L, H, T, _ = patterns.shape
    layers, heads = layers or range(L), heads or range(H)
    shown = [readable(token, target) for token in tokens]
    alone = L == H == 1
    side = _side(T, max(L, H))  # inches of a panel
    margin = 0.9 + 0.09 * max(map(len, shown))  # for names
    figure = new_figure(H * side + margin + 1.2, max(3.8, L * side + margin + 0.3))
    figure.get_layout_engine().set(wspace=0.02, hspace=0.02)  # type: ignore[union-attr]
    panels = figure.subplots(L, H, squeeze=False)
    shades = _shades()
    future = np.triu(np.ones((T, T), dtype=bool), k=1)
    for (i, j), axes in np.ndenumerate(panels):
        picture = axes.imshow(np.ma.array(patterns[i, j], mask=future), **shades)
        if alone and T <= 16:
            _write_numbers(axes, patterns[i, j])
        if i == 0 and not alone:
            axes.set_title(f"head {heads[j]}", fontsize=9)
        if j == H - 1 and not alone:
            axes.annotate(
                f"layer {layers[i]}",
                (1.04, 0.5),
                xycoords="axes fraction",
                rotation=270,
                va="center",
                fontsize=9,
            )
        _name_tokens(axes, shown, side, left=j == 0, below=i == L - 1)
    figure.supxlabel("token that is looked at (key)")
    figure.supylabel("token that looks (query)")
    figure.suptitle(readable(title, target), parse_math=False)
    bar = figure.colorbar(
        picture,
        ax=panels,
        shrink=min(1.0, 4 / (L * side)),
        aspect=25,
        ticks=[0, 0.01, 0.05, 0.2, 0.5, 1],
    )
    bar.set_label("attention weight (rows sum to 1)")
    bar.ax.set_yticklabels(["0", "0.01", "0.05", "0.2", "0.5", "1"])
    save(figure, target, f"Attention of {title}")


def _shades() -> dict[str, Any]:
    from matplotlib import colormaps
    from matplotlib.colors import PowerNorm

    # By lightness: for all eyes. The root shows small weights, of which there are most.
    return dict(cmap=colormaps["Blues"].with_extremes(bad=_FUTURE), norm=PowerNorm(0.5, 0, 1))


def _side(T: int, panels: int) -> float:
    """Inches of a panel with T tokens, so many of them in a row or column."""
    if panels == 1:
        return float(np.clip(0.3 * T, 4, 16))
    return float(np.clip(0.13 * T, 1.1, max(_WIDE / panels, _SMALLEST)))


def _name_tokens(axes: Axes, shown: Sequence[str], side: float, *, left: bool, below: bool) -> None:
    """Tokens at the outer panels; every second, third, ... where they would overlap."""
    room = 72 * side / len(shown)  # points for a token
    every = int(np.ceil(6.5 / room))
    at = range(0, len(shown), every)
    how: dict[str, Any] = dict(fontsize=float(np.clip(0.8 * room * every, 5, 10)), parse_math=False)
    upright = 90 if max(map(len, shown)) > 1 else 0
    names = [shown[i] for i in at]
    axes.set_xticks(at if below else [], names if below else [], rotation=upright, **how)
    axes.set_yticks(at if left else [], names if left else [], **how)


def _write_numbers(axes: Axes, pattern: np.ndarray) -> None:
    for i in range(len(pattern)):
        for j in range(i + 1):
            colour = "white" if pattern[i, j] > 0.4 else "black"
            axes.text(
                j,
                i,
                f"{pattern[i, j]:.2f}".removeprefix("0"),
                ha="center",
                va="center",
                fontsize=7,
                color=colour,
            )


# -- numbers by token ----------------------------------------------------------------------------


@style()
def draw_grid(
    target: Path,
    values: np.ndarray,
    rows: Sequence[str],
    columns: Sequence[str],
    *,
    cells: Sequence[Sequence[str]] | None = None,
    title: str,
    x: str,
    bar: str,
    limits: tuple[float, float] | None = None,
) -> None:
    """`values` (R, T) as shades, the last row at the top: by lightness between `limits`, or
    around zero with a colour for each sign. `cells`: a word for each."""
    R, T = values.shape
    wide = max([2, *(len(cell) for row in cells or () for cell in row)])
    side = min(1.2, max(0.45, 0.11 * wide), 120 / T)  # inches of a column
    figure = new_figure(T * side + 3.2, max(3.6, R * 0.32 + 1.9))
    axes = figure.subplots()
    largest = float(np.abs(values).max(initial=0)) or 1.0
    low, high = limits or (-largest, largest)
    picture = axes.imshow(
        values,
        cmap="Blues" if limits else "PuOr",
        vmin=low,
        vmax=high,
        aspect="auto",
        origin="lower",
    )
    for (i, j), value in np.ndenumerate(values) if cells else ():
        dark = (value - low) / (high - low) > 0.55
        axes.text(
            j,
            i,
            readable(cells[i][j], target),  # type: ignore
            ha="center",
            va="center",
            fontsize=8,
            color="white" if dark else "black",
            parse_math=False,
        )
    axes.set_yticks(range(R), rows, fontsize=8)
    axes.set_xticks(
        range(T),
        [readable(column, target) for column in columns],
        fontsize=8,
        rotation=90 if max(map(len, columns)) > 3 else 0,
        parse_math=False,
    )
    axes.set_xlabel(x)
    axes.set_title(readable(title, target), parse_math=False)
    figure.colorbar(picture, ax=axes, aspect=12).set_label(readable(bar, target), parse_math=False)
    save(figure, target, title)


@style()
def draw_bars(
    target: Path,
    values: Sequence[float],
    labels: Sequence[str],
    *,
    title: str,
    x: str,
    guess: float | None = None,
) -> None:
    """A bar for each label, the first at the top; `guess`: a line where guessing would be."""
    figure = new_figure(7, 0.2 * len(values) + 1.6)
    axes, at = figure.subplots(), range(len(values))
    colours = [COLOURS[0] if value >= 0 else COLOURS[1] for value in values]
    axes.barh(at, values, color=colours)
    for i, value in zip(at, values, strict=True):
        axes.annotate(
            f"{value:.2f}",
            (value, i),
            xytext=(3 if value >= 0 else -3, 0),
            textcoords="offset points",
            va="center",
            fontsize=7,
            ha="left" if value >= 0 else "right",
            bbox=dict(facecolor="white", edgecolor="none", pad=0.5),
        )
    axes.set_yticks(at, [readable(label, target) for label in labels], fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.margins(x=0.12, y=0.01)
    axes.axvline(0, color="black", linewidth=0.8)
    if guess is not None:
        axes.axvline(guess, color="gray", linestyle=":", label=f"guessing: {guess:.2f}")
        axes.legend(loc="lower right")
    axes.set_xlabel(x)
    axes.set_title(readable(title, target), parse_math=False)
    axes.grid(axis="x", alpha=0.2)
    save(figure, target, title)
