"""One forward pass with nothing hidden: every tensor operation of model.py, in order, by name.

    trace = record(model, tokens); trace["blocks.3.pattern"]; print(trace.table())

There is no second copy of the model: operations.py watches model.py at work. What can be concluded
from activations stands in lens.py; this module knows no text and no file.
"""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace

import numpy as np
import torch
import torch.nn.functional as F

from glassgpt.cache import Cache, KVCache
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError, nearest
from glassgpt.interpret.activations import sizes, split_name
from glassgpt.interpret.operations import Edit, Operation, Shape, Watcher
from glassgpt.model import GPT, attention_by_hand
from glassgpt.reporting.terminal import aligned

Rotation = tuple[torch.Tensor, torch.Tensor]  # cosines and sines of the positions


@dataclass(frozen=True)
class Bands:
    """Attention for so many queries at a time: the whole pattern is never in memory, and little is
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
        rotation: Rotation | None = None,
        edits: Mapping[str, Edit] | None = None,
    ) -> None:
        self.config, self.operations, self.activations = config, operations, activations
        self.rotation, self.edits = rotation, edits or {}  # with which blocks can run again

    def tensor(self, name: str) -> torch.Tensor:
        """An activation by its name; raises `UserError` for one that there isn't."""
        found, (layer, short) = name, split_name(name)
        if short == "resid_pre" and layer and layer < self.config.n_layer:
            found = f"blocks.{layer - 1}.resid_post"  # what the block before left
        if found not in self.activations:
            known, last = list(self.activations), self.config.n_layer - 1
            raise UserError(
                f"no activation {name!r} in this trace.{nearest(name, known)} "
                f"There are {', '.join(known[:4])} ...; blocks 0 to {last}"
            )
        return self.activations[found]

    def __getitem__(self, name: str) -> np.ndarray:
        """An activation as a float32 array: trace["blocks.0.pattern"] is (B, H, T, S)."""
        return self.tensor(name).detach().float().cpu().numpy()

    def table(self, layer: int | None = None, *, every: bool = False) -> str:
        """The pass, operation by operation, as text: of the blocks the first one, or `layer`, or
        `every` one."""
        return _table(self.operations, self.config.n_layer, layer, every)


