"""Text -> ids -> text for every tokenizer; equal ids in `tokenizers`; damaged files."""

from __future__ import annotations

import copy
import doctest
import functools
import json
import string
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import tokenizers
from hypothesis import example, given, settings
from hypothesis import strategies as st

import glassgpt.tokenizers.tokenizer
from glassgpt.errors import UserError
from glassgpt.tokenizers.tokenizer import (
    END_OF_TEXT,
    UNKNOWN,
    CharTokenizer,
    IncrementalDecoder,
    Tokenizer,
    byte_tokenizer,
    from_spec,
    load_tokenizer,
    to_files,
    tokenizer_fingerprint,
    train_bpe,
)
from glassgpt.tokenizers.tokenizer_json import byte_alphabet
from glassgpt.tokenizers.vocabulary import build_tokenizer

CORPUS = (
    "The Wizard said: \"I can't help you, dear; we'll see!\" 1900, 1,234.5 ...\n\n"
    "  Zwölf Boxkämpfer jagen Viktor quer über den großen Sylter Deich.\r\n"
    "\t你好，世界。这是一个测试。 😀👩‍👩‍👧 e\u0301 naïve — “quoted”\n"
) * 3
NASTY = [
    "", " ", "\n", "\r\n", "a\r\nb\rc\n\n\nd", "  two  blanks  ", "tab\there", "trailing \n ",
    "Alan Turing theorized that computers would one day become", "I'll you've it's 'quoted' DON'T",
    "你好，世界。", "日本語テキスト", "한국어", "مرحبا", "ภาษาไทย", "e\u0301 vs é", "ﬁ ligature",
    "😀👩‍👩‍👧🏳️‍🌈", "\u0000\u0001\u001f\u007f", "\u0085\u00a0\u2028\u2029\u3000\ufeff",
    "x" * 300, "-" * 200 + "=" * 77, " " * 50 + "end", "1234567890" * 5, "٣٤٥ Ⅷ ²", UNKNOWN,
    "def f(x):\n    return {'a': [1, 2]}  # ok\n",
]  # fmt: skip
TEXT = st.text(st.characters(exclude_categories=["Cs"]))  # all but halves of surrogate pairs
MIXED = st.lists(st.sampled_from(NASTY) | TEXT, max_size=4).map("".join)


@functools.cache
def gpt2() -> Tokenizer:
    return build_tokenizer("gpt2", lambda: iter(()))


@functools.cache
def bpe() -> Tokenizer:
    return train_bpe([CORPUS], 400)


def char() -> CharTokenizer:
    return CharTokenizer.from_characters(CORPUS)


def theirs(tokenizer: Tokenizer) -> tokenizers.Tokenizer:
    """The same tokenizer.json, read and run by Hugging Face."""
    return tokenizers.Tokenizer.from_str(json.dumps(tokenizer.spec))


@functools.cache
def their_gpt2() -> tokenizers.Tokenizer:
    return theirs(gpt2())


byte_level = pytest.mark.parametrize("make", [byte_tokenizer, gpt2, bpe])


# -- there and back ------------------------------------------------------------------------------


