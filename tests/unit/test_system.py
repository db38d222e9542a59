"""Downloads from a real server on loopback that cuts, stalls, refuses and lies on demand."""

from __future__ import annotations

import hashlib
import io
import json
import os
import random
import re
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest

from glassgpt import system
from glassgpt.data.corpora import CORPORA, Corpus, RemoteFile, fetch_corpus
from glassgpt.data.sources import read_pieces, resolve, stamp_of, total_bytes
from glassgpt.errors import UserError
from glassgpt.system import Reporter, cache_dir, download
from listener import Listener

DATA = random.Random(0).randbytes(300_000)
URL = "https://files.example/books/one.bin"


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


class Server(ThreadingHTTPServer):
    """Serves `files` by path and notes each request; the other fields are its bad habits."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {"/files.example/books/one.bin": DATA}
        self.requests: list[tuple[str, str | None]] = []  # (path, Range)
        self.sent = 0
        self.knows_range = True
        self.says_length = True
        self.cuts: list[int] = []  # of each answer, after how many bytes it is cut; then none is
        self.codes: list[int] = []  # errors to answer first
        self.delay = 0.0  # seconds before the body
        self.stall = 0.0  # seconds in the middle of the first body
        self.total: int | None = None  # the size it claims in Content-Range
        self.shift = 0  # how far its ranges begin from where they should


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        server, wanted = self.server, self.headers.get("Range")
        server.requests.append((self.path, wanted))
        data = server.files.get(self.path.partition("?")[0])
        if server.codes or data is None:
            return self.send_error(server.codes.pop(0) if server.codes else 404)
        size, start, stop = len(data), 0, len(data)
        if server.knows_range and wanted and (match := re.match(r"bytes=(\d+)-(\d*)", wanted)):
            start = int(match[1]) + server.shift
            stop = min(size, int(match[2]) + 1 if match[2] else size)
            if start >= size:
                return self.send_error(416)
            self.send_response(206)
            total = server.total or size
            self.send_header("Content-Range", f"bytes {start}-{stop - 1}/{total}")
        else:
            self.send_response(200)
        if server.says_length:
            self.send_header("Content-Length", str(stop - start))
        self.end_headers()
        with suppress(ConnectionError):  # some tests hang up
            self.send_body(data[start:stop])

    def send_body(self, body: bytes) -> None:
        server = self.server
        time.sleep(server.delay)
        if server.cuts:
            body = body[: server.cuts.pop(0)]
        half = len(body) // 2 if server.stall else 0
        if half:
            self.wfile.write(body[:half])
            self.wfile.flush()
            pause, server.stall = server.stall, 0.0
            time.sleep(pause)
        self.wfile.write(body[half:])
        server.sent += len(body)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def server(tmp_path, monkeypatch):
    with Server() as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        monkeypatch.setenv("GLASSGPT_MIRROR", f"http://127.0.0.1:{server.server_port}/")
        monkeypatch.setenv("GLASSGPT_CACHE", str(tmp_path / "cache"))
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        monkeypatch.setattr(system, "RETRY_PAUSE", 0.01)
        yield server
        server.shutdown()
        thread.join()


@pytest.fixture
def target(tmp_path) -> Path:
    return tmp_path / "new folder" / "one.bin"


def partial_of(target: Path) -> Path:
    return target.with_name("one.bin.partial")


def get(target: Path, **changes) -> Path:
    return download(URL, target, **{"sha256": sha256(DATA), "size": len(DATA), **changes})


def error_of(target: Path, **changes) -> str:
    with pytest.raises(UserError) as caught:
        get(target, **changes)
    message = str(caught.value)
    assert "\n" not in message
    assert not target.exists()
    return message


# ---- whole files -----------------------------------------------------------------------------


@pytest.mark.parametrize("size", [len(DATA), None])
def test_fetched_once_and_counted(server, target, size):
    told = Listener()
    assert get(target, size=size, reporter=told) == target
    assert target.read_bytes() == DATA
    assert told.advanced[-1] == ("one.bin", len(DATA), len(DATA))
    counts = [done for _, done, _ in told.advanced]
    assert counts == sorted(set(counts))
    get(target)
    assert server.requests == [("/files.example/books/one.bin", None)]
    assert not partial_of(target).exists()


def test_goes_on_after_the_connection_was_cut(server, target):
    server.cuts = [100_000, 50_000]
    told = Listener()
    get(target, reporter=told)
    assert target.read_bytes() == DATA
    ranges = [wanted for _, wanted in server.requests]
    assert ranges == [None, "bytes=100000-", "bytes=150000-"]
    assert told.advanced[-1] == ("one.bin", len(DATA), len(DATA))
    assert server.sent == len(DATA)


def test_goes_on_after_ctrl_c(server, target):
    class Interrupting(Reporter):
        def advance(self, name: str, done: int, total: int | None) -> None:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        get(target, reporter=Interrupting())
    kept = partial_of(target).stat().st_size
    assert 0 < kept < len(DATA)
    assert not target.exists()
    get(target)
    assert target.read_bytes() == DATA
    assert server.requests[-1][1] == f"bytes={kept}-"


def test_many_cuts_are_no_matter_while_it_gets_further(server, target):
    server.cuts = [10_000] * 20
    get(target)
    assert target.read_bytes() == DATA
    assert len(server.requests) == 21


@pytest.mark.parametrize("size", [len(DATA), None])
def test_a_server_without_range_starts_anew(server, target, size):
    server.knows_range, server.cuts = False, [100_000]
    get(target, size=size)
    assert target.read_bytes() == DATA
    assert len(server.requests) == 2


@pytest.mark.parametrize("knows_range", [False, True])
def test_gives_up_where_it_gets_no_further(server, target, knows_range):
    server.knows_range, server.cuts = knows_range, [100_000] + [0 if knows_range else 100_000] * 50
    message = error_of(target)
    assert f"cut after 100000 of {len(DATA)} bytes" in message
    assert 2 <= len(server.requests) <= 10
    assert partial_of(target).read_bytes() == DATA[:100_000]


def test_a_server_that_does_not_say_how_long_the_file_is(server, target):
    server.says_length, told = False, Listener()
    get(target, size=None, reporter=told)
    assert target.read_bytes() == DATA
    assert told.advanced[-1] == ("one.bin", len(DATA), None)


def test_a_cut_is_noticed_by_the_size_where_the_server_does_not_say(server, target):
    server.says_length, server.cuts = False, [1000]
    get(target)
    assert target.read_bytes() == DATA
    assert server.requests[-1][1] == "bytes=1000-"


@pytest.mark.parametrize("size", [len(DATA), None])
def test_a_partial_that_is_too_long_is_dropped(server, target, size):
    target.parent.mkdir()
    partial_of(target).write_bytes(DATA + b"more")
    get(target, size=size)
    assert target.read_bytes() == DATA


def test_a_complete_partial_needs_no_request(server, target):
    target.parent.mkdir()
    partial_of(target).write_bytes(DATA)
    get(target)
    assert target.read_bytes() == DATA
    assert server.requests == []


def test_busy_servers_are_asked_again(server, target):
    server.codes = [503, 429]
    get(target)
    assert target.read_bytes() == DATA


def test_a_stalled_transfer_is_taken_up_again(server, target):
    server.stall = 1.5
    get(target, timeout=0.3)
    assert target.read_bytes() == DATA
    assert server.requests[-1][1] == f"bytes={len(DATA) // 2}-"


@pytest.mark.parametrize("wrong", [bytes(len(DATA)), DATA[:-1] + bytes([DATA[-1] ^ 1])])
def test_wrong_content_is_refused(server, target, wrong):
    server.files["/files.example/books/one.bin"] = wrong
    message = error_of(target)
    assert "refused" in message
    assert URL in message
    assert not partial_of(target).exists()


def test_a_wrong_size_is_refused_before_anything_is_fetched(server, target):
    server.files["/files.example/books/one.bin"] = (
        b"<html>Please log in to the hotel network</html>"
    )
    target.parent.mkdir()
    partial_of(target).write_bytes(DATA[:1000])
    server.knows_range = False
    assert f"where {len(DATA)} are right" in error_of(target)
    assert partial_of(target).read_bytes() == DATA[:1000]


def test_a_file_brought_by_hand_must_have_the_right_size(server, target):
    target.parent.mkdir()
    target.write_bytes(DATA[:1000])
    with pytest.raises(UserError, match="has 1000 bytes where 300000 are right"):
        get(target)
    target.write_bytes(DATA)
    assert get(target) == target
    assert server.requests == []


def test_ranges_that_begin_elsewhere_are_refused(server, target):
    server.cuts, server.shift = [1000], 7
    assert "began at" in error_of(target)


# ---- no way to get it ------------------------------------------------------------------------


def test_missing_files_say_what_to_do(server, target):
    server.files.clear()
    message = error_of(target)
    assert all(part in message for part in (URL, "404", f"by hand to {target}", "another source"))
    assert len(server.requests) == 1


def test_no_network(target, monkeypatch):
    with socket.socket() as closed:  # bound, but nobody listens
        closed.bind(("127.0.0.1", 0))
        monkeypatch.setenv("GLASSGPT_MIRROR", f"http://127.0.0.1:{closed.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        message = error_of(target)
    assert all(part in message for part in (URL, "refused", f"by hand to {target}"))


def test_no_answer(target, monkeypatch):
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        monkeypatch.setenv("GLASSGPT_MIRROR", f"http://127.0.0.1:{silent.getsockname()[1]}")
        monkeypatch.setenv("no_proxy", "127.0.0.1")
        assert "no answer in time" in error_of(target, timeout=0.2)


def test_an_unknown_host(target, monkeypatch):
    monkeypatch.setenv("GLASSGPT_MIRROR", "http://nowhere.invalid")  # never exists, by RFC 6761
    monkeypatch.setenv("no_proxy", "*")
    assert "by hand" in error_of(target)


def test_a_mirror_that_is_no_address(target, monkeypatch):
    monkeypatch.setenv("GLASSGPT_MIRROR", "mirror.example")
    assert "GLASSGPT_MIRROR='mirror.example'" in error_of(target)


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="this system has no /dev/full")
def test_a_full_disk(server, target):
    target.parent.mkdir()
    partial_of(target).symlink_to("/dev/full")
    assert "no space left" in error_of(target)
    assert partial_of(target).is_symlink()  # kept: the next call goes on with it


def test_a_file_where_the_folder_should_be(server, target):
    target.parent.write_text("in the way")
    with pytest.raises(UserError, match=re.escape(str(target))):
        get(target)


def test_two_processes_share_one_download(server, target):
    server.delay = 0.3
    call = (
        "from pathlib import Path; from glassgpt.system import download; "
        f"download({URL!r}, Path({str(target)!r}), sha256={sha256(DATA)!r}, size={len(DATA)})"
    )
    source = str(Path(system.__file__).parents[1])
    environment = {**os.environ, "PYTHONPATH": source}
    processes = [subprocess.Popen([sys.executable, "-c", call], env=environment) for _ in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    assert target.read_bytes() == DATA
    assert len(server.requests) == 1


def test_cache_folder(monkeypatch):
    monkeypatch.setenv("HOME", "/home/ada")
    monkeypatch.delenv("GLASSGPT_CACHE", raising=False)
    monkeypatch.delenv("XDG_CACHE_HOME", raising=False)
    assert cache_dir() == Path("/home/ada/.cache/glassgpt")
    monkeypatch.setenv("XDG_CACHE_HOME", "/big/cache")
    assert cache_dir() == Path("/big/cache/glassgpt")
    monkeypatch.setenv("GLASSGPT_CACHE", "~/here")
    assert cache_dir() == Path("/home/ada/here")


# ---- corpora ---------------------------------------------------------------------------------


def test_corpora_are_pinned():
    for corpus in CORPORA.values():
        assert corpus.description
        assert corpus.licence
        for file in corpus.files:
            assert re.fullmatch("[0-9a-f]{64}", file.sha256)
            assert file.url.startswith("https://")
            assert file.size > 0
            assert re.search("/[0-9a-f]{40}/", file.url) or "zenodo.org/record/" in file.url
    files = CORPORA["fineweb-edu"].files
    assert [file.name for file in files] == [f"{i:03}_00000.parquet" for i in range(14)]


def test_a_corpus_is_fetched_into_the_cache(server, monkeypatch):
    file = RemoteFile("https://host/a/b.txt", 5, sha256(b"hello"))
    monkeypatch.setitem(CORPORA, "tiny", Corpus("tiny", "a word", "none", (file,)))
    server.files["/host/a/b.txt"] = b"hello"
    told = Listener()
    (source,) = resolve(["tiny"], reporter=told)
    assert source.name == "tiny/b.txt"
    assert source.file == cache_dir() / "corpora" / "tiny" / "b.txt"
    assert [piece.text for piece in read_pieces([source])] == ["hello"]
    assert told.advanced == [("tiny", 5, 5)]
    resolve(["tiny"])
    assert len(server.requests) == 1


def test_a_corpus_that_changed_is_refused(server):
    path = CORPORA["shakespeare"].files[0].url.removeprefix("https:/")
    server.files[path] = b"x" * CORPORA["shakespeare"].files[0].size
    with pytest.raises(UserError, match="refused"):
        fetch_corpus("shakespeare")


def test_the_python_manual_needs_no_network(server):
    (source,) = resolve(["python-manual"])
    pieces = list(read_pieces([source]))
    assert [piece.starts_document for piece in pieces] == [True]
    text = pieces[0].text
    assert len(text) > 300_000
    assert text.index('The "assert" statement') < text.index('The "yield" statement')
    before = os.stat(source.file).st_mtime_ns  # type: ignore[arg-type]
    assert resolve(["python-manual"]) == [source]
    assert os.stat(source.file).st_mtime_ns == before  # type: ignore[arg-type]
    assert server.requests == []
    assert len(os.listdir(cache_dir() / "corpora" / "python-manual")) == 1


REPOSITORY, REVISION = "datasets/ada/rows", "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture
def hub(server, monkeypatch):
    """The server plays the Hub, with one Parquet file; `add(data)` exchanges it."""
    import huggingface_hub
    import huggingface_hub.utils._http as http

    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(http.time, "sleep", lambda seconds: None)
    huggingface_hub.close_session()
    place = f"/huggingface.co/{REPOSITORY}/resolve/{REVISION}/sample/rows.parquet"
    api = f"/huggingface.co/api/{REPOSITORY}"
    about = {"id": "ada/rows", "sha": REVISION, "siblings": []}
    server.files[f"{api}/revision/{REVISION}"] = json.dumps(about).encode()

    def add(data: bytes) -> RemoteFile:
        entry = {"type": "file", "path": "sample/rows.parquet", "size": len(data), "oid": "0" * 40}
        server.files[f"{api}/tree/{REVISION}/sample"] = json.dumps([entry]).encode()
        server.files[place] = data
        file = RemoteFile(place.replace("/", "https://", 1), len(data), sha256(data))
        corpus = Corpus("wide", "rows", "none", (file,), streamed=True)
        monkeypatch.setitem(CORPORA, "wide", corpus)
        return file

    server.add, server.place = add, place
    yield server
    huggingface_hub.close_session()


def parquet_of(rows: list[str]) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    table = pyarrow.table({"text": rows, "unread": [row[::-1] for row in rows]})
    pyarrow.parquet.write_table(table, file, row_group_size=100)
    return file.getvalue()


@pytest.mark.slow
def test_a_streamed_corpus_is_read_as_far_as_needed(hub):
    chance = random.Random(2)
    rows = [chance.randbytes(5000).hex() for _ in range(3000)]
    data = parquet_of(rows)
    remote = hub.add(data)

    sources = resolve(["wide"])
    assert hub.requests == []
    assert total_bytes(sources) == len(data)
    assert stamp_of(sources[0])["sha256"] == remote.sha256

    pieces = read_pieces(sources)
    assert [next(pieces).text for _ in range(50)] == rows[:50]
    del pieces
    assert hub.sent < len(data) / 2

    counts = []
    assert [piece.text for piece in read_pieces(sources, on_bytes=counts.append)] == rows
    assert sum(counts) == len(data)
    assert len(hub.requests) < 35  # each costs a round trip
    assert not cache_dir().exists()

    hub.add(data + b"!")
    with pytest.raises(UserError, match="are right"):
        list(read_pieces(sources))


def test_a_streamed_corpus_outlives_a_busy_server_and_cut_connections(hub):
    hub.add(parquet_of(["a text", "another"]))
    hub.codes, hub.cuts = [503], [1 << 20, 1 << 20, 10, 500]
    assert [piece.text for piece in read_pieces(resolve(["wide"]))] == ["a text", "another"]
    assert hub.cuts == []


@pytest.mark.parametrize(
    ("habit", "words"),
    [({"files": {}}, "404"), ({"cuts": [1 << 20, 1 << 20] + [10] * 99}, "cannot read")],
)
def test_a_streamed_corpus_says_what_is_wrong(hub, habit, words):
    hub.add(parquet_of(["a text"]))
    vars(hub).update(habit)
    with pytest.raises(UserError, match=words) as caught:
        list(read_pieces(resolve(["wide"])))
    assert "https://huggingface.co/datasets/ada/rows/" in str(caught.value)
    assert "another source" in str(caught.value)
    assert len(hub.requests) < 12
