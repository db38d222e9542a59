"""The machine: device, precision, threads, processes, signals.

    machine = start(TrainConfig(device="auto"))

All side effects on the process live here (and in cli.py). It knows no model and no data.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from typing import Any, NamedTuple, TypeVar

import numpy as np
import torch
import torch.distributed as dist

from glassgpt.config import TrainConfig
from glassgpt.errors import UserError, nearest
from glassgpt.system import usable_cores

T_ = TypeVar("T_")


# -- cards ---------------------------------------------------------------------------------------


class Card(NamedTuple):
    """A GPU by its maker's data sheet."""

    name: str
    flops: float  # dense 16-bit matrix products, multiplications and additions per second
    memory: int  # bytes, of 10^9: the driver's share is about what a binary GB has more


# A name that begins another one stands behind it.
CARDS = tuple(Card(name, flops * 1e12, memory * 10**9) for name, flops, memory in [
    ("H200", 989, 141), ("H100", 989, 80), ("A100-80GB", 312, 80), ("A100", 312, 40),
    ("L40S", 362, 48), ("L4", 121, 24), ("V100", 125, 16), ("T4", 65, 16), ("4090", 165, 24),
    ("3090", 71, 24),
])  # fmt: skip


def find_card(name: str) -> Card:
    """By its name in CARDS, in any case; raises `UserError` with the nearest one."""
    for card in CARDS:
        if card.name.lower() == name.lower():
            return card
    names = [card.name for card in CARDS]
    raise UserError(
        f"unknown card {name!r}.{nearest(name.upper(), names)} The cards are: {', '.join(names)}"
    )


def peak_flops(device_name: str) -> float | None:
    """Of the card that a driver calls so ("NVIDIA A100-SXM4-40GB"); None where it is not known."""
    return next((card.flops for card in CARDS if card.name in device_name), None)


@dataclass(frozen=True)
class Machine:
    """Where one process of a training run computes."""

    device: torch.device
    dtype: torch.dtype  # of matrix products; weights are float32 always
    rank: int = 0
    world: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    @property
    def peak_flops(self) -> float | None:
        """Of all devices together; None where it is not known."""
        if self.device.type != "cuda" or self.dtype == torch.float32:
            return None
        of_one = peak_flops(torch.cuda.get_device_name(self.device))
        return of_one and of_one * self.world

    def autocast(self) -> contextlib.AbstractContextManager:
        if self.dtype == torch.float32:
            return contextlib.nullcontext()
        return torch.autocast(self.device.type, dtype=self.dtype)

    def sum(self, *values: float) -> list[float]:
        """Each value added up over all processes."""
        if self.world == 1:
            return list(values)
        precise = torch.float64 if self.device.type != "mps" else torch.float32
        tensor = torch.tensor(values, dtype=precise, device=self.device)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def on_main(self, work: Callable[[], T_]) -> T_:
        """What `work` gives in the main process, in all of them; so with its `UserError`, lest the
        others wait for ever."""
        if self.world == 1:
            return work()
        box: list[Any] = [None, None]
        if self.is_main:
            try:
                box[0] = work()
            except UserError as error:
                box[1] = str(error)
        dist.broadcast_object_list(box, device=self.device)
        if box[1] is not None:
            raise UserError(box[1])
        return box[0]

    def barrier(self) -> None:
        if self.world > 1:
            dist.barrier()


def start(config: TrainConfig) -> Machine:
    """Choose device and precision, set threads, join the other processes of a torchrun.

    Raises `UserError` when the device asked for is not there.
    """
    device = torch.device(choose_device(config.device))
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if config.threads is not None:
        torch.set_num_threads(config.threads)
    elif device.type == "cpu" and world == 1:
        torch.set_num_threads(usable_cores())
    if world > 1:
        if device.type == "cuda":
            device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
            torch.cuda.set_device(device)
        if not dist.is_initialized():
            dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    if device.type == "cuda":
        torch.set_float32_matmul_precision("high")  # TensorFloat-32 where a product stays float32
    return Machine(device, choose_dtype(config.dtype, device), rank, world)


