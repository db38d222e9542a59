"""nanoGPT's character vocabularies (meta.pkl), read as data only.

    tokenizer = tokenizer_of_meta(Path("data/shakespeare_char/meta.pkl"))

A pickle is a program that may call anything it names. The unpickler here knows no names, so that
only dictionaries, lists, tuples, text and numbers come out. This module knows no model.
"""

from __future__ import annotations

import io
import pickle
import pickletools
from pathlib import Path

from glassgpt.errors import UserError, explain_os_errors
from glassgpt.tokenizers.tokenizer import UNKNOWN, CharTokenizer

LARGEST_PICKLE = 4 << 20  # bytes; the one in GPT-2 XL's checkpoint is under a tenth of that
_LARGEST_TUPLE = 1000  # values in a tuple and the tuples in it; those of tensors have about 20


def tokenizer_of_meta(path: Path) -> CharTokenizer:
    """The tokenizer of a meta.pkl: its characters, in its order, and no other tokens.

    A character that it lacks is read as a space, where it has one. Raises `UserError` for a file
    that holds anything else than plain data, or no vocabulary of characters.
    """
    meta = _read_pickle(path)
    itos = meta.get("itos") if isinstance(meta, dict) else None
    size = meta.get("vocab_size") if isinstance(meta, dict) else None
    itos = dict(enumerate(itos)) if isinstance(itos, list) else itos
    if not isinstance(itos, dict) or type(size) is not int or not 0 < size <= len(itos):
        raise UserError(f"{path} is no meta.pkl of nanoGPT: no itos for its vocab_size")
    tokens: list[str] = []
    for i in range(size):
        token = itos.get(i)
        if not isinstance(token, str) or (len(token) != 1 and token != UNKNOWN):
            raise UserError(f"{path}: token {i} is no character; only characters can be read")
        if "\ud800" <= token <= "\udfff":
            raise UserError(f"{path}: token {i} is half a character (a surrogate)")
        tokens.append(token)
    if len(set(tokens)) < size:
        raise UserError(f"{path}: a character stands twice in its itos")
    unknown = next(token for token in (UNKNOWN, " ", "\n", tokens[0]) if token in tokens)
    return CharTokenizer.from_tokens(tokens, unknown)


class _DataOnly(pickle._Unpickler):  # the one in C allocates whatever memo index a file names
    def find_class(self, module: str, name: str) -> object:
        raise pickle.UnpicklingError(f"{module}.{name} is no data")


def _read_pickle(path: Path) -> object:
    with explain_os_errors(f"read {path}"), open(path, "rb") as file:
        program = file.read(LARGEST_PICKLE + 1)
    inspect_pickle(program, path)
    try:
        return _DataOnly(io.BytesIO(program)).load()
    except Exception as error:  # a damaged pickle fails in a dozen ways
        what = " ".join(str(error).split()) or repr(error)
        raise UserError(f"{path} is no pickle, or damaged: {what:.100}") from error


def inspect_pickle(program: bytes, where: Path, known: tuple[str, ...] = ()) -> None:
    """Raise `UserError` for a pickle that names code outside of the modules `known`, that is too
    large, or that may never end when it is read; nothing is run.

    A tuple that holds an earlier tuple twice, again and again, has 2^n leaves after n
    instructions, and as a key of a dictionary all of them are hashed; a million tuples, each in
    the next, make that hash overflow the stack of the process.
    """
    if len(program) > LARGEST_PICKLE:
        raise UserError(f"{where}: {len(program):,} bytes of pickle are too many; refused")
    texts, stack, memo = ["", ""], list[int](), dict[int, int]()
    try:
        for opcode, argument, _ in pickletools.genops(program):
            name = None
            if opcode.name in ("GLOBAL", "INST"):
                name = str(argument).replace(" ", ".")
            elif opcode.name == "STACK_GLOBAL":
                name = ".".join(texts[-2:])
            elif "UNICODE" in opcode.name:
                texts.append(str(argument))
            if name is not None and not name.startswith(known or "-"):
                raise UserError(f"{where} wants to run {name!r:.80}; refused")
            _follow(opcode, argument, stack, memo)
    except UserError:
        raise
    except Exception as error:
        what = " ".join(str(error).split()) or repr(error)
        raise UserError(f"{where} is no pickle, or damaged: {what:.100}") from error


def _follow(
    opcode: pickletools.OpcodeInfo, argument: object, stack: list[int], memo: dict[int, int]
) -> None:
    """What one instruction does to the stack: for each value, how many values its hash visits (0
    for a mark). Raises `ValueError` for a tuple that holds too many."""
    before, after, mark = opcode.stack_before, opcode.stack_after, pickletools.markobject
    if opcode.name in ("PUT", "BINPUT", "LONG_BINPUT", "MEMOIZE"):
        memo[len(memo) if argument is None else int(str(argument))] = stack[-1]
    elif "GET" in opcode.name:
        stack.append(memo[int(str(argument))])
    elif opcode.name == "DUP":
        stack.append(stack[-1])
    else:
        taken: list[int] = []
        if mark in before:
            while size := stack.pop():
                taken.append(size)
            before = before[: before.index(mark)]
        taken += [stack.pop() for _ in before]
        tuples = after in ([pickletools.pytuple], [pickletools.pyfrozenset])
        size = 1 + sum(taken) if tuples else 1
        if size > _LARGEST_TUPLE:
            raise ValueError("its tuples are nested too deeply; refused")
        stack += [0 if kind is mark else size for kind in after]
