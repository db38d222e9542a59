"""Make the golden checkpoint: `python tests/golden/make.py`, and look at what it prints.

A tiny model is trained here on a few sentences, in a plain loop that uses nothing of training/,
and kept with what it computes. A change of the code that moves these numbers changes what every
saved model says, so this script is run again only when that is meant.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

import glassgpt
from glassgpt.checkpoints.run_directory import Checkpoint, save_model
from glassgpt.config import ModelConfig
from glassgpt.model import GPT
from glassgpt.tokenizers.tokenizer import CharTokenizer

FOLDER = Path(__file__).parent
TEXT = """\
The old clock in the hall had stopped at nine.
A small bird sang above the garden wall.
Nobody knew who had left the door open.
The rain came down on the roof all night.
She put the letter back into the box.
In the morning the road was white with snow.
The dog slept under the table by the fire.
He said that the river would be high in spring.
"""
SENTENCE = "The small bird slept under the table by the fire."
PROMPT = "The "
STEPS, ROWS = 150, 48


def main() -> None:
    torch.set_num_threads(1)
    torch.manual_seed(42)
    tokenizer = CharTokenizer.from_characters(TEXT + SENTENCE)
    config = ModelConfig.from_shape(
        "modern", vocab_size=tokenizer.vocab_size, context_length=48, n_layer=2, n_head=4,
        n_kv_head=2, n_embd=36, head_dim=10, n_hidden=52,
    )  # fmt: skip
    model = GPT(config)
    train(model, torch.tensor(tokenizer.encode(TEXT)))
    weights = {name: model.state_dict()[name].numpy() for name in config.weight_shapes}
    save_model(FOLDER / "modern", Checkpoint(config, weights, tokenizer, {"step": STEPS}))
    expected = compute()
    (FOLDER / "expected.json").write_text(json.dumps(expected, indent=2) + "\n")
    print(json.dumps(expected, indent=2))


def train(model: GPT, ids: torch.Tensor) -> None:
    T = model.config.context_length
    optimizer = torch.optim.AdamW(model.parameters(), weight_decay=0.0, betas=(0.9, 0.95))
    generator = torch.Generator().manual_seed(7)
    for step in range(STEPS):
        for group in optimizer.param_groups:
            group["lr"] = 0.02 * min(1.0, (step + 1) / 5) * (1 - 0.9 * step / STEPS)
        starts = torch.randint(len(ids) - T, (ROWS, 1), generator=generator)
        rows = ids[starts + torch.arange(T + 1)]
        loss = F.cross_entropy(model(rows[:, :-1]).flatten(0, 1), rows[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        if step % 10 == 9:
            print(f"step {step + 1}: loss {loss.item():.3f}")


def compute() -> dict[str, object]:
    """What the saved checkpoint gives, by the paths that people use."""
    model = glassgpt.load(str(FOLDER / "modern"))
    model.device = "cpu"
    ids = np.array(model.tokenizer.encode(SENTENCE[: model.config.context_length]))
    with torch.inference_mode():
        logits = model.model(torch.from_numpy(ids[None]))[0]
    return {
        "sentence": SENTENCE,
        "loss": F.cross_entropy(logits[:-1], torch.from_numpy(ids[1:])).item(),
        "prompt": PROMPT,
        "greedy": model.generate(PROMPT, max_new_tokens=60, temperature=0).text,
        "sampled": model.generate(PROMPT, max_new_tokens=60, temperature=1.1, seed=7).text,
    }


if __name__ == "__main__":
    main()
