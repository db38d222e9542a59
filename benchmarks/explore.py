"""How long the explorer takes to answer a full prompt, beside what `transformers` needs to read it.

    python benchmarks/explore.py --rounds 5

GPT-2's sizes (124M, random weights), 1,024 tokens: a real server on loopback is asked for a trace
and for the maps of all heads, each time another prompt; in turn with it, `transformers` computes
the same prompt's logits, and once more with the attention patterns of all heads. Also counts
the bytes that are sent before a head is opened. Result: results/explore.json.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np
import torch

from glassgpt.checkpoints.run_directory import Checkpoint, save_model
from glassgpt.config import ModelConfig
from glassgpt.model import GPT
from glassgpt.tokenizers.vocabulary import build_tokenizer

RESULTS = Path(__file__).parent / "results" / "explore.json"
PORT, TOKENS = 8397, 1024


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        run = random_gpt2(Path(folder) / "gpt2")
        command = [sys.executable, "-m", "glassgpt", "explore", str(run), "--port", str(PORT),
                   "--no-browser"]  # fmt: skip
        server = subprocess.Popen(command, stderr=subprocess.DEVNULL)
        try:
            result = measure(run, options.rounds)
        finally:
            server.terminate()
            server.wait()
    print(json.dumps(result, indent=1))
    RESULTS.write_text(json.dumps(result, indent=1) + "\n")


def random_gpt2(run: Path) -> Path:
    config = ModelConfig.from_shape("gpt2", vocab_size=50257, context_length=TOKENS, n_layer=12,
                                    n_head=12, n_embd=768)  # fmt: skip
    model = GPT(config).state_dict()
    weights = {name: model[name].numpy() for name in config.weight_shapes}
    save_model(run, Checkpoint(config, weights, build_tokenizer("gpt2", lambda: iter(()))))
    return run


def ask(path: str, body: Any = None) -> bytes:
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(f"http://127.0.0.1:{PORT}{path}", data,
                                     {"Content-Type": "application/json"})  # fmt: skip
    return urllib.request.urlopen(request, timeout=600).read()


def measure(run: Path, rounds: int) -> dict[str, Any]:
    from transformers import AutoModelForCausalLM

    theirs = AutoModelForCausalLM.from_pretrained(run, attn_implementation="eager").eval()
    sent = len(_when_up("/api/model"))
    seconds: dict[str, list[float]] = {"explorer": [], "logits": [], "logits and patterns": []}
    draw = np.random.default_rng(0)
    for number in range(rounds + 1):  # the first one warms up
        ids = draw.integers(50257, size=TOKENS).tolist()
        started = time.perf_counter()
        trace = ask("/api/trace", {"tokens": ids, "model": "a", "off": [], "fill": "zero"})
        maps = ask(f"/api/trace/{json.loads(trace)['trace']}/maps")
        took = {"explorer": time.perf_counter() - started}
        for name, patterns in (("logits", False), ("logits and patterns", True)):
            started = time.perf_counter()
            with torch.inference_mode():
                theirs(torch.tensor([ids]), output_attentions=patterns)
            took[name] = time.perf_counter() - started
        if number:
            for name, value in took.items():
                seconds[name].append(value)
    sent += len(trace) + len(maps)
    ratios = {name: round(statistics.median(
        mine / other for mine, other in zip(seconds["explorer"], seconds[name], strict=True)), 3)
        for name in ("logits", "logits and patterns")}  # fmt: skip
    return {"date": date.today().isoformat(), "torch": torch.__version__, "tokens": TOKENS,
            "bytes_sent": sent, "explorer_over_transformers": ratios,
            "seconds": {name: round(statistics.median(s), 2) for name, s in seconds.items()},
            }  # fmt: skip


def _when_up(path: str) -> bytes:
    for _ in range(300):
        try:
            return ask(path)
        except OSError:
            time.sleep(0.5)
    raise SystemExit("the server did not start")


if __name__ == "__main__":
    main()
