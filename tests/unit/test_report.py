"""The page at the end of a training: its numbers agree with what it was given."""

from __future__ import annotations

import dataclasses
import math
import re
from pathlib import Path

import pytest

from glassgpt.reporting.run_log import Expectation, Report, summary, write_report

PLAN = Expectation(seconds=300.0, tokens_per_second=50_000.0, tokens=14_000_000, epochs=13.9,
                   loss=1.52, loss_of_twice=1.47)  # fmt: skip
SPENT = {"data": 3.0, "forward and backward": 180.0, "optimizer": 57.0, "evaluation": 24.0,
         "saving": 2.5}  # fmt: skip
REPORT = Report(shape="123,456 parameters (qwen3: 3 layers)", seconds=290.0, steps=5_000,
                tokens=12_000_000, epochs=11.96, val_loss=1.5612, spent=SPENT,
                guessing="guessing: ln(65) = 4.17", samples=("xq!z", "To be, or not"),
                plan=PLAN)  # fmt: skip
UNPLANNED = dataclasses.replace(REPORT, plan=None)


def page(folder: Path, report: Report) -> str:
    write_report(folder, report)
    return (folder / "report.md").read_text("utf-8")


def tables(text: str) -> dict[str, list[str]]:
    """Every row of every table: its first cell -> the others."""
    rows = re.findall(r"^\| (.*) \|$", text, flags=re.MULTILINE)
    return {cells[0]: cells[1:] for cells in (row.split(" | ") for row in rows)}


def test_planned_and_reached(tmp_path):
    text = page(tmp_path, REPORT)
    assert text.startswith(f"# {tmp_path.name}\n\n{REPORT.shape}\n")
    rows = tables(text)
    assert rows["time"] == ["5m 00s", "4m 50s"]
    assert rows["tokens seen"] == ["14,000,000", "12,000,000 (5,000 steps)"]
    assert rows["times through the text"] == ["13.9", "12.0"]
    assert rows["tokens per second"] == ["50,000", "50,000"]  # while steps were taken: 240 s
    assert rows["validation loss (nats per token)"] == ["1.52", "1.5612"]
    assert "guessing: ln(65) = 4.17" in text
    assert "![loss](loss.png)" in text


def test_the_time_adds_up(tmp_path):
    for report in (REPORT, UNPLANNED):
        rows = tables(page(tmp_path, report))
        rows = {part: rows[part] for part in (*SPENT, "start, plan and end")}
        assert sum(float(seconds) for seconds, _ in rows.values()) == pytest.approx(290, abs=0.3)
        assert sum(int(share.rstrip("%")) for _, share in rows.values()) == pytest.approx(
            100, abs=3
        )
        assert rows["forward and backward"] == ["180.0", "62%"]
        assert rows["start, plan and end"] == ["23.5", "8%"]


def test_without_a_plan_nothing_is_promised(tmp_path):
    text = page(tmp_path, UNPLANNED)
    assert all(tables(text)[name][0] == "-" for name in ("time", "tokens seen",
               "times through the text", "tokens per second"))  # fmt: skip
    assert "twice" not in text
    assert "--budget" not in text
    [line] = summary(UNPLANNED)
    assert line.startswith("time: data 1%, forward and backward 62%, ")


def test_twice_the_time_learns_from_what_was_reached(tmp_path):
    """The plan hoped for 1.52, 1.5612 came: its 1.47 is moved by as much."""
    text = page(tmp_path, REPORT)
    assert "A budget of 10m 00s would be expected to reach 1.51" in text
    assert "--budget 600s" in text
    reached, _, twice = summary(REPORT)
    assert reached == ("expected 1.52 after 14.0 M tokens, reached 1.561 after 12.0 M in 4m 50s "
                       "of 5m 00s")  # fmt: skip
    assert twice.endswith("to give 1.51")


@pytest.mark.parametrize("sample", ["``` and ```` and `", "a\n```\nb", "half \udc80\ud83d of it",
                                    "", "| a | b |",
                                    "# no title\n\n~~~", "\x00\x1b[31m", "`" * 50])  # fmt: skip
def test_samples_that_are_no_prose(tmp_path, sample):
    """They end where they should: what follows is no part of them, and they of nothing else."""
    report = dataclasses.replace(REPORT, samples=(sample, "the last one"))
    text = page(tmp_path, report)
    assert page(tmp_path, dataclasses.replace(REPORT, samples=())) == text.split("\n## Before")[0]
    lines = iter(text.split("## Before and after\n\n")[1].splitlines())
    found = []
    for line in lines:
        if fence := re.fullmatch(r"`{3,}", line):
            inside = []
            while not re.fullmatch(f" {{,3}}`{{{len(fence[0])},}} *", line := next(lines)):
                inside.append(line)
            found.append("\n".join(inside))
        else:
            assert not line
    shown = sample.encode("utf-8", "replace").decode()
    assert found == ["\n".join(shown.strip().splitlines()), "the last one"]


def test_a_run_that_took_no_time(tmp_path):
    report = dataclasses.replace(UNPLANNED, seconds=0.0, steps=0, tokens=0, epochs=0.0, spent={},
                                 samples=(), val_loss=math.inf)  # fmt: skip
    assert tables(page(tmp_path, report))["tokens per second"] == ["-", "0"]
    assert summary(report) == ["time: start, plan and end 0%"]
