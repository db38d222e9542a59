"""What a training costs before it is begun: memory by part, arithmetic, time, and what GPUs have.

    memory(model, train, device="cuda").total < find_card("A100").memory

The formulas follow the code, tensor by tensor: passes.py says which way a step goes, fused/step.py
and model.py what it keeps, optim.py and checkpoint.py what they copy. benchmarks/memory.py holds
them against measured peaks. This room does arithmetic on configs; it knows no tensor and no file.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from glassgpt.config import ModelConfig, TrainConfig

# Every thread holds a gradient of the whole model: beyond this many numbers in all (1 GB), the
# model is large enough for torch's own way of using several cores to be the better one.
_MOST_GRADIENTS = 250_000_000
_LONGEST_FUSED = 1024  # positions
FUSED_LOGITS = 1 << 22  # numbers at a time: large vocabularies never fill the memory
CHUNK_LOGITS = 1 << 26  # of autograd's loss; in float32 256 MB, and up to three such tensors
EVAL_LOGITS = 1 << 24  # numbers per evaluation batch: large batches are fast, but must fit

_MiB = 1 << 20
# Measured with torch 2.13: what it loads when it is used; Numba with the compiled kernels.
_OPTIMIZER_CODE, _KERNEL_CODE = 128 * _MiB, 50 * _MiB
_PACKING = 0.15  # of the rooms of fused steps, for torch's products, which pack what they read
_TOKENIZER = 400  # bytes for each token, by which name it goes
_GPU_CONTEXT = 600 * _MiB  # CUDA's, cuBLAS's workspace
# glibc keeps smaller blocks for later when they are freed, with gaps between them (measured);
# larger ones go back to the system at once. torch's allocator on a GPU keeps and rounds all.
_LARGE_BLOCK, _GAPS, _GPU_GAPS = 32 * _MiB, 0.2, 0.05


# -- time ----------------------------------------------------------------------------------------


def seconds(model: ModelConfig, tokens: float, *, flops: float, mfu: float) -> float:
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


# -- the way of a step ---------------------------------------------------------------------------


class Way(NamedTuple):
    """How passes.py takes a step: by the fused kernels or by autograd, on how many threads."""

    fused: bool
    workers: int  # threads that take a share of the rows; with 1, torch splits each operation
    rows: int  # of one process in a step
    at_once: int  # rows whose activations are held together
    width: Literal[2, 4]  # bytes of the numbers that matrix products read
    recompute: bool = False  # of a block only its input is kept


def useful_workers(threads: int, rows: int, n_parameters: int) -> int:
    """How many workers pay: no more than rows or cores, and none for a large model."""
    n = min(threads, rows)
    return n if n * n_parameters <= _MOST_GRADIENTS else 1


def is_fusible(model: ModelConfig) -> bool:
    """Does fused/step.py know this shape? It keeps the scores of all pairs of positions, which for
    long contexts are more than the memory saved elsewhere."""
    modern = model.family == "qwen3" and model.n_kv_head == model.n_head
    return modern and model.n_layer > 0 and model.context_length <= _LONGEST_FUSED


def rows_per_process(model: ModelConfig, train: TrainConfig, world: int = 1) -> int:
    return max(1, round(train.batch_tokens / model.context_length / world))


def way(
    model: ModelConfig,
    train: TrainConfig,
    *,
    device: Literal["cpu", "cuda"],
    threads: int = 1,
    world: int = 1,
    kernels: bool = True,
    bfloat16: bool = True,
) -> Way:
    """What `Passes` will do. `kernels`: Numba is there; `bfloat16`: the processor multiplies it
    (on a GPU: 16-bit products are the default)."""
    rows = rows_per_process(model, train, world)
    at_once = min(train.micro_batch_size or rows, rows)
    wide = train.dtype in ("auto", "float32")
    autograd = Way(False, 1, rows, at_once, 4 if wide else 2, train.recompute)
    if device != "cpu":
        return autograd._replace(width=2 if bfloat16 and train.dtype != "float32" else 4)
    if world > 1 or train.compile == "on":
        return autograd
    n = useful_workers(threads, at_once, model.n_parameters)
    if (
        is_fusible(model)
        and kernels
        and train.dtype != "float16"
        and (n > 1 or threads == 1 or rows == 1)
    ):
        low = train.dtype == "bfloat16" or (train.dtype == "auto" and bfloat16)
        return Way(True, n, rows, at_once, 2 if low else 4)
    return autograd if model.dropout else autograd._replace(workers=n)


# -- memory --------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Memory:
    """Bytes of a training process at its peak, above what it has before it makes a model.

    On a GPU, of its memory; on a CPU, resident. `gradients`: one for each thread.
    """

    weights: int
    gradients: int
    optimizer: int
    activations: int  # kept from forward to backward, beyond the place of gradients not yet there
    other: int  # low-precision copies; what evaluating or saving takes beyond a step; code; gaps

    @property
    def total(self) -> int:
        return self.weights + self.gradients + self.optimizer + self.activations + self.other


class _Blocks:
    """Bytes in small and in large blocks, since those have different fates when they are freed."""

    def __init__(self, sizes: Iterable[float] = (), times: int = 1) -> None:
        self.small = self.large = 0.0
        for size in sizes:
            if size < _LARGE_BLOCK:
                self.small += size * times
            else:
                self.large += size * times

    def __add__(self, other: _Blocks) -> _Blocks:
        both = _Blocks()
        both.small, both.large = self.small + other.small, self.large + other.large
        return both

    def __or__(self, other: _Blocks) -> _Blocks:
        """Room for either."""
        most = _Blocks()
        most.small, most.large = max(self.small, other.small), max(self.large, other.large)
        return most

    @property
    def total(self) -> float:
        return self.small + self.large


def memory(
    model: ModelConfig,
    train: TrainConfig,
    *,
    device: Literal["cpu", "cuda"] = "cpu",
    threads: int = 1,
    world: int = 1,
    kernels: bool = True,
    bfloat16: bool = True,
) -> Memory:
    """The peak of a process that trains, evaluates and saves; options as in `way`.

    Sums what is there together in the most demanding moment. A GPU's peak counts no copies that
    saving makes, which are the host's.
    """
    how = way(model, train, device=device, threads=threads, world=world, kernels=kernels,
              bfloat16=bfloat16)  # fmt: skip
    numbers, on_gpu = [math.prod(shape) for shape in model.weight_shapes.values()], device != "cpu"
    weights, optimizer = 4 * sum(numbers), _optimizer_bytes(model, train)
    gradients = _Blocks((4 * n for n in numbers), how.workers)
    rooms, step = 0, _autograd_step(model, how, gradients, on_gpu)
    if how.fused:
        rooms, step = how.workers * _room_bytes(model, how), _fused_step(model, how, gradients)
    moments = [step, _evaluation(model, how)]
    if train.optimizer == "muon":
        one = _Blocks(4 * n for n in numbers)  # the other threads' are added to it by now
        moments.append(one + _muon(model, how, on_gpu))
    if not on_gpu:
        moments.append(_saving(model, optimizer))
    peak = _Blocks()
    for moment in moments:
        peak |= moment
    matrices = sum(math.prod(s) for s in model.weight_shapes.values() if len(s) > 1)
    copies = how.width * matrices if how.fused or how.width == 2 else 0
    if world > 1:
        copies += 4 * sum(numbers)  # DistributedDataParallel's buckets
    if on_gpu:
        worst = max(moment.total for moment in moments)
        extra = _GPU_CONTEXT + _GPU_GAPS * (weights + optimizer + worst)
    else:
        worst = peak.total
        extra = _OPTIMIZER_CODE + how.fused * _KERNEL_CODE + _TOKENIZER * model.vocab_size
        extra += _GAPS * peak.small + _PACKING * rooms
    held = round(gradients.total)
    activations = rooms + max(0, round(step.total) - held)
    other = round(copies + extra + worst) - (activations - rooms) - held
    return Memory(weights, held, optimizer, activations, max(0, other))


def largest_micro_batch(
    model: ModelConfig, train: TrainConfig, room: int, **place: Any
) -> int | None:
    """The most sequences at a time whose training fits in `room` bytes; None: not even one.

    `place`: the options of `memory`.
    """

    def fits(rows: int) -> bool:
        asked = dataclasses.replace(train, micro_batch_size=rows)
        return memory(model, asked, **place).total <= room

    low, high = 0, rows_per_process(model, train, place.get("world", 1))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if fits(middle) else (low, middle - 1)
    return low or None


def _in_blocks(model: ModelConfig) -> list[tuple[int, int]]:
    """Matrices of the blocks as Muon sees them: queries, keys and values are its own each."""
    q, kv = model.n_head * model.head_dim, model.n_kv_head * model.head_dim
    found: list[tuple[int, int]] = []
    for name, shape in model.weight_shapes.items():
        if name.startswith("blocks.") and len(shape) == 2:
            rows, columns = shape
            parts = (q, kv, kv) if name.endswith("qkv.weight") else (rows,)
            found += [(part, columns) for part in parts]
    return found


def _optimizer_bytes(model: ModelConfig, train: TrainConfig) -> int:
    """AdamW keeps two float32 moments, Muon one for the matrices in the blocks."""
    hidden = sum(map(math.prod, _in_blocks(model))) if train.optimizer == "muon" else 0
    return 8 * (model.n_parameters - hidden) + 4 * hidden


def _muon(model: ModelConfig, how: Way, on_gpu: bool) -> _Blocks:
    """Temporaries of `Muon._update` for the most numerous shape, divided among the workers."""
    alike: dict[tuple[int, int], int] = {}
    for shape in _in_blocks(model):
        alike[shape] = alike.get(shape, 0) + 1
    width, most = how.width if on_gpu or how.fused else 4, _Blocks()
    for (rows, columns), count in alike.items():
        numbers, gram = rows * columns * count, min(rows, columns) ** 2 * count
        # gradients, momenta and their blend, normalised; then two of x and two of its Gram matrix
        sizes = [4 * numbers] * 3 + [width * numbers] + [width * gram] * 2
        most |= _Blocks((size / how.workers for size in sizes), how.workers)
    return most


def _saving(model: ModelConfig, optimizer: int) -> _Blocks:
    """safetensors builds a file in memory and hands over a copy of it (tensors.py)."""
    turned = 0
    if model.family == "gpt2":  # OpenAI's matrices are transposed
        turned = 4 * sum(map(math.prod, _in_blocks(model)))
    weights = 4 * model.n_parameters
    return _Blocks([turned, weights, weights]) | _Blocks([optimizer, optimizer])


def _evaluation(model: ModelConfig, how: Way) -> _Blocks:
    """model.py without gradients: the widest moment of a block, or the logits and their softmax."""
    T, V, C, F = model.context_length, model.vocab_size, model.n_embd, model.n_hidden
    rows = max(how.at_once, min(4 * how.at_once, EVAL_LOGITS // (T * V)))
    tokens = math.ceil(rows / how.workers) * T
    hidden = 3 if model.activation == "swiglu" else 2
    block = _Blocks([4 * tokens * C] * 3 + [4 * tokens * F] * hidden, how.workers)
    return block | _Blocks([4 * tokens * V] * 2, how.workers)


# -- a step by autograd --------------------------------------------------------------------------


def _autograd_step(model: ModelConfig, how: Way, gradients: _Blocks, on_gpu: bool) -> _Blocks:
    """Activations and gradients together: at the start of the backward pass, or at its end."""
    C, F, V = model.n_embd, model.n_hidden, model.vocab_size
    tokens = math.ceil(how.at_once / how.workers) * model.context_length
    per_block = [tokens * size for size in _saved(model, how.width, on_gpu)]
    if how.recompute:  # of a block its input, and one block's all while it is done again
        per_block = [4 * tokens * C] + [size / model.n_layer for size in per_block]
    stream = [4 * tokens * C] * (3 if model.norm == "rmsnorm" else 2)
    rows = _rows_of_logits(tokens, V)
    # What the way back needs at first: two gradients of the logits, or those of a block.
    turn = _Blocks([4 * rows * V] * 2) | _Blocks([4 * tokens * C, how.width * tokens * F] * 2)
    if rows < tokens:  # then gradients of the head are made in the forward pass
        turn = turn + _Blocks([4 * V * C, 4 * tokens * C])
    if model.dropout and not on_gpu:
        turn |= _Blocks([4 * tokens * model.n_head * model.context_length] * 3)
    kept = _Blocks(per_block, model.n_layer) + _Blocks([*stream, 4 * rows * V]) + turn
    start = _Blocks()
    for _ in range(how.workers):
        start += kept
    # The head's gradient waits for the one of the embedding, which is the same table.
    table = _Blocks([4 * V * C], how.workers)
    start, end = start + table, gradients + table + table
    return (start + gradients if how.rows > how.at_once else start) | end


def _rows_of_logits(tokens: int, V: int) -> int:
    """How many tokens' logits exist at a time, as in loss.py."""
    rows = tokens
    while rows > 1 and rows * V > CHUNK_LOGITS:
        rows = math.ceil(rows / 2)
    return rows


