"""`train --budget` against nanoGPT, and against shapes picked by hand.

    python benchmarks/budget.py nanogpt --nanogpt CHECKOUT --data shakespeare.txt [--rounds 3]
    python benchmarks/budget.py grid --data shakespeare.txt --budgets 30s 1m 2m 5m
    python benchmarks/budget.py long --data shakespeare.txt --budgets 30m
    python benchmarks/budget.py speed --data shakespeare.txt
    python benchmarks/budget.py time --data shakespeare.txt --budgets 8s 20s 1m

nanogpt: whole processes, in turn: nanoGPT's CPU recipe, then a budget of a tenth of the time it
took, then one of the same time. grid: the budget's own choice between eight shapes that are given
the same time. Losses are of the saved models, over the entire validation split, each with its own
context. A run that ends outside 0.9 to 1.03 of its budget is marked. speed:
the tokens per second that `plan` promises for five shapes and those that training then reaches, in
turn, --rounds times, and the median of their ratio. time: the share of each budget that a run
takes, by one process, by two under torchrun, and by one that is stopped half-way and resumed (the
pause doesn't count). Results: results/budget.json.
"""

from __future__ import annotations

import argparse
import json
import re
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

import torch
from train_cpu import (
    from_nanogpt,
    from_run,
    make_peer,
    nanogpt_command,
    timed,
    val_loss,
    write_data,
)

from glassgpt.data.batches import TokenFiles
from glassgpt.data.dataset import load_data
from glassgpt.system import seconds_of

RESULTS = Path(__file__).parent / "results" / "budget.json"
# Layers, width, context: around what the rule would choose. Up to a minute the first eight, then
# the last eight.
SHAPES = [(2, 64, 64), (2, 96, 64), (2, 128, 128), (3, 128, 128), (4, 128, 128), (4, 160, 128),
          (4, 192, 128), (6, 192, 128), (4, 256, 256), (6, 256, 256)]  # fmt: skip


def main() -> None:
    options = arguments()
    with tempfile.TemporaryDirectory() as work:
        folder = Path(work) / "data"
        write_data(options.data.read_text(encoding="utf-8"), folder)
        if options.what == "nanogpt":
            result = against_nanogpt(options, Path(work), folder)
        elif options.what == "speed":
            rounds = [[promised_and_reached(shape, folder, Path(work)) for shape in SHAPES[::2]]
                      for _ in range(options.rounds)]  # fmt: skip
            result = {"rounds": rounds, "ratio": {
                of_shape[0]["shape"]: statistics.median(row["ratio"] for row in of_shape)
                for of_shape in zip(*rounds, strict=True)}}  # fmt: skip
        elif options.what == "time":
            result = {budget: shares(budget, folder, Path(work), options.seed)
                      for budget in options.budgets}  # fmt: skip
        else:
            result = {budget: against_grid(budget, folder, Path(work), options)
                      for budget in options.budgets}  # fmt: skip
    keep(f"{options.what} {options.data.stem}", result)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["nanogpt", "grid", "long", "speed", "time"])
    parser.add_argument("--data", type=Path, required=True, help="a text, such as tiny Shakespeare")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--budgets", nargs="+", default=["1m"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--seed", type=int, default=1337)
    return parser.parse_args()


def against_nanogpt(options: argparse.Namespace, work: Path, data: Path) -> dict[str, Any]:
    peer = make_peer(options.nanogpt, work, data)
    rounds = []
    for number in range(options.rounds):
        theirs = timed(nanogpt_command(2000), cwd=peer)
        loss = whole_loss(from_nanogpt(peer / "out-bench" / "ckpt.pt"), data)
        tenth = trained(f"{theirs / 10:.1f}s", data, work / f"tenth-{number}", options.seed)
        same = trained(f"{theirs:.0f}s", data, work / f"same-{number}", options.seed)
        row = {"nanogpt": {"seconds": round(theirs, 1), "val_loss": loss},
               "tenth": tenth, "same": same}  # fmt: skip
        print(json.dumps(row), flush=True)
        rounds.append(row)
    shares = [row["tenth"]["seconds"] / row["nanogpt"]["seconds"] for row in rounds]
    ahead = [row["nanogpt"]["val_loss"] - row["tenth"]["val_loss"] for row in rounds]
    return {"rounds": rounds, "share_of_time": round(statistics.median(shares), 3),
            "loss_ahead": round(statistics.median(ahead), 4)}  # fmt: skip


