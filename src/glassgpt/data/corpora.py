"""Texts with a name: where they come from, what they may be used for, and the exact bytes they are.

    from glassgpt.data.corpora import CORPORA, fetch_corpus
    fetch_corpus("shakespeare")     # [PosixPath('~/.cache/glassgpt/corpora/shakespeare/input.txt')]

Every file is pinned by revision, size and SHA-256. This room does not know how text is read out of
them (`sources.py` does).
"""

from __future__ import annotations

import platform
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, cast

from glassgpt.errors import UserError, explain_os_errors
from glassgpt.system import (
    BUSY,
    RETRIES,
    RETRY_PAUSE,
    SILENT,
    TIMEOUT,
    Reporter,
    cache_dir,
    download,
    mirrored,
    write_file,
)

if TYPE_CHECKING:
    from fsspec.spec import AbstractBufferedFile


@dataclass(frozen=True)
class RemoteFile:
    """One file on the net, pinned: `size` in bytes, `sha256` in hexadecimal."""

    url: str
    size: int
    sha256: str

    @property
    def name(self) -> str:
        return self.url.rpartition("/")[2]


@dataclass(frozen=True)
class Corpus:
    """A named text. `streamed`: read over the net row by row, never stored here.

    A part of a file can't be checked against the SHA-256 of the whole, so what pins a streamed
    corpus is the revision in its addresses, and the size of each file, which is compared.
    """

    name: str
    description: str
    licence: str
    files: tuple[RemoteFile, ...]
    notes: str = ""
    streamed: bool = False


def fetch_corpus(
    name: str, reporter: Reporter = SILENT, *, timeout: float = TIMEOUT
) -> list[Path | RemoteFile]:
    """The files of corpus `name`: on this disk (fetched now if need be), or, if streamed, remote.

    Raises UserError when a file can't be fetched.
    """
    corpus = CORPORA[name]
    if corpus.streamed:
        return list(corpus.files)
    folder = cache_dir() / "corpora" / name
    if name == "python-manual":
        return [_write_python_manual(folder)]

    return [
        download(
            file.url,
            folder / file.name,
            sha256=file.sha256,
            size=file.size,
            reporter=reporter,
            name=name,
            timeout=timeout,
        )
        for file in corpus.files
    ]


def open_remote(file: RemoteFile) -> AbstractBufferedFile:
    """A file of a streamed corpus: seekable, and each read is a request for just these bytes.

    Raises UserError when the file can't be opened or has another size than the pinned one.
    """
    from huggingface_hub import HfFileSystem

    hub = HfFileSystem(endpoint=mirrored(_HUB), token=False, skip_instance_cache=True)
    path = file.url.removeprefix(f"{_HUB}/").replace("/resolve/", "@")
    for failures in range(RETRIES + 1):  # reading tries again by itself, opening does not
        try:
            opened = cast("AbstractBufferedFile", hub.open(path, "rb", cache_type="none"))
            break
        except Exception as error:
            status = getattr(getattr(error, "response", None), "status_code", None)
            if status not in BUSY or failures == RETRIES:
                raise unreachable(file, error) from error
            time.sleep(RETRY_PAUSE * 2**failures)
    if opened.size != file.size:
        raise UserError(
            f"{file.url}: the file there has {opened.size} bytes where {file.size} "
            "are right; use another source"
        )
    return opened


def unreachable(file: RemoteFile, error: Exception) -> UserError:
    """What to tell when `file` can't be read; the libraries below raise errors of many kinds."""
    reason = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
    return UserError(f"cannot read {file.url}: {reason}; try again, or use another source")


def _write_python_manual(folder: Path) -> Path:
    """The language reference behind Python's own help(), as one text file; no network needed."""
    path = folder / f"python-{platform.python_version()}.txt"
    if path.exists():
        return path
    from filelock import FileLock

    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise UserError(
            "this Python came without its manual (pydoc_data); use another source"
        ) from error
    text = "\n\n".join(topics[key].rstrip() for key in sorted(topics)) + "\n"
    with explain_os_errors(f"write {path}"):
        folder.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_suffix(".lock")):  # one at a time, under one temporary name
            write_file(path, text.encode())
    return path


