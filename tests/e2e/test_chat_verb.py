"""`glassgpt chat` as people use it: through a pipe, and in a terminal with Ctrl-C and Ctrl-D."""

from __future__ import annotations

import json
import os
import pty
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from conftest import refuse, tiny_config, tiny_model, weights_of
from glassgpt.checkpoints.run_directory import Checkpoint, save_model
from glassgpt.tokenizers.chat_template import Chat, choose_template
from glassgpt.tokenizers.tokenizer import CharTokenizer

pytestmark = pytest.mark.slow

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?\n-:;'#SUAH"


def save(folder: Path, template: str | None) -> Path:
    tokenizer = CharTokenizer.from_characters(LETTERS)
    fields = {}
    if template:
        source, tokenizer = choose_template(template, tokenizer)
        fields = dict(chat_template=source, ends=Chat(source, tokenizer).ends)
    config = tiny_config(vocab_size=tokenizer.vocab_size, context_length=200)
    save_model(folder, Checkpoint(config, weights_of(tiny_model(config)), tokenizer, **fields))
    return folder


def command(run: Path, *arguments: object) -> list[str]:
    return [sys.executable, "-m", "glassgpt", "chat", str(run), "--engine", "numpy",
            *map(str, arguments)]  # fmt: skip


def chat(run: Path, lines: str, *arguments: object) -> subprocess.CompletedProcess:
    return subprocess.run(command(run, *arguments), input=lines, capture_output=True, text=True,
                          timeout=300)  # fmt: skip


@pytest.mark.parametrize("template", ["headings", "chatml"])
def test_a_pipe(tmp_path: Path, template: str) -> None:
    run, kept = save(tmp_path / "run", template), tmp_path / "talk.json"
    lines = f"hello\n/set max_new_tokens 5\nhow are you?\n/what\n/save {kept}\n"
    done = chat(run, lines, "--system", "be nice", "--max-new-tokens", 9)
    assert done.returncode == 0, done.stderr
    assert "parameters, a context of 200 tokens" in done.stderr
    assert "no command /what" in done.stderr
    assert "Traceback" not in done.stderr
    messages = json.loads(kept.read_text())["messages"]
    assert [m["role"] for m in messages] == ["system", *["user", "assistant"] * 2]
    assert messages[0]["content"] == "be nice"
    assert done.stdout == messages[2]["content"] + "\n" + messages[4]["content"] + "\n"
    again = chat(run, f"/load {kept}\n/undo\nhow are you?\n", "--max-new-tokens", 5)
    assert again.returncode == 0
    same = chat(run, lines, "--system", "be nice", "--max-new-tokens", 9)
    assert same.stdout == done.stdout


def test_a_base_model_goes_on_with_the_text(tmp_path: Path) -> None:
    run = save(tmp_path / "run", None)
    done = chat(run, "once upon", "--max-new-tokens", 7)
    assert done.returncode == 0, done.stderr
    assert "it continues your text" in done.stderr
    assert len(done.stdout.removesuffix("\n")) >= 7
    line = refuse_chat(run, "--system", "be nice")
    assert "no chat template" in line


def refuse_chat(run: Path, *arguments: object) -> str:
    done = chat(run, "", *arguments)
    said = [line for line in done.stderr.splitlines() if line.startswith("glassgpt: ")]
    assert (done.returncode, len(said)) == (2, 1), done.stderr
    return said[0]


def test_bad_arguments(tmp_path: Path, capsys) -> None:
    run = save(tmp_path / "run", "chatml")
    assert "does not exist" in refuse(capsys, "chat", tmp_path / "no")
    assert "temperature" in refuse(capsys, "chat", run, "--temperature", -1)
    assert "num-samples" in refuse(capsys, "chat", run, "--num-samples", 2)


class Terminal:
    """A process in a terminal of its own."""

    def __init__(self, command: list[str]) -> None:
        self.ours, theirs = pty.openpty()
        self.process = subprocess.Popen(command, preexec_fn=lambda: os.login_tty(theirs))
        os.close(theirs)
        self.shown = ""

    def type(self, keys: str) -> None:
        os.write(self.ours, keys.encode())

    def wait_for(self, text: str, seconds: float = 120) -> None:
        """What is shown from here on must hold the text."""
        end = time.monotonic() + seconds
        while text not in self.shown:
            ready, _, _ = select.select([self.ours], [], [], max(0, end - time.monotonic()))
            assert ready, f"no {text!r} in {self.shown[-2000:]!r}"
            self.shown += os.read(self.ours, 65536).decode("utf-8", "replace")
        self.shown = self.shown.partition(text)[2]


def test_ctrl_c_stops_an_answer_and_ctrl_d_leaves(tmp_path: Path) -> None:
    run, kept = save(tmp_path / "run", None), tmp_path / "talk.json"  # it knows no end
    terminal = Terminal(command(run, "--max-new-tokens", 10_000_000))
    try:
        terminal.wait_for("> ")
        terminal.type("hello\n")
        terminal.wait_for("hello")  # the echo
        terminal.wait_for("a")
        terminal.type("\x03")
        terminal.wait_for("[stopped]")
        terminal.wait_for("> ")
        terminal.type(f"/save {kept}\n")
        terminal.wait_for("2 messages")
        terminal.wait_for("> ")
        terminal.type("\x04")
        assert terminal.process.wait(60) == 0
    finally:
        terminal.process.kill()
        os.close(terminal.ours)
    user, assistant = json.loads(kept.read_text())["messages"]
    assert user == {"role": "user", "content": "hello"}
    assert assistant["role"] == "assistant"
    assert assistant["content"]
