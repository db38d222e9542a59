"""Every activation of a forward pass: its name, its shape, and the line of model.py that gives it.

    >>> from glassgpt.config import ModelConfig
    >>> symbols_of(ModelConfig.from_shape("gpt2", vocab_size=65))["blocks.1.pattern"]
    ('H', 'T', 'S')
    >>> ACTIVATIONS["pattern"].function, ACTIVATIONS["pattern"].line
    ('attention_by_hand', 'scores.softmax(')

This is the only table of activations: operations.py names what it sees by it; lens.py, explain.py
and the studio take names and shapes from it. Who moves one of these lines of model.py to another
function, or adds an activation, changes the table. It knows no torch and no numbers.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from glassgpt.config import ModelConfig

Fill = Literal["zero", "mean"]  # what takes the place of a part that is switched off
LEGEND = {
    "B": "batch: texts side by side",
    "T": "tokens",
    "S": "tokens that can be seen",
    "C": "width of the residual stream",
    "H": "heads",
    "K": "key/value heads",
    "D": "dimensions of a head",
    "F": "width of the MLP",
    "V": "vocabulary",
    "L": "blocks",
}


@dataclass(frozen=True)
class Activation:
    """A row of the table: what a result is called, and how trace.py recognises it."""

    name: str  # without its block: "pattern", not "blocks.3.pattern"
    symbols: tuple[str, ...]  # of its shape, without the batch; letters as in LEGEND
    use: str  # K: kept of a long text, P: can be replaced by another text's ("patched")
    function: str  # of model.py
    operation: str  # "@" and the weights that are used, or torch's name and its number there
    line: str  # a piece of the line in model.py


_HIDDEN, _BLOCK, _ATTENTION = "GPT.hidden", "Block.forward", "CausalSelfAttention.forward"
_STEPS, _MLP = "attention_by_hand", "MLP.forward"

_TABLE = (
    ("token_embedding", "T C", "KP", _HIDDEN, "@token_embedding", "token_embedding(tokens)"),
    ("position_embedding", "T C", "KP", _HIDDEN, "@position_embedding", "position_embedding."),
    ("resid_pre", "T C", "K", _HIDDEN, "dropout 0", "x = self.dropout(x)"),
    ("attn_in", "T C", "P", _BLOCK, "@attn_norm", "self.attn_norm(x)"),
    ("qkv", "T (H+2K)D", "P", _ATTENTION, "@attn.qkv", "self.qkv(x)"),
    ("q_plain", "H T D", "", _ATTENTION, "split 0", "heads.split("),
    ("k_plain", "K T D", "", _ATTENTION, "split 0", "heads.split("),
    ("q_normed", "H T D", "", _ATTENTION, "@attn.q_norm", "self.q_norm(q)"),
    ("k_normed", "K T D", "", _ATTENTION, "@attn.k_norm", "self.k_norm(k)"),
    ("q", "H T D", "P", "rotate", "add 0", "return x * cos +"),  # unrotated: as q_plain
    ("k", "K T D", "P", "rotate", "add 1", "return x * cos +"),
    ("v", "K T D", "P", _ATTENTION, "split 0", "heads.split("),
    ("raw_scores", "H T S", "", _STEPS, "matmul 0", "q @ k.transpose(-2, -1)"),
    ("scores", "H T S", "", _STEPS, "div 0", "/ math.sqrt("),
    ("masked_scores", "H T S", "", _STEPS, "masked_fill 0", "scores.masked_fill("),
    ("pattern", "H T S", "", _STEPS, "softmax 0", "scores.softmax("),
    ("head_out", "H T D", "KP", _STEPS, "matmul 1", "return pattern @ v"),
    ("attn_out", "T C", "P", _ATTENTION, "@attn.out", "return self.out("),
    ("resid_mid", "T C", "P", _BLOCK, "add 0", "x = x + self.dropout(self.attn("),
    ("mlp_in", "T C", "P", _BLOCK, "@mlp_norm", "self.mlp_norm(x)"),
    ("mlp_gate", "T F", "", _MLP, "@mlp.gate", "self.gate(x)"),
    ("mlp_up", "T F", "", _MLP, "@mlp.up", "self.up(x)"),
    ("mlp_hidden", "T F", "P", _MLP, "mul|relu|gelu 0", "self.activation("),
    ("mlp_out", "T C", "KP", _MLP, "@mlp.down", "self.down(hidden)"),
    ("resid_post", "T C", "KP", _BLOCK, "add 1", "return x + self.dropout(self.mlp("),
    ("final", "T C", "K", _HIDDEN, "@final_norm", "self.final_norm(x)"),
    ("logits", "T V", "K", "GPT.forward", "@head", "self.head("),
    ("loss", "T-1", "K", "token_losses", "cross_entropy 0", ""),  # of trace.py: a model has none
)  # fmt: skip
ACTIVATIONS = {name: Activation(name, tuple(shape.split()), *rest) for name, shape, *rest in _TABLE}

KEPT = tuple(name for name, row in ACTIVATIONS.items() if "K" in row.use)
PATCHABLE = tuple(name for name, row in ACTIVATIONS.items() if "P" in row.use)
ATTENTION_STEPS = tuple(name for name, row in ACTIVATIONS.items() if "S" in row.symbols)


def split_name(name: str) -> tuple[int | None, str]:
    """ "blocks.3.pattern" -> (3, "pattern"); "logits" -> (None, "logits")."""
    block, _, short = name.rpartition(".")
    layer = block.removeprefix("blocks.")
    return (int(layer) if block.startswith("blocks.") and layer.isdecimal() else None), short


def stream_names(config: ModelConfig) -> list[str]:
    """The residual stream before the first block and after each: L + 1 names of activations."""
    return ["blocks.0.resid_pre", *(f"blocks.{i}.resid_post" for i in range(config.n_layer))]


def symbols_of(config: ModelConfig) -> dict[str, tuple[str, ...]]:
    """Every activation of a model, in order: full name -> the symbols of its shape."""
    absent = {
        "position_embedding": config.position == "rope",
        **dict.fromkeys(("q_plain", "k_plain"), config.position != "rope"),
        **dict.fromkeys(("q_normed", "k_normed"), not config.qk_norm),
        "mlp_gate": config.activation != "swiglu",
    }
    rows = {name: row.symbols for name, row in ACTIVATIONS.items() if not absent.get(name)}
    if config.n_kv_head == config.n_head:
        rows["qkv"] = ("T", "3HD")
    names = list(rows)
    start, end = names.index("resid_pre"), names.index("final")
    found = {name: rows[name] for name in names[:start]}
    for layer in range(config.n_layer):
        found |= {f"blocks.{layer}.{name}": rows[name] for name in names[start:end]}
    if config.n_layer == 0:
        found["blocks.0.resid_pre"] = rows["resid_pre"]
    return found | {name: rows[name] for name in names[end:]}


def sizes(config: ModelConfig, n_tokens: int, *, batch: int = 1, cached: int = 0) -> dict[str, int]:
    """What each symbol of a shape is, for texts of `n_tokens` behind `cached` ones."""
    H, K, D, C = config.n_head, config.n_kv_head, config.head_dim, config.n_embd
    return {
        "B": batch,
        "T": n_tokens,
        "S": cached + n_tokens,
        "T-1": n_tokens - 1,
        "1": 1,
        "C": C,
        "H": H,
        "K": K,
        "D": D,
        "D/2": D // 2,
        "F": config.n_hidden,
        "V": config.vocab_size,
        "L": config.n_layer,
        "context": config.context_length,
        "3H": 3 * H,
        "H+2K": H + 2 * K,
        "HD": H * D,
        "3C": 3 * C,
        "3HD": 3 * H * D,
        "(H+2K)D": (H + 2 * K) * D,
    }
