"""TensorFlow's checkpoints, read without it: a real one, and every way in which one can be bad."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import GPT2Config, GPT2LMHeadModel

from bundle_writer import block, entry, field, index, table, varint, write_bundle
from glassgpt import numpy_gpt
from glassgpt.checkpoints.load import is_openai
from glassgpt.checkpoints.openai import (
    MODELS,
    TensorBundle,
    files_of,
    from_openai,
    load_openai,
    masked_crc32c,
)
from glassgpt.errors import UserError

FIXTURE = Path(__file__).parent / "openai_fixture"


def _make_script() -> Any:
    spec = importlib.util.spec_from_file_location("openai_fixture_make", FIXTURE / "make.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


make = _make_script()
TENSORS: dict[str, np.ndarray] = make.tensors()


@pytest.fixture
def release(tmp_path: Path) -> Path:
    """A copy of the fixture that a test may spoil."""
    return shutil.copytree(FIXTURE, tmp_path / "release")


def random(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


def one_line(excinfo: pytest.ExceptionInfo[UserError]) -> str:
    assert "\n" not in str(excinfo.value)
    return str(excinfo.value)


# -- the checksum --------------------------------------------------------------------------------


def test_the_checksum_of_a_known_text() -> None:
    """The check value of the CRC catalogue (0xE3069283), masked as TensorFlow stores it."""
    rotated = (0xE3069283 >> 15 | 0xE3069283 << 17) & 0xFFFFFFFF
    assert masked_crc32c(b"123456789") == (rotated + 0xA282EAD8) & 0xFFFFFFFF
    assert masked_crc32c(np.frombuffer(b"123456789", np.uint8)) == masked_crc32c(b"123456789")


# -- a checkpoint that TensorFlow wrote ----------------------------------------------------------


@pytest.mark.parametrize("folder", ["", "sharded"])
def test_every_tensor_is_read_exactly(folder: str) -> None:
    bundle = TensorBundle(FIXTURE / folder / "model.ckpt")
    assert bundle.keys() == TENSORS.keys()
    for name, tensor in bundle.items():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, TENSORS[name])
        assert bundle.shape_of(name) == tensor.shape


def test_the_release_folder_becomes_config_weights_and_tokenizer() -> None:
    assert is_openai(FIXTURE)
    config, weights, tokenizer = load_openai(FIXTURE)
    assert config.family == "gpt2"
    assert (config.vocab_size, config.context_length, config.n_embd) == (261, 16, 12)
    assert (config.n_layer, config.n_head, config.n_hidden) == (2, 3, 48)
    assert {name: tensor.shape for name, tensor in weights.items()} == config.weight_shapes
    assert all(tensor.dtype == np.float32 for tensor in weights.values())
    first = weights["blocks.1.mlp.up.weight"]
    np.testing.assert_array_equal(first, TENSORS["model/h1/mlp/c_fc/w"][0].T)
    assert tokenizer.vocab_size == 261
    assert tokenizer.encode("the a<|endoftext|>", special=True) == [257, 259, 260]


def test_weights_are_read_at_each_access_and_not_before(release: Path) -> None:
    data = release / "model.ckpt.data-00000-of-00001"
    data.write_bytes(bytes(data.stat().st_size))
    _, weights, _ = load_openai(release)  # doesn't notice
    assert "blocks.0.attn.qkv.bias" in weights  # no reading for that
    assert len(list(weights)) == len(weights) == len(TENSORS)
    with pytest.raises(UserError, match="checksum"):
        weights["blocks.0.attn.qkv.bias"]
    with pytest.raises(KeyError):
        weights["blocks.9.attn.qkv.bias"]
    shutil.copy(FIXTURE / data.name, data)
    assert weights["final_norm.bias"] is not weights["final_norm.bias"]


def test_the_logits_are_those_of_transformers() -> None:
    """In float64 on both sides, so that a difference is no rounding."""
    config, weights, _ = load_openai(FIXTURE)
    theirs = GPT2LMHeadModel(
        GPT2Config(vocab_size=261, n_positions=16, n_embd=12, n_layer=2, n_head=3)
    )
    renamed = {"w": "weight", "g": "weight", "b": "bias"}
    state = {}
    for name, tensor in TENSORS.items():
        *path, last = name.removeprefix("model/").replace("/", ".").split(".")
        path = [f"h.{part[1:]}" if part[:1] == "h" else part for part in path]
        key = ".".join([*path, renamed[last]]) if path else f"{last}.weight"
        state[f"transformer.{key}"] = torch.from_numpy(tensor[0] if tensor.ndim == 3 else tensor)
    state["lm_head.weight"] = state["transformer.wte.weight"]
    theirs.load_state_dict(state)  # strict: nothing missing, nothing left over
    theirs = theirs.double().eval()
    tokens = np.random.default_rng(2).integers(261, size=16)
    with torch.inference_mode():
        expected = theirs(torch.from_numpy(tokens[None])).logits[0].numpy()
    wide = {name: tensor.astype(np.float64) for name, tensor in weights.items()}
    ours = numpy_gpt.forward(tokens, wide, config)
    np.testing.assert_allclose(ours, expected, rtol=0, atol=1e-10)
    narrow = numpy_gpt.forward(tokens, weights, config)
    np.testing.assert_allclose(narrow, expected, rtol=0, atol=1e-4)


# -- bundles of other makes ----------------------------------------------------------------------


def test_our_writer_writes_what_tensorflow_writes(tmp_path: Path) -> None:
    """Entry by entry; the fixture's bytes differ only in fields that are zero."""
    write_bundle(tmp_path / "model.ckpt", sorted(TENSORS.items()))
    data = "model.ckpt.data-00000-of-00001"
    assert (tmp_path / data).read_bytes() == (FIXTURE / data).read_bytes()
    ours, theirs = TensorBundle(tmp_path / "model.ckpt"), TensorBundle(FIXTURE / "model.ckpt")
    assert ours._entries == theirs._entries


