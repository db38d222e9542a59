"""Figures of losses: what is drawn, named and left out. Texts of an SVG are text, so they are read
from there."""

from __future__ import annotations

import json
import math
import re
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import numpy as np
import pytest

from glassgpt.errors import UserError
from glassgpt.reporting import plots as plot
from glassgpt.reporting.plots import (
    COLOURS,
    Curve,
    check_target,
    font_note,
    loss_curve,
    loss_curves,
    readable,
    shortened,
)


def rows(*losses: float, start: int = 0) -> list[dict[str, Any]]:
    """An evaluation and a training loss at every tenth step."""
    found = []
    for i, loss in enumerate(losses):
        at = dict(step=10 * i + start, tokens=5000 * i, seconds=90.0 * i)
        found += [at | dict(val_loss=loss), at | dict(train_loss=loss - 0.1)]
    return found


def texts(path: Path) -> list[str]:
    tree = ElementTree.fromstring(path.read_text())
    return ["".join(e.itertext()) for e in tree.iter("{http://www.w3.org/2000/svg}text")]


def test_one_run_has_its_name_its_lines_its_best_and_guessing(tmp_path: Path) -> None:
    curve = Curve("my $run_1$", rows(4.2, 3.0, 3.5), (math.log(65), "guessing: ln(65) = 4.17"))
    loss_curves(tmp_path / "a.svg", [curve])
    shown = texts(tmp_path / "a.svg")
    for text in ("my $run_1$", "training (smoothed)", "validation", "best 3.000 at step 10",
                 "guessing: ln(65) = 4.17", "loss (nats per token)",
                 "step (updates of the weights)"):  # fmt: skip
        assert text in shown


@pytest.mark.parametrize(
    ("x", "seconds", "name"),
    [("tokens", 1, "tokens trained on"), ("time", 0.5, "time (seconds)"),
     ("time", 1, "time (minutes)"), ("time", 100, "time (hours)")],
)  # fmt: skip
def test_the_axis_is_named_with_its_unit(tmp_path, x, seconds, name) -> None:
    scaled = [row | dict(seconds=seconds * row["seconds"]) for row in rows(4.0, 3.0, 2.5)]
    loss_curves(tmp_path / "a.svg", [Curve("a", scaled)], x=x, per="text")
    assert {name, "loss (nats per text)"} <= set(texts(tmp_path / "a.svg"))


def test_runs_are_told_apart_by_colour_and_named_with_their_best(tmp_path: Path) -> None:
    curves = [Curve(f"run{i}", rows(4.0, 3.0 - i / 10), (4.17, "guessing")) for i in range(9)]
    loss_curves(tmp_path / "a.svg", curves)
    shown = texts(tmp_path / "a.svg")
    assert [text for text in shown if text.startswith("run")] == [
        f"run{i}: best {3 - i / 10:.3f} at step 10" for i in range(9)
    ]
    assert shown.count("guessing") == 1  # the same line for all
    assert shown.count("validation, best filled") == 1
    drawn = set(re.findall(r"stroke: (#[0-9a-f]{6})", (tmp_path / "a.svg").read_text()))
    assert {colour.lower() for colour in COLOURS if colour != "#000000"} <= drawn


def test_a_logarithmic_axis_leaves_step_0_out_and_the_best_stays_the_best(tmp_path: Path) -> None:
    loss_curves(tmp_path / "a.svg", [Curve("a", rows(2.0, 3.0, 2.5))], log_x=True, log_y=True)
    shown = texts(tmp_path / "a.svg")
    assert "step (updates of the weights), logarithmic" in shown
    assert "loss (nats per token), logarithmic" in shown
    assert "best 2.000 at step 0" in shown
    with pytest.raises(UserError, match="no losses to draw against step on a logarithmic axis"):
        loss_curves(tmp_path / "b.svg", [Curve("a", rows(2.0))], log_x=True)
    assert not (tmp_path / "b.svg").exists()


def test_what_is_no_number_is_left_out(tmp_path: Path) -> None:
    odd = [dict(step=5, val_loss=math.nan), dict(step=6, val_loss=math.inf), dict(val_loss=0.1),
           dict(step=7, val_loss="0.2"), dict(step=None, val_loss=0.3)]  # fmt: skip
    curve = Curve("a", rows(4.0, 3.0) + odd)
    assert curve.best() == (10, 3.0)
    assert curve.points("step", "val_loss") == [(0, 4.0), (10, 3.0)]
    assert Curve("b", odd).best() is None
    with pytest.raises(UserError, match="no losses to draw against tokens"):
        loss_curves(tmp_path / "a.png", [Curve("b", odd)], x="tokens")


