"""Where one number of a pass comes from: the terms with the largest share, the rest, the total.

    origin = explain(model, tokens, read, "blocks.0.attn_out", (3, 5)); origin.total, origin.value

Every activation that trace.py names is a sum, a product, a norm, a softmax or a copy of earlier
ones and of weights. Here each is written out in float64 for a single cell. `read(name, head, rows)`
gives earlier activations as (rows, columns), so that this room doesn't ask what is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from glassgpt.interpret.activations import stream_names
from glassgpt.model import GPT

SHOWN = 8  # terms
Cell = tuple[str, tuple[int, ...]]  # name of an activation, and where in it


class Read(Protocol):
    """An activation without its batch, of one head where it has heads: float32 on the CPU."""

    def __call__(
        self, name: str, head: int | None = None, rows: slice = slice(None), /
    ) -> torch.Tensor: ...


@dataclass(frozen=True)
class Term:
    """A product that takes part in a sum; `sources` says of each factor which cell it is."""

    label: str
    value: float
    factors: list[float] = field(default_factory=list)
    sources: list[Cell | None] = field(default_factory=list)


@dataclass(frozen=True)
class Sum:
    """Of all terms those with the largest share, and what the others add."""

    terms: list[Term]
    rest_count: int = 0
    rest: float = 0.0

    @property
    def total(self) -> float:
        return sum(term.value for term in self.terms) + self.rest


@dataclass(frozen=True)
class Origin:
    """How a cell was computed. `total` differs from `value` by float32's rounding only."""

    name: str
    index: tuple[int, ...]
    value: float
    how: str  # copy, sum, product, norm, rotation, mask, softmax, function, loss; or edited
    formula: str
    sum: Sum
    denominator: Sum | None = None  # of a softmax

    @property
    def difference(self) -> float:
        total = self.sum.total
        return 0.0 if self.value == total else self.value - total


def explain(
    model: GPT,
    tokens: Sequence[int],
    read: Read,
    name: str,
    index: tuple[int, ...],
    edited: Collection[str] = (),
) -> Origin:
    """The cell at `index` of an activation: (t, c), with heads (h, t, d), of losses (t,).

    Indices count from 0 and must be within the activation. `edited`: activations that something
    else was put in place of; where that shows in the cell, the origin says so.
    """
    layer = int(name.split(".")[1]) if name.startswith("blocks.") else None
    page = _Page(model, tokens, read, layer)
    how, formula, found, *more = page.ways[name.rpartition(".")[2]](index)
    value = page.cell(name, index)
    origin = Origin(name, index, value, how, formula, found, *more)
    if name in edited and not math.isclose(value, found.total, rel_tol=1e-4, abs_tol=1e-4):
        put = Sum([Term("put in its place", value, [value], [None])])
        return Origin(name, index, value, "edited", "switched off, or from another text", put)
    return origin


def _sum(
    factors: Sequence[torch.Tensor],
    label: Callable[[int], str],
    sources: Callable[[int], list[Cell | None]],
    extra: Sequence[Term] = (),
) -> Sum:
    """The products of vectors (N,), element by element, and some more terms."""
    products = torch.stack(list(factors)).prod(0)  # (N,)
    best = products.abs().topk(min(SHOWN, len(products))).indices.tolist()
    terms = [Term(label(i), products[i].item(), [f[i].item() for f in factors], sources(i))
             for i in best]  # fmt: skip
    terms = sorted([*terms, *extra], key=lambda term: -abs(term.value))
    rest = products.sum().item() - sum(products[i].item() for i in best)
    rest += sum(term.value for term in terms[SHOWN:])
    return Sum(terms[:SHOWN], len(products) + len(extra) - len(terms[:SHOWN]), rest)


