"""GGUF files: what llama.cpp expects, read back with the gguf package's own reader.

That llama.cpp itself computes the same text is checked by benchmarks/gguf_llamacpp.py.
"""

from __future__ import annotations

import copy
import errno
import os
import sys
import tracemalloc
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from gguf import GGUFReader

from conftest import tiny_config
from glassgpt.checkpoints.formats import logit_difference
from glassgpt.checkpoints.gguf import Kind, read_gguf, write_gguf
from glassgpt.config import ModelConfig, RopeScaling
from glassgpt.errors import UserError
from glassgpt.tokenizers.chat_template import Chat, choose_template
from glassgpt.tokenizers.tokenizer import (
    CharTokenizer,
    Tokenizer,
    byte_tokenizer,
    from_spec,
    train_bpe,
)

CHARACTERS = CharTokenizer.from_characters("abcdefghijklmnopqrstuvwxyz .,!?\n-:;'")  # 36, <unk>
LLAMA3 = RopeScaling(kind="llama3", factor=8.0, low_freq_factor=0.5, high_freq_factor=1.8,
                     original_context_length=12)  # fmt: skip
FAMILIES = [
    pytest.param("gpt2", {}, id="gpt2"),
    pytest.param("gpt2", dict(tie_embeddings=False), id="gpt2-untied"),
    pytest.param("gpt2", dict(bias=False), id="gpt2-without-biases"),
    pytest.param("modern", {}, id="qwen3"),
    pytest.param("modern", dict(tie_embeddings=False), id="qwen3-untied"),
    pytest.param("modern", dict(qk_norm=False, head_dim=6), id="llama"),
    pytest.param(
        "modern",
        dict(qk_norm=False, head_dim=6, tie_embeddings=False, rope_theta=5e5),
        id="llama-2",
    ),
    pytest.param(
        "modern",
        dict(qk_norm=False, head_dim=6, rope_scaling=RopeScaling(kind="linear", factor=2.5)),
        id="llama-linear",
    ),
    pytest.param("modern", dict(qk_norm=False, head_dim=6, rope_scaling=LLAMA3), id="llama-3"),
]


def random_weights(config: ModelConfig) -> dict[str, np.ndarray]:
    generator = np.random.default_rng(0)
    shapes = config.weight_shapes.items()
    return {name: generator.normal(size=shape).astype(np.float32) / 4 for name, shape in shapes}


def write(
    path: Path,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray] | None = None,
    tokenizer: Tokenizer = CHARACTERS,
    kind: Kind = "F32",
) -> list[str]:
    weights = random_weights(config) if weights is None else weights
    return write_gguf(path, config, weights, tokenizer, kind=kind, name="tiny")


def field(reader: GGUFReader, key: str) -> Any:
    return reader.fields[key].contents()


# -- weights -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("shape", "fields"), FAMILIES)
def test_f32_is_exact(tmp_path: Path, shape: str, fields: dict[str, Any]) -> None:
    config = tiny_config(shape, **fields)
    weights = random_weights(config)
    assert write(tmp_path / "m.gguf", config, weights) == []
    stored, read = read_gguf(tmp_path / "m.gguf")
    assert stored.family == config.family
    assert stored.rope_theta == config.rope_theta
    assert stored.rope_scaling == config.rope_scaling
    assert stored.norm_eps == pytest.approx(config.norm_eps)
    assert stored.tie_embeddings == config.tie_embeddings
    for name, array in weights.items():
        np.testing.assert_array_equal(read[name], array, err_msg=name)
    assert not any(read[name].any() for name in read.keys() - weights.keys())  # zero biases
    assert logit_difference((config, weights), (stored, read)) < 1e-5


@pytest.mark.parametrize(("shape", "fields"), FAMILIES)
def test_f16_rounds_matrices_only(tmp_path: Path, shape: str, fields: dict[str, Any]) -> None:
    config = tiny_config(shape, **fields)
    weights = random_weights(config)
    assert write(tmp_path / "m.gguf", config, weights, kind="F16") == []
    _, read = read_gguf(tmp_path / "m.gguf")
    for name, array in weights.items():
        whole = array.ndim == 1 or name == "position_embedding.weight"
        expected = array if whole else array.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(read[name], expected, err_msg=name)


