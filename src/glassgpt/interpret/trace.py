"""One forward pass with nothing hidden: every tensor operation of model.py, in order, by name.

    trace = record(model, tokens); trace["blocks.3.pattern"]; print(trace.table())

No second copy of the model: torch tells this room of each operation that model.py asks for, and it
notes the result, the line, the shapes. Whoever gives `edits` may put something else in its place.
What can be concluded from activations stands in lens.py; this room knows no text and no file.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode

import glassgpt.model as architecture
from glassgpt.cache import Cache, KVCache
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError, nearest
from glassgpt.interpret.activations import ACTIVATIONS, sizes
from glassgpt.interpret.trace_table import table
from glassgpt.model import GPT, attention_by_hand

Edit = Callable[[torch.Tensor], torch.Tensor]
Shape = tuple[int, ...]

_BY_WEIGHTS = {
    row.operation[1:]: name for name, row in ACTIVATIONS.items() if row.operation.startswith("@")
}
_BY_PLACE = {  # function, torch's operation, and how many of its kind came before
    (row.function, operation, int(row.operation.split()[1])): name
    for name, row in ACTIVATIONS.items()
    if not row.operation.startswith(("@", "split"))
    for operation in row.operation.split()[0].split("|")
}
_BY_PLACE["<lambda>", "gelu", 0] = "mlp_hidden"  # OpenAI's GELU stands outside of MLP.forward
_BY_PLACE["_in_bands", "cat", 0] = "head_out"  # all bands together
# Operations that only look at a tensor, or change nothing in evaluation.
_SILENT = {"size", "__get__", "tensor", "dim", "to", "detach", "dropout"}
_PRODUCTS = {"linear", "matmul"}


@dataclass(frozen=True)
class Operation:
    """One call of a torch function in model.py."""

    name: str  # torch's, with the weights it uses: "linear attn.qkv"
    layer: int | None  # of which block; None outside them
    activation: str | None  # what its result is called
    lines: tuple[int, int]  # of model.py, first and last
    inputs: tuple[Shape, ...]
    output: Shape  # of several results the last one's
    parameters: int  # that no earlier operation used
    flops: int  # multiplications and additions of products
    symbols: tuple[str, ...] = ()  # what each number of `output` stands for
    inputs_symbols: tuple[tuple[str, ...], ...] = ()
    statistics: tuple[float, float, float, float] | None = None  # mean, deviation, least, largest


@dataclass(frozen=True)
class Bands:
    """Attention, so many queries at a time: never the whole pattern in memory, and little is
    computed of the half that the mask hides. `look` gets (layer, first row, (B, H, rows, S))."""

    rows: int = 128
    look: Callable[[int, int, torch.Tensor], None] | None = None


class Trace:
    """What a forward pass computed: `operations` in order, `activations` by name."""

    def __init__(
        self,
        config: ModelConfig,
        operations: list[Operation],
        activations: dict[str, torch.Tensor],
        rotation: tuple[torch.Tensor, torch.Tensor] | None = None,
        edits: Mapping[str, Edit] | None = None,
    ) -> None:
        self.config, self.operations, self.activations = config, operations, activations
        self.rotation, self.edits = rotation, edits or {}  # with which blocks can run again

    def tensor(self, name: str) -> torch.Tensor:
        """An activation by its name; raises `UserError` for one that there isn't."""
        if name not in self.activations:
            for layer in range(1, self.config.n_layer):
                if name == f"blocks.{layer}.resid_pre":  # what the block before left
                    name = f"blocks.{layer - 1}.resid_post"
        if name not in self.activations:
            known = list(self.activations)
            raise UserError(f"no activation {name!r} in this trace.{nearest(name, known)} "
                            f"There are {', '.join(known[:4])} ...; blocks 0 to "
                            f"{self.config.n_layer - 1}")  # fmt: skip
        return self.activations[name]

    def __getitem__(self, name: str) -> np.ndarray:
        """An activation as a float32 array: trace["blocks.0.pattern"] is (B, H, T, S)."""
        return self.tensor(name).detach().float().cpu().numpy()

    def table(self, layer: int | None = None, *, every: bool = False) -> str:
        """The pass, operation by operation, as text: of the blocks the first one, or `layer`, or
        `every` one."""
        return table(self.operations, self.config.n_layer, layer, every)


