"""A model as one GGUF file, which llama.cpp and everything built on it runs.

    write_gguf(Path("book.gguf"), config, weights, tokenizer, kind="Q8_0", name="book")

The `gguf` package does the bytes; this room knows what llama.cpp wants its tensors, settings
and tokens to be called. It writes one tensor at a time, so a big model is never in memory twice.
It knows no run directory and no torch.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from glassgpt.checkpoints.huggingface import split_qkv
from glassgpt.config import ModelConfig, RopeScaling
from glassgpt.config import Precision as Kind
from glassgpt.errors import UserError, explain_os_errors
from glassgpt.system import replacing
from glassgpt.tokenizers.tokenizer import UNKNOWN, LibraryTokenizer, Tokenizer
from glassgpt.tokenizers.tokenizer_json import (
    GPT2_PATTERN,
    Spec,
    bpe_pattern,
    byte_alphabet,
    tokens_before,
)

if TYPE_CHECKING:
    from gguf import GGUFReader, GGUFWriter

_NAMES = {
    "token_embedding": "token_embd", "position_embedding": "position_embd",
    "final_norm": "output_norm", "head": "output",
    "attn_norm": "attn_norm", "attn.qkv": "attn_qkv", "attn.out": "attn_output",
    "attn.q_norm": "attn_q_norm", "attn.k_norm": "attn_k_norm", "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate", "mlp.up": "ffn_up", "mlp.down": "ffn_down",
}  # fmt: skip
_ROPE_FACTORS = "rope_freqs.weight"
_ROPE_RULE = "glassgpt.rope_scaling"  # the rule behind them, which the format has no key for
_Q8_BLOCK = 32  # numbers of a row that share a scale

# Field of ModelConfig -> key of the file, after the name of the architecture.
_SETTINGS = {
    "vocab_size": "vocab_size", "context_length": "context_length", "n_layer": "block_count",
    "n_embd": "embedding_length", "n_hidden": "feed_forward_length",
    "n_head": "attention.head_count", "n_kv_head": "attention.head_count_kv",
}  # fmt: skip
_GPT2_SETTINGS = _SETTINGS | {"norm_eps": "attention.layer_norm_epsilon"}
_MODERN_SETTINGS = _SETTINGS | {
    "norm_eps": "attention.layer_norm_rms_epsilon", "head_dim": "attention.key_length",
    "rope_theta": "rope.freq_base",
}  # fmt: skip

_MODERN_PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
# llama.cpp knows splitting patterns by name only.
_PATTERN_NAMES = {
    GPT2_PATTERN: "gpt-2",
    _MODERN_PATTERN % "{1,3}": "llama-bpe",
    _MODERN_PATTERN % "": "qwen2",
}


def write_gguf(
    path: Path,
    config: ModelConfig,
    weights: Mapping[str, np.ndarray],
    tokenizer: Tokenizer,
    *,
    kind: Kind,
    name: str,
    template: str | None = None,
    ends: Sequence[int] = (),
) -> list[str]:
    """Write the model with its matrices as `kind`; norms, biases and positions stay F32.

    `template` (Jinja) and the ids that end an answer are those of a chat model.

    Returns the matrices that are F16 although Q8_0 was asked for, because their rows are no
    multiple of 32 long. The file is whole or absent. Raises `UserError` for models and
    tokenizers that llama.cpp has no words for, and for a disk that refuses.
    """
    gguf = _package()
    stored = _stored_config(config)
    writer = gguf.GGUFWriter(None, stored.family)
    _add_settings(writer, stored, kind, name)
    end = _add_tokenizer(writer, tokenizer, stored.vocab_size)
    if template is not None:
        writer.add_chat_template(template)
    if others := [token for token in ends if token != end]:
        writer.add_eot_token_id(others[0])
    # Names and shapes come first in the file, so walk once over tensors that take no memory.
    shapes = config.weight_shapes.items()
    hollow = {ours: np.broadcast_to(np.float32(0), shape) for ours, shape in shapes}
    kinds = {}
    for theirs, tensor in _tensors(config, hollow):
        kinds[theirs] = gguf.GGMLQuantizationType[_kind_of(theirs, tensor.shape, kind)]
        block, size = gguf.GGML_QUANT_SIZES[kinds[theirs]]
        n_bytes = tensor.size // block * size
        writer.add_tensor_info(theirs, tensor.shape, tensor.dtype, n_bytes, kinds[theirs])
    with replacing(path) as file:
        try:
            _write(writer, Path(file.name), _tensors(config, weights), kinds)
        finally:
            with contextlib.suppress(OSError):
                writer.close()
    half = gguf.GGMLQuantizationType.F16
    return [theirs for theirs, was in kinds.items() if kind == "Q8_0" and was == half]


def read_gguf(path: Path) -> tuple[ModelConfig, dict[str, np.ndarray]]:
    """The model in a file that `write_gguf` wrote: what others will compute with.

    Of GPT-2's variants the format knows one only: biases, and the tanh form of GELU.
    """
    gguf = _package()
    try:
        with explain_os_errors(f"read {path}"):
            reader = gguf.GGUFReader(path)
        tensors = {t.name: t for t in reader.tensors}
        config = _read_settings(reader, tied="output.weight" not in tensors)
        if _ROPE_FACTORS in tensors:
            rule = RopeScaling(**json.loads(reader.fields[_ROPE_RULE].contents()))
            config = dataclasses.replace(config, rope_scaling=rule)
            if not np.array_equal(tensors[_ROPE_FACTORS].data, _rope_factors(config)):
                raise ValueError(f"{_ROPE_FACTORS} does not follow from {_ROPE_RULE}")
        weights = {}
        for ours in config.weight_shapes:
            found = [tensors[theirs] for theirs in _their_names(config, ours)]
            parts = [gguf.dequantize(part.data, part.tensor_type) for part in found]
            weights[ours] = _join_qkv(config, parts) if len(parts) > 1 else parts[0]
    except (KeyError, IndexError, ValueError) as error:
        if isinstance(error, UserError):
            raise
        raise UserError(f"{path} is damaged, or no GGUF file of ours: {error}") from error
    return config, weights


def _package() -> Any:
    try:
        import gguf
    except ImportError as error:
        raise UserError("GGUF files need: pip install 'glassgpt[gguf]'") from error
    return gguf


# -- tensors -------------------------------------------------------------------------------------


def _stored_config(config: ModelConfig) -> ModelConfig:
    """The model that the file will describe; raises `UserError` where it would be another."""
    if config.n_layer == 0:
        raise UserError("n_layer=0: llama.cpp runs no model without blocks; keep the checkpoint")
    if config.activation == "relu":
        raise UserError(
            "activation=relu: llama.cpp's gpt2 computes GELU only; keep the checkpoint, or train "
            "with activation=gelu_tanh"
        )
    if config.family == "gpt2":  # always with biases (zero, if need be), and GELU's tanh form
        return dataclasses.replace(config, bias=True, activation="gelu_tanh")
    if config.rope_scaling and config.rope_scaling.kind == "llama3" and config.qk_norm:
        raise UserError("rope scaling llama3 with qk_norm: llama.cpp's qwen3 can't compute it")
    return config


def _tensors(
    config: ModelConfig, weights: Mapping[str, np.ndarray]
) -> Iterator[tuple[str, np.ndarray]]:
    """(llama.cpp's name, tensor) in the order of the file; each weight is asked for once."""
    stored, given = _stored_config(config), config.weight_shapes
    if config.rope_scaling and config.rope_scaling.kind == "llama3":
        yield _ROPE_FACTORS, _rope_factors(config)
    for ours, shape in stored.weight_shapes.items():
        weight = weights[ours] if ours in given else np.zeros(shape, np.float32)
        names = _their_names(stored, ours)
        parts = _split_qkv(stored, weight) if len(names) > 1 else [weight]
        yield from zip(names, parts, strict=True)


def _rope_factors(config: ModelConfig) -> np.ndarray:  # (D/2,)
    """By what the frequency of each pair of dimensions is divided."""
    plain = dataclasses.replace(config, rope_scaling=None).rope_frequencies
    return (np.array(plain) / np.array(config.rope_frequencies)).astype(np.float32)


def _their_names(config: ModelConfig, ours: str) -> list[str]:
    """ "blocks.3.mlp.up.weight" -> ["blk.3.ffn_up.weight"]; only gpt2 keeps q, k and v in one."""
    match = re.fullmatch(r"(?:blocks\.(\d+)\.)?(.+)\.(weight|bias)", ours)
    assert match, ours
    layer, part, kind = match.groups()
    name = f"blk.{layer}.{_NAMES[part]}.{kind}" if layer else f"{_NAMES[part]}.{kind}"
    if part == "attn.qkv" and config.family != "gpt2":
        return [name.replace("qkv", letter) for letter in "qkv"]
    return [name]


def _split_qkv(config: ModelConfig, weight: np.ndarray) -> list[np.ndarray]:
    D, parts = config.head_dim, split_qkv(config, weight)
    if config.family == "llama":
        # Rotary positions turn pairs of numbers. Ours (and qwen3's) pair i with i + D/2;
        # llama.cpp's llama pairs 2i with 2i + 1, so the rows of each head change places.
        parts[:2] = (_swap_rows(part, (2, D // 2)) for part in parts[:2])
    return parts


def _join_qkv(config: ModelConfig, parts: list[np.ndarray]) -> np.ndarray:
    if config.family == "llama":
        parts = [*(_swap_rows(part, (config.head_dim // 2, 2)) for part in parts[:2]), parts[2]]
    return np.concatenate(parts)


def _swap_rows(weight: np.ndarray, head: tuple[int, int]) -> np.ndarray:  # [H*D, C] -> same
    """The D rows of each head, seen as a table of `head`'s two sizes, transposed."""
    return weight.reshape(-1, *head, weight.shape[1]).swapaxes(1, 2).reshape(weight.shape)


def _kind_of(name: str, shape: tuple[int, ...], kind: Kind) -> Kind:
    if len(shape) == 1 or name == "position_embd.weight":
        return "F32"
    return "F16" if kind == "Q8_0" and shape[-1] % _Q8_BLOCK else kind


def _write(
    writer: GGUFWriter,
    path: Path,
    tensors: Iterator[tuple[str, np.ndarray]],
    kinds: Mapping[str, Any],
) -> None:
    writer.write_header_to_file(path)
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    assert writer.fout is not None
    # The package writes tensors past Python's file, and then a full disk has no error number.
    file = writer.fout[0]
    writer.write_padding(file, file.tell())
    for name, tensor in tensors:
        data = _package().quantize(np.asarray(tensor, np.float32), kinds[name])
        file.write(np.ascontiguousarray(data).data)
        writer.write_padding(file, data.nbytes)
    file.flush()


# -- settings and tokens -------------------------------------------------------------------------


def _add_settings(writer: GGUFWriter, config: ModelConfig, kind: Kind, name: str) -> None:
    file_types = {"F32": "ALL_F32", "F16": "MOSTLY_F16", "Q8_0": "MOSTLY_Q8_0"}
    writer.add_type("model")
    writer.add_name(name)
    writer.add_file_type(_package().LlamaFileType[file_types[kind]])
    writer.add_quantization_version(_package().GGML_QUANT_VERSION)
    for field, key in (_GPT2_SETTINGS if config.family == "gpt2" else _MODERN_SETTINGS).items():
        value = getattr(config, field)
        if isinstance(value, float):
            writer.add_float32(f"{config.family}.{key}", value)
        else:
            writer.add_uint32(f"{config.family}.{key}", value)
    if config.position == "rope":
        writer.add_value_length(config.head_dim)
        writer.add_rope_dimension_count(config.head_dim)
    scaling = config.rope_scaling
    if scaling and scaling.kind == "llama3":
        writer.add_string(_ROPE_RULE, json.dumps(dataclasses.asdict(scaling)))
    elif scaling:
        writer.add_rope_scaling_type(_package().RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(scaling.factor)


def _read_settings(reader: GGUFReader, *, tied: bool) -> ModelConfig:
    family = reader.fields["general.architecture"].contents()
    gpt2 = family == "gpt2"
    fields = {
        field: reader.fields[f"{family}.{key}"].contents()
        for field, key in (_GPT2_SETTINGS if gpt2 else _MODERN_SETTINGS).items()
    }
    fields |= dict(tie_embeddings=tied, qk_norm=family == "qwen3")
    if f"{family}.rope.scaling.factor" in reader.fields:
        factor = reader.fields[f"{family}.rope.scaling.factor"].contents()
        fields["rope_scaling"] = RopeScaling(kind="linear", factor=factor)
    return ModelConfig.from_shape("gpt2" if gpt2 else "modern", **fields)


def _add_tokenizer(writer: GGUFWriter, tokenizer: Tokenizer, vocab_size: int) -> int:
    """Every tokenizer of ours goes as byte-level BPE, in the letters of `byte_alphabet`.

    Returns the id that ends a text.
    """
    types = _package().TokenType
    texts, kinds = [f"[PAD{i}]" for i in range(vocab_size)], [types.UNUSED] * vocab_size
    vocab: dict[str, int] = tokenizer.spec["model"]["vocab"]
    if tokenizer.kind == "char":
        vocab = {_letters(token): i for token, i in vocab.items()}
    for token, i in vocab.items():
        texts[i], kinds[i] = token, types.NORMAL
    for added in tokenizer.spec.get("added_tokens") or []:
        i, special = added["id"], added.get("special")
        texts[i], kinds[i] = added["content"], types.CONTROL if special else types.USER_DEFINED
    # Unless told otherwise, llama.cpp takes id 11 for the end, which is a letter here; where
    # there is no end of text, an id that never comes must stand for it.
    end = vocab_size - 1 if tokenizer.end_of_text is None else tokenizer.end_of_text
    if tokenizer.kind == "char":
        unknown = vocab.get(UNKNOWN)
        if unknown is None and tokenizer.end_of_text is None:
            raise UserError(
                "llama.cpp needs a token that ends a text, and this vocabulary of characters "
                "(nanoGPT's) has none to spare; export to onnx or numpy"
            )
        if unknown is not None:
            kinds[unknown] = types.UNKNOWN
            writer.add_unk_token_id(unknown)
            end = unknown if tokenizer.end_of_text is None else end
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(_pattern_name(tokenizer))
    writer.add_token_list(texts)
    writer.add_token_types(kinds)
    # The list of merges must not be empty; no UTF-8 contains the byte 255.
    writer.add_token_merges(_merges(tokenizer) or ["ÿ ÿ"])
    before = tokens_before(tokenizer.spec)
    writer.add_bos_token_id(before[0] if before else end)
    writer.add_eos_token_id(end)
    writer.add_add_bos_token(bool(before))
    return end


def _merges(tokenizer: Tokenizer) -> list[str]:
    """For characters: those that build each from its UTF-8 bytes, from left to right.

    No merge crosses the border of a character, and llama.cpp looks only finished tokens up in
    the vocabulary; so halves of characters need no ids, and unknown characters vanish.
    """
    if tokenizer.kind != "char":
        merges = tokenizer.spec["model"]["merges"]
        return [merge if isinstance(merge, str) else " ".join(merge) for merge in merges]
    characters = (_letters(c) for c in tokenizer.spec["model"]["vocab"] if len(c) == 1)
    steps = (f"{c[:n]} {c[n]}" for c in characters for n in range(1, len(c)))
    return list(dict.fromkeys(steps))


def _letters(token: str) -> str:
    alphabet = byte_alphabet()
    return "".join(alphabet[byte] for byte in token.encode("utf-8", "surrogatepass"))


def _pattern_name(tokenizer: Tokenizer) -> str:
    if tokenizer.kind != "bpe":
        return "gpt-2"  # where text is cut can't matter
    if isinstance(tokenizer, LibraryTokenizer):
        if _cuts_digits(tokenizer.spec):
            return "smollm"
        raise UserError(
            "this model's tokenizer is no byte-level BPE that llama.cpp has a name for; "
            "export to onnx or numpy, or convert the original with llama.cpp"
        )
    pattern = bpe_pattern(tokenizer.spec)
    if pattern not in _PATTERN_NAMES:
        known = ", ".join(_PATTERN_NAMES.values())
        raise UserError(
            f"llama.cpp has no name for the tokenizer's splitting pattern {pattern!r}; "
            f"those of {known} can be written"
        )
    return _PATTERN_NAMES[pattern]


def _cuts_digits(spec: Spec) -> bool:
    """GPT-2's pattern with every digit by itself, as SmolLM2 has it."""
    steps = (spec.get("pre_tokenizer") or {}).get("pretokenizers", [])
    return (
        [step.get("type") for step in steps] == ["Digits", "ByteLevel"]
        and bool(steps[0].get("individual_digits") and steps[1].get("use_regex", True))
        and not spec.get("normalizer")
    )
