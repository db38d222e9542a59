"""What the machine offers: whole files, locks, downloads, signals, cores, memory, and a reporter.

    write_file(Path("runs/book/config.json"), b"{}")
    download(url, cache_dir() / "corpora" / "book.txt", sha256="86c4e6aa...")

Behind a mirror, set GLASSGPT_MIRROR: `https://host/path` is then fetched from
`$GLASSGPT_MIRROR/host/path`. This module knows neither what is in the files nor what the cores are
used for.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import re
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO, Protocol

from filelock import FileLock, Timeout

from glassgpt.errors import UserError, explain_os_errors

if TYPE_CHECKING:
    from http.client import HTTPResponse

Json = dict[str, Any]  # a parsed JSON object

TIMEOUT = 30.0  # seconds without a single byte, after which a server is given up
RETRIES = 4  # tries in a row that may get no further than the one before
RETRY_PAUSE = 1.0  # seconds before the first of these; doubled each time
_BLOCK = 1 << 20  # bytes written at a time
BUSY = {408, 429, 500, 502, 503, 504}  # HTTP answers after which it is worth trying again


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


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[BinaryIO]:
    """A file to write, which becomes `path` when the block ends: whole, and flushed to the disk.

    Until then, and after an error or Ctrl-C, `path` is what it was before.
    """
    temporary = path.with_name(f".{path.name}.partial")
    with explain_os_errors(f"write {path}"):
        try:
            with open(temporary, "wb") as file:
                yield file
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(OSError):
                temporary.unlink(missing_ok=True)
            raise


def write_file(path: Path, content: bytes) -> None:
    """Write `content` so that `path` holds either all of it or what it held before."""
    with replacing(path) as file:
        file.write(content)


def write_json(path: Path, value: object) -> None:
    write_file(path, (json.dumps(value, indent=2) + "\n").encode())


def read_json(path: Path) -> Json:
    """Raises `UserError` when the file is missing, unreadable or no JSON."""
    with explain_os_errors(f"read {path}"):
        raw = path.read_bytes()
    try:
        value = json.loads(raw)
        if not isinstance(value, dict):
            raise ValueError("it holds no object")
        return value
    except (ValueError, RecursionError) as error:
        raise UserError(f"{path} is damaged: {error}; restore it or train again") from error


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


# ---- downloads --------------------------------------------------------------------------------


def download(
    url: str,
    target: Path,
    *,
    sha256: str | None,
    size: int | None = None,
    reporter: Reporter = SILENT,
    name: str | None = None,
    timeout: float = TIMEOUT,
) -> Path:
    """Fetch `url` to `target`, unless it is there already, and return `target`.

    What has arrived is kept in `target.partial`, also after Ctrl-C or on a full disk, and the next
    call continues from there. The file gets its final name once its SHA-256 is right (None: once it
    is as long as the server says, for files that carry their own checksums). Processes that want
    the same file wait for one another. `reporter` is told of the bytes, under `name` (None: the
    name of the file). Raises `UserError` if the file can't be fetched or is not the right one.
    """
    job = _Download(url, target, size, reporter, name or target.name, timeout)
    with explain_os_errors(f"download to {target}"):
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{target}.lock"):
                if not target.exists():  # else another process fetched it while we waited
                    job.run(sha256)
        found = target.stat().st_size
    if size is not None and found != size:  # put there by somebody else
        raise UserError(f"{target} has {found} bytes where {size} are right; delete it to fetch it")
    return target


@dataclass(frozen=True)
class _Download:
    url: str
    target: Path
    size: int | None
    reporter: Reporter
    name: str
    timeout: float

    @property
    def partial(self) -> Path:
        return self.target.with_name(self.target.name + ".partial")

    def have(self) -> int:
        """Bytes that have arrived so far."""
        return self.partial.stat().st_size if self.partial.exists() else 0

    def run(self, sha256: str | None) -> None:
        """Fetch the file, check it, and give it its final name."""
        try:
            self.complete()
        except _FetchError as failed:
            raise UserError(
                f"cannot fetch {self.url}: {failed}; "
                f"download it by hand to {self.target}, or use another source"
            ) from failed
        found = sha256_of(self.partial) if sha256 else None
        if found != sha256:
            self.partial.unlink()
            raise UserError(
                f"{self.url}: refused, because its SHA-256 is {found} and not {sha256}: damaged on "
                "the way, or changed at its source; try again, or use another source"
            )
        with open(self.partial, "rb+") as file:
            os.fsync(file.fileno())
        os.replace(self.partial, self.target)

    def complete(self) -> None:
        """Fetch what is missing; give up after `RETRIES` tries in a row without progress."""
        furthest, failures = self.have(), 0
        while self.size is None or self.have() != self.size:
            try:
                return self.append(self.have())
            except _FetchError as failed:
                # A server without Range starts over each time: only bytes beyond `furthest` count.
                failures = 0 if self.have() > furthest else failures + 1
                furthest = max(furthest, self.have())
                if failed.final or failures > RETRIES:
                    raise
                if failures:
                    time.sleep(RETRY_PAUSE * 2 ** (failures - 1))

    def append(self, have: int) -> None:
        """Fetch the bytes from `have` on; raises _FetchError when they don't all come."""
        try:
            response = _open(self.url, have, self.timeout)
        except _FetchError as failed:
            if not (failed.status == 416 and have):
                raise
            have = 0  # the server's file is shorter than our part: another file, so start over
            response = _open(self.url, have, self.timeout)
        with response:
            start, total = _extent(response)
            if start not in (0, have):
                raise _FetchError(f"asked for byte {have}, the server began at {start}", final=True)
            if self.size is not None and total not in (None, self.size):
                wrong = f"the file there has {total} bytes where {self.size} are right"
                raise _FetchError(wrong, final=True)
            have = start  # 0 from a server without Range
            total = self.size if total is None else total
            with open(self.partial, "ab" if have else "wb") as file:
                for block in _blocks(response):
                    file.write(block)
                    have += len(block)
                    self.reporter.advance(self.name, have, total)
        if total is not None and have < total:
            raise _FetchError(f"the connection was cut after {have} of {total} bytes")


