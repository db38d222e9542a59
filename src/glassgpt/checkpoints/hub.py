"""Published models by name: `fetch("gpt2")` is a folder on this disk, downloaded once.

Files lie where huggingface_hub keeps them for every program (~/.cache/huggingface, $HF_HOME), and
it does the work: tokens for gated models, mirrors ($HF_ENDPOINT), going on after a cut. What it
does not do is compare large files with their SHA-256; that happens here. This room does not know
what is in the files.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from glassgpt.errors import UserError
from glassgpt.system import sha256_of

# As people type them; the hub calls them openai-community/gpt2 and so on, and answers to both.
SHORT_NAMES = ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl", "distilgpt2")
_FILES = ["config.json", "generation_config.json", "model.safetensors", "model-*.safetensors",
          "model.safetensors.index.json", "tokenizer.json", "tokenizer_config.json",
          "vocab.json", "merges.txt", "chat_template.jinja", "adapter_config.json",
          "adapter_model.safetensors"]  # fmt: skip


def is_hub_name(name: str) -> bool:
    """gpt2, or OWNER/MODEL; not what looks like a path to something here."""
    if name in SHORT_NAMES:
        return True
    owner, _, model = name.partition("/")
    plain = re.compile(r"[A-Za-z0-9][\w.-]*")
    return bool(plain.fullmatch(owner) and plain.fullmatch(model)) and not Path(owner).exists()


def fetch(name: str) -> Path:
    """The folder with the files of `name`; raises `UserError` when they can't be had.

    What is complete on this disk is used as it is, without asking the network.
    """
    from huggingface_hub import snapshot_download
    from huggingface_hub.utils import disable_progress_bars, enable_progress_bars

    disable_progress_bars()
    try:
        folder = Path(snapshot_download(name, allow_patterns=_FILES, local_files_only=True))
        if _is_complete(folder):
            return folder
    except Exception:  # not there, or a part of it; every version says it in another way
        pass
    finally:
        enable_progress_bars()
    known = set(_blobs(name))
    try:
        folder = Path(snapshot_download(name, allow_patterns=_FILES))
    except Exception as error:
        reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise UserError(
            f"{name!r} is no folder here, and as a published model it can't be fetched: {reason} "
            "(a gated model needs `hf auth login`; offline only what was fetched before is there)"
        ) from error
    for blob in set(_blobs(name)) - known:
        _check(blob, name)
    return folder


def _blobs(name: str) -> list[Path]:
    """The stored files; those from large-file storage are named by their SHA-256."""
    from huggingface_hub import constants

    folder = Path(constants.HF_HUB_CACHE) / f"models--{name.replace('/', '--')}" / "blobs"
    return [path for path in folder.glob("*") if re.fullmatch("[0-9a-f]{64}", path.name)]


def _check(blob: Path, name: str) -> None:
    if (found := sha256_of(blob)) != blob.name:
        blob.unlink()
        raise UserError(f"{name}: refused a file, because its SHA-256 is {found} and not "
                        f"{blob.name}: damaged on the way; try again")  # fmt: skip


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
