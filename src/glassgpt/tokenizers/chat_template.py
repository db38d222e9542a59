"""Conversations as token ids: the template that frames them, and which ids the assistant writes.

    template, tokenizer = choose_template("auto", tokenizer, checkpoint.chat_template)
    chat = Chat(template, tokenizer)
    ids, learned = chat.encode(turns)  # to learn from
    ids = chat.prompt(turns)           # to be answered; the answer is over at one of chat.ends

A turn is anything with a `role` (system, user, assistant) and a `content`. Templates are Jinja, as
`transformers` stores and renders them. This room knows no model, no file of examples, no terminal.
"""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Literal, NamedTuple, Protocol

from jinja2 import TemplateError, TemplateSyntaxError
from jinja2.ext import Extension
from jinja2.sandbox import ImmutableSandboxedEnvironment

from glassgpt.errors import UserError, explain_os_errors, nearest
from glassgpt.tokenizers.tokenizer import END_OF_TEXT, Tokenizer, add_tokens, either, named_tokens
from glassgpt.tokenizers.tokenizer_json import tokens_before

# Headings are plain text: any model that has seen Markdown needs no token that it never saw.
HEADINGS = """\
{% for message in messages %}### {{ message['role'] | capitalize }}:
{{ message['content'] | trim }}{{ eos_token if message['role'] == 'assistant' }}

{% endfor %}{% if add_generation_prompt %}### Assistant:
{% endif %}"""
CHATML = """\
{% for message in messages %}<|im_start|>{{ message['role'] }}
{{ message['content'] }}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
BUILT_IN = {"headings": HEADINGS, "chatml": CHATML}
LossOn = Literal["assistant", "last", "all"]
_REMEDY = "finetune with another --template (headings, chatml, or a Jinja file)"


class Message(Protocol):
    """One turn; a dataclass or a named tuple will do."""

    @property
    def role(self) -> str: ...
    @property
    def content(self) -> str: ...


class Said(NamedTuple):
    role: str
    content: str


class _Layout(NamedTuple):
    """What is what in a rendering; a span is (first character, one behind the last)."""

    text: str
    special: dict[tuple[int, int], int]  # the template's own special tokens: span -> id
    answers: list[tuple[int, int]]  # spans that the assistant writes, with the token at their end
    framing: str  # what the template adds, without the special tokens


class Chat:
    """A template and a tokenizer that belong together."""

    def __init__(self, template: str, tokenizer: Tokenizer) -> None:
        """Raises `UserError` for a template that is no Jinja."""
        self.template, self.tokenizer = template, tokenizer
        self._compiled = _compile(template)
        self._special = re.compile(either(tokenizer.special))
        self._named = named_tokens(tokenizer)

    def encode(
        self, turns: Sequence[Message], loss_on: LossOn = "assistant"
    ) -> tuple[list[int], list[bool]]:
        """Ids, and of each whether it is to be learned: the assistant's words and the token that
        ends its turn (of its "last" turn alone; with "all", every id but the first).

        Special tokens count as such where the template writes them; in what people say they are
        plain text. The ids are those that `transformers` gives, but that no token crosses the end
        of a prompt: what is learned is what follows a prompt. Raises `UserError` where the
        template changes what is said, or does not let a conversation begin with its prompts.
        """
        layout = self._layout(turns)
        ids, places = self._encode(layout)
        if loss_on == "all":
            return ids, [number > 0 for number in range(len(ids))]
        answers = layout.answers[-1:] if loss_on == "last" else layout.answers
        return ids, [any(start <= place < stop for start, stop in answers) for place in places]

    def prompt(self, turns: Sequence[Message]) -> list[int]:
        """The ids behind which the assistant's answer begins: as in `encode`, to the last one."""
        return self._encode(self._layout(turns, ask=True))[0]

    @cached_property
    def ends(self) -> tuple[int, ...]:
        """Ids that end an answer: the template's token behind it first, then the end of a text."""
        ids, learned = self.encode([Said("user", "a"), Said("assistant", "b")])
        behind = [token for token, yes in zip(ids, learned, strict=True) if yes][-1]
        end = self.tokenizer.end_of_text
        return (behind,) if end in (behind, None) else (behind, end)

    def unknown(self) -> list[str]:
        """Characters that the template writes itself and the tokenizer has no id for."""
        turns = [Said(role, "a") for role in ("system", "user", "assistant", "user")]
        try:
            layout = self._layout(turns, ask=True)
        except UserError:  # some templates take no system turn
            layout = self._layout(turns[1:], ask=True)
        return self.tokenizer.unknown(layout.framing)

    # -- from turns to text to ids ---------------------------------------------------------------

    def _render(self, turns: Sequence[Message], *, ask: bool = False, mark: str = "") -> str:
        """The text; `mark` is put around what is said, within the blanks that may be trimmed."""

        def marked(content: str) -> str:
            core = content.strip()
            at = content.index(core)
            return content[:at] + mark + core + mark + content[at + len(core) :]

        messages = [{"role": turn.role, "content": marked(turn.content)} for turn in turns]
        try:
            return self._compiled.render(
                messages=messages,
                add_generation_prompt=ask,
                tools=None,
                documents=None,
                **self._named,
            )
        except Exception as error:  # a template is a program, and may run into anything
            raise UserError(f"the chat template refuses this: {error}; {_REMEDY}") from error

    def _layout(self, turns: Sequence[Message], *, ask: bool = False) -> _Layout:
        text = self._render(turns, ask=ask)
        mark = next(chr(code) for code in range(0xE000, 0xF900) if chr(code) not in text)
        parts = self._render(turns, ask=ask, mark=mark).split(mark)
        said = {turn.content.strip() for turn in turns}
        if len(parts) % 2 == 0 or "".join(parts) != text or not said.issuperset(parts[1::2]):
            raise UserError(f"the chat template changes what is said; {_REMEDY}")
        # Every second part is what somebody said; hidden, it holds no special token.
        hidden = "".join(mark * len(p) if i % 2 else p for i, p in enumerate(parts))
        special = {
            found.span(): self.tokenizer.special[found[0]]
            for found in self._special.finditer(hidden)
        }
        edges = list(accumulate(map(len, parts)))
        spans = list(zip(edges[::2], edges[1::2], strict=False))
        answers = [
            self._answer(turns[:number], text, spans, special)
            for number, turn in enumerate(turns)
            if turn.role == "assistant"
        ]
        return _Layout(text, special, answers, self._special.sub("", hidden).replace(mark, ""))

    def _answer(
        self,
        before: Sequence[Message],
        text: str,
        said: list[tuple[int, int]],
        special: dict[tuple[int, int], int],
    ) -> tuple[int, int]:
        """From the end of its prompt, for the model must write whatever the template puts there,
        to the end of the special token behind its words. `said`: spans."""
        asked = self._render(before, ask=True)
        if not text.startswith(asked):
            raise UserError(
                "with this chat template a conversation does not begin with the "
                f"prompt that led to it; {_REMEDY}"
            )
        stop = next((stop for start, stop in said if start >= len(asked)), len(text))
        first, last = next((span for span in special if span[0] >= stop), (len(text), 0))
        if not last or text[stop:first].strip():
            raise UserError(
                "the chat template puts no special token, such as {{ eos_token }}, "
                "behind an answer: nothing would tell the model to stop; " + _REMEDY
            )
        return len(asked), last

    def _encode(self, layout: _Layout) -> tuple[list[int], list[int]]:
        """Ids, and where in the text the piece of each begins. No token crosses the beginning of
        an answer: there a prompt ends, and what the model writes begins."""
        text, special = layout.text, layout.special
        edges = {0, len(text), *(start for start, _ in layout.answers)}.union(*special)
        ids: list[int] = []
        places: list[int] = []
        plain = False
        for start, stop in pairwise(sorted(edges)):
            if (start, stop) in special:
                new, plain = [special[start, stop]], False
            else:
                new = self.tokenizer.encode_array(text[start:stop], continues=plain).tolist()
                plain = True
            ids += new
            places += [start] * len(new)
        return ids, places