def record(
    model: GPT,
    tokens: torch.Tensor,
    *,
    edits: Mapping[str, Edit] | None = None,
    keep: Iterable[str] | None = None,
    loss: bool = False,
    statistics: bool = False,
    cache: Cache | None = None,
    positions: slice = slice(None),
    bands: Bands | None = None,
) -> Trace:
    """One forward pass over `tokens` (B, T), watched. Without gradients, in evaluation mode.

    `edits`: name of an activation -> function of its value, whose result takes its place in all
    that follows. `keep`: endings of the names of what to hold in memory ("pattern", "final");
    None: everything. `loss` adds the loss of every token but the first. `positions`: of the logits.
    With `bands`, what lies between q and head_out has no names, and operations are not noted.
    Raises `UserError` for names that the model does not have, and for more tokens than the
    context holds.
    """
    T, limit = tokens.size(1) + getattr(cache, "length", 0), model.config.context_length
    if not 1 <= T <= limit:
        raise UserError(f"{T} tokens; the context holds 1 to {limit}")
    watcher = _Watcher(model, edits, keep, statistics)
    with torch.no_grad(), _by_hand(model, bands), _caught_rotation(model) as rotation, watcher:
        logits = model(tokens, cache=cache, positions=positions)
        if loss and tokens.size(1) > 1:
            token_losses(logits, tokens)
    if unused := sorted(set(watcher.edits) - watcher.seen):
        names = sorted(watcher.seen)
        raise UserError(f"no activation {unused[0]!r} in this model.{nearest(unused[0], names)}")
    operations = [] if bands else _with_symbols(watcher.operations, model.config, loss)
    return Trace(model.config, operations, watcher.activations, next(iter(rotation), None),
                 watcher.edits)  # fmt: skip


def record_block(
    model: GPT, trace: Trace, layer: int, bands: Bands | None = None
) -> dict[str, torch.Tensor]:
    """The activations of one block again, from the stream before it that a trace without cache
    kept; the edits of that pass apply as they did."""
    x = trace.tensor(f"blocks.{layer}.resid_pre")
    watcher = _Watcher(model, trace.edits)
    with torch.no_grad(), _by_hand(model, bands), watcher:
        model.blocks[layer](x, trace.rotation, None)
    return watcher.activations


def record_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """The steps of attention again, from what a trace kept of a head: q (B, H, T, D), k and v
    (B, H, S, D) -> raw_scores, scores, masked_scores, pattern (B, H, T, S), head_out."""
    watcher = _Watcher()
    with torch.no_grad(), watcher:
        attention_by_hand(q, k, v)
    return watcher.activations


def shapes_of(config: ModelConfig, n_tokens: int, batch: int = 1, *, loss: bool = True) -> Trace:
    """The same without weights and without numbers: shapes, parameters and FLOPs of any config."""
    with torch.device("meta"):
        model = GPT(config).to("meta").eval()  # the table of angles, too
        return record(model, torch.zeros(batch, n_tokens, dtype=torch.int64), loss=loss, keep=())


@contextmanager
def _by_hand(model: GPT, bands: Bands | None = None):
    """Attention as the formula reads: the fused kernel never has scores to show."""
    was_training = model.training
    for layer, block in enumerate(model.blocks):
        attend = functools.partial(_in_bands, bands, layer) if bands else attention_by_hand
        block.attn.attend = attend  # type: ignore[union-attr,assignment]
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for block in model.blocks:
            del block.attn.attend  # type: ignore[union-attr]


def _in_bands(
    bands: Bands, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: Any
) -> torch.Tensor:
    """`attention_by_hand`, a band of queries after the other."""
    T, S = q.size(-2), k.size(-2)
    outputs = []
    for first in range(0, T, bands.rows):
        end = min(first + bands.rows, T)
        seen = S - T + end  # of the last one of them
        steps = record_attention(q[:, :, first:end], k[:, :, :seen], v[:, :, :seen])
        outputs.append(steps["head_out"])
        if bands.look is not None:
            bands.look(layer, first, steps["pattern"])
    return torch.cat(outputs, dim=-2)


@contextmanager
def _caught_rotation(model: GPT):
    """A list in which the rotation lies that the first block is given, where there is one."""
    caught: list[Any] = []
    if not len(model.blocks):
        yield caught
        return
    hook = model.blocks[0].register_forward_pre_hook(lambda _, given: caught.append(given[1]))
    try:
        yield caught
    finally:
        hook.remove()


def token_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of every token but the first, given those before: (B, T, V), (B, T) -> (B, T - 1)."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")


