"""Batches as a pure function of (seed, step); windows; files that are damaged or hostile."""

from __future__ import annotations

import json
import pickle
from collections import Counter, OrderedDict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassgpt.config import DataConfig
from glassgpt.data.batches import IGNORE, Replay, TokenFiles
from glassgpt.data.dataset import is_prepared, load_data
from glassgpt.data.prepare import prepare
from glassgpt.errors import UserError
from glassgpt.tokenizers.tokenizer import byte_tokenizer, to_files
from payloads import Evaluates, RunsCommand, SetsState


def token_files(folder: Path, *sizes: int, dtype: str = "<u2") -> TokenFiles:
    """Shards of the given sizes that hold 0, 1, 2, ...: a token says where it stands."""
    folder.mkdir(exist_ok=True)
    paths, start = [], 0
    for number, size in enumerate(sizes):
        paths.append(folder / f"{number}.bin")
        np.arange(start, start + size).astype(dtype).tofile(paths[-1])
        start += size
    return TokenFiles(paths, dtype, vocab_size=max(start, 1))


# -- random batches ------------------------------------------------------------------------------


def test_a_batch_is_windows_and_their_successors(tmp_path: Path) -> None:
    data = token_files(tmp_path, 5000)
    tokens, targets = data.batch(3, seed=1, n=8, T=5)
    assert tokens.shape == targets.shape == (8, 5)
    assert tokens.dtype == targets.dtype == np.int64
    assert (tokens == tokens[:, :1] + np.arange(5)).all()
    assert (targets == tokens + 1).all()


def test_batches_of_different_steps_are_independent(tmp_path: Path) -> None:
    """A step must not see the windows of the step before again: each batch is a fresh draw."""
    data = token_files(tmp_path, 60000)
    n, steps = 48, 40
    starts = [data.batch(step, seed=9, n=n, T=4)[0][:, 0] for step in range(steps)]
    # Among 1920 draws from 60,000 places, some 30 repeat by chance.
    repeats = n * steps - len(np.unique(starts))
    assert repeats < 80


def test_every_window_can_be_drawn(tmp_path: Path) -> None:
    data = token_files(tmp_path, 9)
    batches = [data.batch(step, seed=0, n=7, T=4)[0] for step in range(100)]
    starts = Counter(int(row[0]) for tokens in batches for row in tokens)
    assert set(starts) == {0, 1, 2, 3, 4}  # 4 + 5 is the last token
    assert min(starts.values()) > 700 / 5 * 0.7


@pytest.mark.slow
@given(sizes=st.lists(st.integers(0, 12), min_size=1, max_size=6), data=st.data())
def test_reading_across_file_borders(tmp_path_factory, sizes, data) -> None:
    folder = tmp_path_factory.mktemp("shards")
    files, total = token_files(folder, *sizes), sum(sizes)
    assert len(files) == total
    start = data.draw(st.integers(0, total))
    end = data.draw(st.integers(start, total))
    assert files.read(start, end).tolist() == list(range(start, end))
    if total > 3:
        tokens, targets = files.batch(1, seed=2, n=9, T=3)
        whole = token_files(folder / "whole", total).batch(1, seed=2, n=9, T=3)
        assert np.array_equal(tokens, whole[0])
        assert np.array_equal(targets, whole[1])


@pytest.mark.parametrize("packed", [False, True])
def test_replay_takes_its_share_of_the_rows(tmp_path: Path, packed: bool) -> None:
    new, old = token_files(tmp_path / "new", 900), token_files(tmp_path / "old", 900)
    old.shards = [shard + 1000 for shard in old.shards]
    old.vocab_size = 2000
    if packed:
        plain = new.batch

        def batch(step: int, *, n: int, T: int, **how: Any) -> tuple[np.ndarray, ...]:
            return *plain(step, n=n, T=T, **how), np.full((n, T), 7)

        new.batch = batch  # type: ignore[method-assign, assignment]
    for n, share in ((4, 0.25), (1, 0.3), (5, 0.5)):
        mixed, replayed = Replay(new, old, share, packed=packed), 0
        for step in range(40):
            tokens, targets, *positions = mixed.batch(step, seed=3, n=n, T=6)
            is_old = tokens[:, 0] >= 1000
            assert (targets == tokens + 1).all()
            assert (tokens[~is_old] == new.batch(step, seed=3, n=n, T=6)[0][~is_old]).all()
            for array in positions:
                assert (array[is_old] == np.arange(6)).all()
                assert (array[~is_old] == 7).all()
            replayed += is_old.sum()
            parts = [mixed.batch(step, seed=3, n=n, T=6, rows=slice(i, i + 1)) for i in range(n)]
            np.testing.assert_array_equal(np.concatenate([part[0] for part in parts]), tokens)
        assert replayed == pytest.approx(40 * n * share, abs=1)
        assert (mixed.count(6), len(mixed)) == (new.count(6), len(new))


