"""LoRA adapters as PEFT stores them: ours written so, and anyone's added into a model's weights.

    weights = apply_adapter(config, weights, adapter_config, tensors)

An adapter is adapter_config.json, which names the base model, and adapter_model.safetensors with
two matrices for each adapted one: lora_A (r, in) and lora_B (out, r), float32. Also for GPT-2,
whose own matrices lie the other way round (fan_in_fan_out). It knows no file and no torch.
"""

from __future__ import annotations

import math
import re
from collections import ChainMap, defaultdict
from collections.abc import Mapping
from functools import partial
from typing import NamedTuple

import numpy as np

from glassgpt.checkpoints.huggingface import Json, stored_shapes, tensor_names
from glassgpt.checkpoints.tensors import Lazy, tensor_shapes
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError

_PREFIX = "base_model.model."
# More than a product of two matrices beside the model's own, or beside others than these.
_UNSUPPORTED = (
    "use_dora",
    "modules_to_save",
    "lora_bias",
    "trainable_token_indices",
    "layer_replication",
    "target_parameters",
    "alora_invocation_tokens",
    "use_qalora",
    "use_bdlora",
    "arrow_config",
    "kasa_config",
    "monteclora_config",
)
# Other ways to begin than these change the base model too.
_BEGINNINGS = (True, False, None, "gaussian", "eva", "orthogonal")


class _Pair(NamedTuple):
    """A correction factor * b @ a of the rows from `first` on of the matrix `ours`."""

    ours: str
    first: int
    a: str
    b: str
    factor: float


def _places(config: ModelConfig) -> dict[str, tuple[str, int, int, tuple[int, ...]]]:
    """PEFT's module -> our matrix, which of its stacks of rows, their first row, their shape."""
    places, ours_have = {}, config.weight_shapes
    for theirs, ours, _ in tensor_names(config):
        shape, first = ours_have.get(ours, ()), 0
        if len(shape) < 2 or "embedding" in ours:
            continue
        names = [theirs] if isinstance(theirs, str) else theirs
        shapes = stored_shapes(config, shape, len(names), transposed=False)
        for stack, (name, part) in enumerate(zip(names, shapes, strict=True)):
            places[name.removesuffix(".weight")] = ours, stack, first, part
            first += part[0]
    return places


def to_peft(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    *,
    alpha: float,
    dropout: float,
    base: str,
) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Our adapter -> the content of adapter_config.json and of adapter_model.safetensors.

    tensors: blocks.0.attn.qkv.a.0 (r, in), blocks.0.attn.qkv.b.0 (rows, r) and so on, as
    `lora.adapter_tensors` gives them. `base`: name or path of the model that was adapted.
    """
    renamed, targets, rank = {}, set(), 0
    for module, (ours, stack, _, _) in _places(config).items():
        for theirs, letter in (("lora_A", "a"), ("lora_B", "b")):
            name = f"{ours.removesuffix('weight')}{letter}.{stack}"
            if name in tensors:
                renamed[f"{_PREFIX}{module}.{theirs}.weight"] = tensors[name]
                targets.add(".".join(module.split(".")[-2:]))  # GPT-2 has two c_proj
                rank = tensors[name].shape[letter == "b"]
    assert len(renamed) == len(tensors), "an adapter of another model"
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": int(alpha) if alpha == int(alpha) else alpha,
        "lora_dropout": dropout,
        "target_modules": sorted(targets),
        "fan_in_fan_out": config.family == "gpt2",
        "bias": "none",
        "inference_mode": True,
    }, renamed


def apply_adapter(
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    adapter_config: Json,
    tensors: Mapping[str, np.ndarray],
    where: str = "the adapter",
) -> Mapping[str, np.ndarray]:
    """Weights (names of model.py) with PEFT's adapter added, each when it is asked for.

    Raises `UserError` at once for what is no product of two matrices beside one of ours.
    """
    try:
        pairs = _read_pairs(config, adapter_config, tensor_shapes(tensors))
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, re.error) as error:
        raise UserError(f"{where}: adapter_config.json is malformed: {error}") from error
    adapted = defaultdict(list)
    for pair in pairs:
        adapted[pair.ours].append(pair)
    makers = {name: partial(_add, weights, name, tensors, adapted[name]) for name in adapted}
    return ChainMap(Lazy(makers), weights)  # type: ignore


def _add(
    weights: Mapping[str, np.ndarray],
    name: str,
    tensors: Mapping[str, np.ndarray],
    pairs: list[_Pair],
) -> np.ndarray:
    total = np.array(weights[name], dtype=np.float32)
    for pair in pairs:
        a, b = tensors[pair.a].astype(np.float32), tensors[pair.b].astype(np.float32)
        total[pair.first : pair.first + len(b)] += np.float32(pair.factor) * (b @ a)
    return total


def _read_pairs(
    config: ModelConfig, adapter: Json, found: Mapping[str, tuple[int, ...]]
) -> list[_Pair]:
    if adapter.get("peft_type") != "LORA":
        raise UserError(f"peft_type {adapter.get('peft_type')!r} is not supported; LORA is")
    if strange := [name for name in _UNSUPPORTED if adapter.get(name)]:
        raise UserError(f"{strange[0]} is not supported; merge it into its base with PEFT")
    if adapter.get("bias", "none") != "none":
        raise UserError(f"bias {adapter['bias']!r} is not supported; none is")
    begun = adapter.get("init_lora_weights", True)
    if begun not in _BEGINNINGS:
        raise UserError(
            f"init_lora_weights {begun!r} changes the base; convert it with PEFT "
            "(path_initial_model_for_weight_conversion)"
        )
    places, pairs, left = _places(config), [], set(found)
    for module, (ours, _, first, (height, width)) in places.items():
        a, b = (f"{_PREFIX}{module}.lora_{letter}.weight" for letter in "AB")
        if a not in found and b not in found:
            continue
        rank = found.get(a, (0,))[0]
        if not rank or found.get(a) != (rank, width) or found.get(b) != (height, rank):
            raise UserError(
                f"{module} has lora_A {found.get(a)} and lora_B {found.get(b)}; here "
                f"they would be (r, {width}) and ({height}, r)"
            )
        pairs.append(_Pair(ours, first, a, b, _factor(module, rank, adapter)))
        left -= {a, b}
    if left:
        raise UserError(f"{min(left)} is nothing that can be added to this model")
    if not pairs:
        raise UserError("it holds no tensors")
    return pairs


def _factor(module: str, rank: int, adapter: Json) -> float:
    """alpha / r, or alpha / sqrt(r) of rank-stabilised LoRA (arXiv:2312.03732)."""
    alpha = adapter["lora_alpha"]
    for pattern, special in (adapter.get("alpha_pattern") or {}).items():
        if re.match(rf"(.*\.)?({pattern})$", module):
            alpha = special
            break
    return alpha / (math.sqrt(rank) if adapter.get("use_rslora") else rank)
