"""Conversations have the ids that `transformers` gives them, and its `generate` knows the end."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from test_tokenizers import CORPUS, MAKERS
from tokenizers import Tokenizer as Library
from transformers import AutoModelForCausalLM, AutoTokenizer

from chat_templates import TEMPLATES, TOKENS
from conftest import tiny_config, tiny_model, weights_of
from glassgpt.api import LoadedModel
from glassgpt.checkpoints.run_directory import Checkpoint, load_model, save_model
from glassgpt.tokenizers.chat_template import BUILT_IN, Chat, choose_template
from glassgpt.tokenizers.tokenizer import (
    CharTokenizer,
    Tokenizer,
    add_tokens,
    byte_tokenizer,
    from_spec,
    to_files,
    train_bpe,
)
from glassgpt.tokenizers.vocabulary import build_tokenizer


class Turn(NamedTuple):
    role: str
    content: str


TALK = [
    Turn("system", "Be brief, 10 words at most.\n\nNever rude!"),
    Turn("user", "  What's 1,234.5 + 2?  \n"),
    Turn("assistant", "1,236.5...\n\nIsn't it?"),
    Turn("user", "(naïve) 你好 😀\n\tdon't"),
    Turn("assistant", "  \n```\ncode\n```  "),
    Turn("user", "?"),
    Turn("assistant", ""),
]
LETTERS = "".join(sorted({char for turn in TALK for char in turn.content} - {"😀"}))


@cache
def tokenizer_of(name: str) -> Tokenizer:
    if name == "char":
        plain = "SystemUserAssistant#:[INST]/<>\n abcdefghijklmnopqrstuvwxyz." + LETTERS
        return CharTokenizer.from_characters(plain)
    if name in MAKERS:
        return from_spec(json.loads(MAKERS[name][0]().to_str()))
    if name == "gpt2":
        return build_tokenizer("gpt2", lambda: iter(()))
    return byte_tokenizer() if name == "byte" else train_bpe(CORPUS, 400)


def saved(tokenizer: Tokenizer, template: str | None, folder: Path):
    folder.mkdir(exist_ok=True)
    for name, content in to_files(tokenizer, 1000, chat_template=template).items():
        (folder / name).write_bytes(content)
    return AutoTokenizer.from_pretrained(folder)


# GPT-2's pattern reads two line breaks before a word as two tokens, and at the end of a prompt as
# one. There the prompt wins: what is learned is what follows prompts.
CUT_APART = {(name, "llama3") for name in ("bpe", "gpt2", "smollm")}
NAMES = ["char", "byte", "bpe", "gpt2", *MAKERS]


@pytest.mark.slow
@pytest.mark.parametrize("template", [*BUILT_IN, *TEMPLATES])
@pytest.mark.parametrize("name", NAMES)
def test_conversations_have_their_ids(name: str, template: str, tmp_path: Path) -> None:
    if template in BUILT_IN:
        source, tokenizer = choose_template(template, tokenizer_of(name))
    else:
        source, tokenizer = TEMPLATES[template], add_tokens(tokenizer_of(name), TOKENS)
    theirs, chat = saved(tokenizer, source, tmp_path / "model"), Chat(source, tokenizer)
    for talk in (TALK, TALK[1:], TALK[:3], TALK[1:3]):
        messages = [turn._asdict() for turn in talk]
        ids = theirs.apply_chat_template(messages, tokenize=True, return_dict=False)
        if (name, template) not in CUT_APART:
            assert chat.encode(talk)[0] == ids
        for n in range(1, len(talk)):
            if talk[n].role == "assistant":
                asked = theirs.apply_chat_template(
                    messages[:n], tokenize=True, add_generation_prompt=True, return_dict=False
                )
                ours = chat.prompt(talk[:n])
                assert chat.encode(talk)[0][: len(ours)] == ours
                if n == 1 or (name, template) not in CUT_APART:
                    assert ours == asked


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_added_tokens_have_their_ids(name: str, tmp_path: Path) -> None:
    before = tokenizer_of(name)
    added = ["<|im_start|>", "<|endoftext|>", "<|im_end|>", "<|im_start|>"]
    tokenizer = add_tokens(before, added)
    theirs = saved(tokenizer, None, tmp_path / "model")
    new = [token for token in dict.fromkeys(added) if token not in before.special]
    ids = [theirs.convert_tokens_to_ids(token) for token in new]
    assert ids == list(range(before.vocab_size, before.vocab_size + len(new)))
    assert tokenizer.vocab_size == len(theirs) == before.vocab_size + len(new)
    texts = ["a<|im_start|>b\n<|im_end|>", "<|im_end|>", "", "<|im_", "你<|im_end|><|im_end|> x"]
    for text in texts:
        ids = tokenizer.encode(text, special=True)
        assert ids == theirs(text)["input_ids"]
        assert tokenizer.decode(ids) == theirs.decode(ids, clean_up_tokenization_spaces=False)
    again = add_tokens(tokenizer, added)
    assert again.spec == tokenizer.spec
    library = Library.from_file(str(tmp_path / "model" / "tokenizer.json"))
    assert [library.token_to_id(token) for token in new] == [tokenizer.special[t] for t in new]


@pytest.mark.slow
@pytest.mark.parametrize("template", BUILT_IN)
@pytest.mark.parametrize("shape", ["gpt2", "modern"])
def test_a_saved_model_chats_and_stops(shape: str, template: str, tmp_path: Path) -> None:
    """Greedy answers of `generate` are ours, and end at the template's token."""
    base = tokenizer_of("char")
    source, tokenizer = choose_template(template, base)
    chat = Chat(source, tokenizer)
    talk = [Turn("user", "What?")]
    config = tiny_config(shape, vocab_size=tokenizer.vocab_size, context_length=100)
    for seed in range(200):  # until one has something to say, and ends
        checkpoint = Checkpoint(config, weights_of(tiny_model(config, seed)), tokenizer,
                                chat_template=source, ends=chat.ends)  # fmt: skip
        model = LoadedModel(checkpoint, "cpu")
        answer = model.generate(chat.prompt(talk), engine="numpy", temperature=0, max_new_tokens=40)
        if answer.finish_reason == "end_of_text" and len(answer.text) > 2:
            break
    else:
        pytest.fail("no model ends")
    save_model(tmp_path / "run", checkpoint)
    loaded = load_model(tmp_path / "run")
    assert loaded.chat_template == source
    assert {*loaded.ends, loaded.tokenizer.end_of_text} >= set(chat.ends)
    theirs = AutoTokenizer.from_pretrained(tmp_path / "run")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "run")
    asked = theirs.apply_chat_template([talk[0]._asdict()], add_generation_prompt=True,
                                       return_tensors="pt", return_dict=True)  # fmt: skip
    with torch.inference_mode():
        ids = model.generate(**asked, max_new_tokens=40, do_sample=False)[0]
    new = ids[asked["input_ids"].shape[1] :].tolist()
    assert new[-1] in chat.ends
    assert theirs.decode(new[:-1], clean_up_tokenization_spaces=False) == answer.text
