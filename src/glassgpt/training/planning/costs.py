"""What a training costs before it is begun: memory by part, arithmetic and time.

    plan = StepPlan.decide(model, train, machine); memory(model, train, plan).total

The formulas follow the code tensor by tensor: the step's plan (training/step.py) says how a step is
taken, model.py and fused/step.py what it keeps, optimizers.py and run_directory.py what they copy.
benchmarks/memory.py compares them with measured peaks. This module does arithmetic on configs; it
makes no tensor and reads no file.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from glassgpt.config import ModelConfig, TrainConfig
from glassgpt.runtime import Machine
from glassgpt.training.fused.step import FUSED_LOGITS
from glassgpt.training.loss import CHUNK_LOGITS
from glassgpt.training.step import EVAL_LOGITS, StepPlan, rows_per_process

_MiB = 1 << 20
# Bytes of code, measured with torch 2.13: what torch loads when the optimizer steps; Numba with the
# compiled kernels.
_OPTIMIZER_CODE, _KERNEL_CODE = 40 * _MiB, 138 * _MiB
_PACKING = 0.15  # share of the fused step's memory: torch's products pack what they read
_TOKENIZER = 400  # bytes for each token of the vocabulary
_GPU_CONTEXT = 600 * _MiB  # bytes of CUDA's context and cuBLAS's workspace
# glibc keeps freed blocks below 32 MiB for later, with gaps between them (a share of them,
# measured), and gives larger ones back to the system. On a GPU, torch's allocator keeps and rounds
# all.
_LARGE_BLOCK, _GAPS, _GPU_GAPS = 32 * _MiB, 0.2, 0.05

Sizes = list[float]  # bytes of the tensors that exist together at one moment


def training_seconds(model: ModelConfig, tokens: float, *, flops: float, mfu: float) -> float:
    """Of training on so many tokens with `flops` per second at best, of which the share `mfu`
    (model FLOPs utilisation; PaLM, arXiv:2204.02311, appendix B) is reached."""
    return tokens * model.flops_per_token() / (flops * mfu)


def parameters_by_part(model: ModelConfig) -> dict[str, int]:
    """Where the numbers are; the parts add up to `model.n_parameters`."""
    parts: dict[str, int] = dict.fromkeys(("embeddings", "attention", "MLP", "norms"), 0)
    for name, shape in model.weight_shapes.items():
        if "norm" in name:
            part = "norms"
        elif ".attn." in name:
            part = "attention"
        else:
            part = "MLP" if ".mlp." in name else "embeddings"
        parts[part] += math.prod(shape)
    return parts


@dataclass(frozen=True)
class Memory:
    """Bytes of a training process at its peak, beyond what it has before it makes a model.

    On a GPU, of its memory; on a CPU, resident. `gradients`: one for each thread.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int  # of a step, beyond the place of gradients that are not there yet
    other: int  # low-precision copies; what evaluating or saving takes beyond a step; code; gaps

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.other


def memory(model: ModelConfig, train: TrainConfig, plan: StepPlan) -> Memory:
    """The peak of a process that trains by `plan`, evaluates and saves.

    Weights, optimizer, copies and reserved memory are always there; to them comes what exists in
    the most demanding moment. A GPU's peak counts no copies that saving makes, which the host has.
    """
    on_gpu = plan.device != "cpu"
    numbers = [math.prod(shape) for shape in model.weight_shapes.values()]
    weights, optimizer = 4 * sum(numbers), _optimizer_bytes(model, train)
    gradients = [4.0 * n for n in numbers] * plan.workers
    if plan.fused:
        reserved = plan.workers * workspace_bytes(model, plan)
        step = {"a fused step": gradients + _head_gradient(model, plan)}
    else:
        reserved, step = 0, _autograd_moments(model, plan, gradients)
    moments = step | _evaluation_moments(model, plan)
    if train.optimizer == "muon":
        one = gradients[: len(numbers)]  # the other threads' are added to it by now
        for name, sizes in _muon_moments(model, plan).items():
            moments[name] = one + sizes
    if not on_gpu:
        moments |= _saving_moments(model, optimizer)
    matrices = sum(math.prod(s) for s in model.weight_shapes.values() if len(s) > 1)
    fixed = plan.width * matrices if plan.fused or plan.width == 2 else 0.0
    if plan.world > 1:
        fixed += weights  # DistributedDataParallel's buckets
    peak, of_step, held = _peak(moments), _peak(step), round(sum(gradients))
    if on_gpu:
        fixed += _GPU_CONTEXT + _GPU_GAPS * (weights + optimizer + peak)
    else:
        small = max(_in_blocks_of(sizes, small=True) for sizes in moments.values())
        fixed += _OPTIMIZER_CODE + plan.fused * _KERNEL_CODE + _TOKENIZER * model.vocab_size
        fixed += _GAPS * small + _PACKING * reserved
    beyond = max(0, round(of_step) - held)
    other = max(0, round(fixed + peak) - held - beyond)
    return Memory(weights, held, optimizer, reserved + beyond, other)


