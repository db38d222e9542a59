"""The chat without a terminal: what the model sees, every command, what stays after Ctrl-C."""

from __future__ import annotations

import io
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from chat_templates import TEMPLATES, TOKENS
from conftest import tiny_config, tiny_model, weights_of
from glassgpt.api import LoadedModel
from glassgpt.checkpoints.run_directory import Checkpoint
from glassgpt.cli.chat_session import ChatSession, Said, read_message, read_messages, talk
from glassgpt.config import ModelConfig, Sampling
from glassgpt.errors import UserError
from glassgpt.system import SILENT
from glassgpt.tokenizers.chat_template import CHATML, HEADINGS
from glassgpt.tokenizers.tokenizer import CharTokenizer, add_tokens
from listener import Listener

LETTERS = "".join(chr(code) for code in range(32, 127) if chr(code) != "~") + "\n"
TOKENIZER = add_tokens(CharTokenizer.from_characters(LETTERS), TOKENS)
END = TOKENIZER.special["<|im_end|>"]


class Speaker:
    """An engine that says beforehand what it will answer; an exception among the ids is raised."""

    name, bytes_per_token = "speaker", 0

    def __init__(self, config: ModelConfig, answers: Sequence[Sequence[Any]]) -> None:
        self.config, self.answers = config, list(answers)
        self.prompts: list[str] = []

    def another(self) -> Speaker:
        return self

    def open(self, n_rows: int) -> None:
        self.left = list(self.answers.pop(0))
        self.prompts.append("")

    def read(self, rows: Sequence[int], tokens: Sequence[np.ndarray], **_: Any) -> np.ndarray:
        self.prompts[-1] = self.prompts[-1] or TOKENIZER.decode(tokens[0].tolist())
        token = self.left.pop(0)
        if isinstance(token, BaseException):
            raise token
        logits = np.zeros((1, self.config.vocab_size), np.float32)
        logits[0, token] = 60.0 if token != BROKEN else np.nan
        return logits

    def rewind(self, row: int, length: int = 0) -> None: ...

    def copy(self, source: int, targets: Sequence[int]) -> None: ...


BROKEN = -1


def says(*parts: Any) -> list[Any]:
    """Texts and ids as the ids of an answer."""
    return [i for part in parts
            for i in (TOKENIZER.encode(part) if isinstance(part, str) else [part])]  # fmt: skip


class Told:
    """A session, what it said itself, and what its model saw."""

    def __init__(self, *answers: Sequence[Any], template: str | None = CHATML, system: Any = None,
                 context_length: int = 500, **options: Any) -> None:  # fmt: skip
        config = tiny_config(vocab_size=TOKENIZER.vocab_size, context_length=context_length)
        checkpoint = Checkpoint(config, {}, TOKENIZER, chat_template=template)
        reporter = Listener()
        self.notes = reporter.said
        self.engine = Speaker(config, answers)
        self.session = ChatSession(LoadedModel(checkpoint, "cpu"), self.engine, Sampling(**options),
                               system=system, reporter=reporter)  # fmt: skip

    def __call__(self, line: str) -> str:
        return "".join(self.session.reply(line))

    @property
    def seen(self) -> str:
        return self.engine.prompts[-1]

    @property
    def contents(self) -> list[str]:
        return [turn.content for turn in self.session.turns]


# -- answering -----------------------------------------------------------------------------------


def test_the_model_sees_the_whole_conversation() -> None:
    told = Told(says("Hello!", END), says("Bye.", END), system="Be nice.")
    assert told("Hi") == "Hello!"
    assert told.seen == ("<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
                         "<|im_start|>assistant\n")  # fmt: skip
    assert told("See you") == "Bye."
    assert told.seen.endswith("assistant\nHello!<|im_end|>\n<|im_start|>user\nSee you<|im_end|>\n"
                              "<|im_start|>assistant\n")  # fmt: skip
    assert told.session.turns == [Said("system", "Be nice."), Said("user", "Hi"),
                                  Said("assistant", "Hello!"), Said("user", "See you"),
                                  Said("assistant", "Bye.")]  # fmt: skip
    assert told.notes == []