@pytest.mark.parametrize("qk_norm", [True, False])
def test_q8_0_is_within_half_a_step(tmp_path: Path, qk_norm: bool) -> None:
    config = tiny_config(
        n_embd=64, n_head=4, n_kv_head=2, head_dim=16, n_hidden=40, qk_norm=qk_norm
    )
    weights = random_weights(config)
    coarse = write(tmp_path / "m.gguf", config, weights, kind="Q8_0")
    assert coarse == ["blk.0.ffn_down.weight", "blk.1.ffn_down.weight"]  # rows of 40
    model = read_gguf(tmp_path / "m.gguf")
    for name, array in weights.items():
        if array.ndim == 2 and "down" not in name:
            blocks = np.abs(array).reshape(-1, 32).max(axis=1, keepdims=True)
            step = np.broadcast_to(blocks / 127, (len(blocks), 32)).reshape(array.shape)
            # Half a step, and the scale itself is rounded to 16 bits.
            assert (np.abs(model[1][name] - array) <= 0.5 * step + 127 * step * 2**-11).all(), name
    assert 0 < logit_difference((config, weights), model) < 0.2


def test_llama_pairs_neighbours_in_rotary_positions(tmp_path: Path) -> None:
    """Ours turns (i, i + D/2) together, llama.cpp's llama (2i, 2i + 1), its qwen3 as ours."""
    for qk_norm, order in ((False, [0, 3, 1, 4, 2, 5]), (True, [0, 1, 2, 3, 4, 5])):
        config = tiny_config(qk_norm=qk_norm, head_dim=6)  # 6 heads, 3 key/value heads
        weights = random_weights(config)
        write(tmp_path / "m.gguf", config, weights)
        tensors = {t.name: t.data for t in GGUFReader(tmp_path / "m.gguf").tensors}
        q, k, v = np.split(weights["blocks.1.attn.qkv.weight"], [36, 54])
        for head in range(6):
            rows = [6 * head + i for i in order]
            np.testing.assert_array_equal(tensors["blk.1.attn_q.weight"][6 * head :][:6], q[rows])
        np.testing.assert_array_equal(tensors["blk.1.attn_k.weight"][:6], k[order])
        np.testing.assert_array_equal(tensors["blk.1.attn_v.weight"], v)


def test_exact_gelu_becomes_the_tanh_form_and_the_difference_shows(tmp_path: Path) -> None:
    config = tiny_config("gpt2", activation="gelu")
    weights = random_weights(config)
    write(tmp_path / "m.gguf", config, weights)
    stored, read = read_gguf(tmp_path / "m.gguf")
    assert stored.activation == "gelu_tanh"
    assert 0 < logit_difference((config, weights), (stored, read)) < 0.01


def test_llama3_scaling_is_a_tensor_of_factors(tmp_path: Path) -> None:
    config = tiny_config(qk_norm=False, head_dim=6, rope_theta=30.0, rope_scaling=LLAMA3)
    write(tmp_path / "m.gguf", config)
    tensors = {t.name: t.data for t in GGUFReader(tmp_path / "m.gguf").tensors}
    factors = tensors["rope_freqs.weight"]
    assert factors.shape == (3,)
    assert factors[0] == 1.0  # the fastest pair keeps its frequency
    assert factors[2] == pytest.approx(8.0)  # the slowest has an eighth of it
    assert 1.0 < factors[1] < 8.0
    with pytest.raises(UserError, match="qwen3"):
        write(tmp_path / "q.gguf", tiny_config(head_dim=6, rope_scaling=LLAMA3))


class OneByOne(Mapping[str, np.ndarray]):
    """Weights that are made when asked for, and only once."""

    def __init__(self, config: ModelConfig) -> None:
        self.shapes, self.asked = config.weight_shapes, set[str]()

    def __getitem__(self, name: str) -> np.ndarray:
        assert name not in self.asked
        self.asked.add(name)
        return np.ones(self.shapes[name], np.float32)

    def __iter__(self) -> Iterator[str]:
        return iter(self.shapes)

    def __len__(self) -> int:
        return len(self.shapes)


