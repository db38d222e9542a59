"""Small favours of the operating system: files that are whole or absent, cores we may use.

    write_file(Path("runs/book/config.json"), b"{}")

This room knows neither what is in the files nor what the cores are used for.
"""

from __future__ import annotations

import os
from pathlib import Path

from glassgpt.errors import explain_os_errors


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


def usable_cores() -> int:
    """Cores this process may use, which in a container is less than the machine has."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
