"""Files from the net: fetched once, resumed where they stopped, checked before they get their name.

    from glassgpt.data.download import download
    download(url, cache_dir() / "corpora" / "book.txt", sha256="86c4e6aa...")

Behind a mirror, set GLASSGPT_MIRROR: `https://host/path` is then fetched from
`$GLASSGPT_MIRROR/host/path`. This room does not know what is in the files, nor which there are
(`corpora.py` does).
"""

from __future__ import annotations

import io
import os
import re
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from http.client import HTTPException, HTTPResponse
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import Request, urlopen

from glassgpt.errors import UserError, explain_os_errors
from glassgpt.system import sha256_of

BLOCK = 1 << 20
TIMEOUT = 30.0  # seconds without a single byte, after which a server counts as gone
RETRIES = 4  # tries in a row that may get us no further than the one before
RETRY_PAUSE = 1.0  # seconds before the first of these; each next one waits twice as long
_BUSY = {408, 429, 500, 502, 503, 504}  # HTTP answers that may be better in a moment


def download(
    url: str,
    target: Path,
    *,
    sha256: str | None,
    size: int | None = None,
    progress: Callable[[int, int | None], None] | None = None,
    timeout: float = TIMEOUT,
) -> Path:
    """Fetch `url` to `target`, unless it is there already, and return `target`.

    What has arrived waits in `target.partial`, also after Ctrl-C or a full disk, and the next call
    goes on from there. The file gets its final name only once its SHA-256 is right (None: once it
    is as long as the server says, for files that carry checksums of their own). Processes that want
    the same file wait for one another. `progress(done, total)` counts bytes; `total` is None where
    the server doesn't say. Raises UserError where the file can't be had or isn't the right one.
    """
    from filelock import FileLock

    job = _Download(url, target, size, progress or (lambda done, total: None), timeout)
    with explain_os_errors(f"download to {target}"):
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with FileLock(f"{target}.lock"):
                if not target.exists():  # else another process brought it while we waited
                    job.run(sha256)
        found = target.stat().st_size
    if size is not None and found != size:  # not from us: we would have checked it
        raise UserError(f"{target} has {found} bytes where {size} are right; delete it to fetch it")
    return target


@dataclass(frozen=True)
class _Download:
    url: str
    target: Path
    size: int | None
    progress: Callable[[int, int | None], None]
    timeout: float

    @property
    def partial(self) -> Path:
        return self.target.with_name(self.target.name + ".partial")

    def have(self) -> int:
        """Bytes that have arrived so far."""
        return self.partial.stat().st_size if self.partial.exists() else 0

    def run(self, sha256: str | None) -> None:
        """Fetch, check, give it its name."""
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
        """Fetch what is missing; give up after `RETRIES` tries in a row that got us no further."""
        furthest, failures = self.have(), 0
        while self.size is None or self.have() != self.size:
            try:
                return self.append(self.have())
            except _FetchError as failed:
                # A server without Range begins anew each time: only new ground is getting further.
                failures = 0 if self.have() > furthest else failures + 1
                furthest = max(furthest, self.have())
                if failed.final or failures > RETRIES:
                    raise
                if failures:
                    time.sleep(RETRY_PAUSE * 2 ** (failures - 1))

    def append(self, have: int) -> None:
        """Fetch the bytes from `have` on; raises _FetchError when they don't all come."""
        try:
            response = _open(self.url, have, None, self.timeout)
        except _FetchError as failed:
            if not (failed.status == 416 and have):
                raise
            have = 0  # we hold more than the file there has: not the same file, so from the start
            response = _open(self.url, have, None, self.timeout)
        with response:
            start, total = _extent(response)
            if start not in (0, have):
                raise _FetchError(f"asked for byte {have}, the server began at {start}", final=True)
            if self.size is not None and total not in (None, self.size):
                wrong = f"the file there has {total} bytes where {self.size} are right"
                raise _FetchError(wrong, final=True)
            have = start  # 0 from a server that knows no Range
            total = self.size if total is None else total
            with open(self.partial, "ab" if have else "wb") as file:
                for block in _blocks(response):
                    file.write(block)
                    have += len(block)
                    self.progress(have, total)
        if total is not None and have < total:
            raise _FetchError(f"the connection was cut after {have} of {total} bytes")


