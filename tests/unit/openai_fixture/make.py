"""Make the files beside this script, with TensorFlow itself: `python make.py` (needs tensorflow).

A GPT-2 of two tiny layers with random weights, saved by the Saver that OpenAI used, in the layout
of its release; and the same tensors once more in `sharded/`, spread over two data files. The tests
draw the same numbers again from SEED and never run this script's `main`; it runs again only when
the fixture is to change.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

FOLDER = Path(__file__).parent
HPARAMS = {"n_vocab": 261, "n_ctx": 16, "n_embd": 12, "n_head": 3, "n_layer": 2}
SEED = 5
MERGES = ["t h", "th e", "Ġ the", "Ġ a"]  # Ġ stands for the blank


def tensors() -> dict[str, np.ndarray]:
    """Every tensor of the release by its name there, drawn in this order."""
    V, T, C, L = (HPARAMS[name] for name in ("n_vocab", "n_ctx", "n_embd", "n_layer"))
    shapes = {"wte": (V, C), "wpe": (T, C), "ln_f/g": (C,), "ln_f/b": (C,)}
    for layer in range(L):
        for norm in ("ln_1", "ln_2"):
            shapes |= {f"h{layer}/{norm}/g": (C,), f"h{layer}/{norm}/b": (C,)}
        for part, n_in, n_out in (("attn/c_attn", C, 3 * C), ("attn/c_proj", C, C),
                                  ("mlp/c_fc", C, 4 * C), ("mlp/c_proj", 4 * C, C)):  # fmt: skip
            shapes[f"h{layer}/{part}/w"] = (1, n_in, n_out)
            shapes[f"h{layer}/{part}/b"] = (n_out,)
    rng = np.random.default_rng(SEED)
    return {
        f"model/{name}": rng.normal(0, 0.3, shape).astype(np.float32)
        for name, shape in shapes.items()
    }


def vocabulary() -> tuple[dict[str, int], str]:
    """encoder.json and vocab.bpe: 256 bytes in the release's order, the merges, the separator."""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    tokens = [chr(byte) for byte in printable]
    tokens += [chr(256 + i) for i in range(256 - len(printable))]
    tokens += [merge.replace(" ", "") for merge in MERGES] + ["<|endoftext|>"]
    encoder = {token: i for i, token in enumerate(tokens)}
    return encoder, "\n".join(["#version: 0.2", *MERGES, ""])


def save(folder: Path, devices: int) -> None:
    import tensorflow as tf

    tf1 = tf.compat.v1
    with tf.Graph().as_default():
        variables = []
        for i, (name, value) in enumerate(tensors().items()):
            with tf.device(f"/cpu:{i // 2 % devices}"):
                variables.append(tf1.get_variable(name, initializer=value, use_resource=False))
        saver = tf1.train.Saver(variables, sharded=devices > 1, save_relative_paths=True)
        with tf1.Session(config=tf1.ConfigProto(device_count={"CPU": devices})) as session:
            session.run(tf1.global_variables_initializer())
            saver.save(session, str(folder / "model.ckpt"), write_meta_graph=False)


def main() -> None:
    save(FOLDER, devices=1)
    (FOLDER / "sharded").mkdir(exist_ok=True)
    save(FOLDER / "sharded", devices=2)
    encoder, merges = vocabulary()
    (FOLDER / "hparams.json").write_text(json.dumps(HPARAMS) + "\n")
    (FOLDER / "encoder.json").write_text(json.dumps(encoder) + "\n")
    (FOLDER / "vocab.bpe").write_text(merges, encoding="utf-8")


if __name__ == "__main__":
    main()
