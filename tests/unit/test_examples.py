"""Conversations and labelled texts: every format, what is refused and how, and parting them."""

from __future__ import annotations

import csv
import gzip
import io
import json
import lzma
import random
import tracemalloc
import zipfile
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glassgpt.data.examples import (
    Conversation,
    Labelled,
    Turn,
    duplicates,
    overlap,
    read_examples,
    split_examples,
)
from glassgpt.errors import UserError

USER, ASSISTANT, SYSTEM = "user", "assistant", "system"
HELLO = (Turn(USER, "Hi, 你好\n\nthere"), Turn(ASSISTANT, 'Hello, "you" 😀'))
LONGER = (Turn(SYSTEM, "Be brief."), *HELLO, Turn(USER, "Bye"), Turn(ASSISTANT, "Bye!"))


def write(path: Path, content: Any) -> Path:
    """Bytes, text, or JSON lines of a list of records."""
    path.parent.mkdir(parents=True, exist_ok=True)
    if isinstance(content, list):
        content = "\n".join(json.dumps(record) for record in content) + "\n"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def error_of(*names: object, **options: Any) -> str:
    """The message of the UserError that reading ends in; it fits on a line."""
    with pytest.raises(UserError) as caught:
        read_examples([str(name) for name in names], **options)
    message = str(caught.value)
    assert "\n" not in message
    assert len(message) < 400
    return message


def turns_in(*names: object, **options: Any) -> list[tuple[Turn, ...]]:
    found = read_examples([str(name) for name in names], **options)
    return [conversation.turns for conversation in found.conversations]


def messages(turns: tuple[Turn, ...]) -> dict[str, Any]:
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def sharegpt(turns: tuple[Turn, ...]) -> dict[str, Any]:
    names = {USER: "human", ASSISTANT: "gpt", SYSTEM: "system"}
    return {"conversations": [{"from": names[role], "value": text} for role, text in turns]}


