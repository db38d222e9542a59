"""What the machine offers: files written whole, locks, signals, cores, memory, telling people.

    write_file(Path("runs/book/config.json"), b"{}")

This room knows neither what is in the files nor what the cores are used for.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from glassgpt.errors import UserError, explain_os_errors


class Reporter(Protocol):
    """Whom long work tells what it does, so that library code never prints.

    A class that derives from it and overrides nothing is silent.
    """

    def say(self, text: str = "") -> None:
        """A line that stays."""

    def status(self, text: str) -> None:
        """A line that the next one replaces."""

    def advance(self, name: str, done: int, total: int | None) -> None:
        """Of the work `name`, so many bytes are done; `total` is None where nobody knows it."""

    def close(self) -> None:
        """The status line is over."""


class _Silent(Reporter):
    """Says nothing."""


SILENT: Reporter = _Silent()


def write_file(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds either all of it or what it held before."""
    with explain_os_errors(f"write {path}"):
        temporary = path.with_name(f".{path.name}.partial")
        try:
            with open(temporary, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except OSError:
            temporary.unlink(missing_ok=True)
            raise


def cache_dir() -> Path:
    """Where files are kept: $GLASSGPT_CACHE, else glassgpt in $XDG_CACHE_HOME or ~/.cache."""
    if chosen := os.environ.get("GLASSGPT_CACHE"):
        return Path(chosen).expanduser()
    if shared := os.environ.get("XDG_CACHE_HOME"):
        return Path(shared) / "glassgpt"
    return Path.home() / ".cache" / "glassgpt"


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file in hexadecimal."""
    with open(path, "rb", buffering=0) as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def exclusive(thing: Path, lock: Path) -> Iterator[None]:
    """Hold `thing` for this process alone, by the file `lock`, which even a killed process lets go.

    Raises `UserError` while another process has it.
    """
    guard = FileLock(lock)
    try:
        with explain_os_errors(f"write {thing}"):
            lock.parent.mkdir(parents=True, exist_ok=True)
            guard.acquire(timeout=0)
    except Timeout:
        raise UserError(f"{thing} is in use by another process; wait for it, or choose another "
                        "--out") from None  # fmt: skip
    try:
        yield
    finally:  # deleted while it is held, so it is ours and not the next one's
        with contextlib.suppress(OSError):
            lock.unlink()
        guard.release()


@contextlib.contextmanager
def own_folder(
    folder: Path, lock: str, check: Callable[[], None], *, keep_empty: bool = False
) -> Iterator[None]:
    """Hold `folder` for this process alone, by the file `lock` in it; it is made where missing.

    `check` raises `UserError` for content that must not be replaced. It runs before the folder is
    made and again once it is held, because another process may have finished just then. A folder
    that is empty at the end is removed, unless `keep_empty`.
    """
    with explain_os_errors(f"write {folder}"):
        check()
        folder.mkdir(parents=True, exist_ok=True)
    try:
        with exclusive(folder, folder / lock):
            check()
            yield
    finally:
        if not keep_empty:
            with contextlib.suppress(OSError):  # there are files in it: all went well
                folder.rmdir()


def check_outside(folder: Path, inputs: Iterable[str | Path]) -> None:
    """Raise `UserError` if one of `inputs` lies in `folder`, whose content will be replaced."""
    place = Path(os.path.realpath(folder))
    for path in inputs:
        real = Path(os.path.realpath(path))
        if place in (real, *real.parents):
            raise UserError(
                f"{path} lies in {folder}, which would be replaced; choose another --out"
            )


@contextlib.contextmanager
def before_sigterm(clean_up: Callable[[], None]) -> Iterator[None]:
    """Call `clean_up` if SIGTERM comes in here, then let it end the process as it does anyway.

    Nothing is unwound: an exception out of nowhere can leave a lock of Python's thread pool taken,
    and the process would wait for it forever. Signals arrive in the main thread; in others, or
    where somebody handles this one already, nothing changes.
    """
    in_main = threading.current_thread() is threading.main_thread()
    if not in_main or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return

    def end(number: int, frame: object) -> None:
        clean_up()
        signal.signal(number, signal.SIG_DFL)
        signal.raise_signal(number)

    signal.signal(signal.SIGTERM, end)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def usable_cores() -> int:
    """Cores this process may use, which in a container is less than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """Memory this process may use, which in a container is less than the machine has."""
    known = []
    with contextlib.suppress(ValueError, OSError, AttributeError):
        known.append(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    with contextlib.suppress(ValueError, OSError):  # "max" where there is no limit
        known.append(int(Path("/sys/fs/cgroup/memory.max").read_text()))
    return min(known, default=None)


def free_memory() -> int | None:
    """Memory that this process may still take while other programs keep theirs; None where nobody
    knows. Linux alone says it; elsewhere it is all there is."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith("MemAvailable:"):
                return min(int(line.split()[1]) * 1024, memory_bytes() or 1 << 62)
    return memory_bytes()


def peak_memory() -> int:
    """The most bytes that this process has had in memory until now."""
    with contextlib.suppress(OSError):  # what getrusage says includes the process that began us
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
