"""Three ways in which a pickle runs code: what tests of readers try to smuggle in."""

from __future__ import annotations

import builtins
import os


class RunsCommand:
    def __init__(self, command: str) -> None:
        self.command = command

    def __reduce__(self):
        return os.system, (self.command,)


class Evaluates(RunsCommand):
    def __reduce__(self):
        return builtins.eval, (f"__import__('os').system({self.command!r})",)


class SetsState:
    """Even a class of ours is code, and has no place in a file of data."""

    def __init__(self, command: str) -> None:
        self.command = command

    def __setstate__(self, state: dict) -> None:
        os.system(state["command"])
