"""Modules of Numba kernels: imported where they work, their compiled code kept on disk.

    kernels = load_kernels("glassgpt.inference.kernels.forward")

Raises ImportError wherever Numba is missing or broken: whoever asks has another way. This room
knows nothing of what the kernels compute.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import importlib
import platform
import shutil
import tempfile
import time
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from types import ModuleType

from glassgpt.system import Reporter, cache_dir

_OLDEST_NUMBA = (0, 62)  # as in pyproject.toml: from here on, LLVM's pointers have no types
_MONTH = 30 * 24 * 3600.0  # seconds
_SOURCES = (
    "inference/kernels/forward.py",
    "inference/kernels/products.py",
    "inference/kernels/simd.py",
    "inference/kernels/quantize.py",
    "training/fused/kernels.py",
)


@cache
def load_kernels(name: str) -> ModuleType:
    """The module `name`, whose compiled code is kept in the cache folder for as long as its source,
    the compiler and the processor stay the same. Raises ImportError where Numba can't be used."""
    try:
        import numba

        if tuple(map(int, numba.__version__.split(".")[:2])) < _OLDEST_NUMBA:
            raise ImportError(f"numba {numba.__version__} is too old")
        if numba.config.DISABLE_JIT:  # type: ignore
            raise ImportError("NUMBA_DISABLE_JIT is set")
        before, numba.config.CACHE_DIR = numba.config.CACHE_DIR, str(kernel_folder())  # type: ignore
        try:
            return importlib.import_module(name)
        finally:
            numba.config.CACHE_DIR = before  # type: ignore
    except ImportError:
        raise
    except Exception as error:  # installed, but broken in one of many ways
        raise ImportError(one_line(error)) from error


def one_line(error: BaseException) -> str:
    return (str(error).strip() or repr(error)).splitlines()[0][:200]


@cache
def kernel_folder() -> Path:
    """Where compiled code is kept; a temporary folder where the cache can't be written."""
    import llvmlite.binding
    import numba

    config, package = numba.config, Path(__file__).parents[2]  # type: ignore
    processor = config.CPU_NAME or llvmlite.binding.get_host_cpu_name()  # type: ignore
    version = f"{numba.__version__} {platform.python_version()} {processor} {config.CPU_FEATURES}"  # type: ignore
    sources = [(package / name).read_bytes() for name in _SOURCES]
    digest = hashlib.sha256(b"".join([version.encode(), *sources])).hexdigest()[:16]
    folder = cache_dir() / "kernels" / digest
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryFile(dir=folder):
            return folder
    except OSError:
        temporary = tempfile.mkdtemp(prefix="glassgpt-kernels-")
        atexit.register(shutil.rmtree, temporary, ignore_errors=True)
        return Path(temporary)


@contextlib.contextmanager
def first_call(what: str, reporter: Reporter) -> Iterator[None]:
    """Around a first call of the kernels `what`, which compiles them or reads what was compiled
    before: says so when it will take a while. Raises ImportError when the compiler fails."""
    known = kernel_folder() / f"{what.replace(' ', '-')}.compiled"
    if not known.exists():
        kept = cache_dir() in known.parents
        often = "once on this machine" if kept else f"anew: {cache_dir()} can't be written"
        _forget_old_code(known.parent)
        reporter.say(f"compiling the {what} kernels, {often} ...")
    try:
        yield
        known.touch()
    except OSError as error:  # a full disk: they are compiled, but will be so once more
        reporter.say(f"note: the compiled kernels could not be kept: {error}")
    except Exception as error:
        raise ImportError(f"numba can't compile: {one_line(error)}") from error


def _forget_old_code(folder: Path) -> None:
    """What was compiled from other sources, when nobody has used it for a month."""
    if cache_dir() not in folder.parents:
        return
    with contextlib.suppress(OSError):  # another process does the same
        for other in folder.parent.iterdir():
            if other != folder and time.time() - other.stat().st_mtime > _MONTH:
                shutil.rmtree(other, ignore_errors=True)
