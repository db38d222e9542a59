"""A trace that is held while a page looks at it: little is kept, the rest is computed again.

    held = HeldTrace(model, tokens); held.read("blocks.3.pattern", head=2)  # (T, S)

1,024 tokens through GPT-2 have 3 GB of activations. Kept are the residual stream, the outputs of
heads and MLPs, and small maps of attention; a block runs again when somebody looks into it. This
module knows no text and no HTTP.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch

from glassgpt.errors import UserError, nearest
from glassgpt.interpret.activations import ATTENTION_STEPS, KEPT, sizes, split_name, symbols_of
from glassgpt.interpret.operations import Edit
from glassgpt.interpret.trace import Bands, Trace, record, record_attention, record_block
from glassgpt.model import GPT

SIDE = 32  # most rows and columns of a small map: more can't be told apart on a page
_ROWS = 256  # positions whose logits are computed at a time: 50 MB with GPT-2's vocabulary


class MissingError(UserError):
    """The page asked for something that this model does not have."""


def as_batch(model: GPT, tokens: Sequence[int]) -> torch.Tensor:
    """A batch of one text, where the model is: (1, T)."""
    return torch.tensor([list(tokens)], device=model.head.weight.device)


class HeldTrace(Trace):
    """A trace of one text (1, T); `tensor` gives whole activations, `read` matrices of it."""

    def __init__(
        self, model: GPT, tokens: torch.Tensor, edits: Mapping[str, Edit] | None = None
    ) -> None:
        T, config = tokens.size(1), model.config
        self.model, self.tokens = model, tokens
        self._bin = -(-T // SIDE)  # positions that one point of a map stands for
        side = -(-T // self._bin)
        self.maps = np.zeros((config.n_layer, config.n_head, side, side), np.uint8)
        self._bands = Bands(self._bin * max(1, 128 // self._bin), self._look)
        last = slice(-1, None)
        found = record(model, tokens, edits=edits, keep=KEPT, positions=last, bands=self._bands)
        super().__init__(config, [], found.activations, found.rotation, found.edits)
        self.last_logits = self.activations.pop("logits")[0, -1].float().cpu().numpy()  # (V,)
        self.symbols = symbols_of(config)
        # The last block that ran again, and the steps of attention of the last head: one of each.
        self._block: dict[int, dict[str, torch.Tensor]] = {}
        self._head: dict[tuple[int, int], dict[str, torch.Tensor]] = {}
        self._losses: np.ndarray | None = None

    @property
    def n_tokens(self) -> int:
        return self.tokens.size(1)

    @property
    def n_bytes(self) -> int:
        parts = [self.activations, *self._block.values(), *self._head.values()]
        tensors = [tensor for part in parts for tensor in part.values()]
        return sum(one.nbytes for one in (*tensors, self.maps, self.last_logits))

    def shape(self, name: str) -> list[int]:
        """Without the batch. Raises `MissingError` for a name that this model does not have."""
        if name not in self.symbols:
            hint = nearest(name, self.symbols)
            raise MissingError(f"this model has no activation {name!r}.{hint}")
        size = sizes(self.config, self.n_tokens)
        return [size[letter] for letter in self.symbols[name]]

    def tensor(self, name: str) -> torch.Tensor:
        """Any activation with its batch of one, except for attention steps, logits and losses."""
        layer, short = split_name(name)
        known = name in self.activations or short == "resid_pre"
        if known or layer is None or layer >= self.config.n_layer:
            return super().tensor(name)
        if layer not in self._block:
            self._block.clear()  # before the next one runs, so that two are never in memory
            self._block[layer] = record_block(self.model, self, layer, self._bands)
        found = self._block[layer].get(name)
        return super().tensor(name) if found is None else found

    def check_cell(self, name: str, index: Sequence[int]) -> tuple[int, ...]:
        """`index` as a tuple; raises `MissingError` for a cell that this model does not have."""
        shape = self.shape(name)
        within = (0 <= i < n for i, n in zip(index, shape, strict=False))
        if len(index) != len(shape) or not all(within):
            raise MissingError(f"{name} is {tuple(shape)}; it has no cell {tuple(index)}")
        return tuple(index)

    def read(self, name: str, head: int | None = None, rows: slice = slice(None)) -> torch.Tensor:
        """An activation as float32 on the CPU, (T, ...); `head` is for those that have heads."""
        shape = self.shape(name)
        n_heads = shape[0] if len(shape) == 3 else 0
        if n_heads and (head is None or not 0 <= head < n_heads):
            raise MissingError(f"{name}: head={head}; it has heads 0 to {n_heads - 1}")
        if head is not None and not n_heads:
            raise MissingError(f"{name} has no heads")
        layer, short = split_name(name)
        if name == "loss":
            return torch.from_numpy(self.surprise()[0])[rows]
        if name == "logits":
            with torch.no_grad():
                found = self.model.head(self.tensor("final")[0, rows])
        elif short in ATTENTION_STEPS:
            assert layer is not None
            assert head is not None
            found = self._attention(layer, head)[short][0, 0, rows]
        elif name == "position_embedding":  # the same for every text, so it has no batch
            found = self.tensor(name)[rows]
        else:
            found = self.tensor(name)[(0, rows) if head is None else (0, head, rows)]
        return found.detach().float().cpu()

    def surprise(self) -> np.ndarray:
        """For each token but the first: its loss given those before it (nats), its rank among all
        tokens, and the entropy of what was expected. (3, T - 1) float32"""
        if self._losses is None:
            parts = []
            for first in range(0, self.n_tokens - 1, _ROWS):
                end = min(first + _ROWS, self.n_tokens - 1)
                logs = self.read("logits", rows=slice(first, end)).log_softmax(-1)  # (T', V)
                targets = self.tokens[0, first + 1 : end + 1, None].cpu()
                chosen = logs.gather(1, targets)  # (T', 1)
                entropy = -(logs.exp() * logs.clamp(min=-1e30)).sum(1)
                parts.append(torch.stack([-chosen[:, 0], (logs > chosen).sum(1).float(), entropy]))
            self._losses = torch.cat([torch.zeros(3, 0), *parts], dim=1).numpy()
        return self._losses

    def _attention(self, layer: int, head: int) -> dict[str, torch.Tensor]:
        if (layer, head) not in self._head:
            self._head.clear()
            shared = head * self.config.n_kv_head // self.config.n_head  # key/value head
            names = (("q", head), ("k", shared), ("v", shared))
            q, k, v = (self.tensor(f"blocks.{layer}.{x}")[:, at, None] for x, at in names)
            self._head[layer, head] = record_attention(q, k, v)
        return self._head[layer, head]

    def _look(self, layer: int, first: int, pattern: torch.Tensor) -> None:
        """Fill rows of the small maps: the largest of each square, x 255. pattern (1, H, T', S)"""
        size = self._bin
        rows, columns = (-(-n // size) for n in pattern.shape[-2:])
        missing = columns * size - pattern.size(-1), rows * size - pattern.size(-2)
        padded = torch.nn.functional.pad(pattern[0], (0, missing[0], 0, missing[1]))
        largest = padded.unflatten(1, (rows, size)).amax(2).unflatten(2, (columns, size)).amax(3)
        start = first // size
        small = (largest * 255).round().to(torch.uint8).cpu().numpy()
        self.maps[layer, :, start : start + rows, :columns] = small
