"""Text to token ids and back: characters, bytes, byte-level BPE (GPT-2's, or learned here), others.

    tok = CharTokenizer.from_characters("hello"); tok.decode(tok.encode("hole"))

Every tokenizer *is* a Hugging Face `tokenizer.json` (its `spec`); the classes add a faster way
to encode the same ids, where there is one. This room knows nothing of models, data folders or
downloads.
"""

from __future__ import annotations

import codecs
import hashlib
import json
import re
import unicodedata
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path
from typing import Protocol

import numpy as np

from glassgpt.errors import UserError, explain_os_errors
from glassgpt.tokenizers.tokenizer_json import (
    Spec,
    bpe_pattern,
    byte_alphabet,
    byte_level,
    merge_pair,
    special_tokens,
    tiktoken_can,
    tokenizer_json,
    tokens_before,
    with_tokens,
    without_prepend,
)

END_OF_TEXT = "<|endoftext|>"
UNKNOWN = "<unk>"
_ENDS = (END_OF_TEXT, "<|end_of_text|>", "</s>")  # between texts: GPT-2 and Qwen, Llama 3, Llama 2


class Tokenizer(Protocol):
    """What the rest of the package may ask of any tokenizer."""

    spec: Spec  # the content of tokenizer.json
    special: dict[str, int]  # tokens that no text is read as: name -> id

    @property
    def kind(self) -> str: ...  # "char", "byte" or "bpe"
    @property
    def vocab_size(self) -> int: ...
    @property
    def end_of_text(self) -> int | None: ...  # id of the document separator, where there is one
    @property
    def unknown_token(self) -> str | None: ...  # what characters without an id are read as
    def encode(self, text: str, *, special: bool = False) -> list[int]: ...
    # (n,) uint32; releases the GIL. `continues`: the text goes on within a document.
    def encode_array(self, text: str, *, continues: bool = False) -> np.ndarray: ...
    def decode(self, tokens: Iterable[int]) -> str: ...
    def token_bytes(self, token: int) -> bytes: ...
    def unknown(self, text: str) -> list[str]: ...  # characters it has no id for


class _Spec:
    """What the two kinds share: identity and equality come from the spec alone."""

    def __init__(self, spec: Spec) -> None:
        self.spec, self.special = spec, special_tokens(spec)

    @cached_property
    def _bytes_of(self) -> list[bytes]:
        raise AssertionError("each kind says how ids become bytes")

    @property
    def vocab_size(self) -> int:
        return len(self._bytes_of)

    @property
    def end_of_text(self) -> int | None:
        return next((self.special[name] for name in _ENDS if name in self.special), None)

    @property
    def unknown_token(self) -> str | None:
        return self.spec["model"].get("unk_token")

    def token_bytes(self, token: int) -> bytes:
        return self._bytes_of[token]

    def decode(self, tokens: Iterable[int]) -> str:
        """The text; bytes that are no valid UTF-8 (half a character) become U+FFFD."""
        return b"".join(self._bytes_of[int(t)] for t in tokens).decode("utf-8", "replace")


class CharTokenizer(_Spec):
    """One id per character of the training text, in sorted order; the last id is `<unk>`.

    As tokenizer.json: a WordLevel model over single characters. One that comes from elsewhere
    may have another order, and read unknown characters as a known one, such as a space.
    """

    kind = "char"

    @classmethod
    def from_characters(cls, characters: Iterable[str]) -> CharTokenizer:
        return cls.from_tokens([*sorted(set(characters)), UNKNOWN], UNKNOWN)

    @classmethod
    def from_tokens(cls, tokens: Sequence[str], unknown: str) -> CharTokenizer:
        """Ids are places in `tokens`; `unknown` is the one that all other characters become."""
        vocab = {token: i for i, token in enumerate(tokens)}
        model = {"type": "WordLevel", "vocab": vocab, "unk_token": unknown}
        split = {
            "type": "Split",
            "pattern": {"Regex": r"[\s\S]"},
            "behavior": "Isolated",
            "invert": False,
        }
        return cls(tokenizer_json(model, split, {"type": "Fuse"}))

    @cached_property
    def _bytes_of(self) -> list[bytes]:
        ids = self.spec["model"]["vocab"] | self.special
        return [token.encode("utf-8", "replace") for token in sorted(ids, key=ids.__getitem__)]

    @cached_property
    def _table(self) -> np.ndarray:
        """Code point -> id; 4.4 MB, so that encoding is one NumPy look-up."""
        vocab = self.spec["model"]["vocab"]
        table = np.full(0x110000, vocab[self.unknown_token], dtype=np.uint32)
        for char, i in vocab.items():
            if len(char) == 1:
                table[ord(char)] = i
        return table

    def check(self) -> None:
        """Raises `UserError` for a vocabulary that can't be one."""
        vocab, unknown = self.spec["model"]["vocab"], self.unknown_token
        ids = vocab | self.special
        if sorted(ids.values()) != list(range(len(ids))) or unknown not in vocab:
            raise UserError(
                f"tokenizer.json is damaged: its ids are not 0, 1, 2, ... or without "
                f"that of its unk_token {unknown!r}"
            )

    def encode_array(self, text: str, *, continues: bool = False) -> np.ndarray:
        points = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")
        return self._table[points]

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        if not special or not self.special:
            return self.encode_array(text).tolist()
        ids = tokens_before(self.spec)
        for part in re.split(f"({either(self.special)})", text):
            known = self.special.get(part)
            ids += self.encode_array(part).tolist() if known is None else [known]
        return ids

    def unknown(self, text: str) -> list[str]:
        vocab = self.spec["model"]["vocab"]
        return [char for char in dict.fromkeys(text) if char not in vocab]


