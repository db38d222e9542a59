"""A model as an ONNX graph, for ONNX Runtime in any language, browsers and phones.

    write_onnx(Path("book.onnx"), model); onnx_difference(Path("book.onnx"), model)

torch traces model.py itself, so there is no second copy of the architecture here. Names are those
that other tools expect of a decoder with a cache; every sequence of the batch has the same
length, so there is no attention mask:

    input_ids (B, T)   past_key_values.N.key and .value (B, K, P, D)     N = 0 ... L - 1
    logits (B, T, V)   present.N.key and .value (B, K, P + T, D)

B, T and P are free, and P = 0 is the beginning of a text. What comes out as `present` goes in
again as `past_key_values`, until P + T reaches `context_length`, which stands in the metadata
with `family` and `vocab_size`. It knows no tokenizer, no sampling and no run directory.
"""

from __future__ import annotations

import copy
import logging
import os
import shutil
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import torch
import torch.nn as nn

from glassgpt.cache import KVCache
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.model import GPT, attention_by_hand

# Bytes of weights. ONNX's own format ends at 2 GiB, which the graph must fit into as well.
ONE_FILE_LIMIT = 1_800_000_000
# Shapes are computed beforehand, but not the transpose of a tied head: it would be stored twice.
_FOLD_LIMIT = 16


def write_onnx(path: Path, model: GPT) -> None:
    """Write the graph to `path`; weights too large for one ONNX file go to "`path`.data".

    Raises `UserError` without the packages of glassgpt[onnx], and for a model that has no layer
    or a context below 4, whose cache can't have the free length that the graph promises.
    """
    try:
        import onnx  # noqa: F401
        from onnxscript.optimizer import optimize
    except ImportError as error:
        raise UserError("writing ONNX needs: pip install 'glassgpt[onnx]'") from error
    config = model.config
    if config.n_layer < 1 or config.context_length < 4:
        raise UserError(
            f"n_layer={config.n_layer}, context_length={config.context_length}: ONNX with a cache "
            "needs at least 1 layer and a context of 4"
        )
    with _quiet():
        program = _trace(_evaluating(model))
        optimize(program.model, input_size_limit=_FOLD_LIMIT, output_size_limit=_FOLD_LIMIT)
    about = {name: getattr(config, name) for name in ("context_length", "family", "vocab_size")}
    program.model.metadata_props.update({name: str(value) for name, value in about.items()})
    size = sum(p.numel() * p.element_size() for p in model.parameters())
    _save(path, program, external_data=size > ONE_FILE_LIMIT)


# -- tracing -------------------------------------------------------------------------------------


class _GrowingCache(KVCache):
    """The same for a graph, in which nothing is written in place: new tensors, not one more row."""

    def __init__(self, past: Sequence[torch.Tensor]) -> None:  # key, value, key, value, ...
        self.present = list(past)
        self.length = past[0].size(2)

    def extend(
        self, layer: int, k: torch.Tensor, v: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        for i, new in ((2 * layer, k), (2 * layer + 1, v)):
            self.present[i] = torch.cat((self.present[i], new), dim=2)  # (B, K, P + T, D)
        return self.present[2 * layer], self.present[2 * layer + 1]


class _WithCache(nn.Module):
    """GPT with the cache as arguments and results."""

    def __init__(self, model: GPT) -> None:
        super().__init__()
        self.model = model

    def forward(
        self, tokens: torch.Tensor, past: list[torch.Tensor]
    ) -> tuple[torch.Tensor, list[torch.Tensor]]:
        cache = _GrowingCache(past)
        return self.model(tokens, cache=cache), cache.present


def _trace(model: GPT) -> torch.onnx.ONNXProgram:
    for block in model.blocks:  # the fused kernel chooses by T and S, which a graph can't
        block.attn.attend = attention_by_hand  # type: ignore[union-attr]
    config, weight = model.config, model.head.weight
    past_names = _cache_names("past_key_values", config)
    # Lengths of 0 and 1 would be taken for constants, so the example has 2 of everything; and
    # one tensor given twice would become one input.
    tokens = torch.zeros(2, 2, dtype=torch.int64, device=weight.device)
    shape = (2, config.n_kv_head, 2, config.head_dim)
    past = [weight.new_zeros(shape) for _ in past_names]
    program = torch.onnx.export(
        _WithCache(model).eval(),
        (tokens, past),
        dynamo=True,
        dynamic_shapes=(
            {0: "batch", 1: "tokens"},
            [{0: "batch", 2: "past"} for _ in past],
        ),
        input_names=["input_ids", *past_names],
        output_names=["logits", *_cache_names("present", config)],
        optimize=False,
        verbose=False,
    )
    assert program is not None
    return program


def _cache_names(prefix: str, config: ModelConfig) -> list[str]:
    return [f"{prefix}.{n}.{part}" for n in range(config.n_layer) for part in ("key", "value")]


def _evaluating(model: GPT) -> GPT:
    """The same weights, not copied, in modules of their own: in evaluation mode, free to alter."""
    shared = {id(tensor): tensor for tensor in (*model.parameters(), *model.buffers())}
    return copy.deepcopy(model, shared).eval()


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter tells its developers what they might improve; nobody else can."""
    logger = logging.getLogger("torch.onnx")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


# -- files ---------------------------------------------------------------------------------------


def _save(path: Path, program: torch.onnx.ONNXProgram, *, external_data: bool) -> None:
    """One or two files, moved into place when both are complete; the graph, which counts, last."""
    folder = path.with_name(f".{path.name}.partial")
    with explain_os_errors(f"write {path}"):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        try:
            program.save(folder / path.name, external_data=external_data)
            path.unlink(missing_ok=True)
            path.with_name(f"{path.name}.data").unlink(missing_ok=True)
            for file in sorted(folder.iterdir(), reverse=True):
                os.replace(file, path.with_name(file.name))
        finally:
            shutil.rmtree(folder, ignore_errors=True)


# -- proof ---------------------------------------------------------------------------------------


@torch.inference_mode()
def onnx_difference(path: Path, model: GPT) -> float:
    """How far logits of ONNX Runtime are from those of `model`, at most.

    Random tokens in two rows: most of them at once into an empty cache, then two, then one.
    Raises `UserError` when onnxruntime is missing.
    """
    try:
        import onnxruntime
    except ImportError as error:
        raise UserError("checking an ONNX file needs: pip install onnxruntime") from error
    model = _evaluating(model)
    config, weight = model.config, model.head.weight
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    names = _cache_names("past_key_values", config)
    empty = np.zeros((2, config.n_kv_head, 0, config.head_dim), dtype=np.float32)
    past = dict.fromkeys(names, empty)
    cache = KVCache(config, batch=2, dtype=weight.dtype, device=weight.device)
    length = min(config.context_length, 64)
    tokens = np.random.default_rng(0).integers(config.vocab_size, size=(2, length))
    differences = []
    for new in np.split(tokens, [length - 3, length - 1], axis=1):
        logits, *present = session.run(None, {"input_ids": new, **past})
        past = dict(zip(names, present, strict=True))
        expected = model(torch.from_numpy(new).to(weight.device), cache=cache).cpu().numpy()
        differences.append(np.abs(logits - expected).max())
    return float(np.max(differences))
