"""`glassgpt prepare` on a large text: speed against tiktoken alone, and peak memory.

    python benchmarks/prepare.py --data shakespeare.txt --gigabytes 2

Writes a text of the size asked for (the lines of --data in random order) and runs the whole
`glassgpt prepare` process on it. Every 15 seconds that process is paused while
`tiktoken.encode_ordinary_batch` encodes a sample with all cores: the two meet the same weather on
a shared machine. Prints the ratio of throughputs and the peak resident memory, and writes
benchmarks/results/prepare.json.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import random
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import psutil

RESULTS = Path(__file__).parent / "results" / "prepare.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, default=2.0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        text = Path(work) / "text.txt"
        write_text(options.data, text, int(options.gigabytes * 1e9))
        seconds, raw, peak = race(text, Path(work) / "out")
        size = text.stat().st_size
    ours = size / seconds / 1e6
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {len(os.sched_getaffinity(0))} cores",
        "bytes": size,
        "glassgpt_mb_per_second": round(ours, 2),
        "tiktoken_mb_per_second": [round(rate, 2) for rate in raw],
        "ratio": round(ours / statistics.median(raw), 3),
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


# Encodes 64 MB a request and answers with MB/s; reading the text is not counted.
RAW = """
import os, sys, time
from glassgpt.tokenizers.vocabulary import build_tokenizer
encoding = build_tokenizer("gpt2", lambda: iter(()))._encoding
cores = len(os.sched_getaffinity(0))
with open(sys.argv[1], encoding="utf-8") as file:
    for request in sys.stdin:
        pieces = [file.read(1 << 19) for _ in range(128)]
        started = time.perf_counter()
        encoding.encode_ordinary_batch(pieces, num_threads=cores)
        print(sum(map(len, pieces)) / (time.perf_counter() - started) / 1e6, flush=True)
"""


def race(text: Path, out: Path) -> tuple[float, list[float], float]:
    """(seconds of prepare without its pauses, MB/s of tiktoken in each pause, peak MB)."""
    peer = subprocess.Popen([sys.executable, "-c", RAW, str(text)], text=True,
                            stdin=subprocess.PIPE, stdout=subprocess.PIPE)  # fmt: skip
    assert peer.stdin is not None
    assert peer.stdout is not None

    def ask() -> float:
        peer.stdin.write("go\n")
        peer.stdin.flush()
        return float(peer.stdout.readline())

    ask()  # warms up
    raw, paused, peak = [ask()], 0.0, 0.0
    started = time.monotonic()
    ours = psutil.Popen([sys.executable, "-m", "glassgpt", "prepare", str(text), "--out",
                         str(out), "--tokenizer", "gpt2"], stderr=subprocess.DEVNULL)  # fmt: skip
    ticks = 0
    while ours.poll() is None:
        time.sleep(0.1)
        ticks += 1
        with contextlib.suppress(psutil.Error):
            peak = max(peak, ours.memory_info().rss / 1e6)
        if ticks % 150 == 0:
            began = time.monotonic()
            ours.suspend()
            raw.append(ask())
            ours.resume()
            paused += time.monotonic() - began
    seconds = time.monotonic() - started - paused
    if ours.returncode:
        raise SystemExit("glassgpt prepare failed")
    raw.append(ask())
    peer.stdin.close()
    peer.wait()
    return seconds, raw, peak


if __name__ == "__main__":
    main()