class _Page:
    """The formulas of model.py, for one cell of a block."""

    def __init__(self, model: GPT, tokens: Sequence[int], read: Read, layer: int | None) -> None:
        self.model, self.config, self.tokens, self.read = model, model.config, tokens, read
        self.layer = layer or 0
        self.block: Any = model.blocks[layer] if layer is not None and len(model.blocks) else None
        config, stream = model.config, stream_names(model.config)
        attn: Any = getattr(self.block, "attn", None)
        mlp: Any = getattr(self.block, "mlp", None)
        base = "_normed" if config.qk_norm else "_plain"
        rope = config.position == "rope"
        self.ways: dict[str, Callable[[Any], tuple]] = {
            "token_embedding": lambda at: self.embedded(at, tokens[at[0]], "token",
                                                        model.token_embedding),
            "position_embedding": lambda at: self.embedded(at, at[0], "position",
                                                           model.position_embedding),
            "resid_pre": self.resid_pre,
            "attn_in": lambda at: self.norm(at, self.name("resid_pre"), self.block.attn_norm),
            "qkv": lambda at: self.linear(at, self.name("attn_in"), attn.qkv),
            "q_plain": lambda at: self.split(at, 0),
            "k_plain": lambda at: self.split(at, config.n_head),
            "q_normed": lambda at: self.norm(at, self.name("q_plain"), attn.q_norm),
            "k_normed": lambda at: self.norm(at, self.name("k_plain"), attn.k_norm),
            "q": lambda at: self.rotated(at, f"q{base}") if rope else self.split(at, 0),
            "k": lambda at: (self.rotated(at, f"k{base}") if rope
                             else self.split(at, config.n_head)),
            "v": lambda at: self.split(at, config.n_head + config.n_kv_head),
            "raw_scores": self.raw_scores,
            "scores": self.scores,
            "masked_scores": self.masked,
            "pattern": self.softmax,
            "head_out": self.weighted,
            "attn_out": lambda at: self.merged(at, attn.out),
            "resid_mid": lambda at: self.added(at, self.name("resid_pre"), self.name("attn_out")),
            "mlp_in": lambda at: self.norm(at, self.name("resid_mid"), self.block.mlp_norm),
            "mlp_gate": lambda at: self.linear(at, self.name("mlp_in"), mlp.gate),
            "mlp_up": lambda at: self.linear(at, self.name("mlp_in"), mlp.up),
            "mlp_hidden": self.hidden,
            "mlp_out": lambda at: self.linear(at, self.name("mlp_hidden"), mlp.down),
            "resid_post": lambda at: self.added(at, self.name("resid_mid"), self.name("mlp_out")),
            "final": lambda at: self.norm(at, stream[-1], model.final_norm),
            "logits": lambda at: self.linear(at, "final", model.head),
            "loss": self.loss,
        }  # fmt: skip

    # -- reading ---------------------------------------------------------------------------------

    def name(self, short: str) -> str:
        return f"blocks.{self.layer}.{short}"

    def row(self, name: str, t: int, head: int | None = None) -> torch.Tensor:
        return self.read(name, head, slice(t, t + 1))[0].double()

    def cell(self, name: str, at: tuple[int, ...]) -> float:
        if len(at) == 1:
            return self.row(name, at[0]).item()
        return self.row(name, at[-2], at[0] if len(at) == 3 else None)[at[-1]].item()

    def term(self, label: str, *factors: tuple[float, Cell | None]) -> Term:
        numbers = [factor for factor, _ in factors]
        return Term(label, math.prod(numbers), numbers, [source for _, source in factors])

    def from_cell(self, name: str, *at: int) -> tuple[float, Cell]:
        return self.cell(name, at), (name, at)

    # -- kinds of cells --------------------------------------------------------------------------

    def embedded(self, at: Any, row: int, what: str, table: Any) -> tuple:
        value = table.weight[row, at[1]].item()
        term = self.term(f"{what} table[{row}, {at[1]}]", (value, None))
        return "copy", f"row {row} of the {what} table", Sum([term])

    def copied(self, name: str, *at: int) -> tuple:
        term = self.term(_label(name, at), self.from_cell(name, *at))
        return "copy", f"what {_short(name)} gave", Sum([term])

    def added(self, at: Any, *names: str) -> tuple:
        terms = [self.term(_label(name, at), self.from_cell(name, *at)) for name in names]
        return "sum", " + ".join(map(_short, names)), Sum(terms)

    def resid_pre(self, at: Any) -> tuple:
        if self.layer > 0:
            return self.copied(f"blocks.{self.layer - 1}.resid_post", *at)
        if self.config.position == "learned":
            return self.added(at, "token_embedding", "position_embedding")
        return self.copied("token_embedding", *at)

    def norm(self, at: Any, name: str, norm: Any) -> tuple:
        x = self.row(name, at[-2], at[0] if len(at) == 3 else None)
        layernorm = self.config.norm == "layernorm"
        mean = x.mean().item() if layernorm else 0.0
        scale = ((x - mean).square().mean() + self.config.norm_eps).rsqrt().item()
        weight = norm.weight[at[-1]].item()
        terms = [self.term(f"{_label(name, at)} / σ × weight", (x[at[-1]].item(), (name, at)),
                           (scale, None), (weight, None))]  # fmt: skip
        if not layernorm:
            return "norm", "x / σ × weight, σ² = mean of x² + ε", Sum(terms)
        terms.append(self.term("−mean / σ × weight", (-mean, None), (scale, None), (weight, None)))
        if norm.bias is not None:
            terms.append(self.term("bias", (norm.bias[at[-1]].item(), None)))
        return "norm", "(x − mean) / σ × weight + bias, σ² = variance + ε", Sum(terms)

    def linear(self, at: Any, name: str, layer: Any) -> tuple:
        (t, j), short = at, _short(name)
        found = _sum([self.row(name, t), _weights(layer, j)],
                     lambda i: f"{short}[{t}, {i}] × W[{j}, {i}]",
                     lambda i: [(name, (t, i)), None], self.bias(layer, j))  # fmt: skip
        return "sum", f"{short}[{t}] · W[{j}]" + " + bias" * (layer.bias is not None), found

    def bias(self, layer: Any, j: int) -> list[Term]:
        if layer.bias is None:
            return []
        return [self.term(f"bias[{j}]", (layer.bias[j].item(), None))]

    def split(self, at: Any, first: int) -> tuple:
        head, t, d = at
        return self.copied(self.name("qkv"), t, (first + head) * self.config.head_dim + d)

    def rotated(self, at: Any, short: str) -> tuple:
        (head, t, d), half, name = at, self.config.head_dim // 2, self.name(short)
        sign, other = (-1.0, d + half) if d < half else (1.0, d - half)
        cos, sin = (table[t, d].item() for table in (self.model.cos, self.model.sin))
        x, partner = self.from_cell(name, head, t, d), self.from_cell(name, head, t, other)
        terms = [self.term(f"{_label(name, at)} × cos", x, (cos, None)),
                 self.term(f"{'−' if sign < 0 else ''}{_label(name, (head, t, other))} × sin",
                           partner, (sign * sin, None))]  # fmt: skip
        formula = f"the pair ({min(d, other)}, {max(d, other)}) turned by the angle of place {t}"
        return "rotation", formula, Sum(terms)

    # -- attention -------------------------------------------------------------------------------

    def shared(self, head: int) -> int:
        """The key/value head of a head."""
        return head * self.config.n_kv_head // self.config.n_head

    def raw_scores(self, at: Any) -> tuple:
        (head, t, s), q, k = at, self.name("q"), self.name("k")
        group = self.shared(head)
        found = _sum([self.row(q, t, head), self.row(k, s, group)],
                     lambda d: f"q[{head}, {t}, {d}] × k[{group}, {s}, {d}]",
                     lambda d: [(q, (head, t, d)), (k, (group, s, d))])  # fmt: skip
        return "sum", f"q[{head}, {t}] · k[{group}, {s}]", found

    def scores(self, at: Any) -> tuple:
        D, name = self.config.head_dim, self.name("raw_scores")
        term = self.term(f"{_label(name, at)} / √{D}", self.from_cell(name, *at),
                         (1 / math.sqrt(D), None))  # fmt: skip
        return "product", "raw_scores / √D", Sum([term])

    def masked(self, at: Any) -> tuple:
        head, t, s = at
        if s <= t:
            return self.copied(self.name("scores"), *at)
        term = Term(f"place {s} comes after {t}", -math.inf)
        return "mask", "no token sees what comes after it", Sum([term])

    def softmax(self, at: Any) -> tuple:
        (head, t, s), name = at, self.name("masked_scores")
        row = self.row(name, t, head)
        powers = (row - row.max()).exp()  # (S,)
        bottom = _sum([powers], lambda i: f"exp(score[{t}, {i}] − largest)",
                      lambda i: [(name, (head, t, i))])  # fmt: skip
        term = self.term("exp(score − largest) / Σ", (powers[s].item(), (name, at)),
                         (1 / powers.sum().item(), None))  # fmt: skip
        return "softmax", f"exp(score[{t}, {s}]) / Σ exp(score[{t}])", Sum([term]), bottom

    def weighted(self, at: Any) -> tuple:
        (head, t, d), pattern, v = at, self.name("pattern"), self.name("v")
        group = self.shared(head)
        found = _sum([self.row(pattern, t, head), self.read(v, group)[:, d].double()],
                     lambda s: f"pattern[{head}, {t}, {s}] × v[{group}, {s}, {d}]",
                     lambda s: [(pattern, (head, t, s)), (v, (group, s, d))])  # fmt: skip
        return "sum", f"pattern[{head}, {t}] · v[{group}, :, {d}]", found

    def merged(self, at: Any, out: Any) -> tuple:
        (t, j), name, D = at, self.name("head_out"), self.config.head_dim
        heads = [self.row(name, t, head) for head in range(self.config.n_head)]
        found = _sum([torch.cat(heads), _weights(out, j)],
                     lambda i: f"head_out[{i // D}, {t}, {i % D}] × W[{j}, {i}]",
                     lambda i: [(name, (i // D, t, i % D)), None], self.bias(out, j))  # fmt: skip
        return "sum", "all heads, one behind the other, · W" + " + bias" * bool(
            out.bias is not None), found  # fmt: skip

    # -- MLP and loss ----------------------------------------------------------------------------

    def hidden(self, at: Any) -> tuple:
        up, gate, bend = self.name("mlp_up"), self.name("mlp_gate"), self.block.mlp.activation
        x, source = self.from_cell(up if self.block.mlp.gate is None else gate, *at)
        bent = bend(torch.tensor(x, dtype=torch.float64)).item()
        if self.block.mlp.gate is None:
            label, share = self.config.activation, bent / x if x else 0.0
            term = self.term(f"{label}({_label(up, at)})", (x, source), (share, None))
            return "function", f"{label}(mlp_up)", Sum([term])
        term = self.term("silu(mlp_gate) × mlp_up", (bent, source), self.from_cell(up, *at))
        return "product", "silu(mlp_gate) × mlp_up", Sum([term])

    def loss(self, at: Any) -> tuple:
        (t,) = at
        logits, target = self.row("logits", t), self.tokens[t + 1]
        largest = logits.max()
        bottom = _sum([(logits - largest).exp()], lambda i: f"exp(logit[{t}, {i}] − largest)",
                      lambda i: [("logits", (t, i))])  # fmt: skip
        terms = [self.term(f"log Σ exp(logit[{t}])", (logits.logsumexp(0).item(), None)),
                 self.term(f"−logit[{t}, {target}] of the token that came",
                           (-logits[target].item(), ("logits", (t, target))))]  # fmt: skip
        return "loss", "log Σ exp(logits) − logit of the token that came", Sum(terms), bottom


def _short(name: str) -> str:
    return name.rpartition(".")[2]


def _label(name: str, at: Sequence[int]) -> str:
    return f"{_short(name)}[{', '.join(map(str, at))}]"


def _weights(layer: Any, j: int) -> torch.Tensor:
    return layer.weight[j].detach().double().cpu()
