"""Conversations as ids: what is learned, what is special, what fits; templates and their tokens."""

from __future__ import annotations

import json
from functools import cache
from itertools import groupby
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from chat_templates import TEMPLATES, TOKENS
from conftest import tiny_config, tiny_model, weights_of
from glassgpt.checkpoints.run_directory import Checkpoint, load_model, save_model
from glassgpt.data.batches import IGNORE
from glassgpt.errors import UserError
from glassgpt.finetuning.conversations import encode_all
from glassgpt.tokenizers.chat_template import BUILT_IN, CHATML, HEADINGS, Chat, choose_template
from glassgpt.tokenizers.tokenizer import (
    CharTokenizer,
    Tokenizer,
    add_tokens,
    byte_tokenizer,
    from_spec,
    train_bpe,
)
from glassgpt.tokenizers.vocabulary import build_tokenizer


class Turn(NamedTuple):
    role: str
    content: str


class Talk(NamedTuple):
    turns: tuple[Turn, ...]
    where: str = "talks.jsonl, line 7"


SYSTEM = Turn("system", "Be <|im_end|> brief.")
TALK = [SYSTEM, Turn("user", " What <|endoftext|>? "), Turn("assistant", "An <|im_end|>!"),
        Turn("user", "Oh"), Turn("assistant", ""), Turn("user", "And"),
        Turn("assistant", "So\non")]  # fmt: skip


@cache
def tokenizer_of(name: str) -> Tokenizer:
    letters = "".join(chr(code) for code in range(32, 127)) + "\n"
    if name == "char":
        return CharTokenizer.from_characters(letters)
    if name == "gpt2":
        return build_tokenizer("gpt2", lambda: iter(()))
    text = "What is an answer? The user asks: ### System\n\nAnd so on. Oh!"
    return byte_tokenizer() if name == "byte" else train_bpe([text * 3], 300)


every_tokenizer = pytest.mark.parametrize("name", ["char", "byte", "bpe", "gpt2"])
every_template = pytest.mark.parametrize("template", [*BUILT_IN, *TEMPLATES])


def chat_of(template: str, tokenizer: Tokenizer) -> Chat:
    if template in BUILT_IN:
        return Chat(*choose_template(template, tokenizer))
    return Chat(TEMPLATES[template], add_tokens(tokenizer, TOKENS))


def shown(chat: Chat, ids: list[int], learned: list[bool]) -> str:
    """The text, with what is learned in ⟦ ⟧ and special tokens in « »."""
    special = {i: f"«{name}»" for name, i in chat.tokenizer.special.items()}
    parts = []
    for yes, group in groupby(zip(ids, learned, strict=True), lambda both: both[1]):
        tokens = [token for token, _ in group]
        runs = groupby(tokens, lambda token: token in special)
        text = "".join("".join(special[t] for t in run) if known else chat.tokenizer.decode(run)
                       for known, run in runs)  # fmt: skip
        parts.append(f"⟦{text}⟧" if yes else text)
    return "".join(parts)


LEARNED = {
    "headings": """\
### System:
Be <|im_end|> brief.

### User:
What <|endoftext|>?

### Assistant:
⟦An <|im_end|>!«<|endoftext|>»⟧

### User:
Oh

### Assistant:
⟦«<|endoftext|>»⟧

### User:
And

### Assistant:
⟦So
on«<|endoftext|>»⟧

""",
    "chatml": """\
«<|im_start|>»system
Be <|im_end|> brief.«<|im_end|>»
«<|im_start|>»user
 What <|endoftext|>? «<|im_end|>»
«<|im_start|>»assistant
⟦An <|im_end|>!«<|im_end|>»⟧
«<|im_start|>»user
Oh«<|im_end|>»
«<|im_start|>»assistant
⟦«<|im_end|>»⟧
«<|im_start|>»user
And«<|im_end|>»
«<|im_start|>»assistant
⟦So
on«<|im_end|>»⟧
""",
    "llama3": """\
«<|endoftext|>»«<|start_header_id|>»system«<|end_header_id|>»

Be <|im_end|> brief.«<|eot_id|>»«<|start_header_id|>»user«<|end_header_id|>»

What <|endoftext|>?«<|eot_id|>»«<|start_header_id|>»assistant«<|end_header_id|>»

⟦An <|im_end|>!«<|eot_id|>»⟧«<|start_header_id|>»user«<|end_header_id|>»

Oh«<|eot_id|>»«<|start_header_id|>»assistant«<|end_header_id|>»

⟦«<|eot_id|>»⟧«<|start_header_id|>»user«<|end_header_id|>»

And«<|eot_id|>»«<|start_header_id|>»assistant«<|end_header_id|>»

⟦So
on«<|eot_id|>»⟧""",
    "llama2": """\
«<|endoftext|>»[INST] <<SYS>>
Be <|im_end|> brief.
<</SYS>>

What <|endoftext|>? [/INST]⟦ An <|im_end|>! «<|endoftext|>»⟧\
«<|endoftext|>»[INST] Oh [/INST]⟦  «<|endoftext|>»⟧\
«<|endoftext|>»[INST] And [/INST]⟦ So
on «<|endoftext|>»⟧""",
}
LEARNED["qwen"] = LEARNED["chatml"]
LEARNED["thinking"] = LEARNED["chatml"].replace("⟦So", "⟦«<think>»\n\n«</think>»\n\nSo")


