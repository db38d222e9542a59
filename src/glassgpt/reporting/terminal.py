"""What people see of long work: status lines, durations, tables of text.

    terminal = Terminal(); terminal.status("measuring"); terminal.close()

Everything but results goes to stderr. This module does not know what the work is.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from glassgpt.system import Reporter

if TYPE_CHECKING:
    from rich.live import Live


class Terminal(Reporter):
    """One live line in a terminal; elsewhere (a pipe, a log file) plain lines, fewer of them."""

    SECONDS_BETWEEN_PLAIN_LINES = 5.0

    def __init__(self) -> None:
        self._live: Live | None = None
        self._last_plain = 0.0
        self._work, self._began = "", 0.0  # what `advance` was last told of, and since when

    def say(self, text: str = "") -> None:
        if self._live is None:
            print(text, file=sys.stderr, flush=True)
        else:
            self._live.console.print(text, markup=False, emoji=False, highlight=False)

    def status(self, text: str) -> None:
        from rich.console import Console
        from rich.live import Live
        from rich.text import Text

        console = self._live.console if self._live else Console(stderr=True, soft_wrap=True)
        if console.is_terminal:
            line = Text(text, no_wrap=True, overflow="ellipsis")
            if self._live is None:
                self._live = Live(line, console=console, auto_refresh=False, transient=True)
                self._live.start()
            self._live.update(line, refresh=True)
        elif time.monotonic() - self._last_plain >= self.SECONDS_BETWEEN_PLAIN_LINES:
            self._last_plain = time.monotonic()
            print(text, file=sys.stderr, flush=True)

    def advance(self, name: str, done: int, total: int | None) -> None:
        """A status line with the rate and the time left."""
        now = time.monotonic()
        if name != self._work:
            self._work, self._began = name, now
        line = f"{name}: {done / 1e6:,.0f} MB"
        if total:
            line += f" of {total / 1e6:,.0f} ({done / total:.0%})"
        elapsed = now - self._began
        if elapsed > 1:  # before that a rate says nothing
            rate = done / elapsed
            line += f", {rate / 1e6:.1f} MB/s"
            if total and rate:
                line += f", {max(0, total - done) / rate:,.0f} s left"
        self.status(line)

    def close(self) -> None:
        if self._live is not None:
            self._live.stop()
            self._live = None


def program() -> str:
    """What to type for this program: `glassgpt` where the shell finds it, else its path."""
    here = Path(sys.executable).parent / "glassgpt"
    if shutil.which("glassgpt") or not here.exists():
        return "glassgpt"
    return os.path.relpath(here)


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