@pytest.mark.parametrize("shape", ["gpt2", "modern"])
def test_tensors_pass_one_at_a_time(tmp_path: Path, shape: str) -> None:
    config = ModelConfig.from_shape(shape, vocab_size=37, n_layer=8, n_embd=128)  # type: ignore
    write(tmp_path / "warm.gguf", tiny_config())  # imports are not what is measured
    weights = OneByOne(config)
    tracemalloc.start()
    write(tmp_path / "m.gguf", config, weights)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert weights.asked == set(config.weight_shapes)
    assert peak < 4 * config.n_parameters / 3


# -- metadata ------------------------------------------------------------------------------------


def test_metadata(tmp_path: Path) -> None:
    write(tmp_path / "m.gguf", tiny_config(qk_norm=False, head_dim=6), kind="Q8_0")
    reader = GGUFReader(tmp_path / "m.gguf")
    expected = {
        "general.architecture": "llama", "general.type": "model", "general.name": "tiny",
        "general.file_type": 7, "general.quantization_version": 2, "llama.vocab_size": 37,
        "llama.context_length": 13, "llama.embedding_length": 18, "llama.block_count": 2,
        "llama.feed_forward_length": 28, "llama.attention.head_count": 6,
        "llama.attention.head_count_kv": 3, "llama.attention.key_length": 6,
        "llama.attention.value_length": 6, "llama.rope.dimension_count": 6,
        "llama.rope.freq_base": 10000.0,
    }  # fmt: skip
    assert {key: field(reader, key) for key in expected} == expected
    eps = field(reader, "llama.attention.layer_norm_rms_epsilon")
    assert eps == pytest.approx(1e-6)


def test_names_of_tensors(tmp_path: Path) -> None:
    def names(shape: str, **fields: Any) -> set[str]:
        write(tmp_path / "m.gguf", tiny_config(shape, n_layer=1, **fields))
        return {tensor.name for tensor in GGUFReader(tmp_path / "m.gguf").tensors}

    parts = {"attn_norm", "attn_qkv", "attn_output", "ffn_norm", "ffn_up", "ffn_down"}
    gpt2 = {f"blk.0.{part}.{kind}" for part in parts for kind in ("weight", "bias")}
    gpt2 |= {"token_embd.weight", "position_embd.weight", "output_norm.weight", "output_norm.bias"}
    assert names("gpt2") == names("gpt2", bias=False) == gpt2
    parts = parts - {"attn_qkv"} | {"attn_q", "attn_k", "attn_v", "ffn_gate"}
    llama = {f"blk.0.{part}.weight" for part in parts} | {"token_embd.weight", "output_norm.weight"}
    assert names("modern", qk_norm=False, head_dim=6) == llama
    norms = {"blk.0.attn_q_norm.weight", "blk.0.attn_k_norm.weight"}
    assert names("modern", tie_embeddings=False) == llama | norms | {"output.weight"}


# -- tokenizers ----------------------------------------------------------------------------------


def tokens_as_llama_cpp_finds_them(reader: GGUFReader, word: str) -> list[int]:
    """Its byte-level BPE, for a text that the splitting pattern leaves whole."""
    texts, merges = field(reader, "tokenizer.ggml.tokens"), field(reader, "tokenizer.ggml.merges")
    ranks = {tuple(merge.split(" ")): rank for rank, merge in enumerate(merges)}
    ids = {text: i for i, text in enumerate(texts)}
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    moved = [byte for byte in range(256) if byte not in printable]
    letter = {byte: chr(byte) for byte in printable}
    letter |= {byte: chr(256 + n) for n, byte in enumerate(moved)}
    parts = [letter[byte] for byte in word.encode()]
    while pairs := [p for p in zip(parts, parts[1:], strict=False) if p in ranks]:
        first = min(pairs, key=ranks.__getitem__)
        at = next(i for i, p in enumerate(zip(parts, parts[1:], strict=False)) if p == first)
        parts[at : at + 2] = ["".join(first)]
    return [ids[part] for part in parts if part in ids]  # what has no id is dropped


def reader_for(path: Path, tokenizer: Tokenizer, extra: int = 0) -> GGUFReader:
    config = tiny_config(vocab_size=tokenizer.vocab_size + extra)
    write(path / "m.gguf", config, tokenizer=tokenizer)
    return GGUFReader(path / "m.gguf")


