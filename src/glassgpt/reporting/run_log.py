"""What a run leaves to read: metrics.jsonl, samples.md, report.md; TensorBoard, Weights & Biases.

    log = RunLog(Path("runs/book")); log.write(step=10, train_loss=3.2)
    write_report(run, report); summary(report)  # the lines that the terminal shows

This module knows numbers and words, no model.
"""

from __future__ import annotations

import importlib.util
import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glassgpt.config import ModelConfig
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.reporting.terminal import format_seconds
from glassgpt.system import Json, write_file

# -- while it trains ------------------------------------------------------------------------------


class RunLog:
    """metrics.jsonl, one object per line; on request also TensorBoard and Weights & Biases."""

    def __init__(
        self,
        run: Path,
        *,
        tensorboard: bool = False,
        wandb: bool = False,
        options: Json | None = None,
    ) -> None:
        self.path = run / "metrics.jsonl"
        self._board = _tensorboard(run) if tensorboard else None
        self._wandb = _wandb(run, options) if wandb else None

    def write(self, **values: Any) -> None:
        with explain_os_errors(f"write {self.path}"), open(self.path, "a") as file:
            file.write(json.dumps(values) + "\n")
        numbers = {k: v for k, v in values.items() if k != "step" and v is not None}
        if self._board is not None:
            for name, value in numbers.items():
                self._board.add_scalar(name, value, values["step"])
        if self._wandb is not None:
            self._wandb.log(numbers, step=values["step"])

    def rewind(self, step: int) -> None:
        """Delete the rows after `step`: those steps will be done again."""
        if not self.path.exists():
            return
        kept = [json.dumps(row) for row in read_metrics(self.path) if row["step"] <= step]
        write_file(self.path, "".join(line + "\n" for line in kept).encode())

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[Json]:
    """All rows, without a last line that a crash cut short."""
    rows = []
    for line in path.read_text().splitlines():
        try:
            rows.append(json.loads(line))
        except ValueError:
            break
    return rows


def write_sample(path: Path, step: int, text: str) -> None:
    """Add a section to samples.md."""
    with (
        explain_os_errors(f"write {path}"),
        open(path, "a", encoding="utf-8", errors="replace") as file,  # half characters of a prompt
    ):
        file.write(f"## step {step}\n\n```\n{text.strip()}\n```\n\n")


def rewind_samples(path: Path, step: int) -> None:
    """Delete the samples in samples.md that were drawn after `step`."""
    if not path.exists():
        return
    _, *sections = path.read_text(encoding="utf-8").split("## step ")
    numbered = [(section.split("\n", 1)[0], section) for section in sections]
    kept = [section for n, section in numbered if n.isdecimal() and int(n) <= step]
    write_file(path, "".join(f"## step {section}" for section in kept).encode())


def require_loggers(**wanted: bool) -> None:
    """Raises `UserError` for a logger that is wanted and not installed."""
    for package, yes in wanted.items():
        if yes and importlib.util.find_spec(package) is None:
            raise UserError(f"--{package} needs: pip install 'glassgpt[log]'")


def _tensorboard(run: Path):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"))


def _wandb(run: Path, options: Json | None):
    import wandb

    if "WANDB_API_KEY" not in os.environ:
        os.environ.setdefault("WANDB_MODE", "offline")  # `wandb sync` sends it later
    return wandb.init(project="glassgpt", name=run.name, dir=str(run), config=options)


# -- at its end ----------------------------------------------------------------------------------


@dataclass(frozen=True)
class Expectation:
    """What a budgeted run was expected to do before it began; stored with the run."""

    seconds: float  # of the whole budget
    tokens_per_second: float
    tokens: int
    epochs: float
    loss: float  # on the validation text, nats per token
    loss_of_twice: float  # expected with twice the budget, and the model chosen for that


@dataclass(frozen=True)
class Report:
    """What report.md says of a training."""

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
        """While steps were taken, evaluations not counted."""
        stepping = sum(self.spent.get(part, 0.0) for part in STEP_PARTS)
        return self.tokens / stepping if stepping else 0.0


@dataclass(frozen=True)
class TrainResult:
    """What `glassgpt.train` and `finetune` return; more stands in the run directory."""

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
    """The report in a few lines, for the terminal."""
    lines = ["time: " + ", ".join(f"{part} {share:.0%}" for part, _, share in _parts(report))]
    plan, kept = report.plan, report.kept
    if kept:
        lines.append(f"loss on the text to keep: {kept[0]:.3f} before, {kept[-1]:.3f} now")
    if plan is not None:
        expected = f"expected {plan.loss:.2f} after {plan.tokens / 1e6:,.1f} M tokens"
        reached = f"reached {report.val_loss:.3f} after {report.tokens / 1e6:,.1f} M"
        took = f"{format_seconds(report.seconds)} of {format_seconds(plan.seconds)}"
        lines.insert(0, f"{expected}, {reached} in {took}")
        lines.append(f"twice the time would be expected to give {_twice(report, plan):.2f}")
    return lines


def write_report(run: Path, report: Report) -> None:
    """Write report.md."""
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
        loss, twice = _twice(report, plan), 2 * plan.seconds
        lines += ["", "## With twice the time", ""]
        lines.append(
            f"A budget of {format_seconds(twice)} would be expected to reach {loss:.2f}: "
            f"`glassgpt train ... --budget {twice:.0f}s`."
        )
    if report.samples:
        lines += ["", "## Before and after", ""]
        lines += [_fenced(sample) for sample in report.samples]
    content = "\n".join(lines).rstrip() + "\n"
    write_file(run / "report.md", content.encode("utf-8", "replace"))


def _fenced(sample: str) -> str:
    """A fenced block of markdown whose fence does not occur in the sample."""
    fence = "`" * max(3, 1 + max(map(len, re.findall("`+", sample)), default=0))
    return f"{fence}\n{sample.strip()}\n{fence}\n"


def _rows(report: Report) -> list[tuple[str, str, str]]:
    plan, speed = report.plan, report.tokens_per_second
    planned = ["-"] * 5
    if plan is not None:
        planned = [format_seconds(plan.seconds), f"{plan.tokens:,}", f"{plan.epochs:.1f}"]
        planned += [f"{plan.tokens_per_second:,.0f}", f"{plan.loss:.2f}"]
    reached = {
        "time": format_seconds(report.seconds),
        "tokens seen": f"{report.tokens:,} ({report.steps:,} steps)",
        "times through the text": f"{report.epochs:.1f}",
        "tokens per second": f"{speed:,.0f}",
        "validation loss (nats per token)": f"{report.val_loss:.4f}",
    }
    rows = list(zip(reached, planned, reached.values(), strict=True))
    if report.kept:
        before, now = (f"{loss:.4f}" for loss in (report.kept[0], report.kept[-1]))
        rows.append(("loss on the text to keep", f"{before} before", now))
    return rows


def _parts(report: Report) -> list[tuple[str, float, float]]:
    """(part, seconds, share of the whole); what no part counted is the start and the end."""
    parts = dict(report.spent)
    parts["start, plan and end"] = max(0.0, report.seconds - sum(parts.values()))
    return [(part, seconds, seconds / max(report.seconds, 1e-9)) for part, seconds in parts.items()]


def _twice(report: Report, plan: Expectation) -> float:
    """The loss that was reached, times the improvement that the plan expects of twice the time."""
    return report.val_loss * plan.loss_of_twice / plan.loss
