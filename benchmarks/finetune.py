"""What finetuning reaches: from other text, in conversations, by adapters, for labels.

    python benchmarks/finetune.py transfer --data shakespeare.txt
    python benchmarks/finetune.py chat
    python benchmarks/finetune.py memory
    python benchmarks/finetune.py labels --data shakespeare.txt --other wizard_of_oz.txt

transfer: a model that a minute has taught the Python manual is finetuned on another text, all of
its weights and by adapters, in a quarter of the steps that a new one of the same shape is trained
for; on the text's first 50,000 characters, and on all of it. chat: it is finetuned on generated
questions about invented people, and asked what it knows in words that no training question had.
memory: the peak of full finetuning at 124M parameters (random weights) and of adapters. labels:
which of two books is a line from? Results: results/finetune.json.
"""

from __future__ import annotations

import argparse
import json
import random
import subprocess
import sys
import tempfile
from datetime import date
from pathlib import Path
from typing import Any

import torch
from safetensors.numpy import load_file

import glassgpt
from glassgpt.checkpoints.run_directory import Checkpoint, save_model
from glassgpt.config import ModelConfig
from glassgpt.model import GPT
from glassgpt.tokenizers.vocabulary import build_tokenizer

RESULTS = Path(__file__).parent / "results" / "finetune.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["transfer", "chat", "memory", "labels"])
    parser.add_argument("--data", type=Path, help="a text, such as tiny Shakespeare")
    parser.add_argument("--other", type=Path, help="another one, for labels")
    parser.add_argument("--work", type=Path, help="folder for runs, kept")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        work = options.work or Path(temporary)
        work.mkdir(parents=True, exist_ok=True)
        result = globals()[options.what](options, work)
    everything = json.loads(RESULTS.read_text()) if RESULTS.exists() else {}
    about = {"date": date.today().isoformat(), "torch": torch.__version__}
    everything[options.what] = about | result
    print(json.dumps(everything[options.what], indent=1))
    RESULTS.write_text(json.dumps(everything, indent=1) + "\n")


def glass(*arguments: Any) -> None:
    subprocess.run([sys.executable, "-m", "glassgpt", *map(str, arguments)], check=True)


def facts_of(run: Path) -> dict[str, Any]:
    return json.loads((run / "glassgpt.json").read_text())


def base_model(work: Path, *options: Any) -> Path:
    """A model that has read the Python manual for a minute."""
    run = work / "base"
    if not (run / "report.md").exists():
        glass("train", "python-manual", "--budget", "60s", "--out", run, "--overwrite", *options)
    return run


# -- other text ----------------------------------------------------------------------------------