def _saved(model: ModelConfig, width: int, on_gpu: bool) -> list[int]:
    """Bytes per token of every tensor that a block keeps for the way back.

    Counted with torch's hooks for saved tensors. torch.compile keeps less: it computes cheap
    things again.
    """
    C, F, H = model.n_embd, model.n_hidden, model.n_head
    q, kv = H * model.head_dim, model.n_kv_head * model.head_dim
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


def _fused_step(model: ModelConfig, how: Way, gradients: _Blocks) -> _Blocks:
    """Gradients, and the head's on its way to them: rounded, then as float32."""
    head = model.vocab_size * model.n_embd
    return gradients + _Blocks([how.width * head, 4 * head], how.workers)


def _room_bytes(model: ModelConfig, how: Way) -> int:
    """`_Rooms` of one thread: reserved once, kept to the end."""
    C, F, H, T, w = model.n_embd, model.n_hidden, model.n_head, model.context_length, how.width
    tokens, heads = math.ceil(how.at_once / how.workers) * T, H * model.head_dim
    kept = 8 * (C + 1 + H) + w * (2 * C + 7 * heads + H * T + 3 * F)
    shared = 8 * C + 4 + w * (4 * C + 8 * heads + 2 * H * T + 3 * F)
    rows = max(1, min(tokens, FUSED_LOGITS // model.vocab_size))
    return tokens * (model.n_layer * kept + shared) + w * rows * model.vocab_size
