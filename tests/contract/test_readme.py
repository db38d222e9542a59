"""The README and the pages of docs/ tell the truth: commands run, files exist, names are there."""

from __future__ import annotations

import importlib
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

from glassgpt.cli.app import main, make_app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
PAGES = sorted((ROOT / "docs").glob("*.md")) + [ROOT / "CONTRIBUTING.md"]


def blocks_of(text: str) -> list[tuple[str, str]]:
    """(language, content) of every fenced block."""
    return re.findall(r"^```(\w*)\n(.*?)^```", text, flags=re.DOTALL | re.MULTILINE)


def commands_of(text: str) -> list[str]:
    return [
        line.split("glassgpt ", 1)[1]
        for language, block in blocks_of(text)
        if not language
        for line in block.splitlines()
        if re.match(r"(glassgpt|torchrun .* -m glassgpt) ", line)
    ]


COMMANDS = commands_of(README)
EVERYWHERE = sorted({command for page in PAGES for command in commands_of(page.read_text())})
SMALL = shlex.split(
    "--n-layer 1 --n-head 2 --n-embd 8 --context-length 8 --batch-tokens 64 --max-steps 2 "
    "--sample-tokens 2"
)


def test_there_are_commands_to_check() -> None:
    assert len(COMMANDS) >= 15
    assert len(EVERYWHERE) >= 40
    assert blocks_of(README)[0][1].count("make ") == 2


@pytest.mark.parametrize("command", sorted({*COMMANDS, *EVERYWHERE}))
def test_every_command_is_understood(command: str) -> None:
    """The command line accepts it (what takes a GPU or a download is not run here)."""
    words = shlex.split(command)
    _, bound, _ = make_app(words).parse_args(words, exit_on_error=False, print_error=False)
    assert bound.args or bound.kwargs


@pytest.mark.slow
def test_the_commands_and_the_python_example_run(tmp_path, monkeypatch, capsys) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("Once upon a time there was a fox. " * 40)
    (tmp_path / "held-out.txt").write_text("A fox was there once.")
    (tmp_path / "letters.txt").write_text("Dear fox, come back. " * 20)
    (tmp_path / "reviews.csv").write_text("text,label\na fox,good\na cat,good\nno,bad\nnever,bad\n")
    more = {"train": SMALL, "finetune": SMALL[-4:]}
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "explore":  # serves until Ctrl-C; tests/e2e/test_explore_server.py
            continue
        if {"book.txt", "runs/book", "runs/judge"} & {*words[1:3]} and "gpt2" not in words:
            main(words + more.get(words[0], []))
    shown = capsys.readouterr().out
    assert shown.startswith("Once upon a time")
    assert re.search(r"^(good|bad) +0\.\d+$", shown, flags=re.MULTILINE)
    assert (tmp_path / "lens.png").exists()
    [code] = [block for language, block in blocks_of(README) if language == "python"]
    exec(code)
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
def test_the_python_example_type_checks(tmp_path: Path) -> None:
    [code] = [block for language, block in blocks_of(README) if language == "python"]
    (tmp_path / "example.py").write_text(code)
    command = [sys.executable, "-m", "pyright", "--pythonpath", sys.executable, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout


@pytest.mark.parametrize("page", [ROOT / "README.md", *PAGES], ids=lambda page: page.name)
def test_every_link_leads_somewhere(page: Path) -> None:
    for name in re.findall(r"\]\(([\w./-]+)(?:#[\w-]+)?\)", page.read_text()):
        assert (page.parent / name).exists(), name


def test_the_api_reference_names_what_there_is() -> None:
    pages = "\n".join(path.read_text() for path in (ROOT / "docs" / "api").glob("*.md"))
    names = re.findall(r"^::: ([\w.]+)$", pages, flags=re.MULTILINE)
    assert len(names) >= 20
    for name in names:
        owner, _, last = name.rpartition(".")
        assert hasattr(importlib.import_module(owner), last) if owner and last[0].isupper() \
            else importlib.import_module(name)  # fmt: skip
    for block in re.findall(r"^::: ([\w.]+)\n(?: +.*\n)*? +members: \[(.*)\]", pages, flags=re.M):
        module = importlib.import_module(block[0])
        for member in block[1].split(", "):
            assert hasattr(module, member), f"{block[0]}.{member}"


def test_the_site_lists_every_page() -> None:
    site = (ROOT / "mkdocs.yml").read_text()
    listed = set(re.findall(r": ([\w/]+\.md)$", site, flags=re.MULTILINE))
    pages = {str(path.relative_to(ROOT / "docs")) for path in (ROOT / "docs").rglob("*.md")}
    assert listed == pages
