"""Generation on an NVIDIA GPU against `transformers`: GPT-2 (124M), bfloat16, random weights.

    python benchmarks/decode_gpu.py

For 1 and for 64 texts at once: a prompt of 32 tokens, then the likeliest 128 one by one, by our
engine and by `generate` with its static cache, which it compiles by itself. Every way generates
three times to warm up, then all take turns, `--rounds` times; the medians count. A time has the
prompt in it and ends when the tokens are on the host. Prints tokens/s and ratios and writes
benchmarks/results/decode_gpu.json; without a GPU it writes nothing and exits with status 2.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path

import numpy as np
import torch
import transformers

from glassgpt.config import ModelConfig
from glassgpt.inference.engines.gpu import GpuEngine
from glassgpt.model import GPT

RESULTS = Path(__file__).parent / "results" / "decode_gpu.json"
GPT2 = dict(vocab_size=50257, context_length=1024, n_layer=12, n_head=12, n_embd=768)
PROMPT, NEW = 32, 128
Generate = Callable[[np.ndarray], np.ndarray]  # (B, PROMPT) -> (B, NEW)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if not torch.cuda.is_available():
        print("decode_gpu.py: torch finds no CUDA GPU here; nothing was measured", file=sys.stderr)
        sys.exit(2)
    result = {
        "date": date.today().isoformat(),
        "machine": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "model": "GPT-2 124M, bfloat16, random weights",
        "prompt_tokens": PROMPT,
        "new_tokens": NEW,
        "batches": {},
    }
    for B in (1, 64):
        result["batches"][B] = measure(B, ways(GPT2, "cuda", torch.bfloat16), options.rounds)
        print(f"batch {B}: {json.dumps(result['batches'][B])}", flush=True)
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def ways(sizes: dict[str, int], device: str, dtype: torch.dtype) -> dict[str, Generate]:
    """Who generates, by name; each with a model of these sizes."""
    config = ModelConfig.from_shape("gpt2", **sizes)
    model = GPT(config).to(device, dtype).eval()
    theirs = transformers.GPT2LMHeadModel(
        transformers.GPT2Config(
            vocab_size=config.vocab_size, n_positions=config.context_length,
            n_layer=config.n_layer, n_head=config.n_head, n_embd=config.n_embd,
        )
    ).to(device, dtype).eval()  # fmt: skip
    return {
        "glassgpt": by_engine(GpuEngine(model, compile=True)),
        "glassgpt_not_compiled": by_engine(GpuEngine(model, compile=False)),
        "transformers": by_transformers(theirs),
    }


def by_engine(engine: GpuEngine) -> Generate:
    def generate(prompts: np.ndarray) -> np.ndarray:
        rows, chosen = range(len(prompts)), []
        engine.open(len(prompts))
        logits = engine.read(rows, list(prompts))  # (B, V)
        for _ in range(NEW - 1):
            chosen.append(logits.argmax(axis=1))
            logits = engine.read(rows, list(chosen[-1][:, None]))
        return np.stack([*chosen, logits.argmax(axis=1)], axis=1)

    return generate


def by_transformers(model: transformers.GPT2LMHeadModel) -> Generate:
    how = transformers.GenerationConfig(
        max_new_tokens=NEW, do_sample=False, cache_implementation="static",
        bos_token_id=None, eos_token_id=None, pad_token_id=0,
    )  # fmt: skip
    model.generation_config = how  # its own would end texts early

    def generate(prompts: np.ndarray) -> np.ndarray:
        tokens = torch.from_numpy(prompts).to(model.device)
        out = model.generate(tokens, attention_mask=torch.ones_like(tokens))
        return out[:, PROMPT:].cpu().numpy()

    return generate


def measure(B: int, generators: dict[str, Generate], rounds: int) -> dict[str, object]:
    """Tokens/s of each, ratios to transformers, and what the first text of all took."""
    prompts = np.random.default_rng(0).integers(256, size=(B, PROMPT))
    first = {name: timed(generate, prompts) for name, generate in generators.items()}
    for generate in generators.values():
        timed(generate, prompts)
        timed(generate, prompts)
    seconds: dict[str, list[float]] = {name: [] for name in generators}
    for _ in range(rounds):
        for name, generate in generators.items():
            seconds[name].append(timed(generate, prompts))
    speed = {name: B * NEW / statistics.median(times) for name, times in seconds.items()}
    return {
        "tokens_per_second": {name: round(value, 1) for name, value in speed.items()},
        "ratio": {name: round(value / speed["transformers"], 3) for name, value in speed.items()},
        "seconds_of_the_first": {name: round(value, 1) for name, value in first.items()},
        "seconds": {name: [round(t, 4) for t in times] for name, times in seconds.items()},
    }


def timed(generate: Generate, prompts: np.ndarray) -> float:
    started = time.perf_counter()
    tokens = generate(prompts)
    seconds = time.perf_counter() - started
    assert tokens.shape == (len(prompts), NEW)
    return seconds


if __name__ == "__main__":
    main()
