"""Chooses and builds the engine for a model on this machine.

    engine = build_engine(load_pretrained("runs/book"), weights="int8")

On a CPU that is compiled kernels or NumPy, whichever a short measurement finds faster (the result
is kept); with an NVIDIA card, the card. torch is imported only for the engines that need it.
"""

from __future__ import annotations

import json
import operator
import sys
import time
from dataclasses import asdict, replace
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Any, get_args

import numpy as np

from glassgpt.checkpoints.run_directory import Checkpoint
from glassgpt.config import DEVICES, MOST_THREADS, EngineName, ModelConfig, WeightPrecision
from glassgpt.errors import UserError
from glassgpt.inference.engines import Engine
from glassgpt.inference.engines.cpu import NumbaEngine, NumpyEngine
from glassgpt.inference.kernels.compiled import kernel_folder, load_kernels
from glassgpt.system import SILENT, Reporter, usable_cores, write_file

if TYPE_CHECKING:
    from glassgpt.model import GPT

PRECISIONS: dict[str, tuple[WeightPrecision, ...]] = {
    "numba": ("float32", "int8", "int4"),
    "numpy": ("float32", "int8", "int4"),
    "torch": ("float32",),
    "gpu": ("float32", "bfloat16"),
}
_WORTH_A_GPU = 20_000_000  # parameters; below, a text is done before torch is imported
_MEASURED_LAYERS = 2  # of a stand-in for the model: enough to tell the two engines apart
_MEASURED_STEPS = 8


def build_engine(
    checkpoint: Checkpoint,
    *,
    device: str = "auto",
    engine: EngineName = "auto",
    weights: WeightPrecision = "float32",
    threads: int | None = None,
    compile: bool | None = None,
    reporter: Reporter = SILENT,
) -> Engine:
    """An engine with this checkpoint's weights.

    `compile` is for a GPU: a compiled step is several times as fast after half a minute (None:
    where it works). `reporter` takes notes for the user. Raises `UserError` for what does not go
    together, is not installed, or does not fit in memory.
    """
    threads = check_choice(device, engine, weights, threads)
    chosen = engine
    try:
        if chosen == "auto":
            chosen = _engine_for(checkpoint.config, device, weights, threads, reporter)
        _check_pair(chosen, device, weights)
        if chosen in ("torch", "gpu"):
            return _torch_engine(checkpoint, chosen, device, weights, threads, compile)
        if chosen == "numba":
            return NumbaEngine(
                checkpoint.config, checkpoint.weights, weights, threads=threads, reporter=reporter
            )
    except MemoryError as error:
        raise _too_large(checkpoint.config) from error
    except ImportError as error:
        if engine != "auto":
            raise UserError(
                f"engine=numba needs the package numba ({error}): pip install 'glassgpt[fast]'"
            ) from error
        _hint(reporter, error)
    try:
        return NumpyEngine(checkpoint.config, checkpoint.weights, weights)
    except MemoryError as error:
        raise _too_large(checkpoint.config) from error


def check_choice(device: str, engine: str, weights: str, threads: Any) -> int | None:
    """The number of threads as an int. Raises `UserError` for unknown names and for impossible
    numbers of threads."""
    engines, precisions = get_args(EngineName), get_args(WeightPrecision)
    given = (
        ("device", device, DEVICES),
        ("engine", engine, engines),
        ("weights", weights, precisions),
    )
    for name, value, choices in given:
        if value not in choices:
            raise UserError(f"{name}={value!r}: choose from {', '.join(choices)}")
    if threads is None:
        return None
    try:
        number = operator.index(threads)
    except TypeError:
        number = 0
    if isinstance(threads, bool) or not 1 <= number <= MOST_THREADS:
        raise UserError(f"threads={threads!r} must be a whole number, 1 to {MOST_THREADS}")
    return number


def _check_pair(engine: str, device: str, weights: WeightPrecision) -> None:
    if weights not in PRECISIONS[engine]:
        choices = ", ".join(PRECISIONS[engine])
        raise UserError(
            f"weights={weights} can't be had with engine={engine}; choose from {choices}"
        )
    if engine == "gpu" and device == "cpu":
        what = "weights=bfloat16" if weights == "bfloat16" else "engine=gpu"
        raise UserError(f"{what} needs a GPU, not device=cpu")
    if engine in ("numba", "numpy") and device in ("cuda", "mps"):
        raise UserError(f"engine={engine} does not run on device={device}")