def test_training_without_evaluation_and_a_single_point(tmp_path: Path) -> None:
    training = [row for row in rows(4.0, 3.0) if "train_loss" in row]
    loss_curves(tmp_path / "a.svg", [Curve("a", training), Curve("b", rows(4.0))])
    shown = texts(tmp_path / "a.svg")
    assert {"a: no evaluation yet", "b: best 4.000 at step 0"} <= set(shown)
    loss_curves(tmp_path / "b.png", [Curve("b", rows(4.0))])
    assert (tmp_path / "b.png").read_bytes().startswith(b"\x89PNG\r\n")


def test_the_curve_of_a_run_is_drawn_by_the_same_code(tmp_path: Path) -> None:
    lines = "".join(json.dumps(row) + "\n" for row in rows(4.0, 3.0)) + '{"step": 3, "to'
    (tmp_path / "metrics.jsonl").write_text(lines)
    loss_curve(tmp_path, guessing=(4.1, "guessing"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["loss.png", "metrics.jsonl"]


def test_few_points_are_not_smoothed_and_noise_is() -> None:
    few = [(float(i), float(i % 2)) for i in range(40)]
    assert plot._smooth(few) == few
    many = [(float(i), float(i % 2)) for i in range(2000)]
    smooth = np.array(plot._smooth(many))[:, 1]
    assert smooth[1000:].std() < 0.02
    assert smooth[1000:].mean() == pytest.approx(0.5, abs=0.01)


def test_a_page_needs_nothing_else(tmp_path: Path) -> None:
    loss_curves(tmp_path / "a.html", [Curve("<b> & co", rows(4.0, 3.0))], about="a <table>")
    page = (tmp_path / "a.html").read_text()
    assert page.startswith("<!doctype html>")
    assert "<pre>a &lt;table&gt;</pre>" in page
    assert "<title>Loss of &lt;b&gt; &amp; co</title>" in page
    assert not re.search(r"<(script|link|img|iframe)|@import|url\((?!#)", page)
    assert set(re.findall(r'(?:src|href)="([^#"][^"]*)"', page)) == set()
    assert page.count("<svg") == 1
    assert "<?xml" not in page
    assert "color-scheme: light dark" in page


@pytest.mark.slow
def test_the_same_figure_is_the_same_file(tmp_path: Path) -> None:
    for name in ("a.svg", "b.svg", "a.png", "b.png"):
        loss_curves(tmp_path / name, [Curve("a", rows(4.0, 3.0))])
    for suffix in ("svg", "png"):
        one, other = ((tmp_path / f"{name}.{suffix}").read_bytes() for name in "ab")
        assert one == other


def test_files_that_no_figure_can_be(tmp_path: Path) -> None:
    (tmp_path / "a.png").write_text("mine")
    for target, message in (
        (tmp_path / "a.pdf", "end --out with one of these"),
        (tmp_path / "a", "a figure is a .png, .svg or .html"),
        (tmp_path / "a.png", "exists; --overwrite replaces it"),
        (tmp_path / "none" / "a.png", "is no folder; make it"),
    ):
        with pytest.raises(UserError, match=message):
            check_target(target, overwrite=False)
    check_target(tmp_path / "a.png", overwrite=True)
    check_target(tmp_path / "B.SVG", overwrite=False)


def test_letters_that_no_font_has_are_code_points_in_png_alone() -> None:
    lacking = "\U000f0000"  # for private use: in no font
    assert readable(f"a{lacking}é", Path("a.png")) == "aU+F0000é"
    assert readable(f"a{lacking}é", Path("a.svg")) == f"a{lacking}é"
    assert "1 characters" in (font_note(["abc", lacking, lacking], Path("a.png")) or "")
    assert font_note(["abc", lacking], Path("a.html")) is None
    assert font_note(["abcé␣⏎⇥…"], Path("a.png")) is None


def test_shortened() -> None:
    assert shortened("a  b\nc", 9) == "a b c"
    assert shortened("abcdefghijk", 7) == "abc…ijk"
    assert [len(shortened("abcdefghijk", n)) for n in (5, 6, 7, 8)] == [5, 6, 7, 8]