def table(records: list[dict[str, Any]], delimiter: str = ",") -> str:
    file = io.StringIO(newline="")
    writer = csv.DictWriter(file, list(records[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(records)
    return file.getvalue()


def parquet(records: list[dict[str, Any]]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), file)
    return file.getvalue()


MADE = {
    "jsonl": lambda records: "\n\n".join(json.dumps(record) for record in records),
    "json": lambda records: json.dumps(records, indent=2, ensure_ascii=False),
    "csv": table,
    "tsv": lambda records: table(records, "\t"),
    "parquet": parquet,
}


# ---- formats ---------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", ["jsonl", "json", "parquet"])
@pytest.mark.parametrize(("format", "made"), [("messages", messages), ("sharegpt", sharegpt)])
def test_chats(format, made, suffix, tmp_path):
    path = write(tmp_path / f"a.{suffix}", MADE[suffix]([made(HELLO), made(LONGER)]))
    found = read_examples([str(path)])
    assert found.format == format
    assert [conversation.turns for conversation in found.items] == [HELLO, LONGER]  # type: ignore
    assert found.left_out == {}
    assert read_examples([str(path)], format=format).items == found.items


def test_roles_go_by_several_names(tmp_path):
    chat = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]
    mixed = [{"role": "human", "content": "Hi"}, {"role": "gpt", "content": "Hello"}]
    path = write(tmp_path / "a.jsonl", [{"conversations": chat}, {"conversations": mixed}])
    assert turns_in(path) == [(Turn(USER, "Hi"), Turn(ASSISTANT, "Hello"))] * 2


@pytest.mark.parametrize("suffix", MADE)
def test_alpaca(suffix, tmp_path):
    records = [
        {"instruction": "Add.", "input": "1 + 1", "output": "2", "system": ""},
        {"instruction": "Say hi.", "input": "", "output": "hi", "system": "Be brief."},
    ]
    path = write(tmp_path / f"a.{suffix}", MADE[suffix](records))
    found = read_examples([str(path)])
    assert found.format == "alpaca"
    assert [conversation.turns for conversation in found.conversations] == [
        (Turn(USER, "Add.\n\n1 + 1"), Turn(ASSISTANT, "2")),
        (Turn(SYSTEM, "Be brief."), Turn(USER, "Say hi."), Turn(ASSISTANT, "hi")),
    ]


def test_what_alpaca_may_leave_out(tmp_path):
    records = [
        {"instruction": "A", "output": "B", "input": None},
        {"instruction": "A", "output": "B"},
    ]
    path = write(tmp_path / "a.jsonl", records)
    assert turns_in(path) == [(Turn(USER, "A"), Turn(ASSISTANT, "B"))] * 2


@pytest.mark.parametrize("suffix", MADE)
@pytest.mark.parametrize(
    ("prompt", "completion"),
    [("prompt", "completion"), ("question", "answer"), ("prompt", "response")],
)
def test_prompts(prompt, completion, suffix, tmp_path):
    asked, answered = HELLO[0].content, HELLO[1].content
    records = [{"id": "7", prompt: asked, completion: answered}]
    path = write(tmp_path / f"a.{suffix}", MADE[suffix](records))
    assert read_examples([str(path)]).format == "prompt"
    assert turns_in(path) == [HELLO]


@pytest.mark.parametrize("suffix", MADE)
def test_named_fields(suffix, tmp_path):
    records = [{"q": "Why?", "a": "Because.", "kind": "short", "prompt": "no", "completion": "no"}]
    path = write(tmp_path / f"a.{suffix}", MADE[suffix](records))
    expected = [(Turn(USER, "Why?"), Turn(ASSISTANT, "Because."))]
    assert turns_in(path, prompt_field="q", completion_field="a") == expected
    found = read_examples([str(path)], text_field="a", label_field="kind")
    assert (found.format, found.items) == (
        "labels",
        [Labelled("Because.", "short", found.labelled[0].where)],
    )
    message = error_of(path, prompt_field="q", completion_field="aa")
    assert "no field 'aa'. Did you mean 'a'? There are: 'q', 'a', 'kind'" in message
    assert "--label-field is for" in error_of(path, prompt_field="q", label_field="kind")
    assert "--label-field is for" in error_of(path, format="messages", label_field="kind")
    assert read_examples([str(path)], text_field="q").format == "text"
    assert "no field 'qq'" in error_of(path, text_field="qq")


@pytest.mark.parametrize("suffix", MADE)
def test_labels(suffix, tmp_path):
    records = [
        {"text": "Good, really", "label": "pos"},
        {"text": 'So "bad"\nit is', "label": "neg"},
    ]
    path = write(tmp_path / f"a.{suffix}", MADE[suffix](records))
    found = read_examples([str(path)])
    assert found.format == "labels"
    assert [(item.text, item.label) for item in found.labelled] == [
        ("Good, really", "pos"),
        ('So "bad"\nit is', "neg"),
    ]
    assert found.conversations == []


def test_labels_are_words(tmp_path):
    labels = ["a", 3, True, False, -1, " b "]
    path = write(tmp_path / "a.jsonl", [{"text": "t", "label": label} for label in labels])
    found = [item.label for item in read_examples([str(path)]).labelled]
    assert found == ["a", "3", "true", "false", "-1", "b"]
    table = write(tmp_path / "a.parquet", parquet([{"sentence": "t", "label": 3}]))
    assert [item.label for item in read_examples([str(table)]).labelled] == ["3"]


DIALOGUE = """\
System: Be brief.
User: Hi
  there

User: again
Assistant:
    code
    more

System: Be long.
User: a:b
Assistant: c
---

User: Once more
Assistant: Yes.<|endoftext|>
User:no space
Assistant: fine
<|endoftext|>
"""


@pytest.mark.parametrize("ends", ["\n", "\r\n"])
def test_dialogues(ends, tmp_path):
    for before in ("", "\n", "---\n", "<|endoftext|>\n"):
        path = write(tmp_path / "a.txt", before + DIALOGUE.replace("\n", ends))
        found = read_examples([str(path)])
        assert found.format == "dialogue"
        assert [conversation.turns for conversation in found.conversations] == [
            (
                Turn(SYSTEM, "Be brief."),
                Turn(USER, "Hi\n  there"),
                Turn(USER, "again"),
                Turn(ASSISTANT, "    code\n    more"),
            ),
            (Turn(SYSTEM, "Be long."), Turn(USER, "a:b"), Turn(ASSISTANT, "c")),
            (Turn(USER, "Once more"), Turn(ASSISTANT, "Yes.")),
            (Turn(USER, "no space"), Turn(ASSISTANT, "fine")),
        ]
        first = 1 + bool(before)
        lines = [c.where.rpartition(" ")[2] for c in found.conversations]
        assert lines == [str(first + n) for n in (0, 9, 14, 16)]


def test_words_that_belong_to_nobody(tmp_path):
    path = write(tmp_path / "a.txt", "User: a\nAssistant: b\n---\nand c\n")
    assert "a.txt, line 4: words before the first User:" in error_of(path)
    assert "'and c'" in error_of(path)


@pytest.mark.parametrize(
    "pack",
    [
        lambda path, data: write(path.with_suffix(".jsonl.gz"), gzip.compress(data)),
        lambda path, data: write(path.with_suffix(".jsonl.xz"), lzma.compress(data)),
        lambda path, data: zipped(path.with_suffix(".zip"), data),
    ],
)
def test_packed_files(pack, tmp_path):
    path = pack(tmp_path / "chats", json.dumps(messages(HELLO)).encode())
    found = read_examples([str(path)])
    assert [conversation.turns for conversation in found.conversations] == [HELLO]
    assert found.conversations[0].where.startswith(str(path))
    assert found.conversations[0].where.endswith(", line 1")


def zipped(path: Path, data: bytes) -> Path:
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("LICENSE", "Do what you like.")
        archive.writestr("chats.jsonl", data)
    return path


# ---- which format ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("record", "format"),
    [
        (messages(HELLO) | {"prompt": "p", "completion": "c", "text": "t"}, "messages"),
        ({"text": "t", "label": "l", "prompt": "p", "completion": "c"}, "prompt"),
        ({"text": "t", "label": "l", "instruction": "i", "output": "o"}, "alpaca"),
        ({"text": "t", "label": "l", "id": 3}, "labels"),
        ({"text": "t", "title": "x"}, "text"),
        ({"body": "the only text", "id": 3}, "text"),
    ],
)
def test_formats_have_an_order(record, format, tmp_path):
    assert read_examples([str(write(tmp_path / "a.jsonl", [record]))]).format == format


