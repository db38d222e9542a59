"""Where one number of a pass comes from: the terms with the largest share, the rest, the total.

    origin = explain(model, tokens, read, "blocks.0.attn_out", (3, 5)); origin.total, origin.value

Every activation in activations.py is a sum, a product, a norm, a softmax or a copy of earlier ones
and of weights. Here each is written out in float64 for a single cell. `read(name, head, rows)`
gives earlier activations as (rows, columns), so this module does not know what is in memory.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Protocol

import torch

from glassgpt.interpret.activations import split_name, stream_names
from glassgpt.model import GPT, MLP

SHOWN = 8  # terms
Index = tuple[int, ...]
Cell = tuple[str, Index]  # name of an activation, and where in it
Factor = tuple[float, Cell | None]  # a number, and which cell it is; None: a weight or a constant

# Activation -> the one it is made of, and the module of model.py that makes it.
_NORMS = {
    "attn_in": ("resid_pre", "attn_norm"),
    "q_normed": ("q_plain", "attn.q_norm"),
    "k_normed": ("k_plain", "attn.k_norm"),
    "mlp_in": ("resid_mid", "mlp_norm"),
    "final": ("resid_post", "final_norm"),
}
_LINEAR = {
    "qkv": ("attn_in", "attn.qkv"),
    "mlp_gate": ("mlp_in", "mlp.gate"),
    "mlp_up": ("mlp_in", "mlp.up"),
    "mlp_out": ("mlp_hidden", "mlp.down"),
    "logits": ("final", "head"),
}
_SUMS = {"resid_mid": ("resid_pre", "attn_out"), "resid_post": ("resid_mid", "mlp_out")}


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
    index: Index
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
    index: Index,
    edited: Collection[str] = (),
) -> Origin:
    """The cell at `index` of an activation: (t, c), with heads (h, t, d), of losses (t,).

    Indices count from 0 and must be within the activation. `edited`: activations that something
    else was put in place of; where that shows in the cell, the origin says so.
    """
    origin = _Formulas(model, tokens, read, name, index).origin()
    value, total = origin.value, origin.sum.total
    if name in edited and not math.isclose(value, total, rel_tol=1e-4, abs_tol=1e-4):
        put = Sum([Term("put in its place", value, [value], [None])])
        return Origin(name, index, value, "edited", "switched off, or from another text", put)
    return origin


class _Formulas:
    """The formulas of model.py, for one cell."""

    def __init__(
        self, model: GPT, tokens: Sequence[int], read: Read, name: str, index: Index
    ) -> None:
        self.model, self.config, self.tokens, self.read = model, model.config, tokens, read
        self.asked, self.at = name, index
        self.layer, self.short = split_name(name)

    def origin(self) -> Origin:
        formulas: dict[str, Callable[[], Origin]] = {
            **dict.fromkeys(_NORMS, self.norm),
            **dict.fromkeys(_LINEAR, self.linear),
            **dict.fromkeys(_SUMS, self.stream),
            **dict.fromkeys(("token_embedding", "position_embedding"), self.embedding),
            **dict.fromkeys(("q_plain", "k_plain", "v"), self.split),
            **dict.fromkeys(("q", "k"), self.query_or_key),
            "resid_pre": self.resid_pre,
            "raw_scores": self.raw_scores,
            "scores": self.scores,
            "masked_scores": self.masked_scores,
            "pattern": self.pattern,
            "head_out": self.head_out,
            "attn_out": self.attn_out,
            "mlp_hidden": self.mlp_hidden,
            "loss": self.loss,
        }
        return formulas[self.short]()

    # -- reading ---------------------------------------------------------------------------------

    def full(self, short: str) -> str:
        """Of an activation or a module beside the one that is asked for: its full name."""
        return short if self.layer is None else f"blocks.{self.layer}.{short}"

    def row(self, name: str, t: int, head: int | None = None) -> torch.Tensor:
        return self.read(name, head, slice(t, t + 1))[0].double()

    def cell(self, name: str, at: Index) -> float:
        if len(at) == 1:
            return self.row(name, at[0]).item()
        return self.row(name, at[-2], at[0] if len(at) == 3 else None)[at[-1]].item()

    def factor(self, name: str, *at: int) -> Factor:
        return self.cell(name, at), (name, at)

    def weights(self, module: str, j: int) -> torch.Tensor:
        return self.model.get_parameter(f"{module}.weight")[j].detach().double().cpu()

    def bias(self, module: str, j: int) -> list[Term]:
        bias = getattr(self.model.get_submodule(module), "bias", None)
        return [] if bias is None else [_term(f"bias[{j}]", (bias[j].item(), None))]

    def found(
        self, how: str, formula: str, terms: Sum | list[Term], denominator: Sum | None = None
    ) -> Origin:
        of = terms if isinstance(terms, Sum) else Sum(terms)
        value = self.cell(self.asked, self.at)
        return Origin(self.asked, self.at, value, how, formula, of, denominator)

    # -- kinds of cells --------------------------------------------------------------------------

    def embedding(self) -> Origin:
        (t, c), what = self.at, self.short.removesuffix("_embedding")
        row = self.tokens[t] if what == "token" else t
        value = self.weights(self.short, row)[c].item()
        term = _term(f"{what} table[{row}, {c}]", (value, None))
        return self.found("copy", f"row {row} of the {what} table", [term])

    def copied(self, name: str, *at: int) -> Origin:
        term = _term(_label(name, at), self.factor(name, *at))
        return self.found("copy", f"what {split_name(name)[1]} gave", [term])

    def added(self, *names: str) -> Origin:
        terms = [_term(_label(name, self.at), self.factor(name, *self.at)) for name in names]
        return self.found("sum", " + ".join(split_name(name)[1] for name in names), terms)

    def stream(self) -> Origin:
        return self.added(*map(self.full, _SUMS[self.short]))

    def resid_pre(self) -> Origin:
        if self.layer:
            return self.copied(f"blocks.{self.layer - 1}.resid_post", *self.at)
        if self.config.position == "learned":
            return self.added("token_embedding", "position_embedding")
        return self.copied("token_embedding", *self.at)

    def norm(self) -> Origin:
        source, module = map(self.full, _NORMS[self.short])
        name = stream_names(self.config)[-1] if self.short == "final" else source
        *head, t, i = self.at
        x = self.row(name, t, head[0] if head else None)
        layernorm = self.config.norm == "layernorm"
        mean = x.mean().item() if layernorm else 0.0
        scale = ((x - mean).square().mean() + self.config.norm_eps).rsqrt().item()
        weight = self.weights(module, i).item()
        factors: list[Factor] = [(x[i].item(), (name, self.at)), (scale, None), (weight, None)]
        terms = [_term(f"{_label(name, self.at)} / σ × weight", *factors)]
        if not layernorm:
            return self.found("norm", "x / σ × weight, σ² = mean of x² + ε", terms)
        terms.append(_term("−mean / σ × weight", (-mean, None), (scale, None), (weight, None)))
        terms += [_term("bias", (bias.value, None)) for bias in self.bias(module, i)]
        return self.found("norm", "(x − mean) / σ × weight + bias, σ² = variance + ε", terms)

    def linear(self) -> Origin:
        (t, j), (name, module) = self.at, map(self.full, _LINEAR[self.short])
        short, bias = split_name(name)[1], self.bias(module, j)
        terms = _largest(
            [self.row(name, t), self.weights(module, j)],
            lambda i: f"{short}[{t}, {i}] × W[{j}, {i}]",
            lambda i: [(name, (t, i)), None],
            bias,
        )
        return self.found("sum", f"{short}[{t}] · W[{j}]" + " + bias" * bool(bias), terms)

    # -- attention -------------------------------------------------------------------------------

    def split(self) -> Origin:
        (head, t, d), H, K = self.at, self.config.n_head, self.config.n_kv_head
        first = {"q": 0, "k": H, "v": H + K}[self.short[0]]
        return self.copied(self.full("qkv"), t, (first + head) * self.config.head_dim + d)

    def query_or_key(self) -> Origin:
        if self.config.position != "rope":
            return self.split()
        (head, t, d), half = self.at, self.config.head_dim // 2
        name = self.full(f"{self.short}{'_normed' if self.config.qk_norm else '_plain'}")
        sign, other = (-1.0, d + half) if d < half else (1.0, d - half)
        cos, sin = (table[t, d].item() for table in (self.model.cos, self.model.sin))
        x, partner = self.factor(name, head, t, d), self.factor(name, head, t, other)
        turned = f"{'−' if sign < 0 else ''}{_label(name, (head, t, other))} × sin"
        terms = [
            _term(f"{_label(name, self.at)} × cos", x, (cos, None)),
            _term(turned, partner, (sign * sin, None)),
        ]
        formula = f"the pair ({min(d, other)}, {max(d, other)}) turned by the angle of place {t}"
        return self.found("rotation", formula, terms)

    def group(self, head: int) -> int:
        """The key/value head of a head."""
        return head * self.config.n_kv_head // self.config.n_head

    def raw_scores(self) -> Origin:
        (head, t, s), q, k = self.at, self.full("q"), self.full("k")
        group = self.group(head)
        terms = _largest(
            [self.row(q, t, head), self.row(k, s, group)],
            lambda d: f"q[{head}, {t}, {d}] × k[{group}, {s}, {d}]",
            lambda d: [(q, (head, t, d)), (k, (group, s, d))],
        )
        return self.found("sum", f"q[{head}, {t}] · k[{group}, {s}]", terms)

    def scores(self) -> Origin:
        D, name = self.config.head_dim, self.full("raw_scores")
        factors = self.factor(name, *self.at), (1 / math.sqrt(D), None)
        term = _term(f"{_label(name, self.at)} / √{D}", *factors)
        return self.found("product", "raw_scores / √D", [term])

    def masked_scores(self) -> Origin:
        _, t, s = self.at
        if s <= t:
            return self.copied(self.full("scores"), *self.at)
        term = Term(f"place {s} comes after {t}", -math.inf)
        return self.found("mask", "no token sees what comes after it", [term])

    def pattern(self) -> Origin:
        (head, t, s), name = self.at, self.full("masked_scores")
        row = self.row(name, t, head)
        powers = (row - row.max()).exp()  # (S,)
        bottom = _largest(
            [powers],
            lambda i: f"exp(score[{t}, {i}] − largest)",
            lambda i: [(name, (head, t, i))],
        )
        factors = (powers[s].item(), (name, self.at)), (1 / powers.sum().item(), None)
        term = _term("exp(score − largest) / Σ", *factors)
        formula = f"exp(score[{t}, {s}]) / Σ exp(score[{t}])"
        return self.found("softmax", formula, [term], bottom)

    def head_out(self) -> Origin:
        (head, t, d), pattern, v = self.at, self.full("pattern"), self.full("v")
        group = self.group(head)
        terms = _largest(
            [self.row(pattern, t, head), self.read(v, group)[:, d].double()],
            lambda s: f"pattern[{head}, {t}, {s}] × v[{group}, {s}, {d}]",
            lambda s: [(pattern, (head, t, s)), (v, (group, s, d))],
        )
        return self.found("sum", f"pattern[{head}, {t}] · v[{group}, :, {d}]", terms)

    def attn_out(self) -> Origin:
        (t, j), name, module = self.at, self.full("head_out"), self.full("attn.out")
        D, bias = self.config.head_dim, self.bias(module, j)
        heads = [self.row(name, t, head) for head in range(self.config.n_head)]
        terms = _largest(
            [torch.cat(heads), self.weights(module, j)],
            lambda i: f"head_out[{i // D}, {t}, {i % D}] × W[{j}, {i}]",
            lambda i: [(name, (i // D, t, i % D)), None],
            bias,
        )
        formula = "all heads, one behind the other, · W" + " + bias" * bool(bias)
        return self.found("sum", formula, terms)

    # -- MLP and loss ----------------------------------------------------------------------------

    def mlp_hidden(self) -> Origin:
        up, gate, kind = self.full("mlp_up"), self.full("mlp_gate"), self.config.activation
        gated = kind == "swiglu"
        x, source = self.factor(gate if gated else up, *self.at)
        mlp = self.model.get_submodule(self.full("mlp"))
        assert isinstance(mlp, MLP)
        bent = mlp.activation(torch.tensor(x, dtype=torch.float64)).item()
        if gated:
            term = _term("silu(mlp_gate) × mlp_up", (bent, source), self.factor(up, *self.at))
            return self.found("product", "silu(mlp_gate) × mlp_up", [term])
        share = bent / x if x else 0.0
        term = _term(f"{kind}({_label(up, self.at)})", (x, source), (share, None))
        return self.found("function", f"{kind}(mlp_up)", [term])

    def loss(self) -> Origin:
        (t,) = self.at
        logits, target = self.row("logits", t), self.tokens[t + 1]
        largest = logits.max()
        bottom = _largest(
            [(logits - largest).exp()],
            lambda i: f"exp(logit[{t}, {i}] − largest)",
            lambda i: [("logits", (t, i))],
        )
        chosen: Factor = -logits[target].item(), ("logits", (t, target))
        terms = [
            _term(f"log Σ exp(logit[{t}])", (logits.logsumexp(0).item(), None)),
            _term(f"−logit[{t}, {target}] of the token that came", chosen),
        ]
        formula = "log Σ exp(logits) − logit of the token that came"
        return self.found("loss", formula, terms, bottom)


def _term(label: str, *factors: Factor) -> Term:
    numbers = [number for number, _ in factors]
    return Term(label, math.prod(numbers), numbers, [source for _, source in factors])


def _largest(
    factors: Sequence[torch.Tensor],
    label: Callable[[int], str],
    sources: Callable[[int], list[Cell | None]],
    extra: Sequence[Term] = (),
) -> Sum:
    """The largest products of vectors (N,), element by element, and of some more terms."""
    products = torch.stack(list(factors)).prod(0)  # (N,)
    best = products.abs().topk(min(SHOWN, len(products))).indices.tolist()
    terms = [
        Term(label(i), products[i].item(), [f[i].item() for f in factors], sources(i)) for i in best
    ]
    terms = sorted([*terms, *extra], key=lambda term: -abs(term.value))
    rest = products.sum().item() - sum(products[i].item() for i in best)
    rest += sum(term.value for term in terms[SHOWN:])
    return Sum(terms[:SHOWN], len(products) + len(extra) - len(terms[:SHOWN]), rest)


def _label(name: str, at: Sequence[int]) -> str:
    return f"{split_name(name)[1]}[{', '.join(map(str, at))}]"
