"""prepare: the same tokens whatever the workers, splits that don't leak, nothing half-valid."""

from __future__ import annotations

import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from glassgpt.config import DataConfig
from glassgpt.data import prepare as module
from glassgpt.data.batches import load_data
from glassgpt.data.overlap import WINDOW, OverlapSample
from glassgpt.data.prepare import prepare
from glassgpt.data.report import describe
from glassgpt.errors import UserError
from glassgpt.tokenizer import END_OF_TEXT, CharTokenizer, to_files

STORY = "In the beginning there was a small machine that liked to read.\nIt read all day.\n"


def write_documents(path: Path, texts: list[str]) -> str:
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    return str(path)


def everything(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def test_one_document_is_split_by_characters(tmp_path):
    (tmp_path / "a.txt").write_text(STORY * 40)
    report = prepare([str(tmp_path / "a.txt")], tmp_path / "out", DataConfig(val_fraction=0.25))
    data = load_data(tmp_path / "out")
    text = STORY * 40
    cut = int(len(text) * 0.75)
    decode = data.tokenizer.decode
    assert decode(data.train.read(0, len(data.train))) == text[:cut]
    assert decode(data.val.read(0, len(data.val))) == text[cut:]
    assert report.characters == len(text) == report.train_tokens + report.val_tokens
    assert report.vocab_used == len(set(text)) == report.vocab_size - 1


@pytest.mark.parametrize("n", [10, 37, 1500])
def test_documents_are_split_whole_and_separated(tmp_path, n):
    texts = [f"Document number {i} says {'very ' * (i % 7)}little.\n" for i in range(n)]
    source = write_documents(tmp_path / "a.jsonl", texts)
    config = DataConfig(tokenizer="byte", val_fraction=0.1)
    report = prepare([source], tmp_path / "out", config)
    data = load_data(tmp_path / "out")
    parts = {
        name: data.tokenizer.decode(split.read(0, len(split))).split(END_OF_TEXT)
        for name, split in (("train", data.train), ("val", data.val))
    }
    assert sorted(parts["train"] + parts["val"]) == sorted(texts)
    assert len(parts["val"]) == report.val_documents == pytest.approx(n * 0.1, abs=2)
    starts = np.fromfile(tmp_path / "out" / "train-documents.bin", "<u8")
    assert len(starts) == len(parts["train"])
    for start, text in zip(starts[:20], parts["train"], strict=False):
        assert data.tokenizer.decode(data.train.read(int(start), int(start) + 8)) == text[:8]


def test_a_validation_file_of_its_own(tmp_path):
    (tmp_path / "a.txt").write_text(STORY * 3)
    (tmp_path / "b.txt").write_text("Only bees know why.\n")
    config = DataConfig(val=str(tmp_path / "b.txt"))
    report = prepare([str(tmp_path / "a.txt")], tmp_path / "out", config)
    data = load_data(tmp_path / "out")
    assert len(data.train) == len(STORY * 3)
    assert len(data.val) == 20
    assert report.unknown_tokens == sum(char not in STORY for char in "Only bees know why.\n") > 0
    assert "not in the vocabulary" in describe(report, "out")


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:300"])
def test_workers_and_pieces_do_not_change_a_byte(tmp_path, monkeypatch, tokenizer):
    generator = np.random.default_rng(1)
    words = ["alpha", "beta", "gamma\n", "δέλτα", "🙂", "it's", "  two", "x" * 40]
    (tmp_path / "a.txt").write_text(" ".join(generator.choice(words, 20_000)))
    config = DataConfig(tokenizer=tokenizer)
    prepare([str(tmp_path / "a.txt")], tmp_path / "whole", config, workers=1)
    monkeypatch.setattr(module, "_PIECE_CHARS", 5_000)
    monkeypatch.setattr(module, "_JOB_CHARS", 7_000)
    prepare([str(tmp_path / "a.txt")], tmp_path / "cut", config, workers=4)
    whole, cut = everything(tmp_path / "whole"), everything(tmp_path / "cut")
    metas = [json.loads(files.pop("meta.json")) for files in (whole, cut)]
    assert whole == cut
    for meta in metas:  # windows across the cuts are not looked at
        del meta["report"]["overlap"]
    assert metas[0] == metas[1]


def test_shards(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_SHARD_TOKENS", 1000)
    (tmp_path / "a.txt").write_text(STORY * 50)
    prepare([str(tmp_path / "a.txt")], tmp_path / "out", DataConfig())
    data = load_data(tmp_path / "out")
    assert [len(shard) for shard in data.train.shards[:-1]] == [1000] * (len(data.train) // 1000)
    text = data.tokenizer.decode(data.train.read(0, len(data.train)))
    assert text == (STORY * 50)[: len(text)]


def test_same_input_again_does_nothing(tmp_path):
    (tmp_path / "a.txt").write_text(STORY * 9)
    out = tmp_path / "out"
    first = prepare([str(tmp_path / "a.txt")], out, DataConfig())
    before = {path: path.stat().st_mtime_ns for path in out.iterdir()}
    again = prepare([str(tmp_path / "a.txt")], out, DataConfig())
    assert again.unchanged
    assert again.train_tokens == first.train_tokens
    assert before == {path: path.stat().st_mtime_ns for path in out.iterdir()}
    (tmp_path / "a.txt").write_text(STORY * 10)
    with pytest.raises(UserError, match="exists already with other content"):
        prepare([str(tmp_path / "a.txt")], out, DataConfig())
    assert not prepare([str(tmp_path / "a.txt")], out, DataConfig(), overwrite=True).unchanged


def test_report_counts_copies_blanks_and_leaks(tmp_path):
    texts = [f"{i}: {STORY}" for i in range(30)]
    source = write_documents(tmp_path / "a.jsonl", [*texts, *texts[:5], " \n", "\t"])
    report = prepare([source], tmp_path / "out", DataConfig(tokenizer="byte"))
    assert report.documents == 35
    assert report.duplicates == 5
    assert report.too_short == 2
    assert report.overlap > 0.5  # the same story in every document
    assert "will look better than it is" in describe(report, "out")


def test_overlap_is_the_share_of_common_windows():
    generator = np.random.default_rng(0)
    train = generator.integers(0, 50_000, 3_000_000).astype(np.uint32)
    fresh = generator.integers(0, 50_000, 300_000).astype(np.uint32)
    sample = OverlapSample()
    for start in range(0, len(train), 500_000):
        sample.add("train", sample.sample(train[start : start + 500_000]))
    sample.add("val", sample.sample(fresh))
    assert sample.share() == 0.0
    sample.add("val", sample.sample(train[777_000 : 777_000 + 300_000]))
    assert sample.share() == pytest.approx(0.5, abs=0.02)
    assert sample.bits > 0  # memory stayed bounded
    assert len(sample.sample(train[: WINDOW - 1])) == 0


def test_max_tokens_stops_early(tmp_path):
    source = write_documents(tmp_path / "a.jsonl", [STORY] * 3000)
    config = DataConfig(tokenizer="byte", max_tokens=20_000)
    report = prepare([source], tmp_path / "out", config)
    assert 20_000 <= report.train_tokens + report.val_tokens < 20_000 + 3 * module._JOB_CHARS
    assert report.val_tokens > 0


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:300"])
def test_max_tokens_of_one_document_leaves_some_to_validate(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(module, "_PIECE_CHARS", 1000)
    monkeypatch.setattr(module, "_JOB_CHARS", 1000)
    (tmp_path / "a.txt").write_text(STORY * 2000)
    config = DataConfig(tokenizer=tokenizer, max_tokens=20_000)
    report = prepare([str(tmp_path / "a.txt")], tmp_path / "out", config)
    assert 20_000 <= report.train_tokens + report.val_tokens < 30_000
    assert report.train_tokens == pytest.approx(18_000, rel=0.1)
    assert report.val_tokens > 1_000


def test_overwrite_replaces_prepared_data_only(tmp_path):
    (tmp_path / "a.txt").write_text(STORY * 9)
    keep = tmp_path / "notes"
    keep.mkdir()
    (keep / "precious.txt").write_text("mine")
    for out in (keep, keep / "precious.txt"):
        with pytest.raises(UserError, match="leaves it alone"):
            prepare([str(tmp_path / "a.txt")], out, DataConfig(), overwrite=True)
    assert (keep / "precious.txt").read_text() == "mine"


def test_what_is_no_text_is_refused_and_leaves_nothing(tmp_path):
    blank = tmp_path / "blank.txt"
    blank.write_text("  \n ")
    damaged = tmp_path / "cut.txt.gz"
    damaged.write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:-2000])
    for source in (blank, damaged):
        with pytest.raises(UserError, match=source.name):
            prepare([str(source)], tmp_path / "out", DataConfig())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["blank.txt", "cut.txt.gz"]


def test_ctrl_c_leaves_nothing(tmp_path):
    source = tmp_path / "big.txt"
    source.write_text(STORY * 400_000)  # 32 MB: seconds of work
    code = (f"from glassgpt.cli import main; main(['prepare', {str(source)!r}, '--out', "
            f"{str(tmp_path / 'out')!r}, '--tokenizer', 'bpe:400'])")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob(".out.partial/train-*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert b"Traceback" not in stderr
    assert [path.name for path in tmp_path.iterdir()] == ["big.txt"]


def test_unknown_characters_that_become_spaces_are_counted(tmp_path):
    """A model from nanoGPT has no `<unk>`; its tokenizer reads what it never saw as a space."""
    tokenizer = CharTokenizer.from_tokens(sorted(set(STORY)), " ")
    for name, content in to_files(tokenizer).items():
        (tmp_path / name).write_bytes(content)
    (tmp_path / "a.txt").write_text(STORY * 9 + "Größe: 9\n" + STORY)
    config = DataConfig(tokenizer=str(tmp_path / "tokenizer.json"))
    report = prepare([str(tmp_path / "a.txt")], tmp_path / "out", config)
    assert report.unknown_tokens == sum(char not in STORY for char in "Größe: 9\n") == 5
    assert load_data(tmp_path / "out").tokenizer.spec == tokenizer.spec
