"""The tokenizers of published models, built small: the same ids and text as `transformers`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from tokenizers.trainers import BpeTrainer
from transformers import AutoConfig, AutoTokenizer

from conftest import tiny_config, tiny_model, weights_of
from glassgpt.checkpoints.run_directory import Checkpoint, save_model
from glassgpt.tokenizers.tokenizer import (
    BPETokenizer,
    IncrementalDecoder,
    LibraryTokenizer,
    load_tokenizer,
)
from glassgpt.tokenizers.tokenizer_json import byte_alphabet

CORPUS = ["The Wizard of Oz 1900, 1908 and 1,234.5; don't we'll 😀 你好 naïve\n\n\tZwölf"] * 9
TEXTS = ["Hello world 2024!", "  two  spaces\n\nand lines", "你好，世界 😀 e\u0301", "a", "",
         "x<|endoftext|>y </s> <s>", "don't 123456 1.5"]  # fmt: skip
LLAMA3_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def trained(tokenizer: Tokenizer, special: list[str], alphabet: list[str]) -> Tokenizer:
    trainer = BpeTrainer(vocab_size=340 + len(special), special_tokens=special,
                         initial_alphabet=alphabet, show_progress=False)  # fmt: skip
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


def begins_with(token: str, tokenizer: Tokenizer) -> Tokenizer:
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{token} $A", special_tokens=[(token, tokenizer.token_to_id(token))]
    )
    return tokenizer


def byte_level(*steps, special: list[str]) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    last = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=not steps)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([*steps, last])
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, special, byte_alphabet())


def smollm() -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    return trained(tokenizer, ["<|endoftext|>"], byte_alphabet())


def llama3() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN), "isolated")
    special = ["<|begin_of_text|>", "<|end_of_text|>"]
    return begins_with(special[0], byte_level(split, special=special))


def qwen() -> Tokenizer:
    split = pre_tokenizers.Split(Regex(LLAMA3_PATTERN.replace("{1,3}", "")), "isolated")
    tokenizer = byte_level(split, special=["<|endoftext|>", "<|im_start|>"])
    tokenizer.normalizer = normalizers.NFC()
    return tokenizer


def sentencepiece() -> Tokenizer:
    """As Llama 2 and TinyLlama have it: spaces are marks, rare characters fall back to bytes."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse(),
         decoders.Strip(" ", 1, 0)])  # fmt: skip
    special = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    # No token spans two words; that is how they were learned, not how text is cut.
    tokenizer.pre_tokenizer = pre_tokenizers.Split("\u2581", "merged_with_next")
    trained(tokenizer, special, [])
    spec = json.loads(tokenizer.to_str())
    spec["pre_tokenizer"] = None
    spec["added_tokens"] = spec["added_tokens"][:3]  # the bytes are ordinary tokens
    return begins_with("<s>", Tokenizer.from_str(json.dumps(spec)))


MAKERS = {"smollm": (smollm, LibraryTokenizer), "llama3": (llama3, BPETokenizer),
          "qwen": (qwen, BPETokenizer),
          "sentencepiece": (sentencepiece, LibraryTokenizer)}  # fmt: skip


@pytest.fixture(params=MAKERS)
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    make, kind = MAKERS[request.param]
    make().save(str(tmp_path / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    assert type(load_tokenizer(tmp_path)) is kind
    return tmp_path


@pytest.mark.parametrize("text", TEXTS)
def test_prompts_have_their_ids(folder: Path, text: str) -> None:
    ours, theirs = load_tokenizer(folder), AutoTokenizer.from_pretrained(folder)
    ids = theirs(text)["input_ids"]
    assert ours.encode(text, special=True) == ids
    plain = ours.encode(text)
    assert ours.decode(plain) == theirs.decode(plain, clean_up_tokenization_spaces=False)


def test_special_tokens_in_text_are_text(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.end_of_text is not None
    name = tokenizer.token_bytes(tokenizer.end_of_text).decode()
    assert tokenizer.end_of_text not in tokenizer.encode(f"a {name} b")
    assert tokenizer.end_of_text in tokenizer.encode(f"a {name} b", special=True)


@pytest.mark.parametrize("text", TEXTS[:4])
def test_streamed_text_is_the_text(folder: Path, text: str) -> None:
    tokenizer = load_tokenizer(folder)
    decoder = IncrementalDecoder(tokenizer)
    ids = tokenizer.encode(text)
    shown = "".join(decoder.push(token) for token in ids) + decoder.flush()
    assert shown.removeprefix(" ").strip() == tokenizer.decode(ids).strip()


def test_a_document_in_pieces_has_the_ids_of_the_whole(folder: Path) -> None:
    """`prepare` encodes long documents piece by piece; SentencePiece marks the first word only."""
    tokenizer = load_tokenizer(folder)
    text = " ".join(CORPUS)
    cut = text.index(" 1908")
    parts = [tokenizer.encode_array(text[:cut]), tokenizer.encode_array(text[cut:], continues=True)]
    assert [*parts[0], *parts[1]] == tokenizer.encode(text)
    rest = tokenizer.encode_array("word", continues=True)
    assert tokenizer.token_bytes(int(rest[0]))[:1] != b" "


def test_half_a_character_in_a_prompt(folder: Path) -> None:
    tokenizer = load_tokenizer(folder)
    assert tokenizer.encode("a\udcff", special=True) == tokenizer.encode("a?", special=True)
    assert tokenizer.encode("a\udcff") == tokenizer.encode("a?")


def test_saved_again_it_begins_and_ends_texts_as_before(folder: Path, tmp_path: Path) -> None:
    tokenizer = load_tokenizer(folder)
    again = tmp_path / "again"
    config = tiny_config(vocab_size=tokenizer.vocab_size)
    save_model(again, Checkpoint(config, weights_of(tiny_model(config)), tokenizer))
    theirs, values = AutoTokenizer.from_pretrained(again), AutoConfig.from_pretrained(again)
    begins = {"llama3": "<|begin_of_text|>", "sentencepiece": "<s>"}
    name = next(
        kind
        for kind, (make, _) in MAKERS.items()
        if make().to_str() == Tokenizer.from_file(str(folder / "tokenizer.json")).to_str()
    )
    assert theirs.bos_token == begins.get(name, "<|endoftext|>")
    assert values.bos_token_id == theirs.bos_token_id
    assert values.eos_token_id == theirs.eos_token_id == tokenizer.end_of_text
    assert AutoTokenizer.from_pretrained(again)("Oz")["input_ids"] == tokenizer.encode(
        "Oz", special=True
    )
