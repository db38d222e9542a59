"""The training of a run, as far as it has come: losses and learning rates by step.

training_curve(Path("runs/book"), 4.17).rows[-1]["val_loss"]
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

from glassgpt.checkpoints.run_directory import snapshots
from glassgpt.reporting.run_log import read_metrics

_FIELDS = ("step", "tokens", "seconds", "train_loss", "val_loss", "lr")
_STILL_RUNNING = 60.0  # seconds after the last line of metrics.jsonl; evaluations take less
_ROWS = 800  # about this many that are not evaluations: a curve has no more points on a screen
_MOST_ROWS = 1000  # in one answer; the newest ones


@dataclass(frozen=True)
class TrainingAnswer:
    running: bool
    rows: list[dict[str, float | None]]
    snapshots: list[int]
    guessing: float  # the loss of a model that finds all tokens equally likely


def training_curve(run: Path, guessing: float) -> TrainingAnswer:
    """Every evaluation, and of the other rows one in so many that about `_ROWS` are left."""
    path, rows, running = run / "metrics.jsonl", [], False
    if path.exists():
        rows = [{name: row.get(name) for name in _FIELDS} for row in read_metrics(path)]
        running = time.time() - path.stat().st_mtime < _STILL_RUNNING
    every = max(1, -(-len(rows) // _ROWS))
    kept = [row for i, row in enumerate(rows) if i % every == 0 or row["val_loss"] is not None]
    return TrainingAnswer(running, kept[-_MOST_ROWS:], list(snapshots(run)), guessing)