class BPETokenizer(_Spec):
    """Byte-level byte-pair encoding; with no merges at all it is the byte tokenizer.

    Reads tokenizer.json as GPT-2, Llama 3 and Qwen have it; encodes with tiktoken.
    """

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        self._pattern = bpe_pattern(spec)
        self._nfc = spec.get("normalizer") is not None  # tiktoken_can allows no other

    def check(self) -> None:
        """Raises `UserError` for a vocabulary that can't be one, before tiktoken panics."""
        ids = list(self.spec["model"]["vocab"].values())
        if min(ids) < 0 or len(set(ids)) < len(ids):
            raise UserError("tokenizer.json is damaged: ids below 0, or one for two tokens")
        if not {bytes([b]) for b in range(256)} <= set(self._bytes_of):
            raise UserError("tokenizer.json is damaged: not every byte has an id")
        for merge in self.spec["model"]["merges"]:
            if "".join(merge_pair(merge)) not in self.spec["model"]["vocab"]:
                raise UserError(f"tokenizer.json is damaged: merge {merge} makes no token")
        self._encoding  # noqa: B018  (the pattern, too, must be one)

    @property
    def kind(self) -> str:
        return "bpe" if self.spec["model"]["merges"] else "byte"

    @cached_property
    def _bytes_of(self) -> list[bytes]:
        alphabet = {char: byte for byte, char in enumerate(byte_alphabet())}
        tokens = {
            i: bytes(alphabet[char] for char in token)
            for token, i in self.spec["model"]["vocab"].items()
            if token not in self.special
        }
        tokens |= {i: token.encode() for token, i in self.special.items()}
        return [tokens.get(i, b"") for i in range(max(tokens) + 1)]

    @cached_property
    def _encoding(self):
        import tiktoken

        ranks = {
            self._bytes_of[i]: i
            for token, i in self.spec["model"]["vocab"].items()
            if token not in self.special
        }
        return tiktoken.Encoding(
            "glassgpt", pat_str=self._pattern, mergeable_ranks=ranks, special_tokens=self.special
        )

    def encode_array(self, text: str, *, continues: bool = False) -> np.ndarray:
        text = self._normalize(text)
        if self.kind == "byte":
            return np.frombuffer(text.encode(), dtype=np.uint8).astype(np.uint32)
        try:
            return self._encoding.encode_to_numpy(text, disallowed_special=())
        except ValueError:  # a million blanks in a row exhaust the stack of tiktoken's patterns
            halves = text[: len(text) // 2], text[len(text) // 2 :]
            return np.concatenate([self.encode_array(half) for half in halves])

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        """`special=True` is for prompts: "<|endoftext|>" in the text is the one token, and models
        that expect a token before every text (Llama) get it."""
        if not special:
            return self.encode_array(text).tolist()
        before = tokens_before(self.spec)
        try:
            return before + self._encoding.encode(self._normalize(text), allowed_special="all")
        except ValueError:  # as above
            return before + self.encode_array(text).tolist()

    def _normalize(self, text: str) -> str:
        text = unicodedata.normalize("NFC", text) if self._nfc else text
        return _whole_characters(text)

    def unknown(self, text: str) -> list[str]:
        return []  # any text is bytes


class LibraryTokenizer(_Spec):
    """Any other BPE: SentencePiece's (Llama 2, TinyLlama), digits apart (SmolLM2), and so on.

    Encoded by Hugging Face's own library: right by definition, and ten times slower.
    """

    kind = "bpe"

    def __init__(self, spec: Spec) -> None:
        super().__init__(spec)
        from tokenizers import Tokenizer as Library

        try:
            rest = without_prepend(spec)
            self._text, self._prompt, self._rest = (
                Library.from_str(json.dumps(kind)) for kind in (spec, spec, rest)
            )
        except Exception as error:  # the library raises nothing more special
            raise UserError(f"tokenizer.json is damaged: {error}") from error
        for library in (self._text, self._rest):
            library.encode_special_tokens = True  # in ordinary text they are text

    @cached_property
    def _bytes_of(self) -> list[bytes]:
        alphabet = {char: byte for byte, char in enumerate(byte_alphabet())}
        by_bytes = "ByteLevel" in json.dumps(self.spec.get("decoder"))

        def content(token: str) -> bytes:
            if token in self.special:
                return token.encode()
            if by_bytes:
                return bytes(alphabet[char] for char in token)
            if re.fullmatch("<0x[0-9A-F]{2}>", token):  # a byte that no token has
                return bytes([int(token[3:5], 16)])
            return token.replace("\u2581", " ").encode()

        vocab = {i: token for token, i in self._text.get_vocab().items()}
        return [content(vocab[i]) if i in vocab else b"" for i in range(max(vocab) + 1)]

    def encode_array(self, text: str, *, continues: bool = False) -> np.ndarray:
        library = self._rest if continues else self._text
        ids = library.encode(_whole_characters(text), add_special_tokens=False).ids
        return np.array(ids, dtype=np.uint32)

    def encode(self, text: str, *, special: bool = False) -> list[int]:
        if not special:
            return self.encode_array(text).tolist()
        return self._prompt.encode(_whole_characters(text)).ids

    def decode(self, tokens: Iterable[int]) -> str:
        return self._text.decode([int(token) for token in tokens], skip_special_tokens=False)

    def unknown(self, text: str) -> list[str]:
        return []


def either(tokens: Iterable[str]) -> str:
    """A regular expression that finds any of them; of two that begin alike, the longer one."""
    return "|".join(map(re.escape, sorted(tokens, key=len, reverse=True))) or r"(?!)"


def _whole_characters(text: str) -> str:
    """Half a surrogate pair (a bad byte on a command line) is no character of any text."""
    return text if text.isascii() else text.encode("utf-8", "replace").decode()


# -- building ------------------------------------------------------------------------------------


def byte_tokenizer() -> BPETokenizer:
    """256 bytes and `<|endoftext|>`: id and byte value are the same number."""
    vocab = {char: byte for byte, char in enumerate(byte_alphabet())}
    return BPETokenizer(byte_level(vocab, [], end=END_OF_TEXT, use_regex=False))


def gpt2_tokenizer(encoder_json: bytes, vocab_bpe: bytes) -> BPETokenizer:
    """OpenAI's 50,257 tokens, from the two files of the GPT-2 release."""
    try:
        vocab = json.loads(encoder_json)
        if vocab.pop(END_OF_TEXT) != len(vocab):
            raise KeyError(END_OF_TEXT)
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            "the vocabulary is not GPT-2's; with another one a tokenizer.json is needed"
        ) from error
    lines = vocab_bpe.decode("utf-8").split("\n")[1:]  # the first line is a version
    merges = [line.split(" ") for line in lines if line]
    return BPETokenizer(byte_level(vocab, merges, end=END_OF_TEXT, use_regex=True))


