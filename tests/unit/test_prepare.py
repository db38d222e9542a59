"""prepare: the same tokens whatever the workers, splits that don't leak, nothing half-valid."""

from __future__ import annotations

import contextlib
import errno
import gzip
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from glassgpt.config import DataConfig
from glassgpt.data import dataset as folder
from glassgpt.data import prepare as module
from glassgpt.data.dataset import is_prepared, load_data
from glassgpt.data.overlap import WINDOW, OverlapSample
from glassgpt.data.prepare import prepare
from glassgpt.data.sources import resolve
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.system import Reporter
from glassgpt.tokenizers.tokenizer import END_OF_TEXT, CharTokenizer, to_files
from glassgpt.training.run import train
from listener import Listener

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
    assert "not in the vocabulary" in report.describe("out")


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
    monkeypatch.setattr(folder, "_SHARD_TOKENS", 1000)
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
    assert "will look better than it is" in report.describe("out")


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


@pytest.mark.parametrize("tokenizer", ["char", "byte", "bpe:300"])
@pytest.mark.parametrize("n", [1, 30, 3000])
def test_max_tokens_is_the_number_of_tokens(tmp_path, n, tokenizer):
    source = write_documents(tmp_path / "a.jsonl", [STORY * (9000 // n)] * n)
    config = DataConfig(tokenizer=tokenizer, max_tokens=20_000, val_fraction=0.2)
    report = prepare([source], tmp_path / "out", config)
    data = load_data(tmp_path / "out")
    assert (len(data.train), len(data.val)) == (16_000, 4_000)
    assert (report.train_tokens, report.val_tokens) == (16_000, 4_000)
    assert data.tokenizer.decode(data.train.read(0, len(data.train))).startswith(STORY)
    assert "small machine" in data.tokenizer.decode(data.val.read(0, len(data.val)))


def test_max_tokens_beyond_the_text_changes_nothing(tmp_path):
    source = write_documents(tmp_path / "a.jsonl", [f"{i}: {STORY}" for i in range(30)])
    for name, limit in (("all", None), ("limited", 1_000_000)):
        prepare([source], tmp_path / name, DataConfig(tokenizer="byte", max_tokens=limit))
    whole, limited = everything(tmp_path / "all"), everything(tmp_path / "limited")
    for files in (whole, limited):
        del files["meta.json"]
    assert whole == limited


def test_max_tokens_limits_training_alone_when_there_is_a_validation_file(tmp_path):
    (tmp_path / "a.txt").write_text(STORY * 1000)
    (tmp_path / "b.txt").write_text(STORY * 50)
    config = DataConfig(tokenizer="byte", max_tokens=1000, val=str(tmp_path / "b.txt"))
    report = prepare([str(tmp_path / "a.txt")], tmp_path / "out", config)
    assert (report.train_tokens, report.val_tokens) == (1000, len(STORY) * 50)
    assert report.documents == 2


@pytest.mark.parametrize("tokenizer", ["char", "bpe:300"])
@pytest.mark.parametrize("name", ["a.txt", "a.jsonl"])
def test_max_tokens_stops_reading(tmp_path, name, tokenizer):
    text = STORY * 125_000  # 10 MB
    if name == "a.txt":
        (tmp_path / name).write_text(text)
    else:
        write_documents(tmp_path / name, [STORY * 1000] * 125)
    told = Listener()
    config = DataConfig(tokenizer=tokenizer, max_tokens=2000)
    report = prepare([str(tmp_path / name)], tmp_path / "out", config, reporter=told)
    assert report.train_tokens + report.val_tokens == 2000
    assert 0 < max(done for _, done, _ in told.advanced) < 3_000_000  # a block or two


def test_the_report_of_limited_tokens_tells_of_what_was_kept(tmp_path, monkeypatch):
    texts = [f"{i % 40:04}: {STORY}" for i in range(2000)]
    for i in range(5, 2000, 10):
        texts[i] = " \n"
    source = write_documents(tmp_path / "a.jsonl", texts)
    config = DataConfig(max_tokens=100 * len(texts[0]))
    report = prepare([source], tmp_path / "one", config, workers=1)
    assert report.characters == 100 * len(texts[0])
    assert report.documents == pytest.approx(100, abs=2)
    assert report.documents - report.duplicates == pytest.approx(36, abs=2)
    assert report.too_short == pytest.approx(10, abs=3)
    monkeypatch.setattr(module, "_JOB_CHARS", 300)
    again = prepare([source], tmp_path / "many", config, workers=4)
    assert replace(again, overlap=0) == replace(report, overlap=0)


def test_some_text_is_validated_however_small_the_share(tmp_path):
    source = write_documents(tmp_path / "a.jsonl", [STORY] * 1500)
    report = prepare([source], tmp_path / "out", DataConfig(tokenizer="byte", val_fraction=1e-9))
    assert (report.documents, report.val_documents) == (1500, 1)


def test_nothing_to_validate_is_an_error(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    (tmp_path / "blank.txt").write_text(" \n ")
    config = DataConfig(val=str(tmp_path / "blank.txt"))
    with pytest.raises(UserError, match="no text is left for validation"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", config)
    with pytest.raises(UserError, match="no text is left for training"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", DataConfig(max_tokens=1))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tokenizer", ["char", "bpe:300"])
def test_long_blanks_do_not_shift_the_split(tmp_path, monkeypatch, tokenizer):
    monkeypatch.setattr(module, "_PIECE_CHARS", 1500)
    text = "x" + " " * 4000 + STORY * 60
    source = write_documents(tmp_path / "a.jsonl", [" " * 2000, text, "\n" * 5000])
    report = prepare([source], tmp_path / "out", DataConfig(tokenizer=tokenizer))
    data = load_data(tmp_path / "out")
    assert data.tokenizer.decode(data.val.read(0, len(data.val))) == text[int(len(text) * 0.9) :]
    assert (report.documents, report.too_short) == (1, 2)
    assert report.characters == len(text)


def test_a_text_that_begins_with_many_blanks_is_kept(tmp_path, monkeypatch):
    monkeypatch.setattr(module, "_PIECE_CHARS", 1500)
    text = " " * 4000 + STORY
    (tmp_path / "a.txt").write_text(text)
    report = prepare([str(tmp_path / "a.txt")], tmp_path / "out", DataConfig())
    assert (report.characters, report.too_short) == (len(text), 0)


@pytest.mark.parametrize(
    ("n", "fraction", "expected"), [(100, 0.29, 29), (37, 0.1, 4), (100, 0.07, 7), (3, 0.9, 2)]
)
def test_the_share_of_documents_is_rounded(tmp_path, n, fraction, expected):
    source = write_documents(tmp_path / "a.jsonl", [f"{i}: {STORY}" for i in range(n)])
    config = DataConfig(tokenizer="byte", val_fraction=fraction)
    assert prepare([source], tmp_path / "out", config).val_documents == expected


def test_less_than_a_document_to_validate_is_split_by_characters(tmp_path):
    source = write_documents(tmp_path / "a.jsonl", [STORY] * 9)
    config = DataConfig(tokenizer="byte", val_fraction=0.1)
    report = prepare([source], tmp_path / "out", config)
    assert report.val_tokens == pytest.approx(0.9 * len(STORY), abs=1)


def test_empty_names_are_refused(tmp_path):
    (tmp_path / "a.txt").write_text(STORY)
    for config, line in (
        (DataConfig(val=""), "'' does not exist"),
        (DataConfig(tokenizer=""), "no tokenizer ''. Choose char, byte,"),
    ):
        with pytest.raises(UserError, match=line):
            prepare([str(tmp_path / "a.txt")], tmp_path / "out", config)


@pytest.mark.parametrize("digits", ["9" * 20, "9" * 5000, "1000001"])
def test_absurd_vocabularies_are_refused(tmp_path, digits):
    (tmp_path / "a.txt").write_text(STORY)
    with pytest.raises(UserError, match="at most 1000000 tokens|write the number of tokens"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", DataConfig(tokenizer=f"bpe:{digits}"))


def test_the_data_key_knows_what_packed_files_hold():
    def key(name: str) -> str:
        return module.data_key([{"name": name, "sha256": "0"}], DataConfig())

    assert key("c.jsonl.gz") != key("c.txt.gz")
    assert key("c.jsonl.gz") == key("d.ndjson") != key("c.csv.zst")


@pytest.mark.parametrize("workers", [-1, 0, 1025])
def test_workers_out_of_range_are_refused(tmp_path, workers):
    (tmp_path / "a.txt").write_text(STORY)
    with pytest.raises(UserError, match=f"workers={workers} must lie between 1 and 1024"):
        prepare([str(tmp_path / "a.txt")], tmp_path / "out", DataConfig(), workers=workers)


def test_the_data_key_takes_the_built_in_tokenizer_before_a_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("a.txt").write_text(STORY * 9)
    names = ("char", "byte", "gpt2", "bpe:300")
    before = [module.data_key([], DataConfig(tokenizer=name)) for name in names]
    for name in names[:2]:
        Path(name).mkdir()
    for name in names[2:]:
        Path(name).write_text("{}")
    assert [module.data_key([], DataConfig(tokenizer=name)) for name in names] == before
    prepare(["a.txt"], "out", DataConfig(tokenizer="byte"))
    Path("mine").mkdir()
    with pytest.raises(UserError, match=r"mine.tokenizer\.json"):
        prepare(["a.txt"], "other", DataConfig(tokenizer="mine"))


# -- the folder ----------------------------------------------------------------------------------


def test_overwrite_replaces_prepared_data_only(tmp_path):
    (tmp_path / "a.txt").write_text(STORY * 9)
    keep = tmp_path / "notes"
    keep.mkdir()
    (keep / "precious.txt").write_text("mine")
    for out in (keep, keep / "precious.txt"):
        with pytest.raises(UserError, match="leaves it alone"):
            prepare([str(tmp_path / "a.txt")], out, DataConfig(), overwrite=True)
    assert (keep / "precious.txt").read_text() == "mine"


@pytest.mark.parametrize(
    "names",
    [["train.bin", "val.bin", "meta.pkl"], ["tokenizer.json", "tokenizer_config.json"],
     ["meta.json", "train-00000.bin", "train-notes.bin"]],
)  # fmt: skip
def test_overwrite_leaves_folders_of_others_alone(tmp_path, names):
    (tmp_path / "a.txt").write_text(STORY * 9)
    out = tmp_path / "out"
    out.mkdir()
    for name in names:
        (out / name).write_text("theirs")
    with pytest.raises(UserError, match="leaves it alone"):
        prepare([str(tmp_path / "a.txt")], out, DataConfig(), overwrite=True)
    assert everything(out) == dict.fromkeys(sorted(names), b"theirs")


@pytest.mark.parametrize("name", ["book.txt", "meta.json"])
def test_a_source_inside_the_output_is_refused(tmp_path, name):
    out = tmp_path / "out"
    (tmp_path / "a.txt").write_text(STORY * 9)
    prepare([str(tmp_path / "a.txt")], out, DataConfig())
    if name == "book.txt":
        (out / name).write_text(STORY)
    before = everything(out)
    (tmp_path / "link").symlink_to(out)
    for place in (out, tmp_path / "link"):
        config = DataConfig(val=str(place / name))
        for sources, how in (
            ([str(out / name)], DataConfig()),
            ([str(tmp_path / "a.txt")], config),
        ):
            with pytest.raises(UserError, match=f"{name} lies in .*; choose another --out"):
                prepare(sources, place, how, overwrite=True)
    assert everything(out) == before


@pytest.mark.parametrize("there", ["out", "nothing"])
def test_what_a_kill_left_behind_is_cleared(tmp_path, there):
    (tmp_path / "a.txt").write_text(STORY * 9)
    out = tmp_path / "out"
    if there == "out":
        prepare([str(tmp_path / "a.txt")], out, DataConfig(val_fraction=0.2))
    (out / ".preparing").mkdir(parents=True)
    (out / ".preparing" / "train-00000.bin").write_text("left")
    (out / ".preparing.lock").touch()
    assert is_prepared(out) == (there == "out")
    prepare([str(tmp_path / "a.txt")], out, DataConfig(), overwrite=there == "out")
    assert not [path for path in out.iterdir() if path.name.startswith(".")]
    assert load_data(out).source.endswith("a.txt")


class Killed(BaseException):
    pass


def test_a_kill_while_files_move_leaves_old_data_or_none(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(STORY * 9)
    out, new = tmp_path / "out", DataConfig(val_fraction=0.2)
    prepare([str(tmp_path / "a.txt")], tmp_path / "new", new)
    wanted = everything(tmp_path / "new")
    moves = 2 * len(wanted)  # each old file goes, each new one comes

    def mortal(real, left):
        def move(path, *more):
            if path.name in wanted and out in path.parents and next(left, None) is None:
                raise Killed
            return real(path, *more)

        return move

    for life in range(moves + 1):
        shutil.rmtree(out, ignore_errors=True)
        prepare([str(tmp_path / "a.txt")], out, DataConfig())
        before, left = everything(out), iter(range(life))
        with monkeypatch.context() as patch, contextlib.suppress(Killed):
            patch.setattr(Path, "unlink", mortal(Path.unlink, left))
            patch.setattr(os, "replace", mortal(os.replace, left))
            prepare([str(tmp_path / "a.txt")], out, new, overwrite=True)
        assert is_prepared(out) == (life in (0, moves))
        if is_prepared(out):
            kept = {name: (out / name).read_bytes() for name in wanted}
            assert kept == (wanted if life else before)
        else:
            with pytest.raises(UserError, match="prepare the data again"):
                resolve([str(out)])
        prepare([str(tmp_path / "a.txt")], out, new, overwrite=True)
        assert everything(out) == wanted


def test_an_empty_folder_is_filled_not_replaced(tmp_path, monkeypatch):
    (tmp_path / "a.txt").write_text(STORY * 9)
    out = tmp_path / "out"
    out.mkdir(mode=0o710)
    monkeypatch.chdir(out)
    before = out.stat()
    for config in (DataConfig(), DataConfig(val_fraction=0.2)):
        prepare([str(tmp_path / "a.txt")], ".", config, overwrite=True)
        assert (Path.cwd().stat().st_ino, out.stat().st_mode) == (before.st_ino, before.st_mode)
        assert load_data(out).source.endswith("a.txt")
    with pytest.raises(UserError, match=r"a\.txt lies in /"):
        prepare([str(tmp_path / "a.txt")], "/", DataConfig())


def test_a_mounted_folder_is_filled(small_disk, tmp_path):
    (tmp_path / "a.txt").write_text(STORY * 9)
    (small_disk / "lost+found").mkdir()  # as on a new volume
    for config in (DataConfig(), DataConfig(val_fraction=0.2)):
        prepare([str(tmp_path / "a.txt")], small_disk, config, overwrite=True)
        assert load_data(small_disk).source.endswith("a.txt")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "disk"]
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    assert is_prepared(small_disk)
    assert len(load_data(small_disk).train.batch(0, seed=1, n=2, T=3)[0]) == 2
    assert prepare([str(tmp_path / "a.txt")], small_disk, config).unchanged


@pytest.mark.parametrize("meta", ["[]", "null", "3", '{"options": null}', "[" * 100_000])
def test_a_meta_that_is_not_ours(tmp_path, meta):
    (tmp_path / "a.txt").write_text(STORY * 9)
    out = tmp_path / "out"
    prepare([str(tmp_path / "a.txt")], out, DataConfig())
    (out / "meta.json").write_text(meta)
    with pytest.raises(UserError, match="exists already with other content"):
        prepare([str(tmp_path / "a.txt")], out, DataConfig())
    with pytest.raises(UserError, match="prepare the data again"):
        train(str(out), out=str(tmp_path / "run"))
    prepare([str(tmp_path / "a.txt")], out, DataConfig(), overwrite=True)
    assert load_data(out).source.endswith("a.txt")
    alone = tmp_path / "alone"
    alone.mkdir()
    (alone / "meta.json").write_text(meta)
    with pytest.raises(UserError, match="leaves it alone"):
        prepare([str(tmp_path / "a.txt")], alone, DataConfig(), overwrite=True)


@pytest.mark.parametrize("damage", [("report", None), ("report", {"a": 1}), ("train", None)])
def test_damaged_data_are_not_taken_for_finished(tmp_path, damage):
    (tmp_path / "a.txt").write_text(STORY * 9)
    out = tmp_path / "out"
    prepare([str(tmp_path / "a.txt")], out, DataConfig())
    meta = json.loads((out / "meta.json").read_bytes())
    (out / "meta.json").write_text(json.dumps(meta | dict([damage])))
    with pytest.raises(UserError, match="exists already with other content"):
        prepare([str(tmp_path / "a.txt")], out, DataConfig())
    assert not prepare([str(tmp_path / "a.txt")], out, DataConfig(), overwrite=True).unchanged


def test_a_busy_place_is_explained():
    with (
        pytest.raises(UserError, match="cannot write out: it is in use"),
        explain_os_errors("write out"),
    ):
        raise OSError(errno.EBUSY, "busy")


def test_one_writer_at_a_time(tmp_path):
    (tmp_path / "a.txt").write_text(STORY * 9)
    out, refused = tmp_path / "out", []

    class Intruding(Reporter):
        """Comes while the first preparation is under way."""

        def advance(self, name: str, done: int, total: int | None) -> None:
            with pytest.raises(UserError, match="is in use by another process"):
                prepare([str(tmp_path / "a.txt")], out, DataConfig(), overwrite=True)
            refused.append(name)

    report = prepare([str(tmp_path / "a.txt")], out, DataConfig(), reporter=Intruding())
    assert "tokenizing" in refused
    assert len(load_data(out).train) == report.train_tokens
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.txt", "out"]


def test_what_is_no_text_is_refused_and_leaves_nothing(tmp_path):
    blank = tmp_path / "blank.txt"
    blank.write_text("  \n ")
    damaged = tmp_path / "cut.txt.gz"
    damaged.write_bytes(gzip.compress(os.urandom(5000).hex().encode())[:-2000])
    for source in (blank, damaged):
        with pytest.raises(UserError, match=source.name):
            prepare([str(source)], tmp_path / "out", DataConfig())
        assert sorted(path.name for path in tmp_path.iterdir()) == ["blank.txt", "cut.txt.gz"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("signum", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, -signal.SIGTERM)]
)
def test_a_signal_leaves_nothing(tmp_path, signum, status):
    source = tmp_path / "big.txt"
    source.write_text(STORY * 400_000)  # 32 MB: seconds of work
    code = (f"from glassgpt.cli.app import main; main(['prepare', {str(source)!r}, '--out', "
            f"{str(tmp_path / 'out')!r}, '--tokenizer', 'bpe:400'])")  # fmt: skip
    process = subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE)
    deadline = time.monotonic() + 60
    while not list(tmp_path.glob("out/.preparing/train-*")) and time.monotonic() < deadline:
        assert process.poll() is None, process.stderr.read()
        time.sleep(0.01)
    process.send_signal(signum)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == status, stderr
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