# -- the whole split, once -----------------------------------------------------------------------


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    n=st.integers(1, 5),
    T=st.integers(1, 17),
    world=st.integers(1, 4),
)
def test_windows_cover_every_target_once(tmp_path_factory, sizes, n, T, world) -> None:
    files = token_files(tmp_path_factory.mktemp("windows"), *sizes)
    seen: list[int] = []
    for rank in range(world):
        for tokens, targets in files.windows(n=n, T=T, rank=rank, world=world):
            assert tokens.shape == targets.shape
            assert tokens.shape[1] == T
            assert 1 <= len(tokens) <= n
            counted = targets != IGNORE
            assert (targets[counted] == tokens[counted] + 1).all()  # the successor of its token
            assert counted.any(axis=1).all()  # no row is padding alone
            seen += targets[counted].tolist()
    assert sorted(seen) == list(range(1, sum(sizes)))


@given(
    sizes=st.lists(st.integers(1, 40), min_size=1, max_size=3),
    T=st.integers(1, 17),
    limit=st.integers(1, 60),
)
def test_limited_windows_are_the_same_however_divided(tmp_path_factory, sizes, T, limit) -> None:
    files = token_files(tmp_path_factory.mktemp("windows"), *sizes)
    whole = [row for _, targets in files.windows(n=3, T=T) for row in targets.tolist()]
    divisions = []
    for n, world in ((1, 1), (4, 1), (2, 3), (5, 2)):
        rows: list[list[int]] = []
        for rank in range(world):
            for tokens, targets in files.windows(n=n, T=T, limit=limit, rank=rank, world=world):
                assert 1 <= len(tokens) <= n
                assert (targets == tokens + 1)[targets != IGNORE].all()
                rows += targets.tolist()
        divisions.append(sorted(rows))
    assert all(rows == divisions[0] for rows in divisions)
    assert len(divisions[0]) == min(limit, len(whole))
    assert all(row in whole for row in divisions[0])
    assert len({row[0] for row in divisions[0]}) == len(divisions[0])  # no window twice


def test_limited_windows_are_spread_evenly(tmp_path: Path) -> None:
    files = token_files(tmp_path, 1001)
    (batch,) = files.windows(n=100, T=10, limit=5)
    assert batch[0][:, 0].tolist() == [0, 200, 400, 600, 800]


# -- our own folders -----------------------------------------------------------------------------

TEXT = "The quick brown fox jumps over the lazy dog. " * 20


@pytest.fixture
def prepared(tmp_path: Path) -> Path:
    (tmp_path / "fox.txt").write_text(TEXT)
    prepare([str(tmp_path / "fox.txt")], tmp_path / "fox", DataConfig(tokenizer="char"))
    return tmp_path / "fox"


def test_a_prepared_folder_holds_the_text(prepared: Path) -> None:
    data = load_data(prepared)
    splits = [split.read(0, len(split)) for split in (data.train, data.val)]
    assert "".join(data.tokenizer.decode(ids) for ids in splits) == TEXT
    data.check_fits(len(data.train) - 1)
    with pytest.raises(UserError, match=r"fox\.txt: 810 training tokens are too few"):
        data.check_fits(len(data.train))


def test_too_few_tokens_are_blamed_on_what_the_user_named(tmp_path: Path) -> None:
    for number in range(4):
        (tmp_path / f"{number}.txt").write_text(TEXT)
    prepare([str(tmp_path / "*.txt")], tmp_path / "cache" / "0123", DataConfig())
    with pytest.raises(UserError, match=r"0\.txt and 3 more: \d+ training tokens") as caught:
        load_data(tmp_path / "cache" / "0123").check_fits(5000)
    assert "0123" not in str(caught.value)


def test_another_tokenizer_than_meta_says_is_refused(prepared: Path) -> None:
    for name, content in to_files(byte_tokenizer()).items():
        (prepared / name).write_bytes(content)
    with pytest.raises(UserError, match=r"another tokenizer\.json"):
        load_data(prepared)


@pytest.mark.parametrize("cut", [1, 2, 100])
def test_cut_token_files_are_refused(prepared: Path, cut: int) -> None:
    path = prepared / "train-00000.bin"
    path.write_bytes(path.read_bytes()[:-cut])
    with pytest.raises(UserError, match="prepare the data again"):
        load_data(prepared)