_MAX_BPE = 1_000_000  # tokens; no model has as many, and the trainer makes room for all at once


def train_bpe(texts: Iterable[str], vocab_size: int) -> BPETokenizer:
    """Byte-level BPE learned from `texts`: 256 bytes, then merges, `<|endoftext|>` last.

    Small texts may run out of pairs: then the vocabulary is smaller than asked for.
    """
    if vocab_size < 258:
        raise UserError(f"bpe:{vocab_size}: at least 258 (256 bytes, a merge, {END_OF_TEXT})")
    if vocab_size > _MAX_BPE:
        raise UserError(f"bpe:{vocab_size}: at most {_MAX_BPE} tokens can be learned")
    from tokenizers import Tokenizer as Trainee
    from tokenizers import models, pre_tokenizers, trainers

    trainee = Trainee(models.BPE())
    trainee.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # type: ignore
    trainer = trainers.BpeTrainer(  # type: ignore[call-arg]
        vocab_size=vocab_size - 1,
        min_frequency=2,
        initial_alphabet=sorted(byte_alphabet()),
        show_progress=False,
    )
    trainee.train_from_iterator(texts, trainer)
    model = json.loads(trainee.to_str())["model"]
    merges = [merge_pair(merge) for merge in model["merges"]]
    return BPETokenizer(byte_level(model["vocab"], merges, end=END_OF_TEXT, use_regex=True))