def test_a_forced_format_wins_where_it_fits(tmp_path):
    record = {"text": "t", "label": "l", "prompt": "p", "completion": "c"}
    path = str(write(tmp_path / "a.jsonl", [record]))
    assert read_examples([path], format="labels").items == [Labelled("t", "l", f"{path}, line 1")]
    assert read_examples([path], format="text").items == []


@pytest.mark.parametrize(
    ("name", "content", "format", "words"),
    [
        ("a.jsonl", [sharegpt(HELLO)], "messages", "in the format sharegpt, not messages"),
        ("a.jsonl", [messages(HELLO)], "dialogue", "in the format messages, not dialogue"),
        ("a.jsonl", [{"text": "t"}], "messages", "plain text, not messages"),
        ("a.csv", "text,label\nt,l\n", "prompt", "in the format labels, not prompt"),
        ("a.txt", "User: a\nAssistant: b", "labels", "in the format dialogue, not labels"),
        ("a.txt", "Once upon a time", "dialogue", "plain text, not dialogue"),
        (
            "a.jsonl",
            [{"mesages": [], "id": 1}],
            "messages",
            "no field 'messages'. Did you mean 'me",
        ),
    ],
)
def test_a_forced_format_that_does_not_fit(name, content, format, words, tmp_path):
    message = error_of(write(tmp_path / name, content), format=format)
    assert words in message
    assert f"{name} is " in message


def test_records_of_no_known_format(tmp_path):
    path = write(tmp_path / "a.jsonl", [{"context": "c", "reply": "r"}])
    message = error_of(path)
    assert "in no known format: its fields are 'context', 'reply'; name yours" in message
    assert "--prompt-field and --completion-field" in message
    assert "no known format" in error_of(write(tmp_path / "b.jsonl", [{"review": "r", "label": 1}]))


