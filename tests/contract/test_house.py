"""The measures of the house: few rooms, small files, one name for one thing, little to import."""

from __future__ import annotations

import ast
import re
import tomllib
from collections import defaultdict
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SOURCE = ROOT / "src"
PACKAGE = SOURCE / "glassgpt"

MOST_ROOMS, MOST_FILES_AT_THE_TOP, MOST_LEVELS = 12, 11, 10
MOST_LINES = 23_600  # of all modules; the aim is 20,500, so this number may only fall
MOST_LINES_OF_A_FILE, MOST_LINES_OF_A_FUNCTION = 500, 60
MOST_LINES_OF_THE_ROUTE = 1500
MOST_ANY, MOST_SKIPS = 150, 60
MOST_MODULES_FOR_TRAINING = 40
# One function in several forms: torch, NumPy, compiled, by hand.
SHARED_NAMES = {"attention", "rotate", "forward", "linear", "Cache"}
ENTRY_POINT = "main"  # of a command

FILES = sorted(PACKAGE.rglob("*.py"))


def module_of(file: Path) -> str:
    name = ".".join(file.relative_to(SOURCE).with_suffix("").parts)
    return name.removesuffix(".__init__")


MODULES = {module_of(file): file for file in FILES}


def lines_of(file: Path) -> int:
    return file.read_text().count("\n")


@cache
def tree_of(file: Path) -> ast.Module:
    return ast.parse(file.read_text())


# -- rooms and levels ----------------------------------------------------------------------------


def test_rooms_and_files_at_the_top() -> None:
    rooms = [path.parent for path in PACKAGE.glob("*/__init__.py")]
    assert len(rooms) <= MOST_ROOMS
    files = sorted(path.name for path in PACKAGE.glob("*.py"))
    assert len(files) <= MOST_FILES_AT_THE_TOP, files
    for room in rooms:
        assert ast.get_docstring(tree_of(room / "__init__.py")), f"{room.name} says no job"


def test_few_import_levels() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]
    [layers] = [one["layers"] for one in settings["contracts"] if one["type"] == "layers"]
    assert len(layers) <= MOST_LEVELS
    named = {name for level in layers for name in re.findall(r"glassgpt\.(\w+)", level)}
    tops = {path.stem for path in PACKAGE.glob("*.py")} - {"__init__"}
    tops |= {path.parent.name for path in PACKAGE.glob("*/__init__.py")}
    assert named == tops  # every room has its level


# -- sizes ---------------------------------------------------------------------------------------


def test_lines_of_the_whole() -> None:
    lines = sum(map(lines_of, FILES))
    assert lines <= MOST_LINES


@pytest.mark.parametrize("file", FILES, ids=module_of)
def test_lines_of_a_file_and_of_its_functions(file: Path) -> None:
    lines = lines_of(file)
    assert lines <= MOST_LINES_OF_A_FILE
    for node in ast.walk(tree_of(file)):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            # A docstring doesn't count: that of a verb is its whole help text.
            documented = ast.get_docstring(node) is not None
            body = node.body[1:] if documented else node.body
            lines = (node.end_lineno or 0) - body[0].lineno + 1 if body else 0
            assert lines <= MOST_LINES_OF_A_FUNCTION, f"{node.name} has {lines} lines"


def test_the_readers_route_is_short() -> None:
    """The files that the README's "Read the code" lists, counted."""
    section = (ROOT / "README.md").read_text().split("## Read the code")[1]
    route = re.findall(r"^\d\. \[`[\w./]+`\]\(([\w./]+)\)", section, flags=re.MULTILINE)
    assert len(route) == 5
    lines = {name: lines_of(ROOT / name) for name in route}
    assert sum(lines.values()) <= MOST_LINES_OF_THE_ROUTE, lines


def test_every_module_says_what_it_is_for() -> None:
    assert [name for name, file in MODULES.items() if not ast.get_docstring(tree_of(file))] == []


def test_few_unchecked_types_and_few_layouts_by_hand() -> None:
    unchecked = sum(len(re.findall(r"\bAny\b", file.read_text())) for file in FILES)
    assert unchecked <= MOST_ANY
    skips = sum(file.read_text().count("# fmt: skip") for file in FILES)
    assert skips <= MOST_SKIPS


# -- one name, one thing -------------------------------------------------------------------------


def test_no_public_name_means_two_things() -> None:
    homes: dict[str, list[str]] = defaultdict(list)
    for module, file in MODULES.items():
        for node in tree_of(file).body:
            named = isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            if named and not node.name.startswith("_"):
                homes[node.name].append(module)
    homes = {name: found for name, found in homes.items() if len(found) > 1}
    # glassgpt.train, finetune and prepare only call the room's function of the same name.
    doors = {name for name, found in homes.items() if "glassgpt" in found and len(found) == 2}
    assert {name: homes[name] for name in homes.keys() - doors - SHARED_NAMES - {ENTRY_POINT}} == {}


# -- what training imports -----------------------------------------------------------------------


def imported_at_the_top(module: str) -> set[str]:
    """Modules of ours that importing this one imports at once: not inside a function, and not for
    a type checker alone."""
    found: set[str] = set()
    waiting: list[ast.AST] = [tree_of(MODULES[module])]
    while waiting:
        node = waiting.pop()
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda):
            continue
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            waiting += node.orelse
            continue
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        waiting += ast.iter_child_nodes(node)
    return found & MODULES.keys()


def test_training_imports_few_modules() -> None:
    seen: set[str] = set()
    waiting = ["glassgpt.training.run"]
    while waiting:
        module = waiting.pop()
        if module in seen:
            continue
        seen.add(module)
        parents = module.split(".")[:-1]
        waiting += imported_at_the_top(module)
        waiting += [".".join(parents[: i + 1]) for i in range(len(parents))]
    modules = sorted(name for name in seen if MODULES[name].name != "__init__.py")
    assert len(modules) <= MOST_MODULES_FOR_TRAINING, modules
