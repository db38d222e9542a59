"""Record what must not change in a refactor, then compare: losses, texts, help.

    python tests/golden/record.py before.json
    ... change the code ...
    python tests/golden/record.py after.json --against before.json

Six trainings with a fixed seed (every logged loss and a hash of every kept tensor), the texts of
the golden model, and the `--help` of every verb, all through the command line, so that the script
outlives any change of modules. Figures are compared bit for bit, so both records must come from one
machine. It takes about two minutes on two cores.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
from safetensors.numpy import load_file

GOLDEN = Path(__file__).parent / "modern"
VERBS = "demo prepare train finetune plan sample chat eval plot trace export explore bench"
GROUPS = {"bench": ["decode", "train"], "trace": ["ops", "lens", "attribution", "loss", "patch"]}
COMMON = (
    "--max-steps 40 --eval-interval 10 --log-interval 1 --batch-tokens 512 --seed 3 --threads 2"
)
SHAPE = "--n-layer 2 --n-head 4 --n-embd 32 --context-length 64"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("out", type=Path, help="file to write the record to")
    parser.add_argument("--against", type=Path, help="an earlier record to compare with")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as work:
        record = trainings(Path(work)) | texts(Path(work)) | helps()
    options.out.write_text(json.dumps(record, indent=1, sort_keys=True) + "\n")
    if options.against is None:
        print(f"{len(record)} figures recorded")
        return 0
    before = json.loads(options.against.read_text())
    changed = sorted(n for n in before.keys() | record.keys() if before.get(n) != record.get(n))
    print(f"{len(before)} figures compared, {len(changed)} differ", *changed, sep="\n  ")
    return bool(changed)


def run(command: str, *more: str, launcher: tuple[str, ...] = ("-m", "glassgpt")) -> str:
    """What `glassgpt COMMAND` prints on stdout."""
    words = [sys.executable, *launcher, *command.split(), *more]
    environment = os.environ | {"COLUMNS": "80", "HF_HUB_OFFLINE": "1", "NO_COLOR": "1"}
    done = subprocess.run(words, capture_output=True, text=True, env=environment)
    if done.returncode:
        raise SystemExit(f"{' '.join(words)}\n{done.stderr}")
    return done.stdout


def trainings(work: Path) -> dict[str, str]:
    text, chats, labels = write_data(work)
    two = ("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "glassgpt")
    runs = {
        "modern": (f"train {text} {SHAPE}", None),
        "gpt2": (f"train {text} {SHAPE} --shape gpt2 --dropout 0.1 --optimizer adamw", None),
        "lora": (f"finetune {work}/modern {text} --lora-rank 4", None),
        "chat": (f"finetune {work}/modern {chats}", None),
        "labels": (f"finetune {work}/modern {labels}", None),
        "torchrun": (f"train {text} {SHAPE}", two),
    }
    found = {}
    for name, (command, launcher) in runs.items():
        patience = " --patience 100" if "finetune" in command else ""
        command += f" {COMMON}{patience} --out {work}/{name}"
        run(command, **({"launcher": launcher} if launcher else {}))
        found |= losses(work / name, name)
    return found


def losses(folder: Path, name: str) -> dict[str, str]:
    """Every loss that the run logged, and a hash of each tensor that it kept."""
    found = {}
    for number, line in enumerate((folder / "metrics.jsonl").read_text().splitlines()):
        for key, value in json.loads(line).items():
            if "loss" in key or key in ("accuracy", "macro_f1", "grad_norm", "learning_rate"):
                found[f"{name} {number} {key}"] = repr(value)
    for key, value in load_file(folder / "model.safetensors").items():
        found[f"{name} {key}"] = hashlib.sha256(np.ascontiguousarray(value).tobytes()).hexdigest()
    return found


def texts(work: Path) -> dict[str, str]:
    found = {}
    for engine in ("torch", "numpy", "numba"):
        for how in ("--temperature 0", "--temperature 1.1 --seed 7", "--top-k 5 --seed 2"):
            command = f"sample {GOLDEN} --max-new-tokens 60 --engine {engine} {how} --prompt"
            found[f"text {engine} {how}"] = run(command, "The ")
    for weights in ("int8", "int4"):
        command = (
            f"sample {GOLDEN} --max-new-tokens 60 --weights {weights} --temperature 0 --prompt"
        )
        found[f"text {weights}"] = run(command, "The ")
    found["text trace"] = run(f"trace ops {GOLDEN}", "The ")
    return found


def helps() -> dict[str, str]:
    found = {"help": run("--help")}
    for verb in VERBS.split(" "):
        found[f"help {verb}"] = run(f"{verb} --help")
        for group in GROUPS.get(verb, []):
            found[f"help {verb} {group}"] = run(f"{verb} {group} --help")
    return found


def write_data(work: Path) -> tuple[Path, Path, Path]:
    """A text, conversations and labelled texts, the same every time."""
    text, chats, labels = work / "text.txt", work / "chats.jsonl", work / "labels.jsonl"
    words = "the a one two red blue house tree river walks sings under over my cat and then"
    vocabulary, state, written = words.split(" "), 1, []
    for _ in range(12_000):
        state = (state * 1_103_515_245 + 12_345) % 2**31
        written.append(vocabulary[state // 65_536 % len(vocabulary)])
    text.write_text("\n".join(" ".join(written[i : i + 9]) for i in range(0, len(written), 9)))
    with chats.open("w") as chat_file, labels.open("w") as label_file:
        for i in range(0, 3_000, 10):
            question, answer = " ".join(written[i : i + 6]), " ".join(written[i + 6 : i + 9])
            turns = [("user", question), ("assistant", answer)]
            messages = [{"role": role, "content": content} for role, content in turns]
            chat_file.write(json.dumps({"messages": messages}) + "\n")
            label = "red" if "red" in question else "other"
            label_file.write(json.dumps({"text": question, "label": label}) + "\n")
    return text, chats, labels


if __name__ == "__main__":
    raise SystemExit(main())
