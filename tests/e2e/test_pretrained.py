"""Models by name: a real server on loopback with the hub's layout, and OpenAI's; bad input."""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.parse import urlparse

import numpy as np
import pytest

from conftest import tiny_config, tiny_model, weights_of
from glassgpt import numpy_gpt
from glassgpt.checkpoints.huggingface import to_huggingface
from glassgpt.checkpoints.load import load_pretrained
from glassgpt.checkpoints.run_directory import Checkpoint, save_model
from glassgpt.checkpoints.tensors import SafeTensors, write_tensors
from glassgpt.errors import UserError
from glassgpt.tokenizers.tokenizer import CharTokenizer

pytestmark = pytest.mark.slow

LETTERS = "abcdefghijklmnopqrstuvwxyz .,!?\n-:;'"
COMMIT = "0123456789abcdef0123456789abcdef01234567"
FIXTURE = Path(__file__).parents[1] / "unit" / "openai_fixture"


def glassgpt(*arguments: object, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "glassgpt", *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=120,
                          env={**os.environ, **env})  # fmt: skip


def sample(model: object, **env: str) -> subprocess.CompletedProcess:
    return glassgpt("sample", model, "--prompt", "the", "--temperature", 0, "--max-new-tokens", 5,
                    **env)  # fmt: skip


def refused(done: subprocess.CompletedProcess) -> str:
    said = [line for line in done.stderr.splitlines() if line.startswith("glassgpt: ")]
    assert done.returncode == 2, done.stderr
    assert len(said) == 1
    assert "Traceback" not in done.stderr
    return said[0]


def save_tiny(folder: Path, shape: str = "modern", **sizes: int) -> Path:
    config = tiny_config(shape, **sizes)
    tokenizer = CharTokenizer.from_characters(LETTERS)
    save_model(folder, Checkpoint(config, weights_of(tiny_model(config, seed=3)), tokenizer))
    (folder / "glassgpt.json").unlink()  # as others publish
    return folder


# -- the hub -------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """As much of the hub as a download needs. Large files are known by their SHA-256."""

    daemon_threads = True

    def __init__(self, repositories: dict[str, Path]) -> None:
        super().__init__(("127.0.0.1", 0), HubHandler)
        self.repositories = repositories
        self.cut_after: int | None = None  # bytes of the weights' first answer
        self.flip = False  # a bit of the weights on their way
        self.ranges: list[str | None] = []  # asked for, of the weights

    @property
    def env(self) -> dict[str, str]:
        return {"HF_ENDPOINT": f"http://127.0.0.1:{self.server_port}", "HF_HUB_OFFLINE": "0",
                "no_proxy": "127.0.0.1", "HF_HUB_ETAG_TIMEOUT": "5"}  # fmt: skip


class HubHandler(BaseHTTPRequestHandler):
    server: Hub
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        path = urlparse(self.path).path
        for name, folder in self.server.repositories.items():
            if match := re.fullmatch(f"/api/models/{name}(/revision/.*|/tree/.*)?", path):
                tree = (match[1] or "").startswith("/tree")
                return self.send(json.dumps(self.listing(name, folder, tree)).encode(), body)
            if match := re.fullmatch(f"/{name}/resolve/[^/]+/(.+)", path):
                file = folder / match[1]
                if file.exists():
                    return self.send_file(file, body)
        self.send_response(404)
        self.send_header("X-Error-Code", "RepoNotFound")
        self.send_header("Content-Length", "0")
        self.end_headers()

    def listing(self, name: str, folder: Path, tree: bool) -> object:
        files = sorted(path for path in folder.iterdir() if path.is_file())
        if not tree:
            return {"id": name, "modelId": name, "sha": COMMIT, "private": False, "tags": [],
                    "downloads": 0, "siblings": [{"rfilename": f.name} for f in files]}  # fmt: skip
        entries = []
        for file in files:
            etag, size = etag_of(file), file.stat().st_size
            entry = {"type": "file", "path": file.name, "size": size, "oid": etag[:40]}
            if file.suffix == ".safetensors":
                entry["lfs"] = {"oid": etag, "size": size, "pointerSize": 130}
            entries.append(entry)
        return entries

    def send_file(self, file: Path, body: bool) -> None:
        data, start = file.read_bytes(), 0
        wanted = self.headers.get("Range")
        if match := re.match(r"bytes=(\d+)-", wanted or ""):
            start = int(match[1])
        large = file.suffix == ".safetensors"
        self.send_response(206 if match else 200)
        if match:
            self.send_header("Content-Range", f"bytes {start}-{len(data) - 1}/{len(data)}")
        self.send_header("ETag", f'"{etag_of(file)}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Accept-Ranges", "bytes")
        self.send_header("Content-Length", str(len(data) - start))
        self.end_headers()
        if not body:
            return
        if large:
            self.server.ranges.append(wanted)
            if self.server.flip:
                data = data[:-9] + bytes([data[-9] ^ 1]) + data[-8:]
            if self.server.cut_after is not None:
                data, self.server.cut_after = data[: start + self.server.cut_after], None
                self.close_connection = True
        self.wfile.write(data[start:])

    def send(self, content: bytes, body: bool) -> None:
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, format: str, *args: object) -> None:
        pass


