"""A model from wherever it is: a run directory, the hub, OpenAI's release, nanoGPT's checkpoint.

    checkpoint = load_pretrained("gpt2")        # "runs/book", "HuggingFaceTB/SmolLM2-135M",
                                                # "openai:124M", "nanoGPT/out/ckpt.pt"

What each format looks like inside is the business of `convert/`; this room finds out which it is.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from glassgpt.checkpoints import hub
from glassgpt.checkpoints.openai import files_of, is_openai, load_openai
from glassgpt.checkpoints.run_directory import (
    Checkpoint,
    base_of,
    is_adapter,
    load_model,
    with_adapter,
)
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.system import SILENT, Reporter, cache_dir, download, write_file
from glassgpt.tokenizers.tokenizer import Tokenizer, fingerprint
from glassgpt.tokenizers.vocabulary import GPT2_FILES, build_tokenizer

_OPENAI = "openai:"


@explain_os_errors("go on")
def load_pretrained(name: str | Path, reporter: Reporter = SILENT) -> Checkpoint:
    """Config, weights (read when they are asked for) and tokenizer of `name`.

    A folder or file here; openai:124M, :355M, :774M or :1558M; gpt2, distilgpt2 and the like; or
    OWNER/MODEL on the hub; or a PEFT adapter, which comes added into its base. Raises `UserError`
    for what is missing, damaged or unsupported.
    """
    if not isinstance(name, (str, os.PathLike)):
        raise UserError(f"{name!r} is no name or path of a model")
    text = os.fspath(name)
    if text.startswith(_OPENAI):
        return _openai(_fetch_openai(text.removeprefix(_OPENAI), reporter))
    path = _find(text)
    if is_adapter(path):
        return _adapted(path, reporter)
    if path.is_file() or (path / "ckpt.pt").exists():
        return _nanogpt(path)
    if is_openai(path):
        return _openai(path)
    if path.is_dir() and not (path / "config.json").exists() and any(path.glob("*.gguf")):
        _refuse_gguf(path)
    return load_model(path)


def tokenizer_file(tokenizer: Tokenizer) -> str:
    """Where this tokenizer lies as tokenizer.json, for `prepare`, which takes names and paths."""
    path = cache_dir() / "tokenizers" / fingerprint(tokenizer) / "tokenizer.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(tokenizer.spec, ensure_ascii=False).encode())
    return str(path)


def _find(name: str) -> Path:
    """Where it lies here, or would; a published one is fetched first."""
    path = Path(name).expanduser()
    return hub.fetch(name) if not path.exists() and hub.is_hub_name(name) else path


def _adapted(folder: Path, reporter: Reporter) -> Checkpoint:
    """The model that an adapter was made for, with the adapter in its weights."""
    name = base_of(folder)
    try:
        base = _find(name)
        if is_adapter(base):
            raise UserError(f"{name} is an adapter itself; merge it into its own base first")
        checkpoint = load_pretrained(base, reporter)
    except UserError as error:
        raise UserError(f"{folder} is an adapter of {name!r}: {error}") from error
    return with_adapter(checkpoint, folder)


def _openai(folder: Path) -> Checkpoint:
    config, weights, tokenizer = load_openai(folder)
    return Checkpoint(config, weights, tokenizer, {"source": f"OpenAI's release in {folder}"})


def _fetch_openai(model: str, reporter: Reporter) -> Path:
    """The release folder, downloaded once. Its tensors carry checksums, verified on reading."""
    folder = cache_dir() / "openai" / model
    try:
        for file, url in files_of(model).items():
            download(url, folder / file, sha256=GPT2_FILES.get(file), reporter=reporter)
    finally:
        reporter.close()
    return folder


def _nanogpt(path: Path) -> Checkpoint:
    if path.is_file():
        with open(path, "rb") as file:
            if file.read(4) == b"GGUF":
                _refuse_gguf(path)
        if path.suffix != ".pt":
            raise UserError(f"{path} is a file; name the run directory that holds a model")
    from glassgpt.checkpoints.nanogpt import load_nanogpt  # needs torch

    config, weights, tokenizer, facts = load_nanogpt(path)
    tokenizer = tokenizer or build_tokenizer("gpt2", lambda: iter(()))
    return Checkpoint(config, weights, tokenizer, {"source": f"nanoGPT's {path}", **facts})


def _refuse_gguf(path: Path) -> None:
    raise UserError(f"{path} holds GGUF, which GlassGPT writes but does not read; name the model "
                    "that it was made from")  # fmt: skip