def test_several_files_are_of_one_format(tmp_path):
    a = write(tmp_path / "f/a.jsonl", [messages(HELLO)])
    b = write(tmp_path / "f/b.jsonl", [messages(LONGER)])
    c = write(tmp_path / "f/c.csv", "text,label\nt,l\n")
    d = write(tmp_path / "f/README.md", "Chats.")
    assert turns_in(a, b) == [HELLO, LONGER]
    assert f"in the format labels, not messages like {a}; finetune on one" in error_of(a, b, c)
    assert f"{d} is plain text, not messages like {a}" in error_of(d, a)
    found = read_examples([str(tmp_path / "f")])  # what nobody named is skipped
    assert [conversation.turns for conversation in found.conversations] == [HELLO, LONGER]
    assert found.skipped == [
        f"{c}: in the format labels, not messages like {a}",
        f"{d}: plain text, not messages like {a}",
    ]
    assert "there is nothing to learn from in it" in error_of(tmp_path / "f", format="alpaca")


def test_a_folder_of_text_with_a_table_beside_it_is_text(tmp_path):
    write(tmp_path / "f/titles.csv", "title,author\nEmma,Austen\n")
    write(tmp_path / "f/emma.txt", "Emma Woodhouse, handsome, clever, and rich")
    found = read_examples([str(tmp_path / "f")])
    assert (found.format, found.items) == ("text", [])
    assert len(found.skipped) == 1


def test_plain_text_waits_for_what_comes_after_it(tmp_path):
    def folder(n_texts: int) -> str:
        for i in range(n_texts):
            write(tmp_path / f"{n_texts}/{i:02}.txt", "Once upon a time")
        write(tmp_path / f"{n_texts}/last.txt", "User: a\nAssistant: b")
        return str(tmp_path / str(n_texts))

    found = read_examples([folder(15)])
    assert (found.format, len(found.items), len(found.skipped)) == ("dialogue", 1, 15)
    assert found.skipped[0] == f"{tmp_path}/15/00.txt: plain text"
    assert read_examples([folder(16)]).format == "text"


def test_a_huge_text_is_not_read_to_see_that_it_is_one(tmp_path):
    path = write(tmp_path / "a.txt.gz", gzip.compress(b"Once upon a time\n" * (4 << 20), 1))
    tracemalloc.start()
    assert read_examples([str(path)]).format == "text"
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 << 20
    cut = write(tmp_path / "b.txt.gz", path.read_bytes()[:-100])  # the damage is never reached
    assert read_examples([str(cut)]).format == "text"


def test_names_that_lead_to_nothing(tmp_path):
    assert "does not exist" in error_of(tmp_path / "no.jsonl")
    assert "is empty" in error_of(write(tmp_path / "a.jsonl", ""))
    for name, content in {"b.jsonl": "\n\n", "c.json": "[]", "d.csv": "text,label\n"}.items():
        assert f"{name}: there is no text in it" in error_of(write(tmp_path / name, content))


# ---- bad input -------------------------------------------------------------------------------

GOOD = json.dumps(messages(HELLO))


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"messages": [', "not JSON"),
        ("User: hi", "not JSON (Expecting value): 'User: hi'"),
        ("[1, 2]", "not a JSON object"),
        (
            '{"mesages": [], "id": 1}',
            "no field 'messages'. Did you mean 'mesages'? There are: 'mesag",
        ),
        ('{"messages": "hi"}', "field 'messages' holds no list of turns: \"hi\""),
        ('{"messages": null}', "holds no list of turns: null"),
        ('{"messages": ["hi"]}', 'turn 1: not an object with role and content: "hi"'),
        ('{"messages": [{"role": "user", "text": "x"}]}', "turn 1: no field 'content'. There are:"),
        ('{"messages": [{"content": "x"}]}', "turn 1: no field 'role'"),
        (
            '{"messages": [{"role": "usr", "content": "x"}]}',
            "unknown role 'usr'. Did you mean 'user'?",
        ),
        ('{"messages": [{"role": "tool", "content": "x"}]}', "Known are system, user, assistant"),
        ('{"messages": [{"role": "user", "content": null}]}', "'content' holds no text: null"),
        ('{"messages": [{"role": "user", "content": [{"type": "text"}]}]}', "holds no text: [{"),
        ('{"messages": [{"role": "user", "content": "\\ud83d!"}]}', "\\ud83d is half a character"),
    ],
)
@pytest.mark.parametrize("before", [1, 20])
def test_bad_chats_are_shown_with_their_line(line, words, before, tmp_path):
    path = write(tmp_path / "a.jsonl", "\n".join([*[GOOD] * before, line, GOOD]))
    message = error_of(path)
    assert message.startswith(f"{path}, line {before + 1}")
    assert words in message


