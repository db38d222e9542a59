"""nanoGPT's checkpoints (ckpt.pt), read as our models and written for nanoGPT.

    config, weights, tokenizer, info = load_nanogpt(Path("out-shakespeare-char"))
    save_nanogpt(model.config, model.weights, model.tokenizer, Path("out-book"))

A model that is read is nanoGPT's, number for number: same vocabulary, so same logits. Our character
tokenizers end in `<unk>`, for which such a model has no row. Instead of adding an untrained row,
which sampling could draw, characters that the model never saw are read as a space. Training can go
on with the weights; AdamW's moments are not taken over. The file is read by
`torch.load(weights_only=True)`, so nothing in it is run.

nanoGPT knows one architecture: GPT-2's, with the head tied to the token table, an MLP four times
as wide as the residual stream, and the exact GELU. OpenAI's GPT-2 uses the tanh approximation;
nanoGPT loads it all the same, so it is written too, and the difference of the logits is reported.
"""

from __future__ import annotations

import io
import os
import pickle
import warnings
import zipfile
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassgpt.checkpoints.huggingface import gpt2_names
from glassgpt.checkpoints.tensors import Lazy
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.system import Json, write_file
from glassgpt.tokenizers.nanogpt_meta import LARGEST_PICKLE, inspect_pickle, tokenizer_of_meta
from glassgpt.tokenizers.tokenizer import CharTokenizer, Tokenizer

GPT2_VOCABULARIES = (50257, 50304)  # nanoGPT pads OpenAI's to a multiple of 64
_SIZES = {
    "vocab_size": "vocab_size",
    "block_size": "context_length",
    "n_layer": "n_layer",
    "n_head": "n_head",
    "n_embd": "n_embd",
}
# Modules whose names torch.load is asked to judge; any other is refused before it is asked.
_KNOWN = ("torch.", "collections.")

# -- reading -------------------------------------------------------------------------------------


def load_nanogpt(
    path: Path,
) -> tuple[ModelConfig, Mapping[str, np.ndarray], Tokenizer | None, Json]:
    """(config, weights, tokenizer, info) of a ckpt.pt, or of the folder that holds one.

    The weights are mapped from the file. The tokenizer is None where nanoGPT's rule makes it
    GPT-2's: no meta.pkl, and a vocabulary of that size. `info` has iter_num, best_val_loss and
    config, as far as they are there. Raises `UserError` for a file that is anything else.
    """
    file = path / "ckpt.pt" if path.is_dir() else path
    if not file.exists():
        raise UserError(f"{file} does not exist; name nanoGPT's ckpt.pt or the folder it lies in")
    saved = _load(file)
    if not all(isinstance(_get(saved, key), dict) for key in ("model", "model_args")):
        raise UserError(f"{file} is no checkpoint of nanoGPT: model and model_args are missing")
    config = _config(saved["model_args"], file)
    weights = _weights(config, file, saved["model"])
    options = _get(saved, "config")
    tokenizer = _tokenizer(file, _get(options, "dataset"), config)
    info: Json = {}
    for key in ("iter_num", "best_val_loss"):
        value = _get(saved, key)
        if isinstance(value, torch.Tensor) and value.numel() == 1:
            value = value.item()
        if isinstance(value, int | float):
            info[key] = value
    if isinstance(options, dict):
        plain = {k: v for k, v in options.items() if isinstance(v, str | int | float | None)}
        info["config"] = plain
    return config, weights, tokenizer, info


def _load(file: Path) -> Any:
    """What torch.save wrote, as data; tensors are mapped from the file, privately."""
    try:
        with explain_os_errors(f"read {file}"), zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            name = next((e.filename for e in entries if e.filename.endswith("/data.pkl")), None)
            if name is None:
                raise UserError(f"{file} is no file of torch.save: it holds no data.pkl")
            if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
                raise UserError(f"{file} is damaged: torch.save does not compress")
            with archive.open(name) as member:
                inspect_pickle(member.read(LARGEST_PICKLE + 1), file, _KNOWN)
            if damaged := archive.testzip():
                raise UserError(f"{file} is damaged: {damaged!r:.80} does not match its checksum")
        with warnings.catch_warnings():  # about pickle protocols that may not be understood
            warnings.simplefilter("ignore", UserWarning)
            return torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except UserError:
        raise
    except zipfile.BadZipFile as error:
        raise UserError(_no_archive(file)) from error
    except pickle.UnpicklingError as error:
        raise UserError(f"{file} is damaged, or holds more than tensors and data") from error
    except Exception as error:  # a damaged or hostile file fails in a dozen ways
        what = " ".join(str(error).split()) or repr(error)
        raise UserError(f"{file} is damaged: {what:.100}") from error


def _no_archive(file: Path) -> str:
    with open(file, "rb") as opened:
        start = opened.read(16)
    if start.startswith(b"PK"):
        return f"{file} is cut short or damaged"
    if start.startswith(b"\x80\x02\x8a\x0a"):  # the magic number that older files begin with
        return f"{file} was written before PyTorch 1.6; save it again with a newer one"
    return f"{file} is no file of torch.save"


def _get(mapping: object, key: str) -> Any:
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


