"""Decoding speed on this CPU against other programs: GPT-2 124M, random weights, same threads.

    python benchmarks/decode_cpu.py                      # transformers; ctranslate2 if installed
    python benchmarks/decode_cpu.py --llama BUILD/bin --nanogpt CHECKOUT --rounds 3

`--llama` is the folder with llama.cpp's llama-bench and llama-quantize, which get the same weights
by our exporter. All in one run: in every round each measurement has a process of its own, ours and
its rival one after the other, because the machine drifts. "decode" is 128 tokens behind a prompt
of 32, the prompt not counted, greedy; nanoGPT has no cache and reads everything again for every
token. Prints medians over the rounds and the medians of the rounds' ratios, and writes
benchmarks/results/decode_cpu.json unless `--only` leaves something out.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from datetime import date
from pathlib import Path
from typing import Any

import numpy as np

from glassgpt.reporting.terminal import aligned

RESULTS = Path(__file__).parent / "results" / "decode_cpu.json"
PROMPT, LONG_PROMPT, NEW = 32, 512, 128
SIZE = dict(vocab_size=50257, context_length=1024, n_layer=12, n_head=12, n_embd=768)
RATIOS = [  # what, over what, at least
    ("numba float32, decode", "llama.cpp F32, decode", 1.0),
    ("numba int8, decode", "llama.cpp Q8_0, decode", 1.2),
    ("numba int4, decode", "llama.cpp Q4_0, decode", 1.0),
    (f"numba float32, prompt of {PROMPT}", f"llama.cpp F32, prompt of {PROMPT}", 0.7),
    (f"numba float32, prompt of {LONG_PROMPT}", f"llama.cpp F32, prompt of {LONG_PROMPT}", 0.7),
    ("numpy float32, decode", "transformers, decode", 2.0),
    ("numba int8 batch 8, decode", "numba int8, decode", 4.0),
]


def main() -> None:
    options = arguments()
    if options.worker:
        given = json.loads(options.worker)
        print(json.dumps(WORKERS[given.pop("who")](**given)))
        return
    with tempfile.TemporaryDirectory() as temporary:
        folder = options.work or Path(temporary)
        prepare(folder, options)
        plan = measurements(folder, options)
        chosen = [name for name in plan if any(part in name for part in options.only or [""])]
        rounds = []
        for number in range(options.rounds):
            rates: dict[str, float] = {}
            for name in chosen:
                show(f"round {number + 1} of {options.rounds}: {name}")
                rates |= {f"{name}, {what}": rate for what, rate in plan[name]().items()}
            rounds.append(rates)
    report(options, rounds)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama", type=Path, help="folder of llama.cpp's programs")
    parser.add_argument("--nanogpt", type=Path, help="a checkout of nanoGPT")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", help="measure what has one of these in its name")
    parser.add_argument("--work", type=Path, help="keep the models here, for the next time")
    parser.add_argument("--worker", help=argparse.SUPPRESS)  # one measurement's process
    return parser.parse_args()


def show(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def measurements(
    folder: Path, options: argparse.Namespace
) -> dict[str, Callable[[], dict[str, float]]]:
    """Name -> a call that measures and gives tokens per second; rivals side by side."""
    run, threads, plan = str(folder / "run"), options.threads, {}

    def ours(engine: str, weights: str, batch: int = 1, prefill: bool = False) -> None:
        name = f"{engine} {weights}" + (f" batch {batch}" if batch > 1 else "")
        plan[name] = lambda: work(threads, who="glassgpt", run=run, engine=engine, weights=weights,
                                  batch=batch, prefill=prefill)  # fmt: skip

    def llama(kind: str, prefill: bool = False) -> None:
        if options.llama:
            file = folder / f"{kind}.gguf"
            plan[f"llama.cpp {kind}"] = lambda: llama_bench(options.llama, file, threads, prefill)

    ours("numba", "float32", prefill=True)
    llama("F32", prefill=True)
    ours("numba", "int8")
    llama("Q8_0")
    ours("numba", "int8", batch=8)
    ours("numba", "int4")
    llama("Q4_0")
    ours("numpy", "float32", prefill=True)
    plan["transformers"] = lambda: work(threads, who="transformers", run=run)
    if (folder / "ctranslate2").exists():
        for kind in ("float32", "int8"):
            plan[f"ctranslate2 {kind}"] = lambda kind=kind: work(
                threads, who="ctranslate2", folder=str(folder / "ctranslate2"), kind=kind
            )
    if options.nanogpt:
        plan["nanoGPT"] = lambda: work(threads, who="nanogpt", checkout=str(options.nanogpt))
    return plan


# -- the models ----------------------------------------------------------------------------------


def prepare(folder: Path, options: argparse.Namespace) -> None:
    """The run directory, and the same weights for the others; what is there already stays."""
    folder.mkdir(parents=True, exist_ok=True)
    run, file = folder / "run", folder / "F32.gguf"
    if not run.exists():
        show("writing the model")
        work(options.threads, who="write", run=str(run))
    if options.llama and not file.exists():
        work(options.threads, who="gguf", run=str(run), file=str(file))
        for kind in ("Q8_0", "Q4_0"):
            command = [options.llama / "llama-quantize", file, folder / f"{kind}.gguf", kind]
            subprocess.run(command, check=True, capture_output=True)
    if importlib.util.find_spec("ctranslate2") and not (folder / "ctranslate2").exists():
        try:
            work(options.threads, who="convert", run=str(run), folder=str(folder / "ctranslate2"))
        except subprocess.CalledProcessError:
            show("going on without ctranslate2, which can't convert the model")


def write(run: str) -> dict:
    """A run directory: our own initial weights, GPT-2's tokenizer."""
    import torch

    from glassgpt.checkpoints.run_directory import Checkpoint, save_model
    from glassgpt.config import ModelConfig
    from glassgpt.model import GPT
    from glassgpt.tokenizers.vocabulary import build_tokenizer

    torch.manual_seed(0)
    config = ModelConfig.from_shape("gpt2", **SIZE)
    state = GPT(config).state_dict()
    weights = {name: state[name].numpy() for name in config.weight_shapes}
    save_model(run, Checkpoint(config, weights, build_tokenizer("gpt2", lambda: iter(()))))
    return {}