def test_bad_json_arrays(tmp_path):
    path = write(tmp_path / "a.json", '[{"text": "a", "label": 1},\n {"text": }]')
    assert "a.json, line 2, column 11: not a JSON array of records (Expecting value" in error_of(
        path
    )
    path = write(tmp_path / "b.json", '[{"text": "a", "label": 1}, 3]')
    assert "b.json, record 2: not a JSON object with fields: 3" in error_of(path)
    path = write(tmp_path / "c.json", '[{"text": "a\\ud83d", "label": 1}]')
    assert "c.json, record 1: \\ud83d is half a character" in error_of(path)
    path = write(tmp_path / "d.json", json.dumps({"text": "lines", "label": 1}) + "\n")
    assert read_examples([str(path)]).labelled[0].where == f"{path}, line 1"


@pytest.mark.parametrize(
    ("record", "words"),
    [
        ({"text": "b", "label": None}, "field 'label' is null"),
        ({"text": "b", "label": "  "}, "field 'label' is empty"),
        ({"text": "b", "label": 0.5}, "field 'label' holds no class: 0.5"),
        ({"text": "b", "label": ["x"]}, "field 'label' holds no text: [\"x\"]"),
        ({"text": None, "label": "x"}, "field 'text' holds no text: null"),
        ({"text": "b", "lable": "x"}, "no field 'label'. Did you mean 'lable'?"),
    ],
)
def test_bad_labels(record, words, tmp_path):
    path = write(tmp_path / "a.jsonl", [{"text": "a", "label": "x"}, record])
    message = error_of(path)
    assert message.startswith(f"{path}, line 2: ")
    assert words in message


def test_null_labels_in_parquet(tmp_path):
    records = [{"text": "a", "label": 1}, {"text": "b", "label": None}]
    message = error_of(write(tmp_path / "a.parquet", parquet(records)))
    assert "a.parquet, row 2: field 'label' is null" in message


def test_bad_csv(tmp_path):
    lines = ["text,label", 'one,"x"', '"two', 'lines",x', "three,x", '"four,x', "five,x"]
    message = error_of(write(tmp_path / "a.csv", "\n".join(lines)))
    assert "a.csv, line 6: " in message  # where it opens, not where the file ends
    assert "quote" in message
    message = error_of(write(tmp_path / "b.csv", 'text,label\n"one" and two,x\n'))
    assert "b.csv, line 2: " in message
    assert "quote" in message
    message = error_of(write(tmp_path / "c.csv", "text,label\na,x\nWell, no,x\n"))
    assert "c.csv, line 3: 3 cells, 2 in the header" in message
    assert "1 cell, 2 in the header" in error_of(write(tmp_path / "d.csv", "text,label\na\n"))
    assert "'label' is empty" in error_of(write(tmp_path / "e.csv", "text,label\na,x\nb,\n"))
    message = error_of(write(tmp_path / "f.csv", "text,label,text\na,x,b\n"))
    assert "f.csv, line 1: two columns are named 'text'" in message
    assert "separated by ';'" in error_of(write(tmp_path / "g.csv", "text;label\na;x\n"))


def test_the_system_may_stand_beside_the_turns(tmp_path):
    said = [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]
    first = {"conversations": said, "system": "Be kind."}
    own = {"conversations": [{"from": "system", "value": "Be brief."}, *said], "system": "Be kind."}
    blank = {"conversations": said, "system": None}
    path = write(tmp_path / "a.jsonl", [first, own, blank])
    found = read_examples([str(path)]).conversations
    assert [each.turns[0].content for each in found] == ["Be kind.", "Be brief.", "q"]
    assert [len(each.turns) for each in found] == [3, 3, 2]


# ---- left out --------------------------------------------------------------------------------


