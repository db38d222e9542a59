"""What a run leaves to read: metrics.jsonl, TensorBoard, Weights & Biases; and the terminal.

    log = RunLog(Path("runs/book")); log.write(step=10, train_loss=3.2)

Terminal output goes through a `Progress`, so that library code never prints.
"""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from glassgpt.errors import UserError, explain_os_errors
from glassgpt.system import write_file


def program() -> str:
    """What to type for this program: `glassgpt` where the shell finds it, else its path."""
    here = Path(sys.executable).parent / "glassgpt"
    if shutil.which("glassgpt") or not here.exists():
        return "glassgpt"
    return os.path.relpath(here)


class Progress:
    """Takes messages and says nothing; `Terminal` shows them."""

    def say(self, text: str = "") -> None:
        """A line that stays."""

    def status(self, text: str) -> None:
        """A line that the next one replaces."""

    def close(self) -> None:
        """The status line is over."""


class Terminal(Progress):
    """One live line in a terminal; elsewhere (a pipe, a log file) plain lines, fewer of them."""

    SECONDS_BETWEEN_PLAIN_LINES = 5.0

    def __init__(self) -> None:
        from rich.console import Console
        from rich.live import Live

        self._console = Console(highlight=False, soft_wrap=True, stderr=True)
        self._live: Live | None = None
        self._last_plain = 0.0

    def say(self, text: str = "") -> None:
        self._console.print(text, markup=False)

    def status(self, text: str) -> None:
        from rich.live import Live
        from rich.text import Text

        if self._console.is_terminal:
            line = Text(text, no_wrap=True, overflow="ellipsis")
            live = self._live
            if live is None:
                live = Live(line, console=self._console, auto_refresh=False, transient=True)
                live.start()
                self._live = live
            live.update(line, refresh=True)
        elif time.monotonic() - self._last_plain >= self.SECONDS_BETWEEN_PLAIN_LINES:
            self._last_plain = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


class RunLog:
    """metrics.jsonl, one object a line; the same numbers to TensorBoard and W&B when asked."""

    def __init__(
        self, run: Path, *, tensorboard: bool = False, wandb: bool = False, options: Any = None
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
        """Forget what came after `step`: those steps will be done again."""
        if not self.path.exists():
            return
        kept = [json.dumps(row) for row in read_metrics(self.path) if row["step"] <= step]
        write_file(self.path, "".join(line + "\n" for line in kept).encode())

    def close(self) -> None:
        if self._board is not None:
            self._board.close()
        if self._wandb is not None:
            self._wandb.finish()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """All rows; a last line that was cut short by a crash is left out."""
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
    """Forget the samples of samples.md that were drawn after `step`."""
    if not path.exists():
        return
    sections = path.read_text(encoding="utf-8").split("## step ")
    kept = [s for s in sections[1:] if s.split("\n", 1)[0].isdecimal()
            and int(s.split("\n", 1)[0]) <= step]  # fmt: skip
    write_file(path, "".join(f"## step {section}" for section in kept).encode())


def require_loggers(**wanted: bool) -> None:
    """Raises `UserError` for a logger that is wanted and not installed."""
    for package, yes in wanted.items():
        if yes and importlib.util.find_spec(package) is None:
            raise UserError(f"--{package} needs: pip install 'glassgpt[log]'")


def _tensorboard(run: Path):
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(str(run / "tensorboard"))


def _wandb(run: Path, options: Any):
    import wandb

    if "WANDB_API_KEY" not in os.environ:
        os.environ.setdefault("WANDB_MODE", "offline")  # `wandb sync` sends it later
    return wandb.init(project="glassgpt", name=run.name, dir=str(run), config=options)


def format_seconds(seconds: float) -> str:
    """95 -> "1m 35s"."""
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours}h {minutes:02}m"
    return f"{minutes}m {rest:02}s" if minutes else f"{seconds:.0f}s"


def aligned(rows: Sequence[Sequence[str]], left: int = 1) -> str:
    """A table as plain text: the first columns to the left, the others, numbers, to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    lines = (
        "  ".join([*map(str.ljust, row[:left], widths), *map(str.rjust, row[left:], widths[left:])])
        for row in rows
    )
    return "\n".join(line.rstrip() for line in lines)


class ByteProgress:
    """Bytes done -> a status line with rate and time left; for downloads and `prepare`."""

    def __init__(self, progress: Progress) -> None:
        self._progress, self._what, self._started = progress, "", 0.0

    def __call__(self, what: str, done: int, total: int | None) -> None:
        now = time.monotonic()
        if what != self._what:
            self._what, self._started = what, now
        line = f"{what}: {done / 1e6:,.0f} MB"
        if total:
            line += f" of {total / 1e6:,.0f} ({done / total:.0%})"
        if now - self._started > 1:  # before that a rate says nothing
            rate = done / (now - self._started)
            line += f", {rate / 1e6:.1f} MB/s"
            if total and rate:
                line += f", {max(0, total - done) / rate:,.0f} s left"
        self._progress.status(line)