def etag_of(file: Path) -> str:
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    return digest if file.suffix == ".safetensors" else digest[:40]


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[Hub]:
    repository = save_tiny(tmp_path / "published")
    with Hub({"someone/tiny": repository, "gpt2": save_tiny(tmp_path / "gpt2", "gpt2")}) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield server
        server.shutdown()
        thread.join()


def test_a_published_model_by_its_name(hub, tmp_path):
    local = sample(tmp_path / "published")
    assert local.returncode == 0, local.stderr
    home = {"HF_HOME": str(tmp_path / "home")}
    first = sample("someone/tiny", **hub.env, **home)
    assert first.returncode == 0, first.stderr
    assert first.stdout == local.stdout
    # Now it is there: also without a network, and without asking one.
    offline = sample("someone/tiny", **home, HF_HUB_OFFLINE="1")
    assert offline.stdout == local.stdout
    asked = len(hub.ranges)
    assert sample("someone/tiny", **hub.env, **home).stdout == local.stdout
    assert len(hub.ranges) == asked == 1
    stored = tmp_path / "home/hub/models--someone--tiny/snapshots" / COMMIT / "model.safetensors"
    assert (
        SafeTensors([stored]).keys() == SafeTensors([tmp_path / "published" / stored.name]).keys()
    )