@given(
    names=st.sets(st.text(min_size=1, max_size=20), min_size=1, max_size=40),
    shards=st.integers(1, 12),
    per_block=st.integers(1, 9),
)
def test_many_blocks_and_shards(tmp_path_factory, names: set[str], shards: int, per_block: int):
    prefix = tmp_path_factory.mktemp("bundle") / "model.ckpt"
    tensors = {name: random(i % 4, 3, seed=i) for i, name in enumerate(sorted(names))}
    write_bundle(prefix, tensors.items(), shards=shards, per_block=per_block)
    bundle = TensorBundle(prefix)
    assert bundle.keys() == names
    for name, tensor in tensors.items():
        np.testing.assert_array_equal(bundle[name], tensor)


def test_half_precision_is_widened(tmp_path: Path) -> None:
    values = np.array([1.0, -2.5, 0.15625], np.float32)  # exact in both
    upper = (values.view(np.uint32) >> 16).astype(np.uint16)
    halves = {"bfloat16": upper, "float16": values.astype(np.float16)}
    write_bundle(tmp_path / "model.ckpt", halves.items())
    for tensor in TensorBundle(tmp_path / "model.ckpt").values():
        assert tensor.dtype == np.float32
        np.testing.assert_array_equal(tensor, values)


def test_a_tensor_beyond_four_gigabytes(tmp_path: Path) -> None:
    """The file is sparse: it takes no room on the disk."""
    tensor, offset = random(4, 5), 5 << 30
    with open(tmp_path / "model.ckpt.data-00000-of-00001", "wb") as file:
        file.seek(offset)
        file.write(tensor.tobytes())
    raw = index(
        {"far": dict(shape=(4, 5), offset=offset, size=80, crc=masked_crc32c(tensor.tobytes()))}
    )
    (tmp_path / "model.ckpt.index").write_bytes(raw)
    np.testing.assert_array_equal(TensorBundle(tmp_path / "model.ckpt")["far"], tensor)


