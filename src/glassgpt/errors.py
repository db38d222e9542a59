"""The one exception that users see, and the phrases that its messages share.

Bad input raises `UserError`; the command line prints it on one line and exits with status 2.
This module knows nothing of models, files or terminals.
"""

from __future__ import annotations

import difflib
import errno
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager


class UserError(ValueError):
    """Something the user can put right: the message names the thing, its value and the remedy."""


def nearest(name: str, choices: Iterable[str]) -> str:
    """ " Did you mean 'x'?" with the choice closest to `name`, or "" when none is close."""
    close = difflib.get_close_matches(name, list(choices), n=1)
    return f" Did you mean {close[0]!r}?" if close else ""


def first_of(names: Sequence[str]) -> str:
    """ "book.txt and 3 more", for messages that have no room for every name."""
    return names[0] if len(names) == 1 else f"{names[0]} and {len(names) - 1} more"


_OS_REMEDIES = {
    errno.ENOSPC: "no space left on device; free some space or choose another folder",
    errno.EDQUOT: "your disk quota is used up; free some space or choose another folder",
    errno.EROFS: "the file system is read-only; choose another folder",
    errno.EACCES: "permission denied; choose a folder or file that you may use",
    errno.EPERM: "not permitted; choose a folder or file that you may use",
    errno.ENOENT: "it does not exist; check the name",
    errno.EISDIR: "that is a folder; name a file",
    errno.ENOTDIR: "a part of that path is a file, not a folder; check the name",
    errno.EEXIST: "it exists already; choose another name",
    errno.EBUSY: "it is in use, or a disk is mounted there; choose another place",
    errno.ENAMETOOLONG: "the name is too long for this file system; choose a shorter one",
}


@contextmanager
def explain_os_errors(doing: str) -> Iterator[None]:
    """Turn errors of the operating system into a `UserError`: "cannot {doing}: no space left ...".

    `doing` names the action and its path: "write runs/book".
    """
    try:
        yield
    except OSError as error:
        remedy = _OS_REMEDIES.get(error.errno or 0)
        if remedy is None:
            raise
        file = error.filename
        where = f" ({file})" if isinstance(file, str) and file not in doing else ""
        raise UserError(f"cannot {doing}{where}: {remedy}") from error
