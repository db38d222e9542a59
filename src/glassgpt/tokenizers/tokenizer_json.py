"""What stands in a tokenizer.json (Hugging Face's `tokenizers`): to build it, ask it, extend it.

    spec = with_tokens(spec, ["<|im_end|>"]); special_tokens(spec)["<|im_end|>"]

A spec is the parsed file, a dict. This room encodes nothing and reads no file.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from glassgpt.errors import UserError

Spec = dict[str, Any]  # a parsed tokenizer.json

# How GPT-2 cuts text before merging: contractions, words, numbers and punctuation each with the
# space before them, and white space. Possessive quantifiers are for speed; the cuts are the same.
GPT2_PATTERN = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}++| ?\p{N}++| ?[^\s\p{L}\p{N}]++|\s++$|\s+(?!\S)|\s"


# -- building ------------------------------------------------------------------------------------


def tokenizer_json(model: dict, pre: dict, decoder: dict, added: Sequence[dict] = ()) -> dict:
    return {"version": "1.0", "truncation": None, "padding": None, "added_tokens": list(added),
            "normalizer": None, "pre_tokenizer": pre, "post_processor": None, "decoder": decoder,
            "model": model}  # fmt: skip


def byte_level(vocab: dict[str, int], merges: list, *, end: str, use_regex: bool) -> dict:
    """Byte-level BPE; the special token `end` gets the id behind those of `vocab`."""
    vocab = {**vocab, end: len(vocab)}
    model = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
             "end_of_word_suffix": None, "fuse_unk": False, "byte_fallback": False,
             "ignore_merges": False, "vocab": vocab,
             "merges": [list(merge) for merge in merges]}  # fmt: skip
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True,
             "use_regex": use_regex}  # fmt: skip
    return with_tokens(tokenizer_json(model, level, level), [end])


def with_tokens(spec: Spec, names: Iterable[str]) -> Spec:
    """The same with special tokens behind the largest id; those that are there already stay."""
    added, known = list(spec.get("added_tokens") or []), special_tokens(spec)
    ids = spec["model"]["vocab"] | known
    for name in dict.fromkeys(names):
        if name not in known:
            ids.setdefault(name, max(ids.values()) + 1)
            added.append({"id": ids[name], "content": name, "single_word": False, "lstrip": False,
                          "rstrip": False, "normalized": False, "special": True})  # fmt: skip
    return spec | {"added_tokens": added}


def byte_alphabet() -> list[str]:
    """The printable stand-in for each byte value, as GPT-2's vocabulary files write them.

    Printable Latin-1 stands for itself; the other 68 bytes are moved to U+0100 and up.
    """
    printable = {*range(33, 127), *range(161, 173), *range(174, 256)}
    moved = iter(range(256, 512))
    return [chr(byte if byte in printable else next(moved)) for byte in range(256)]


# -- asking --------------------------------------------------------------------------------------


def special_tokens(spec: Spec) -> dict[str, int]:
    """Tokens that are not made of text (`<|endoftext|>`), and their ids."""
    return {token["content"]: token["id"] for token in spec.get("added_tokens") or []}


def tokens_before(spec: dict) -> list[int]:
    """The ids that the tokenizer puts before every text."""
    processor = spec.get("post_processor") or {}
    before = []
    for step in processor.get("processors", [processor]):
        for item in step.get("single", []) if step.get("type") == "TemplateProcessing" else []:
            if "SpecialToken" not in item:
                break
            before += step["special_tokens"][item["SpecialToken"]["id"]]["ids"]
    return before


def without_prepend(spec: dict) -> dict:
    """For text within a document: SentencePiece puts a space before the first word only."""
    normalizer = spec.get("normalizer") or {}
    steps = normalizer.get("normalizers", [normalizer])
    kept = [step for step in steps if step and step.get("type") != "Prepend"]
    return spec | {"normalizer": {"type": "Sequence", "normalizers": kept} if kept else None}


def merge_pair(merge: str | list[str]) -> tuple[str, str]:
    """Merges stand as "a b" in older files, as ["a", "b"] in newer ones."""
    first, second = merge.split(" ") if isinstance(merge, str) else merge
    return first, second


def bpe_pattern(spec: dict) -> str:
    """The splitting pattern of a byte-level BPE spec; raises `UserError` for any other kind."""
    steps = spec.get("pre_tokenizer") or {}
    steps = steps.get("pretokenizers", [steps])
    pattern = None
    for step in steps:
        if step.get("type") == "Split" and step.get("behavior") == "Isolated":
            pattern = step["pattern"].get("Regex")
        elif step.get("type") == "ByteLevel" and not step.get("add_prefix_space"):
            return pattern or (GPT2_PATTERN if step.get("use_regex", True) else r"[\s\S]+")
    raise UserError("tokenizer.json: only byte-level BPE (GPT-2, Llama 3, Qwen) can be read")


def tiktoken_can(spec: dict) -> bool:
    """Byte-level, cut by a pattern alone, and merges in the order of their ids: tiktoken merges
    the pair whose *result* has the lowest id, Hugging Face the pair that stands first."""
    steps = spec.get("pre_tokenizer") or {}
    for step in steps.get("pretokenizers", [steps]):
        if step.get("type") not in ("ByteLevel", "Split") or step.get("add_prefix_space"):
            return False
    vocab = spec["model"]["vocab"]
    ids = [vocab["".join(merge_pair(merge))] for merge in spec["model"]["merges"]]
    return spec.get("normalizer") in (None, {"type": "NFC"}) and ids == sorted(ids)
