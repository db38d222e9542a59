"""What the lessons share: the text, the results, code taken from earlier notebooks.

    python lessons/ladder.py run 02 04     # execute these notebooks again, in place
    python lessons/ladder.py run --small   # all of them, small, in a scratch folder
    python lessons/ladder.py table         # the table in lessons/README.md

Knows no model: what a lesson is about stands in its notebook, the rest in glassgpt.
"""

from __future__ import annotations

import argparse
import ast
import difflib
import json
import linecache
import os
import re
import sys
import tempfile
import textwrap
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

from glassgpt.data import corpora, sources
from glassgpt.data.dataset import Dataset
from glassgpt.errors import UserError
from glassgpt.system import cache_dir

HERE = Path(__file__).resolve().parent
SMALL = os.environ.get("LESSON_SIZE") == "small"  # a few seconds a notebook, for the tests
# Okabe and Ito's colours, which every kind of eye tells apart.
COLOURS = ["#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"]
T_ = TypeVar("T_")


def size(full: T_, small: T_) -> T_:
    """`full`, or `small` where LESSON_SIZE=small."""
    return small if SMALL else full


# -- the text ------------------------------------------------------------------------------------


@cache
def text_name() -> str:
    """A file (LESSON_TEXT), or a corpus: Shakespeare if it is here or comes quickly, else the
    manual that Python carries."""
    if chosen := os.environ.get("LESSON_TEXT"):
        return chosen
    try:
        corpora.fetch_corpus("shakespeare", timeout=5.0)
        return "shakespeare"
    except UserError:
        return "python-manual"


def text() -> str:
    """All of it."""
    return "".join(piece.text for piece in sources.read_pieces(sources.resolve([text_name()])))


@cache
def data() -> Dataset:
    """The same text as tokens, one for each character: `.train`, `.val` (the last tenth) and
    `.tokenizer`."""
    import glassgpt

    return glassgpt.prepare(text_name())


# -- the model that later lessons look at --------------------------------------------------------

# Of rung 6: GPT-2's shape, small; minutes on a busy laptop.
GPT2_OPTIONS: dict[str, Any] = dict(
    shape="gpt2",
    n_layer=size(4, 2),
    n_head=4,
    n_embd=size(96, 64),
    context_length=size(64, 32),
    batch_tokens=size(1024, 512),
    max_steps=size(1500, 400),
    warmup_steps=size(100, 20),
    eval_interval=size(500, 100),
    eval_batches=size(None, 8),
)


def gpt2_run(anew: bool = False) -> Path:
    """The run directory of rung 6's GPT-2, which is trained now if that was not done yet, or
    `anew`."""
    import glassgpt

    size_and_text = f"{'small' if SMALL else 'full'}-{Path(text_name()).stem}"
    run = cache_dir() / "lessons" / f"gpt2-{size_and_text}"
    if anew or not (run / "report.md").exists():
        glassgpt.train(text_name(), out=run, overwrite=run.exists(), **GPT2_OPTIONS)
    return run


# -- results -------------------------------------------------------------------------------------


def results_folder() -> Path:
    """LESSON_RESULTS, or the committed ones; small runs never write there."""
    if chosen := os.environ.get("LESSON_RESULTS"):
        return Path(chosen)
    return Path(tempfile.gettempdir()) / "glassgpt-lessons" if SMALL else HERE / "results"


def report(
    rung: str, idea: str, *, loss: float, parameters: int, seconds: float, sample: str
) -> None:
    """Print what a rung reached, and keep it as results/RUNG.json.

    `rung` begins with the notebook's number; `loss` in nats per character on validation text;
    `seconds` of a core (time.process_time), which other programs on the machine don't stretch.
    """
    result = {"idea": idea, "loss": loss, "parameters": parameters, "seconds": seconds}
    folder = results_folder()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{rung}.json").write_text(json.dumps(result | {"sample": sample}, indent=2) + "\n")
    print(
        f"{rung} · {idea}\nvalidation loss {loss:.3f} nats per character, {parameters:,} parameters"
        f", {seconds:.0f} s of a core to train\n\n{sample}"
    )


def results() -> dict[str, dict[str, Any]]:
    """What the rungs reached so far, in their order."""
    paths = sorted(results_folder().glob("*.json"))
    return {path.stem: json.loads(path.read_text()) for path in paths}


def table() -> str:
    """The results as Markdown."""
    heading = "| rung | what is new | validation loss | parameters | seconds of a core |"
    rows = [heading, "|---|---|--:|--:|--:|"]
    for rung, result in results().items():
        [notebook] = HERE.glob(f"{rung[:2]}_*.ipynb")
        rows.append(
            f"| [{rung}]({notebook.name}) | {result['idea']} | {result['loss']:.3f} "
            f"| {result['parameters']:,} | {result['seconds']:.0f} |"
        )
    return "\n".join(rows)