# -- files ---------------------------------------------------------------------------------------


def add_tokens(tokenizer: Tokenizer, names: Iterable[str]) -> Tokenizer:
    """The same with special tokens at the end; those that are there already keep their ids."""
    return from_spec(with_tokens(tokenizer.spec, names))


def from_spec(spec: Spec) -> Tokenizer:
    """The tokenizer that a parsed tokenizer.json describes."""
    try:
        kind = spec["model"]["type"]
        if kind == "WordLevel":
            tokenizer = CharTokenizer(spec)
            tokenizer.check()
            return tokenizer
        if kind == "BPE":
            if not tiktoken_can(spec):
                return LibraryTokenizer(spec)
            bpe = BPETokenizer(spec)
            bpe.check()
            return bpe
    except UserError:
        raise
    except (KeyError, TypeError, AttributeError, ValueError, OverflowError) as error:
        raise UserError(f"tokenizer.json is damaged: {error!r}") from error
    raise UserError(f"tokenizer.json: a {kind} tokenizer can't be read; BPE and char can")


def load_tokenizer(path: str | Path) -> Tokenizer:
    """From a tokenizer.json, or a folder that holds one (or GPT-2's vocab.json and merges.txt)."""
    path = Path(path)
    older = path / "vocab.json", path / "merges.txt"
    if not (path / "tokenizer.json").exists() and all(file.exists() for file in older):
        with explain_os_errors(f"read the tokenizer {path}"):
            vocab, merges = (file.read_bytes() for file in older)
        try:
            tokenizer = gpt2_tokenizer(vocab, merges)
            tokenizer.check()
            return tokenizer
        except (ValueError, KeyError) as error:
            raise UserError(f"{older[0]}: {error}") from error
    path = path / "tokenizer.json" if path.is_dir() else path
    with explain_os_errors(f"read the tokenizer {path}"):
        raw = path.read_bytes()
    try:
        spec = json.loads(raw)
        return from_spec(spec)
    except ValueError as error:  # not JSON, not UTF-8, or one of our own errors
        raise UserError(f"{path}: {error}") from error


def to_files(
    tokenizer: Tokenizer, context_length: int | None = None, **more: object
) -> dict[str, bytes]:
    """File name -> content, for `transformers.AutoTokenizer`; `more` stands in its config, too."""
    config: dict[str, object] = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "clean_up_tokenization_spaces": False,
        # transformers 4 would add token types, which GPT-2 takes for tokens.
        "model_input_names": ["input_ids", "attention_mask"],
    }
    if context_length is not None:
        config["model_max_length"] = context_length
    config |= named_tokens(tokenizer)
    return {
        "tokenizer.json": json.dumps(tokenizer.spec, ensure_ascii=False, indent=1).encode("utf-8"),
        "tokenizer_config.json": (json.dumps(config | more, indent=2) + "\n").encode("utf-8"),
    }


class IncrementalDecoder:
    """Turns ids into text as they come, as soon as characters are complete.

    >>> tok = byte_tokenizer(); decoder = IncrementalDecoder(tok)
    >>> [decoder.push(token) for token in tok.encode("é")], decoder.flush()
    (['', 'é'], '')
    """

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes = tokenizer.token_bytes
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")

    def push(self, token: int) -> str:
        """The text that this token completes; "" while a character is incomplete."""
        return self._utf8.decode(self._bytes(token))

    def flush(self) -> str:
        """What is left at the end: U+FFFD for a character that was never completed."""
        return self._utf8.decode(b"", final=True)


def unknown_note(tokenizer: Tokenizer, text: str) -> str | None:
    """What to tell people about characters the model has never seen; None without any."""
    unknown, read_as = tokenizer.unknown(text), tokenizer.unknown_token
    shown = " ".join(repr(char) for char in unknown[:10])
    return f"not in the training text, read as {read_as!r}: {shown}" if unknown else None


def begin_of_text(tokenizer: Tokenizer) -> int | None:
    """The id that stands before every text; where there is none (GPT-2), the one between texts."""
    return next(iter(tokens_before(tokenizer.spec)), tokenizer.end_of_text)


def named_tokens(tokenizer: Tokenizer) -> dict[str, str]:
    """The tokens behind and before a text, as `transformers` and chat templates call them."""
    ids = {"eos_token": tokenizer.end_of_text, "bos_token": begin_of_text(tokenizer)}
    return {name: tokenizer.token_bytes(i).decode() for name, i in ids.items() if i is not None}


def tokenizer_fingerprint(tokenizer: Tokenizer) -> str:
    """Equal for tokenizers that give equal ids; stored with data and runs."""
    text = json.dumps(tokenizer.spec, sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:16]