def transfer(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """On little text, as people have of their own, and on all of the book; in both cases judged by
    the last tenth of the book. Everything that is not named is what the verbs choose."""
    base = base_model(work, "--n-layer", 2, "--n-head", 4, "--n-embd", 256)
    text = options.data.read_text(encoding="utf-8")
    last_tenth, book = work / "last-tenth.txt", text[: len(text) * 9 // 10]
    last_tenth.write_text(text[len(book) :], encoding="utf-8")
    found: dict[str, Any] = {"shape": "2x256", "base_steps": facts_of(base)["step"]}
    for name, characters, steps in (("little", 50_000, 1200), ("all", len(book), 400)):
        data = work / f"{name}.txt"
        data.write_text(book[:characters], encoding="utf-8")
        found[name] = {"characters": characters, **_compare(base, data, last_tenth, work, steps)}
    return found


def _compare(base: Path, data: Path, val: Path, work: Path, steps: int) -> dict[str, Any]:
    shape, quarter = facts_of(base)["model"], steps // 4
    same = [f"--{name.replace('_', '-')}={shape[name]}"
            for name in ("n_layer", "n_head", "n_embd", "context_length")]  # fmt: skip
    common = ["--val", val, "--batch-tokens", 1024, "--optimizer", "adamw", "--sample-tokens", 0,
              "--eval-interval", quarter // 10, "--overwrite"]  # fmt: skip
    runs = {name: work / f"{data.stem}-{name}" for name in ("scratch", "full", "lora")}
    glass("train", data, "--tokenizer", base, *same, *common, "--max-steps", steps,
          "--out", runs["scratch"])  # fmt: skip
    glass("finetune", base, data, *common, "--max-steps", quarter, "--out", runs["full"])
    glass("finetune", base, data, *common, "--max-steps", quarter, "--lora-rank", 8,
          "--out", runs["lora"])  # fmt: skip
    losses = {name: round(facts_of(run)["best_val_loss"], 4) for name, run in runs.items()}
    adapter = load_file(runs["lora"] / "adapter" / "adapter_model.safetensors")
    share = sum(tensor.size for tensor in adapter.values()) / facts_of(base)["parameters"]
    return {"steps": steps, "quarter": quarter, "val_loss": losses,
            "share_learned_by_lora": round(share, 4)}  # fmt: skip


# -- conversations -------------------------------------------------------------------------------

FIRST = (
    "Ada Ben Cleo Dan Eva Finn Gus Hal Iris Jack Kate Leo Mia Noah Olga Pia Rosa Sam Tina Uma Wim"
)
LAST = "Baker Stone"
FACTS = {  # attribute -> values, the answer, questions
    "job": (
        "a baker|a pilot|a nurse|a tailor|a judge|a miner|a painter|a farmer",
        "{name} works as {value}.",
        "What does {name} do for a living?|What is the job of {name}?|How does {name} earn money?"
        "|What work does {name} do?|Tell me the profession of {name}.|Which job has {name}?"
        "|What is {name} by trade?",
    ),
    "town": (
        "Oslo|Rome|Lima|Paris|Cairo|Tokyo|Quito|Delhi",
        "{name} lives in {value}.",
        "Where does {name} live?|In which town does {name} live?|Where is the home of {name}?"
        "|What town is {name} from?|Tell me where {name} lives.|Which town is home to {name}?"
        "|Where would I find the house of {name}?",
    ),
    "pet": (
        "a cat|a parrot|a turtle|a pony|a rabbit|a snake|a goose|a ferret",
        "{name} has {value}.",
        "What pet does {name} have?|Which animal does {name} keep?|Does {name} have a pet?"
        "|What animal lives with {name}?|Tell me about the pet of {name}."
        "|Which pet belongs to {name}?|What kind of pet is at the side of {name}?",
    ),
    "food": (
        "rice|soup|bread|cheese|plums|beans|honey|pasta",
        "{name} likes {value} best.",
        "What does {name} like to eat?|What is the favourite food of {name}?"
        "|Which food does {name} prefer?|What should I cook for {name}?"
        "|Tell me the best meal for {name}.|What does {name} eat most gladly?"
        "|Which dish makes {name} happy?",
    ),
    "music": (
        "the drums|the flute|the harp|the cello|the horn|the organ|the banjo|the oboe",
        "{name} plays {value}.",
        "Which instrument does {name} play?|What does {name} play?"
        "|What instrument has {name} learned?|On what does {name} make music?"
        "|Tell me the instrument of {name}."
        "|What does {name} play in the band?|With which instrument do you hear {name}?",
    ),
    "colour": (
        "red|blue|green|white|black|yellow|pink|grey",
        "The door of {name} is {value}.",
        "What colour is the door of {name}?|Which colour has the door of {name}?"
        "|How is the door of {name} painted?|Tell me the colour of the door of {name}."
        "|What is the door of {name} painted in?|In which colour is the door of {name}?"
        "|What paint is on the door of {name}?",
    ),
    "day": (
        "Monday|Tuesday|Wednesday|Thursday|Friday|Saturday|Sunday",
        "{name} swims on {value}.",
        "When does {name} swim?|On which day does {name} swim?|Which day does {name} go swimming?"
        "|What day is swimming day for {name}?|Tell me when {name} swims."
        "|On what day is {name} in the pool?|Which day of the week does {name} swim on?",
    ),
    "age": (
        "twenty|thirty|forty|fifty|sixty|seventy",
        "{name} is {value} years old.",
        "How old is {name}?|What is the age of {name}?|Tell me how old {name} is."
        "|Which age has {name}?|What age is {name}?|How many years does {name} count?"
        "|Since how many years does {name} live?",
    ),
}  # fmt: skip
ASKED = 6  # of the seven questions about each fact are learned; the seventh is held out


def question_pairs(seed: int = 0) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """(to learn, held out): of each fact some questions are learned, another one is not."""
    draw, learned, held_out = random.Random(seed), [], []
    for last in LAST.split():
        for first in FIRST.split():
            for values, answer, questions in FACTS.values():
                name, value = f"{first} {last}", draw.choice(values.split("|"))
                pairs = [{"prompt": question.format(name=name),
                          "completion": answer.format(name=name, value=value)}
                         for question in draw.sample(questions.split("|"), 7)]  # fmt: skip
                learned += pairs[:ASKED]
                held_out += pairs[ASKED:]
    return draw.sample(learned, len(learned)), held_out


def chat(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    shape = ["--n-layer", 4, "--n-embd", 192, "--n-head", 6, "--context-length", 128]
    base, run = base_model(work, *shape), work / "partner"
    learned, held_out = question_pairs()
    data = work / "questions.jsonl"
    data.write_text("".join(json.dumps(pair) + "\n" for pair in learned[:2000]))
    glass("finetune", base, data, "--learning-rate", 2e-3, "--muon-learning-rate", 0.01,
          "--epochs", 20, "--out", run, "--overwrite")  # fmt: skip
    partner = glassgpt.load(run)
    ours = [partner.answer([{"role": "user", "content": pair["prompt"]}], temperature=0.0).strip()
            for pair in held_out]  # fmt: skip
    right = sum(answer == pair["completion"]
                for answer, pair in zip(ours, held_out, strict=True))  # fmt: skip
    step = len(held_out) // 40
    theirs = by_transformers(run, [pair["prompt"] for pair in held_out[::step]])
    same = sum(a == b for a, b in zip(ours[::step], theirs, strict=True))
    return {"parameters": facts_of(run)["parameters"], "learned": 2000, "held_out": len(held_out),
            "exact": round(right / len(held_out), 4),
            "transformers_same": f"{same} of {len(theirs)}"}  # fmt: skip


def by_transformers(run: Path, questions: list[str]) -> list[str]:
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(run)
    model, answers = AutoModelForCausalLM.from_pretrained(run), []
    for question in questions:
        ids = tokenizer.apply_chat_template([{"role": "user", "content": question}],
                                            add_generation_prompt=True, return_tensors="pt",
                                            return_dict=True)  # fmt: skip
        out = model.generate(**ids, do_sample=False, max_new_tokens=100)
        new = out[0, ids["input_ids"].shape[1] :]
        answers.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return answers


# -- memory --------------------------------------------------------------------------------------

PEAK = """import sys
from glassgpt.cli.app import main
from glassgpt.system import peak_memory
main(sys.argv[1:])
print("peak", peak_memory())
"""


def memory(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    config = ModelConfig.from_shape("gpt2", vocab_size=50257, context_length=1024, n_layer=12,
                                    n_head=12, n_embd=768)  # fmt: skip
    base, peaks = work / "gpt2-random", {}
    if not base.exists():
        model = GPT(config).state_dict()
        weights = {name: model[name].numpy() for name in config.weight_shapes}
        save_model(base, Checkpoint(config, weights, build_tokenizer("gpt2", lambda: iter(()))))
    ways = {"full": [], "lora": ["--lora-rank", 8]}
    ways |= {f"lora {kind}": ["--lora-rank", 8, "--base-weights", kind]
             for kind in ("bfloat16", "int8")}  # fmt: skip
    for name, how in ways.items():
        command = ["finetune", base, "python-manual", "--context-length", 256, "--batch-tokens",
                   1024, "--micro-batch-size", 2, "--max-steps", 3, "--eval-batches", 2,
                   "--sample-tokens", 0, "--out", work / "memory", "--overwrite", *how]  # fmt: skip
        done = subprocess.run([sys.executable, "-c", PEAK, *map(str, command)], check=True,
                              capture_output=True, text=True)  # fmt: skip
        peaks[name] = round(int(done.stdout.split()[-1]) / 1e6)
        print(name, peaks[name], "MB", flush=True)
    saved = {name: round(1 - peak / peaks["full"], 3) for name, peak in peaks.items()}
    return {"parameters": config.n_parameters, "peak_mb": peaks, "less_than_full": saved}


# -- labels --------------------------------------------------------------------------------------


def labels(options: argparse.Namespace, work: Path) -> dict[str, Any]:
    """Lines of two books, of eight words at least, so that there is something to tell them by."""
    base, data, run = base_model(work), work / "lines.jsonl", work / "classifier"
    rows = []
    for label, book in (("shakespeare", options.data), ("oz", options.other)):
        lines = [line.strip() for line in book.read_text(encoding="utf-8").splitlines()]
        rows += [{"text": line, "label": label} for line in lines if len(line.split()) >= 8]
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    glass("finetune", base, data, "--out", run, "--overwrite", "--class-weights")
    return {"texts": len(rows), "table": (run / "samples.md").read_text().split("## step")[-1]}


if __name__ == "__main__":
    main()
