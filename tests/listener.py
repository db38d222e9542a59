"""A `Reporter` that keeps what it is told, so that a test can look at it."""

from __future__ import annotations

from glassgpt.system import Reporter


class Listener(Reporter):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.shown: list[str] = []
        self.advanced: list[tuple[str, int, int | None]] = []

    def say(self, text: str = "") -> None:
        self.said.append(text)

    def status(self, text: str) -> None:
        self.shown.append(text)

    def advance(self, name: str, done: int, total: int | None) -> None:
        self.advanced.append((name, done, total))


class Printer(Reporter):
    def say(self, text: str = "") -> None:
        print(text)