# -- damage --------------------------------------------------------------------------------------


def open_index(folder: Path, raw: bytes) -> TensorBundle:
    (folder / "model.ckpt.index").write_bytes(raw)
    return TensorBundle(folder / "model.ckpt")


SOUND = (FIXTURE / "model.ckpt.index").read_bytes()
HUGE = 1 << 62
HEADER = field(1, 1)
BAD_INDEXES = {
    "empty": (b"", "cut short"),
    "truncated": (SOUND[:-1], "cut short"),
    "beginning lost": (SOUND[100:], "cut short|checksum|ends"),
    "only the end": (SOUND[-18:], "cut short|does not end"),
    "wrong magic": (SOUND[:-8] + bytes(8), "no TensorFlow index"),
    "no footer": (bytes(40) + SOUND[-8:], "cut short"),
    "endless number": (b"\xff" * 40 + SOUND[-8:], "does not end"),
    "flipped bit": (SOUND[:50] + bytes([SOUND[50] ^ 1]) + SOUND[51:], "block at byte 0 .*checksum"),
    "compressed": (index({}, kind=1), "compressed"),
    "big-endian": (table({b"": HEADER + field(2, 1)}), "big-endian"),
    "no header": (table({b"x": entry(shape=(1,), size=4)}), None),
    "header of a wrong type": (table({b"": field(1, b"x")}), "wrong type"),
    "entry cut short": (table({b"": HEADER, b"x": field(2, b"abc")[:-1]}), "cut short"),
    "entry of groups": (table({b"": HEADER, b"x": b"\x0b"}), "no protocol buffer"),
    "shape of numbers": (table({b"": HEADER, b"x": field(2, field(2, 7))}), "a number where"),
    "name that is no text": (table({b"": HEADER, b"\xff": entry()}), "utf-8"),
    "endless name": (table({b"": HEADER, b"x" * 600: entry()}), "a name makes no sense"),
}  # fmt: skip


@pytest.mark.parametrize("name", BAD_INDEXES)
def test_a_bad_index_is_refused(tmp_path: Path, name: str) -> None:
    raw, reason = BAD_INDEXES[name]
    if reason is None:  # noticed when the tensor is wanted: there are no data files
        bundle, reason = open_index(tmp_path, raw), "contradictory"
        with pytest.raises(UserError, match=reason) as excinfo:
            bundle["x"]
    else:
        with pytest.raises(UserError, match=reason) as excinfo:
            open_index(tmp_path, raw)
    assert "model.ckpt" in one_line(excinfo)


def _one_block(content: bytes) -> bytes:
    """An index whose only block holds `content`, with right checksums."""
    data = content + b"\0"
    data += masked_crc32c(data).to_bytes(4, "little")
    handles = block([(b"x", varint(0) + varint(len(content)))])
    footer = varint(0) + varint(0) + varint(len(data)) + varint(len(handles) - 5)
    return data + handles + footer.ljust(40, b"\0") + SOUND[-8:]


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        (b"", "too short"),
        (b"\xff\xff\xff\xff", "too short"),  # four billion restarts
        (varint(3) + varint(1) + varint(0) + b"x" + bytes(4), "a name"),  # shares with nothing
        (varint(0) + varint(9) + varint(HUGE) + b"x" + bytes(4), "too short"),
        (varint(0) + varint(1) + varint(0) + b"b" + varint(0) + varint(1) + varint(0) + b"a"
         + bytes(4), "not in order"),
        (b"\x80" + bytes(4), "a number|too short"),
    ],
)  # fmt: skip
def test_a_block_that_contradicts_itself_is_refused(tmp_path, content: bytes, reason: str) -> None:
    with pytest.raises(UserError, match=reason) as excinfo:
        open_index(tmp_path, _one_block(content))
    one_line(excinfo)