def _peak(moments: dict[str, Sizes]) -> float:
    """Bytes at most. Small blocks stay with the process when they are freed, so that the most of
    them adds to the most of the large ones, whenever that is."""
    return sum(max(_in_blocks_of(s, small) for s in moments.values()) for small in (True, False))


def _in_blocks_of(sizes: Sizes, small: bool) -> float:
    return sum(size for size in sizes if (size < _LARGE_BLOCK) is small)


def largest_micro_batch(
    model: ModelConfig, train: TrainConfig, machine: Machine, room: int
) -> int | None:
    """The most sequences at a time whose training fits in `room` bytes; None: not even one."""
    low, high = 0, rows_per_process(model, train, machine.world)
    while low < high:
        middle = (low + high + 1) // 2
        fewer = dataclasses.replace(train, micro_batch_size=middle)
        plan = StepPlan.decide(model, fewer, machine)
        fits = memory(model, fewer, plan).total <= room
        low, high = (middle, high) if fits else (low, middle - 1)
    return low or None


def _matrices_in_blocks(model: ModelConfig) -> list[tuple[int, int]]:
    """As Muon sees them: queries, keys and values are matrices of their own."""
    q, kv, _ = model.qkv_rows
    found: list[tuple[int, int]] = []
    for name, shape in model.weight_shapes.items():
        if name.startswith("blocks.") and len(shape) == 2:
            rows, columns = shape
            parts = (q, kv, kv) if name.endswith("qkv.weight") else (rows,)
            found += [(part, columns) for part in parts]
    return found


def _optimizer_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """AdamW keeps two float32 moments, Muon one for the matrices in the blocks."""
    muon = train.optimizer == "muon"
    hidden = sum(map(math.prod, _matrices_in_blocks(model))) if muon else 0
    return 8 * (model.n_parameters - hidden) + 4 * hidden


# -- moments beside the step ---------------------------------------------------------------------


def _muon_moments(model: ModelConfig, plan: StepPlan) -> dict[str, Sizes]:
    """Temporaries of `Muon._update` for each shape of matrix, divided among the workers."""
    moments = {}
    width = plan.width if plan.device != "cpu" or plan.fused else 4
    for (rows, columns), count in Counter(_matrices_in_blocks(model)).items():
        numbers, gram = rows * columns * count, min(rows, columns) ** 2 * count
        # gradients, momenta and their blend, normalised; then two of x and two of its Gram matrix
        sizes = [4 * numbers] * 3 + [width * numbers] + [width * gram] * 2
        shared = [size / plan.workers for size in sizes] * plan.workers
        moments[f"Muon, {count} matrices of {rows} x {columns}"] = shared
    return moments


def _saving_moments(model: ModelConfig, optimizer: int) -> dict[str, Sizes]:
    """safetensors builds a file in memory and hands over a copy of it (tensors.py)."""
    turned = 0
    if model.family == "gpt2":  # OpenAI's matrices are transposed
        turned = 4 * sum(map(math.prod, _matrices_in_blocks(model)))
    weights = 4 * model.n_parameters
    return {
        "saving the model": [turned, weights, weights],
        "saving the optimizer": [optimizer, optimizer],
    }