def _engine_for(
    config: ModelConfig,
    device: str,
    weights: WeightPrecision,
    threads: int | None,
    reporter: Reporter,
) -> EngineName:
    """The engine that "auto" means. Raises ImportError if there is nothing but NumPy."""
    if weights == "bfloat16" or device in ("cuda", "mps"):
        return "gpu"
    large = config.n_parameters > _WORTH_A_GPU
    if device == "auto" and weights == "float32" and large and _has_nvidia_card():
        return "gpu"
    load_kernels("glassgpt.inference.kernels.forward")
    if weights == "float32" and threads is None:
        return faster_engine(config, reporter)
    return "numba"  # NumPy would read four times the bytes, and has its own number of threads


_hinted = False


def _hint(reporter: Reporter, error: ImportError) -> None:
    """Say, once in a process, how generation gets faster."""
    global _hinted
    if reporter is not SILENT and not _hinted:
        _hinted = True
        why = "" if isinstance(error, ModuleNotFoundError) else f" (now: {error})"
        reporter.say(f"note: pip install 'glassgpt[fast]' makes generation on this CPU faster{why}")


def _has_nvidia_card() -> bool:
    """Without torch, whose import would take longer than a short text; then torch has to agree."""
    driver = any(Path("/dev").glob("nvidia[0-9]*")) or Path("/dev/dxg").exists()
    if not driver and sys.platform != "win32":
        return False
    import torch

    return torch.cuda.is_available()


# -- torch ---------------------------------------------------------------------------------------


def _torch_engine(
    checkpoint: Checkpoint,
    engine: EngineName,
    device: str,
    weights: WeightPrecision,
    threads: int | None,
    compile: bool | None,
) -> Engine:
    import torch

    from glassgpt.inference.engines.gpu import GpuEngine
    from glassgpt.inference.engines.reference import ReferenceEngine

    if threads:
        torch.set_num_threads(threads)
    model = torch_model(checkpoint, device)
    if engine == "torch":
        return ReferenceEngine(model)
    if next(model.parameters()).device.type == "cpu":
        raise UserError("engine=gpu: torch finds no GPU here")
    return GpuEngine(model.bfloat16() if weights == "bfloat16" else model, compile=compile)


def torch_model(checkpoint: Checkpoint, device: str) -> GPT:
    """model.py with these weights, a classifier with its own head. Raises `UserError` when it
    does not fit in memory."""
    from glassgpt.inference.classify import classifier
    from glassgpt.model import GPT
    from glassgpt.runtime import choose_device, is_out_of_memory

    try:
        make = classifier if checkpoint.labels else GPT.from_weights
        model = make(checkpoint.config, checkpoint.weights)
        return model.to(choose_device(device))
    except (RuntimeError, MemoryError) as error:
        if not is_out_of_memory(error):
            raise
        raise _too_large(checkpoint.config) from error


def _too_large(config: ModelConfig) -> UserError:
    size = f"{config.n_parameters:,} parameters, context {config.context_length:,}"
    return UserError(f"the model ({size}) does not fit in memory")


# -- measured once -------------------------------------------------------------------------------


def faster_engine(config: ModelConfig, reporter: Reporter = SILENT) -> EngineName:
    """numba or numpy, whichever is faster for this shape of model; measured once, then kept."""
    shape = json.dumps([asdict(replace(config, context_length=1024)), usable_cores()])
    record = kernel_folder() / f"choice-{sha256(shape.encode()).hexdigest()[:16]}.json"
    try:
        known = json.loads(record.read_bytes())["engine"]
        if known in ("numba", "numpy"):
            return known
    except (OSError, ValueError, KeyError, TypeError):
        pass
    rates = measure(config, reporter)
    chosen: EngineName = "numba" if rates["numba"] >= rates["numpy"] else "numpy"
    share = min(rates.values()) / max(rates.values())
    reporter.say(
        f"measured once for models of this shape: {chosen} takes {share:.0%} of the time that the "
        "other engine takes (--engine chooses)"
    )
    try:
        record.parent.mkdir(parents=True, exist_ok=True)
        write_file(record, json.dumps({"engine": chosen, "tokens_per_second": rates}).encode())
    except (OSError, UserError):
        pass  # then it is measured again the next time
    return chosen


def measure(config: ModelConfig, reporter: Reporter = SILENT) -> dict[str, float]:
    """Tokens per second of both CPU engines, with a stand-in of the same width and few layers."""
    config = replace(config, n_layer=min(_MEASURED_LAYERS, config.n_layer), context_length=64)
    weights = {name: np.full(s, 0.01, np.float32) for name, s in config.weight_shapes.items()}
    rates = {}
    for built in (NumbaEngine(config, weights, reporter=reporter), NumpyEngine(config, weights)):
        built.open(1)
        built.read([0], [np.zeros(8, np.int64)])
        seconds = []
        for _ in range(_MEASURED_STEPS):
            started = time.perf_counter()
            built.read([0], [np.zeros(1, np.int64)])
            seconds.append(time.perf_counter() - started)
        rates[built.name.split()[0]] = 1 / min(seconds)
    return rates
