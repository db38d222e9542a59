"""nanoGPT's checkpoints (ckpt.pt) and character vocabularies (meta.pkl), read as our models.

    config, weights, tokenizer, info = load_nanogpt(Path("out-shakespeare-char"))

The model is nanoGPT's, number for number: same vocabulary, so same logits. Our character
tokenizers end in `<unk>`, for which such a model has no row; instead of growing one (untrained,
and a chance of being drawn), characters it never saw are read as a space. Training can go on
with the weights; AdamW's moments stay behind. The files are read by pickles.py, so nothing in
them is run. This room writes no file and knows no torch.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from glassgpt.checkpoints.huggingface import gpt2_names
from glassgpt.checkpoints.pickles import StoredTensor, TorchArchive, read_pickle
from glassgpt.checkpoints.tensors import Lazy
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError
from glassgpt.tokenizers.tokenizer import UNKNOWN, CharTokenizer, Tokenizer

GPT2_VOCABULARIES = (50257, 50304)  # nanoGPT pads OpenAI's to a multiple of 64
_SIZES = {"vocab_size": "vocab_size", "block_size": "context_length", "n_layer": "n_layer",
          "n_head": "n_head", "n_embd": "n_embd"}  # fmt: skip


def load_nanogpt(
    path: Path,
) -> tuple[ModelConfig, Mapping[str, np.ndarray], Tokenizer | None, dict[str, Any]]:
    """(config, weights, tokenizer, info) of a ckpt.pt, or of the folder that holds one.

    The weights are mapped from the file. The tokenizer is None where nanoGPT's rule makes it
    GPT-2's: no meta.pkl, and a vocabulary of that size. `info` has iter_num, best_val_loss and
    config, as far as they are there. Raises `UserError` for a file that is anything else.
    """
    file = path / "ckpt.pt" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{file} does not exist; name nanoGPT's ckpt.pt or the folder it lies in")
    archive = TorchArchive(file)
    saved = archive.content
    if not all(isinstance(_get(saved, key), dict) for key in ("model", "model_args")):
        raise UserError(f"{file} is no checkpoint of nanoGPT: model and model_args are missing")
    config = _config(saved["model_args"], file)
    weights = _weights(config, archive, saved["model"])
    options = _get(saved, "config")
    tokenizer = _tokenizer(file, _get(options, "dataset"), config)
    info: dict[str, Any] = {}
    for key in ("iter_num", "best_val_loss"):
        value = _get(saved, key)
        if isinstance(value, StoredTensor) and value.size == ():
            value = archive.array(value).item()
        if isinstance(value, int | float):
            info[key] = value
    if isinstance(options, dict):
        plain = {k: v for k, v in options.items() if isinstance(v, str | int | float | None)}
        info["config"] = plain
    return config, weights, tokenizer, info


def read_meta(path: Path) -> CharTokenizer:
    """The tokenizer of a meta.pkl: its characters, in its order, and no token besides.

    A character outside of it is read as a space, where it has one.
    """
    meta = read_pickle(path)
    itos, size = _get(meta, "itos"), _get(meta, "vocab_size")
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


def _get(mapping: Any, key: str) -> Any:
    return mapping.get(key) if isinstance(mapping, dict) else None


def _config(values: dict, file: Path) -> ModelConfig:
    sizes = {}
    for theirs, ours in _SIZES.items():
        value = values.get(theirs)
        if type(value) is not int or not 0 < value < 1 << 31:
            raise UserError(f"{file}: its model_args lack a usable {theirs}")
        sizes[ours] = value
    dropout, bias = values.get("dropout", 0.0), values.get("bias", True)
    if not isinstance(dropout, int | float) or not isinstance(bias, bool):
        raise UserError(f"{file}: its model_args lack a usable dropout or bias")
    return ModelConfig.from_shape("gpt2", activation="gelu", bias=bias, dropout=dropout, **sizes)


def _weights(config: ModelConfig, archive: TorchArchive, model: dict) -> Lazy:
    """Our names -> arrays. Anything the config does not explain means another architecture."""
    file, tensors, weights = archive.path, {}, {}
    for name, tensor in model.items():
        if not isinstance(name, str) or not isinstance(tensor, StoredTensor):
            raise UserError(f"{file}: {name!r:.80} of its model is no tensor")
        tensors[_plain(name)] = tensor
    if config.n_layer > len(tensors):
        raise UserError(f"{file}: {len(tensors)} tensors are too few for n_layer={config.n_layer}")
    shapes = config.weight_shapes
    head = tensors.pop("lm_head.weight", None)
    for theirs, ours, _ in gpt2_names(config):  # matrices are (out, in) there as here
        if ours not in shapes:
            continue
        tensor = tensors.pop(theirs, None)
        if tensor is None:
            raise UserError(f"{file}: the tensor {theirs} is missing")
        archive.array(tensor)  # everything is checked now, and read when it is asked for
        if tensor.size != shapes[ours]:
            raise UserError(
                f"{file}: {theirs} has shape {tensor.size} instead of {shapes[ours]}, "
                "which its model_args call for"
            )
        weights[ours] = partial(_read, archive, tensor)
    table = weights["token_embedding.weight"]
    if head is not None and not np.array_equal(archive.array(head), table(), equal_nan=True):
        raise UserError(f"{file}: lm_head.weight is not transformer.wte.weight; nanoGPT ties them")
    for name in tensors:
        if not name.endswith(".attn.bias"):  # the causal mask, with torch before 2.0
            raise UserError(f"{file}: nanoGPT's models have no {name!r:.80}; this is another one")
    return Lazy(weights)


def _read(archive: TorchArchive, tensor: StoredTensor) -> np.ndarray:
    return np.asarray(archive.array(tensor), dtype=np.float32)


def _plain(name: str) -> str:
    """Without what torch.compile and DistributedDataParallel put before the names."""
    while name.startswith(("_orig_mod.", "module.")):
        name = name.partition(".")[2]
    return name


def _tokenizer(file: Path, dataset: Any, config: ModelConfig) -> CharTokenizer | None:
    """From the meta.pkl beside the checkpoint, or where nanoGPT keeps that of its data set."""
    places = [file.parent]
    if isinstance(dataset, str) and not Path(dataset).is_absolute() and ".." not in dataset:
        places += [file.absolute().parent.parent / "data" / dataset, Path("data", dataset)]
    for place in places:
        meta = place / "meta.pkl"
        if os.path.isfile(meta):  # False, too, for names that no system allows
            tokenizer = read_meta(meta)
            if tokenizer.vocab_size > config.vocab_size:
                raise UserError(
                    f"{meta} has {tokenizer.vocab_size} characters, the model in {file} only "
                    f"{config.vocab_size} tokens; they do not belong together"
                )
            return tokenizer
    if config.vocab_size in GPT2_VOCABULARIES:
        return None
    raise UserError(
        f"{file}: no meta.pkl for its {config.vocab_size} tokens; copy the one from nanoGPT's "
        f"data folder to {file.parent / 'meta.pkl'}"
    )
