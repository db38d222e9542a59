"""Does llama.cpp read our GGUF files as we mean them? The same tokens, the same greedy text.

    python benchmarks/gguf_llamacpp.py --llama BUILD/bin --run runs/book

`--llama` is the folder with llama.cpp's programs llama-completion and llama-tokenize. For every
run and kind of file: are the ids of the prompt equal, and how many of the likeliest next tokens,
one by one, are the same as those of our NumPy model? Where the texts part, the lead of our best
logit over the second says whether two choices were nearly equal or something is wrong.
"""

from __future__ import annotations

import argparse
import json
import platform
import subprocess
import tempfile
from datetime import date
from pathlib import Path

import numpy as np

from glassgpt import numpy_gpt
from glassgpt.checkpoints.formats import logit_difference
from glassgpt.checkpoints.gguf import Kind, read_gguf, write_gguf
from glassgpt.checkpoints.run_directory import Checkpoint, load_model

RESULTS = Path(__file__).parent / "results" / "gguf_llamacpp.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--llama", type=Path, required=True, help="folder of llama.cpp's programs")
    parser.add_argument("--run", type=Path, required=True, nargs="+")
    parser.add_argument("--prompt", default="MENENIUS: What say you to't, good people?\n")
    parser.add_argument("--tokens", type=int, default=50)
    options = parser.parse_args()
    rows = []
    for run in options.run:
        checkpoint = load_model(run)
        ids = checkpoint.tokenizer.encode(options.prompt)
        ours, leads = greedy(checkpoint, ids, options.tokens)
        # llama.cpp prints C strings: a zero byte is lost.
        pieces = [checkpoint.tokenizer.token_bytes(token).replace(b"\0", b"") for token in ours]
        for kind in ("F32", "F16", "Q8_0"):
            with tempfile.TemporaryDirectory() as work:
                path = Path(work) / "model.gguf"
                difference = export(checkpoint, path, kind)
                same_prompt = tokenize(options.llama, path, options.prompt) == ids
                same = equal_tokens(
                    pieces, complete(options.llama, path, options.prompt, len(ours))
                )
            rows.append({
                "run": run.name, "family": checkpoint.config.family, "kind": kind,
                "tokenizer": checkpoint.tokenizer.kind, "prompt_ids_equal": same_prompt,
                "largest_difference_of_logits": round(difference, 5),
                "tokens": len(ours), "equal_tokens": same,
                "lead_where_they_part": round(leads[same], 4) if same < len(ours) else None,
            })  # fmt: skip
            print(json.dumps(rows[-1]), flush=True)
    result = {"date": date.today().isoformat(), "machine": platform.machine(), "rows": rows}
    RESULTS.parent.mkdir(exist_ok=True)
    RESULTS.write_text(json.dumps(result, indent=2) + "\n")


def export(checkpoint: Checkpoint, path: Path, kind: Kind) -> float:
    """Write the file; how far its logits are from ours when our own code computes both."""
    config, weights = checkpoint.config, checkpoint.weights
    write_gguf(path, config, weights, checkpoint.tokenizer, kind=kind, name="benchmark")
    return logit_difference((config, weights), read_gguf(path))


def greedy(checkpoint: Checkpoint, ids: list[int], count: int) -> tuple[list[int], list[float]]:
    """The likeliest tokens one by one, and by how much the best logit led each time."""
    tokens, leads = list(ids), []
    while len(tokens) < min(len(ids) + count, checkpoint.config.context_length):
        logits = numpy_gpt.forward(np.array(tokens), checkpoint.weights, checkpoint.config)[-1]
        second, best = np.argsort(logits)[-2:]
        if best == checkpoint.tokenizer.end_of_text:
            break
        tokens.append(int(best))
        leads.append(float(logits[best] - logits[second]))
    return tokens[len(ids) :], leads


def equal_tokens(pieces: list[bytes], text: bytes) -> int:
    """How many of our tokens, from the first on, are in their text."""
    count = 0
    for piece in pieces:
        if not text.startswith(piece):
            break
        text, count = text[len(piece) :], count + 1
    return count


def tokenize(programs: Path, model: Path, prompt: str) -> list[int]:
    command = [programs / "llama-tokenize", "-m", model, "--ids", "--no-bos", "--no-escape",
               "--no-parse-special", "--log-disable", "-p", prompt]  # fmt: skip
    return json.loads(subprocess.run(command, capture_output=True, check=True).stdout)


def complete(programs: Path, model: Path, prompt: str, count: int) -> bytes:
    """The text that follows the prompt, as bytes: a token may be half a character."""
    command = [programs / "llama-completion", "-m", model, "-n", str(count), "-p", prompt]
    plain = "--temp 0 -no-cnv --no-display-prompt --no-escape --simple-io --no-warmup"
    exact = "-ngl 0 -t 1 -c 0 -ctk f32 -ctv f32 -fa off"  # -c 0: the model's own context
    command += [*plain.split(), *exact.split()]
    for _ in range(50):
        text = subprocess.run(command, capture_output=True, check=True).stdout
        if text.endswith(b"\n\n"):  # its printing thread now and then loses the end of the text
            return text
    raise SystemExit(f"{command[0]} never printed a whole text")


if __name__ == "__main__":
    main()
