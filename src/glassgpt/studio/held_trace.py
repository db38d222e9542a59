"""A pass that is held while a page looks at it: little is kept, the rest is computed again.

    held = HeldTrace(model, tokens); held.read("blocks.3.pattern", head=2)  # (T, S)

1,024 tokens through GPT-2 have 3 GB of activations. Kept are the residual stream, what heads and
MLPs gave, and small maps of attention; a block runs again when somebody looks into it. This room
knows no text and no HTTP.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import numpy as np
import torch

from glassgpt.config import ModelConfig
from glassgpt.errors import UserError, nearest
from glassgpt.interpret.trace import Bands, Edit, Trace, record, record_attention, record_block
from glassgpt.model import GPT

SIDE = 32  # of a small map, at most
_KEPT = ("token_embedding", "position_embedding", "resid_pre", "resid_post", "head_out", "mlp_out",
         "final", "logits")  # fmt: skip
ATTENTION = ("raw_scores", "scores", "masked_scores", "pattern")  # each (T, S) of a head
_ROWS = 256  # whose logits are computed at a time: 50 MB with GPT-2's vocabulary


class MissingError(UserError):
    """Asked for something that this model does not have."""


def symbols_of(config: ModelConfig) -> dict[str, list[str]]:
    """Every activation of a model, in order: name -> what the numbers of its shape stand for."""
    rotated, stream = config.position == "rope", ["T", "C"]
    fused = ["T", "(H+2K)D" if config.n_kv_head != config.n_head else "3HD"]
    found = {"token_embedding": stream} | ({} if rotated else {"position_embedding": stream})
    heads = ["H", "T", "D"], ["K", "T", "D"]
    block: dict[str, list[str]] = {"resid_pre": stream, "attn_in": stream, "qkv": fused}
    for suffix, there in (("_plain", rotated), ("_normed", config.qk_norm), ("", True)):
        block |= {f"q{suffix}": heads[0], f"k{suffix}": heads[1]} if there else {}
    block |= {"v": heads[1], **dict.fromkeys(ATTENTION, ["H", "T", "S"]), "head_out": heads[0]}
    block |= {"attn_out": stream, "resid_mid": stream, "mlp_in": stream}
    gated = ["mlp_gate"] if config.activation == "swiglu" else []
    block |= dict.fromkeys([*gated, "mlp_up", "mlp_hidden"], ["T", "F"])
    block |= {"mlp_out": stream, "resid_post": stream}
    for layer in range(config.n_layer):
        found |= {f"blocks.{layer}.{name}": symbols for name, symbols in block.items()}
    if config.n_layer == 0:
        found["blocks.0.resid_pre"] = stream
    return found | {"final": stream, "logits": ["T", "V"], "loss": ["T-1"]}


def sizes(config: ModelConfig, n_tokens: int) -> dict[str, int]:
    """What each letter of a shape is, for one text."""
    H, K, D = config.n_head, config.n_kv_head, config.head_dim
    return {"T": n_tokens, "S": n_tokens, "T-1": n_tokens - 1, "C": config.n_embd, "H": H, "K": K,
            "D": D, "F": config.n_hidden, "V": config.vocab_size, "L": config.n_layer,
            "3HD": 3 * H * D, "(H+2K)D": (H + 2 * K) * D}  # fmt: skip


class HeldTrace(Trace):
    """A trace of one text (1, T); `tensor` gives whole activations, `read` matrices of it."""

    def __init__(
        self, model: GPT, tokens: torch.Tensor, edits: Mapping[str, Edit] | None = None
    ) -> None:
        T, config = tokens.size(1), model.config
        self.model, self.tokens = model, tokens
        self._bin = -(-T // SIDE)  # so many positions are one point of a map
        side = -(-T // self._bin)
        self.maps = np.zeros((config.n_layer, config.n_head, side, side), np.uint8)
        self._bands = Bands(self._bin * max(1, 128 // self._bin), self._look)
        found = record(model, tokens, edits=edits, keep=_KEPT, positions=slice(-1, None),
                       bands=self._bands)  # fmt: skip
        super().__init__(config, [], found.activations, found.rotation, found.edits)
        self.last_logits = self.activations.pop("logits")[0, -1].float().cpu().numpy()  # (V,)
        self.symbols = symbols_of(config)
        self._again: tuple[int, dict[str, torch.Tensor]] | None = None  # a block that ran again
        self._steps: tuple[tuple[int, int], dict[str, torch.Tensor]] | None = None  # a head
        self._losses: np.ndarray | None = None

    @property
    def n_tokens(self) -> int:
        return self.tokens.size(1)

    @property
    def n_bytes(self) -> int:
        again = self._again[1] if self._again else {}
        steps = self._steps[1] if self._steps else {}
        tensors = [*self.activations.values(), *again.values(), *steps.values()]
        return sum(one.nbytes for one in (*tensors, self.maps, self.last_logits))

    def shape(self, name: str) -> list[int]:
        """Without the batch."""
        return [sizes(self.config, self.n_tokens)[letter] for letter in self.symbols[name]]

    def tensor(self, name: str) -> torch.Tensor:
        """Any activation but the steps of attention, logits and losses: with its batch of one."""
        if name not in self.activations and (found := re.fullmatch(r"blocks\.(\d+)\..+", name)):
            layer = int(found[1])
            if layer < self.config.n_layer and not name.endswith(".resid_pre"):
                if self._again is None or self._again[0] != layer:
                    self._again = None  # never two of them
                    self._again = layer, record_block(self.model, self, layer, self._bands)
                if name in self._again[1]:
                    return self._again[1][name]
        return super().tensor(name)

    def check(self, name: str, head: int | None = None) -> None:
        """Raises `MissingError` for what there isn't."""
        if name not in self.symbols:
            raise MissingError(
                f"this model has no activation {name!r}.{nearest(name, self.symbols)}"
            )
        letters = self.symbols[name]
        if len(letters) == 3:
            there = sizes(self.config, 1)[letters[0]]
            if head is None or not 0 <= head < there:
                raise MissingError(f"{name}: head={head}; it has heads 0 to {there - 1}")
        elif head is not None:
            raise MissingError(f"{name} has no heads")

    def check_cell(self, name: str, index: Sequence[int]) -> tuple[int, ...]:
        """`index` as a tuple; raises `MissingError` for a cell that there isn't."""
        if name not in self.symbols:
            self.check(name)
        shape = self.shape(name)
        within = (0 <= i < n for i, n in zip(index, shape, strict=False))
        if len(index) != len(shape) or not all(within):
            raise MissingError(f"{name} is {tuple(shape)}; it has no cell {tuple(index)}")
        return tuple(index)

    def read(self, name: str, head: int | None = None, rows: slice = slice(None)) -> torch.Tensor:
        """An activation as float32 on the CPU: (T, ...), of the one head where it has heads."""
        self.check(name, head)
        short = name.rpartition(".")[2]
        if name == "loss":
            return torch.from_numpy(self.losses())[rows]
        if name == "logits":
            with torch.no_grad():
                found = self.model.head(self.tensor("final")[0, rows])
        elif short in ATTENTION:
            assert head is not None
            found = self._attention(int(name.split(".")[1]), head)[short][0, 0, rows]
        elif name == "position_embedding":  # the same for every text, so it has no batch
            found = self.tensor(name)[rows]
        else:
            found = self.tensor(name)[(0, rows) if head is None else (0, head, rows)]
        return found.float().cpu()

    def losses(self) -> np.ndarray:
        """Of every token but the first, given those before it: (T - 1,), in nats."""
        return self.surprise()[0]

    def surprise(self) -> np.ndarray:
        """For each token but the first: its loss, its rank among all tokens, and the entropy of
        what was expected. (3, T - 1) float32"""
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
        if self._steps is None or self._steps[0] != (layer, head):
            self._steps = None
            shared = head * self.config.n_kv_head // self.config.n_head  # key/value head
            q, k, v = (self.tensor(f"blocks.{layer}.{x}")[:, at, None]
                       for x, at in (("q", head), ("k", shared), ("v", shared)))  # fmt: skip
            self._steps = (layer, head), record_attention(q, k, v)
        return self._steps[1]

    def _look(self, layer: int, first: int, pattern: torch.Tensor) -> None:
        """Make the rows of small maps: the largest of each square, x 255. pattern (1, H, T', S)"""
        size = self._bin
        rows, columns = (-(-n // size) for n in pattern.shape[-2:])
        missing = columns * size - pattern.size(-1), rows * size - pattern.size(-2)
        padded = torch.nn.functional.pad(pattern[0], (0, missing[0], 0, missing[1]))
        largest = padded.unflatten(1, (rows, size)).amax(2).unflatten(2, (columns, size)).amax(3)
        start = first // size
        small = (largest * 255).round().to(torch.uint8).cpu().numpy()
        self.maps[layer, :, start : start + rows, :columns] = small