# -- what is learned -----------------------------------------------------------------------------


@pytest.mark.slow
@every_template
@every_tokenizer
def test_the_assistants_words_and_the_token_behind_are_learned(name: str, template: str) -> None:
    chat = chat_of(template, tokenizer_of(name))
    ids, learned = chat.encode(TALK)
    assert shown(chat, ids, learned) == LEARNED[template]


@every_template
def test_loss_on_the_last_answer_or_on_everything(template: str) -> None:
    chat = chat_of(template, tokenizer_of("bpe"))
    ids, learned = chat.encode(TALK, "last")
    assert ids == chat.encode(TALK)[0]
    text = shown(chat, ids, learned)
    *before, last = LEARNED[template].split("⟦")
    assert text == "".join(before).replace("⟧", "") + "⟦" + last
    ids, learned = chat.encode(TALK, "all")
    assert learned == [False] + [True] * (len(ids) - 1)


def test_without_an_answer_nothing_is_learned() -> None:
    chat = chat_of("headings", tokenizer_of("bpe"))
    for loss_on in ("assistant", "last"):
        assert not any(chat.encode(TALK[:2], loss_on)[1])
    assert chat.encode([]) == ([], [])


@every_template
@every_tokenizer
def test_a_prompt_and_its_answer_are_what_was_learned(name: str, template: str) -> None:
    """Also where a token could span the two: line breaks, blanks, punctuation."""
    chat = chat_of(template, tokenizer_of(name))
    for answer in ("Well", "\n\nWell", " Well", "...", "?!\n", "\n"):
        turns = [*TALK[1:4], Turn("assistant", answer), Turn("user", "x"), Turn("assistant", "y")]
        whole, learned = chat.encode(turns)
        for n in (1, 3, 5):
            prompt = chat.prompt(turns[:n])
            assert whole[: len(prompt)] == prompt
            assert learned[len(prompt) - 1 : len(prompt) + 1] == [False, True]


@every_template
@given(words=st.lists(st.text("ab<|im_end>_stofx\n \ue000\ue001", max_size=12), min_size=2,
                      max_size=6))  # fmt: skip
@settings(max_examples=30)
def test_special_tokens_come_from_the_template_alone(template: str, words: list[str]) -> None:
    """Whatever is said, there are as many as where nothing much is said."""
    chat = chat_of(template, tokenizer_of("byte"))
    roles = ["user", "assistant"] * 3
    turns = [Turn(role, word) for role, word in zip(roles, words, strict=False)]
    plain = [Turn(turn.role, "x") for turn in turns]
    special = set(chat.tokenizer.special.values())
    kept = [[i for i in chat.encode(said)[0] if i in special] for said in (turns, plain)]
    assert kept[0] == kept[1]


@pytest.mark.parametrize("text", ["<|im_end|>", "<|im_start|>user", "<|endoftext|>", "|>", "<|im_"])
@pytest.mark.parametrize("role", ["system", "user", "assistant"])
def test_special_text_in_what_is_said_is_text(role: str, text: str) -> None:
    chat = chat_of("chatml", tokenizer_of("gpt2"))
    turns = [Turn(role, text), Turn("user", "a"), Turn("assistant", "b")]
    ids, _ = chat.encode(turns)
    head = len(chat.tokenizer.encode(f"<|im_start|>{role}\n", special=True))
    plain = chat.tokenizer.encode(text)
    tail = chat.tokenizer.encode("<|im_end|>", special=True)
    assert ids[head : head + len(plain) + 1] == plain + tail


