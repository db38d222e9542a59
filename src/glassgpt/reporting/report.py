"""One page at the end of a training: what was planned, what happened, where the time went.

    write_report(run, Report(...)); summary(Report(...)) -> the lines that the terminal shows

report.md lies in the run directory, beside the loss curve that it shows. This room knows numbers
and words, no model.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from glassgpt.config import ModelConfig
from glassgpt.reporting.terminal import format_seconds
from glassgpt.system import write_file


@dataclass(frozen=True)
class Expectation:
    """What was expected of a run, before it began; kept with it."""

    seconds: float  # of the whole budget
    tokens_per_second: float
    tokens: int
    epochs: float
    loss: float  # on the validation text, nats per token
    loss_of_twice: float  # expected of a budget twice as long, with the model it would choose


@dataclass(frozen=True)
class Report:
    """What came of it."""

    shape: str
    seconds: float
    steps: int
    tokens: int
    epochs: float
    val_loss: float  # of the best model, nats per token
    guessing: str  # "guessing: ln(65) = 4.17"
    spent: dict[str, float]  # part of the work -> seconds
    samples: tuple[str, ...]
    plan: Expectation | None
    kept: tuple[float, ...] = ()  # loss on the text to keep, at the start and at the end

    @property
    def tokens_per_second(self) -> float:
        """While steps were taken."""
        stepping = sum(self.spent.get(part, 0.0) for part in STEP_PARTS)
        return self.tokens / stepping if stepping else 0.0


@dataclass(frozen=True)
class TrainResult:
    """What came of it; the rest stands in the run directory."""

    run: Path
    step: int
    first_val_loss: float
    best_val_loss: float
    seconds: float
    samples: tuple[str, ...]  # the first and the latest
    summary: tuple[str, ...] = ()  # lines of the report
    try_next: str = ""  # a verb and its arguments, to try with {run}
    signal: int | None = None  # of the signal that interrupted it; it can be resumed

    @property
    def finished(self) -> bool:
        return self.signal is None


def shape_in_words(config: ModelConfig) -> str:
    """ "10,813,440 parameters (modern: 6 layers, 6 heads, 384 wide, context 256)" """
    return (
        f"{config.n_parameters:,} parameters ({config.family}: {config.n_layer} layers, "
        f"{config.n_head} heads, {config.n_embd} wide, context {config.context_length})"
    )


STEP_PARTS = ("data", "forward and backward", "optimizer")


def summary(report: Report) -> list[str]:
    """The same in a few lines."""
    lines = ["time: " + ", ".join(f"{part} {share:.0%}" for part, _, share in _parts(report))]
    plan = report.plan
    if report.kept:
        lines.append(f"loss on the text to keep: {report.kept[0]:.3f} before, "
                     f"{report.kept[-1]:.3f} now")  # fmt: skip
    if plan is not None:
        lines.insert(0, (
            f"expected {plan.loss:.2f} after {plan.tokens / 1e6:,.1f} M tokens, reached "
            f"{report.val_loss:.3f} after {report.tokens / 1e6:,.1f} M in "
            f"{format_seconds(report.seconds)} of {format_seconds(plan.seconds)}"
        ))  # fmt: skip
        lines.append(f"twice the time would be expected to give {_twice(report, plan):.2f}")
    return lines


def write_report(run: Path, report: Report) -> None:
    """report.md"""
    plan = report.plan
    lines = [f"# {run.name}", "", report.shape, ""]
    lines += ["| | planned | reached |", "|---|---:|---:|"]
    for name, planned, reached in _rows(report):
        lines.append(f"| {name} | {planned} | {reached} |")
    lines += ["", f"The dotted line of the curve is {report.guessing}, all choices alike."]
    lines += ["", "![loss](loss.png)", ""]
    lines += ["## Where the time went", "", "| | seconds | share |", "|---|---:|---:|"]
    for part, seconds, share in _parts(report):
        lines.append(f"| {part} | {seconds:,.1f} | {share:.0%} |")
    if plan is not None:
        lines += ["", "## With twice the time", "", (
            f"A budget of {format_seconds(2 * plan.seconds)} would be expected to reach "
            f"{_twice(report, plan):.2f}: `glassgpt train ... --budget {2 * plan.seconds:.0f}s`."
        )]  # fmt: skip
    if report.samples:
        lines += ["", "## Before and after", ""]
        lines += [_fenced(sample) for sample in report.samples]
    content = "\n".join(lines).rstrip() + "\n"
    write_file(run / "report.md", content.encode("utf-8", "replace"))


def _fenced(sample: str) -> str:
    """As a block of markdown that nothing inside it can end."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", sample)), default=0))
    return f"{fence}\n{sample.strip()}\n{fence}\n"


def _rows(report: Report) -> list[tuple[str, str, str]]:
    plan = report.plan

    def planned(text: str) -> str:
        return text if plan is not None else "-"

    p = plan or Expectation(0, 0, 0, 0, 0, 0)
    rows = [
        ("time", planned(format_seconds(p.seconds)), format_seconds(report.seconds)),
        ("tokens seen", planned(f"{p.tokens:,}"), f"{report.tokens:,} ({report.steps:,} steps)"),
        ("times through the text", planned(f"{p.epochs:.1f}"), f"{report.epochs:.1f}"),
        ("tokens per second", planned(f"{p.tokens_per_second:,.0f}"),
         f"{report.tokens_per_second:,.0f}"),
        ("validation loss (nats per token)", planned(f"{p.loss:.2f}"), f"{report.val_loss:.4f}"),
    ]  # fmt: skip
    if report.kept:
        before, now = (f"{loss:.4f}" for loss in (report.kept[0], report.kept[-1]))
        rows.append(("loss on the text to keep", f"{before} before", now))
    return rows


def _parts(report: Report) -> list[tuple[str, float, float]]:
    """(part, seconds, share of the whole), with what nobody counted as the beginning and end."""
    parts = dict(report.spent)
    parts["start, plan and end"] = max(0.0, report.seconds - sum(parts.values()))
    return [(part, seconds, seconds / max(report.seconds, 1e-9)) for part, seconds in parts.items()]


def _twice(report: Report, plan: Expectation) -> float:
    """What was reached, made smaller by as much as the plan expects of twice the time."""
    return report.val_loss * plan.loss_of_twice / plan.loss
