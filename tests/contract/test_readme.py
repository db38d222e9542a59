"""The README tells the truth: its commands run, its files exist."""

from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from glassgpt.cli.app import main, make_app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
BLOCKS = re.findall(r"```(\w*)\n(.*?)```", README, flags=re.DOTALL)
COMMANDS = [
    line.split("glassgpt ", 1)[1]
    for language, block in BLOCKS
    if not language
    for line in block.splitlines()
    if re.match(r"(glassgpt|torchrun .* -m glassgpt) ", line)
]
SMALL = shlex.split(
    "--n-layer 1 --n-head 2 --n-embd 8 --context-length 8 --batch-tokens 64 --max-steps 2 "
    "--sample-tokens 2"
)


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 6
    assert BLOCKS[0][1].count("make ") == 2


@pytest.mark.parametrize("command", COMMANDS)
def test_every_command_is_understood(command):
    """The command line accepts it (what takes a GPU or a download is not run here)."""
    words = shlex.split(command)
    _, bound, _ = make_app(words).parse_args(words, exit_on_error=False, print_error=False)
    assert bound.args or bound.kwargs


def test_the_laptop_quick_start_and_the_python_example_run(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "book.txt").write_text("Once upon a time there was a fox. " * 40)
    (tmp_path / "held-out.txt").write_text("A fox was there once.")
    (tmp_path / "letters.txt").write_text("Dear fox, come back. " * 20)
    (tmp_path / "reviews.csv").write_text("text,label\na fox,good\na cat,good\nno,bad\nnever,bad\n")
    more = {"train": SMALL, "finetune": SMALL[-4:]}
    for command in COMMANDS:
        words = shlex.split(command)
        if words[0] == "explore":  # serves until Ctrl-C; tests/e2e/test_explore.py
            continue
        if words[1] in ("book.txt", "runs/book", "runs/judge") and "gpt2" not in words:
            main(words + more.get(words[0], []))
    shown = capsys.readouterr().out
    assert shown.startswith("Once upon a time")
    assert re.search(r"^(good|bad) +0\.\d+$", shown, flags=re.MULTILINE)
    [code] = [block for language, block in BLOCKS if language == "python"]
    exec("import torch; tokens = torch.zeros(1, 3, dtype=torch.long)\n" + code)
    assert capsys.readouterr().out.strip()


def test_every_file_it_names_is_there():
    for name in re.findall(r"\]\(([\w./-]+)\)", README):
        assert (ROOT / name).exists(), name
    table = re.findall(r"^\| (`.*?) \|", README, flags=re.MULTILINE)
    for name in re.findall(r"`([\w./]+)`", " ".join(table)):
        assert (ROOT / "src/glassgpt" / name).exists(), name


def test_every_module_is_in_the_table():
    folder = ROOT / "src/glassgpt"
    rooms = {path.name for path in folder.glob("*.py")} - {"__init__.py", "__main__.py"}
    rooms -= {"errors.py", "version.py"}
    assert not [name for name in rooms if f"`{name}`" not in README]
