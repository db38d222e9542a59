"""`glassgpt export` as a user types it: to nanoGPT and back, what is refused, NumPy alone.

What all formats promise is tested in tests/contract/test_formats.py.
"""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from glassgpt.checkpoints.load import load_pretrained
from glassgpt.cli.app import main

pytestmark = pytest.mark.slow

SENTENCE = "The cat sat on the mat, and the dog ate the hat. "
TINY = ["--n-layer", "2", "--n-head", "2", "--n-embd", "32", "--context-length", "16",
        "--batch-tokens", "64", "--max-steps", "4", "--eval-interval", "4", "--threads", "1",
        "--sample-tokens", "0"]  # fmt: skip


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("runs")
    (folder / "book.txt").write_text(SENTENCE * 60)
    for shape in ("gpt2", "modern"):
        main(["train", str(folder / "book.txt"), "--out", str(folder / shape), "--shape", shape,
              *TINY])  # fmt: skip
    return {shape: folder / shape for shape in ("gpt2", "modern")}


def difference(said: str) -> float:
    match = re.search(r"largest difference in logits (\S+)", said)
    assert match, said
    return float(match[1])


def test_nanogpt_and_back(runs, tmp_path, capsys):
    out = tmp_path / "out"
    main(["export", str(runs["gpt2"]), "--to", "nanogpt", "--out", str(out)])
    said = capsys.readouterr().out
    assert "exact GELU" in said
    assert difference(said) < 0.01
    ours, again = load_pretrained(runs["gpt2"]), load_pretrained(out / "ckpt.pt")
    assert again.config.activation == "gelu"
    for name in ours.config.weight_shapes:
        assert np.array_equal(ours.weights[name], again.weights[name])
    main(["sample", str(out), "--prompt", "The", "--max-new-tokens", "5"])
    (tmp_path / "more.txt").write_text(SENTENCE * 60)
    main(["train", str(tmp_path / "more.txt"), "--from", str(out), "--out", str(tmp_path / "run"),
          *TINY[8:]])  # fmt: skip
    about = json.loads((tmp_path / "run/glassgpt.json").read_text())
    assert about["model"]["activation"] == "gelu"


def test_what_can_not_be_exported(runs, tmp_path, capsys):
    def refused(*arguments: object) -> str:
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main(["export", *map(str, arguments)])
        said = capsys.readouterr().err
        assert ended.value.code == 2
        assert len(said.splitlines()) == 1
        return said

    run = runs["modern"]
    assert "nanoGPT can't express a model of the modern shape" in refused(
        run, "--to", "nanogpt", "--out", tmp_path / "n"
    )
    assert "gguf" in refused(run, "--to", "safetensors")
    main(["export", str(run), "--to", "numpy", "--out", str(tmp_path / "new" / "b.npz")])
    assert [path.name for path in tmp_path.iterdir()] == ["new"]


def test_generation_by_numpy_alone(runs):
    """`python -m glassgpt.numpy_gpt`, with the cache and without, imports neither torch nor
    transformers and says the same."""
    outputs = []
    for options in ([], ["--no-cache"]):
        code = (
            "import runpy, sys; sys.argv = sys.argv[:1] + sys.argv[1:]\n"
            "try: runpy.run_module('glassgpt.numpy_gpt', run_name='__main__')\n"
            "except SystemExit as e: assert not e.code, e.code\n"
            "assert not {'torch', 'transformers'} & set(sys.modules)"
        )
        done = subprocess.run(
            [sys.executable, "-c", code, "The cat", "--n-tokens", "8", "--model",
             str(runs["gpt2"]), *options], capture_output=True, text=True, timeout=120)  # fmt: skip
        assert done.returncode == 0, done.stderr
        outputs.append(done.stdout)
    assert outputs[0] == outputs[1]
    assert outputs[0].startswith("The cat")