def test_a_base_model_continues_the_text() -> None:
    told = Told(says(" a time."), says(" on."), template=None, max_new_tokens=8)
    assert "continues your text" in told.session.greeting("runs/x")
    assert told("Once upon") == " a time."
    told.session.how = Sampling(max_new_tokens=4)
    assert told("And so") == " on."
    assert told.seen == "Once upon a time.\nAnd so"
    assert told.notes == []
    with pytest.raises(UserError, match="no chat template"):
        told("/system Be nice.")
    with pytest.raises(UserError, match="no chat template"):
        Told(template=None, system="Be nice.")


def test_an_answer_that_was_cut_says_so() -> None:
    told = Told(says("and on and on"), max_new_tokens=6)
    assert told("Go") == "and on"
    assert told.notes == ["[stopped after 6 tokens; for more: /set max_new_tokens 12]"]


def test_unknown_characters_are_named() -> None:
    told = Told(says(END))
    assert told("a ~ b") == ""
    assert told.notes == ["note: not in the training text, read as '<unk>': '~'"]
    assert told.contents == ["a ~ b", ""]


def test_the_oldest_messages_make_room() -> None:
    answers = [says(f"answer {i}", END) for i in range(12)]
    told = Told(*answers, system="Be nice.", context_length=300, max_new_tokens=50)
    for i in range(12):
        assert told(f"question {i}") == f"answer {i}"
        assert len(TOKENIZER.encode(told.seen, special=True)) <= 250
        assert told.seen.startswith("<|im_start|>system\nBe nice.<|im_end|>\n<|im_start|>user\n")
    assert "question 0" not in told.seen
    assert "question 10" in told.seen
    assert len(told.notes) == 1
    assert "no longer sees the oldest" in told.notes[0]
    assert len(told.session.turns) == 25  # all are kept, and saved


def test_a_message_longer_than_the_context() -> None:
    told = Told(says("a", END), says("b", END), context_length=60, max_new_tokens=10)
    assert told("x" * 100) == "a"
    assert "sees its end only" in told.notes[0]
    assert told("y") == "b"
    assert "x" not in told.seen


def test_thoughts_are_not_given_back() -> None:
    think, done = TOKENIZER.special["<think>"], TOKENIZER.special["</think>"]
    told = Told(says(think, "hm", done, "Yes.", END), says("No.", END),
                template=TEMPLATES["thinking"])  # fmt: skip
    assert told("Is it?") == "<think>hm</think>Yes."
    assert told("Or not?") == "No."
    assert "assistant\nYes.<|im_end|>" in told.seen
    assert told.contents[1] == "<think>hm</think>Yes."


def test_each_answer_has_a_seed_of_its_own_and_a_session_is_repeatable() -> None:
    config = tiny_config(vocab_size=TOKENIZER.vocab_size, context_length=300)
    model = LoadedModel(Checkpoint(config, weights_of(tiny_model(config)), TOKENIZER,
                                   chat_template=CHATML), "cpu")  # fmt: skip

    def answers() -> list[str]:
        how = Sampling(max_new_tokens=20)
        session = ChatSession(model, model.engine("numpy"), how, reporter=SILENT)
        return ["".join(session.reply(line)) for line in ("Hi", "/retry", "/retry")]

    assert answers() == answers()
    assert len(set(answers())) == 3


# -- Ctrl-C and errors ---------------------------------------------------------------------------


def test_what_was_said_stays_when_an_answer_is_stopped() -> None:
    told = Told(says("Well, ", KeyboardInterrupt()), says(KeyboardInterrupt()), says("ok", END))
    with pytest.raises(KeyboardInterrupt):
        told("Go on")
    assert told.contents == ["Go on", "Well, "]
    with pytest.raises(KeyboardInterrupt):  # before anything was said
        told("And?")
    assert told.contents == ["Go on", "Well, "]
    assert told("Yes?") == "ok"


def test_what_was_said_stays_when_nobody_listens_to_the_end() -> None:
    told = Told(says("one two", END))
    pieces = told.session.reply("Count")
    assert next(pieces) == "o"
    pieces.close()
    assert told.contents == ["Count", "o"]