@pytest.mark.parametrize("limit", [None, 3])
def test_tokens_outside_the_vocabulary_are_refused_when_read(prepared: Path, limit) -> None:
    for name in ("train", "val"):
        path = prepared / f"{name}-00000.bin"
        path.write_bytes(b"\xff" * path.stat().st_size)
    data, size = load_data(prepared), len(set(TEXT)) + 1
    message = rf"fox is damaged: token 65535 outside the vocabulary of {size}; delete it and"
    with pytest.raises(UserError, match=message):
        data.train.batch(0, seed=1, n=3, T=5)
    with pytest.raises(UserError, match=message):
        next(data.val.windows(n=2, T=5, limit=limit))


@pytest.mark.parametrize("name", ["train-00000.bin", "val-00000.bin", "tokenizer.json"])
def test_missing_files_are_refused(prepared: Path, name: str) -> None:
    (prepared / name).unlink()
    with pytest.raises(UserError, match=name):
        load_data(prepared)


@pytest.mark.parametrize("damage", ["", "{", "[]", "null", "{}", '{"train": 3}', "\x00"])
def test_damaged_meta_is_refused(prepared: Path, damage: str) -> None:
    (prepared / "meta.json").write_text(damage)
    with pytest.raises(UserError, match=r"meta\.json"):
        load_data(prepared)


@pytest.mark.parametrize("field", ["dtype", "train", "val", "tokenizer", "fingerprint"])
def test_meta_without_a_field_is_refused(prepared: Path, field: str) -> None:
    meta = json.loads((prepared / "meta.json").read_text())
    del meta[field]
    (prepared / "meta.json").write_text(json.dumps(meta))
    with pytest.raises(UserError):
        load_data(prepared)


@pytest.mark.parametrize(
    "wrong",
    [{"sources": []}, {"sources": None}, {"dtype": None}, {"dtype": "V0"}, {"dtype": []},
     {"train": None}, {"val": {"files": [3], "tokens": 1}}, {"tokenizer": 3}],
)  # fmt: skip
def test_meta_with_wrong_types_is_refused(prepared: Path, wrong: dict[str, Any]) -> None:
    meta = json.loads((prepared / "meta.json").read_text())
    (prepared / "meta.json").write_text(json.dumps(meta | wrong))
    with pytest.raises(UserError, match="fox"):
        load_data(prepared)


def test_a_folder_without_data_is_refused(tmp_path: Path) -> None:
    assert not is_prepared(tmp_path)
    with pytest.raises(UserError, match="no prepared data"):
        load_data(tmp_path)


# -- nanoGPT's folders ---------------------------------------------------------------------------


def nanogpt_folder(folder: Path, meta: Any = None, train: Any = None, val: Any = None) -> Path:
    """As nanoGPT's data/shakespeare_char/prepare.py leaves it; `meta` may be raw pickle."""
    characters = sorted(set(TEXT))
    stoi = {char: i for i, char in enumerate(characters)}
    ids = np.array([stoi[char] for char in TEXT], dtype=np.uint16)
    (ids[:800] if train is None else train).tofile(folder / "train.bin")
    (ids[800:] if val is None else val).tofile(folder / "val.bin")
    if meta is None:
        meta = {"vocab_size": len(stoi), "itos": dict(enumerate(characters)), "stoi": stoi}
    content = meta if isinstance(meta, bytes) else pickle.dumps(meta)
    (folder / "meta.pkl").write_bytes(content)
    return folder


def test_nanogpt_characters(tmp_path: Path) -> None:
    data = load_data(nanogpt_folder(tmp_path))
    assert is_prepared(tmp_path)
    assert data.tokenizer.decode(data.train.read(0, len(data.train))) == TEXT[:800]
    assert data.tokenizer.decode(data.val.read(0, len(data.val))) == TEXT[800:]
    assert data.tokenizer.encode("The dog") == [sorted(set(TEXT)).index(c) for c in "The dog"]
    # No token but theirs, so that a model has nanoGPT's size; what it has never seen is a space.
    assert data.tokenizer.vocab_size == len(set(TEXT))
    assert data.tokenizer.encode("é") == data.tokenizer.encode(" ")


def test_nanogpt_characters_keep_their_order(tmp_path: Path) -> None:
    meta = {"vocab_size": 3, "itos": {0: "b", 1: "c", 2: "a"}}
    ids = np.array([2, 0, 1] * 5, dtype=np.uint16)
    tokenizer = load_data(nanogpt_folder(tmp_path, meta, ids, ids)).tokenizer
    assert tokenizer.decode([2, 0, 1]) == "abc"
    assert tokenizer.encode("cab?") == [1, 2, 0, 0]


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_meta_of_any_pickle_protocol(tmp_path: Path, protocol: int) -> None:
    meta = {"vocab_size": 3, "itos": {0: "a", 1: "b", 2: "é"}, "stoi": {}}
    ids = np.array([2, 0, 1] * 5, dtype=np.uint16)
    folder = nanogpt_folder(tmp_path, pickle.dumps(meta, protocol), ids, ids)
    assert load_data(folder).tokenizer.decode([2, 0, 1]) == "éab"


