"""Our tensor names and config <-> Hugging Face's (GPT2LMHeadModel, Llama, Qwen3).

    config_json, tensors = to_huggingface(config, weights, end_of_text=50256)

Works on NumPy arrays and only renames, transposes, splits and joins them, so a round trip is
exact to the last bit. It knows no file and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np

from glassgpt.config import Family, ModelConfig
from glassgpt.errors import UserError

_ARCHITECTURES: dict[Family, str] = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_GPT2_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}


def to_huggingface(
    config: ModelConfig, weights: Mapping[str, np.ndarray], *, end_of_text: int | None = None
) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    """Our weights -> the content of config.json and the tensors of model.safetensors."""
    tensors: dict[str, np.ndarray] = {}
    shapes = config.weight_shapes
    for theirs, ours, transposed in _tensor_names(config):
        if isinstance(theirs, tuple):  # Llama keeps q, k and v apart
            tensors |= zip(theirs, _split_qkv(config, weights[ours]), strict=True)
        elif ours in weights:
            tensors[theirs] = weights[ours].T if transposed else weights[ours]
        else:  # GPT-2 always has biases; a model without them is one whose biases are zero
            width = shapes[ours.replace(".bias", ".weight")][0]
            tensors[theirs] = np.zeros(width, dtype=np.float32)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    return _config_json(config, end_of_text), tensors


def from_huggingface(
    config: ModelConfig, tensors: Mapping[str, np.ndarray], where: str = "the checkpoint"
) -> dict[str, np.ndarray]:
    """The tensors of a checkpoint -> our weights; raises `UserError` for missing or misshapen."""
    weights: dict[str, np.ndarray] = {}
    shapes = config.weight_shapes
    if config.family == "gpt2" and "wte.weight" in tensors:
        tensors = {
            n if n == "lm_head.weight" else f"transformer.{n}": t for n, t in tensors.items()
        }
    for theirs, ours, transposed in _tensor_names(config):
        parts = []
        for name in theirs if isinstance(theirs, tuple) else (theirs,):
            if name not in tensors:
                raise UserError(f"{where}: the tensor {name} is missing")
            parts.append(tensors[name])
        tensor = np.concatenate(parts) if len(parts) > 1 else parts[0]
        if ours.endswith("bias") and not config.bias:
            if np.any(tensor):
                raise UserError(f"{where}: {theirs} is not zero, but the model has no biases")
            continue
        weights[ours] = tensor.T if transposed else tensor
        if weights[ours].shape != shapes[ours]:
            raise UserError(
                f"{where}: {theirs} has shape {tensor.shape}, which does not fit the config "
                f"({ours} is {shapes[ours]})"
            )
    return weights


def config_from_json(values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
    """The ModelConfig that a Hugging Face config.json describes.

    Raises `UserError` for architectures and variants that our model can't compute.
    """
    kinds = {"gpt2": "gpt2", "llama": "llama", "qwen3": "qwen3"}
    kind = kinds.get(str(values.get("model_type")))
    if kind is None:
        raise UserError(
            f"{where}: model_type {values.get('model_type')!r} is not supported; "
            f"supported are {', '.join(kinds)}"
        )
    try:
        return _gpt2_config(values) if kind == "gpt2" else _llama_config(values, kind)
    except (KeyError, TypeError) as error:
        raise UserError(f"{where}: {error} is missing or malformed") from error


def _gpt2_config(values: Mapping[str, Any]) -> ModelConfig:
    theirs = values.get("activation_function", "gelu_new")
    activations = {hf: ours for ours, hf in _GPT2_ACTIVATIONS.items()}
    for name, ok in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        if values.get(name, ok) != ok:
            raise UserError(f"config.json: {name}={values[name]} is not supported")
    if theirs not in activations:
        raise UserError(f"config.json: activation_function {theirs!r} is not supported")
    return ModelConfig.from_shape(
        "gpt2",
        vocab_size=values["vocab_size"],
        context_length=values["n_positions"],
        n_layer=values["n_layer"],
        n_head=values["n_head"],
        n_embd=values["n_embd"],
        n_hidden=values.get("n_inner") or 4 * values["n_embd"],
        activation=activations[theirs],
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=values.get("tie_word_embeddings", True),
    )


def _llama_config(values: Mapping[str, Any], kind: str) -> ModelConfig:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    scaling = rope.get("rope_type", rope.get("type", "default"))
    if scaling != "default" or values.get("attention_bias") or values.get("mlp_bias"):
        raise UserError(f"config.json: rope scaling {scaling!r} or biases are not supported")
    if values.get("hidden_act", "silu") != "silu":
        raise UserError(f"config.json: hidden_act {values['hidden_act']!r} is not supported")
    if values.get("use_sliding_window"):
        raise UserError("config.json: use_sliding_window is not supported")
    n_head, n_embd = values["num_attention_heads"], values["hidden_size"]
    return ModelConfig.from_shape(
        "modern",
        vocab_size=values["vocab_size"],
        context_length=values["max_position_embeddings"],
        n_layer=values["num_hidden_layers"],
        n_head=n_head,
        n_kv_head=values.get("num_key_value_heads") or n_head,
        n_embd=n_embd,
        head_dim=values.get("head_dim") or n_embd // n_head,
        n_hidden=values["intermediate_size"],
        qk_norm=kind == "qwen3",
        tie_embeddings=values.get("tie_word_embeddings", False),
        rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
        norm_eps=values["rms_norm_eps"],
    )


def _config_json(config: ModelConfig, end_of_text: int | None) -> dict[str, Any]:
    common = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": end_of_text,
        "eos_token_id": end_of_text,
        "torch_dtype": "float32",
    }
    if config.family == "gpt2":
        dropout = config.dropout
        return common | {
            "n_positions": config.context_length,
            "n_embd": config.n_embd,
            "n_layer": config.n_layer,
            "n_head": config.n_head,
            "n_inner": config.n_hidden,
            "activation_function": _GPT2_ACTIVATIONS[config.activation],
            "layer_norm_epsilon": config.norm_eps,
            **{f"{part}_pdrop": dropout for part in ("embd", "attn", "resid")},
        }
    return common | {
        "max_position_embeddings": config.context_length,
        "hidden_size": config.n_embd,
        "intermediate_size": config.n_hidden,
        "num_hidden_layers": config.n_layer,
        "num_attention_heads": config.n_head,
        "num_key_value_heads": config.n_kv_head,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "rms_norm_eps": config.norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "attention_bias": False,
        "attention_dropout": config.dropout,
    }


def _tensor_names(config: ModelConfig) -> Iterator[tuple[str | tuple[str, ...], str, bool]]:
    """(their name or q, k, v names, our name, transposed?) for every tensor of a checkpoint."""
    if config.family == "gpt2":
        yield from gpt2_names(config)
    else:
        yield from _llama_names(config)
    if not config.tie_embeddings:
        yield "lm_head.weight", "head.weight", False


def gpt2_names(config: ModelConfig) -> Iterator[tuple[str, str, bool]]:
    """As above, without the head; the biases are named even where the model has none."""
    yield "transformer.wte.weight", "token_embedding.weight", False
    yield "transformer.wpe.weight", "position_embedding.weight", False
    parts = {"ln_1": "attn_norm", "attn.c_attn": "attn.qkv", "attn.c_proj": "attn.out",
             "ln_2": "mlp_norm", "mlp.c_fc": "mlp.up", "mlp.c_proj": "mlp.down"}  # fmt: skip
    for layer in range(config.n_layer):
        for theirs, ours in parts.items():
            for kind in ("weight", "bias"):
                # OpenAI stored matrices as (in, out); torch's Linear is (out, in).
                transposed = kind == "weight" and ".c_" in theirs
                yield (
                    f"transformer.h.{layer}.{theirs}.{kind}",
                    f"blocks.{layer}.{ours}.{kind}",
                    transposed,
                )
    yield "transformer.ln_f.weight", "final_norm.weight", False
    yield "transformer.ln_f.bias", "final_norm.bias", False


def _llama_names(config: ModelConfig) -> Iterator[tuple[str | tuple[str, ...], str, bool]]:
    yield "model.embed_tokens.weight", "token_embedding.weight", False
    parts = {"input_layernorm": "attn_norm", "self_attn.o_proj": "attn.out",
             "post_attention_layernorm": "mlp_norm", "mlp.gate_proj": "mlp.gate",
             "mlp.up_proj": "mlp.up", "mlp.down_proj": "mlp.down"}  # fmt: skip
    if config.qk_norm:
        parts |= {"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
    for layer in range(config.n_layer):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        for their_part, our_part in parts.items():
            yield f"{theirs}.{their_part}.weight", f"{ours}.{our_part}.weight", False
        qkv = tuple(f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv")
        yield qkv, f"{ours}.attn.qkv.weight", False
    yield "model.norm.weight", "final_norm.weight", False


def _split_qkv(config: ModelConfig, weight: np.ndarray) -> list[np.ndarray]:
    q, kv = config.n_head * config.head_dim, config.n_kv_head * config.head_dim
    return np.split(weight, [q, q + kv])
