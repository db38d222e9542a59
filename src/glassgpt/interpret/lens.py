"""What activations mean: the logit lens, who wrote a logit, and what happens without a part.

    for name, logits in logit_lens(model, trace): print(name, logits[0, -1].argmax())
    record(model, tokens, edits=without(["3.h2", "5.mlp"], model.config))

Everything here is a function of a model and of what trace.py recorded, or makes edits for it. A
part of a model is written 3 (a block), 3.attn, 3.mlp or 3.h2 (a head of block 3).
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal, NamedTuple

import numpy as np
import torch

from glassgpt.config import ModelConfig
from glassgpt.errors import UserError
from glassgpt.interpret.activations import Fill, stream_names
from glassgpt.interpret.operations import Edit
from glassgpt.interpret.trace import Trace, record
from glassgpt.model import GPT

# -- the logit lens ------------------------------------------------------------------------------


@torch.no_grad()
def logit_lens(
    model: GPT, trace: Trace, positions: slice = slice(None)
) -> Iterator[tuple[str, torch.Tensor]]:
    """What the head would say if it read the stream here: (name, logits (B, T', V)), L + 1 times.

    The last one is the model's output (nostalgebraist, "interpreting GPT: the logit lens", 2020).
    """
    for name in stream_names(model.config):
        yield name, model.head(model.final_norm(trace.tensor(name)[:, positions]))


# -- who wrote a logit? --------------------------------------------------------------------------


class Contribution(NamedTuple):
    """What one part added to a logit."""

    part: str
    value: float


@torch.no_grad()
def attribution(
    model: GPT, trace: Trace, token: int, *, position: int = -1, against: int | None = None
) -> list[Contribution]:
    """Direct logit attribution: parts whose values add up to the logit of `token` at `position`
    (with `against`, to how much it is above that token's), of the first text of the batch.

    The final norm divides by one number, the same for all parts; given that number it is linear,
    and the logit a sum over everything that was ever added to the stream (Elhage et al., "A
    Mathematical Framework for Transformer Circuits", 2021).
    """
    for one in (token, against):
        if one is not None and not 0 <= one < model.config.vocab_size:
            raise UserError(f"token {one} is outside the vocabulary of {model.config.vocab_size}")
    head, norm = model.head.weight, model.final_norm
    scale, bias = norm.weight, getattr(norm, "bias", None)
    assert isinstance(scale, torch.Tensor)
    direction = head[token].double() - (0 if against is None else head[against].double())  # (C,)
    stream = trace.tensor(stream_names(model.config)[-1])[0, position].double()  # (C,)
    centred = model.config.norm == "layernorm"
    spread = (stream - stream.mean() * centred).square().mean() + model.config.norm_eps
    reader = direction * scale.double() / spread.sqrt()  # (C,)
    reader = reader - reader.mean() * centred  # centring the reader centres what is read
    found = [
        Contribution(name, float(vector.double() @ reader))
        for name, vector in _written(model, trace, position)
    ]
    if bias is not None:
        found.append(Contribution("final_norm bias", float(bias.double() @ direction)))
    return found


def _written(model: GPT, trace: Trace, position: int) -> Iterator[tuple[str, torch.Tensor]]:
    """Everything that was added to the stream at a position of the first text, (C,) each."""
    config, edits = model.config, trace.edits
    yield "token_embedding", trace.tensor("token_embedding")[0, position]
    if config.position == "learned":
        yield "position_embedding", trace.tensor("position_embedding")[position]
    for i, block in enumerate(model.blocks):
        name = f"blocks.{i}"
        out: torch.nn.Linear = block.attn.out  # type: ignore[assignment,union-attr]
        heads = trace.tensor(f"{name}.head_out")[0, :, position].double()  # (H, D)
        weights = out.weight.double().view(-1, config.n_head, config.head_dim)  # (C, H, D)
        written = [
            (f"{i}.h{h}", vector)
            for h, vector in enumerate(torch.einsum("hd,chd->hc", heads, weights))
        ]
        written += [] if out.bias is None else [(f"{i}.attn bias", out.bias)]
        if f"{name}.attn_out" in edits:
            written = []  # whatever the heads gave, something else took its place
        written.append((f"{i}.mlp", trace.tensor(f"{name}.mlp_out")[0, position]))
        yield from written
        if edits.keys() & {f"{name}.attn_out", f"{name}.resid_mid", f"{name}.resid_post"}:
            before, after = (
                trace.tensor(f"{name}.{x}")[0, position].double()
                for x in ("resid_pre", "resid_post")
            )
            yield f"{i} edited", after - before - sum(vector for _, vector in written)


# -- without a part ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A piece of a model that can be switched off or taken from another pass."""

    layer: int
    kind: Literal["block", "attn", "mlp", "head"]
    head: int | None = None

    @property
    def activations(self) -> list[str]:
        """What the part adds to the stream; of a head, what it hands to the output projection."""
        names = {
            "block": ["attn_out", "mlp_out"],
            "attn": ["attn_out"],
            "mlp": ["mlp_out"],
            "head": ["head_out"],
        }
        return [f"blocks.{self.layer}.{name}" for name in names[self.kind]]


def find_part(text: str, config: ModelConfig) -> Part:
    """ "3", "3.attn", "3.mlp", "3.h2"; raises `UserError` for what the model does not have."""
    match = re.fullmatch(r"(\d{1,6})(?:\.(attn|mlp|h(\d{1,6})))?", text.strip())
    if not match:
        raise UserError(
            f"{text!r} is no part of a model; write 3 (a block), 3.attn, 3.mlp, or 3.h2 (a head)"
        )
    layer, kind, head = int(match[1]), match[2], match[3]
    if layer >= config.n_layer:
        raise UserError(
            f"{text}: there is no block {layer}; the model has {config.n_layer}, counted from 0"
        )
    if head is not None:
        if int(head) >= config.n_head:
            raise UserError(
                f"{text}: there is no head {head}; each block has {config.n_head}, counted from 0"
            )
        return Part(layer, "head", int(head))
    return Part(layer, kind or "block")  # type: ignore[arg-type]


def without(parts: Iterable[str], config: ModelConfig, fill: Fill = "zero") -> dict[str, Edit]:
    """Edits for `record` that switch parts off: what they give becomes zero, or its mean over all
    positions, which keeps what does not depend on the text."""
    chosen = (find_part(part, config) for part in parts)
    return combine(
        *(
            {name: partial(_fill, head=part.head, fill=fill) for name in part.activations}
            for part in chosen
        )
    )


def _fill(value: torch.Tensor, *, head: int | None, fill: Fill) -> torch.Tensor:
    """value (B, T, C), or of heads (B, H, T, D)."""
    other = torch.zeros_like(value)
    if fill == "mean":
        other = value.mean(dim=(0, value.dim() - 2), keepdim=True).expand_as(value)
    return _replace(value, other, head)


def _replace(value: torch.Tensor, other: torch.Tensor, head: int | None) -> torch.Tensor:
    if head is None:
        return other
    value = value.clone()
    value[:, head] = other[:, head]
    return value


def combine(*edits: Mapping[str, Edit]) -> dict[str, Edit]:
    """All of them, one after the other where they meet in an activation."""
    chains: dict[str, list[Edit]] = {}
    for several in edits:
        for name, edit in several.items():
            chains.setdefault(name, []).append(edit)
    return {name: partial(_chain, chain) for name, chain in chains.items()}


def _chain(edits: Sequence[Edit], value: torch.Tensor) -> torch.Tensor:
    for edit in edits:
        value = edit(value)
    return value


# -- with another text's part --------------------------------------------------------------------


def patched(source: Trace, parts: Iterable[str]) -> dict[str, Edit]:
    """Edits that put what `source` has in place of what parts give: activation patching.

    `parts` as in `without`, or names of activations. The texts must have as many tokens.
    """
    edits: list[dict[str, Edit]] = []
    for text in parts:
        names, head = [text], None
        if text not in source.activations:
            part = find_part(text, source.config)
            names, head = part.activations, part.head
        edits.append({name: partial(_from, source.tensor(name), head, name) for name in names})
    return combine(*edits)


def _from(other: torch.Tensor, head: int | None, name: str, value: torch.Tensor) -> torch.Tensor:
    if other.shape != value.shape:
        raise UserError(
            f"{name} is {tuple(other.shape)} in one text and {tuple(value.shape)} in "
            "the other; patching needs texts with as many tokens"
        )
    return _replace(value, other, head)


def patch_map(
    model: GPT, tokens: torch.Tensor, source: Trace, token: int, name: str = "resid_post"
) -> np.ndarray:
    """How much a patch of `name` at each block and position moves the last logit of `token`.

    tokens (1, T) and a trace of another text of T tokens -> (L, T). One pass a block: row t of
    its batch has position t patched (Meng et al., arXiv:2202.05262, figure 1).
    """
    T = tokens.size(1)
    if source.tensor("token_embedding").size(1) != T:
        raise UserError(
            "patching needs texts with as many tokens: "
            f"{T} and {source.tensor('token_embedding').size(1)}"
        )
    last = partial(record, model, keep=["logits"], positions=slice(-1, None))
    before = last(tokens).tensor("logits")[0, -1, token]
    rows = []
    for layer in range(model.config.n_layer):
        full = f"blocks.{layer}.{name}"
        edit = partial(_each_position, source.tensor(full))
        after = last(tokens.expand(T, -1), edits={full: edit})
        rows.append((after.tensor("logits")[:, -1, token] - before).float().cpu().numpy())
    return np.stack(rows) if rows else np.zeros((0, T), np.float32)


def _each_position(other: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """Row t of (T, T, C) takes position t from `other` (1, T, C)."""
    value, at = value.clone(), torch.arange(len(value), device=value.device)
    value[at, at] = other[0, at]
    return value
