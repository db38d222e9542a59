"""Our tensor names and config <-> Hugging Face's (GPT2LMHeadModel, Llama, Qwen3).

With labels, the head tells classes apart instead of tokens: GPT2ForSequenceClassification, ....

    config_json, tensors = to_huggingface(config, weights, end=50256)

Works on NumPy arrays and only renames, transposes, splits and joins them, so a round trip is
exact to the last bit; reading, each when it is asked for. It knows no file and no torch.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from functools import partial

import numpy as np

from glassgpt.checkpoints.tensors import Lazy, tensor_shapes
from glassgpt.config import Family, ModelConfig, RopeScaling
from glassgpt.errors import UserError
from glassgpt.system import Json

_ARCHITECTURES: dict[Family, str] = {
    "gpt2": "GPT2LMHeadModel",
    "llama": "LlamaForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
}
_CLASSIFIERS: dict[Family, str] = {
    "gpt2": "GPT2ForSequenceClassification",
    "llama": "LlamaForSequenceClassification",
    "qwen3": "Qwen3ForSequenceClassification",
}
_ONE_OF_THEM = "single_label_classification"  # transformers' name for it
_GPT2_ACTIVATIONS = {"gelu_tanh": "gelu_new", "gelu": "gelu", "relu": "relu"}


def to_huggingface(
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    *,
    begin: int | None = None,
    end: int | list[int] | None = None,
    labels: Sequence[str] = (),
) -> tuple[dict[str, object], dict[str, np.ndarray]]:
    """Our weights -> the content of config.json and the tensors of model.safetensors.

    `begin` and `end`: ids of the tokens before and after a text, of the latter perhaps several.
    With `labels` it is a classifier, whose head is "score.weight".
    """
    tensors: dict[str, np.ndarray] = {}
    shapes = config.weight_shapes
    for theirs, ours, transposed in tensor_names(config, classifies=bool(labels)):
        if isinstance(theirs, tuple):  # Llama keeps q, k and v apart
            tensors |= zip(theirs, split_qkv(config, weights[ours]), strict=True)
        elif ours in weights:
            tensors[theirs] = weights[ours].T if transposed else weights[ours]
        else:  # GPT-2 always has biases; a model without them is one whose biases are zero
            width = shapes[ours.replace(".bias", ".weight")][0]
            tensors[theirs] = np.zeros(width, dtype=np.float32)
    tensors = {name: np.ascontiguousarray(tensor) for name, tensor in tensors.items()}
    values = _config_json(config, begin, end)
    pad = end[0] if isinstance(end, list) else end
    return values | (_classifier_json(config, labels, pad) if labels else {}), tensors


def from_huggingface(
    config: ModelConfig,
    tensors: Mapping[str, np.ndarray],
    where: str = "the checkpoint",
    labels: Sequence[str] = (),
) -> Mapping[str, np.ndarray]:
    """The tensors of a checkpoint -> our weights, each made when it is asked for.

    Of a classifier with these `labels`, "score.weight" (n_classes, C) instead of "head.weight".
    Raises `UserError` for missing or misshapen ones at once.
    """
    found = tensor_shapes(tensors)
    if config.n_layer > len(found):  # or the list of their names might fill the memory
        raise UserError(f"{where}: {len(found)} tensors are too few for {config.n_layer} layers")
    expected = config.weight_shapes | {"score.weight": (len(labels), config.n_embd)}
    if labels and "score.bias" in found:
        raise UserError(f"{where}: score.bias is not supported; a classifier's head has no bias")
    # The base model alone, as OpenAI's own gpt2 is stored, lacks the first part of the names.
    prefix = "transformer." if config.family == "gpt2" else "model."
    bare = not any(name.startswith(prefix) for name in found)
    if config.tie_embeddings and "lm_head.weight" in found and not labels:
        name = next(name for name in found if name.endswith(("wte.weight", "embed_tokens.weight")))
        if not np.array_equal(tensors["lm_head.weight"], tensors[name]):
            raise UserError(
                f"{where}: tie_word_embeddings is set, but lm_head.weight is not {name}"
            )
    makers = {}
    for theirs, ours, transposed in tensor_names(config, classifies=bool(labels)):
        names = [theirs] if isinstance(theirs, str) else list(theirs)
        names = [name.removeprefix(prefix) if bare else name for name in names]
        for name in names:
            if name not in found:
                raise UserError(f"{where}: the tensor {name} is missing")
        if ours.endswith("bias") and not config.bias:
            if np.any(tensors[names[0]]):
                raise UserError(f"{where}: {names[0]} is not zero, but the model has no biases")
            continue
        wanted = stored_shapes(config, expected[ours], len(names), transposed)
        for name, shape in zip(names, wanted, strict=True):
            if found[name] != shape:
                raise UserError(
                    f"{where}: {name} has shape {found[name]}; with this config it would be {shape}"
                )
        makers[ours] = partial(_join, tensors, names, transposed)
    return Lazy(makers)


def stored_shapes(
    config: ModelConfig, ours: tuple[int, ...], parts: int, transposed: bool
) -> list[tuple[int, ...]]:
    """The shapes of the one or three (q, k, v) tensors that hold our weight of shape `ours`."""
    if parts == 3:  # q, k and v
        return [(n, config.n_embd) for n in config.qkv_rows]
    return [ours[::-1] if transposed else ours]


def _join(tensors: Mapping[str, np.ndarray], names: list[str], transposed: bool) -> np.ndarray:
    if len(names) > 1:
        return np.concatenate([tensors[name] for name in names])
    return tensors[names[0]].T if transposed else tensors[names[0]]


def config_from_json(values: Json, where: str = "config.json") -> ModelConfig:
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
    if values.get("quantization_config"):
        raise UserError(f"{where}: quantized weights are not supported; fetch the original ones")
    try:
        return _gpt2_config(values) if kind == "gpt2" else _llama_config(values, kind)
    except UserError as error:
        raise UserError(f"{where}: {error}") from error
    except (KeyError, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise UserError(f"{where}: {error} is missing or malformed") from error


def labels_from_json(values: Json, where: str = "config.json") -> tuple[str, ...]:
    """The classes that a config.json names, in the order of their ids; () of a language model.

    Raises `UserError` for regression, and for texts that may have several labels at once.
    """
    try:
        if not values["architectures"][0].endswith("ForSequenceClassification"):
            return ()
    except (KeyError, TypeError, AttributeError, IndexError):
        return ()
    # Two of these names are what transformers leaves out.
    names = values.get("id2label") or {"0": "LABEL_0", "1": "LABEL_1"}
    if not isinstance(names, dict):
        raise UserError(f"{where}: id2label is malformed")
    if len(names) < 2 or values.get("problem_type", _ONE_OF_THEM) not in (None, _ONE_OF_THEM):
        raise UserError(
            f"{where}: {len(names)} labels with problem_type "
            f"{values.get('problem_type')} are not supported; only classifiers are "
            "that choose one label of two or more"
        )
    labels = tuple(str(names.get(str(i))) for i in range(len(names)))
    if len({*labels, "None"}) <= len(labels):
        raise UserError(f"{where}: in id2label an id is missing, or two have the same name")
    return labels


def _gpt2_config(values: Json) -> ModelConfig:
    theirs = values.get("activation_function", "gelu_new")
    activations = {hf: ours for ours, hf in _GPT2_ACTIVATIONS.items()}
    activations["gelu_pytorch_tanh"] = "gelu_tanh"  # the same formula
    for name, ok in (("scale_attn_by_inverse_layer_idx", False), ("scale_attn_weights", True)):
        if values.get(name, ok) != ok:
            raise UserError(f"{name}={values[name]} is not supported")
    if theirs not in activations:
        raise UserError(f"activation_function {theirs!r} is not supported")
    return ModelConfig.from_shape(
        "gpt2",
        vocab_size=values["vocab_size"],
        context_length=values.get("n_positions", 1024),
        n_layer=values["n_layer"],
        n_head=values["n_head"],
        n_embd=values["n_embd"],
        n_hidden=values.get("n_inner") or 4 * values["n_embd"],
        activation=activations[theirs],
        norm_eps=values.get("layer_norm_epsilon", 1e-5),
        tie_embeddings=values.get("tie_word_embeddings", True),
    )


def _llama_config(values: Json, kind: str) -> ModelConfig:
    rope = values.get("rope_parameters") or values.get("rope_scaling") or {}
    for name in ("attention_bias", "mlp_bias"):
        if values.get(name):
            raise UserError(f"{name} is not supported")
    if values.get("hidden_act", "silu") != "silu":
        raise UserError(f"hidden_act {values['hidden_act']!r} is not supported")
    if values.get("use_sliding_window"):
        raise UserError("use_sliding_window is not supported")
    n_head, n_embd = values["num_attention_heads"], values["hidden_size"]
    return ModelConfig.from_shape(
        "modern",
        vocab_size=values["vocab_size"],
        context_length=values.get("max_position_embeddings", 2048 if kind == "llama" else 32768),
        n_layer=values["num_hidden_layers"],
        n_head=n_head,
        n_kv_head=values.get("num_key_value_heads") or n_head,
        n_embd=n_embd,
        head_dim=values.get("head_dim") or (128 if kind == "qwen3" else n_embd // n_head),
        n_hidden=values["intermediate_size"],
        qk_norm=kind == "qwen3",
        tie_embeddings=values.get("tie_word_embeddings", False),
        rope_theta=float(rope.get("rope_theta", values.get("rope_theta", 10000.0))),
        rope_scaling=_rope_scaling(rope),
        norm_eps=values.get("rms_norm_eps", 1e-6),
    )


def _rope_scaling(rope: Json) -> RopeScaling | None:
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind == "default":
        return None
    if kind == "linear":
        return RopeScaling(kind="linear", factor=float(rope["factor"]))
    if kind == "llama3":
        return RopeScaling(
            kind="llama3",
            factor=float(rope["factor"]),
            low_freq_factor=float(rope["low_freq_factor"]),
            high_freq_factor=float(rope["high_freq_factor"]),
            original_context_length=rope["original_max_position_embeddings"],
        )
    raise UserError(f"rope scaling {kind!r} is not supported; linear and llama3 are")


def _rope_json(config: ModelConfig) -> Json:
    scaling, theta = config.rope_scaling, {"rope_theta": config.rope_theta}
    if scaling is None:
        return {"rope_type": "default"} | theta
    values = {"rope_type": scaling.kind, "factor": scaling.factor} | theta
    if scaling.kind == "llama3":
        values |= {
            "low_freq_factor": scaling.low_freq_factor,
            "high_freq_factor": scaling.high_freq_factor,
            "original_max_position_embeddings": scaling.original_context_length,
        }
    return values


def _config_json(
    config: ModelConfig, begin: int | None, end: int | list[int] | None
) -> dict[str, object]:
    common = {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "tie_word_embeddings": config.tie_embeddings,
        "bos_token_id": begin,
        "eos_token_id": end,
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
        "rope_parameters": _rope_json(config),  # transformers 5; the next line is for 4
        "rope_scaling": _rope_json(config) if config.rope_scaling else None,
        "attention_bias": False,
        "attention_dropout": config.dropout,
    }


def _classifier_json(
    config: ModelConfig, labels: Sequence[str], pad: int | None
) -> dict[str, object]:
    """What transformers wants to know beside: it reads the last token that is not `pad`."""
    return {
        "architectures": [_CLASSIFIERS[config.family]],
        "num_labels": len(labels),
        "id2label": {str(i): label for i, label in enumerate(labels)},
        "label2id": {label: i for i, label in enumerate(labels)},
        "problem_type": _ONE_OF_THEM,
        "pad_token_id": pad,
    }


def tensor_names(
    config: ModelConfig, *, classifies: bool = False
) -> Iterator[tuple[str | tuple[str, ...], str, bool]]:
    """(their name or q, k, v names, our name, transposed?) for every tensor of a checkpoint."""
    if config.family == "gpt2":
        yield from gpt2_names(config)
    else:
        yield from _llama_names(config)
    if classifies:
        yield "score.weight", "score.weight", False
    elif not config.tie_embeddings:
        yield "lm_head.weight", "head.weight", False


def gpt2_names(config: ModelConfig) -> Iterator[tuple[str, str, bool]]:
    """As above, without the head; the biases are named even where the model has none."""
    yield "transformer.wte.weight", "token_embedding.weight", False
    yield "transformer.wpe.weight", "position_embedding.weight", False
    parts = {
        "ln_1": "attn_norm",
        "attn.c_attn": "attn.qkv",
        "attn.c_proj": "attn.out",
        "ln_2": "mlp_norm",
        "mlp.c_fc": "mlp.up",
        "mlp.c_proj": "mlp.down",
    }
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
    parts = {
        "input_layernorm": "attn_norm",
        "self_attn.o_proj": "attn.out",
        "post_attention_layernorm": "mlp_norm",
        "mlp.gate_proj": "mlp.gate",
        "mlp.up_proj": "mlp.up",
        "mlp.down_proj": "mlp.down",
    }
    if config.qk_norm:
        parts |= {"self_attn.q_norm": "attn.q_norm", "self_attn.k_norm": "attn.k_norm"}
    for layer in range(config.n_layer):
        theirs, ours = f"model.layers.{layer}", f"blocks.{layer}"
        for their_part, our_part in parts.items():
            yield f"{theirs}.{their_part}.weight", f"{ours}.{our_part}.weight", False
        qkv = tuple(f"{theirs}.self_attn.{part}_proj.weight" for part in "qkv")
        yield qkv, f"{ours}.attn.qkv.weight", False
    yield "model.norm.weight", "final_norm.weight", False


def split_qkv(config: ModelConfig, weight: np.ndarray) -> list[np.ndarray]:
    """The rows of `attn.qkv` that make queries, keys and values."""
    return np.split(weight, np.cumsum(config.qkv_rows)[:-1])