def gguf(run: str, file: str) -> dict:
    from glassgpt.checkpoints.gguf import write_gguf
    from glassgpt.checkpoints.run_directory import load_model

    it = load_model(run)
    write_gguf(Path(file), it.config, it.weights, it.tokenizer, kind="F32", name="benchmark")
    return {}


def convert(run: str, folder: str) -> dict:
    from ctranslate2.converters import TransformersConverter

    TransformersConverter(run).convert(folder)
    file = Path(folder) / "config.json"  # its reader takes no null, and bytes need no <unk>
    about = json.loads(file.read_text())
    file.write_text(json.dumps(about | {"unk_token": about["eos_token"]}))
    return {}


# -- measurements, each in a process of its own --------------------------------------------------


def work(threads: int, **given: Any) -> dict[str, float]:
    """Run a worker, with every library's pool of threads held to `threads`."""
    names = ("OMP", "OPENBLAS", "MKL", "NUMBA")
    limits = {f"{name}_NUM_THREADS": str(threads) for name in names}
    if given["who"] not in ("write", "gguf", "convert"):
        given["threads"] = threads
    command = [sys.executable, __file__, "--worker", json.dumps(given)]
    done = subprocess.run(command, env=os.environ | limits, capture_output=True, text=True)
    if done.returncode:
        show(done.stderr[-2000:])
        done.check_returncode()
    return json.loads(done.stdout.splitlines()[-1])


def glassgpt(
    run: str, engine: str, weights: str, batch: int, prefill: bool, threads: int
) -> dict[str, float]:
    from glassgpt.checkpoints.run_directory import load_model
    from glassgpt.evaluation.decoding_speed import decode_speed, prefill_speed
    from glassgpt.inference.engines.choose import build_engine

    built = build_engine(
        load_model(run),
        device="cpu",
        engine=engine,  # type: ignore[arg-type]
        weights=weights,  # type: ignore[arg-type]
        threads=threads,
    )
    assert built.name == f"{engine} {weights}", f"the engine here is {built.name}"
    rates = {"decode": decode_speed(built, batch, PROMPT, NEW)}
    for length in (PROMPT, LONG_PROMPT) if prefill else ():
        rates[f"prompt of {length}"] = prefill_speed(built, length)
    return rates


def llama_bench(programs: Path, file: Path, threads: int, prefill: bool) -> dict[str, float]:
    """Its own benchmark: decoding behind PROMPT tokens, and prompts."""
    command = [programs / "llama-bench", "-m", file, "-t", str(threads), "-ngl", "0", "-o", "json"]

    def rates(*arguments: object) -> list[float]:
        done = subprocess.run([*command, *map(str, arguments)], check=True, capture_output=True)
        return [statistics.median(row["samples_ts"]) for row in json.loads(done.stdout)]

    [decode] = rates("-p", 0, "-n", NEW, "-d", PROMPT, "-r", 1)
    found = {"decode": decode}
    if prefill:
        lengths = (PROMPT, LONG_PROMPT)
        speeds = rates("-p", ",".join(map(str, lengths)), "-n", 0, "-r", 3)
        found |= {f"prompt of {n}": rate for n, rate in zip(lengths, speeds, strict=True)}
    return found


