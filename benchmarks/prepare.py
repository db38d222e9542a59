"""`glassgpt prepare` on a large text: speed against tiktoken alone, and peak memory.

    python benchmarks/prepare.py --data shakespeare.txt --gigabytes 2

Writes a text of the size asked for (the lines of --data in random order), measures
`tiktoken.encode_ordinary_batch` on a sample of it with all cores, before and after, and the
whole `glassgpt prepare` process on all of it. Prints the ratio of throughputs and the peak
resident memory, and writes benchmarks/results/prepare.json.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import random
import resource
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

RESULTS = Path(__file__).parent / "results" / "prepare.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    parser.add_argument("--sample-megabytes", type=int, default=150)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "text.txt"
        write_text(options.data, text, int(options.gigabytes * 1e9))
        before = raw_throughput(text, options.sample_megabytes)
        seconds = prepare(text, Path(work) / "out")
        after = raw_throughput(text, options.sample_megabytes)
        size = text.stat().st_size
    peak = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss / 1024
    ours, raw = size / seconds / 1e6, (before + after) / 2
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "bytes": size,
        "glassgpt_mb_per_second": round(ours, 2),
        "tiktoken_mb_per_second": [round(before, 2), round(after, 2)],
        "ratio": round(ours / raw, 3),
        "peak_memory_mb": round(peak),
    }
    print(json.dumps(result, indent=2))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def write_text(source: Path, target: Path, size: int) -> None:
    lines = source.read_bytes().splitlines(keepends=True)
    shuffle = random.Random(0)
    with open(target, "wb") as file:
        while file.tell() < size:
            shuffle.shuffle(lines)
            file.writelines(lines)


def raw_throughput(text: Path, megabytes: int) -> float:
    """MB/s of encode_ordinary_batch alone, reading not counted; in a process of its own, so that
    its memory is not ours."""
    code = f"""
import os, time, tiktoken
from glassgpt.data.vocabulary import build_tokenizer
encoding = build_tokenizer("gpt2", lambda: iter(()))._encoding
cores, seconds, done = len(os.sched_getaffinity(0)), 0.0, 0
with open({str(text)!r}, encoding="utf-8") as file:
    while done < {megabytes}_000_000:
        pieces = [file.read(1 << 19) for _ in range(8 * cores)]
        started = time.perf_counter()
        encoding.encode_ordinary_batch(pieces, num_threads=cores)
        seconds += time.perf_counter() - started
        done += sum(map(len, pieces))
print(done / seconds / 1e6)
"""
    # Through a shell, so that its peak memory is a grandchild's that is not counted with ours.
    output = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    return float(output.stdout)


def prepare(text: Path, out: Path) -> float:
    command = [sys.executable, "-m", "glassgpt", "prepare", str(text), "--out", str(out),
               "--tokenizer", "gpt2"]  # fmt: skip
    started = time.monotonic()
    subprocess.run(command, check=True, capture_output=True)
    return time.monotonic() - started


if __name__ == "__main__":
    main()
