"""The explorer's server as a browser meets it: started by the verb, asked over loopback."""

from __future__ import annotations

import json
import re
import shutil
import signal
import socket
import subprocess
import sys
import urllib.error
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.browser import GOLDEN
from tests.conftest import refuse

import glassgpt
from glassgpt.interpret.lens import without
from glassgpt.interpret.trace import record

pytestmark = pytest.mark.slow

TEXT = "the cat sat on"


class Server:
    """A process that runs `glassgpt explore`, and questions to it."""

    def __init__(self, *arguments: object) -> None:
        command = [sys.executable, "-m", "glassgpt", "explore", *map(str, arguments), "--port", "0",
                   "--no-browser", "--device", "cpu"]  # fmt: skip
        self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                        text=True)  # fmt: skip
        assert self.process.stdout is not None
        found = re.match(r"(http://127\.0\.0\.1:\d+)/", self.process.stdout.readline())
        assert found, self.process.communicate()
        self.url = found[1]

    def raw(self, path: str, body: Any = None, **headers: str) -> tuple[int, Any, bytes]:
        data = None if body is None else json.dumps(body).encode()
        headers = {"Content-Type": "application/json", **headers}
        request = urllib.request.Request(self.url + path, data, headers)
        opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with opener.open(request, timeout=60) as response:
                return response.status, response.headers, response.read()
        except urllib.error.HTTPError as error:
            return error.code, error.headers, error.read()

    def ask(self, path: str, body: Any = None) -> Any:
        status, _, content = self.raw(path, body)
        assert status == 200, content
        return json.loads(content)

    def array(self, path: str, body: Any = None) -> np.ndarray:
        status, headers, content = self.raw(path, body)
        assert status == 200, content
        shape = [int(n) for n in headers["X-Shape"].split(",")]
        return np.frombuffer(content, "<f4").reshape(shape)

    def refused(self, path: str, body: Any = None) -> tuple[int, str]:
        status, _, content = self.raw(path, body)
        error = json.loads(content)["error"]
        assert "\n" not in error
        return status, error

    def stop(self) -> tuple[int, str]:
        self.process.send_signal(signal.SIGINT)
        _, said = self.process.communicate(timeout=30)
        return self.process.returncode, said


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Server]:
    run = tmp_path_factory.mktemp("runs") / "book"
    shutil.copytree(GOLDEN, run)
    shutil.copytree(GOLDEN, run / "snapshots" / "000010")
    row = {"step": 10, "tokens": 5, "seconds": 1.0, "train_loss": 2.5, "lr": 0.1, "grad_norm": 1}
    (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    running = Server(run, "--with", GOLDEN)
    yield running
    running.stop()


def trace(server: Server, **fields: Any) -> str:
    return server.ask("/api/trace", {"text": TEXT, **fields})["trace"]


def test_every_number_is_torchs(server: Server) -> None:
    loaded = glassgpt.load(GOLDEN, device="cpu")
    tokens = torch.tensor([loaded.encode_prompt(TEXT)])
    for off in ([], ["0.h2", "1.mlp"]):
        expected = record(loaded.model, tokens, edits=without(off, loaded.config), loss=True)
        answer = server.ask("/api/trace", {"text": TEXT, "off": off})
        key = answer["trace"]
        names = {one["name"]: one["shape"] for one in answer["activations"]}
        assert len(names) == len(expected.activations) + 1  # resid_pre of the second block
        for name, shape in names.items():
            value = expected.tensor(name)[0].numpy()
            assert shape == list(value.shape)
            heads = range(shape[0]) if len(shape) == 3 else [None]
            got = [server.array(f"/api/trace/{key}/tensor/{name}"
                                + ("" if head is None else f"?head={head}"))
                   for head in heads]  # fmt: skip
            np.testing.assert_allclose(np.stack(got) if len(shape) == 3 else got[0], value,
                                       atol=1e-4)  # fmt: skip
            index = [n // 2 for n in shape]
            cell = server.ask(f"/api/trace/{key}/cell/{name}?index={','.join(map(str, index))}")
            if name.endswith("masked_scores") and index[2] > index[1]:
                assert cell["value"] is None
                continue
            assert cell["value"] == pytest.approx(value[tuple(index)], abs=1e-4)
            assert cell["total"] == pytest.approx(cell["value"], abs=1e-4)
            shown = sum(term["value"] for term in cell["terms"]) + cell["rest"]["value"]
            assert shown == pytest.approx(cell["total"], abs=1e-9)
        best = answer["next"]["top"][0]
        assert best["logit"] == pytest.approx(expected["logits"][0, -1].max(), abs=1e-4)


def test_a_window_of_a_tensor(server: Server) -> None:
    key = trace(server)
    whole = server.array(f"/api/trace/{key}/tensor/blocks.1.mlp_up")
    part = server.array(f"/api/trace/{key}/tensor/blocks.1.mlp_up?rows=2:5&columns=7:9")
    np.testing.assert_array_equal(part, whole[2:5, 7:9])
    status, headers, maps = server.raw(f"/api/trace/{key}/maps")
    assert (status, headers["X-Shape"], len(maps)) == (200, "2,4,14,14", 2 * 4 * 14 * 14)
    pattern = server.array(f"/api/trace/{key}/tensor/blocks.1.pattern?head=3")
    drawn = np.frombuffer(maps, np.uint8).reshape(2, 4, 14, 14)[1, 3]
    assert np.abs(drawn - 255 * pattern).max() <= 0.501


def test_sampling_is_that_of_the_verb(server: Server) -> None:
    """Also when the context is full, in pieces, and after a branch."""
    loaded = glassgpt.load(GOLDEN, device="cpu")
    how = dict(seed=7, temperature=0.9, top_k=20, top_p=0.95, min_p=0.01, repetition_penalty=1.1)
    command = [sys.executable, "-m", "glassgpt", "sample", GOLDEN, "--prompt", TEXT,
               "--max-new-tokens", 70, "--completion-only", "--device", "cpu", "--engine", "torch",
               *(x for name, value in how.items()
                 for x in (f"--{name.replace('_', '-')}", value))]  # fmt: skip
    text = subprocess.run([*map(str, command)], capture_output=True, text=True, check=True).stdout
    prompt, new = loaded.encode_prompt(TEXT), []
    for n in (1, 30, 39):
        body = {"prompt": prompt, "new": new, "n": n, "max_new_tokens": 70, **how}
        answer = server.ask("/api/sample", body)
        again = server.ask("/api/sample", {**body, "new": new[:1], "n": 1})["tokens"]
        if new[1:]:
            assert again[0]["id"] == new[1]
        new += [token["id"] for token in answer["tokens"]]
    assert answer["finish"] == "length"
    assert loaded.tokenizer.decode(new) == text.removesuffix("\n")
    last = server.ask("/api/sample", {"prompt": prompt, "new": new, "n": 2})["tokens"][1]
    assert (last["computed"], last["cache_bytes"]) == (1, (last["reused"] + 1) * 320)


def test_the_filters_leave_what_sampling_draws_from(server: Server) -> None:
    from glassgpt.config import Sampling
    from glassgpt.inference.generate import filter_logits, probabilities

    key, how = trace(server), dict(temperature=0.7, top_k=9, top_p=0.9, min_p=0.02)
    answer = server.ask(f"/api/trace/{key}/distribution", {"position": 4, "show": 99, **how})
    logits = server.array(f"/api/trace/{key}/tensor/logits?rows=4:5")[0]
    expected = probabilities(filter_logits(logits, [], Sampling(**how)))
    assert [one["name"] for one in answer["stages"]] == [
        "all", "repetition_penalty", "temperature", "top_k", "top_p", "min_p"
    ]  # fmt: skip
    assert len(answer["tokens"]) == len(expected)
    for token in answer["tokens"]:
        assert token["final"] == pytest.approx(expected[token["id"]], abs=1e-9)
        assert (token["final"] == 0) == (token["cut_by"] is not None)
    kept = [one["kept"] for one in answer["stages"]]
    assert kept == sorted(kept, reverse=True)
    assert kept[3] == 9
    assert kept[-1] == (expected > 0).sum()


def test_conclusions_add_up(server: Server) -> None:
    key, without_mlp = trace(server), trace(server, off=["1.mlp"])
    found = server.ask(f"/api/trace/{key}/attribution?against=3")
    assert sum(part["value"] for part in found["parts"]) == pytest.approx(found["logit"], abs=1e-4)
    lens = server.ask(f"/api/trace/{key}/lens?from=3&k=2")
    next_token = server.ask("/api/trace", {"text": TEXT})["next"]["top"][0]
    assert lens["rows"][-1]["positions"][-1]["top"][0]["p"] == pytest.approx(next_token["p"])
    assert [len(row["positions"]) for row in lens["rows"]] == [11, 11, 11]
    loss = server.ask(f"/api/trace/{key}/loss")
    assert loss["loss"][0] is None
    assert loss["mean"] == pytest.approx(np.mean(loss["loss"][1:]))
    same = server.ask(f"/api/compare?a={key}&b={key}")
    assert same["next"]["kl"] == 0
    assert same["loss"]["a"] == same["loss"]["b"] == loss["loss"]
    assert server.ask(f"/api/compare?a={key}&b={without_mlp}")["next"]["kl"] > 0


def test_nothing_patched_changes_nothing(server: Server) -> None:
    tokens = [one["id"] for one in server.ask("/api/trace", {"text": TEXT})["tokens"]]
    plain, patch = trace(server), {"text": TEXT, "parts": ["0.h1", "1.mlp", "blocks.0.resid_mid"]}
    path = "/api/trace/{}/tensor/logits"
    np.testing.assert_allclose(server.array(path.format(trace(server, patch=patch))),
                               server.array(path.format(plain)), atol=1e-5)  # fmt: skip
    body = {"tokens": tokens, "other": tokens, "token": 3}
    assert np.abs(server.array("/api/patch_map", body)).max() < 1e-4
    other = server.array("/api/patch_map", {**body, "other": tokens[::-1]})
    assert other.shape == (2, len(tokens))
    assert np.abs(other).max() > 0.1


def test_the_model_and_its_training(server: Server) -> None:
    model = server.ask("/api/model")
    assert [one["key"] for one in model["models"]] == ["a", "b"]
    assert (model["family"], model["snapshots"], model["training"]) == ("qwen3", [10], True)
    names = {one["activation"] for one in model["operations"]} - {None}
    assert {"token_embedding", "blocks.0.pattern", "final", "logits", "loss"} <= names
    lines = model["source"]["text"].splitlines()
    first, end = next(o["lines"] for o in model["operations"] if o["name"] == "softmax")
    assert "softmax" in "".join(lines[first - 1 : end])
    assert server.ask("/api/training")["rows"] == [
        {"step": 10, "tokens": 5, "seconds": 1.0, "train_loss": 2.5, "val_loss": None, "lr": 0.1}
    ]
    assert trace(server, snapshot=10) != trace(server) == trace(server)
    assert server.ask("/api/token/4")["merges"] == []


@pytest.mark.parametrize(("path", "body", "status", "says"), [
    ("/api/trace", {"text": "a" * 49}, 400, "49 tokens"),
    ("/api/trace", {"tokens": [0, 99]}, 400, "outside the vocabulary"),
    ("/api/trace", {"text": 5}, 400, "text"),
    ("/api/trace", {"text": "a", "off": ["7"]}, 400, "no block 7"),
    ("/api/trace", {"text": "a", "model": "c"}, 404, "no model"),
    ("/api/trace", {"text": "a", "snapshot": 11}, 404, "no snapshot 11; it has 10"),
    ("/api/trace", {"text": "ab", "patch": {"text": "abc", "parts": ["0"]}}, 400, "as many"),
    ("/api/trace/KEY/tensor/blocks.5.q?head=0", None, 404, "no activation"),
    ("/api/trace/KEY/tensor/blocks.1.q", None, 404, "heads 0 to 3"),
    ("/api/trace/KEY/cell/final?index=0,99", None, 404, "no cell"),
    ("/api/trace/KEY/cell/final?index=x", None, 400, "index"),
    ("/api/trace/KEY/lens?k=-1", None, 400, "k=-1"),
    ("/api/sample", {"prompt": [1], "sample": -1}, 400, "sample=-1"),
    ("/api/sample", {"prompt": [1], "sample": 10**30}, 400, "must be 0 to"),
    ("/api/trace/KEY/attribution?token=99", None, 400, "outside the vocabulary"),
    ("/api/trace/KEY/distribution", {"top_p": 2}, 400, "top_p=2"),
    ("/api/trace/KEY/distribution", {"position": 77}, 404, "no position 77"),
    ("/api/trace/0000/maps", None, 410, "no longer held"),
    ("/api/sample", {"prompt": [99]}, 400, "outside the vocabulary"),
    ("/api/token/99", None, 404, "outside the vocabulary"),
    ("/api/nothing", None, 404, "no /api/nothing"),
])  # fmt: skip
def test_bad_questions(server: Server, path: str, body: Any, status: int, says: str) -> None:
    found = server.refused(path.replace("KEY", trace(server)), body)
    assert found[0] == status
    assert says in found[1]


def test_other_names_of_this_machine_are_refused(server: Server) -> None:
    """So that a web site can't point its own name here and read along."""
    assert server.raw("/api/model", Host="evil.example")[0] == 400
    _, headers, _ = server.raw("/api/model")
    assert headers["Content-Security-Policy"].startswith("default-src 'self';")


def test_a_run_that_is_deleted_meanwhile_and_ctrl_c(tmp_path: Path) -> None:
    run = tmp_path / "book"
    shutil.copytree(GOLDEN, run)
    server = Server(run)
    assert trace(server)
    shutil.rmtree(run)
    for path, body in (("/api/trace", {"text": "the"}), ("/api/training", None)):
        status, error = server.refused(path, body)
        assert (status, "is gone" in error, str(run) in error) == (400, True, True)
    assert server.stop() == (0, "")


def test_a_port_in_use(capsys: pytest.CaptureFixture[str]) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        line = refuse(capsys, "explore", GOLDEN, "--port", port, "--no-browser")
        assert f"127.0.0.1:{port}" in line
        assert "--port" in line
    assert "no/run" in refuse(capsys, "explore", "no/run", "--port", 0, "--no-browser")
