"""The memory that a training takes against what costs.py expects, on this CPU, whole processes.

    python benchmarks/memory.py

Every case trains three steps on random tokens in a process of its own, evaluating and saving before
and after, as any training does. Its peak resident size is compared with the size before a model was
made (Python, torch and GlassGPT imported) plus the estimate. Prints a table and writes
benchmarks/results/memory.json.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import pickle
import platform
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from glassgpt.config import ModelConfig
from glassgpt.options import split_options
from glassgpt.reporting.terminal import aligned

RESULTS = Path(__file__).parent / "results" / "memory.json"
CASES: dict[str, dict[str, Any]] = {
    "modern, 1 M": dict(vocab_size=65),
    "modern, 11 M": dict(vocab_size=2048, n_layer=6, n_head=6, n_embd=384, context_length=256),
    "modern, 51 M": dict(
        vocab_size=50257, n_layer=8, n_head=8, n_embd=512, context_length=256, batch_tokens=2048,
        micro_batch_size=4,
    ),
    "gpt2, 11 M": dict(
        vocab_size=2048, shape="gpt2", n_layer=6, n_head=6, n_embd=384, context_length=256,
    ),
    "gpt2, 11 M, dropout": dict(
        vocab_size=65, shape="gpt2", n_layer=6, n_head=6, n_embd=384, context_length=256,
        dropout=0.2, optimizer="adamw",
    ),
    "gpt2, 124 M": dict(
        vocab_size=50257, shape="gpt2", n_layer=12, n_head=12, n_embd=768, context_length=128,
        batch_tokens=1024, micro_batch_size=4, optimizer="adamw",
    ),
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--case", help="measure this one here (JSON of its options), print JSON")
    options = parser.parse_args()
    if options.case:
        print(json.dumps(measured_here(json.loads(options.case))))
        return
    results = {}
    for name, case in CASES.items():
        results[name] = compared({**case, "threads": options.threads})
        print(f"{name}: {results[name]['ratio']:.3f} of the measured peak", flush=True)
    report(results)


def compared(case: dict[str, Any]) -> dict[str, Any]:
    """Measured and estimated peak of one case, in MB."""
    from glassgpt import runtime
    from glassgpt.training.planning.costs import memory
    from glassgpt.training.step import StepPlan

    found = measured(case)
    model, train = configs(case)
    how = StepPlan.decide(model, train, runtime.start(dataclasses.replace(train, device="cpu")))
    expected = memory(model, train, how)
    total = found["baseline"] + expected.total
    return {
        "options": case,
        "parameters": model.n_parameters,
        "way": f"{'fused' if how.fused else 'autograd'}, {how.workers} workers",
        "baseline": round(found["baseline"] / 1e6),
        "measured": round(found["peak"] / 1e6),
        "estimated": round(total / 1e6),
        "ratio": round(total / found["peak"], 3),
        "parts": in_megabytes(expected),
    }


def in_megabytes(need: Any) -> dict[str, int]:
    return {name: round(value / 1e6) for name, value in dataclasses.asdict(need).items()}


def configs(case: dict[str, Any]) -> tuple[ModelConfig, Any]:
    options, _, train = split_options(case)
    options.pop("vocab_size", None)
    shape = options.pop("shape")
    return ModelConfig.from_shape(shape, vocab_size=case["vocab_size"], **options), train


def measured(case: dict[str, Any]) -> dict[str, Any]:
    """In a process of its own: {"baseline": bytes, "peak": bytes}."""
    command = [sys.executable, __file__, "--case", json.dumps(case)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{case} failed:\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def measured_here(case: dict[str, Any]) -> dict[str, Any]:
    import torch

    from glassgpt.system import peak_memory
    from glassgpt.training.run import train

    torch.ones(8, 8).mm(torch.ones(8, 8))
    baseline = peak_memory()
    options = {name: value for name, value in case.items() if name != "vocab_size"}
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "data"
        write_data(data, case["vocab_size"], configs(case)[0].context_length)
        train(str(data), out=str(Path(work) / "run"), device="cpu", max_steps=3, eval_interval=3,
              sample_tokens=8, **options)  # fmt: skip
        peak = peak_memory()
    return {"baseline": baseline, "peak": peak}


def write_data(folder: Path, vocab_size: int, context_length: int) -> None:
    """Random tokens as nanoGPT keeps them, of an alphabet beyond the surrogates."""
    folder.mkdir()
    generator = np.random.default_rng(0)
    for name, windows in (("train", 200), ("val", 64)):
        tokens = generator.integers(vocab_size, size=windows * context_length)
        tokens.astype(np.uint16).tofile(folder / f"{name}.bin")
    alphabet = [chr(0x10000 + i) for i in range(vocab_size)]
    ids = {char: i for i, char in enumerate(alphabet)}
    meta = {"vocab_size": vocab_size, "itos": dict(enumerate(alphabet)), "stoi": ids}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def report(results: dict[str, dict[str, Any]]) -> None:
    import torch

    columns = ("way", "baseline", "measured", "estimated", "ratio")
    rows = [["MB", *columns]]
    rows += [[name, *(str(found[key]) for key in columns)] for name, found in results.items()]
    print(aligned(rows))
    about = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {platform.system()}",
        "torch": torch.__version__,
        "cases": results,
    }
    RESULTS.write_text(json.dumps(about, indent=2) + "\n")


if __name__ == "__main__":
    main()