_GITHUB = "https://raw.githubusercontent.com"
_CHAR_RNN = f"{_GITHUB}/karpathy/char-rnn/6f9487a6fe5b420b7ca9afb0d7c078e37c1d1b4e"
_LLM_COURSE = f"{_GITHUB}/Infatoshi/fcc-intro-to-llms/62fea5d2891799dc0d8bf781b9bdc493ecdeab6d"
_FROM_SCRATCH = (
    f"{_GITHUB}/waylandzhang/Transformer-from-scratch/def96882f9d009cd704e3db9e6e119e89e00352b"
)
_HUB = "https://huggingface.co"
_DATASETS = f"{_HUB}/datasets"
_TINYSTORIES = (
    f"{_DATASETS}/roneneldan/TinyStories/resolve/f54c09fd23315a6f9c86f9dc80f725de7d8f9c64"
)
_FINEWEB = (
    f"{_DATASETS}/HuggingFaceFW/fineweb-edu/resolve/87f09149ef4734204d70ed1d046ddc9ca3f2b8f9"
    "/sample/10BT"
)
_FINEWEB_FILES = (  # (bytes, SHA-256) of 000_00000.parquet, 001_00000.parquet, ...
    (2_152_819_114, "b1ba7b2ce4cb5ea6ef42dca40263eabb85f37700d01693a68e9b30a31d78e871"),
    (2_152_222_432, "3fcf2dc69cd52503986276d3d2d26a8c356d0f2ea28a0de4fdbda8cf87755693"),
    (2_151_796_315, "547ae182d132c9f06b6ce63149567208ea9f57630bfd9b1a2938e504f0c9ebd7"),
    (2_152_437_524, "22184e6eb25759ddd97783751ffc73e1705dfa2542e630dae1f2a8bac8ee6ddb"),
    (2_152_338_550, "33557ddd87a07a4ae6fcaf7a4789c7b484e5cc0c273ca12a65b74200e6d8748b"),
    (2_152_189_947, "e08d79927ecb377786572cd854817c748ceb8880878b1a0eb91abf8c85d505ea"),
    (2_152_689_867, "554fa2613c9261d6c9c396caab881de3160175794c6c3e1856bf28a0e9cb9b76"),
    (2_150_686_637, "4b7d1f697d4afff7f5f65cb7aa4d83acc6db716da4d46ea23399d0c50608c6e3"),
    (2_151_274_846, "a6d9dcc0c72ecd7c7f0173c2d06b3a4249a2ccaa94961469d1a522ca689bbf1a"),
    (2_151_913_277, "f836cd3c70b95776699eb6c356b2dbf702816e25dcf39992f5c80a29029d23c3"),
    (2_152_798_864, "e5a2eae25f057f0856a10bfae314c6ca8ea8bb08456d2131e9e89b2b8305e2f6"),
    (2_152_323_681, "db71cf0425bb3d1813a09f12ff1acd6dabdfb91a2e4f141960254ee5a7f036e7"),
    (2_152_069_689, "08b47a3e1c25161f796d2f8dbf99ccf60affdebdcea4910833d0d5783315551f"),
    (540_632_672, "b393f51fefab26cd6f4c8f65707c1924f6666c4961a0ebebe04bb57f7ec832de"),
)

_ALL = (
    Corpus(
        "shakespeare",
        "40,000 lines from Shakespeare's plays: the usual first text, 1 MB",
        "public domain",
        (
            RemoteFile(
                f"{_CHAR_RNN}/data/tinyshakespeare/input.txt",
                1_115_394,
                "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
            ),
        ),
    ),
    Corpus(
        "wizard-of-oz",
        "Dorothy and the Wizard in Oz, a novel by L. Frank Baum (1908), 0.2 MB",
        "public domain",
        (
            RemoteFile(
                f"{_LLM_COURSE}/wizard_of_oz.txt",
                237_733,
                "563fc0f0faf22236b612e61ad5c49e09e15484cbaa4271625485c6bfd9991741",
            ),
        ),
    ),
    Corpus(
        "sales-textbook",
        "a textbook on selling, 0.5 MB",
        "not stated by its source",
        (
            RemoteFile(
                f"{_FROM_SCRATCH}/data/sales_textbook.txt",
                460_319,
                "1994f20f5becd3f0b3d7a632e5a68513cc38cf6c9737a9f38243f1b652e962da",
            ),
        ),
    ),
    Corpus(
        "tinystories",
        "2.7 million short stories in the words of a small child, by GPT-4, 2.2 GB",
        "CDLA-Sharing-1.0",
        (
            RemoteFile(
                f"{_TINYSTORIES}/TinyStoriesV2-GPT4-train.txt",
                2_227_753_162,
                "6418d412de72888f52b5142c761ac21a582f7d1166f0bfbdb5f03ccfdec90443",
            ),
        ),
    ),
    Corpus(
        "openwebtext",
        "8 million pages that people on Reddit linked to: GPT-2's data, rebuilt; 13 GB packed",
        "CC0 for the collection; each page stays its author's",
        (
            RemoteFile(
                "https://zenodo.org/record/3834942/files/openwebtext.tar.xz",
                12_880_027_468,
                "9fe39d154c5bc67da8c359415372b79510eb1e2edb0d035fe4f7fc3a732b9336",
            ),
        ),
        notes="read straight from the archive: it need not be unpacked",
    ),
    Corpus(
        "fineweb-edu",
        "pages with something to teach, chosen from the web by a model: 10 billion tokens, 28 GB",
        "ODC-By 1.0; each page stays its author's",
        tuple(
            RemoteFile(f"{_FINEWEB}/{number:03}_00000.parquet", size, sha256)
            for number, (size, sha256) in enumerate(_FINEWEB_FILES)
        ),
        notes="streamed: only what is read is fetched, and nothing is stored; see --max-tokens",
        streamed=True,
    ),
    Corpus(
        "python-manual",
        "the language reference that every Python carries, 0.5 MB; needs no network",
        "PSF License Agreement",
        (),
        notes="differs a little from one Python version to the next",
    ),
)
CORPORA: dict[str, Corpus] = {corpus.name: corpus for corpus in _ALL}
