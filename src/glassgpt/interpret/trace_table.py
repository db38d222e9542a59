"""A pass as a table of text: what each operation gives, its shape, parameters and FLOPs.

    print(record(model, tokens).table())

It sees rows with names and numbers, and knows no model and no torch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from glassgpt.errors import UserError
from glassgpt.reporting.terminal import aligned


def table(operations: Sequence[Any], n_layer: int, layer: int | None, every: bool) -> str:
    """One row an operation (`trace.Operation`): of the blocks the first one, `layer`, or every."""
    if layer is not None and not 0 <= layer < n_layer:
        raise UserError(f"layer={layer}: the model has {_layers(n_layer)}")
    shown = set(range(n_layer)) if every else {layer or 0}
    measured = any(op.statistics for op in operations)
    header = ["operation", "gives", "shape", "numbers", "parameters", "MFLOPs"]
    header += ["mean", "deviation", "least", "largest"] if measured else []
    rows, place = [header], None
    for op in operations:
        if op.layer is not None and op.layer not in shown:
            continue
        if op.layer != place and op.layer is not None:
            rows.append([f"block {op.layer}:"] + [""] * (len(header) - 1))
        place = op.layer
        short = (op.activation or "").rpartition(".")[2]
        rows.append([
            "  " * (op.layer is not None) + _readable(op.name), short, _shape(op.symbols),
            _shape(op.output), f"{op.parameters:,}" if op.parameters else "",
            f"{op.flops / 1e6:,.3f}" if op.flops else "",
            *([f"{x:.3g}" for x in op.statistics or ()] or [""] * 4 if measured else []),
        ])  # fmt: skip
    total = [sum(op.parameters for op in operations), sum(o.flops for o in operations)]
    rows.append(["in all", "", "", "", f"{total[0]:,}", f"{total[1] / 1e6:,.3f}"]
                + [""] * (4 if measured else 0))  # fmt: skip
    lines = aligned(rows, left=4).splitlines()
    hidden = n_layer - len(shown)
    if hidden > 0:
        lines.append(f"{_layers(n_layer)}; the {'other one has' if hidden == 1 else 'others have'} "
                     "the same shapes")  # fmt: skip
    return "\n".join(lines)


def _layers(n: int) -> str:
    return "no blocks" if n == 0 else "block 0" if n == 1 else f"blocks 0 to {n - 1}"


def _readable(name: str) -> str:
    return name.replace("__getitem__", "select").replace("__invert__", "not")


def _shape(shape: Iterable[Any]) -> str:
    return f"({', '.join(map(str, shape))})"