# -- watching ------------------------------------------------------------------------------------


class _Watcher(TorchFunctionMode):
    """Sees each torch function that is called; notes those that model.py calls."""

    def __init__(
        self,
        model: GPT | None = None,
        edits: Mapping[str, Edit] | None = None,
        keep: Iterable[str] | None = None,
        statistics: bool = False,
    ) -> None:
        super().__init__()
        self.edits, self.statistics = edits or {}, statistics
        self.keep = None if keep is None else frozenset(keep)
        self.operations: list[Operation] = []
        self.activations: dict[str, torch.Tensor] = {}
        self.seen: set[str] = set()
        self._split = ("q", "k", "v")
        self._weights: dict[int, str] = {}  # id -> name of the module
        if model is not None:
            if model.position_embedding is None:  # rotated before they are used
                self._split = ("q_plain", "k_plain", "v")
            for name, weight in model.named_parameters():
                self._weights.setdefault(id(weight), name.rpartition(".")[0])
        self._counted: set[int] = set()
        self._calls: Counter[tuple[str, str]] = Counter()  # in this block
        self._layer: int | None = None

    def __torch_function__(
        self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        place, name = _place(sys._getframe(1)), getattr(func, "__name__", str(func))
        first = result[0] if isinstance(result, (tuple, list)) and result else result
        if place is None or not isinstance(first, torch.Tensor):
            return result
        used = list(_tensors([args, kwargs]))
        module = self._enter(name, used)
        result, activation = self._name(place[0], name, module, result)
        if name not in _SILENT:
            self._note(f"{name} {module}" if module else name, activation, place, used, result)
        if activation is not None and activation.endswith(("resid_pre", "resid_post")):
            self._layer = None
        return result

    def _enter(self, name: str, used: list[torch.Tensor]) -> str | None:
        """The module whose weights are used. The first one of a block tells us where we are."""
        module = next((self._weights[id(t)] for t in used if id(t) in self._weights), None)
        if module == "token_embedding" and name == "linear":
            return "head"  # tied: the same table
        if module is None or not module.startswith("blocks."):
            return module
        _, layer, module = module.split(".", 2)
        self._layer = int(layer)
        if module == "attn_norm":
            self._calls.clear()
        return module

    def _name(
        self, function: str, name: str, module: str | None, result: Any
    ) -> tuple[Any, str | None]:
        """What `result` is called, and with `edits`, what takes its place."""
        if isinstance(result, (tuple, list)):
            if name != "split":
                return result, None
            return tuple(map(self._take, self._split, result)), self._full("v")
        count = self._calls[function, name]
        self._calls[function, name] += 1
        short = _BY_WEIGHTS.get(module or "") or _BY_PLACE.get((function, name, count))
        if short is None:
            return result, None
        if short == "resid_pre":
            self._layer = 0
        return self._take(short, result), self._full(short)

    def _full(self, short: str) -> str:
        return short if self._layer is None else f"blocks.{self._layer}.{short}"

    def _take(self, short: str, value: torch.Tensor) -> torch.Tensor:
        full = self._full(short)
        self.seen.add(full)
        if full in self.edits:
            edited = self.edits[full](value)
            assert edited.shape == value.shape, f"{full}: {edited.shape} for {value.shape}"
            value = edited
        if self.keep is None or short in self.keep:
            self.activations[full] = value
        return value

    def _note(
        self, name: str, activation: str | None, place: tuple[str, int, int],
        used: list[torch.Tensor], result: Any,
    ) -> None:  # fmt: skip
        """One row of the table."""
        output = result[-1] if isinstance(result, (tuple, list)) else result
        new = {id(t): t.numel() for t in used if id(t) in self._weights.keys() - self._counted}
        self._counted |= new.keys()
        product = name.split()[0] in _PRODUCTS
        self.operations.append(Operation(
            name, self._layer, activation, place[1:],
            inputs=tuple(tuple(t.shape) for t in used if id(t) not in self._weights),
            output=tuple(output.shape), parameters=sum(new.values()),
            flops=2 * output.numel() * used[0].size(-1) if product else 0,
            statistics=_statistics(output) if self.statistics else None,
        ))  # fmt: skip


def _tensors(things: Any) -> Iterable[torch.Tensor]:
    if isinstance(things, torch.Tensor):
        yield things
    elif isinstance(things, (tuple, list)):
        for thing in things:
            yield from _tensors(thing)
    elif isinstance(things, dict):
        yield from _tensors(list(things.values()))


def _statistics(x: torch.Tensor) -> tuple[float, float, float, float] | None:
    if x.is_meta or not x.numel() or not x.is_floating_point():
        return None
    finite = x[x.isfinite()].float()  # masked scores are -inf
    if not len(finite):
        return None
    return (finite.mean().item(), finite.std(correction=0).item(), finite.min().item(),
            finite.max().item())  # fmt: skip


# -- where in the source? ------------------------------------------------------------------------


def _place(frame: FrameType | None) -> tuple[str, int, int] | None:
    """(function, first line, last line) of the statement in model.py that called torch; None when
    it was somebody else."""
    here, package = _file_of(architecture), str(Path(__file__).parents[1])
    while frame is not None:
        code = frame.f_code
        if code.co_filename == here:
            function = code.co_qualname.removesuffix(".<locals>.<genexpr>")
            return function, *_statements()[frame.f_lineno]
        if code in (token_losses.__code__, _in_bands.__code__):
            return code.co_name, 0, 0
        if code.co_filename.startswith(package):
            return None  # the cache's affairs, or an edit
        frame = frame.f_back
    return None


def _file_of(module: Any) -> str:
    return module.__file__


@functools.cache
def source() -> str:
    """The text of model.py, to whose lines operations point."""
    return Path(_file_of(architecture)).read_text(encoding="utf-8")


@functools.cache
def _statements() -> dict[int, tuple[int, int]]:
    """Line of model.py -> first and last line of the statement that it belongs to."""
    found: dict[int, tuple[int, int]] = {}
    for node in ast.walk(ast.parse(source())):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            for line in range(node.lineno, (node.end_lineno or node.lineno) + 1):
                found[line] = node.lineno, node.end_lineno or node.lineno
    return found


# -- what do the numbers of a shape stand for? ---------------------------------------------------


def _with_symbols(operations: list[Operation], config: ModelConfig, loss: bool) -> list[Operation]:
    """Each operation with the letters of the shapes: those of a model whose sizes all differ."""
    probe = _probe(replace(config, n_layer=min(1, config.n_layer)), loss)
    named: list[Operation] = []
    like = {(op.layer, i): op for (op, i) in _numbered(probe)}
    for operation, i in _numbered(operations):
        layer = operation.layer and 0
        model = like[layer, i]
        assert (model.name, model.lines) == (operation.name, operation.lines), (model, operation)
        named.append(replace(operation, symbols=model.symbols,
                             inputs_symbols=model.inputs_symbols))  # fmt: skip
    return named


def _numbered(operations: list[Operation]) -> Iterable[tuple[Operation, int]]:
    """Each with its number among those of its layer."""
    counts: Counter[int | None] = Counter()
    for operation in operations:
        yield operation, counts[operation.layer]
        counts[operation.layer] += 1


@functools.lru_cache(maxsize=16)
def _probe(config: ModelConfig, loss: bool) -> list[Operation]:
    """The operations of such a model in which no two sizes are equal, so that each number of a
    shape has one meaning; on the meta device, behind some tokens in a cache."""
    T, cached, H = 7, 6, 10
    K = H if config.n_kv_head == config.n_head else 5
    D, gpt2 = 2 * 37, config.family == "gpt2"
    C = H * D if gpt2 else H * 41
    V, n_hidden = 1009, 499
    odd = replace(config, vocab_size=V, context_length=cached + T + 4, n_head=H, n_kv_head=K,
                  n_embd=C, head_dim=D, n_hidden=n_hidden, rope_scaling=None)  # fmt: skip
    meaning: dict[int, str] = {}
    for symbol, size in sizes(odd, T, batch=3, cached=cached).items():
        meaning.setdefault(size, symbol)  # the first name of a size that has two, as H and K
    with torch.device("meta"):
        model = GPT(odd).to("meta").eval()
        cache = KVCache(odd, batch=3, device="meta")
        cache.length = cached
        watcher = _Watcher(model, keep=())
        tokens = torch.zeros(3, T, dtype=torch.int64)
        with torch.no_grad(), _by_hand(model), watcher:
            logits = model(tokens, cache=cache)
            if loss:
                token_losses(logits, tokens)

    def letters(shape: Shape) -> tuple[str, ...]:
        return tuple(meaning[n] for n in shape)

    return [replace(op, symbols=letters(op.output), inputs_symbols=tuple(map(letters, op.inputs)))
            for op in watcher.operations]  # fmt: skip