def test_nanogpt_without_meta_is_gpt2(tmp_path: Path) -> None:
    ids = np.array([36235, 39141, 18765, 1143, 326, 9061, 561, 530, 1110, 1716], dtype=np.uint16)
    (nanogpt_folder(tmp_path, train=ids, val=ids) / "meta.pkl").unlink()
    data = load_data(tmp_path)
    text = "Alan Turing theorized that computers would one day become"
    assert data.tokenizer.decode(data.train.read(0, 10)) == text
    assert data.tokenizer.vocab_size == 50257


def test_nanogpt_fingerprint_follows_the_content(tmp_path: Path) -> None:
    first = load_data(nanogpt_folder(tmp_path)).fingerprint
    assert load_data(tmp_path).fingerprint == first
    changed = np.fromfile(tmp_path / "val.bin", dtype=np.uint16)
    changed[17] = (changed[17] + 1) % 20
    assert load_data(nanogpt_folder(tmp_path, val=changed)).fingerprint != first


def test_nanogpt_tokens_outside_the_vocabulary_are_refused(tmp_path: Path) -> None:
    folder = nanogpt_folder(tmp_path, val=np.array([1, 2, 5000], dtype=np.uint16))
    with pytest.raises(UserError, match="outside the vocabulary"):
        load_data(folder)


def test_nanogpt_file_cut_in_a_token_is_refused(tmp_path: Path) -> None:
    folder = nanogpt_folder(tmp_path)
    (folder / "val.bin").write_bytes((folder / "val.bin").read_bytes()[:-1])
    with pytest.raises(UserError, match=r"val\.bin is cut short \(199 bytes\)"):
        load_data(folder)


@pytest.mark.parametrize("payload", [RunsCommand, Evaluates, SetsState])
@pytest.mark.parametrize("protocol", [0, 2, 5])
def test_a_pickle_that_names_code_is_refused(tmp_path: Path, payload: type, protocol: int) -> None:
    flag = tmp_path / "executed"
    meta = {"vocab_size": 1, "itos": {0: "a"}, "extra": payload(f"touch {flag}")}
    content = pickle.dumps(meta, protocol)
    folder = tmp_path / "data"
    folder.mkdir()
    nanogpt_folder(folder, content)
    with pytest.raises(UserError, match="refused"):
        load_data(folder)
    assert not flag.exists()
    pickle.loads(content)  # the payload does work where nothing stops it
    assert flag.exists()


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        b"Iabc\n.",  # a number that is none
        b"}.",  # an empty dictionary
        b"(lp0\n.",  # a list
        b"Vabc\n.",  # a string
        b"0.",  # pops from an empty stack
        b"(dp0\nVitos\np1\n",  # cut short
        b"\x80\x05\x95\xff\xff\xff\xff\xff\xff\xff\xff.",  # a frame beyond the end
        b"\x8c\x02\xff\xfe.",  # text that is not UTF-8
        b"\x80\x63.",  # a protocol of the future
        pickle.dumps({"vocab_size": 2, "itos": {0: "a"}}),  # an id is missing
        pickle.dumps({"vocab_size": "2", "itos": {0: "a"}}),
        pickle.dumps({"vocab_size": 2, "itos": {0: "\ud800", 1: "a"}}),  # half a character
        pickle.dumps({"vocab_size": 2**70, "itos": {0: "a"}}),
        b"\x80\x02})\x85K\x01s.",  # a tuple as key: nested, its hash would never end
        b"\x80\x02}(]K\x01u.",  # a list as key
        b"\x80\x02})" + b"\x85" * 1_000_000 + b"Ns.",  # its hash would overflow the stack
        pickle.dumps({"vocab_size": 2, "itos": {0: 7, 1: 8}}),  # no characters
        pickle.dumps({"vocab_size": 2, "itos": {0: "ab", 1: "c"}}),
        pickle.dumps({"vocab_size": 2, "itos": {0: "a", 1: "a"}}),
        pickle.dumps(OrderedDict()),
    ],
    ids=range(22),
)
def test_damaged_meta_pkl_is_refused(tmp_path: Path, content: bytes) -> None:
    with pytest.raises(UserError, match=r"meta\.pkl"):
        load_data(nanogpt_folder(tmp_path, content, *[np.zeros(9, np.uint16)] * 2))