# -- code ----------------------------------------------------------------------------------------


def taken(notebook: str, *names: str) -> Any:
    """Functions and classes of an earlier notebook, as they stand there: `taken("02_bigram",
    "train")`. Runs its imports, its definitions and what it has from here, nothing else."""
    cells = json.loads((HERE / f"{notebook}.ipynb").read_text())["cells"]
    namespace: dict[str, Any] = {"__name__": notebook}
    for number, cell in enumerate(cells):
        if cell["cell_type"] == "code":
            filename, source = f"<{notebook}, cell {number}>", "".join(cell["source"])
            linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)
            kept = ast.Module([node for node in ast.parse(source).body if _defines(node)], [])
            exec(compile(kept, filename, "exec"), namespace)
    found = [namespace[name] for name in names]
    return found[0] if len(found) == 1 else found


def _defines(node: ast.stmt) -> bool:
    kinds = (ast.Import, ast.ImportFrom, ast.FunctionDef, ast.ClassDef)
    takes = isinstance(node, ast.Assign) and ast.unparse(node.value).startswith("ladder.")
    return isinstance(node, kinds) or takes


def source_of(thing: type | Callable) -> str:
    """The code of a function or class of a notebook (`inspect` can't find classes there)."""
    function = thing if not isinstance(thing, type) else next(
        value for value in vars(thing).values() if hasattr(value, "__code__")
    )  # fmt: skip
    lines = linecache.getlines(function.__code__.co_filename)  # type: ignore
    for node in ast.walk(ast.parse("".join(lines))):
        if getattr(node, "name", None) == thing.__name__:
            return textwrap.dedent("".join(lines[node.lineno - 1 : node.end_lineno]))  # type: ignore
    raise AssertionError(f"{thing} does not stand in a cell")


def difference(before: Any, after: Any, context: int = 99) -> None:
    """Show what changed between two functions or classes: new lines with +, old ones with -."""
    from IPython.display import display

    old, new = (source_of(thing).splitlines() for thing in (before, after))
    changes = list(difflib.unified_diff(old, new, lineterm="", n=context))
    shown = "\n".join(line for line in changes[2:] if not line.startswith("@@"))
    data = {"text/markdown": f"```diff\n{shown}\n```", "text/plain": shown}
    display(data, raw=True)


# -- figures -------------------------------------------------------------------------------------


def plain_figures() -> None:
    """One look for all figures, small enough for a notebook."""
    import matplotlib.pyplot as plt
    from cycler import cycler

    plt.rcParams.update(
        {
            "figure.dpi": 80,
            "figure.figsize": (7, 4),
            "figure.constrained_layout.use": True,
            "axes.prop_cycle": cycler(color=COLOURS),
            "axes.grid": True,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "grid.alpha": 0.25,
            "image.cmap": "cividis",
            "legend.frameon": False,
        }
    )


# -- running -------------------------------------------------------------------------------------


def notebooks(numbers: Sequence[str] = ()) -> list[Path]:
    """All of them, or those with these numbers, in order."""
    found = sorted(HERE.glob("[0-9][0-9]_*.ipynb"))
    return [path for path in found if not numbers or path.name[:2] in numbers]


def execute(path: Path, target: Path, **environment: str) -> None:
    """Run a notebook from top to bottom in a fresh kernel and write it with its outputs."""
    import nbformat
    from nbclient import NotebookClient

    notebook = nbformat.read(path, as_version=4)
    client = NotebookClient(
        notebook, timeout=1800, kernel_name="python3", resources={"metadata": {"path": str(HERE)}}
    )
    try:
        client.execute(env=os.environ | environment)
    finally:  # also with its error, for whoever looks for it
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times, which change with every run
        nbformat.write(notebook, target)


def main() -> None:
    parser = argparse.ArgumentParser(description="Run the lessons, or make their table.")
    verbs = parser.add_subparsers(dest="verb", required=True)
    run = verbs.add_parser("run", help="execute notebooks in place")
    run.add_argument("numbers", nargs="*", metavar="NN", help="00, 01, ... [all]")
    run.add_argument("--small", action="store_true", help="small sizes, in a scratch folder")
    verbs.add_parser("table", help="write the table of results into lessons/README.md")
    given = parser.parse_args()
    if given.verb == "table":
        readme = HERE / "README.md"
        marked = r"(?<=<!-- table -->\n).*?(?=<!-- end -->)"
        readme.write_text(re.sub(marked, lambda _: table() + "\n", readme.read_text(), flags=re.S))
        return
    folder = Path(tempfile.mkdtemp(prefix="lessons-")) if given.small else HERE
    for path in notebooks(given.numbers):
        execute(path, folder / path.name, **({"LESSON_SIZE": "small"} if given.small else {}))
        print(folder / path.name, file=sys.stderr)


if __name__ == "__main__":
    main()