def test_byte_tokenizer(tmp_path: Path) -> None:
    reader = reader_for(tmp_path, byte_tokenizer(), extra=2)
    text = "naïve 中文 😀\n\0"
    assert tokens_as_llama_cpp_finds_them(reader, text) == list(text.encode())
    assert field(reader, "tokenizer.ggml.tokens")[256:] == ["<|endoftext|>", "[PAD257]", "[PAD258]"]
    assert field(reader, "tokenizer.ggml.token_type") == [1] * 256 + [3, 5, 5]
    assert field(reader, "tokenizer.ggml.eos_token_id") == 256
    assert field(reader, "tokenizer.ggml.add_bos_token") is False
    assert field(reader, "tokenizer.ggml.model") == "gpt2"


def test_bpe_tokenizer(tmp_path: Path) -> None:
    bpe = train_bpe(["the thin thistle thinks of the naïve thing " * 20], 280)
    reader = reader_for(tmp_path, bpe)
    for word in ("the", " thistle", " naïve", "thithe", "中"):
        assert tokens_as_llama_cpp_finds_them(reader, word) == bpe.encode(word)
    assert len(bpe.encode(" thistle")) < 8
    assert field(reader, "tokenizer.ggml.pre") == "gpt-2"
    assert field(reader, "tokenizer.ggml.bos_token_id") == bpe.end_of_text


def test_char_tokenizer_of_any_script(tmp_path: Path) -> None:
    """Merges build each character from its bytes; the halves between need no ids."""
    chars = CharTokenizer.from_characters("abc é中丈文😀ñü\n,\0\x7f")
    reader = reader_for(tmp_path, chars)
    for text in ("abc é中丈文😀ñü\n,\0\x7f", "丈中中a文é", "😀😀"):
        assert tokens_as_llama_cpp_finds_them(reader, text) == chars.encode(text)
    assert tokens_as_llama_cpp_finds_them(reader, "aΩb本😁é") == chars.encode("abé")
    unknown = chars.vocab_size - 1
    assert field(reader, "tokenizer.ggml.unknown_token_id") == unknown
    assert field(reader, "tokenizer.ggml.eos_token_id") == unknown  # not 11, which is a letter
    assert field(reader, "tokenizer.ggml.token_type")[unknown] == 2


@pytest.mark.parametrize("name", ["headings", "chatml"])
def test_a_chat_partner_has_its_template_and_its_ends(tmp_path: Path, name: str) -> None:
    characters = CharTokenizer.from_characters("#:AUSaenrstuimy \n")
    for base in (characters, train_bpe(["user system assistant # : " * 20], 280)):
        template, tokenizer = choose_template(name, base)
        ends = Chat(template, tokenizer).ends
        config = tiny_config(vocab_size=tokenizer.vocab_size)
        write_gguf(tmp_path / "m.gguf", config, random_weights(config), tokenizer, kind="F32",
                   name="tiny", template=template, ends=ends)  # fmt: skip
        reader = GGUFReader(tmp_path / "m.gguf")
        assert field(reader, "tokenizer.chat_template") == template
        end = field(reader, "tokenizer.ggml.eos_token_id")
        told = {end}
        if "tokenizer.ggml.eot_token_id" in reader.fields:
            told.add(field(reader, "tokenizer.ggml.eot_token_id"))
        assert told >= set(ends)
        if tokenizer.end_of_text is not None:
            assert end == tokenizer.end_of_text


def test_char_tokenizer_of_ascii(tmp_path: Path) -> None:
    text = "what's that?\n- ok: go."
    reader = reader_for(tmp_path, CHARACTERS)
    assert tokens_as_llama_cpp_finds_them(reader, text) == CHARACTERS.encode(text)