class _FetchError(Exception):
    """The net's fault, with the reason in words; `final` where trying again is of no use."""

    def __init__(self, reason: str, *, final: bool = False, status: int | None = None) -> None:
        super().__init__(reason)
        self.final, self.status = final, status


def _open(url: str, start: int, stop: int | None, timeout: float) -> HTTPResponse:
    """Ask for bytes start .. stop-1 of `url` (None: to the end); raises _FetchError."""
    if mirror := os.environ.get("GLASSGPT_MIRROR"):
        if "://" not in mirror:
            raise UserError(f"GLASSGPT_MIRROR={mirror!r} is no address; it begins with https://")
        url = f"{mirror.rstrip('/')}/{url.partition('://')[2]}"
    headers = {"User-Agent": "glassgpt", "Accept-Encoding": "identity"}
    if start or stop is not None:
        headers["Range"] = f"bytes={start}-{'' if stop is None else stop - 1}"
    try:
        return urlopen(Request(url, headers=headers), timeout=timeout)
    except HTTPError as error:
        error.close()
        answer = f"the server answered {error.code} {error.reason}"
        raise _FetchError(answer, final=error.code not in _BUSY, status=error.code) from error
    except (ConnectionResetError, HTTPException) as error:  # cut before the first byte
        raise _FetchError(_reason(error)) from error
    except OSError as error:  # unknown host, refused, no answer in time, bad certificate
        raise _FetchError(_reason(error), final=True) from error


def _blocks(response: HTTPResponse) -> Iterator[bytes]:
    """The body as it comes in. Failures become _FetchError here, where no disk can be at fault."""
    try:
        while block := response.read1(BLOCK):
            yield block
    except (OSError, HTTPException) as error:
        raise _FetchError(_reason(error)) from error


def _extent(response: HTTPResponse) -> tuple[int, int | None]:
    """(first byte of this answer, bytes of the whole file or None when the server doesn't say)."""
    if response.status == 206:
        match = re.match(r"bytes (\d+)-\d+/(\d+|\*)", response.headers.get("Content-Range", ""))
        if match is None:
            raise _FetchError("the server's Content-Range makes no sense", final=True)
        return int(match[1]), None if match[2] == "*" else int(match[2])
    length = response.headers.get("Content-Length")
    return 0, int(length) if length else None


def _reason(error: Exception) -> str:
    """What went wrong, in words: `URLError` wraps the real error, which has its own text."""
    inner = getattr(error, "reason", error)
    if isinstance(inner, TimeoutError):
        return "no answer in time"
    return getattr(inner, "strerror", None) or str(inner) or type(inner).__name__


class RangeFile(io.RawIOBase):
    """A file of `size` bytes at `url`, read-only, seekable; only what is read of it is fetched.

    Each read is one HTTP request, so wrap it: `io.BufferedReader(RangeFile(...), 4 << 20)`.
    Reading raises UserError when the bytes can't be had or the file there has another size.
    """

    def __init__(self, url: str, size: int, *, timeout: float = TIMEOUT) -> None:
        self.url, self.size, self.timeout = url, size, timeout
        self._position = 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        origin = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self.size}[whence]
        self._position = max(0, origin + offset)
        return self._position

    def readinto(self, buffer) -> int:
        stop = min(self._position + len(buffer), self.size)
        if stop <= self._position:
            return 0
        data = self._fetch(self._position, stop)
        buffer[: len(data)] = data
        self._position = stop
        return len(data)

    def _fetch(self, start: int, stop: int) -> bytes:
        for failures in range(RETRIES + 1):
            try:
                return self._fetch_once(start, stop)
            except _FetchError as failed:
                if failed.final or failures == RETRIES:
                    why = f"cannot read {self.url}: {failed}; try again, or use another source"
                    raise UserError(why) from failed
                time.sleep(RETRY_PAUSE * 2**failures)
        raise AssertionError("the last failure is raised")

    def _fetch_once(self, start: int, stop: int) -> bytes:
        with _open(self.url, start, stop, self.timeout) as response:
            first, total = _extent(response)
            if response.status != 206 or first != start:
                raise _FetchError("the server can't send a part of a file", final=True)
            if total not in (None, self.size):
                wrong = f"the file there has {total} bytes where {self.size} are right"
                raise _FetchError(wrong, final=True)
            data = b"".join(_blocks(response))
        if len(data) != stop - start:
            raise _FetchError(f"the connection was cut after {len(data)} of {stop - start} bytes")
        return data