def test_a_block_listed_many_times_is_refused(tmp_path: Path) -> None:
    """Otherwise a small file could unfold to one of any size."""
    data = block([(b"a", entry())])
    handles = block([(bytes([i]), varint(0) + varint(len(data) - 5)) for i in range(100)])
    footer = varint(0) + varint(0) + varint(len(data)) + varint(len(handles) - 5)
    with pytest.raises(UserError, match="not in order"):
        open_index(tmp_path, data + handles + footer.ljust(40, b"\0") + SOUND[-8:])


@given(st.data())
def test_no_index_makes_it_crash(tmp_path_factory, data: st.DataObject) -> None:
    """Bytes changed in a block whose checksums are then made right again."""
    folder = tmp_path_factory.mktemp("bundle", numbered=True)
    shutil.copy(FIXTURE / "model.ckpt.data-00000-of-00001", folder)
    length = len(SOUND) - 5 - len(block([])) - 48  # roughly the one block of entries
    content = bytearray(SOUND[: data.draw(st.integers(0, length))])
    for _ in range(data.draw(st.integers(0, 4))):
        if content:
            content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    with contextlib.suppress(UserError):
        bundle = open_index(folder, _one_block(bytes(content) + bytes(4)))
        for name in bundle:
            with contextlib.suppress(UserError):
                bundle[name]


BAD_ENTRIES = {
    "sliced": (dict(sliced=True), "slices"),
    "of integers": (dict(dtype=3), "type 3"),
    "longer than its shape": (dict(shape=(3, 7)), "contradictory"),
    "of huge shape": (dict(shape=(HUGE, HUGE, 0)), "contradictory"),
    "of great shape and no content": (
        dict(shape=(1 << 39, 1 << 39, 0), size=0, crc=masked_crc32c(b"")),
        "contradictory",
    ),
    "of many dimensions": (dict(shape=(1,) * 100, size=4), "contradictory"),
    "of negative shape": (dict(shape=(2**64 - 3, 2**64 - 4), size=48), "contradictory"),
    "in a shard that isn't there": (dict(shard=3), "contradictory"),
    "past the end": (dict(offset=1), "cut short"),
    "far past the end": (dict(offset=HUGE), "cut short"),
    "huge": (dict(shape=(1 << 38,), size=1 << 40), "cut short"),
    "with a wrong checksum": (dict(crc=7), "wrong checksum"),
}


@pytest.mark.parametrize("name", BAD_ENTRIES)
def test_a_bad_entry_is_refused(tmp_path: Path, name: str) -> None:
    changes, reason = BAD_ENTRIES[name]
    entries = write_bundle(tmp_path / "model.ckpt", {"spoilt": random(3, 4)}.items())
    bundle = open_index(tmp_path, index({"spoilt": entries["spoilt"] | changes}))
    with pytest.raises(UserError, match=reason) as excinfo:
        bundle["spoilt"]
    assert "spoilt" in one_line(excinfo)


def test_missing_data_and_missing_index(release: Path) -> None:
    (release / "model.ckpt.data-00000-of-00001").unlink()
    with pytest.raises(UserError, match="data-00000-of-00001.*does not exist"):
        load_openai(release)
    (release / "model.ckpt.index").unlink()
    assert not is_openai(release)
    with pytest.raises(UserError, match="index.*does not exist"):
        load_openai(release)


def test_a_data_file_cut_short_is_noticed_before_anything_is_read(release: Path) -> None:
    data = release / "model.ckpt.data-00000-of-00001"
    data.write_bytes(data.read_bytes()[:-1])
    with pytest.raises(UserError, match="ends before model/wte.*cut short"):
        load_openai(release)


# -- a folder whose parts don't fit --------------------------------------------------------------