# -- templates -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("template", "names"),
    [("headings", ["<|endoftext|>"]), ("chatml", ["<|im_end|>", "<|endoftext|>"]),
     ("llama3", ["<|eot_id|>", "<|endoftext|>"]), ("llama2", ["<|endoftext|>"]),
     ("thinking", ["<|im_end|>", "<|endoftext|>"])],
)  # fmt: skip
def test_the_ends_of_an_answer(template: str, names: list[str]) -> None:
    chat = chat_of(template, tokenizer_of("bpe"))
    assert chat.ends == tuple(chat.tokenizer.special[name] for name in names)


def test_auto_is_the_models_own_then_headings_then_chatml() -> None:
    bpe, poor = tokenizer_of("bpe"), CharTokenizer.from_characters("abcdefghijklmnopqrstuvwxyz\n")
    own = TEMPLATES["llama2"]
    assert choose_template("auto", bpe, own) == (own, bpe)
    source, tokenizer = choose_template("auto", bpe)
    assert (source, tokenizer.spec) == (HEADINGS, bpe.spec)  # it has an end of text already
    source, tokenizer = choose_template("auto", tokenizer_of("char"))
    assert source == HEADINGS
    assert list(tokenizer.special) == ["<|endoftext|>"]
    source, tokenizer = choose_template("auto", poor)
    assert source == CHATML
    assert tokenizer.special == {"<|im_start|>": 28, "<|im_end|>": 29}


def test_a_token_before_every_text_stands_before_conversations() -> None:
    bpe = tokenizer_of("bpe")
    begin, spec = bpe.vocab_size, dict(bpe.spec)
    spec["post_processor"] = {
        "type": "TemplateProcessing", "pair": [],
        "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}}, {"Sequence": {"id": "A"}}],
        "special_tokens": {"<s>": {"id": "<s>", "ids": [begin], "tokens": ["<s>"]}},
    }  # fmt: skip
    tokenizer = add_tokens(from_spec(spec), ["<s>"])
    for name in BUILT_IN:
        ids, _ = chat_of(name, tokenizer).encode(TALK)
        assert (ids[0], ids.count(begin)) == (begin, 1)


