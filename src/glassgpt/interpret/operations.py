"""Every torch function that model.py calls, noted while the model runs.

    with torch.no_grad(), Watcher(model) as watcher: model(tokens)
    [operation.name for operation in watcher.operations]

torch tells a `TorchFunctionMode` of each call. The watcher notes the line of model.py, the shapes
and the work, and names the result by the table in activations.py; an edit may put another value in
its place. It does not know which pass is recorded, nor what for: that is trace.py.
"""

from __future__ import annotations

import ast
import functools
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch.overrides import TorchFunctionMode

import glassgpt.model as architecture
from glassgpt.interpret.activations import ACTIVATIONS
from glassgpt.model import GPT

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
_BY_PLACE["attention_in_bands", "cat", 0] = "head_out"  # all bands together
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
class _Place:
    """Where model.py called torch."""

    function: str
    lines: tuple[int, int]


class Watcher(TorchFunctionMode):
    """Sees each torch function that is called; notes those that model.py calls.

    `keep`: which activations to hold, by their short names; None: all. `others`: functions outside
    of model.py that belong to the pass, too.
    """

    def __init__(
        self,
        model: GPT | None = None,
        edits: Mapping[str, Edit] | None = None,
        keep: Iterable[str] | None = None,
        *,
        statistics: bool = False,
        others: Iterable[CodeType] = (),
    ) -> None:
        super().__init__()
        self.edits, self.statistics, self.others = edits or {}, statistics, frozenset(others)
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
        self._counted: set[int] = set()  # ids of weights whose numbers a row has
        self._calls: Counter[tuple[str, str]] = Counter()  # in this block
        self._layer: int | None = None

    def __torch_function__(
        self,
        func: Callable[..., object],
        types: object,
        args: tuple[object, ...] = (),
        kwargs: dict[str, object] | None = None,
    ) -> object:
        result = func(*args, **(kwargs or {}))
        place, name = self._place(sys._getframe(1)), getattr(func, "__name__", str(func))
        results = list(_tensors(result))
        if place is None or not results:
            return result
        used = list(_tensors([args, kwargs]))
        module = self._enter(name, used)
        short = self._short(place.function, name, module)
        if name == "split":
            result = tuple(map(self._take, self._split, results))
        elif short is not None and isinstance(result, torch.Tensor):
            result = results[-1] = self._take(short, result)
        activation = None if short is None else self._full(short)
        if name not in _SILENT:
            row = f"{name} {module}" if module else name
            self._note(row, activation, place.lines, used, results[-1])
        if short in ("resid_pre", "resid_post"):
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

    def _short(self, function: str, name: str, module: str | None) -> str | None:
        """What the result is called, without its block."""
        if name == "split":
            return "v"
        count = self._calls[function, name]
        self._calls[function, name] += 1
        short = _BY_WEIGHTS.get(module or "") or _BY_PLACE.get((function, name, count))
        if short == "resid_pre":
            self._layer = 0
        return short

    def _full(self, short: str) -> str:
        return short if self._layer is None else f"blocks.{self._layer}.{short}"

    def _take(self, short: str, value: torch.Tensor) -> torch.Tensor:
        """The value, or what an edit puts in its place."""
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
        self,
        name: str,
        activation: str | None,
        lines: tuple[int, int],
        used: list[torch.Tensor],
        output: torch.Tensor,
    ) -> None:
        """One row of the table."""
        new = {id(t): t.numel() for t in used if id(t) in self._weights.keys() - self._counted}
        self._counted |= new.keys()
        product = name.split()[0] in _PRODUCTS
        operation = Operation(
            name,
            self._layer,
            activation,
            lines,
            inputs=tuple(tuple(t.shape) for t in used if id(t) not in self._weights),
            output=tuple(output.shape),
            parameters=sum(new.values()),
            flops=2 * output.numel() * used[0].size(-1) if product else 0,
            statistics=_statistics(output) if self.statistics else None,
        )
        self.operations.append(operation)

    def _place(self, frame: FrameType | None) -> _Place | None:
        """The statement in model.py that called torch; None when it was somebody else."""
        package = str(Path(__file__).parents[1])
        while frame is not None:
            code = frame.f_code
            if code.co_filename == architecture.__file__:
                function = code.co_qualname.removesuffix(".<locals>.<genexpr>")
                return _Place(function, _statements()[frame.f_lineno])
            if code in self.others:
                return _Place(code.co_name, (0, 0))
            if code.co_filename.startswith(package):
                return None  # the cache's affairs, or an edit
            frame = frame.f_back
        return None


def _tensors(things: object) -> Iterator[torch.Tensor]:
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
    deviation = finite.std(correction=0).item()
    return finite.mean().item(), deviation, finite.min().item(), finite.max().item()


@functools.cache
def source() -> str:
    """The text of model.py, to whose lines operations point."""
    return Path(str(architecture.__file__)).read_text(encoding="utf-8")


@functools.cache
def _statements() -> dict[int, tuple[int, int]]:
    """Line of model.py -> first and last line of the statement that it belongs to."""
    found: dict[int, tuple[int, int]] = {}
    for node in ast.walk(ast.parse(source())):
        if isinstance(node, ast.stmt) and not hasattr(node, "body"):
            end = node.end_lineno or node.lineno
            found |= dict.fromkeys(range(node.lineno, end + 1), (node.lineno, end))
    return found