def test_gpt2_by_its_short_name_as_a_beginning(hub, tmp_path):
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 60)
    done = glassgpt(
        "train", text, "--from", "gpt2", "--out", tmp_path / "run", "--batch-tokens", 30,
        "--context-length", 10, "--max-steps", 2, "--eval-interval", 2, "--sample-tokens", 0,
        "--threads", 1, **hub.env, HF_HOME=str(tmp_path / "home"),
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    about = json.loads((tmp_path / "run/glassgpt.json").read_text())
    assert about["model"]["context_length"] == 10
    assert about["options"]["init_from"] == "gpt2"
    assert about["train"]["learning_rate"] == pytest.approx(2e-4)
    assert (tmp_path / "run/tokenizer.json").exists()


def test_a_download_that_is_cut_goes_on(hub, tmp_path):
    hub.repositories["someone/large"] = save_tiny(tmp_path / "large", vocab_size=400_000)
    hub.cut_after = 15_000_000  # of 29 MB; the library keeps blocks of 10
    done = sample("someone/large", **hub.env, HF_HOME=str(tmp_path / "home"))
    assert done.returncode == 0, done.stderr
    assert hub.ranges == [None, "bytes=10485760-"]


def test_wrong_content_is_refused(hub, tmp_path):
    hub.flip = True
    home = {"HF_HOME": str(tmp_path / "home")}
    assert "SHA-256" in refused(sample("someone/tiny", **hub.env, **home))
    hub.flip = False  # nothing of it was kept
    assert sample("someone/tiny", **hub.env, **home).returncode == 0


def test_names_that_lead_nowhere(hub, tmp_path):
    home = {"HF_HOME": str(tmp_path / "home")}
    assert "'someone/nothing'" in refused(sample("someone/nothing", **hub.env, **home))
    line = refused(sample("someone/tiny", HF_HUB_OFFLINE="1", **home))
    assert "'someone/tiny' is no folder here" in line
    (tmp_path / "runs").mkdir()
    line = refused(subprocess.run(
        [sys.executable, "-m", "glassgpt", "sample", "runs/bok"], cwd=tmp_path,
        capture_output=True, text=True, timeout=60))  # fmt: skip
    assert "runs/bok does not exist" in line


# -- OpenAI's release ----------------------------------------------------------------------------


def test_openais_release_is_fetched_once(tmp_path):
    from functools import partial
    from http.server import SimpleHTTPRequestHandler

    served = tmp_path / "www/openaipublic.blob.core.windows.net/gpt-2/models/124M"
    shutil.copytree(FIXTURE, served)
    (served / "model.ckpt.meta").write_bytes(b"unused")
    handler = partial(SimpleHTTPRequestHandler, directory=tmp_path / "www")
    with ThreadingHTTPServer(("127.0.0.1", 0), handler) as server:
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        env = {"GLASSGPT_MIRROR": f"http://127.0.0.1:{server.server_port}",
               "GLASSGPT_CACHE": str(tmp_path / "cache"), "no_proxy": "127.0.0.1"}  # fmt: skip
        done = sample("openai:124M", **env)
        server.shutdown()
    # The fixture is no real vocabulary, so its checksum is refused: by name, before any use.
    assert "encoder.json" in refused(done)
    for name in ("encoder.json", "vocab.bpe"):
        shutil.copy(FIXTURE / name, tmp_path / "cache/openai/124M" / name)
    for name in ("checkpoint", "hparams.json", "model.ckpt.index", "model.ckpt.meta",
                 "model.ckpt.data-00000-of-00001"):  # fmt: skip
        shutil.copy(served / name, tmp_path / "cache/openai/124M" / name)
    offline = {**env, "GLASSGPT_MIRROR": "http://127.0.0.1:9"}
    assert sample("openai:124M", **offline).stdout == sample(FIXTURE).stdout
    assert "124M" in refused(sample("openai:125M", **offline))
    assert "cannot fetch" in refused(sample("openai:355M", **offline))


# -- bad input -----------------------------------------------------------------------------------


def test_bad_folders(tmp_path):
    def changed(name: str, change) -> str:
        folder = tmp_path / name.replace(" ", "-")
        save_tiny(folder)
        change(folder)
        return refused(sample(folder))

    def config(folder: Path, **values: object) -> None:
        path = folder / "config.json"
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    weights = "model.safetensors"
    assert "holds no model" in changed("no weights", lambda f: (f / weights).unlink())
    assert "tokenizer.json" in changed("no tokenizer", lambda f: (f / "tokenizer.json").unlink())
    assert "truncated or damaged" in changed(
        "cut", lambda f: (f / weights).write_bytes((f / weights).read_bytes()[:-100])
    )
    assert "'mamba'" in changed("architecture", lambda f: config(f, model_type="mamba"))
    assert "the model only 20" in changed("small", smaller_vocabulary)

    def pickled(folder: Path) -> None:
        (folder / weights).rename(folder / "pytorch_model.bin")

    assert "pickles" in changed("pickled", pickled)

    def shards(folder: Path) -> None:
        (folder / weights).rename(folder / "model-00001-of-00002.safetensors")
        names = {"model.norm.weight": "model-00002-of-00002.safetensors"}
        (folder / f"{weights}.index.json").write_text(json.dumps({"weight_map": names}))

    assert "model-00002-of-00002.safetensors is missing" in changed("shards", shards)


def smaller_vocabulary(folder: Path) -> None:
    config = tiny_config("modern", vocab_size=20)
    values, tensors = to_huggingface(config, weights_of(tiny_model(config)))
    (folder / "config.json").write_text(json.dumps(values))
    write_tensors(folder / "model.safetensors", tensors)


@pytest.mark.parametrize("change", [
    {"n_layer": 10**9}, {"n_layer": 1.5}, {"n_head": True}, {"n_head": 0}, {"n_positions": "x"},
    {"quantization_config": {"bits": 4}}, {"vocab_size": None}, {"n_embd": -3},
], ids=str)  # fmt: skip
def test_settings_that_make_no_sense(tmp_path, change):
    folder = save_tiny(tmp_path / "tiny", "gpt2")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError):
        load_pretrained(folder)


@pytest.mark.parametrize("change", [
    {"rope_parameters": "x"}, {"rope_parameters": [1]}, {"rope_parameters": {"rope_theta": "x"}},
    {"rope_parameters": {"rope_type": "linear", "factor": "x"}},
    {"rope_parameters": {"rope_type": "linear", "factor": 0}},
    {"rope_parameters": {"rope_type": "yarn", "factor": 2}},
    {"max_position_embeddings": 1.5}, {"num_attention_heads": 0}, {"attention_bias": True},
], ids=str)  # fmt: skip
def test_modern_settings_that_make_no_sense(tmp_path, change):
    folder = save_tiny(tmp_path / "tiny")
    path = folder / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(UserError):
        load_pretrained(folder)


@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
@pytest.mark.parametrize("content", ["[" * 200_000, "{}", '{"weight_map": {"a": null, "b": "x"}}',
                                     '{"weight_map": {"a": ["x"]}}', "null", "3"])  # fmt: skip
def test_json_that_is_something_else(tmp_path, name, content):
    folder = save_tiny(tmp_path / "tiny")
    if name.endswith("index.json"):
        (folder / "model.safetensors").unlink()
    (folder / name).write_text(content)
    with pytest.raises(UserError):
        load_pretrained(folder)


