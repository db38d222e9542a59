"""OpenAI's GPT-2 release, the folder with model.ckpt.*, -> our config, weights and tokenizer.

    config, weights, tokenizer = load_openai(Path("124M"))

The weights are read one by one, when asked for, and not kept: a model needs room only once.
This room knows no torch, no TensorFlow and no net: `files_of` says where the files are, others
fetch them; how a tensor lies in them stands in tensor_bundle.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from glassgpt.checkpoints.tensor_bundle import TensorBundle
from glassgpt.checkpoints.tensors import Lazy
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError, explain_os_errors, nearest
from glassgpt.tokenizers.tokenizer import Tokenizer, gpt2_tokenizer

MODELS = ("124M", "355M", "774M", "1558M")
FILES = ("checkpoint", "encoder.json", "hparams.json", "model.ckpt.data-00000-of-00001",
         "model.ckpt.index", "model.ckpt.meta", "vocab.bpe")  # fmt: skip
_URL = "https://openaipublic.blob.core.windows.net/gpt-2/models/{model}/{file}"


def files_of(model: str) -> dict[str, str]:
    """File name -> URL, for one of OpenAI's `MODELS`."""
    if model not in MODELS:
        raise UserError(
            f"no GPT-2 {model!r}.{nearest(model, MODELS)} The sizes are: {', '.join(MODELS)}"
        )
    return {file: _URL.format(model=model, file=file) for file in FILES}


def is_openai(folder: Path) -> bool:
    """Whether a folder holds the release's files (not whether they are sound)."""
    return (folder / "hparams.json").is_file() and (folder / "model.ckpt.index").is_file()


def load_openai(folder: Path) -> tuple[ModelConfig, Mapping[str, np.ndarray], Tokenizer]:
    """Config, lazy weights and tokenizer; raises `UserError` for what is missing or damaged."""
    raw = {}
    for file in ("hparams.json", "encoder.json", "vocab.bpe"):
        with explain_os_errors(f"read {folder / file}"):
            raw[file] = (folder / file).read_bytes()
    try:
        hparams = json.loads(raw["hparams.json"])
    except (ValueError, RecursionError) as error:
        raise UserError(f"{folder / 'hparams.json'} is damaged: {error}; fetch it again") from error
    try:
        tokenizer = gpt2_tokenizer(raw["encoder.json"], raw["vocab.bpe"])
        tokenizer.check()
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(
            f"{folder}: encoder.json and vocab.bpe make no tokenizer ({error}); fetch them again"
        ) from error
    bundle = TensorBundle(folder / "model.ckpt")
    config, weights = from_openai(hparams, bundle, str(folder))
    if tokenizer.vocab_size > config.vocab_size:
        raise UserError(
            f"{folder}: encoder.json has {tokenizer.vocab_size} tokens, hparams.json n_vocab="
            f"{config.vocab_size}; they do not belong together, fetch them again"
        )
    return config, weights, tokenizer


def from_openai(
    hparams: Mapping[str, Any], tensors: Mapping[str, np.ndarray], where: str
) -> tuple[ModelConfig, Mapping[str, np.ndarray]]:
    """hparams.json and the release's tensors -> the config, and float32 weights by our names.

    The weights are read when asked for, but their presence and shapes are checked here; for a
    `TensorBundle` that takes no reading. Raises `UserError` with `where` in front.
    """
    sizes = {}
    for name in ("n_vocab", "n_ctx", "n_embd", "n_head", "n_layer"):
        sizes[name] = hparams.get(name) if isinstance(hparams, Mapping) else None
        if type(sizes[name]) is not int:
            raise UserError(f"{where}: hparams.json has {name}={sizes[name]!r}; fetch it again")
    vocab_size, context_length = sizes.pop("n_vocab"), sizes.pop("n_ctx")
    config = ModelConfig.from_shape(
        "gpt2", vocab_size=vocab_size, context_length=context_length, **sizes
    )
    if config.n_layer > len(tensors):  # or the list of their names might fill the memory
        raise UserError(
            f"{where}: hparams.json has n_layer={config.n_layer}, the checkpoint only "
            f"{len(tensors)} tensors; they do not belong together, fetch them again"
        )
    names = {}
    for ours, shape in config.weight_shapes.items():
        theirs = names[ours] = their_name(ours)
        if theirs not in tensors:
            raise UserError(f"{where}: the tensor {theirs} is missing; fetch model.ckpt.* again")
        expected = (1, *reversed(shape)) if is_convolution(theirs) else shape
        bundle = isinstance(tensors, TensorBundle)
        found = tensors.shape_of(theirs) if bundle else tensors[theirs].shape
        if found != expected:
            raise UserError(
                f"{where}: {theirs} has shape {found}, hparams.json asks for {expected}; "
                "they do not belong together, fetch them again"
            )
    return config, Lazy({ours: partial(_read, tensors, theirs) for ours, theirs in names.items()})


def _read(tensors: Mapping[str, np.ndarray], theirs: str) -> np.ndarray:
    """float32 in our orientation: linear layers are convolutions of width 1 here, (1, in, out);
    torch's are (out, in)."""
    tensor = np.asarray(tensors[theirs], np.float32)
    return tensor[0].T if is_convolution(theirs) else tensor


_PARTS = {"attn_norm": "ln_1", "attn.qkv": "attn/c_attn", "attn.out": "attn/c_proj",
          "mlp_norm": "ln_2", "mlp.up": "mlp/c_fc", "mlp.down": "mlp/c_proj",
          "final_norm": "ln_f"}  # fmt: skip


def their_name(ours: str) -> str:
    """blocks.3.attn.qkv.weight -> model/h3/attn/c_attn/w"""
    if ours.endswith("_embedding.weight"):
        return "model/wte" if ours.startswith("token") else "model/wpe"
    part, _, kind = ours.rpartition(".")
    block = ""
    if part.startswith("blocks."):
        _, layer, part = part.split(".", maxsplit=2)
        block = f"h{layer}/"
    weight = "w" if "/c_" in _PARTS[part] else "g"
    return f"model/{block}{_PARTS[part]}/{weight if kind == 'weight' else 'b'}"


def is_convolution(theirs: str) -> bool:
    return "/c_" in theirs and theirs.endswith("/w")
