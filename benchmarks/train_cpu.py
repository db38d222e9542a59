"""Training speed on this CPU against nanoGPT: same architecture, same batch, whole processes.

    python benchmarks/train_cpu.py --nanogpt PATH_TO_A_CHECKOUT --data shakespeare.txt

Runs nanoGPT's recipe for CPUs (4 layers, 4 heads, 128 wide, context 64, batch 12, 2000 steps)
and ours in turn, `--rounds` times. A process counts from start to exit, imports included, and
both evaluate as often and on as many tokens. The final models are then judged by the same code
on the whole validation text. Prints ratios and writes benchmarks/results/train_cpu.json.
"""

from __future__ import annotations

import argparse
import json
import pickle
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path

import numpy as np
import torch

from glassgpt.checkpoints.nanogpt import load_nanogpt
from glassgpt.checkpoints.run_directory import load_model
from glassgpt.data.batches import TokenFiles
from glassgpt.data.dataset import load_data
from glassgpt.model import GPT, load_weights

RESULTS = Path(__file__).parent / "results" / "train_cpu.json"
BATCH, CONTEXT = 12, 64


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as work:
        data = Path(work) / "data"
        write_data(options.data.read_text(encoding="utf-8"), data)
        peer = make_peer(options.nanogpt, Path(work), data)
        seconds: dict[str, list[float]] = {"nanogpt": [], "glassgpt": []}
        losses: dict[str, float] = {}
        for number in range(options.rounds):
            run = Path(work) / f"run-{number}"
            seconds["nanogpt"].append(timed(nanogpt_command(options.steps), cwd=peer))
            seconds["glassgpt"].append(timed(glassgpt_command(options.steps, data, run)))
            print(
                f"round {number + 1}: "
                + ", ".join(f"{k} {v[-1]:.1f} s" for k, v in seconds.items())
            )
        val = load_data(data).val
        losses["nanogpt"] = val_loss(from_nanogpt(peer / "out-bench" / "ckpt.pt"), val)
        losses["glassgpt"] = val_loss(from_run(run), val)
    report(options, seconds, losses)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--data", type=Path, required=True, help="a text, such as tiny Shakespeare")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--rounds", type=int, default=1)
    return parser.parse_args()


def write_data(text: str, folder: Path) -> None:
    """nanoGPT's character data: the first 90 % for training."""
    folder.mkdir(parents=True)
    characters = sorted(set(text))
    ids = {char: i for i, char in enumerate(characters)}
    encoded = np.array([ids[char] for char in text], dtype=np.uint16)
    cut = int(len(text) * 0.9)
    encoded[:cut].tofile(folder / "train.bin")
    encoded[cut:].tofile(folder / "val.bin")
    meta = {"vocab_size": len(ids), "itos": dict(enumerate(characters)), "stoi": ids}
    (folder / "meta.pkl").write_bytes(pickle.dumps(meta))


def make_peer(checkout: Path, work: Path, data: Path) -> Path:
    """A copy of nanoGPT that trains on `data`."""
    peer = work / "nanogpt"
    shutil.copytree(checkout, peer, ignore=shutil.ignore_patterns(".git", "out*"))
    (peer / "data" / "bench").symlink_to(data)
    return peer


def nanogpt_command(steps: int) -> list[str]:
    """The command of its README for a CPU, with the decay ending at the last step."""
    return [sys.executable, "train.py", "config/train_shakespeare_char.py", "--dataset=bench",
            "--out_dir=out-bench", "--device=cpu", "--compile=False", "--eval_iters=20",
            "--log_interval=1", f"--block_size={CONTEXT}", f"--batch_size={BATCH}", "--n_layer=4",
            "--n_head=4", "--n_embd=128", f"--max_iters={steps}", f"--lr_decay_iters={steps}",
            "--dropout=0.0"]  # fmt: skip


def glassgpt_command(steps: int, data: Path, run: Path) -> list[str]:
    # nanoGPT evaluates 20 batches of either split; we 40 of the one that counts.
    return [sys.executable, "-m", "glassgpt", "train", str(data), "--preset", "shakespeare-cpu",
            "--out", str(run), "--max-steps", str(steps), "--eval-batches", "40",
            "--log-interval", "1"]  # fmt: skip


def timed(command: list[str], cwd: Path | None = None) -> float:
    started = time.monotonic()
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return time.monotonic() - started


def from_nanogpt(path: Path) -> GPT:
    config, weights, _, _ = load_nanogpt(path)
    model = GPT(config).eval()
    load_weights(model, dict(weights))
    return model


def from_run(run: Path) -> GPT:
    checkpoint = load_model(run)
    model = GPT(checkpoint.config).eval()
    load_weights(model, checkpoint.weights)
    return model


@torch.no_grad()
def val_loss(model: GPT, split: TokenFiles, context: int = CONTEXT) -> float:
    """Mean loss over every token of the split, in nats."""
    total = 0.0
    for tokens, targets in split.windows(n=64, T=context):
        logits = model(torch.from_numpy(tokens)).flatten(0, 1)
        flat = torch.from_numpy(targets).flatten()
        total += torch.nn.functional.cross_entropy(logits, flat, reduction="sum").item()
    return total / (len(split) - 1)


def report(options: argparse.Namespace, seconds: dict, losses: dict) -> None:
    ratios = [a / b for a, b in zip(seconds["nanogpt"], seconds["glassgpt"], strict=True)]
    tokens = options.steps * BATCH * CONTEXT
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        "steps": options.steps,
        "seconds": {name: [round(s, 1) for s in values] for name, values in seconds.items()},
        "tokens_per_second": {
            name: round(tokens / statistics.median(values)) for name, values in seconds.items()
        },
        "ratio": round(statistics.median(ratios), 3),
        "val_loss": {name: round(loss, 4) for name, loss in losses.items()},
    }
    print(json.dumps(result, indent=2))
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


if __name__ == "__main__":
    main()
