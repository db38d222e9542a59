"""A real headless Chromium before a real `glassgpt explore`, for the tests of the page.

    with explored(run) as page: page.open("attention", layer=1); page.cells("blocks.1.pattern")

Nothing but the server can be reached: any other request fails the test. Without Chromium the tests
are left out, with the reason printed.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import pytest

GOLDEN = Path(__file__).parent / "golden" / "modern"
PATIENCE = 120  # seconds until a page that doesn't answer counts as broken
PHONE = {"width": 360, "height": 740}


class Explorer:
    """A page of a running explorer."""

    def __init__(self, page: Any, url: str, server: subprocess.Popen) -> None:
        self.page, self.url, self.server = page, url, server

    def open(self, view: str, text: str = "the cat sat on", **state: Any) -> None:
        """A fresh page with this state in its address; waits until it is drawn."""
        fields = {name: value if isinstance(value, str) else json.dumps(value)
                  for name, value in state.items()}  # fmt: skip
        self.page.goto("about:blank")
        self.page.goto(f"{self.url}#{urlencode({'view': view, 'text': text, **fields})}")
        self.until(lambda: self.drawn > 0)

    @property
    def drawn(self) -> int:
        """How often the view was drawn; 0 while it is being drawn."""
        view, main = self.page.locator("#view"), self.page.locator("#main")
        if "true" in (view.get_attribute("aria-busy"), main.get_attribute("aria-busy")):
            return 0
        return int(view.get_attribute("data-ready") or 0)

    def until(self, holds: Callable[[], bool]) -> None:
        end = time.monotonic() + PATIENCE
        while not holds():
            assert time.monotonic() < end, f"the page waits; alerts: {self.alerts()}"
            self.page.wait_for_timeout(20)

    @contextmanager
    def change(self) -> Iterator[None]:
        """Waits until what is done inside is drawn."""
        before = int(self.page.locator("#view").get_attribute("data-ready") or 0)
        yield
        self.until(lambda: self.drawn > before)

    def press(self, selector: str) -> None:
        with self.change():
            self.page.click(selector)

    def alerts(self) -> list[str]:
        return self.page.locator("#alerts .alert > span").all_inner_texts()

    def says(self, part: str) -> None:
        """Waits until an alert says it."""
        self.until(lambda: any(part in line for line in self.alerts()))

    def cells(self, name: str) -> dict[tuple[int, ...], float | None]:
        """What the tables of the view show of a tensor, by index; None for what is masked."""
        found = self.page.eval_on_selector_all(
            f'#view td[data-name="{name}"]', "cells => cells.map(cell => ({...cell.dataset}))"
        )
        assert found, f"no cells of {name}"
        return {tuple(map(int, cell["index"].split(","))): None if "masked" in cell
                else float(cell["value"]) for cell in found}  # fmt: skip

    @property
    def overflow(self) -> int:
        """Pixels by which the page is wider than the window."""
        return self.page.evaluate("document.documentElement.scrollWidth - window.innerWidth")


_open: list[Any] = []  # the browser of this process: Playwright refuses to start a second time


@contextmanager
def chromium() -> Iterator[Any]:
    """The browser that is open already, or one that is closed afterwards: while Playwright runs,
    nothing else in the process can use asyncio."""
    if _open:
        yield _open[0]
        return
    sync_api = pytest.importorskip("playwright.sync_api", reason="left out: needs playwright")
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        pytest.skip("left out: no Chromium is installed")
    with sync_api.sync_playwright() as playwright:
        _open.append(playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"]
        ))  # fmt: skip
        try:
            yield _open[0]
        finally:
            _open.pop().close()


@contextmanager
def explored(run: Path, *arguments: object, **options: Any) -> Iterator[Explorer]:
    """A server for `run`, and a browser; `options` are those of a Playwright page."""
    command = [sys.executable, "-m", "glassgpt", "explore", str(run), *map(str, arguments),
               "--port", "0", "--no-browser", "--device", "cpu"]  # fmt: skip
    server = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    wrong: list[str] = []
    try:
        assert server.stdout is not None
        url = server.stdout.readline().split()[0]

        def watch(route: Any) -> None:
            if route.request.url.startswith(url):
                return route.continue_()
            wrong.append(route.request.url)
            return route.abort()

        with chromium() as browser:
            page = browser.new_page(**{"locale": "en-GB", **options})
            page.set_default_timeout(1000 * PATIENCE)
            page.route("**/*", watch)
            page.on("pageerror", lambda error: wrong.append(str(error)))
            yield Explorer(page, url, server)
            page.close()
    finally:
        server.terminate()
        server.wait(PATIENCE)
    assert not wrong, wrong


def trained(folder: Path) -> Path:
    """A character model with the traces of a training: metrics, and a snapshot."""
    shutil.copytree(GOLDEN, folder)
    shutil.copytree(GOLDEN, folder / "snapshots" / "000010")
    rows = [{"step": 10 * i, "tokens": 40 * i, "train_loss": 3 / (i + 1), "lr": 0.1,
             "seconds": 1.0 * i, "val_loss": 3.1 / (i + 1)} for i in range(4)]  # fmt: skip
    (folder / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder
