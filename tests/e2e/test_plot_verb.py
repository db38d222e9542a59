"""`glassgpt plot` as people type it: real runs, real files."""

from __future__ import annotations

import json
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from conftest import refuse
from glassgpt.cli.app import main

pytestmark = pytest.mark.slow

OPTIONS = shlex.split(
    "--n-head 2 --n-embd 12 --context-length 16 --batch-tokens 64 --max-steps 6 "
    "--eval-interval 3 --log-interval 1 --sample-tokens 0 --threads 1"
)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """a/book (modern, characters), b/book (GPT-2's shape, a different size), words (BPE)."""
    folder = tmp_path_factory.mktemp("runs")
    (folder / "book.txt").write_text("The cat sat on the mat, and the dog ate the hat. " * 60)
    for name, more in (
        ("a/book", "--n-layer 1"),
        ("b/book", "--n-layer 2 --shape gpt2"),
        ("words", "--n-layer 1 --tokenizer bpe:280"),
    ):
        main(["train", str(folder / "book.txt"), "--out", str(folder / name), *OPTIONS,
              *more.split()])  # fmt: skip
    return folder


@pytest.fixture(autouse=True)
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def plot(capsys, *arguments: object) -> str:
    capsys.readouterr()
    main(["plot", *map(str, arguments)])
    return capsys.readouterr().out


def test_the_losses_of_a_run_and_how_they_are_drawn_again(runs, here, capsys):
    said = plot(capsys, runs / "a/book")
    best = json.loads((runs / "a/book/glassgpt.json").read_text())["best_val_loss"]
    assert f"{best:.4f}" in said
    assert said.splitlines()[-1] == "book-loss.png written"
    assert [path.name for path in here.iterdir()] == ["book-loss.png"]
    before = (here / "book-loss.png").read_bytes()
    assert before.startswith(b"\x89PNG\r\n")
    assert "--overwrite replaces it" in refuse(capsys, "plot", runs / "a/book")
    plot(capsys, runs / "a/book", "--x", "tokens", "--overwrite")
    assert (here / "book-loss.png").read_bytes() != before


def test_several_runs_are_compared(runs, here, capsys):
    said = plot(capsys, runs / "a/book", runs / "b/book", f"{runs}/a/book/", "--out", "x.svg")
    figure = (here / "x.svg").read_text()
    assert re.search(r">a/book \(n_layer 1, shape modern\): best \d\.\d{3} at step \d<", figure)
    assert re.search(r">b/book \(n_layer 2, shape gpt2\): best \d\.\d{3} at step \d<", figure)
    assert figure.count(">guessing: ln(16) = 2.77<") == 1
    assert len(said.splitlines()) == 4  # a table of two runs, and the file
    said = plot(capsys, runs / "a/book", runs / "words", "--x", "time", "--log-y")
    assert "note: these runs do not choose among the same tokens" in said
    assert (here / "loss-compare.png").exists()


def test_a_page_of_html_with_the_table(runs, here, capsys):
    said = plot(capsys, runs / "a/book", "--out", "x.html")
    page = (here / "x.html").read_text()
    assert said.splitlines()[1] in page
    assert not re.findall(r'(?:src|href)="(?!#)', page)


def test_a_run_that_goes_on_or_has_not_begun(runs, here, capsys):
    """No model yet, a line half-written, a NaN of float16's scaler: drawn as far as it got."""
    begun, empty = here / "begun", here / "empty"
    begun.mkdir()
    rows = [dict(step=0, tokens=0, seconds=0.5, val_loss=3.0),
            dict(step=1, tokens=64, seconds=0.6, train_loss=float("nan"))]  # fmt: skip
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (begun / "metrics.jsonl").write_text(lines + "7\n" + '{"step": 2, "to')
    empty.mkdir()
    (empty / "metrics.jsonl").touch()
    said = plot(capsys, begun, empty, runs / "a/book")
    assert "note: empty left out: no loss is recorded yet" in said.replace(f"{here}/", "")
    assert "note: 1 losses left out that are no finite numbers" in said
    assert re.search(r"^begun +3\.0000 +0 +1 +64", said, flags=re.MULTILINE)
    assert "no loss is recorded yet; wait for the first" in refuse(capsys, "plot", empty)


def test_what_is_no_run(runs, here, capsys):
    assert "does not exist; name a run directory" in refuse(capsys, "plot", here / "no/where/is")
    assert "published models keep no record" in refuse(capsys, "plot", "gpt2")
    shutil.copytree(runs / "a/book", here / "alone")
    (here / "alone/metrics.jsonl").unlink()
    assert "it has no metrics.jsonl" in refuse(capsys, "plot", "alone")
    (here / "alone/metrics.jsonl").write_bytes(b"\xff\xfe\x00")
    assert "damaged" in refuse(capsys, "plot", "alone")
    assert not list(here.glob("*.png"))


def test_the_embeddings_of_models(runs, here, capsys):
    assert plot(capsys, runs / "b/book", "--embedding", "--out", "b.svg").startswith(
        "16 tokens, 16 positions\n"
    )
    figure = (here / "b.svg").read_text()
    for text in ("book: embeddings of 16 tokens, 12 wide", "cosine similarity", "␣", "&lt;unk&gt;",
                 "principal component 2", "position (tokens from the beginning)"):  # fmt: skip
        assert text in figure
    said = plot(capsys, runs / "words", "--embedding")
    assert "positions" not in said  # rotary ones are not learned
    assert (here / "words-embedding.png").exists()


def test_attention_of_all_heads_and_of_one(runs, here, capsys):
    said = plot(capsys, runs / "b/book", "--attention", "The cat", "--out", "all.svg")
    assert said.startswith("2 layers x 2 heads, 7 tokens")
    figure = (here / "all.svg").read_text()
    assert figure.count("base64,") >= 4
    assert [n for n in range(3) if f">layer {n}<" in figure] == [0, 1]
    said = plot(capsys, runs / "b/book", "--attention", "-x-Thé " + "cat " * 9, "--layer", 1,
                "--head", 0, "--out", "one.html")  # fmt: skip
    assert "note: only the first 16 of 43 tokens are drawn" in said
    assert "'é'" in said
    page = (here / "one.html").read_text()
    assert ">book, layer 1, head 0<" in page
    assert set(re.findall(r'(?:src|href)="([^#:"]+)', page)) == {"data"}
    (here / "text.txt").write_text("the dog")
    assert ", 7 tokens" in plot(capsys, runs / "a/book", "--attention", "@text.txt")


def test_what_does_not_go_together(runs, here, capsys):
    run = runs / "b/book"
    for words, message in (
        (["--embedding", "--attention", "x"], "one at a time"),
        (["--embedding", "--layer", 0], "--layer does not go with --embedding"),
        (["--attention", "x", "--x", "time"], "--x does not go with --attention"),
        (["--head", 0], "--head does not go with a figure of losses"),
        (["--attention", "x", "--head", 2], "--head 2: this model has heads 0 to 1"),
        (["--attention", "x", "--layer", -1], "--layer -1: this model has layers 0 to 1"),
        (["--attention", ""], "needs a text"),
        ([run, runs / "words", "--embedding"], "draws one model, not"),
        (["--out", "x.jpeg"], "a figure is a .png, .svg or .html"),
    ):
        assert message in refuse(capsys, "plot", run, *words)
    assert not list(here.glob("*"))


def test_the_embedding_needs_no_torch(runs, here):
    code = ("import sys; from glassgpt.cli.app import main; main(sys.argv[1:]); "
            "assert 'torch' not in sys.modules, 'torch'")  # fmt: skip
    for words in (["--embedding"], []):
        command = [sys.executable, "-c", code, "plot", str(runs / "a/book"), *words]
        done = subprocess.run(command, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