def _evaluation_moments(model: ModelConfig, plan: StepPlan) -> dict[str, Sizes]:
    """model.py without gradients: the widest moment of a block, or the logits and their softmax."""
    T, V, C, F = model.context_length, model.vocab_size, model.n_embd, model.n_hidden
    at_once = plan.micro_batch_size
    rows = max(at_once, min(4 * at_once, EVAL_LOGITS // (T * V)))
    tokens = math.ceil(rows / plan.workers) * T
    hidden = 3 if model.activation == "swiglu" else 2
    block = [4.0 * tokens * C] * 3 + [4.0 * tokens * F] * hidden
    logits = [4.0 * tokens * V] * 2
    return {"evaluation, MLP": block * plan.workers, "evaluation, logits": logits * plan.workers}


# -- a step by autograd --------------------------------------------------------------------------


def _autograd_moments(model: ModelConfig, plan: StepPlan, gradients: Sizes) -> dict[str, Sizes]:
    """Activations and gradients together: at the start of the backward pass, and at its end."""
    C, F, V, on_gpu = model.n_embd, model.n_hidden, model.vocab_size, plan.device != "cpu"
    tokens = math.ceil(plan.micro_batch_size / plan.workers) * model.context_length
    kept: Sizes = [tokens * size for size in saved_per_token(model, plan.width, on_gpu)]
    if plan.recompute:  # of a block its input, and one block's all while it is done again
        kept = [4 * tokens * C] + [size / model.n_layer for size in kept]
    rows = _rows_of_logits(tokens, V)
    stream = [4 * tokens * C] * (3 if model.norm == "rmsnorm" else 2)
    kept = kept * model.n_layer + stream + [4 * rows * V]
    # The head's gradient waits for the one of the embedding, which is the same table.
    table: Sizes = [4 * V * C]
    accumulated = gradients if plan.rows > plan.micro_batch_size else []
    # What the backward pass needs at first: two gradients of the logits, or those of a block.
    logits: Sizes = [4 * rows * V] * 2
    block: Sizes = [4 * tokens * C, plan.width * tokens * F] * 2
    if rows < tokens:  # then gradients of the head are made in the forward pass
        logits, block = (each + [4 * V * C, 4 * tokens * C] for each in (logits, block))
    first = {"logits": logits, "block": block}
    if model.dropout and not on_gpu:
        first["dropped pattern"] = [4 * tokens * model.n_head * model.context_length] * 3
    moments = {
        f"backward begins, {name}": (kept + sizes + table) * plan.workers + accumulated
        for name, sizes in first.items()
    }
    return moments | {"backward ends": gradients + table * 2 * plan.workers}


def _rows_of_logits(tokens: int, V: int) -> int:
    """How many tokens' logits exist at a time, as in loss.py."""
    rows = tokens
    while rows > 1 and rows * V > CHUNK_LOGITS:
        rows = math.ceil(rows / 2)
    return rows


def saved_per_token(model: ModelConfig, width: int, on_gpu: bool) -> Sequence[int]:
    """Bytes per token of every tensor that a block keeps for the backward pass.

    Counted with torch's hooks for saved tensors. torch.compile keeps less: it computes cheap
    things again.
    """
    C, F, H = model.n_embd, model.n_hidden, model.n_head
    q, kv, _ = model.qkv_rows
    # the stream twice, its normalised copies; q, k and v; what the heads give; the MLP
    kept = [4 * C] * 2 + [width * C] * 2 + [width * (q + 2 * kv), width * q] + [width * F] * 2
    if model.activation == "swiglu":
        kept += [width * F] * 2
    if model.norm == "rmsnorm" and not on_gpu:  # before its weight; fused on a GPU
        kept += [4 * C] * 2
    if model.qk_norm:
        kept += [4 * q, 4 * kv] * (1 if width == 4 else 2)
    if model.position == "rope":
        kept += [width * q] * 2 + [width * kv]  # rotated; the heads' output in another order
    if model.n_kv_head < H:
        kept += [width * q] * 2  # keys and values, repeated for each group
    if model.dropout:
        kept += [C if on_gpu else width * C] * 2
        if not on_gpu:  # torch's fused attention knows no dropout there: patterns are stored
            kept += [4 * H * model.context_length] * 3
    return [*kept, 4 * H]


# -- a fused step --------------------------------------------------------------------------------


def _head_gradient(model: ModelConfig, plan: StepPlan) -> Sizes:
    """Of every thread, before it is added to the gradients: rounded, then as float32."""
    head = model.vocab_size * model.n_embd
    return [plan.width * head, 4 * head] * plan.workers


def workspace_bytes(model: ModelConfig, plan: StepPlan) -> int:
    """`Workspace` of one thread: reserved once, kept to the end."""
    C, F, H, T, w = model.n_embd, model.n_hidden, model.n_head, model.context_length, plan.width
    tokens, heads = math.ceil(plan.micro_batch_size / plan.workers) * T, H * model.head_dim
    kept = 8 * (C + 1 + H) + w * (2 * C + 7 * heads + H * T + 3 * F)
    shared = 8 * C + 4 + w * (4 * C + 8 * heads + 2 * H * T + 3 * F)
    rows = max(1, min(tokens, FUSED_LOGITS // model.vocab_size))
    return tokens * (model.n_layer * kept + shared) + w * rows * model.vocab_size
