"""The lessons run, small, from top to bottom; and what is committed is the result of a run."""

from __future__ import annotations

import ast
import json
import re
import sys
from pathlib import Path

import nbformat
import pytest
from filelock import FileLock

LESSONS = Path(__file__).parents[2] / "lessons"
RESULTS = LESSONS / "results"
sys.path.insert(0, str(LESSONS))
import ladder  # noqa: E402

pytestmark = pytest.mark.slow
NAMES = [path.stem for path in ladder.notebooks()]


@pytest.fixture(scope="session")
def shared(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Path:
    """One folder for all workers, so that each notebook runs once."""
    base = tmp_path_factory.getbasetemp()
    folder = (base if worker_id == "master" else base.parent) / "lessons"
    (folder / "results").mkdir(parents=True, exist_ok=True)
    return folder


def executed(name: str, shared: Path) -> Path:
    """The notebook with its outputs at small size; runs it unless that has been done."""
    target = shared / f"{name}.ipynb"
    with FileLock(shared / f"{name}.lock"):
        if not target.exists():
            ladder.execute(
                LESSONS / f"{name}.ipynb",
                target,
                LESSON_SIZE="small",
                LESSON_RESULTS=str(shared / "results"),
                MPLBACKEND="module://matplotlib_inline.backend_inline",
            )
    return target


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_from_top_to_bottom(name, shared):
    check_outputs(executed(name, shared))


CLIMB = {
    "02_bigram": "02_bigram",
    "04_one_head": "04_attention",
    "05a_heads": "05_blocks",
    "05b_blocks": "05_blocks",
    "06_gpt": "06_gpt",
}


def test_the_loss_falls_from_rung_to_rung(shared):
    for notebook in dict.fromkeys(CLIMB.values()):
        executed(notebook, shared)
    results = {rung: json.loads((shared / f"results/{rung}.json").read_text()) for rung in CLIMB}
    losses = [result["loss"] for result in results.values()]
    assert losses == sorted(losses, reverse=True)
    assert len(set(losses)) == len(losses)


# -- what is committed ---------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_committed_outputs_are_those_of_one_run(name):
    path = LESSONS / f"{name}.ipynb"
    assert path.stat().st_size < 400_000
    check_outputs(path)


def check_outputs(path: Path) -> None:
    """Every cell ran, in order and without error; where something is shown, something is there."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    for cell in cells:
        kinds = [output.output_type for output in cell.outputs]
        assert "error" not in kinds
        assert kinds or not _shows(cell.source), cell.source
        streams = [output.name for output in cell.outputs if output.output_type == "stream"]
        assert "stderr" not in streams, cell.outputs


def _shows(source: str) -> bool:
    """Whether a cell prints or plots, by itself and not only in a function that it defines."""
    calls = ("print(", "plt.show(", "ladder.report(", "ladder.difference(")
    definitions = (ast.FunctionDef, ast.ClassDef)
    nodes = [node for node in ast.parse(source).body if not isinstance(node, definitions)]
    return any(call in ast.unparse(node) for call in calls for node in nodes)


COMMITTED = {path.stem: json.loads(path.read_text()) for path in sorted(RESULTS.glob("*.json"))}


def test_every_lesson_has_a_result():
    assert {rung[:2] for rung in COMMITTED} == {name[:2] for name in NAMES}


@pytest.mark.parametrize("rung", COMMITTED)
def test_notebook_and_readme_tell_the_committed_result(rung):
    [notebook] = LESSONS.glob(f"{rung[:2]}_*.ipynb")
    loss = f"{COMMITTED[rung]['loss']:.3f}"
    assert f"validation loss {loss} nats" in notebook.read_text()
    row = re.search(rf"^\| \[{rung}\].*$", (LESSONS / "README.md").read_text(), flags=re.MULTILINE)
    assert row is not None
    assert f"| {loss} |" in row[0]


def test_the_committed_losses_fall_too():
    losses = [COMMITTED[rung]["loss"] for rung in CLIMB]
    assert losses == sorted(losses, reverse=True)
