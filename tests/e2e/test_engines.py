"""Which engine a user gets, and what is said about it."""

from __future__ import annotations

import itertools
import os
import signal
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import pytest

import glassgpt
from glassgpt.cli.app import main
from glassgpt.errors import UserError

pytestmark = pytest.mark.slow

RUN = Path(__file__).parents[1] / "golden" / "modern"
SAMPLE = ["sample", str(RUN), "--prompt", "The small", "--max-new-tokens", "60"]
WITHOUT_NUMBA = "import sys; sys.modules['numba'] = None"


def python(
    script: str, *arguments: str, env: dict[str, str] | None = None
) -> subprocess.CompletedProcess:
    """`glassgpt` after a line of Python, which also says at the end whether torch was imported."""
    script += """
import sys
from glassgpt.cli.app import main
try:
    main(sys.argv[1:])
finally:
    print("torch" in sys.modules, file=sys.stderr)
"""
    return subprocess.run([sys.executable, "-c", script, *arguments], capture_output=True,
                          text=True, env=os.environ | (env or {}))  # fmt: skip


@pytest.fixture(scope="module")
def expected() -> str:
    return python("", *SAMPLE, "--engine", "torch").stdout


def test_sampling_on_a_cpu_imports_no_torch(expected):
    for engine in ("auto", "numba", "numpy"):
        done = python("", *SAMPLE, "--engine", engine)
        assert done.stderr.splitlines()[-1] == "False"
        assert done.stdout == expected
    assert python("", *SAMPLE, "--engine", "torch").stderr.splitlines()[-1] == "True"


def test_without_numba_everything_works_and_it_says_once_what_is_faster(expected):
    """Two texts, one note."""
    twice = WITHOUT_NUMBA + f"\nimport glassgpt; glassgpt.load({str(RUN)!r}).generate('a')"
    for script in (WITHOUT_NUMBA, twice):
        done = python(script, *SAMPLE)
        assert done.stdout == expected
        assert done.stderr.count("pip install 'glassgpt[fast]'") <= 1
    done = python(WITHOUT_NUMBA, *SAMPLE)
    assert done.stderr.splitlines()[0] == (
        "note: pip install 'glassgpt[fast]' makes generation on this CPU faster"
    )
    for weights in ("int8", "int4"):
        assert python(WITHOUT_NUMBA, *SAMPLE, "--weights", weights).returncode == 0
    done = python(WITHOUT_NUMBA, *SAMPLE, "--engine", "numba")
    assert done.returncode == 2
    assert "pip install 'glassgpt[fast]'" in done.stderr.splitlines()[0]


def test_a_numba_that_does_not_fit_this_numpy(tmp_path, expected):
    (tmp_path / "numba").mkdir()
    (tmp_path / "numba" / "__init__.py").write_text("raise ImportError('needs an older NumPy')")
    done = python("", *SAMPLE, env={"PYTHONPATH": str(tmp_path)})
    assert done.stdout == expected
    assert "needs an older NumPy" in done.stderr.splitlines()[0]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--weights", "bfloat16"], "engine=gpu"),
        (["--weights", "bfloat16", "--engine", "numpy"], "float32, int8, int4"),
        (["--weights", "int8", "--engine", "torch"], "choose from float32"),
        (["--engine", "gpu", "--device", "cpu"], "device=cpu"),
        (["--engine", "numpy", "--device", "cuda"], "device=cuda"),
        (["--threads", "0"], "threads=0"),
        (["--threads", "5000"], "threads=5000"),
        (["--engine", "pytorch"], "engine"),
        (["--weights", "int2"], "weights"),
    ],
    ids=" ".join,
)
def test_what_does_not_go_together_is_one_line(options, words, capsys):
    with pytest.raises(SystemExit) as ended:
        main([*SAMPLE, *options])
    said = capsys.readouterr().err
    assert ended.value.code == 2
    assert words in said
    assert len(said.splitlines()) == 1


def test_the_python_api_takes_the_same_words(expected):
    model = glassgpt.load(RUN)
    texts = {
        engine: model.generate("The small", max_new_tokens=60, engine=engine).text
        for engine in ("auto", "numba", "numpy", "torch")
    }
    assert {"The small" + text + "\n" for text in texts.values()} == {expected}
    assert model.generate("The small", max_new_tokens=5, weights="int8", threads=2).text
    assert model.engine("numpy").weights is model.engine("numpy").weights
    for options in ({"engine": "jax"}, {"weights": "int3"}, {"threads": -1}):
        with pytest.raises(UserError):
            model.generate("The small", **options)


@pytest.mark.parametrize("engine", ["numba", "numpy", "torch"])
def test_two_texts_at_a_time_are_what_each_is_alone(engine):
    """Streams in turn, and calls in several threads, of one loaded model."""
    model, how = glassgpt.load(RUN), {"max_new_tokens": 40, "engine": engine, "seed": 3}
    prompts = ["The small", "a", "under the table"]
    alone = [model.generate(prompt, **how).text for prompt in prompts]
    streams = [model.stream(prompt, **how) for prompt in prompts]
    texts = [""] * len(prompts)
    for pieces in itertools.zip_longest(*streams):
        for i, piece in enumerate(pieces):
            texts[i] += piece.text if piece else ""
    assert texts == alone
    with ThreadPoolExecutor(3) as pool:
        found = pool.map(lambda prompt: model.generate(prompt, **how).text, prompts * 3)
    assert list(found) == alone * 3


def test_the_api_refuses_what_is_no_number(expected):
    model = glassgpt.load(RUN)
    for options in ({"threads": "2"}, {"threads": True}, {"threads": 1.5}, {"engine": ["numpy"]}):
        with pytest.raises(UserError):
            model.generate("a", max_new_tokens=1, **options)
    assert model.generate("a", max_new_tokens=1, threads=np.int64(2))
    texts = model.generate_many([np.array([1, 2]), np.array([3])], max_new_tokens=2)
    assert len(texts) == 2


def test_ctrl_c_ends_a_long_text(tmp_path):
    command = [sys.executable, "-m", "glassgpt", *SAMPLE[:-1], "10000000", "--threads", "2"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    process.stdout.read(200)  # it is in the middle of it
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    said = process.communicate(timeout=60)[1].decode()
    assert process.returncode == 130
    assert "Traceback" not in said