@byte_level
@given(text=MIXED)
def test_any_text_round_trips(make, text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.encode_array(text).tolist() == ids
    assert tokenizer.unknown(text) == []
    assert all(0 <= i < tokenizer.vocab_size for i in ids)
    assert b"".join(map(tokenizer.token_bytes, ids)).decode() == text
    if END_OF_TEXT not in text:
        assert tokenizer.encode(text, special=True) == ids


@given(text=st.text(alphabet=sorted(set(CORPUS))))
def test_known_characters_round_trip(text: str) -> None:
    tokenizer = char()
    ids = tokenizer.encode(text)
    assert len(ids) == len(text)
    assert tokenizer.decode(ids) == text
    assert tokenizer.unknown(text) == []


@given(text=TEXT)
def test_unknown_characters_become_unk_and_are_named(text: str) -> None:
    tokenizer, known = char(), set(CORPUS)
    expected = "".join(c if c in known else UNKNOWN for c in text)
    assert tokenizer.decode(tokenizer.encode(text)) == expected
    named = tokenizer.unknown(text)
    assert set(named) == set(text) - known
    assert len(named) == len(set(named))


@given(characters=st.text(st.characters(exclude_categories=["Cs"]), min_size=1))
def test_char_ids_are_the_sorted_characters(characters: str) -> None:
    tokenizer = CharTokenizer.from_characters(characters)
    distinct = sorted(set(characters))
    assert tokenizer.encode("".join(distinct)) == list(range(len(distinct)))
    assert tokenizer.vocab_size == len(distinct) + 1
    assert tokenizer.kind == "char"
    assert tokenizer.end_of_text is None


@byte_level
def test_half_a_surrogate_pair_is_replaced(make) -> None:
    """Python can hold one, UTF-8 can't; what is around it must survive."""
    decoded = make().decode(make().encode("a\ud800b"))
    assert (decoded[0], decoded[-1]) == ("a", "b")
    assert char().decode(char().encode("a\ud800b")) == f"a{UNKNOWN}b"


def test_bytes_are_their_own_ids() -> None:
    tokenizer = byte_tokenizer()
    assert tokenizer.kind == "byte"
    assert tokenizer.encode("aé\n") == [0x61, 0xC3, 0xA9, 0x0A]
    assert [tokenizer.token_bytes(i) for i in range(256)] == [bytes([i]) for i in range(256)]
    assert (tokenizer.vocab_size, tokenizer.end_of_text) == (257, 256)


def test_gpt2_ids() -> None:
    text = "Alan Turing theorized that computers would one day become"
    ids = [36235, 39141, 18765, 1143, 326, 9061, 561, 530, 1110, 1716]
    assert gpt2().encode(text) == ids
    assert gpt2().encode("\n\n  x") == [628, 220, 2124]
    assert (gpt2().vocab_size, gpt2().end_of_text) == (50257, 50256)
    assert gpt2().kind == "bpe"


@byte_level
def test_end_of_text_is_read_where_it_is_asked_for(make) -> None:
    tokenizer = make()
    text = f"one{END_OF_TEXT}two"
    plain, special = tokenizer.encode(text), tokenizer.encode(text, special=True)
    end = tokenizer.end_of_text
    assert end not in plain
    assert special == [*tokenizer.encode("one"), end, *tokenizer.encode("two")]
    assert tokenizer.decode(plain) == tokenizer.decode(special) == text
    assert tokenizer.encode(END_OF_TEXT, special=True) == [end]


# -- learning a vocabulary -----------------------------------------------------------------------


@pytest.mark.parametrize("size", [258, 300, 333])
def test_trained_bpe_has_the_size_asked_for(size: int) -> None:
    tokenizer = build_tokenizer(f"bpe:{size}", lambda: iter([CORPUS]))
    assert tokenizer.vocab_size == size
    assert tokenizer.end_of_text == size - 1
    assert len(tokenizer.encode(CORPUS)) < len(CORPUS.encode())
    used = {tokenizer.token_bytes(i) for i in range(size)}
    assert len(used) == size  # no two tokens alike
    assert {bytes([b]) for b in range(256)} < used


def test_a_small_text_gives_a_smaller_vocabulary() -> None:
    assert 257 <= train_bpe(["ab ab ab"], 500).vocab_size < 300


@pytest.mark.parametrize("name", ["bpe:257", "bpe:0", "bpe:x", "bpe:", "bpe:-5", "charr", "/no"])
def test_impossible_names_are_refused(name: str) -> None:
    with pytest.raises(UserError, match="bpe"):
        build_tokenizer(name, lambda: iter([CORPUS]))


def test_longer_merges_save_tokens() -> None:
    lengths = [len(train_bpe([CORPUS], size).encode(CORPUS)) for size in (258, 300, 400)]
    assert lengths == sorted(lengths, reverse=True)
    assert lengths[0] > lengths[-1]


# -- the same ids as Hugging Face's tokenizers ---------------------------------------------------


@st.composite
def vocabulary_and_text(draw) -> tuple[Tokenizer, str]:
    """A BPE learned from random text over few characters, and new text over the same ones.

    Few characters make long runs and overlapping merges, where two encoders could differ.
    """
    alphabet = draw(st.sampled_from(["ab", "aab ", "abc -", "aA'sé\n ", "=-_ .", "01 \t\r\n你"]))
    words = st.text(alphabet, min_size=1, max_size=12)
    corpus = " ".join(draw(st.lists(words, min_size=5, max_size=60))) * 2
    tokenizer = train_bpe([corpus], draw(st.integers(258, 500)))
    return tokenizer, "".join(draw(st.lists(words | st.just(corpus[:50]), max_size=12)))


@pytest.mark.slow
@settings(max_examples=300)
@given(both=vocabulary_and_text())
def test_trained_bpe_gives_the_ids_of_tokenizers(both: tuple[Tokenizer, str]) -> None:
    tokenizer, text = both
    assert tokenizer.encode(text) == theirs(tokenizer).encode(text).ids
    assert tokenizer.decode(tokenizer.encode(text)) == text


@given(text=MIXED)
@example(CORPUS)
def test_gpt2_gives_the_ids_of_tokenizers(text: str) -> None:
    assert gpt2().encode(text, special=True) == their_gpt2().encode(text).ids


@pytest.mark.slow
@pytest.mark.parametrize("make", [char, byte_tokenizer, bpe])
@settings(max_examples=50)
@given(text=MIXED)
def test_others_give_the_ids_of_tokenizers(make, text: str) -> None:
    tokenizer = make()
    library = theirs(tokenizer)
    ids = tokenizer.encode(text, special=True)
    assert ids == library.encode(text).ids
    assert library.decode(ids, skip_special_tokens=False) == tokenizer.decode(ids)


# -- streaming -----------------------------------------------------------------------------------


@pytest.mark.parametrize("make", [char, byte_tokenizer, gpt2, bpe])
@given(text=MIXED)
def test_pieces_of_valid_text_are_whole_characters(make, text: str) -> None:
    tokenizer = make()
    ids = tokenizer.encode(text.replace("\ufffd", ""))
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(i) for i in ids]
    assert decoder.flush() == ""
    assert "".join(pieces) == tokenizer.decode(ids)
    assert "\ufffd" not in "".join(pieces)