class _FetchError(Exception):
    """A failure of the network or the server; `final`: trying again would not help."""

    def __init__(self, reason: str, *, final: bool = False, status: int | None = None) -> None:
        super().__init__(reason)
        self.final, self.status = final, status


def mirrored(url: str) -> str:
    """`url`, or where the mirror named by $GLASSGPT_MIRROR has it."""
    mirror = os.environ.get("GLASSGPT_MIRROR")
    if not mirror:
        return url
    if "://" not in mirror:
        raise UserError(f"GLASSGPT_MIRROR={mirror!r} is no address; it begins with https://")
    return f"{mirror.rstrip('/')}/{url.partition('://')[2]}"


def _open(url: str, start: int, timeout: float) -> HTTPResponse:
    """Ask for the bytes of `url` from `start` on; raises _FetchError."""
    from http.client import HTTPException
    from urllib.error import HTTPError
    from urllib.request import Request, urlopen

    headers = {"User-Agent": "glassgpt", "Accept-Encoding": "identity"}
    if start:
        headers["Range"] = f"bytes={start}-"
    try:
        return urlopen(Request(mirrored(url), headers=headers), timeout=timeout)
    except HTTPError as error:
        error.close()
        answer = f"the server answered {error.code} {error.reason}"
        raise _FetchError(answer, final=error.code not in BUSY, status=error.code) from error
    except (ConnectionResetError, HTTPException) as error:  # cut before the first byte
        raise _FetchError(_reason(error)) from error
    except OSError as error:  # unknown host, refused, no answer in time, bad certificate
        raise _FetchError(_reason(error), final=True) from error


def _blocks(response: HTTPResponse) -> Iterator[bytes]:
    """The body as it arrives; a failure of the network becomes a _FetchError."""
    from http.client import HTTPException

    try:
        while block := response.read1(_BLOCK):
            yield block
    except (OSError, HTTPException) as error:
        raise _FetchError(_reason(error)) from error


def _extent(response: HTTPResponse) -> tuple[int, int | None]:
    """(first byte of this answer, size of the whole file or None if the server doesn't say)."""
    if response.status == 206:
        match = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None:
            raise _FetchError("the server's Content-Range is malformed", final=True)
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length else None


def _reason(error: Exception) -> str:
    """What went wrong, in words; `URLError` wraps the error that says it."""
    inner = getattr(error, "reason", error)
    if isinstance(inner, TimeoutError):
        return "no answer in time"
    return getattr(inner, "strerror", None) or str(inner) or type(inner).__name__


# ---- the machine ------------------------------------------------------------------------------


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


# ---- time and memory in words ------------------------------------------------------------------


_UNITS = {"s": 1.0, "m": 60.0, "h": 3600.0, "d": 86400.0}


def seconds_of(duration: str) -> float:
    """90s, 5m, 1h30m, 2d -> seconds; a number alone is seconds. Raises `UserError`."""
    wanted = duration.replace(" ", "").lower()
    parts = re.findall(r"(\d+(?:\.\d+)?)([smhd]?)", wanted)
    seconds = sum(float(number) * _UNITS[unit or "s"] for number, unit in parts)
    if "".join(number + unit for number, unit in parts) != wanted or not 0 < seconds < math.inf:
        raise UserError(f"{duration!r} is no duration; write 30s, 5m or 1h30m")
    return seconds


def bytes_of(size: str) -> int:
    """800MB, 8GB, 1.5GB -> bytes (a MB is 10^6, a GB 10^9). Raises `UserError`."""
    found = re.fullmatch(r"(\d+(?:\.\d+)?) ?([mgt])b?", size.strip().lower())
    if found is None or not 0 < float(found[1]) < 1e30:
        raise UserError(f"{size!r} is no amount of memory; write 800MB or 8GB")
    return int(float(found[1]) * {"m": 1e6, "g": 1e9, "t": 1e12}[found[2]])
