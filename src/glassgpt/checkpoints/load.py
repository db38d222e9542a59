"""A model from wherever it is: a run directory, the hub, OpenAI's release, nanoGPT's checkpoint.

    checkpoint = load_pretrained("gpt2")        # "runs/book", "HuggingFaceTB/SmolLM2-135M",
                                                # "openai:124M", "nanoGPT/out/ckpt.pt"

This module finds out which format it is, and fetches published models. What a format looks like
inside is the business of the module of that name, which is imported when it is needed.
"""

from __future__ import annotations

import json
import os
import re
from pathlib import Path

from glassgpt.checkpoints.run_directory import (
    Checkpoint,
    base_of,
    is_adapter,
    load_model,
    with_adapter,
)
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.system import SILENT, Reporter, cache_dir, download, sha256_of, write_file
from glassgpt.tokenizers.tokenizer import Tokenizer, tokenizer_fingerprint
from glassgpt.tokenizers.vocabulary import GPT2_FILES, build_tokenizer

# As people type them; the hub calls them openai-community/gpt2 and so on, and answers to both.
SHORT_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
_HUB_FILES = [
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "model-*.safetensors",
    "model.safetensors.index.json",
    "tokenizer.json",
    "tokenizer_config.json",
    "vocab.json",
    "merges.txt",
    "chat_template.jinja",
    "adapter_config.json",
    "adapter_model.safetensors",
]
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


def is_openai(folder: Path) -> bool:
    """Whether a folder holds OpenAI's release (not whether they are sound)."""
    return (folder / "hparams.json").is_file() and (folder / "model.ckpt.index").is_file()


def tokenizer_file(tokenizer: Tokenizer) -> str:
    """Where this tokenizer lies as tokenizer.json, for `prepare`, which takes names and paths."""
    path = cache_dir() / "tokenizers" / tokenizer_fingerprint(tokenizer) / "tokenizer.json"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, json.dumps(tokenizer.spec, ensure_ascii=False).encode())
    return str(path)


def _find(name: str) -> Path:
    """Where it lies here, or would; a published one is fetched first."""
    path = Path(name).expanduser()
    return fetch_published(name) if not path.exists() and is_hub_name(name) else path


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
    from glassgpt.checkpoints.openai import load_openai

    config, weights, tokenizer = load_openai(folder)
    return Checkpoint(config, weights, tokenizer, {"source": f"OpenAI's release in {folder}"})


def _fetch_openai(model: str, reporter: Reporter) -> Path:
    """The release folder, downloaded once. Its tensors carry checksums, verified on reading."""
    from glassgpt.checkpoints.openai import files_of

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
    raise UserError(
        f"{path} holds GGUF, which GlassGPT writes but does not read; name the model that it was "
        "made from"
    )


# -- the hub ---------------------------------------------------------------------------------------


def is_hub_name(name: str) -> bool:
    """gpt2, or OWNER/MODEL; not what looks like a path to something here."""
    if name in SHORT_NAMES:
        return True
    owner, _, model = name.partition("/")
    plain = re.compile(r"[A-Za-z0-9][\w.-]*")
    return bool(plain.fullmatch(owner) and plain.fullmatch(model)) and not Path(owner).exists()


def fetch_published(name: str) -> Path:
    """The folder with the files of a model on the hub; raises `UserError` when they can't be had.

    Files lie where huggingface_hub keeps them for every program (~/.cache/huggingface, $HF_HOME).
    It knows tokens for gated models, mirrors ($HF_ENDPOINT) and how to go on after a cut, but it
    does not compare large files with their SHA-256; that happens here. What is complete on this
    disk is used as it is, without asking the network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES, local_files_only=True))
        if _is_complete(folder):
            return folder
    except Exception:  # not there, or a part of it
        pass
    finally:
        enable_progress_bars()
    known = set(_blobs(name))
    try:
        folder = Path(snapshot_download(name, allow_patterns=_HUB_FILES))
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(
            f"{name!r} is no folder here, and as a published model it can't be fetched: {reason} "
            "(a gated model needs `hf auth login`; offline only what was fetched before is there)"
        ) from error
    for blob in set(_blobs(name)) - known:
        _check_blob(blob, name)
    return folder


def _blobs(name: str) -> list[Path]:
    """The stored files; those from large-file storage are named by their SHA-256."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "blobs"
    return [path for path in folder.glob("*") if re.fullmatch("[0-9a-f]{64}", path.name)]


def _check_blob(blob: Path, name: str) -> None:
    if (found := sha256_of(blob)) != blob.name:
        blob.unlink()
        raise UserError(
            f"{name}: refused a file, because its SHA-256 is {found} and not {blob.name}: "
            "damaged on the way; try again"
        )


def _is_complete(folder: Path) -> bool:
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        return (folder / "adapter_model.safetensors").exists()
    index = folder / "model.safetensors.index.json"
    try:
        weights = set(json.loads(index.read_bytes())["weight_map"].values())
    except (OSError, ValueError, KeyError):
        weights = {"model.safetensors"}
    tokenizer = (folder / "tokenizer.json").exists() or (folder / "merges.txt").exists()
    return tokenizer and all((folder / name).exists() for name in {"config.json", *weights})