# -- choosing a template -------------------------------------------------------------------------


def choose_template(
    name: str, base: Tokenizer, own_template: str | None = None
) -> tuple[str, Tokenizer]:
    """A template by name or path, and the model's tokenizer with the tokens that it needs.

    "auto": the model's own; else headings; else, where characters of those are missing, chatml.
    Raises `UserError` when the template's characters are not in the vocabulary.
    """
    if name == "auto" and own_template is not None:
        Chat(own_template, base).ends  # noqa: B018  (one that can be used?)
        return own_template, base
    # Models that expect a token before every text expect it before a conversation.
    begin = "{{ bos_token }}" if tokens_before(base.spec) else ""
    sources = [begin + source for key, source in BUILT_IN.items() if name in ("auto", key)]
    missing: list[str] = []
    for source in sources or [_read(name)]:
        needed = re.findall(r"<\|\w+\|>", source)
        if base.end_of_text is None and re.search("eos_token|bos_token", source):
            needed.append(END_OF_TEXT)
        tokenizer = add_tokens(base, needed)
        chat = Chat(source, tokenizer)
        missing = chat.unknown()
        if not missing and chat.ends:
            return source, tokenizer
    shown = " ".join(map(repr, missing[:10]))
    raise UserError(
        f"this model's vocabulary of characters lacks {shown}, which the chat template "
        "writes; name a Jinja file that does without, with --template"
    )


def _read(name: str) -> str:
    if not Path(name).exists():
        raise UserError(
            f"no template {name!r}.{nearest(name, BUILT_IN)} Choose auto, "
            f"{', '.join(BUILT_IN)}, or the path of a Jinja file"
        )
    with explain_os_errors(f"read the template {name}"):
        return Path(name).read_bytes().decode("utf-8", "replace")


class _Generation(Extension):
    """{% generation %} marks the assistant's words for `transformers`; the text is the same."""

    tags = {"generation"}

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _compile(template: str):
    """In the environment that `transformers` renders in (utils/chat_template_utils.py)."""

    def refuse(message: str) -> None:
        raise TemplateError(message)

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, "jinja2.ext.loopcontrols"]
    )
    environment.filters["tojson"] = lambda value, **how: json.dumps(
        value, **{"ensure_ascii": False, **how}
    )
    environment.globals["raise_exception"] = refuse
    environment.globals["strftime_now"] = lambda style: datetime.now().strftime(style)
    try:
        return environment.from_string(template)
    except TemplateSyntaxError as error:
        raise UserError(f"the chat template is no Jinja: line {error.lineno}: {error}") from error
