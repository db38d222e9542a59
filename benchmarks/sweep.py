"""The small sweep behind `--budget`: what loss a shape reaches after so many tokens.

    python benchmarks/sweep.py run --data shakespeare.txt [--processes 2]    # half an hour
    python benchmarks/sweep.py fit                                           # law and plot

`run` trains each shape on each number of tokens, as a budget would (one thread each; the loss does
not depend on the machine), and appends to results/sweep.jsonl what is not there yet. `fit` finds
the constants of `Law` in training/planning/budget.py, to be put there by hand, and draws
docs/sweep.png.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import tempfile
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import torch

from glassgpt.config import ModelConfig
from glassgpt.training.planning import budget

HERE = Path(__file__).parent
RESULTS = HERE / "results" / "sweep.jsonl"
PLOT = HERE.parent / "docs" / "sweep.png"
# Layers x width, context; million tokens seen (tiny Shakespeare has 1.0 to train on).
SHAPES = [(2, 64, 64), (2, 96, 64), (3, 128, 128), (4, 128, 128), (4, 160, 128), (6, 192, 128),
          (6, 256, 256)]  # fmt: skip
MILLIONS = (0.25, 0.5, 1.0, 2.0, 4.0, 8.0)
_MOST_WORK = 4e13  # multiplications and additions of one run: ten minutes of one thread


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["run", "fit"])
    parser.add_argument("--data", type=Path, help="a text, such as tiny Shakespeare")
    parser.add_argument("--processes", type=int, default=2)
    options = parser.parse_args()
    if options.what == "run":
        run(options.data, options.processes)
    else:
        fit()


def run(data: Path, processes: int) -> None:
    known = {(row["shape"], row["millions"], row["text"]) for row in rows()}
    jobs = []
    for millions in MILLIONS:
        for n_layer, n_embd, context in SHAPES:
            model = shape_of(n_layer, n_embd, context)
            key = f"{n_layer}x{n_embd} context {context}", millions, data.stem
            if key not in known and millions * 1e6 * model.flops_per_token() < _MOST_WORK:
                jobs.append((key, model))
    with ThreadPoolExecutor(processes) as pool:
        for done in as_completed([pool.submit(train, data, *job) for job in jobs]):
            line = done.result()
            print(line, flush=True)
            with open(RESULTS, "a") as file:
                file.write(line + "\n")


def shape_of(n_layer: int, n_embd: int, context: int) -> ModelConfig:
    return ModelConfig.from_shape("modern", vocab_size=65, n_layer=n_layer, n_embd=n_embd,
                                  n_head=n_embd // 32, context_length=context)  # fmt: skip


def train(data: Path, key: tuple[str, float, str], model: ModelConfig) -> str:
    shape, millions, text = key
    about = budget.TextStatistics(1_000_000, 65, 2.4)
    options = budget.training_options(model, millions * 1e6, about)
    steps = round(millions * 1e6 / options["batch_tokens"])
    options |= dict(max_steps=steps, n_layer=model.n_layer, n_embd=model.n_embd,
                    n_head=model.n_head, context_length=model.context_length,
                    eval_interval=10**9, sample_tokens=0, threads=1)  # fmt: skip
    flags = [part for name, value in options.items()
             for part in (f"--{name.replace('_', '-')}", str(value))]  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, "-m", "glassgpt", "train", str(data), "--out", folder + "/run"]
        done = subprocess.run([*command, *flags], capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(done.stderr[-2000:])
        info = json.loads((Path(folder) / "run" / "glassgpt.json").read_text())
    return json.dumps({"shape": shape, "millions": millions, "text": text, "steps": steps,
                       "parameters": budget.inner_parameters(model),
                       "val_loss": info["best_val_loss"]})  # fmt: skip


def rows() -> list[dict]:
    lines = RESULTS.read_text().splitlines() if RESULTS.exists() else []
    return [json.loads(line) for line in lines]


def fit() -> None:
    """Least squares on the logarithm, by gradient descent from several starts."""
    found = rows()
    best, least = None, math.inf
    for start in range(12):
        torch.manual_seed(start)
        law, error = descend(found)
        if error < least:
            best, least = law, error
    assert best is not None
    print(best, f"root mean square error {least:.4f} nats")
    text = budget.TextStatistics(1_003_854, 65, 2.4)
    for row in found:
        expected = best(row["parameters"], row["millions"] * 1e6, text, 1.0)
        print(f"{row['shape']:>20} {row['millions']:5.2f} M  measured {row['val_loss']:.4f}  "
              f"expected {expected:.4f}  {row['val_loss'] - expected:+.4f}")  # fmt: skip
    draw(found, best, text)


def descend(found: list[dict]) -> tuple[budget.Law, float]:
    n = torch.tensor([row["parameters"] for row in found], dtype=torch.float64)
    tokens = torch.tensor([row["millions"] * 1e6 for row in found], dtype=torch.float64)
    loss = torch.tensor([row["val_loss"] for row in found], dtype=torch.float64)
    once = 1_003_854.0
    values = torch.tensor([0.0, 2.5, -1.2, 4.5, -1.0, 2.0], dtype=torch.float64)
    values = (values + 0.3 * torch.randn(6, dtype=torch.float64)).requires_grad_()
    optimizer = torch.optim.LBFGS([values], max_iter=400, line_search_fn="strong_wolfe")

    def expected() -> torch.Tensor:
        floor, a, alpha, b, beta, r = values.exp()
        repeated = (tokens / once - 1).clamp(min=0)
        seen = tokens.clamp(max=once) + once * r * (1 - torch.exp(-repeated / r))
        return floor + a / n**alpha + b / seen**beta

    def closure() -> torch.Tensor:
        optimizer.zero_grad()
        error = ((expected().log() - loss.log()) ** 2).mean()
        error.backward()
        return error

    optimizer.step(closure)
    error = (expected() - loss).pow(2).mean().sqrt().item()
    law = budget.Law(*(round(value, 4) for value in values.exp().tolist()))
    return law, error if math.isfinite(error) else math.inf


def draw(found: list[dict], law: budget.Law, text: budget.Text) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 5), layout="tight")
    axes = figure.subplots()
    for index, (shape, n) in enumerate(sorted({(r["shape"], r["parameters"]) for r in found},
                                              key=lambda pair: pair[1])):  # fmt: skip
        points = sorted((r["millions"], r["val_loss"]) for r in found if r["shape"] == shape)
        axes.plot(*zip(*points, strict=True), "o", color=f"C{index}",
                  label=f"{shape}: {n / 1e6:.2f} M parameters")  # fmt: skip
        tokens = [0.2 * 1.1**k for k in range(42)]
        axes.plot(tokens, [law(n, 1e6 * t, text, 1.0) for t in tokens], color=f"C{index}",
                  linewidth=0.8)  # fmt: skip
    axes.set_xscale("log")
    axes.set_xlabel("million tokens seen (the text has 1.0 to train on)")
    axes.set_ylabel("validation loss (nats per character)")
    axes.set_title("tiny Shakespeare: measured (points) and the fitted law (lines)")
    axes.grid(alpha=0.2)
    axes.legend()
    figure.savefig(PLOT, dpi=110)


if __name__ == "__main__":
    main()