def test_what_teaches_nothing_is_left_out_and_counted(tmp_path):
    chats = [
        HELLO,
        (Turn(USER, "Anyone?"),),
        (Turn(USER, "Anyone?"), Turn(ASSISTANT, " \n")),
        (),
        (Turn(USER, ""), Turn(ASSISTANT, "Hm?")),
        (Turn(SYSTEM, "Talk."), Turn(ASSISTANT, "Well"), Turn(USER, "Bye")),
        (Turn(ASSISTANT, "Welcome"), *HELLO),
    ]
    path = write(tmp_path / "a.jsonl", [messages(chat) for chat in chats])
    found = read_examples([str(path)])
    assert [conversation.turns for conversation in found.conversations] == [chats[0], chats[-1]]
    assert found.left_out == {"no assistant turn with text": 3, "empty prompt": 2}
    path = write(tmp_path / "b.csv", 'text,label\na,x\n"",y\n')
    found = read_examples([str(path)])
    assert [item.text for item in found.labelled] == ["a"]
    assert found.left_out == {"empty text": 1}


def test_nothing_to_learn_is_an_error(tmp_path):
    chats = [messages((Turn(USER, "Anyone?"),))] * 3
    message = error_of(write(tmp_path / "a.jsonl", chats))
    assert (
        "a.jsonl: there is nothing to learn from in it (no assistant turn with text: 3)" in message
    )
    assert "no assistant turn" in error_of(write(tmp_path / "a.txt", "User: a\nUser: b\n"))


# ---- training and validation -----------------------------------------------------------------


def said(*words: str) -> list[Conversation]:
    return [
        Conversation((Turn(USER, word), Turn(ASSISTANT, word)), f"line {number}")
        for number, word in enumerate(words, 1)
    ]


def labelled(*pairs: tuple[str, str]) -> list[Labelled]:
    return [Labelled(text, label, f"line {n}") for n, (text, label) in enumerate(pairs, 1)]


@given(
    words=st.lists(st.text(max_size=3), min_size=2, max_size=60),
    fraction=st.floats(0.01, 0.99),
    seed=st.integers(0, 99),
)
def test_splits(words, fraction, seed):
    items = said(*words)
    if len(set(words)) == 1:
        with pytest.raises(UserError, match="no two different examples"):
            split_examples(items, fraction)
        return
    train, val = split_examples(items, fraction)
    assert train
    assert val
    assert sorted([*train, *val], key=items.index) == items
    assert train == sorted(train, key=items.index)  # in their order
    assert overlap(train, val) == 0
    if len(set(words)) == len(words):
        assert len(val) == min(max(1, round(len(words) * fraction)), len(words) - 1)
    shuffled = random.Random(seed).sample(items, len(items))
    again = split_examples(shuffled, fraction)
    for side, other in zip((train, val), again, strict=True):
        assert Counter(side) == Counter(other)


def test_the_share_is_kept_where_copies_allow_it():
    items = said(*["copy"] * 30, *map(str, range(70)))
    train, val = split_examples(items, 0.1)
    assert len(val) == 10
    assert overlap(train, val) == 0
    train, val = split_examples(said(*["a"] * 50, *["b"] * 49), 0.1)  # neither fits
    assert len(val) == 49


def test_every_class_has_its_share():
    sizes = {"many": 100, "some": 10, "two": 2, "one": 1}
    items = labelled(*[(f"{i}", name) for name, size in sizes.items() for i in range(size)])
    random.Random(1).shuffle(items)
    train, val = split_examples(items, 0.2)
    assert Counter(item.label for item in val) == {"many": 20, "some": 2, "two": 1}
    assert Counter(item.label for item in train) == {"many": 80, "some": 8, "two": 1, "one": 1}
    same = labelled(*[("the same", "a")] * 5, ("other", "b"))
    with pytest.raises(UserError, match="of one class"):
        split_examples(same, 0.5)


def test_copies_are_counted():
    items = said("a", "b", "a", "c", "a")
    assert duplicates(items) == 2
    assert overlap(said("a", "b"), said("b", "b", "c")) == 2
    assert duplicates(labelled(("a", "x"), ("a", "y"), ("a", "x"))) == 1
