"""Our models as nanoGPT's checkpoints: its sample.py draws from them, its train.py resumes them.

    save_nanogpt(model.config, model.weights, model.tokenizer, Path("out-book"))

nanoGPT knows one architecture: GPT-2's, with the head tied to the token table, an MLP four times
as wide as the stream, and the exact GELU. OpenAI's GPT-2 uses an approximation of it (tanh);
nanoGPT loads it all the same, and so may this room write it, and say how far the logits move.
It knows no run directory; what reads such checkpoints is convert/nanogpt.py.
"""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassgpt.checkpoints.huggingface import gpt2_names
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.system import write_file
from glassgpt.tokenizers.tokenizer import Tokenizer


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
    content: dict[str, Any] = {
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


def _meta(tokenizer: Tokenizer) -> dict[str, Any] | None:
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


def _fresh_optimizer(config: ModelConfig) -> dict[str, Any]:
    """AdamW's state before its first step, in nanoGPT's two groups: matrices, and the rest."""
    matrices = [len(shape) > 1 for shape in config.weight_shapes.values()]
    groups = [
        {"params": [torch.zeros(1) for _ in range(n)], "weight_decay": decay}
        for n, decay in ((sum(matrices), 0.1), (len(matrices) - sum(matrices), 0.0))
    ]
    return torch.optim.AdamW(groups, lr=6e-4, betas=(0.9, 0.95)).state_dict()