@pytest.mark.parametrize("make", [byte_tokenizer, bpe])
@given(data=st.data())
def test_pieces_of_any_ids_are_the_decoded_text(make, data) -> None:
    """Also for bytes that are no text, as an untrained model emits them."""
    tokenizer = make()
    ids = data.draw(st.lists(st.integers(0, tokenizer.vocab_size - 1)))
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(i) for i in ids]
    assert "".join(pieces) + decoder.flush() == tokenizer.decode(ids)


def test_a_character_appears_with_its_last_byte() -> None:
    tokenizer = byte_tokenizer()
    decoder = IncrementalDecoder(tokenizer)
    pieces = [decoder.push(i) for i in "é😀".encode()]
    assert pieces == ["", "é", "", "", "", "😀"]
    assert decoder.push(0xF0) == ""
    assert decoder.flush() == "\ufffd"


def test_docstrings() -> None:
    assert doctest.testmod(glassgpt.tokenizers.tokenizer).attempted > 0
    assert doctest.testmod(glassgpt.tokenizers.tokenizer).failed == 0


# -- files ---------------------------------------------------------------------------------------


def save(tokenizer: Tokenizer, folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, content in to_files(tokenizer, 77).items():
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("make", [char, byte_tokenizer, gpt2, bpe])
def test_saved_and_loaded_is_the_same(make, tmp_path: Path) -> None:
    tokenizer = make()
    loaded = load_tokenizer(save(tokenizer, tmp_path))
    assert tokenizer_fingerprint(loaded) == tokenizer_fingerprint(tokenizer)
    assert tokenizer_fingerprint(
        load_tokenizer(tmp_path / "tokenizer.json")
    ) == tokenizer_fingerprint(tokenizer)
    again = load_tokenizer(save(loaded, tmp_path / "again"))
    assert tokenizer_fingerprint(again) == tokenizer_fingerprint(tokenizer)
    assert loaded.encode(CORPUS) == tokenizer.encode(CORPUS)
    assert loaded.kind == tokenizer.kind
    assert loaded.end_of_text == tokenizer.end_of_text
    assert build_tokenizer(str(tmp_path), lambda: iter(())).spec == tokenizer.spec


def test_fingerprints_tell_tokenizers_apart() -> None:
    made = [char(), byte_tokenizer(), gpt2(), bpe(), train_bpe([CORPUS], 300)]
    made += [CharTokenizer.from_characters(CORPUS[:9]), CharTokenizer.from_characters(CORPUS[1:9])]
    assert len({tokenizer_fingerprint(tokenizer) for tokenizer in made}) == len(made)


def test_the_fingerprint_does_not_depend_on_the_order_in_the_file() -> None:
    spec = bpe().spec
    reordered = dict(reversed(spec.items()))
    reordered["model"] = dict(reversed(spec["model"].items()))
    reordered["model"]["vocab"] = dict(reversed(spec["model"]["vocab"].items()))
    assert list(reordered) != list(spec)
    assert tokenizer_fingerprint(from_spec(reordered)) == tokenizer_fingerprint(bpe())
    assert from_spec(reordered).encode(CORPUS) == bpe().encode(CORPUS)


def test_merges_may_stand_as_strings(tmp_path: Path) -> None:
    """GPT-2's own tokenizer.json on the hub has "a b" where newer files have ["a", "b"]."""
    spec = copy.deepcopy(bpe().spec)
    spec["model"]["merges"] = [" ".join(pair) for pair in spec["model"]["merges"]]
    assert from_spec(spec).encode(CORPUS) == bpe().encode(CORPUS)


def test_qwen_and_llama_3_split_by_their_own_pattern() -> None:
    pattern = r"(?i:'s|'t)|\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+|\s+"
    spec = copy.deepcopy(bpe().spec)
    spec["normalizer"] = {"type": "NFC"}
    spec["pre_tokenizer"] = {
        "type": "Sequence",
        "pretokenizers": [
            {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated",
             "invert": False},
            {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False,
             "use_regex": False},
        ],
    }  # fmt: skip
    tokenizer = from_spec(spec)
    assert tokenizer.encode(CORPUS) == theirs(tokenizer).encode(CORPUS).ids
    assert tokenizer.encode(CORPUS) != bpe().encode(CORPUS)
    assert tokenizer.decode(tokenizer.encode("e\u0301")) == "é"


def damaged(spec: dict[str, Any], change: str) -> Any:
    """A copy of `spec` that was damaged in the named way."""
    spec = copy.deepcopy(spec)
    model, vocab = spec["model"], spec["model"]["vocab"]
    first, last = min(vocab, key=vocab.get), max(vocab, key=vocab.get)
    match change:
        case "a list":
            return [spec]
        case "nothing":
            return None
        case "no model":
            del spec["model"]
        case "model is a list":
            spec["model"] = [model]
        case "another kind":
            model["type"] = "Unigram"
        case "no vocabulary":
            del model["vocab"]
        case "vocabulary is a list":
            model["vocab"] = list(vocab)
        case "ids are text":
            model["vocab"] = {token: str(i) for token, i in vocab.items()}
        case "an id is text":
            vocab[first] = "zero"
        case "an id is negative":
            vocab[first] = -1
        case "an id is missing":
            del vocab[first]
        case "an id twice":
            vocab[first] = vocab[last]
        case "a gap":
            vocab[first] = 10_000
        case "no <unk>":
            del vocab[UNKNOWN]
        case "merge of three":
            model["merges"][3] = ["a", "b", "c"]
        case "merge of strangers":
            model["merges"][3] = ["\u9999", "a"]
        case "no merges":
            del model["merges"]
        case "bad pattern":
            pattern = {"type": "Split", "behavior": "Isolated", "pattern": {"Regex": "(("}}
            steps = [pattern, {"type": "ByteLevel", "add_prefix_space": False}]
            spec["pre_tokenizer"] = {"type": "Sequence", "pretokenizers": steps}
        case "added token without id":
            del spec["added_tokens"][0]["id"]
        case "a stranger in the vocabulary":
            vocab["\u9999"] = len(vocab)
        case _:
            raise AssertionError(change)
    return spec


COMMON = ["a list", "nothing", "no model", "model is a list", "another kind", "no vocabulary",
          "vocabulary is a list", "ids are text", "an id is text", "an id is negative",
          "an id is missing", "an id twice"]  # fmt: skip
BPE_ONLY = ["merge of three", "merge of strangers", "no merges", "bad pattern",
            "added token without id", "a stranger in the vocabulary"]  # fmt: skip


@pytest.mark.parametrize(
    ("make", "change"),
    [(make, change) for make in (char, bpe) for change in COMMON]
    + [(char, "a gap"), (char, "no <unk>")]
    + [(bpe, change) for change in BPE_ONLY],
)
def test_damaged_tokenizer_json_is_refused(make, change: str, tmp_path: Path) -> None:
    """At the latest when text is first encoded and decoded; never with a wrong result."""
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps(damaged(make().spec, change)))
    with pytest.raises(UserError, match=r"tokenizer\.json"):  # noqa: PT012
        tokenizer = load_tokenizer(path)
        tokenizer.decode(tokenizer.encode("!" + CORPUS))


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe\x00", b"null", b"3", b"\x80" * 9])
def test_files_that_are_no_json_are_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "tokenizer.json").write_bytes(content)
    with pytest.raises(UserError, match=r"tokenizer\.json"):
        load_tokenizer(tmp_path)
    with pytest.raises(UserError, match="missing"):
        load_tokenizer(tmp_path / "missing")


