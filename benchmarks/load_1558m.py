"""Peak memory of reading OpenAI's largest GPT-2 release, as a multiple of its weights.

    python benchmarks/load_1558m.py                 # writes 6.2 GB to a temporary folder
    python benchmarks/load_1558m.py --size 124M     # 0.5 GB

Writes a release folder of that size with random weights. Then another process loads it into the
torch model, as every verb does, and prints its peak resident memory over the bytes of the weights.
For 1558M also writes benchmarks/results/load_1558m.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

import numpy as np

from glassgpt.checkpoints.openai import TensorBundle, from_openai, is_convolution, their_name
from glassgpt.config import ModelConfig
from glassgpt.model import GPT

RESULTS = Path(__file__).parent / "results" / "load_1558m.json"
SIZES = {"124M": (12, 12, 768), "355M": (24, 16, 1024), "774M": (36, 20, 1280),
         "1558M": (48, 25, 1600)}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--size", choices=SIZES, default="1558M")
    parser.add_argument("--folder", type=Path, help="where to write, instead of the temporary")
    parser.add_argument("--read", type=Path, help=argparse.SUPPRESS)  # the second process
    options = parser.parse_args()
    if options.read:
        print(json.dumps(read(options.read)))
        return
    with tempfile.TemporaryDirectory(dir=options.folder) as work:
        write(Path(work), options.size)
        command = [sys.executable, __file__, "--read", work]
        measured = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE).stdout)
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "size": options.size,
        **measured,
    }
    print(json.dumps(result, indent=2))
    if options.size == "1558M":
        RESULTS.parent.mkdir(exist_ok=True)
        RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def write(folder: Path, size: str) -> None:
    """A release folder without its vocabulary; never more than one tensor in memory."""
    sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
    from bundle_writer import write_bundle

    n_layer, n_head, n_embd = SIZES[size]
    hparams = dict(n_vocab=50257, n_ctx=1024, n_embd=n_embd, n_head=n_head, n_layer=n_layer)
    (folder / "hparams.json").write_text(json.dumps(hparams))
    config = ModelConfig.from_shape("gpt2", vocab_size=50257, context_length=1024,
                                    n_layer=n_layer, n_head=n_head, n_embd=n_embd)  # fmt: skip
    rng = np.random.default_rng(0)

    def tensors() -> Iterator[tuple[str, np.ndarray]]:
        for ours, shape in config.weight_shapes.items():
            theirs = their_name(ours)
            stored = (1, *reversed(shape)) if is_convolution(theirs) else shape
            yield theirs, rng.standard_normal(stored, dtype=np.float32)

    write_bundle(folder / "model.ckpt", tensors())


def read(folder: Path) -> dict[str, float]:
    """The model in memory; what that took."""
    hparams = json.loads((folder / "hparams.json").read_text())
    started = time.perf_counter()
    config, weights = from_openai(hparams, TensorBundle(folder / "model.ckpt"), str(folder))
    model = GPT.from_weights(config, weights)
    seconds = time.perf_counter() - started
    size = sum(parameter.numel() * 4 for parameter in model.parameters())
    # The kernel counts in KiB, macOS in bytes.
    unit = 1 if sys.platform == "darwin" else 1024
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    return {"bytes": size, "peak_bytes": peak, "ratio": round(peak / size, 3),
            "seconds": round(seconds, 1)}  # fmt: skip


if __name__ == "__main__":
    main()