def stop() -> None:
    """Leave the group of processes, if `start` joined one."""
    if dist.is_available() and dist.is_initialized():
        dist.destroy_process_group()


def choose_device(name: str) -> str:
    there = {"cpu": True, "cuda": torch.cuda.is_available(),
             "mps": torch.backends.mps.is_available()}  # fmt: skip
    if name == "auto":
        return next(device for device in ("cuda", "mps", "cpu") if there[device])
    if name not in there:
        raise UserError(f"device={name!r}: choose auto, {', '.join(there)}")
    if not there[name]:
        raise UserError(f"device={name}: torch finds none on this machine; use --device auto")
    return name


def choose_dtype(name: str, device: torch.device) -> torch.dtype:
    """auto: bfloat16 where the GPU has it, float16 where not, float32 elsewhere."""
    if name != "auto":
        return getattr(torch, name)
    if device.type != "cuda":
        return torch.float32
    return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16


def seed_of(*numbers: int) -> int:
    """A seed from 0 to 2^64 - 1 that follows from the numbers and their order, and looks random.

    Each number is added to the state, which takes a step of SplitMix64 (Steele, Lea and Flood,
    "Fast splittable pseudorandom number generators", OOPSLA 2014): the same on every machine and
    in every version of Python.
    """
    state, mask = 0, (1 << 64) - 1
    for number in numbers:
        state = (state + number + 0x9E3779B97F4A7C15) & mask
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
        state ^= state >> 31
    return state


def is_out_of_memory(error: BaseException) -> bool:
    """torch says it in three ways, depending on the device."""
    if isinstance(error, (MemoryError, torch.OutOfMemoryError)):
        return True
    text = str(error).lower()
    return isinstance(error, RuntimeError) and (
        "out of memory" in text or "can't allocate memory" in text
    )


def to_device(array: np.ndarray, device: torch.device) -> torch.Tensor:
    """int64 array -> tensor on `device`; from pinned memory, so that the copy needs no waiting."""
    tensor = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        return tensor.pin_memory().to(device, non_blocking=True)
    return tensor.to(device)


class Workers:
    """Calls functions in this thread, or in `n` others.

    torch uses several cores by splitting every operation, with a barrier behind each: in a small
    model that is thousands of barriers a second, and when another program takes a core for a moment
    all wait for it. Rows are independent until their gradients are added, so a thread for each
    share of the rows meets the others once a step. Measured in docs/LOG.md.
    """

    def __init__(self, n: int = 1) -> None:
        self.n = n
        self._pool: ThreadPoolExecutor | None = None
        if n > 1:
            # One thread per operation, in the workers and here.
            self._pool = ThreadPoolExecutor(n, initializer=torch.set_num_threads, initargs=(1,))
            torch.set_num_threads(1)

    def submit(self, function: Callable[..., T_], *arguments: Any) -> Future[T_]:
        if self._pool is not None:
            return self._pool.submit(function, *arguments)
        done: Future[T_] = Future()
        done.set_result(function(*arguments))
        return done

    def results(self, futures: Sequence[Future[T_]]) -> list[T_]:
        """What the calls gave, in order; waits for all, even when one failed: none may still be at
        work on its gradients."""
        wait(futures)
        return [future.result() for future in futures]

    def close(self) -> None:
        if self._pool is not None:
            self._pool.shutdown()


class StopRequest:
    """Set by the first Ctrl-C or SIGTERM; a second one ends the process at once."""

    def __init__(self) -> None:
        self.signal: int | None = None

    @property
    def requested(self) -> bool:
        return self.signal is not None

    def _handle(self, signum: int, frame: object) -> None:
        self.signal = signum
        signal.signal(signum, self._before[signum])

    @contextlib.contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Only the main thread can listen; elsewhere (a notebook's worker) nothing changes."""
        self._before = {}
        try:
            for signum in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(signum) != signal.SIG_IGN:  # of a shell's background job
                    self._before[signum] = signal.signal(signum, self._handle)
        except ValueError:
            pass
        try:
            yield self
        finally:
            for signum, handler in self._before.items():
                signal.signal(signum, handler)
