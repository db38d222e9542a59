"""Values of options: do they have the type that their field's annotation wants?

    check_value("n_layer", 6, Annotated[int, "transformer blocks"]) -> 6

Also durations ("5m") and amounts of memory ("8GB"). This room knows no option by name.
"""

from __future__ import annotations

import math
import numbers
import os
import re
import types
import typing
from typing import Any, Literal

from glassgpt.errors import UserError


def check_types(config: Any) -> None:
    """Every field holds what its annotation says; numbers and paths are converted to it."""
    for name, hint in typing.get_type_hints(type(config), include_extras=True).items():
        object.__setattr__(config, name, check_value(name, getattr(config, name), hint))


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(duration: str) -> float:
    """90s, 5m, 1h30m, 2d -> seconds; a number alone is seconds. Raises `UserError`."""
    wanted = duration.replace(" ", "").lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", wanted)
    seconds = sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != wanted or not 0 < seconds < math.inf:
        raise UserError(f"{duration!r} is no duration; write 30s, 5m or 1h30m")
    return seconds


def bytes_of(size: str) -> int:
    """800MB, 8GB, 1.5GB -> bytes, of 10^6 and 10^9. Raises `UserError`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([mgt])b?", size.strip().lower())
    if found is None or not 0 < float(found[1]) < 1e30:
        raise UserError(f"{size!r} is no amount of memory; write 800MB or 8GB")
    return int(float(found[1]) * {"m": 1e6, "g": 1e9, "t": 1e12}[found[2]])


def check_seed(seed: int) -> None:
    if not 0 <= seed < 1 << 63:
        raise UserError(f"seed={seed} must be at least 0 and less than 2^63")


def check_value(name: str, value: Any, hint: Any, where: str = "") -> Any:
    """`value` as the annotation `hint` of the field `name` wants it; raises `UserError`."""
    kind = typing.get_args(hint)[0]  # Annotated[kind, "help"]
    if isinstance(kind, types.UnionType):
        if value is None or value == "none":
            return None
        kind = next(part for part in typing.get_args(kind) if part is not type(None))
    if isinstance(value, os.PathLike):
        value = os.fspath(value)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise UserError(f"{name}={value!r}{where}: choose from {', '.join(choices)}")
        return value
    if typing.get_origin(kind) is tuple:  # of strings; one may stand alone
        items = [value] if isinstance(value, str) else value
        if isinstance(items, (list, tuple)) and all(isinstance(item, str) for item in items):
            return tuple(items)
        raise UserError(f"{name}={value!r}{where} must be text, or a list of texts")
    if kind in (int, float) and isinstance(value, numbers.Integral) and value is not bool(value):
        value = int(value)  # NumPy's, too
        if abs(value) >= 1 << 63:
            raise UserError(f"{name}{where} is too large")
    if kind is float and isinstance(value, numbers.Real) and value is not bool(value):
        value = float(value)
    if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
        raise UserError(f"{name}={value!r}{where} must be of type {kind.__name__}")
    if kind is float and not math.isfinite(value):
        raise UserError(f"{name}={value}{where} must be a finite number")
    return value