def test_errors_leave_the_conversation_as_it_was() -> None:
    told = Told(says(BROKEN), says("ok", END), template=TEMPLATES["llama2"])
    with pytest.raises(UserError, match="NaN"):
        told("Hi")
    told.session.turns = [Said("user", "a")]  # a conversation that the template refuses
    with pytest.raises(UserError, match="alternate"):
        told("b")
    assert told.contents == ["a"]


# -- commands ------------------------------------------------------------------------------------


def test_undo_retry_and_reset() -> None:
    told = Told(says("1", END), says("2", END), says("3", END), system="S")
    told("a")
    told("b")
    assert told("/retry") == "3"
    assert told.contents == ["S", "a", "1", "b", "3"]
    assert told("/undo") == ""
    assert told.contents == ["S", "a", "1"]
    told("/undo")
    for command in ("/undo", "/retry"):
        with pytest.raises(UserError, match="nothing was said yet"):
            told(command)
    assert told.contents == ["S"]
    told.session.turns += [Said("user", "a"), Said("assistant", "b")]
    told("/reset")
    assert told.contents == ["S"]


def test_system_changes_what_comes_first() -> None:
    told = Told(says("1", END), says("2", END))
    told("a")
    told("/system Be nice.")
    assert told.session.turns[0] == Said("system", "Be nice.")
    told("b")
    assert told.seen.startswith("<|im_start|>system\nBe nice.")
    told("/system Be rude.")
    told("/system")
    assert [turn.role for turn in told.session.turns] == ["user", "assistant"] * 2


def test_options_are_set_and_checked() -> None:
    told = Told(temperature=0.7)
    for line, name, value in [
        ("/set temperature 0", "temperature", 0.0), ("/set top_k 5", "top_k", 5),
        ("/set top_k none", "top_k", None), ("/set stop ROMEO:", "stop", ("ROMEO:",)),
        ('/set stop ["a", "\\n"]', "stop", ("a", "\n")), ("/set seed  7 ", "seed", 7),
    ]:  # fmt: skip
        assert told(line) == ""
        assert getattr(told.session.how, name) == value
    kept = told.session.how
    for line, message in [
        ("/set temperature -1", "temperature=-1.0 must be 0"),
        ("/set temperature", "of type float"),
        ("/set temperature hot", "temperature='hot' must be of type float"),
        ("/set temprature 1", "Did you mean 'temperature'"), ("/set num_samples 2", "no option"),
        ("/set top_k 1.5", "of type int"), ("/set top_p NaN", "finite"), ("/set seed null", "seed"),
        ("/set top_k " + "9" * 5000, "top_k"), ("/set stop " + "[" * 100_000, "stop"),
    ]:  # fmt: skip
        if "stop" in line:
            told(line)  # brackets are words, too
            continue
        with pytest.raises(UserError, match=message):
            told(line)
        assert told.session.how == kept
    told("/set")
    assert "temperature          0.0" in told.notes[-1]
    assert "num_samples" not in told.notes[-1]


def test_help_names_every_command_and_quit_leaves() -> None:
    told = Told()
    told("/help")
    for command in ("help", "reset", "save FILE", "load FILE", "retry", "undo", "system TEXT",
                    "set temperature 0.7", "quit"):  # fmt: skip
        assert f"/{command} " in told.notes[0]
    assert not told.session.over
    told("/quit")
    assert told.session.over


def test_unknown_commands_are_refused_and_a_blank_makes_a_message() -> None:
    told = Told(says("ok", END))
    with pytest.raises(UserError, match="no command /rety. Did you mean 'retry'"):
        told("/rety")
    for line in ("/", "/etc/passwd", "/do_help", "//"):
        with pytest.raises(UserError, match="no command"):
            told(line)
    assert told(" /retry") == "ok"
    assert told.contents[0] == " /retry"


# -- files ---------------------------------------------------------------------------------------