def test_a_file_may_hold_the_template(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text("<|begin|>{% for m in messages %}{{ m.role }}:{{ m.content }}{{ eos_token }}"
                    "{% endfor %}")  # fmt: skip
    source, tokenizer = choose_template(str(path), tokenizer_of("char"))
    assert source == path.read_text()
    assert list(tokenizer.special) == ["<|begin|>", "<|endoftext|>"]


@pytest.mark.parametrize(
    ("template", "message"),
    [
        ("{% for %}", "no Jinja: line 1"),
        ("{{ raise_exception('only Klingon') }}", "only Klingon"),
        ("{{ messages + 1 }}", "refuses this"),
        ("{{ ''.__class__.__mro__ }}{{ eos_token }}", "unsafe"),
        ("{% for m in messages %}{{ m.content | upper }}{{ eos_token }}{% endfor %}", "changes"),
        ("{% for m in messages %}{{ m.content[1:] }}{{ eos_token }}{% endfor %}", "changes"),
        ("{% for m in messages %}{{ m.content }} {% endfor %}", "no special token"),
        ("{% for m in messages %}{{ m.content }}!{{ eos_token }}{% endfor %}", "no special token"),
        ("{{ messages | length }}{% for m in messages %}{{ m.content }}{{ eos_token }}{% endfor %}",
         "begin with the prompt"),
    ],
)  # fmt: skip
def test_templates_that_are_refused(template: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "t.jinja").write_text(template)
    with pytest.raises(UserError, match=message):
        choose_template(str(tmp_path / "t.jinja"), tokenizer_of("bpe"))
    with pytest.raises(UserError, match=message):
        choose_template("auto", tokenizer_of("bpe"), template)


def test_a_vocabulary_without_the_characters_is_refused(tmp_path: Path) -> None:
    poor = CharTokenizer.from_characters("abcdef\n")
    with pytest.raises(UserError, match=r"lacks 's' 'y' 't' .* Jinja file"):
        choose_template("auto", poor)
    with pytest.raises(UserError, match="lacks '#' ' ' 'S' 'y' 's' 't' 'm' ':' 'U' 'r'"):
        choose_template("headings", poor)
    with pytest.raises(UserError, match="Did you mean 'headings'"):
        choose_template("heading", poor)
    with pytest.raises(UserError, match="that is a folder"):
        choose_template(str(tmp_path), poor)


# -- many conversations --------------------------------------------------------------------------


def long_talk(n: int, system: bool = True) -> tuple[Turn, ...]:
    turns = [Turn(role, f"{role[0]}{i}") for i in range(n) for role in ("user", "assistant")]
    return (SYSTEM, *turns) if system else tuple(turns)


def test_examples_are_shifted_and_masked() -> None:
    chat = chat_of("chatml", tokenizer_of("bpe"))
    examples, counts = encode_all(chat, [Talk(tuple(TALK))], 1000)
    [(tokens, targets)] = examples
    ids, learned = chat.encode(TALK)
    assert tokens.dtype == targets.dtype == np.int64
    assert tokens.tolist() == ids[:-1]
    expected = [i if yes else IGNORE for i, yes in zip(ids, learned, strict=True)]
    assert targets.tolist() == expected[1:]
    assert vars(counts) == dict(
        conversations=1, cut=0, left_out=0, nothing_learned=0, examples=1, turns=7,
        tokens=len(ids) - 1, learned=sum(learned), longest=len(ids) - 1)  # fmt: skip


def test_what_fits_exactly_is_not_cut() -> None:
    chat = chat_of("headings", tokenizer_of("bpe"))
    n = len(chat.encode(TALK)[0])
    assert encode_all(chat, [Talk(tuple(TALK))], n - 1)[1].cut == 0
    assert encode_all(chat, [Talk(tuple(TALK))], n - 2)[1].cut == 1


@every_template
@pytest.mark.parametrize("system", [True, False])
def test_long_conversations_are_cut_between_exchanges(template: str, system: bool) -> None:
    chat = chat_of(template, tokenizer_of("byte"))
    room = 230
    examples, counts = encode_all(chat, [Talk(long_talk(40, system))], room)
    assert (counts.cut, counts.left_out, counts.examples) == (1, 0, len(examples))
    assert counts.turns == 80 + (len(examples) if system else 0)
    assert counts.longest == max(len(tokens) for tokens, _ in examples) <= room
    text = ""
    for tokens, targets in examples:
        assert len(tokens) <= room
        piece = chat.tokenizer.decode(tokens.tolist())
        assert piece.count("brief") == system
        text += chat.tokenizer.decode(targets[targets != IGNORE].tolist())
    assert all(f"a{i}" in text and f"u{i}" not in text for i in range(40))
    # as few pieces as there can be: the next exchange would not have fitted
    sizes = [len(tokens) for tokens, _ in examples]
    one = len(chat.encode(long_talk(1, system=False))[0])
    assert all(size + one > room for size in sizes[:-1])


def test_an_exchange_that_is_too_long_alone_is_left_out() -> None:
    chat = chat_of("chatml", tokenizer_of("byte"))
    turns = [*long_talk(3), Turn("user", "x" * 500), Turn("assistant", "y"), *long_talk(2, False)]
    examples, counts = encode_all(chat, [Talk(tuple(turns))], 300)
    assert (counts.cut, counts.left_out, counts.examples) == (1, 1, 2)
    assert all(b"xx" not in bytes(t for t in tokens.tolist() if t < 256) for tokens, _ in examples)


def test_with_loss_on_the_last_turn_the_end_stays() -> None:
    chat = chat_of("chatml", tokenizer_of("byte"))
    examples, counts = encode_all(chat, [Talk(long_talk(40))], 230, "last")
    [(tokens, targets)] = examples
    assert chat.tokenizer.decode(targets[targets != IGNORE].tolist()) == "a39<|im_end|>"
    assert chat.tokenizer.decode(tokens.tolist()).count("brief") == 1
    assert 150 < len(tokens) <= 230
    assert (counts.cut, counts.examples) == (1, 1)
    too_long = (*long_talk(2), Turn("user", "x" * 500), Turn("assistant", "y"))
    examples, counts = encode_all(chat, [Talk(too_long)], 230, "last")
    assert (examples, counts.left_out, counts.nothing_learned) == ([], 1, 1)


def test_conversations_without_an_answer_are_left_out() -> None:
    chat = chat_of("chatml", tokenizer_of("byte"))
    talks = [Talk((SYSTEM,)), Talk((SYSTEM, Turn("user", "a"))), Talk(()), Talk(long_talk(1)),
             Talk((Turn("user", "a" * 999),))]  # fmt: skip
    examples, counts = encode_all(chat, talks, 200)
    assert (len(examples), counts.conversations, counts.nothing_learned) == (1, 5, 4)


@pytest.mark.slow
def test_an_endless_conversation_is_no_problem() -> None:
    chat = chat_of("headings", tokenizer_of("byte"))
    examples, counts = encode_all(chat, [Talk(long_talk(3000))], 400)
    assert counts.turns == 6000 + len(examples)


def test_what_the_template_refuses_is_named_with_its_place() -> None:
    chat = chat_of("llama2", tokenizer_of("byte"))
    with pytest.raises(UserError, match=r"^talks.jsonl, line 7: .*alternate"):
        encode_all(chat, [Talk((Turn("assistant", "a"), Turn("user", "b")))], 200)


@given(lengths=st.lists(st.integers(0, 80), min_size=1, max_size=12), room=st.integers(20, 200))
@settings(max_examples=50)
def test_every_answer_is_learned_once_or_left_out(lengths: list[int], room: int) -> None:
    chat = chat_of("chatml", tokenizer_of("byte"))
    turns = [t for n in lengths for t in (Turn("user", "u"), Turn("assistant", "y" * n))]
    examples, counts = encode_all(chat, [Talk(tuple(turns))], room)
    end = chat.ends[0]
    learned = sum((targets == end).sum() for _, targets in examples)
    assert learned + counts.left_out == len(lengths)
    assert all(len(tokens) <= room for tokens, _ in examples)


# -- files ---------------------------------------------------------------------------------------


ENDS = add_tokens(tokenizer_of("char"), ["<|endoftext|>", "<|im_end|>", "<|eot_id|>"])


def saved(folder: Path, **fields: Any) -> Path:
    config = tiny_config(vocab_size=ENDS.vocab_size)
    save_model(folder, Checkpoint(config, weights_of(tiny_model(config)), ENDS, **fields))
    return folder


def change(file: Path, **values: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | values))


