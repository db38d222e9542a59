"""What a run records while it trains: metrics.jsonl, samples.md, TensorBoard, Weights & Biases.

    log = RunLog(Path("runs/book")); log.write(step=10, train_loss=3.2)

It does not know what the numbers mean, nor how a terminal shows them (`terminal.py` does).
"""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path
from typing import Any

from glassgpt.errors import UserError, explain_os_errors
from glassgpt.system import write_file


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