def test_a_tied_head_that_differs_is_refused(tmp_path):
    folder = save_tiny(tmp_path / "tiny")
    path = folder / "model.safetensors"
    tensors = {name: np.array(tensor) for name, tensor in SafeTensors([path]).items()}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].copy()
    write_tensors(path, tensors)
    load_pretrained(folder)  # a copy does no harm
    tensors["lm_head.weight"][3, 2] += 1
    write_tensors(path, tensors)
    with pytest.raises(UserError, match="lm_head.weight is not model.embed_tokens.weight"):
        load_pretrained(folder)


def test_only_gpt2s_own_vocabulary_comes_without_a_tokenizer_json(tmp_path):
    folder = save_tiny(tmp_path / "tiny", "gpt2", vocab_size=261)
    (folder / "tokenizer.json").unlink()
    shutil.copy(FIXTURE / "encoder.json", folder / "vocab.json")
    shutil.copy(FIXTURE / "vocab.bpe", folder / "merges.txt")
    assert load_pretrained(folder).tokenizer.end_of_text == 260
    vocab = json.loads((folder / "vocab.json").read_text())
    first = next(token for token, i in vocab.items() if i == 0)
    swapped = vocab | {first: 260, "<|endoftext|>": 0}  # as SmolLM2 has it
    for wrong in (swapped, {k: v for k, v in vocab.items() if k != "<|endoftext|>"}, [], {}):
        (folder / "vocab.json").write_text(json.dumps(wrong))
        with pytest.raises(UserError, match="tokenizer.json"):
            load_pretrained(folder)


def test_ids_beyond_the_tokenizer_are_never_chosen_by_numpy(tmp_path):
    """Published vocabularies are padded, and the padding's logits can be the largest."""
    config = tiny_config(vocab_size=60, tie_embeddings=False)
    weights = weights_of(tiny_model(config))
    weights["head.weight"][40:] *= 50
    ids = numpy_gpt.generate([1, 2], weights, config, 8, vocab_size=37)
    assert max(ids) < 37
    assert max(numpy_gpt.generate([1, 2], weights, config, 8)) >= 37
    with pytest.raises(UserError):
        numpy_gpt.generate([1], weights, config, -3)


def test_a_resumed_run_has_its_bases_tokenizer_without_the_cache(tmp_path):
    base = save_tiny(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 60)
    cache = {"GLASSGPT_CACHE": str(tmp_path / "cache")}
    small = ["--batch-tokens", 26, "--sample-tokens", 0, "--threads", 1]
    done = glassgpt("train", text, "--from", base, "--out", tmp_path / "run", "--max-steps", 2,
                    *small, **cache)  # fmt: skip
    assert done.returncode == 0, done.stderr
    shutil.rmtree(tmp_path / "cache")
    done = glassgpt("train", "--resume", tmp_path / "run", "--max-steps", 4, **cache)
    assert done.returncode == 0, done.stderr


def test_a_gguf_is_not_read(tmp_path):
    file = tmp_path / "model.gguf"
    file.write_bytes(b"GGUF" + bytes(100))
    assert "GGUF, which GlassGPT writes but does not read" in refused(sample(file))
    assert "does not read" in refused(sample(tmp_path))


def test_what_a_beginning_decides(tmp_path):
    base = save_tiny(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 60)

    def train(*options: object) -> str:
        return refused(glassgpt("train", text, "--from", base, "--out", tmp_path / "run", *options))

    assert "n_layer can't be chosen with --from" in train("--n-layer", 3)
    assert "tokenizer can't be chosen" in train("--tokenizer", "byte")
    assert "longer than the 13 positions" in train("--context-length", 14)
    assert not (tmp_path / "run").exists()
    done = glassgpt("prepare", text, "--out", tmp_path / "data")
    assert done.returncode == 0
    done = glassgpt("train", tmp_path / "data", "--from", base, "--out", tmp_path / "run")
    assert "another tokenizer" in refused(done)


def test_the_first_loss_is_the_base_models(tmp_path):
    """Beginning with weights is beginning with these weights, and training moves them."""
    base = save_tiny(tmp_path / "base")
    text = tmp_path / "text.txt"
    text.write_text("the cat sat on the mat. " * 60)
    losses = []
    for name, start in (("a", base), ("b", tmp_path / "a")):
        done = glassgpt(
            "train", text, "--from", start, "--out", tmp_path / name, "--batch-tokens", 26,
            "--max-steps", 30, "--eval-interval", 30, "--sample-tokens", 0, "--threads", 1,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr
        rows = (tmp_path / name / "metrics.jsonl").read_text().splitlines()
        losses.append([row["val_loss"] for row in map(json.loads, rows) if row.get("val_loss")])
    (first, last), (second_first, _) = losses
    assert last < first - 0.03
    assert second_first == pytest.approx(last, abs=1e-5)
    assert np.isfinite(second_first)