def test_a_checkpoint_keeps_its_template_and_ends(tmp_path: Path) -> None:
    ends = ENDS.special["<|im_end|>"], ENDS.special["<|eot_id|>"]
    folder = saved(tmp_path, chat_template=CHATML, ends=ends)
    loaded = load_model(folder)
    assert loaded.chat_template == CHATML
    assert loaded.ends == ends
    config = json.loads((folder / "config.json").read_text())
    assert config["eos_token_id"] == [loaded.tokenizer.end_of_text, *ends]
    generation = json.loads((folder / "generation_config.json").read_text())
    assert generation["eos_token_id"] == config["eos_token_id"]


def test_without_a_template_nothing_changes(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    loaded = load_model(folder)
    assert (loaded.chat_template, loaded.ends) == (None, ())
    assert "chat_template" not in json.loads((folder / "tokenizer_config.json").read_text())
    end = loaded.tokenizer.end_of_text
    assert json.loads((folder / "config.json").read_text())["eos_token_id"] == end


def test_templates_as_others_store_them(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    settings_file = folder / "tokenizer_config.json"
    several = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": CHATML}]
    change(settings_file, chat_template=several)
    assert load_model(folder).chat_template == CHATML
    change(settings_file, chat_template=several[:1])
    assert load_model(folder).chat_template is None
    (folder / "chat_template.jinja").write_text(HEADINGS)
    assert load_model(folder).chat_template == HEADINGS
    settings_file.unlink()
    assert load_model(folder).chat_template == HEADINGS


def test_another_end_of_text_of_theirs_stays_the_templates(tmp_path: Path) -> None:
    """SmolLM2-Instruct calls <|im_end|> its eos_token."""
    folder = saved(tmp_path / "a")
    change(folder / "tokenizer_config.json", chat_template=HEADINGS,
           eos_token={"content": "<|im_end|>"}, bos_token=None)  # fmt: skip
    loaded = load_model(folder)
    chat = Chat(loaded.chat_template or "", loaded.tokenizer)
    assert chat.ends[0] == loaded.tokenizer.special["<|im_end|>"]
    plain = Chat(HEADINGS, loaded.tokenizer)
    told = chat.tokenizer.decode(chat.encode(TALK)[0])
    assert told == plain.tokenizer.decode(plain.encode(TALK)[0]).replace(
        "<|endoftext|>\n", "<|im_end|>\n")  # fmt: skip
    again = load_model(saved(tmp_path / "b", chat_template=loaded.chat_template))
    assert again.chat_template == loaded.chat_template


@pytest.mark.parametrize("ends", [2, [2, 5], None, "</s>", [None], {}, [10**9], 10**30, [[1]]])
def test_ends_that_nobody_meant(tmp_path: Path, ends: Any) -> None:
    folder = saved(tmp_path)
    change(folder / "generation_config.json", eos_token_id=ends)
    assert load_model(folder).ends == ()


def test_damaged_settings_are_refused(tmp_path: Path) -> None:
    folder = saved(tmp_path)
    for name in ("tokenizer_config.json", "generation_config.json"):
        kept = (folder / name).read_text()
        (folder / name).write_text("{")
        with pytest.raises(UserError, match=f"{name} is damaged"):
            load_model(folder)
        (folder / name).write_text(kept)
