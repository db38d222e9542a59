"""A chat in the terminal: what was said, the commands, and the loop that reads and shows.

    talk(ChatSession(model, model.engine(), Sampling(temperature=0.7), reporter=Terminal()))

`ChatSession` knows no terminal; `chat_template.py` makes ids of a conversation.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import json
import sys
from collections.abc import Callable, Generator, Iterator
from itertools import chain
from pathlib import Path

from glassgpt.api import LoadedModel
from glassgpt.config import Sampling
from glassgpt.errors import UserError, explain_os_errors, nearest
from glassgpt.finetuning.conversations import exchanges
from glassgpt.inference.engines import Engine
from glassgpt.inference.generate import stream
from glassgpt.system import Reporter, write_file
from glassgpt.tokenizers.chat_template import Chat, Said
from glassgpt.tokenizers.tokenizer import unknown_note

_THOUGHT = "</think>"
_ROLES = ("system", "user", "assistant")


class ChatSession:
    """A conversation with a model. A base model, which has no template, continues the text."""

    def __init__(
        self,
        model: LoadedModel,
        engine: Engine,
        how: Sampling,
        *,
        system: str | None = None,
        reporter: Reporter,
    ) -> None:
        """`reporter` is told what the session itself has to tell, a line or several."""
        self.model, self.engine, self.how, self.reporter = model, engine, how, reporter
        template = model.checkpoint.chat_template
        self.chat = None if template is None else Chat(template, model.tokenizer)
        ends = self.chat.ends if self.chat else ()
        self.ends = {*ends, *model.checkpoint.ends}
        self.turns: list[Said] = []
        self.over = False
        self._answers = 0  # each is drawn with a seed of its own
        self._forgotten = 0  # the oldest exchanges, for which the context has no room
        if system is not None:
            self.do_system(system)

    def greeting(self, name: str) -> str:
        """What to know before the first message."""
        config = self.model.config
        facts = (
            f"{name}: {config.n_parameters:,} parameters, a context of "
            f"{config.context_length} tokens; /help says what can be done"
        )
        if self.chat:
            return facts
        return (
            f"{facts}\nThis model was not finetuned on conversations (it has no chat "
            "template): it continues your text."
        )

    def reply(self, line: str) -> Generator[str, None, None]:
        """The answer to a message, piece by piece, or what a command gives.

        What was said stays, even where nobody listens to its end. Raises `UserError`.
        """
        if not line.startswith("/"):
            yield from self._answer(line)
            return
        name, _, rest = line[1:].partition(" ")
        command = COMMANDS.get(name)
        if command is None:
            raise UserError(
                f"no command /{name}.{nearest(name, COMMANDS)} /help lists them; a "
                "message may begin with a blank and a slash"
            )
        if (told := command(self, rest.strip())) is not None:
            yield from told

    # -- answering -------------------------------------------------------------------------------

    def _answer(self, message: str) -> Iterator[str]:
        if note := unknown_note(self.model.tokenizer, message):
            self.reporter.say(f"note: {note}")
        said, reason = "", None
        self.turns.append(Said("user", message))
        try:
            how = dataclasses.replace(self.how, seed=(self.how.seed + self._answers) % (1 << 63))
            self._answers += 1
            prompt = self._prompt()
            for piece in stream(self.engine, self.model.tokenizer, [prompt], how, self.ends):
                said, reason = said + piece.text, piece.finish_reason
                yield piece.text
        finally:
            if said or reason:
                self.turns.append(Said("assistant", said))
            else:
                self.turns.pop()
        if self.chat and reason == "length":
            self.reporter.say(
                f"[stopped after {how.max_new_tokens} tokens; for more: /set max_new_tokens "
                f"{2 * how.max_new_tokens}]"
            )

    def _prompt(self) -> list[int]:
        """What the model sees: the newest exchanges that leave room for an answer, behind the
        system's turn. For a base model, the text so far, a message on a line of its own."""
        if self.chat is None:
            lines = (
                "\n" * (t.role == "user" and i > 0) + t.content for i, t in enumerate(self.turns)
            )
            return self.model.tokenizer.encode("".join(lines), special=True)
        context = self.model.config.context_length
        room = context - min(self.how.max_new_tokens, context // 2)
        opening, asked = exchanges(self._remembered())
        known = self._forgotten
        for first in range(min(known, len(asked) - 1), len(asked)):
            ids = self.chat.prompt([*opening, *chain.from_iterable(asked[first:])])
            self._forgotten = first
            if len(ids) <= room:
                break
        if self._forgotten and not known:
            self.reporter.say(
                f"[the context of {context} tokens is full: from now on the model no longer "
                "sees the oldest messages]"
            )
        if len(ids) > context:
            self.reporter.say(
                f"[this message is longer than the context of {context} tokens: the model "
                "sees its end only]"
            )
        return ids

    def _remembered(self) -> list[Said]:
        """Models that think aloud (Qwen3) get their answers back without the thoughts: so their
        templates want it."""
        if self.chat is None or _THOUGHT not in self.chat.template:
            return self.turns
        return [
            Said(role, content.rpartition(_THOUGHT)[2] if role == "assistant" else content)
            for role, content in self.turns
        ]

    # -- commands: the first line of each docstring is its help ------------------------------------

    def do_help(self, rest: str) -> None:
        """/help                  this list"""
        lines = [(command.__doc__ or "").strip() for command in COMMANDS.values()]
        self.reporter.say(
            "\n".join(
                [
                    *lines,
                    'A line that ends with \\ goes on; """ begins and ends several '
                    "lines; Ctrl-C stops an answer.",
                ]
            )
        )

    def do_reset(self, rest: str) -> None:
        """/reset                 forget what was said, but for the system's words"""
        self._forgotten, self.turns = 0, [turn for turn in self.turns if turn.role == "system"]
        self.reporter.say("[nothing was said]")

    def do_undo(self, rest: str) -> None:
        """/undo                  take the last message and its answer back"""
        self.reporter.say(f"[taken back: {self._take_back()}]")

    def do_retry(self, rest: str) -> Iterator[str]:
        """/retry                 another answer to the last message"""
        return self._answer(self._take_back())

    def do_system(self, rest: str) -> None:
        """/system TEXT           what the model is told before everything else [nothing]"""
        if self.chat is None:
            raise UserError(
                "this model was not finetuned on conversations and has no chat "
                "template: nothing can be told to it as the system"
            )
        others = [turn for turn in self.turns if turn.role != "system"]
        self.turns = [Said("system", rest), *others] if rest else others

    def do_set(self, rest: str) -> None:
        """/set temperature 0.7   how answers are drawn; alone, it shows all that can be set"""
        values = {
            name: value
            for name, value in dataclasses.asdict(self.how).items()
            if name != "num_samples"
        }
        name, _, text = rest.partition(" ")
        if not name:
            self.reporter.say(
                "\n".join(f"{name:20} {json.dumps(value)}" for name, value in values.items())
            )
            return
        if name not in values:
            raise UserError(f"no option {name!r}.{nearest(name, values)} /set shows all")
        try:
            value = json.loads(text)
        except (ValueError, RecursionError):
            value = text.strip()  # words need no quotes
        self.how = dataclasses.replace(self.how, **{name: value})
        self.reporter.say(f"[{name} is {json.dumps(getattr(self.how, name))}]")

    def do_save(self, rest: str) -> None:
        """/save FILE             keep the conversation (OpenAI's messages, as `finetune` reads)"""
        path = _path(rest)
        if path.exists():
            read_messages(path)  # only another conversation is replaced
        messages = [turn._asdict() for turn in self.turns]
        text = json.dumps({"messages": messages}, ensure_ascii=False) + "\n"
        write_file(path, text.encode("utf-8", "replace"))
        self.reporter.say(f"[{len(messages)} messages in {path}]")

    def do_load(self, rest: str) -> None:
        """/load FILE             go on with one that was kept"""
        self._forgotten, self.turns = 0, read_messages(_path(rest))
        self.reporter.say(f"[{len(self.turns)} messages]")

    def do_quit(self, rest: str) -> None:
        """/quit                  leave; so do Ctrl-C and Ctrl-D"""
        self.over = True

    def _take_back(self) -> str:
        """The last message, which with its answer is no longer said."""
        asked = [i for i, turn in enumerate(self.turns) if turn.role == "user"]
        if not asked:
            raise UserError("nothing was said yet")
        message = self.turns[asked[-1]].content
        self.turns = self.turns[: asked[-1]]
        return message


Command = Callable[[ChatSession, str], Iterator[str] | None]
COMMANDS: dict[str, Command] = {
    name.removeprefix("do_"): command
    for name, command in vars(ChatSession).items()
    if name.startswith("do_")
}


def _path(text: str) -> Path:
    if not text:
        raise UserError("name a file, as in /save talk.json")
    return Path(text).expanduser()


def read_messages(path: Path) -> list[Said]:
    """A conversation as OpenAI's API takes it: {"messages": [{"role": ..., "content": ...}, ...]},
    or the list alone. Raises `UserError` for anything else."""
    with explain_os_errors(f"read {path}"):
        raw = path.read_bytes()
    try:
        found = json.loads(raw)
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is no conversation: {error}") from error
    found = found.get("messages") if isinstance(found, dict) else found
    if not isinstance(found, list):
        raise UserError(f'{path} is no conversation: it has no list of "messages"')
    for number, one in enumerate(found, 1):
        known = isinstance(one, dict) and one.get("role") in _ROLES
        if not known or not isinstance(one.get("content"), str):
            raise UserError(
                f"{path}: message {number} needs a role ({', '.join(_ROLES)}) and a "
                "content, which is text"
            )
    return [Said(one["role"], one["content"]) for one in found]


# -- the terminal ----------------------------------------------------------------------------------


def talk(session: ChatSession) -> None:
    """Read, answer, show, until there is nothing more to read; from a pipe without prompts."""
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="replace")
    terminal = sys.stdin.isatty() and sys.stdout.isatty()
    if terminal:
        with contextlib.suppress(ImportError):
            import readline  # noqa: F401  (from now on `input` has a history)
    while not session.over:
        try:
            message = read_message(input if terminal else _next_line)
        except (EOFError, KeyboardInterrupt):
            if terminal:
                print()
            return
        if message.strip():
            _show(session, message, terminal)


