"""What can be said of a text before it is prepared: how many tokens, of how many kinds.

    look_at(["book.txt"], DataConfig(tokenizer="char")).train_tokens

Counting characters takes a moment, learning word pieces does not: what would take long is left
unknown, and said to be. Nothing is downloaded, nothing written.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from dataclasses import dataclass

from glassgpt.config import DataConfig
from glassgpt.data import sources
from glassgpt.data.batches import is_prepared, load_data
from glassgpt.data.prepare import data_key
from glassgpt.system import cache_dir
from glassgpt.tokenizers.vocabulary import build_tokenizer

_CHEAP_TO_READ = 1 << 26  # bytes of text
_ASCII = "".join(map(chr, range(32, 127)))  # stands for a text that is not read
_GPT2_TOKENS = 50257  # known without the files


@dataclass(frozen=True)
class Text:
    """What is known of it."""

    vocab_size: int
    train_tokens: int | None
    note: str = ""  # what is not known, and why


def look_at(names: Sequence[str], config: DataConfig) -> Text:
    """Vocabulary and length of prepared data, or of texts as `config` would prepare them.

    Raises `UserError` for data that are damaged, texts that can't be read, unknown tokenizers.
    """
    if len(names) == 1 and is_prepared(names[0]):
        dataset = load_data(names[0])
        return Text(dataset.tokenizer.vocab_size, len(dataset.train))
    if not names:
        return _unread(config, "no text is named")
    if not all(os.path.exists(os.path.expanduser(name)) for name in names):
        return _unread(config, f"{names[0]} is not on this disk")
    inputs = sources.resolve(names)
    if sources.total_bytes(inputs) > _CHEAP_TO_READ:
        return _unread(config, "so much text is not counted before it is prepared")
    every = inputs + (sources.resolve([config.val]) if config.val is not None else [])
    key = data_key([sources.fingerprint(source) for source in every], config)
    if is_prepared(cache_dir() / "data" / key):
        return look_at([str(cache_dir() / "data" / key)], config)
    if config.tokenizer not in ("char", "byte"):
        return _unread(config, "the text is not prepared yet")
    pieces = sources.read_pieces(inputs, text_field=config.text_field)
    content = "".join(piece.text for piece in pieces)
    size = build_tokenizer(config.tokenizer, lambda: iter([content])).vocab_size
    length = len(content) if config.tokenizer == "char" else len(content.encode("utf-8"))
    share = 1.0 if config.val is not None else 1 - config.val_fraction
    return Text(size, min(round(length * share), config.max_tokens or length))


def _unread(config: DataConfig, why: str) -> Text:
    name = config.tokenizer
    if name == "gpt2":
        size = _GPT2_TOKENS
    elif name.startswith("bpe:") and name[4:].isdecimal():
        size = int(name[4:][:9])
    else:
        size = build_tokenizer(name, lambda: iter([_ASCII])).vocab_size
        why += f"; vocabulary of {size} assumed" if name == "char" else ""
    return Text(size, None, f"epochs unknown: {why}")