def random_prompt() -> list[int]:
    return np.random.default_rng(0).integers(SIZE["vocab_size"], size=PROMPT).tolist()


def per_second(stamps: list[float]) -> dict[str, float]:
    """From the moments at which new tokens came; the first one's contains the prompt."""
    assert len(stamps) == NEW + 1, f"{len(stamps)} tokens"
    return {"decode": NEW / (stamps[-1] - stamps[0])}


def transformers(run: str, threads: int) -> dict[str, float]:
    import torch
    from transformers import AutoModelForCausalLM

    class Stamps:
        """A streamer that notes when each token comes; the first call brings the prompt."""

        def __init__(self) -> None:
            self.times: list[float] = []

        def put(self, value: object) -> None:
            self.times.append(time.perf_counter())

        def end(self) -> None: ...

    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(run, dtype=torch.float32).eval()
    ids = torch.tensor([random_prompt()])
    for count in (4, NEW + 1):  # the first time warms up
        stamps = Stamps()
        model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False,
                       min_new_tokens=count, max_new_tokens=count, pad_token_id=0,
                       streamer=stamps)  # fmt: skip
    return per_second(stamps.times[1:])


def ctranslate2(folder: str, kind: str, threads: int) -> dict[str, float]:
    from ctranslate2 import Generator

    generator = Generator(folder, device="cpu", compute_type=kind, intra_threads=threads)
    vocabulary = json.loads((Path(folder) / "vocabulary.json").read_text("utf-8"))
    prompt = [vocabulary[i] for i in random_prompt()]
    for count in (4, NEW + 1):
        stamps: list[float] = []
        generator.generate_batch(
            [prompt], min_length=count, max_length=count, include_prompt_in_result=False,
            callback=lambda step, stamps=stamps: stamps.append(time.perf_counter()),
        )  # fmt: skip
    return per_second(stamps)


def nanogpt(checkout: str, threads: int) -> dict[str, float]:
    """Its `generate` reads everything again for every token: the whole call is counted."""
    sys.path.insert(0, checkout)
    import torch
    from model import GPT, GPTConfig  # type: ignore[import-not-found]

    torch.set_num_threads(threads)
    torch.manual_seed(0)
    sizes = {"block_size": SIZE["context_length"]}
    sizes |= {name: SIZE[name] for name in ("vocab_size", "n_layer", "n_head", "n_embd")}
    sys.stdout = sys.stderr  # it says how large it is
    model = GPT(GPTConfig(**sizes, dropout=0.0, bias=True)).eval()
    sys.stdout = sys.__stdout__
    ids = torch.tensor([random_prompt()])
    with torch.inference_mode():
        model.generate(ids, 2)
        started = time.perf_counter()
        model.generate(ids, NEW)
    return {"decode": NEW / (time.perf_counter() - started)}


WORKERS: dict[str, Callable[..., dict[str, float]]] = {
    "write": write, "gguf": gguf, "convert": convert, "glassgpt": glassgpt,
    "transformers": transformers, "ctranslate2": ctranslate2, "nanogpt": nanogpt,
}  # fmt: skip


# -- the report ----------------------------------------------------------------------------------


def report(options: argparse.Namespace, rounds: list[dict[str, float]]) -> None:
    rates = {name: statistics.median(it[name] for it in rounds) for name in rounds[0]}
    rows = [["tokens/s", "median", "lowest", "highest"]]
    for name, rate in rates.items():
        values = [it[name] for it in rounds]
        rows.append([name, f"{rate:,.1f}", f"{min(values):,.1f}", f"{max(values):,.1f}"])
    print(aligned(rows) + "\n")
    ratios, rows = {}, [["ratio", "median", "wanted"]]
    for ours, theirs, wanted in RATIOS:
        if ours in rates and theirs in rates:
            ratio = statistics.median(it[ours] / it[theirs] for it in rounds)
            ratios[f"{ours} / {theirs}"] = round(ratio, 3)
            rows.append([f"{ours} / {theirs}", f"{ratio:.2f}", f"{wanted:.1f}"])
    if ratios:
        print(aligned(rows))
    if options.only:
        return
    result = {
        "date": date.today().isoformat(),
        "machine": f"{platform.machine()}, {options.threads} threads",
        "versions": {name: _version(name) for name in ("numpy", "numba", "torch", "transformers",
                                                       "ctranslate2")},
        "rounds": options.rounds,
        "ratios": ratios,
        "tokens_per_second": {name: round(rate, 1) for name, rate in rates.items()},
        "each_round": [{name: round(rate, 1) for name, rate in it.items()} for it in rounds],
    }  # fmt: skip
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


if __name__ == "__main__":
    main()