@pytest.mark.parametrize(
    ("digits", "name"), [("{1,3}", "llama-bpe"), ("", "qwen2"), ("{1,2}", None)]
)
def test_splitting_patterns_go_by_name(tmp_path: Path, digits: str, name: str | None) -> None:
    spec = copy.deepcopy(train_bpe(["the thin thing " * 20], 262).spec)
    pattern = (
        r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + digits + "|"
        r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    )
    split = {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated"}
    level = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False}
    spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": [split, level]}
    spec["added_tokens"].append({"id": 262, "content": "<|user|>", "special": False})
    if name is None:
        with pytest.raises(
            UserError, match="no name for the tokenizer's splitting pattern"
        ) as error:
            reader_for(tmp_path, from_spec(spec))
        assert "\n" not in str(error.value)
        return
    reader = reader_for(tmp_path, from_spec(spec))
    assert field(reader, "tokenizer.ggml.pre") == name
    assert field(reader, "tokenizer.ggml.token_type")[-2:] == [3, 4]


# -- what goes wrong -----------------------------------------------------------------------------


def test_models_that_the_format_cannot_hold(tmp_path: Path) -> None:
    for config, why in (
        (tiny_config("gpt2", activation="relu"), "activation=relu"),
        (tiny_config(n_layer=0), "n_layer=0"),
    ):
        with pytest.raises(UserError, match=why) as error:
            write(tmp_path / "m.gguf", config)
        assert "\n" not in str(error.value)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_is_one_line_and_keeps_the_old_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "m.gguf"
    path.write_bytes(b"before")

    def full(_: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(UserError, match="no space left on device; free some space"):
            write(path, tiny_config())
    assert list(tmp_path.iterdir()) == [path]
    assert path.read_bytes() == b"before"


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="needs Linux's /dev/full")
def test_a_disk_that_fills_up_while_tensors_are_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / ".m.gguf.partial").symlink_to("/dev/full")
    with pytest.raises(UserError, match="no space left on device"):
        write(tmp_path / "m.gguf", tiny_config())
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_export_leaves_nothing(tmp_path: Path) -> None:
    class Interrupted(dict[str, np.ndarray]):
        def __getitem__(self, name: str) -> np.ndarray:
            if name.startswith("blocks.1"):
                raise KeyboardInterrupt
            return super().__getitem__(name)

    config = tiny_config()
    with pytest.raises(KeyboardInterrupt):
        write(tmp_path / "m.gguf", config, Interrupted(random_weights(config)))
    assert list(tmp_path.iterdir()) == []


def test_a_folder_that_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="it does not exist"):
        write(tmp_path / "none" / "m.gguf", tiny_config())


def test_damaged_files(tmp_path: Path) -> None:
    path = tmp_path / "m.gguf"
    write(path, tiny_config())
    whole = path.read_bytes()
    for content in (b"", b"{}", whole[:20], whole[:2000], whole[:-500]):
        path.write_bytes(content)
        with pytest.raises(UserError, match="damaged") as error:
            read_gguf(path)
        assert "\n" not in str(error.value)
    with pytest.raises(UserError, match="it does not exist"):
        read_gguf(tmp_path / "none.gguf")


def test_without_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "gguf", None)
    with pytest.raises(UserError, match="pip install 'glassgpt\\[gguf\\]'"):
        write(tmp_path / "m.gguf", tiny_config())


def test_a_token_before_every_text_is_told(tmp_path: Path) -> None:
    """Llama 3 puts one before each prompt; GPT-2 none."""
    spec = copy.deepcopy(train_bpe(["the cat sat on the mat " * 9], 280).spec)
    begin = max(spec["model"]["vocab"].values()) + 1
    added = spec["added_tokens"][0] | {"id": begin, "content": "<begin>"}
    spec["added_tokens"].append(added)
    spec["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [{"SpecialToken": {"id": "<begin>", "type_id": 0}},
                   {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [],
        "special_tokens": {"<begin>": {"id": "<begin>", "ids": [begin], "tokens": ["<begin>"]}},
    }  # fmt: skip
    tokenizer = from_spec(spec)
    write(tmp_path / "m.gguf", tiny_config(vocab_size=begin + 1), tokenizer=tokenizer)
    reader = GGUFReader(tmp_path / "m.gguf")
    assert field(reader, "tokenizer.ggml.bos_token_id") == begin
    assert field(reader, "tokenizer.ggml.eos_token_id") == tokenizer.end_of_text
    assert field(reader, "tokenizer.ggml.add_bos_token") is True
