"""`glassgpt export`: a model in another program's format, and proof that it still is the same.

    exported = export_model(load_pretrained("runs/book"), "gguf", Path("book.gguf"))

Each format is written by the module of its name and read back. Its logits are compared with those
of the plain NumPy model; for ONNX, those of ONNX Runtime with those of the torch model.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from glassgpt import numpy_gpt
from glassgpt.checkpoints.run_directory import Checkpoint
from glassgpt.config import Format, ModelConfig, Precision
from glassgpt.errors import UserError, explain_os_errors

SUFFIXES: dict[Format, str] = {
    "gguf": ".gguf",
    "onnx": ".onnx",
    "nanogpt": "-nanogpt",
    "numpy": ".npz",
}
Model = tuple[ModelConfig, Mapping[str, np.ndarray]]


@dataclass(frozen=True)
class Exported:
    """Where the file is, its size, and how far its logits are from the model's, at most."""

    path: Path
    n_bytes: int
    difference: float
    note: str = ""


def export_model(
    checkpoint: Checkpoint,
    to: Format,
    out: Path,
    *,
    precision: Precision = "F32",
    overwrite: bool = False,
) -> Exported:
    """Write `checkpoint` to `out`: one file, for nanogpt a folder with ckpt.pt and meta.pkl.

    `precision` is of GGUF's matrices. Raises `UserError` for what a format can't express, for a
    package that is missing, and for an `out` that exists, unless `overwrite`.
    """
    if to not in SUFFIXES:
        raise UserError(f"no format {to!r}; there are {', '.join(SUFFIXES)}")
    if precision != "F32" and to != "gguf":
        raise UserError(f"precision {precision} is for gguf; {to} keeps float32")
    if out.is_dir() and to != "nanogpt":
        raise UserError(f"{out} is a folder; name the file to write")
    target = out / "ckpt.pt" if to == "nanogpt" else out
    if (target.exists() or out.is_file()) and not overwrite:
        raise UserError(f"{target} exists already; choose another --out, or say --overwrite")
    with explain_os_errors(f"write {out}"):
        out.parent.mkdir(parents=True, exist_ok=True)
    difference, note = _WRITERS[to](checkpoint, out, precision)
    files = list(out.glob("*")) if out.is_dir() else [out, Path(f"{out}.data")]
    size = sum(path.stat().st_size for path in files if path.exists())
    return Exported(out, size, difference, note)


def logit_difference(ours: Model, theirs: Model, n_tokens: int = 64) -> float:
    """The largest difference of any logit over `n_tokens` random tokens, the same every time.

    Both models are computed by the plain NumPy model: this tests the numbers in a file.
    """
    config = ours[0]
    length = min(n_tokens, config.context_length)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=length)
    ours_logits, theirs_logits = (
        numpy_gpt.forward(tokens, weights, config) for config, weights in (ours, theirs)
    )
    return float(np.abs(ours_logits - theirs_logits).max())


def _gguf(checkpoint: Checkpoint, out: Path, precision: Precision) -> tuple[float, str]:
    from glassgpt.checkpoints.gguf import read_gguf, write_gguf

    config, weights, name = checkpoint.config, checkpoint.weights, out.stem
    halves = write_gguf(
        out,
        config,
        weights,
        checkpoint.tokenizer,
        kind=precision,
        name=name,
        template=checkpoint.chat_template,
        ends=checkpoint.ends,
    )
    note = f"{len(halves)} matrices stay F16: their rows are no multiple of 32" if halves else ""
    return logit_difference((config, weights), read_gguf(out)), note


def _onnx(checkpoint: Checkpoint, out: Path, precision: Precision) -> tuple[float, str]:
    from glassgpt.checkpoints.onnx import onnx_difference, write_onnx
    from glassgpt.model import GPT

    if importlib.util.find_spec("onnxruntime") is None:
        raise UserError("checking an ONNX file needs: pip install 'glassgpt[onnx]'")
    model = GPT.from_weights(checkpoint.config, checkpoint.weights)
    write_onnx(out, model)
    return onnx_difference(out, model), ""


def _nanogpt(checkpoint: Checkpoint, out: Path, precision: Precision) -> tuple[float, str]:
    from glassgpt.checkpoints.nanogpt import load_nanogpt, save_nanogpt

    config, weights = checkpoint.config, checkpoint.weights
    save_nanogpt(config, weights, checkpoint.tokenizer, out)
    read_config, read_weights, _, _ = load_nanogpt(out)
    exact = config.activation == "gelu_tanh"
    note = "nanoGPT computes the exact GELU, this model its tanh form" if exact else ""
    return logit_difference((config, weights), (read_config, read_weights)), note


def _numpy(checkpoint: Checkpoint, out: Path, precision: Precision) -> tuple[float, str]:
    from glassgpt.checkpoints.npz import read_numpy, write_numpy

    write_numpy(out, checkpoint.config, checkpoint.weights)
    return logit_difference((checkpoint.config, checkpoint.weights), read_numpy(out)), ""


_WRITERS = {"gguf": _gguf, "onnx": _onnx, "nanogpt": _nanogpt, "numpy": _numpy}
