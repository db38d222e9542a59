"""Finetuning: text, conversations, labels; whole models, parts of them, adapters; errors."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import glassgpt
from conftest import refuse, tiny_config, tiny_model, weights_of
from glassgpt.checkpoints import run_directory as ckpt
from glassgpt.checkpoints.load import load_pretrained
from glassgpt.config import ModelConfig
from glassgpt.errors import UserError
from glassgpt.finetuning.run import finetune
from glassgpt.reporting.run_log import read_metrics
from glassgpt.tokenizers.tokenizer import CharTokenizer, byte_tokenizer, train_bpe
from glassgpt.training.run import train
from listener import Listener

LETTERS = "\n !#:?.abcdefghijklmnopqrstuvwxyzSUAysertiant"
FAST = dict(max_steps=6, eval_interval=2, log_interval=1, batch_tokens=80, sample_tokens=6,
            learning_rate=1e-2, patience=None)  # fmt: skip
ANIMALS = ["cat", "dog", "fox", "owl", "hen", "pig", "cow", "ant", "bee", "emu"]
SOUNDS = {"cat": "miau", "dog": "wow", "fox": "yap", "owl": "hoo", "hen": "puk", "pig": "oink",
          "cow": "moo", "ant": "hush", "bee": "sum", "emu": "boom"}  # fmt: skip


def configs(vocab_size: int) -> dict[str, ModelConfig]:
    common = dict(vocab_size=vocab_size, context_length=40)
    return {
        "gpt2": tiny_config("gpt2", **common),
        "modern": tiny_config(n_kv_head=6, **common),
        "llama": tiny_config(qk_norm=False, tie_embeddings=False, **common),
        "qwen3": tiny_config(**common),
    }


@pytest.fixture(scope="module")
def bases(tmp_path_factory) -> Callable[..., Path]:
    """A folder with a tiny random model of that shape, and that kind of tokenizer."""
    folder = tmp_path_factory.mktemp("bases")
    made: dict[tuple, Path] = {}

    def base(shape: str = "modern", kind: str = "char") -> Path:
        if (shape, kind) not in made:
            tokenizer = {
                "char": lambda: CharTokenizer.from_characters(LETTERS),
                "byte": byte_tokenizer,
                "bpe": lambda: train_bpe(["the cat says miau. " * 50], 300),
            }[kind]()
            config = configs(tokenizer.vocab_size)[shape]
            weights = weights_of(tiny_model(config))
            made[shape, kind] = folder / f"{shape}-{kind}"
            ckpt.save_model(made[shape, kind], ckpt.Checkpoint(config, weights, tokenizer))
        return made[shape, kind]

    return base


@pytest.fixture(scope="module")
def files(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("files")
    found = {name: folder / name for name in ("text.txt", "chats.jsonl", "labels.csv")}
    found["text.txt"].write_text("\n".join(f"the {a} says {s}" for a, s in SOUNDS.items()) * 9)
    pairs = [{"prompt": f"{a}?", "completion": f"{s}!"} for a, s in SOUNDS.items()]
    found["chats.jsonl"].write_text("".join(json.dumps(pair) + "\n" for pair in pairs))
    rows = [f"{a} {word},{'long' if len(a + word) > 5 else 'short'}\n"
            for a in ANIMALS for word in ("a", "runs")]  # fmt: skip
    found["labels.csv"].write_text("text,label\n" + "".join(rows))
    return {path.name.split(".")[0]: path for path in found.values()}


def losses(run: Path) -> list[tuple]:
    rows = read_metrics(run / "metrics.jsonl")
    return [(r["step"], r.get("train_loss"), r.get("val_loss"), r.get("keep_loss")) for r in rows]


WHAT = ("text", "chats", "labels")
WAYS: dict[str, dict[str, Any]] = {
    "full": {},
    "adamw": {"optimizer": "adamw"},
    "lora": {"lora_rank": 2},
    "int8": {"lora_rank": 2, "base_weights": "int8", "lora_targets": ("qkv", "up")},
    "dropout": {"lora_rank": 2, "lora_dropout": 0.3, "dropout": 0.1},
    "frozen": {"freeze": "1", "layer_decay": 0.7},
}


@pytest.mark.slow
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("what", WHAT)
def test_resumed_is_uninterrupted(bases, files, tmp_path, what, way) -> None:
    options = {**FAST, **WAYS[way], "max_steps": 6}
    whole = finetune(bases(), files[what], out=tmp_path / "whole", **options)
    part = {**options, "max_steps": 4, "decay_steps": 6}
    finetune(bases(), files[what], out=tmp_path / "part", **part)
    resumed = finetune(resume=tmp_path / "part", max_steps=6)
    assert (whole.step, resumed.step) == (6, 6)
    assert losses(tmp_path / "whole") == losses(tmp_path / "part")
    a, b = (ckpt.load_model(tmp_path / name) for name in ("whole", "part"))
    assert a.weights.keys() == b.weights.keys()
    assert all(np.array_equal(a.weights[name], b.weights[name]) for name in a.weights)


@pytest.mark.slow
@pytest.mark.parametrize(("shape", "kind", "lora_rank"), [
    ("gpt2", "byte", None), ("gpt2", "char", 2), ("modern", "char", None), ("modern", "bpe", 2),
    ("llama", "bpe", None), ("llama", "byte", 2), ("qwen3", "char", 2),
])  # fmt: skip
@pytest.mark.parametrize("what", WHAT)
def test_every_shape_and_tokenizer_learns(bases, files, tmp_path, what, shape, kind, lora_rank):
    run = tmp_path / "run"
    result = finetune(bases(shape, kind), files[what], out=run, lora_rank=lora_rank, threads=1,
                      **{**FAST, "max_steps": 20, "eval_interval": 10})  # fmt: skip
    assert result.best_val_loss < result.first_val_loss - 0.02
    again = load_pretrained(run)
    assert again.config.family == configs(9)[shape].family
    assert bool(again.labels) is (what == "labels")
    assert (again.chat_template is not None) is (what == "chats")


@pytest.mark.slow
def test_frozen_parts_stay_bit_for_bit(bases, files, tmp_path) -> None:
    base = load_pretrained(bases("llama")).weights
    expected = {
        "embeddings": {"token_embedding"},
        "1": {"token_embedding", "blocks.0"},
        "body": {"token_embedding", "blocks.0", "blocks.1", "final_norm"},
    }
    for what, frozen in expected.items():
        run = finetune(bases("llama"), files["text"], out=tmp_path / what, freeze=what, **FAST).run
        for name, array in load_pretrained(run / "checkpoints/last").weights.items():
            part = ".".join(name.split(".")[: 2 if name.startswith("blocks") else 1])
            assert np.array_equal(array, base[name]) is (part in frozen), (what, name)


def test_an_adapter_leaves_the_base_and_is_kept_beside_the_sum(bases, files, tmp_path) -> None:
    run = finetune(bases("gpt2", "byte"), files["text"], out=tmp_path / "run", lora_rank=3,
                   **FAST).run  # fmt: skip
    about = json.loads((run / "adapter/adapter_config.json").read_text())
    assert (about["r"], about["base_model_name_or_path"]) == (3, str(bases("gpt2", "byte")))
    base, tuned, loaded = map(load_pretrained, (bases("gpt2", "byte"), run, run / "adapter"))
    for name, array in tuned.weights.items():
        np.testing.assert_allclose(array, loaded.weights[name], atol=1e-6)
        matrix = re.search(r"attn\.(qkv|out)\.weight|mlp\.(up|down)\.weight", name)
        assert np.array_equal(array, base.weights[name]) is (matrix is None), name
    assert not (run / "checkpoints/last/model.safetensors").exists()  # 124M would be 500 MB


def test_new_tokens_begin_as_the_mean_of_all(bases, files, tmp_path) -> None:
    run = finetune(bases(), files["chats"], out=tmp_path / "run", **{**FAST, "max_steps": 1,
                   "learning_rate": 1e-30, "muon_learning_rate": 1e-30}).run  # fmt: skip
    old, new = load_pretrained(bases()), load_pretrained(run)
    n = old.tokenizer.vocab_size
    assert new.tokenizer.vocab_size > n
    assert new.config.vocab_size == new.tokenizer.vocab_size
    table = new.weights["token_embedding.weight"]
    before = old.weights["token_embedding.weight"]
    np.testing.assert_allclose(table[:n], before, atol=1e-6)
    np.testing.assert_allclose(table[n:], [before.mean(axis=0)] * (len(table) - n), atol=1e-6)


@pytest.mark.slow
def test_what_is_kept_is_watched_and_replayed(bases, files, tmp_path) -> None:
    listener, known = Listener(), tmp_path / "known.txt"
    known.write_text("wow moo oink hush boom " * 60)
    for what in ("text", "chats"):
        run = finetune(bases(), files[what], out=tmp_path / what, keep=str(known), replay=0.5,
                       reporter=listener, **{**FAST, "max_steps": 60}).run  # fmt: skip
        kept = [
            row["keep_loss"] for row in read_metrics(run / "metrics.jsonl") if "keep_loss" in row
        ]
        assert len(kept) == 31
        assert kept[-1] < kept[0] - 0.3  # half of what it sees
        assert "loss on the text to keep" in (run / "report.md").read_text()
    assert any("keep loss" in line for line in listener.said)


@pytest.mark.slow
def test_defaults_follow_the_base(files, tmp_path) -> None:
    base = train(str(files["text"]), out=tmp_path / "base", n_layer=1, n_embd=8, n_head=2,
                 context_length=10, max_steps=2, batch_tokens=40, learning_rate=0.02,
                 muon_learning_rate=0.04, sample_tokens=0).run  # fmt: skip
    for rank, share in ((None, 0.1), (2, 1.0)):
        run = finetune(base, files["text"], out=tmp_path / f"{rank}", epochs=2, lora_rank=rank,
                       sample_tokens=0).run  # fmt: skip
        trained = json.loads((run / "glassgpt.json").read_text())["train"]
        assert trained["learning_rate"] == pytest.approx(0.02 * share)
        assert trained["patience"] == 3
        assert trained["optimizer"] == ("muon" if rank is None else "adamw")
        meta = read_metrics(run / "metrics.jsonl")
        assert trained["max_steps"] >= meta[-1]["step"] > 0


@pytest.mark.slow
def test_answers_and_judgements_are_shown(bases, files, tmp_path) -> None:
    run = finetune(bases(), files["chats"], out=tmp_path / "chats", **FAST).run
    shown = (run / "samples.md").read_text()
    assert shown.count("## step") == 4  # before, twice on the way, at the end
    assert re.search(r"user: \w{3}\?\nassistant: .*\n\(wanted: \w+!\)", shown)
    asked = [{"role": "user", "content": "cat?"}]
    told = glassgpt.load(run).answer(asked, temperature=0, max_new_tokens=5)
    assert isinstance(told, str)
    with pytest.raises(UserError, match="finetune it on conversations"):
        glassgpt.load(bases()).answer(asked)
    run = finetune(bases(), files["labels"], out=tmp_path / "labels", **FAST).run
    assert "macro F1" in (run / "samples.md").read_text()
    assert (run / "confusion.png").stat().st_size > 1000


def test_the_data_report(bases, tmp_path) -> None:
    listener, data = Listener(), tmp_path / "chats.jsonl"
    rows = [{"messages": [{"role": "user", "content": f"say {n}"},
                          {"role": "assistant", "content": "yes"}]}
            for n in ("a", "b", "c", "d", "d", "e", "f", "g")]  # fmt: skip
    rows.append({"messages": [{"role": "user", "content": "what? " * 30},
                              {"role": "assistant", "content": "no"}]})  # fmt: skip
    rows.append({"messages": [{"role": "user", "content": "nothing said"}]})
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    finetune(bases(kind="byte"), data, val=str(data), out=tmp_path / "run", reporter=listener,
             **{**FAST, "context_length": 40})  # fmt: skip
    said = "\n".join(listener.said)
    for part in ("messages, 9 conversations", "of 40 that fit", "1 longer than that",
                 "1 exchanges left out", "nothing to learn in 1 conversations", "1 duplicates",
                 "of 9 to judge by 9 are also learned", "with loss", "left out"):  # fmt: skip
        assert part in said, said


@pytest.mark.slow
def test_a_rate_is_made_gentle_once(files, tmp_path) -> None:
    """Of adapters and of whole models, however often one is finetuned after the other."""
    how = dict(max_steps=2, batch_tokens=40, sample_tokens=0)
    base: Any = train(str(files["text"]), out=tmp_path / "base", n_layer=1, n_embd=8, n_head=2,
                      context_length=10, learning_rate=0.02, **how).run  # fmt: skip
    for number, (rank, share) in enumerate([(None, 0.1), (2, 1.0), (None, 0.1), (None, 0.1)]):
        out = tmp_path / str(number)
        base = finetune(base, files["text"], out=out, lora_rank=rank, **how).run
        found = json.loads((base / "glassgpt.json").read_text())["train"]
        assert found["learning_rate"] == pytest.approx(0.02 * share), number
    begun = train(str(files["text"]), init_from=tmp_path / "base", out=tmp_path / "begun",
                  **how).run  # fmt: skip
    run = finetune(begun, files["text"], out=tmp_path / "last", **how).run
    rates = [json.loads((r / "glassgpt.json").read_text())["train"]["learning_rate"]
             for r in (begun, run)]  # fmt: skip
    assert rates[0] == pytest.approx(rates[1])


@pytest.mark.slow
def test_an_adapter_goes_on_with_its_own_base_alone(files, tmp_path, capsys) -> None:
    tokenizer = CharTokenizer.from_characters(LETTERS)
    config = tiny_config(vocab_size=tokenizer.vocab_size, context_length=40)
    weights = weights_of(tiny_model(config))

    def save(change: float) -> None:
        changed = {name: weight + np.float32(change) for name, weight in weights.items()}
        ckpt.save_model(tmp_path / "base", ckpt.Checkpoint(config, changed, tokenizer))

    save(0.0)
    run = finetune(tmp_path / "base", files["text"], out=tmp_path / "run", lora_rank=2, **FAST).run
    save(1e-3)
    said = refuse(capsys, "finetune", "--resume", run, "--max-steps", 8)
    assert "base has changed since" in said
    save(0.0)
    assert finetune(resume=run, max_steps=8).step == 8


@pytest.mark.slow
def test_an_adapter_alone_is_a_chat_partner_too(bases, files, tmp_path) -> None:
    run = finetune(
        bases(kind="byte"), files["chats"], out=tmp_path / "run", lora_rank=2, **FAST
    ).run
    asked = [{"role": "user", "content": "cat?"}]
    answers = [glassgpt.load(folder).answer(asked, temperature=0, max_new_tokens=5)
               for folder in (run, run / "adapter")]  # fmt: skip
    assert answers[0] == answers[1]
    assert load_pretrained(bases(kind="byte")).chat_template is None


@pytest.mark.slow
def test_other_text_to_keep_is_other_data(bases, files, tmp_path, capsys) -> None:
    keep = tmp_path / "keep.txt"
    keep.write_text("the dog says wow\n" * 40)
    run = finetune(bases(), files["text"], out=tmp_path / "run", keep=str(keep), replay=0.5,
                   **FAST).run  # fmt: skip
    keep.write_text("the cat says miau\n" * 40)
    assert "changed" in refuse(capsys, "finetune", "--resume", run, "--max-steps", 8)


@pytest.mark.slow
def test_what_is_read_otherwise_than_it_was_written_is_said(bases, tmp_path) -> None:
    """Unknown characters; texts that are cut; what no adapter can hold."""
    listener = Listener()
    chats = write(tmp_path / "a.jsonl", *[{"prompt": f"{a}?", "completion": "Ω"} for a in ANIMALS])
    finetune(bases(), chats, out=tmp_path / "a", lora_rank=2, reporter=listener, **FAST)
    said = "\n".join(listener.said)
    assert "read as '<unk>': 'Ω'" in said
    assert "only the merged model is kept" in said
    assert not (tmp_path / "a" / "adapter").exists()
    texts = ["a" * n for n in (5, 40, 41, 90)]
    rows = [{"text": text, "label": label} for text in texts for label in ("x", "y")]
    labels = write(tmp_path / "b.jsonl", *rows)
    finetune(bases(), labels, val=str(labels), out=tmp_path / "b", reporter=listener, **FAST)
    said = "\n".join(listener.said)
    assert "of 40 that fit; 4 longer than that are cut (and 4 to judge by)" in said
    finetune(bases(), chats, out=tmp_path / "c", freeze="embeddings", reporter=listener, **FAST)
    assert "1 new tokens stay what they are" in "\n".join(listener.said)


def write(path: Path, *rows: Any) -> Path:
    path.write_text("".join((r if isinstance(r, str) else json.dumps(r)) + "\n" for r in rows))
    return path


@pytest.mark.slow
def test_refusals(bases, files, tmp_path, capsys) -> None:
    """One line each, exit status 2, and no run directory."""
    yes, asked = ({"role": role, "content": "yes"} for role in ("assistant", "user"))
    cases = {
        "line 2": write(tmp_path / "a.jsonl", {"prompt": "a", "completion": "b"}, '{"prompt": '),
        "robot": write(tmp_path / "b.jsonl", {"messages": [{**yes, "role": "robot"}]}),
        "assistant": write(tmp_path / "c.jsonl", {"messages": [asked]}),
        "empty": write(tmp_path / "d.jsonl"),
        "one example is too few": write(tmp_path / "e.jsonl", {"prompt": "a", "completion": "b"}),
        "'short'": write(tmp_path / "f.jsonl", *[{"text": t, "label": "short"} for t in "abc"]),
        "does not exist": tmp_path / "nowhere.jsonl",
    }  # fmt: skip
    for word, data in cases.items():
        said = refuse(capsys, "finetune", bases(), data, "--out", tmp_path / "run")
        assert word in said, said
        assert not (tmp_path / "run").exists()
    text, chats, labels = (files[name] for name in WHAT)
    for word, arguments in {
        "format": [bases(), text, "--format", "messages"],
        "context_length": [bases(), text, "--context-length", 41],
        "fits": [bases(), chats, "--context-length", 5],
        "freeze": [bases(), text, "--freeze", "3"],
        "lora-rank": [bases(), text, "--lora-rank", 2, "--freeze", "1"],
        "lora_targets": [bases(), text, "--lora-rank", 2, "--lora-targets", "q_proj"],
        "--keep": [bases(), text, "--replay", 0.5],
        "classifier": [bases(), labels, "--keep", text],
        "n-layer": [bases(), text, "--n-layer", 3],
        "name a run directory": [],
        "nothing to train on": [bases()],
        "no template": [bases(), chats, "--template", "chatm"],
        "class_weights is for labels": [bases(), chats, "--class-weights"],
        "loss_on is for conversations": [bases(), labels, "--loss-on", "all"],
        "template is for conversations": [bases(), text, "--template", "chatml"],
        "max_tokens is for text": [bases(), chats, "--max-tokens", 9],
    }.items():
        said = refuse(capsys, "finetune", *arguments, "--out", tmp_path / "run")
        assert word in said, said
        assert not (tmp_path / "run").exists()
    plain = CharTokenizer.from_characters("xyz? !")
    config = tiny_config(vocab_size=plain.vocab_size, context_length=40)
    weights = weights_of(tiny_model(config))
    ckpt.save_model(tmp_path / "xyz", ckpt.Checkpoint(config, weights, plain))
    said = refuse(capsys, "finetune", tmp_path / "xyz", chats, "--out", tmp_path / "run")
    assert "vocabulary" in said


def test_labels_that_only_validation_has(bases, tmp_path, capsys) -> None:
    learn = write(tmp_path / "a.jsonl", *[{"text": t, "label": t} for t in "ab"])
    judge = write(tmp_path / "b.jsonl", {"text": "c", "label": "c"})
    said = refuse(capsys, "finetune", bases(), learn, "--val", judge, "--out", tmp_path / "run")
    assert "'c'" in said
    assert "line 1" in said


def test_changed_data_and_options_are_refused_on_resuming(bases, files, tmp_path, capsys) -> None:
    data = tmp_path / "chats.jsonl"
    data.write_text(files["chats"].read_text())
    run = finetune(bases(), data, out=tmp_path / "run", **FAST).run
    assert "can't change" in refuse(capsys, "finetune", "--resume", run, "--epochs", 5)
    assert "finetune --resume" in refuse(capsys, "train", "--resume", run)
    data.write_text(files["chats"].read_text().replace("moo", "muh"))
    assert "changed" in refuse(capsys, "finetune", "--resume", run, "--max-steps", 9)


@pytest.mark.slow
def test_a_budget_ends_it(bases, files, tmp_path) -> None:
    result = finetune(bases(), files["chats"], out=tmp_path / "run", budget="4s", sample_tokens=4,
                      patience=None)  # fmt: skip
    assert result.finished
    assert result.step > 0
    lr = [row["lr"] for row in read_metrics(tmp_path / "run/metrics.jsonl") if "lr" in row]
    assert torch.tensor(lr).isfinite().all()