def against_grid(
    budget: str, data: Path, work: Path, options: argparse.Namespace
) -> dict[str, Any]:
    seed = options.seed
    shapes = SHAPES[:8] if seconds_of(budget) <= 60 else SHAPES[-8:]
    if options.what == "long":
        shapes = []
    own = trained(budget, data, work / f"own-{budget}", seed)
    print(f"{budget} own choice: {own}", flush=True)
    rows = []
    for n_layer, n_embd, context in shapes:
        shape = shape_options(n_layer, n_embd, context)
        name = f"{n_layer}x{n_embd} context {context}"
        rows.append({"shape": name} | trained(budget, data, work / f"{name}-{budget}", seed,
                                              *shape))  # fmt: skip
        print(f"{budget} {rows[-1]}", flush=True)
    best = min([own, *rows], key=lambda row: row["val_loss"])
    return {"own": own, "grid": rows, "behind_best": round(own["val_loss"] - best["val_loss"], 4)}


def trained(budget: str, data: Path, run: Path, seed: int, *more: str) -> dict[str, Any]:
    command = [sys.executable, "-m", "glassgpt", "train", str(data), "--budget", budget,
               "--out", str(run), "--overwrite", "--seed", str(seed), *more]  # fmt: skip
    took = timed(command)
    info = json.loads((run / "glassgpt.json").read_text())
    model = info["model"]
    shape = f"{model['n_layer']}x{model['n_embd']} context {model['context_length']}"
    share = took / seconds_of(budget)
    planned, reached = speeds(run)
    return {"seconds": round(took, 2), "share": round(share, 3), "on_time": 0.9 <= share <= 1.03,
            "chosen": shape, "steps": info["step"],
            "tokens_per_second": reached, "planned": planned,
            "val_loss": whole_loss(from_run(run), data)}  # fmt: skip


def shares(budget: str, data: Path, work: Path, seed: int) -> dict[str, float]:
    """The time that a run took, divided by its budget; 1.0 is exactly on time."""
    seconds = seconds_of(budget)
    module = ["-m", "glassgpt", "train", str(data), "--budget", budget, "--seed", f"{seed}"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    one = timed([sys.executable, *module, "--out", str(work / f"one-{budget}")])
    two = timed([sys.executable, *torchrun, *module, "--out", str(work / f"two-{budget}")])
    run = work / f"stopped-{budget}"
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *module, "--out", str(run)])
    time.sleep(seconds / 2)
    process.send_signal(signal.SIGINT)
    process.wait()
    first = time.perf_counter() - started
    rest = timed([sys.executable, "-m", "glassgpt", "train", "--resume", str(run)])
    found = {"one process": one, "two processes": two, "stopped and resumed": first + rest}
    found = {name: round(value / seconds, 3) for name, value in found.items()}
    print(f"{budget} {found}", flush=True)
    return found


def shape_options(n_layer: int, n_embd: int, context: int) -> list[str]:
    return ["--n-layer", f"{n_layer}", "--n-embd", f"{n_embd}", "--n-head", f"{n_embd // 32}",
            "--context-length", f"{context}"]  # fmt: skip


def speeds(run: Path) -> tuple[int, int]:
    """Tokens per second of a run: planned (0 without a budget), reached."""
    row = re.search(r"\| tokens per second \| (\S+) \| (\S+) \|", (run / "report.md").read_text())
    assert row is not None
    planned, reached = (text.replace(",", "").replace("-", "0") for text in row.groups())
    return int(planned), int(reached)


def promised_and_reached(shape: tuple[int, int, int], data: Path, work: Path) -> dict[str, Any]:
    n_layer, n_embd, context = shape
    options = [*shape_options(*shape), "--batch-tokens", "2048" if n_embd < 192 else "4096"]
    plan = [sys.executable, "-m", "glassgpt", "plan", str(data), *options]
    said = subprocess.run(plan, capture_output=True, text=True, check=True).stdout
    found = re.search(r"a step, ([\d.,]+) (million )?tokens/s", said)
    assert found is not None, said
    promised = float(found[1].replace(",", "")) * (1e6 if found[2] else 1)
    steps = max(20, round(10 * promised / int(options[-1])))  # ten seconds
    timed([sys.executable, "-m", "glassgpt", "train", str(data), *options, "--max-steps",
           f"{steps}", "--eval-interval", f"{steps}", "--eval-batches", "4", "--sample-tokens", "0",
           "--out", str(work / "speed"), "--overwrite"])  # fmt: skip
    reached = speeds(work / "speed")[1]
    result = {"shape": f"{n_layer}x{n_embd} context {context}", "planned": round(promised),
              "reached": reached, "ratio": round(reached / promised, 3)}  # fmt: skip
    print(result, flush=True)
    return result


def whole_loss(model: torch.nn.Module, data: Path) -> float:
    split: TokenFiles = load_data(data).val
    return round(val_loss(model, split, model.config.context_length), 4)  # type: ignore


def keep(name: str, result: dict[str, Any]) -> None:
    print(json.dumps({name: result}, indent=2))
    everything = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    about = {"date": date.today().isoformat(), "torch": torch.__version__,
             "threads": torch.get_num_threads()}  # fmt: skip
    everything[name] = everything.get(name, {}) | about | result
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(everything, indent=1) + "\n")


if __name__ == "__main__":
    main()