def _show(session: ChatSession, message: str, terminal: bool) -> None:
    said = False
    try:
        with contextlib.closing(session.reply(message)) as pieces:
            for text in pieces:
                print(text, end="", flush=True)
                said = True
    except UserError as error:
        session.reporter.say(" ".join(str(error).split()))
    except KeyboardInterrupt:
        session.reporter.say(" [stopped]")
    if said:
        print("\n" if terminal else "", flush=True)


def _next_line(prompt: str) -> str:
    """As `input` does it, from a pipe."""
    line = sys.stdin.readline()
    if not line:
        raise EOFError
    return line.removesuffix("\n").removesuffix("\r")


def read_message(read: Callable[[str], str]) -> str:
    r"""One message: a line, several that end with \, or what stands between two triple quotes.

    `read` shows a prompt and gives a line. Raises EOFError where there is none.
    """
    lines = [read("> ")]
    quoted = lines[0].startswith('"""')
    if quoted:
        lines[0] = lines[0][3:]
    while not lines[-1].rstrip().endswith('"""') if quoted else lines[-1].endswith("\\"):
        if not quoted:
            lines[-1] = lines[-1][:-1]
        try:
            lines.append(read(". "))
        except EOFError:  # what is there counts
            break
    text = "\n".join(lines)
    if not quoted:
        return text
    text = text.rstrip().removesuffix('"""').strip("\n")
    return " " * text.startswith("/") + text  # what stands in quotes is no command
