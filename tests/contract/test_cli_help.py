"""What --help says is what there is: verbs, presets, options."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

from glassgpt.cli.app import GROUPS, VERBS, module_of
from glassgpt.options import option_types, preset_names


def help_of(*verb: str) -> str:
    command = [sys.executable, "-m", "glassgpt", *verb, "--help"]
    environment = {"COLUMNS": "200", "TERM": "dumb", "PATH": ""}
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    assert result.stderr == ""
    return result.stdout


def commands() -> list[tuple[str, ...]]:
    """Every verb, and every verb with each of its sub-commands."""
    return [(verb,) for verb in VERBS] + [(v, view) for v in GROUPS for view in GROUPS[v]]


def docstring_of(*words: str) -> str:
    module = importlib.import_module(module_of(words[0]))
    return inspect.getdoc(getattr(module, f"{'_'.join(words)}_verb")) or ""


def test_summaries_are_the_first_lines_of_the_docstrings() -> None:
    for verb, summary in VERBS.items():
        first = docstring_of(verb).splitlines()[0]
        assert summary.rstrip(".") == first.rstrip(".")


def test_every_verb_is_offered() -> None:
    """Every function of the command line that is named for a verb."""
    functions = []
    for file in Path(importlib.import_module("glassgpt.cli").__file__ or "").parent.glob("*.py"):
        tree = ast.parse(file.read_text())
        functions += [f.name for f in tree.body if isinstance(f, ast.FunctionDef)]
    verbs = [name for name in functions if name.endswith("_verb")]
    assert sorted(f"{'_'.join(words)}_verb" for words in commands()) == sorted(verbs)


def test_help_lists_every_verb_with_its_summary() -> None:
    text = " ".join(help_of().split())
    for verb, summary in VERBS.items():
        assert f"{verb} {summary}"[:60] in text


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_the_help_of_a_verb_holds_its_docstring(words: tuple[str, ...]) -> None:
    text = " ".join(help_of(*words).split())
    docstring = docstring_of(*words).split("Parameters\n")[0]
    found = re.findall(r"[A-Za-z]{4,}", docstring)
    assert len(found) > 10
    assert [word for word in found if word not in text] == []


@pytest.mark.parametrize("verb", list(GROUPS))
def test_the_help_of_a_verb_lists_its_sub_commands(verb: str) -> None:
    text = " ".join(help_of(verb).split())
    for view in GROUPS[verb]:
        assert f"{view} {docstring_of(verb, view)}"[:40] in text


def test_train_offers_every_option() -> None:
    text = help_of("train")
    for name in option_types():
        if name != "data":
            assert f"--{name.replace('_', '-')}" in text


def test_the_help_lists_every_preset() -> None:
    shown = " ".join(help_of("train").split())
    assert f"recipe: {', '.join(preset_names())}" in shown


def test_presets_that_the_help_uses_exist() -> None:
    for words in commands():
        for name in re.findall(r"--preset ([a-z0-9-]+)", docstring_of(*words)):
            assert name in preset_names()