def test_cut_files_are_refused(tmp_path: Path) -> None:
    content = to_files(bpe())["tokenizer.json"]
    for share in np.linspace(0, 0.99, 12):
        (tmp_path / "tokenizer.json").write_bytes(content[: int(share * len(content))])
        with pytest.raises(UserError):
            load_tokenizer(tmp_path)


def test_printable_stand_ins_are_gpt2s() -> None:
    """The alphabet must be GPT-2's, or its vocabulary would be read wrongly."""
    alphabet = byte_alphabet()
    assert sorted(alphabet) == sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    assert len(set(alphabet)) == 256
    assert alphabet[ord(" ")] == "Ġ"
    assert alphabet[ord("\n")] == "Ċ"
    assert all(alphabet[ord(c)] == c for c in string.punctuation + string.ascii_letters)


@pytest.mark.slow
def test_a_million_blanks_are_no_error():
    """tiktoken's pattern engine gives up on such a run; we then cut it."""
    text = " " * 1_200_000 + "x"
    tokenizer = build_tokenizer("gpt2", lambda: iter(()))
    with pytest.raises(ValueError, match="stack"):
        tokenizer._encoding.encode_to_numpy(text)  # type: ignore[attr-defined]
    assert tokenizer.decode(tokenizer.encode(text)) == text
    assert tokenizer.decode(tokenizer.encode(text, special=True)) == text