# -- recording -----------------------------------------------------------------------------------


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
    that follows. `keep`: names (without the block) to hold in memory ("pattern", "final");
    None: everything. `loss` adds the loss of every token but the first. `positions`: of the logits.
    With `bands`, what lies between q and head_out has no names, and operations are not noted.
    Raises `UserError` for names that the model does not have, and for more tokens than the
    context holds.
    """
    T, limit = tokens.size(1) + getattr(cache, "length", 0), model.config.context_length
    if not 1 <= T <= limit:
        raise UserError(f"{T} tokens; the context holds 1 to {limit}")
    watcher = _watch(model, edits, keep, statistics=statistics)
    with torch.no_grad(), _by_hand(model, bands), _caught_rotation(model) as rotation, watcher:
        logits = model(tokens, cache=cache, positions=positions)
        if loss and tokens.size(1) > 1:
            token_losses(logits, tokens)
    if unused := sorted(set(watcher.edits) - watcher.seen):
        names = sorted(watcher.seen)
        raise UserError(f"no activation {unused[0]!r} in this model.{nearest(unused[0], names)}")
    operations = [] if bands else _with_symbols(watcher.operations, model.config, loss)
    caught = next(iter(rotation), None)
    return Trace(model.config, operations, watcher.activations, caught, watcher.edits)


def record_block(
    model: GPT, trace: Trace, layer: int, bands: Bands | None = None
) -> dict[str, torch.Tensor]:
    """The activations of one block, computed again from the stream before it. The trace must have
    been recorded without a cache; its edits apply as they did."""
    x = trace.tensor(f"blocks.{layer}.resid_pre")
    watcher = _watch(model, trace.edits)
    with torch.no_grad(), _by_hand(model, bands), watcher:
        model.blocks[layer](x, trace.rotation, None)
    return watcher.activations


def record_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> dict[str, torch.Tensor]:
    """The steps of attention, computed again from what a trace kept of a head: q (B, H, T, D), k
    and v (B, H, S, D) -> raw_scores, scores, masked_scores, pattern (B, H, T, S), head_out."""
    watcher = Watcher()
    with torch.no_grad(), watcher:
        attention_by_hand(q, k, v)
    return watcher.activations


def record_shapes(
    config: ModelConfig, n_tokens: int, batch: int = 1, *, loss: bool = True
) -> Trace:
    """The operations of any config, without weights and numbers: shapes, parameters and FLOPs."""
    with torch.device("meta"):
        model = GPT(config).to("meta").eval()  # the table of angles, too
        return record(model, torch.zeros(batch, n_tokens, dtype=torch.int64), loss=loss, keep=())


def token_losses(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    """Of every token but the first, given those before: (B, T, V), (B, T) -> (B, T - 1)."""
    return F.cross_entropy(logits[:, :-1].transpose(1, 2), tokens[:, 1:], reduction="none")


def attention_in_bands(
    bands: Bands, layer: int, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, *_: object
) -> torch.Tensor:
    """`attention_by_hand`, one band of queries after the other."""
    T, S = q.size(-2), k.size(-2)
    outputs = []
    for first in range(0, T, bands.rows):
        end = min(first + bands.rows, T)
        seen = S - T + end  # of the last query of the band
        steps = record_attention(q[:, :, first:end], k[:, :, :seen], v[:, :, :seen])
        outputs.append(steps["head_out"])
        if bands.look is not None:
            bands.look(layer, first, steps["pattern"])
    return torch.cat(outputs, dim=-2)


_watch = functools.partial(Watcher, others=(token_losses.__code__, attention_in_bands.__code__))


@contextmanager
def _by_hand(model: GPT, bands: Bands | None = None) -> Iterator[None]:
    """Attention as the formula reads: the fused kernel never has scores to show."""
    was_training = model.training
    for layer, block in enumerate(model.blocks):
        attend = functools.partial(attention_in_bands, bands, layer) if bands else attention_by_hand
        block.attn.attend = attend  # type: ignore[union-attr,assignment]
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
        for block in model.blocks:
            del block.attn.attend  # type: ignore[union-attr]


@contextmanager
def _caught_rotation(model: GPT) -> Iterator[list[Rotation | None]]:
    """A list that will hold the rotation that the first block is given."""
    caught: list[Rotation | None] = []
    if not len(model.blocks):
        yield caught
        return
    hook = model.blocks[0].register_forward_pre_hook(lambda _, given: caught.append(given[1]))
    try:
        yield caught
    finally:
        hook.remove()


# -- what do the numbers of a shape stand for? ---------------------------------------------------


def _with_symbols(operations: list[Operation], config: ModelConfig, loss: bool) -> list[Operation]:
    """Each operation with the symbols of its shapes: those of a model whose sizes all differ."""
    probe = _probe(replace(config, n_layer=min(1, config.n_layer)), loss)
    like, named = dict(_numbered(probe)), []
    for (layer, i), operation in _numbered(operations):
        model = like[layer and 0, i]
        assert (model.name, model.lines) == (operation.name, operation.lines), (model, operation)
        symbols = dict(symbols=model.symbols, inputs_symbols=model.inputs_symbols)
        named.append(replace(operation, **symbols))
    return named


def _numbered(operations: list[Operation]) -> Iterator[tuple[tuple[int | None, int], Operation]]:
    """Each with its layer, and its number among the operations of that layer."""
    counts: Counter[int | None] = Counter()
    for operation in operations:
        yield (operation.layer, counts[operation.layer]), operation
        counts[operation.layer] += 1


@functools.lru_cache(maxsize=16)
def _probe(config: ModelConfig, loss: bool) -> list[Operation]:
    """The operations of such a model in which no two sizes are equal, so that each number of a
    shape has one meaning; on the meta device, behind some tokens in a cache."""
    T, cached, H, D = 7, 6, 10, 2 * 37
    odd = replace(
        config,
        vocab_size=1009,
        context_length=cached + T + 4,
        n_head=H,
        n_kv_head=H if config.n_kv_head == config.n_head else 5,
        n_embd=H * D if config.family == "gpt2" else H * 41,
        head_dim=D,
        n_hidden=499,
        rope_scaling=None,
    )
    meaning: dict[int, str] = {}
    for symbol, size in sizes(odd, T, batch=3, cached=cached).items():
        meaning.setdefault(size, symbol)  # the first name of a size that has two, as H and K
    with torch.device("meta"):
        model = GPT(odd).to("meta").eval()
        cache = KVCache(odd, batch=3, device="meta")
        cache.length = cached
        watcher = _watch(model, keep=())
        tokens = torch.zeros(3, T, dtype=torch.int64)
        with torch.no_grad(), _by_hand(model), watcher:
            logits = model(tokens, cache=cache)
            if loss:
                token_losses(logits, tokens)

    def letters(shape: Shape) -> tuple[str, ...]:
        return tuple(meaning[n] for n in shape)

    return [
        replace(op, symbols=letters(op.output), inputs_symbols=tuple(map(letters, op.inputs)))
        for op in watcher.operations
    ]


# -- the table -----------------------------------------------------------------------------------


def _table(operations: list[Operation], n_layer: int, layer: int | None, every: bool) -> str:
    blocks = {0: "no blocks", 1: "block 0"}.get(n_layer, f"blocks 0 to {n_layer - 1}")
    if layer is not None and not 0 <= layer < n_layer:
        raise UserError(f"layer={layer}: the model has {blocks}")
    shown = set(range(n_layer)) if every else {layer or 0}
    measured = any(op.statistics for op in operations)
    header = ["operation", "gives", "shape", "numbers", "parameters", "MFLOPs"]
    header += ["mean", "deviation", "least", "largest"] if measured else []
    rows, place = [header], None
    for op in operations:
        if op.layer is not None and op.layer not in shown:
            continue
        if op.layer != place and op.layer is not None:
            rows.append([f"block {op.layer}:"])
        place = op.layer
        rows.append(_row(op))
    parameters, flops = sum(op.parameters for op in operations), sum(op.flops for op in operations)
    rows.append(["in all", "", "", "", f"{parameters:,}", f"{flops / 1e6:,.3f}"])
    full = [row + [""] * (len(header) - len(row)) for row in rows]
    lines = aligned(full, left=4).splitlines()
    if (hidden := n_layer - len(shown)) > 0:
        others = "other one has" if hidden == 1 else "others have"
        lines.append(f"{blocks}; the {others} the same shapes")
    return "\n".join(lines)


def _row(op: Operation) -> list[str]:
    name = op.name.replace("__getitem__", "select").replace("__invert__", "not")
    return [
        "  " * (op.layer is not None) + name,
        split_name(op.activation or "")[1],
        f"({', '.join(op.symbols)})",
        f"({', '.join(map(str, op.output))})",
        f"{op.parameters:,}" if op.parameters else "",
        f"{op.flops / 1e6:,.3f}" if op.flops else "",
        *(f"{x:.3g}" for x in op.statistics or ()),
    ]