def test_saved_and_loaded(tmp_path: Path) -> None:
    told = Told(says("Salut \n\n!", END), system='Be "nice".')
    told("Hi é 😀 \ud800")
    told(f"/save {tmp_path / 'a talk.json'}")
    [line] = (tmp_path / "a talk.json").read_text().splitlines()  # as finetune reads them
    messages = json.loads(line)["messages"]
    assert [list(message) for message in messages] == [["role", "content"]] * 3
    assert messages[1] == {"role": "user", "content": "Hi é 😀 ?"}
    other = Told()
    other(f"/load {tmp_path / 'a talk.json'}")
    assert other.contents == ['Be "nice".', "Hi é 😀 ?", "Salut \n\n!"]
    assert other.notes == ["[3 messages]"]
    other(f"/save {tmp_path / 'a talk.json'}")  # another conversation may be replaced


def test_the_list_alone_is_read(tmp_path: Path) -> None:
    (tmp_path / "a").write_text('[{"role": "user", "content": "x", "name": "Ann"}]')
    assert read_messages(tmp_path / "a") == [Said("user", "x")]


@pytest.mark.parametrize(
    "content",
    ["", "{", "3", "null", '{"messages": 3}', '{"message": []}', '["a"]', "[" * 100_000,
     '[{"role": "user"}]', '[{"role": "tool", "content": "x"}]',
     '[{"role": ["user"], "content": "x"}]', '[{"role": "user", "content": ["x"]}]', "\udcff"],
)  # fmt: skip
def test_bad_files_are_refused_and_never_replaced(tmp_path: Path, content: str) -> None:
    path = tmp_path / "x.json"
    path.write_bytes(content.encode("utf-8", "surrogateescape"))
    told = Told()
    told.session.turns = [Said("user", "kept")]
    for command in ("load", "save"):
        with pytest.raises(UserError, match=r"x\.json"):
            told(f"/{command} {path}")
    assert told.contents == ["kept"]
    assert path.read_bytes() == content.encode("utf-8", "surrogateescape")


def test_files_that_cannot_be(tmp_path: Path) -> None:
    told = Told()
    for line in ("/load", "/save"):
        with pytest.raises(UserError, match="name a file"):
            told(line)
        with pytest.raises(UserError, match="that is a folder"):
            told(f"{line} {tmp_path}")
        with pytest.raises(UserError, match="does not exist"):
            told(f"{line} {tmp_path / 'no' / 'x'}")


# -- the loop ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "message"),
    [(["a"], "a"), (["a\\", "b\\", "c"], "a\nb\nc"), (["a\\"], "a"), ([""], ""),
     (['"""', "a", "", '  b"""'], "a\n\n  b"), (['"""a"""'], "a"), (['"""', "a\\", '"""'], "a\\"),
     (['"""a', "b"], "a\nb"), (['"""'], ""), (['say """x"""'], 'say """x"""'),
     (['"""', "/etc", '"""'], " /etc")],
)  # fmt: skip
def test_messages_of_several_lines(lines: list[str], message: str) -> None:
    left = list(lines)

    def read(prompt: str) -> str:
        assert prompt == ("> " if len(left) == len(lines) else ". ")
        if not left:
            raise EOFError
        return left.pop(0)

    assert read_message(read) == message
    assert left == []
    with pytest.raises(EOFError):
        read_message(lambda prompt: (_ for _ in ()).throw(EOFError))


def test_a_pipe_gives_a_message_per_line(monkeypatch, capsys) -> None:
    raw = b"Hi\r\n\n  \n/nonsense\nmore \xff\n/undo\n/quit\nnever\n"
    told = Told(says("Hello!", END), says("One\ntwo", END), template=HEADINGS)
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(raw), encoding="utf-8"))
    end = TOKENIZER.end_of_text
    told.engine.answers = [says("Hello!", end), says("One\ntwo", end)]
    talk(told.session)
    assert capsys.readouterr().out == "Hello!\nOne\ntwo\n"
    assert told.contents == ["Hi", "Hello!"]
    assert told.notes[0].startswith("no command /nonsense")
    assert len(told.engine.prompts) == 2


def test_ctrl_c_stops_the_answer_and_not_the_chat(monkeypatch, capsys) -> None:
    told = Told(says("Well", KeyboardInterrupt()), says("Bye.", END))
    monkeypatch.setattr(sys, "stdin", io.StringIO("a\nb\n"))
    talk(told.session)
    assert capsys.readouterr().out == "Well\nBye.\n"
    assert told.contents == ["a", "Well", "b", "Bye."]
    assert "[stopped]" in told.notes[0]