def test_missing_and_misshapen_tensors_are_named() -> None:
    wrong = TENSORS | {"model/h1/mlp/c_fc/w": np.zeros((1, 48, 12), np.float32)}
    with pytest.raises(UserError, match=r"^here: model/h1/mlp/c_fc/w has shape \(1, 48, 12\)"):
        from_openai(make.HPARAMS, wrong, "here")
    missing = {name: tensor for name, tensor in TENSORS.items() if name != "model/h0/ln_1/g"}
    with pytest.raises(UserError, match="^here: the tensor model/h0/ln_1/g is missing"):
        from_openai(make.HPARAMS, missing, "here")
    with pytest.raises(UserError, match="model/h2/attn/c_attn/w is missing"):
        from_openai({**make.HPARAMS, "n_layer": 3}, TENSORS, "here")
    with pytest.raises(UserError, match="n_layer=1000000000, the checkpoint only 28 tensors"):
        from_openai({**make.HPARAMS, "n_layer": 10**9}, TENSORS, "here")


def test_more_tensors_than_the_model_has_do_no_harm(tmp_path: Path) -> None:
    """A checkpoint of someone's own training holds Adam's moments and a step."""
    more = {"global_step": np.array(9, np.int32), "model/wte/Adam": random(2)}
    write_bundle(tmp_path / "model.ckpt", (TENSORS | more).items())
    _, weights = from_openai(make.HPARAMS, TensorBundle(tmp_path / "model.ckpt"), "here")
    np.testing.assert_array_equal(weights["token_embedding.weight"], TENSORS["model/wte"])


FEWER_BYTES = json.dumps(
    {token: i for i, token in enumerate(token for token in make.vocabulary()[0] if token != "z")}
).encode()


@pytest.mark.parametrize(
    ("file", "content", "reason"),
    [
        ("hparams.json", b"{", "hparams.json is damaged"),
        ("hparams.json", b"[]", "n_vocab=None"),
        ("hparams.json", b'{"n_vocab": 261.5}', "n_vocab=261.5"),
        ("hparams.json", json.dumps({**make.HPARAMS, "n_head": 5}).encode(), "n_head=5"),
        ("hparams.json", json.dumps({**make.HPARAMS, "n_embd": 15}).encode(), "n_embd|shape"),
        ("hparams.json", b"\xff\xfe", "hparams.json is damaged"),
        ("encoder.json", b"{}", "encoder.json"),
        ("encoder.json", b'{"<|endoftext|>": 0}', "encoder.json"),
        ("encoder.json", b"[1]", "encoder.json"),
        ("encoder.json", FEWER_BYTES, "not every byte has an id"),
        ("vocab.bpe", b"#version\nq z\n", "vocab.bpe"),
        ("vocab.bpe", b"#version\nqqq\n", "vocab.bpe"),
        ("vocab.bpe", b"\xff", "vocab.bpe"),
    ],
)
def test_damaged_json_and_vocabulary(release: Path, file: str, content: bytes, reason: str) -> None:
    (release / file).write_bytes(content)
    with pytest.raises(UserError, match=reason) as excinfo:
        load_openai(release)
    one_line(excinfo)


@pytest.mark.parametrize("file", ["encoder.json", "vocab.bpe"])
def test_a_missing_vocabulary_is_named(release: Path, file: str) -> None:
    (release / file).unlink()
    with pytest.raises(UserError, match=f"{file}: it does not exist") as excinfo:
        load_openai(release)
    one_line(excinfo)


def test_a_vocabulary_of_another_model_is_refused(release: Path) -> None:
    tensors = TENSORS | {"model/wte": random(200, 12)}
    write_bundle(release / "model.ckpt", tensors.items())
    (release / "hparams.json").write_text(json.dumps({**make.HPARAMS, "n_vocab": 200}))
    with pytest.raises(UserError, match="do not belong together"):
        load_openai(release)


def test_where_the_files_of_a_release_are() -> None:
    files = files_of("355M")
    assert set(files) >= {"hparams.json", "model.ckpt.index", "encoder.json", "vocab.bpe"}
    assert all(url.startswith("https://") and url.endswith(name) for name, url in files.items())
    assert all("/355M/" in url for url in files.values())
    assert len({url for model in MODELS for url in files_of(model).values()}) == 4 * len(files)
    with pytest.raises(UserError, match="Did you mean '124M'"):
        files_of("124")