def _weights(config: ModelConfig, file: Path, model: dict) -> Lazy:
    """Our names -> arrays. Anything the config does not explain means another architecture."""
    tensors: dict[str, torch.Tensor] = {}
    weights = {}
    for name, tensor in model.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
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
        if tensor.shape != shapes[ours]:
            raise UserError(
                f"{file}: {theirs} has shape {tuple(tensor.shape)} instead of {shapes[ours]}, "
                "which its model_args call for"
            )
        if not tensor.is_contiguous():  # a small file could claim a tensor larger than memory
            raise UserError(f"{file}: {theirs} is not stored row by row; call contiguous()")
        weights[ours] = partial(_read, tensor)
    table = weights["token_embedding.weight"]
    if head is not None and not (
        head.shape == shapes["token_embedding.weight"]
        and head.is_contiguous()
        and np.array_equal(_read(head), table(), equal_nan=True)
    ):
        raise UserError(f"{file}: lm_head.weight is not transformer.wte.weight; nanoGPT ties them")
    for name in tensors:
        if not name.endswith(".attn.bias"):  # the causal mask, with torch before 2.0
            raise UserError(f"{file}: nanoGPT's models have no {name!r:.80}; this is another one")
    return Lazy(weights)


def _read(tensor: torch.Tensor) -> np.ndarray:
    return tensor.to(torch.float32, copy=True).numpy()


def _plain(name: str) -> str:
    """Without what torch.compile and DistributedDataParallel put before the names."""
    while name.startswith(("_orig_mod.", "module.")):
        name = name.partition(".")[2]
    return name


def _tokenizer(file: Path, dataset: object, config: ModelConfig) -> CharTokenizer | None:
    """From the meta.pkl beside the checkpoint, or where nanoGPT keeps that of its data set."""
    places = [file.parent]
    if isinstance(dataset, str) and not Path(dataset).is_absolute() and ".." not in dataset:
        places += [file.absolute().parent.parent / "data" / dataset, Path("data", dataset)]
    for place in places:
        meta = place / "meta.pkl"
        if os.path.isfile(meta):  # False, too, for names that no system allows
            tokenizer = tokenizer_of_meta(meta)
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


# -- writing -------------------------------------------------------------------------------------


def save_nanogpt(
    config: ModelConfig, weights: Mapping[str, np.ndarray], tokenizer: Tokenizer, folder: Path
) -> None:
    """Write ckpt.pt, and meta.pkl for a character tokenizer.

    The checkpoint names `folder` as its data set, which is where sample.py then finds meta.pkl.
    Training resumes at step 0 with fresh moments, and nanoGPT's default decay and betas.
    Raises `UserError` for a model or a tokenizer that nanoGPT can't express.
    """
    _check(config)
    meta = _meta(tokenizer)
    tensors = {
        theirs: torch.from_numpy(np.array(weights[ours], dtype=np.float32, order="C"))
        for theirs, ours, _ in gpt2_names(config)
        if ours in weights
    }
    tensors["lm_head.weight"] = tensors["transformer.wte.weight"]
    content: Json = {
        "model": tensors,
        "optimizer": _fresh_optimizer(config),
        "model_args": {
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_embd": config.n_embd,
            "block_size": config.context_length,
            "bias": config.bias,
            "vocab_size": config.vocab_size,
            "dropout": config.dropout,
        },
        "iter_num": 0,
        "best_val_loss": 1e9,
        "config": {"dataset": str(folder.absolute())},
    }
    archive = io.BytesIO()
    torch.save(content, archive)
    with explain_os_errors(f"write {folder}"):
        folder.mkdir(parents=True, exist_ok=True)
    write_file(folder / "ckpt.pt", archive.getvalue())
    if meta is not None:
        write_file(folder / "meta.pkl", pickle.dumps(meta))
    else:  # of an earlier export: it would be taken for this model's
        (folder / "meta.pkl").unlink(missing_ok=True)


def _check(config: ModelConfig) -> None:
    limits = {
        "a model of the modern shape": config.family != "gpt2",
        f"activation={config.activation}": config.activation not in ("gelu", "gelu_tanh"),
        "a head of its own (tie_embeddings=False)": not config.tie_embeddings,
        f"n_hidden={config.n_hidden} (only 4 n_embd)": config.n_hidden != 4 * config.n_embd,
        f"norm_eps={config.norm_eps} (only 1e-05)": config.norm_eps != 1e-5,
    }
    for what, beyond in limits.items():
        if beyond:
            raise UserError(f"nanoGPT can't express {what}; export the model to another format")


def _meta(tokenizer: Tokenizer) -> Json | None:
    """The content of meta.pkl; None for GPT-2's tokenizer, which nanoGPT assumes without one."""
    if tokenizer.kind == "char":
        vocab = tokenizer.spec["model"]["vocab"]
        itos = {i: token for token, i in vocab.items()}
        return {"vocab_size": len(vocab), "itos": itos, "stoi": dict(vocab)}
    # No table of 50,257 tokens is at hand to compare with; these are its ids of two words.
    if tokenizer.vocab_size == 50257 and tokenizer.encode("Hello world") == [15496, 995]:
        return None
    raise UserError(
        f"nanoGPT can't express a {tokenizer.kind} tokenizer of {tokenizer.vocab_size} tokens; "
        "it reads characters or GPT-2's tokens"
    )


def _fresh_optimizer(config: ModelConfig) -> Json:
    """AdamW's state before its first step, in nanoGPT's two groups: matrices, and the rest."""
    matrices = [len(shape) > 1 for shape in config.weight_shapes.values()]
    groups = [
        {"params": [torch.zeros(1) for _ in range(n)], "weight_decay": decay}
        for n, decay in ((sum(matrices), 0.1), (len(matrices) - sum(matrices), 0.0))
    ]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()
