"""Is a checkpoint of nanoGPT the same model here, and one of ours the same model there?

    python benchmarks/nanogpt_parity.py --nanogpt PATH_TO_A_CHECKOUT --checkpoint out/ckpt.pt

Reads the checkpoint and compares the logits of every position, and 200 greedy tokens, with
nanoGPT's own model.py. Then writes it again (or the run given by --run) as a checkpoint of
nanoGPT, compares once more, and lets its sample.py draw and its train.py resume for three steps.
Exit status 1 if a logit differs by more than 1e-4, or a greedy token.
"""

from __future__ import annotations

import argparse
import contextlib
import importlib.util
import io
import os
import subprocess
import sys
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from glassgpt.api import LoadedModel
from glassgpt.checkpoints.formats import export_model
from glassgpt.checkpoints.nanogpt import load_nanogpt
from glassgpt.checkpoints.run_directory import Checkpoint, load_model
from glassgpt.tokenizers.vocabulary import build_tokenizer

TOLERANCE = 1e-4


def main() -> None:
    options = arguments()
    same = compare("read from nanoGPT", options.checkpoint, options.nanogpt, as_ours(options))
    with tempfile.TemporaryDirectory() as work:
        ours = load_model(options.run) if options.run else as_ours(options)
        moved = export_model(ours, "nanogpt", Path(work)).difference
        print(f"written for nanoGPT: activation={ours.config.activation}, the exact GELU moves "
              f"logits by up to {moved:.1e}")  # fmt: skip
        ours.config = replace(ours.config, activation="gelu")
        same &= compare("written for nanoGPT", Path(work), options.nanogpt, ours)
        sample = ["sample.py", f"--out_dir={work}", "--device=cpu", "--dtype=float32",
                  "--num_samples=1", "--max_new_tokens=100"]  # fmt: skip
        show("its sample.py", run(sample, options.nanogpt), last=6)
        resume = ["train.py", "--init_from=resume", f"--out_dir={work}", "--device=cpu",
                  "--compile=False", f"--dataset={options.dataset}", "--batch_size=4",
                  f"--block_size={ours.config.context_length}", "--gradient_accumulation_steps=1",
                  "--eval_iters=5", "--eval_interval=3", "--max_iters=3"]  # fmt: skip
        show("its train.py", run(resume, options.nanogpt), last=7)
        again = load_nanogpt(Path(work))[3]
        print(f"read once more: iter_num {again['iter_num']}, "
              f"best_val_loss {again['best_val_loss']:.4f}")  # fmt: skip
    raise SystemExit(0 if same else 1)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--nanogpt", type=Path, required=True, help="a checkout of nanoGPT")
    parser.add_argument("--checkpoint", type=Path, required=True, help="a ckpt.pt it trained")
    parser.add_argument("--run", type=Path, help="a run of ours to write, instead of that one")
    parser.add_argument("--dataset", default="shakespeare_char", help="to resume with")
    return parser.parse_args()


def as_ours(options: argparse.Namespace) -> Checkpoint:
    config, weights, tokenizer, info = load_nanogpt(options.checkpoint)
    tokenizer = tokenizer or build_tokenizer("gpt2", lambda: iter(()))
    return Checkpoint(config, dict(weights), tokenizer, info)


def theirs_of(checkpoint: Path, nanogpt: Path) -> Any:
    """nanoGPT's own module with the checkpoint's weights, loaded as its sample.py does."""
    spec = importlib.util.spec_from_file_location("nanogpt_model", nanogpt / "model.py")
    assert spec is not None
    assert spec.loader is not None
    module = sys.modules[spec.name] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    file = checkpoint / "ckpt.pt" if checkpoint.is_dir() else checkpoint
    saved = torch.load(file, map_location="cpu", weights_only=True)
    with contextlib.redirect_stdout(io.StringIO()):
        model = module.GPT(module.GPTConfig(**saved["model_args"]))
    weights = {name.removeprefix("_orig_mod."): tensor for name, tensor in saved["model"].items()}
    model.load_state_dict(weights)
    return model.eval()


@torch.no_grad()
def compare(title: str, checkpoint: Path, nanogpt: Path, ours: Checkpoint) -> bool:
    theirs, loaded = theirs_of(checkpoint, nanogpt), LoadedModel(ours, device="cpu")
    limit, n = ours.config.context_length, 200
    generator = torch.Generator().manual_seed(1)
    tokens = torch.randint(ours.config.vocab_size, (8, limit), generator=generator)
    expected, logits = theirs(tokens, tokens)[0], loaded.model(tokens)
    worst = (expected - logits).abs().max().item()
    start = tokens[:1, :1]
    wanted = theirs.generate(start, n, top_k=1)[0].tolist()
    drawn = start
    for _ in range(n):  # with nanoGPT's window: everything anew for each token
        best = loaded.model(drawn[:, -limit:])[:, -1:].argmax(-1)
        drawn = torch.cat((drawn, best), dim=1)
    alike = wanted == drawn[0].tolist()
    short = min(n, limit - 1)  # up to there our sampler's window is nanoGPT's
    piece = loaded.generate(start[0].tolist(), max_new_tokens=short, temperature=0)
    text_alike = piece.text == ours.tokenizer.decode(wanted[1 : short + 1])
    print(f"{title}: {tokens.numel()} positions, logits from {expected.min():.2f} to "
          f"{expected.max():.2f}, largest difference {worst:.1e}; {n} greedy tokens "
          f"{'equal' if alike else 'DIFFER'}, text of {short} tokens by our sampler "
          f"{'equal' if text_alike else 'DIFFERS'}")  # fmt: skip
    return worst <= TOLERANCE and alike and text_alike


def run(command: list[str], nanogpt: Path) -> str:
    environment = os.environ | {"PYTHONDONTWRITEBYTECODE": "1"}
    done = subprocess.run([sys.executable, *command], cwd=nanogpt, env=environment,
                          capture_output=True, text=True)  # fmt: skip
    if done.returncode:
        raise SystemExit(f"{' '.join(command)} failed:\n{done.stderr[-2000:]}")
    return done.stdout


def show(title: str, output: str, last: int) -> None:
    lines = output.rstrip().splitlines()[-last:]
    print(f"{title}:", *(f"    {line}" for line in lines), sep="\n")


if __name__ == "__main__":
    main()
