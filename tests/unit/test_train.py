"""The training loop: same numbers however the work is cut, interrupted or resumed."""

from __future__ import annotations

import dataclasses
import json
import math
import os
import re
import shutil
import signal
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import glassgpt
from glassgpt import runtime
from glassgpt.checkpoints import run_directory as checkpoint
from glassgpt.config import ModelConfig, TrainConfig
from glassgpt.data.dataset import load_data
from glassgpt.data.prepare import prepare
from glassgpt.errors import UserError
from glassgpt.inference.kernels.compiled import load_kernels
from glassgpt.model import GPT
from glassgpt.reporting.run_log import read_metrics
from glassgpt.system import SILENT, Reporter
from glassgpt.training.loop import LoopState, Trainer
from glassgpt.training.run import train
from listener import Listener

TINY = dict(n_layer=2, n_head=2, n_embd=12, context_length=11, batch_tokens=66, max_steps=12,
            eval_interval=4, log_interval=1, sample_tokens=5, warmup_steps=2,
            learning_rate=1e-2)  # fmt: skip
# What a run may be made of: by default, everything is the first.
WAYS = {
    "muon-fused": dict(),
    "adamw-autograd": dict(optimizer="adamw", shape="gpt2"),
    "muon-autograd": dict(n_kv_head=1),
    "adamw-fused": dict(optimizer="adamw", dtype="float32"),
}
every_way = pytest.mark.parametrize("way", WAYS.values(), ids=WAYS)


@pytest.fixture(scope="module")
def text(tmp_path_factory) -> str:
    sentence = "the quick brown fox jumps over a lazy dog and runs away from two big bears"
    words = sentence.split()
    generator = np.random.default_rng(5)
    path = tmp_path_factory.mktemp("text") / "words.txt"
    path.write_text(" ".join(generator.choice(words, 800)))
    return str(path)


def losses(run: Path, key: str = "train_loss") -> list[tuple[int, float]]:
    rows = read_metrics(run / "metrics.jsonl")
    return [(row["step"], row[key]) for row in rows if row.get(key) is not None]


def make_trainer(text: str, run: Path, **options) -> Trainer:
    """A trainer without the loop: for looking at one evaluation."""
    from glassgpt.config import DataConfig

    prepare([text], run / "data", DataConfig())
    data = load_data(run / "data")
    model = {name: TINY[name] for name in ("n_layer", "n_head", "n_embd", "context_length")}
    config = ModelConfig.from_shape("modern", vocab_size=data.tokenizer.vocab_size, **model)
    train_config = TrainConfig(**{"batch_tokens": 66, "device": "cpu", **options})
    torch.manual_seed(train_config.seed)
    return Trainer(run / "run", GPT(config), train_config, data, runtime.start(train_config),
                   SILENT, {})  # fmt: skip


@pytest.mark.slow
@pytest.mark.parametrize(("name", "dropout"), [(name, 0.0) for name in WAYS]
                         + [("muon-fused", 0.2), ("adamw-autograd", 0.2)])  # fmt: skip
def test_resumed_is_uninterrupted(text, tmp_path, name, dropout):
    options = {**TINY, **WAYS[name], "dropout": dropout}
    full = train(text, out=str(tmp_path / "full"), **options)
    part = tmp_path / "part"
    train(text, out=str(part), **{**options, "max_steps": 6, "decay_steps": 12})
    resumed = train(resume=str(part), max_steps=12)
    assert losses(full.run) == losses(part)
    assert losses(full.run, "val_loss") == [p for p in losses(part, "val_loss") if p[0] != 6]
    assert resumed.step == 12
    a, b = (checkpoint.load_model(run / "checkpoints" / "last") for run in (full.run, part))
    assert all(np.array_equal(a.weights[name], b.weights[name]) for name in a.weights)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["muon-fused", "adamw-autograd"])
def test_a_signal_stops_after_the_step_and_resumes_bit_for_bit(text, tmp_path, name):
    options = {**TINY, **WAYS[name], "max_steps": 120}
    full = train(text, out=str(tmp_path / "full"), **options)

    class StopAt(Reporter):
        def status(self, text: str) -> None:
            if text.startswith("step 57/"):
                os.kill(os.getpid(), signal.SIGTERM)

    assert threading.current_thread() is threading.main_thread()
    run = tmp_path / "stopped"
    stopped = train(text, out=str(run), reporter=StopAt(), **options)
    assert not stopped.finished
    assert stopped.step == 57
    train(resume=str(run))
    assert losses(run) == losses(full.run)
    assert losses(run, "val_loss") == losses(full.run, "val_loss")
    assert (run / "samples.md").read_text() == (full.run / "samples.md").read_text()


@pytest.mark.slow
@every_way
def test_same_seed_same_losses_other_seed_other_losses(text, tmp_path, way):
    runs = [
        train(text, out=str(tmp_path / name), **TINY, **way, seed=seed).run
        for name, seed in (("a", 1), ("b", 1), ("c", 2))
    ]
    a, b, c = map(losses, runs)
    assert a == b
    assert a != c


@pytest.mark.slow
@every_way
def test_loss_falls_and_the_best_model_is_at_the_top(text, tmp_path, way):
    result = train(text, out=str(tmp_path / "run"), **{**TINY, **way, "max_steps": 200,
                   "eval_interval": 50, "n_embd": 32})  # fmt: skip
    assert result.best_val_loss < result.first_val_loss - 1.0
    top = checkpoint.load_model(result.run)
    assert top.info["best_val_loss"] == result.best_val_loss
    assert min(loss for _, loss in losses(result.run, "val_loss")) == result.best_val_loss


@pytest.mark.slow
def test_muon_learns_more_in_the_same_steps(tmp_path):
    """Real text, both with the rates that they have by default; measured: 2.39 and 2.62."""
    options = dict(n_layer=2, n_head=4, n_embd=32, context_length=32, batch_tokens=1024,
                   max_steps=250, warmup_steps=10, eval_batches=16, sample_tokens=0,
                   max_tokens=200_000, threads=1, seed=1)  # fmt: skip
    muon, adamw = (
        train("python-manual", out=tmp_path / name, optimizer=name, **options).best_val_loss
        for name in ("muon", "adamw")
    )
    assert muon < adamw - 0.1


@pytest.mark.slow
def test_training_does_the_same_where_nothing_can_be_fused(text, tmp_path, monkeypatch):
    reporter = Listener()
    said = reporter.said
    options = {**TINY, "dtype": "float32"}
    fused = train(text, out=tmp_path / "fused", **options)
    monkeypatch.setitem(sys.modules, "numba", None)
    load_kernels.cache_clear()
    result = train(text, out=tmp_path / "run", reporter=reporter, **options)
    assert result.finished
    assert not re.search("numba|fused|warning|compil", "\n".join(said))
    both = [[loss for _, loss in losses(each.run)] for each in (fused, result)]
    assert both[0] == pytest.approx(both[1], abs=1e-4)


def test_evaluation_is_the_mean_over_every_token_of_the_split(text, tmp_path):
    trainer = make_trainer(text, tmp_path, threads=2)
    trainer.stop = runtime.StopRequest()
    found = trainer.evaluate(trainer.data.val)
    tokens = torch.from_numpy(trainer.data.val.read(0, len(trainer.data.val)))
    total = 0.0
    T = trainer.T
    for start in range(0, len(tokens) - 1, T):  # by hand, window by window
        x, y = tokens[start : start + T], tokens[start + 1 : start + T + 1]
        logits = trainer.model.eval()(x[None, : len(y)])[0]
        total += torch.nn.functional.cross_entropy(logits, y, reduction="sum").item()
    assert found == pytest.approx(total / (len(tokens) - 1), abs=1e-5)


def test_patience_stops_early(text, tmp_path):
    options = {**TINY, "learning_rate": 1e-9, "muon_learning_rate": 1e-9, "max_steps": 400,
               "patience": 2, "weight_decay": 0.0, "grad_clip": None}  # fmt: skip
    reporter = Listener()
    messages = reporter.said
    # A learning rate of nothing: the loss can't improve by more than rounding.
    result = train(text, out=str(tmp_path / "run"), reporter=reporter, **options)
    assert result.finished
    if result.step < 400:
        assert any("stopped early" in message for message in messages)
    evaluations = losses(result.run, "val_loss")
    best = min(range(len(evaluations)), key=lambda i: evaluations[i][1])
    assert len(evaluations) - 1 - best == 2


@every_way
def test_a_diverging_run_stops_and_keeps_the_last_good_checkpoint(text, tmp_path, way):
    run = tmp_path / "run"
    with pytest.raises(
        UserError, match="step 2:.*gradient norm.*learning rate.*keeps the last good"
    ):
        train(text, out=str(run), **{**TINY, **way, "learning_rate": 1e30, "grad_clip": None,
              "warmup_steps": 0, "max_steps": 200})  # fmt: skip
    kept = checkpoint.load_model(run)
    assert all(np.isfinite(weight).all() for weight in kept.weights.values())


def test_the_run_says_what_it_was(text, tmp_path):
    result = train(text, out=str(tmp_path / "run"), **TINY, seed=3)
    about = json.loads((result.run / "glassgpt.json").read_text())
    assert about["train"]["seed"] == 3
    assert ModelConfig(**about["model"]).n_embd == 12
    assert set(dataclasses.asdict(TrainConfig())) == set(about["train"])
    assert (result.run / "loss.png").stat().st_size > 1000
    assert "## step 12" in (result.run / "samples.md").read_text()


@pytest.mark.slow
def test_clear_errors(text, tmp_path):
    run = tmp_path / "run"
    train(text, out=str(run), **TINY)
    with pytest.raises(UserError, match="exists already.*--resume"):
        train(text, out=str(run), **TINY)
    with pytest.raises(UserError, match="finished at step 12.*--max-steps"):
        train(resume=str(run))
    with pytest.raises(UserError, match="too few for context_length=5000"):
        train(text, out=str(tmp_path / "x"), **{**TINY, "context_length": 5000})
    with pytest.raises(UserError, match="nothing to train on"):
        train()
    other = tmp_path / "other.txt"
    other.write_text("something else entirely " * 50)
    shorter = train(str(other), out=str(tmp_path / "y"), **{**TINY, "max_steps": 4})
    other.write_text("and now it differs " * 50)
    shutil.rmtree(Path(os.environ["GLASSGPT_CACHE"]) / "data")
    with pytest.raises(UserError, match="has changed"):
        train(resume=str(shorter.run), max_steps=8)
    os.rename(other, tmp_path / "moved.txt")
    with pytest.raises(UserError, match="text has moved:.*train NEW-PATH --resume"):
        train(resume=str(shorter.run), max_steps=8)
    keep = tmp_path / "notes"
    keep.mkdir()
    (keep / "precious.txt").write_text("mine")
    with pytest.raises(UserError, match="precious.txt.*leaves it alone"):
        train(text, out=str(keep), overwrite=True, **TINY)
    assert [path.name for path in keep.iterdir()] == ["precious.txt"]


@pytest.mark.slow
def test_what_a_resumed_run_may_not_change(text, tmp_path):
    run = train(text, out=tmp_path / "run", **TINY).run
    for option in (dict(out="elsewhere"), dict(overwrite=True), dict(val_fraction=0.3),
                   dict(tokenizer="byte"), dict(n_layer=3)):  # fmt: skip
        with pytest.raises(UserError, match=f"{next(iter(option))} can't change when resuming"):
            train(resume=run, max_steps=20, **option)
    other = tmp_path / "other.txt"
    other.write_text("not the same text at all " * 80)
    with pytest.raises(UserError, match="other.txt, or how it is read, has changed since"):
        train(other, resume=run, max_steps=20)
    copy = shutil.copy(text, tmp_path / "copy.txt")
    assert train([copy], resume=run, max_steps=14).step == 14  # the same text in another place


def test_a_run_stopped_before_its_first_model_can_be_overwritten(text, tmp_path):
    run = tmp_path / "run"
    (run / "checkpoints" / ".next").mkdir(parents=True)
    (run / "metrics.jsonl").write_text("")
    (run / ".lock").write_text("")  # the process was killed
    with pytest.raises(UserError, match="no checkpoint to resume from"):
        train(resume=run)
    with pytest.raises(UserError, match="--overwrite"):
        train(text, out=run, **TINY)
    assert train(text, out=run, overwrite=True, **TINY).finished
    (run / "notes.txt").write_text("mine")
    with pytest.raises(UserError, match="notes.txt"):
        train(text, out=run, overwrite=True, **TINY)
    assert checkpoint.load_model(run).info["step"] == 12


def test_a_run_belongs_to_one_process(text, tmp_path):
    class Intrude(Reporter):
        """Tries to resume and to overwrite the run while it is under way."""

        refusals: list[str] = []

        def status(self, text_: str) -> None:
            for how in (dict(resume=run), dict(data=text, out=run, overwrite=True, **TINY)):
                with pytest.raises(UserError, match="in use by another process") as refused:
                    train(**how)
                self.refusals.append(str(refused.value))

    run = tmp_path / "run"
    result = train(text, out=run, reporter=Intrude(), **TINY)
    assert result.step == 12
    assert len(Intrude.refusals) >= 2
    assert not (run / ".lock").exists()


def test_names_of_runs(text, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = ("a/book.txt", "b/book.md", "*.txt", "../x y?.z")
    runs = [str(checkpoint.RunDirectory.named_after(name).path) for name in names]
    assert runs == ["runs/book", "runs/book-2", "runs/model", "runs/x-y"]


@pytest.mark.slow
def test_stopped_in_the_last_evaluation(text, tmp_path):
    """The last step is done, its evaluation is not: resuming has to make up for it."""

    class StopAtTheEnd(Reporter):
        def status(self, text: str) -> None:
            if text.startswith("step 12/"):
                os.kill(os.getpid(), signal.SIGINT)

    full = train(text, out=tmp_path / "full", **TINY)
    stopped = train(text, out=tmp_path / "run", reporter=StopAtTheEnd(), **TINY)
    assert stopped.signal == signal.SIGINT
    assert losses(stopped.run, "val_loss")[-1][0] == 8
    resumed = train(resume=stopped.run)
    assert resumed.finished
    assert losses(full.run, "val_loss") == losses(resumed.run, "val_loss")
    with pytest.raises(UserError, match="finished at step 12"):
        train(resume=stopped.run)


def test_a_second_ctrl_c_says_how_to_go_on(text, tmp_path):
    said: list[str] = []

    class StopTwice(Reporter):
        def say(self, text: str = "") -> None:
            said.append(text)

        def status(self, text: str) -> None:
            if text.startswith("step 6/"):
                os.kill(os.getpid(), signal.SIGINT)
                os.kill(os.getpid(), signal.SIGINT)

    with pytest.raises(KeyboardInterrupt):
        train(text, out=tmp_path / "my run", reporter=StopTwice(), **TINY)
    assert f"--resume '{tmp_path / 'my run'}'" in said[-1]
    assert train(resume=tmp_path / "my run").step == 12


def test_evaluation_on_a_part_is_the_same_part_everywhere(text, tmp_path):
    """eval_batches counts batches of batch_tokens, however the machine cuts them."""
    found = []
    for name, how in (("a", dict(threads=1)), ("b", dict(threads=2, micro_batch_size=2))):
        trainer = make_trainer(text, tmp_path / name, eval_batches=2, **how)
        trainer.stop = runtime.StopRequest()
        assert trainer.state.eval_windows == 12
        found.append(trainer.evaluate(trainer.data.val, windows=trainer.state.eval_windows))
        whole = make_trainer(text, tmp_path / f"{name}-whole", **how)
        whole.stop = runtime.StopRequest()
        assert found[-1] != pytest.approx(whole.evaluate(whole.data.val), abs=1e-6)
    assert found[0] == pytest.approx(found[1], abs=1e-6)


def test_prepared_data_are_as_they_were_prepared(text, tmp_path):
    from glassgpt.config import DataConfig

    prepare([text], tmp_path / "data", DataConfig(val_fraction=0.2))
    for option in (dict(tokenizer="byte"), dict(val_fraction=0.1), dict(val=text)):
        with pytest.raises(UserError, match=f"prepared already, so {next(iter(option))}="):
            train(tmp_path / "data", out=tmp_path / "run", **TINY, **option)
    same = dict(val_fraction=0.2, tokenizer="char")
    assert train(tmp_path / "data", out=tmp_path / "run", **TINY, **same).finished


@pytest.mark.slow
def test_an_old_run_goes_only_when_the_new_one_can_start(text, tmp_path, monkeypatch):
    run = train(text, out=tmp_path / "run", **TINY).run
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    huge = {**TINY, "n_embd": 3_000_000, "context_length": 10}
    with pytest.raises(UserError, match="parameters does not fit in memory"):
        train(text, out=run, overwrite=True, **huge)
    monkeypatch.setitem(sys.modules, "wandb", None)  # not installed
    with pytest.raises(UserError, match="--wandb needs: pip install"):
        train(text, out=run, overwrite=True, wandb=True, **TINY)
    inside = shutil.copy(text, run / "samples.md")
    before[run / "samples.md"] = Path(text).read_bytes()
    with pytest.raises(UserError, match="samples.md lies in .*, which would be replaced"):
        train(inside, out=run, overwrite=True, **TINY)
    with pytest.raises(UserError, match="lies in"):
        train(text, out=run, overwrite=True, init_from=run, max_steps=2)
    assert before == {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    with pytest.raises(UserError, match="does not fit"):
        train(text, out=tmp_path / "new", **huge)
    assert not (tmp_path / "new").exists()


def test_models_of_others_are_not_overwritten(text, tmp_path):
    run = train(text, out=tmp_path / "run", **TINY).run
    downloaded = tmp_path / "downloaded"
    downloaded.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer.json", "generation_config.json"):
        shutil.copy(run / name, downloaded)
    with pytest.raises(UserError, match="no training wrote it"):
        train(text, out=downloaded, overwrite=True, **TINY)
    (run / "checkpoints" / "epoch1.ckpt").write_text("mine")
    with pytest.raises(UserError, match="checkpoints/epoch1.ckpt"):
        train(text, out=run, overwrite=True, **TINY)


@pytest.mark.slow
@pytest.mark.parametrize(("before", "now"), [("muon", "adamw"), ("adamw", "muon")])
def test_another_optimizer_can_not_go_on(text, tmp_path, before, now):
    run = train(text, out=tmp_path / "run", optimizer=before, **TINY).run
    with pytest.raises(UserError, match=r"^[^\n]*another --optimizer[^\n]*$"):
        train(resume=run, max_steps=14, optimizer=now)
    assert train(resume=run, max_steps=14).step == 14


@pytest.mark.slow
def test_the_micro_batch_may_change_when_resuming(text, tmp_path):
    sizes = []

    class Watch(Reporter):
        def say(self, text: str = "") -> None:
            sizes.extend(re.findall(r"(\d+) micro-batches a step", text))

    run = train(text, out=tmp_path / "run", **TINY).run  # 6 sequences at once
    train(resume=run, max_steps=14, micro_batch_size=1, reporter=Watch())
    train(resume=run, max_steps=16, micro_batch_size=6, batch_tokens=132, reporter=Watch())
    assert sizes == ["6", "2"]
    state = json.loads((run / "checkpoints/last/state.json").read_text())
    assert state["fits_in_memory"] is None


def test_text_of_a_file_of_options_is_not_ignored_when_resuming(text, tmp_path):
    run = train(text, out=tmp_path / "run", **TINY).run
    (tmp_path / "run.toml").write_text('data = "other.txt"\nmax_steps = 20\n')
    with pytest.raises(UserError, match="data can't change"):
        train(resume=run, config=tmp_path / "run.toml")
    with pytest.raises(UserError, match="resume the run:"):
        train(resume=run / "checkpoints" / "last")


def test_the_record_says_how_the_data_were_made(text, tmp_path):
    from glassgpt.config import DataConfig

    prepare([text], tmp_path / "data", DataConfig(val_fraction=0.2))
    run = train(tmp_path / "data", out=tmp_path / "run", preset="bigram", **TINY).run
    options = json.loads((run / "glassgpt.json").read_text())["options"]
    assert options["val_fraction"] == 0.2
    assert options["tokenizer"] == "char"


@pytest.mark.parametrize("data", [123, b"text", [1, 2], {"a": 1}.values()])
def test_data_of_other_types_are_refused(data):
    with pytest.raises(UserError):
        train(data, **TINY)


def test_the_state_of_an_earlier_version_is_read():
    """What it did not save is as at the beginning; keys of others are passed over."""
    old = {"step": 30, "seconds": 4.5, "first_val_loss": 3.0, "best_val_loss": None, "options": {},
           "samples": ["a", "b"], "scaler": {}, "plan": None, "verb": "train"}  # fmt: skip
    state = LoopState.from_json(old)
    assert (state.step, state.seconds, state.samples) == (30, 4.5, ["a", "b"])
    assert (state.best_val_loss, state.kept, state.spent) == (math.inf, [], {})
    assert LoopState.from_json(json.loads(json.dumps(state.to_json()))) == state


def test_prepare_gives_the_data_that_train_would_use(text):
    data = glassgpt.prepare(text, tokenizer="byte", val_fraction=0.2)
    tokens, targets, *_ = data.train.batch(0, seed=1, n=2, T=5)
    assert tokens.shape == targets.shape == (2, 5)
    assert data.tokenizer.vocab_size >= 256
    assert glassgpt.prepare([text], tokenizer="byte", val_fraction=0.2).path == data.path
    assert glassgpt.prepare(data.path).fingerprint == data.fingerprint
    with pytest.raises(UserError, match="prepared already"):
        glassgpt.prepare(data.path, tokenizer="char")
    with pytest.raises(UserError, match="max_tokens"):
        glassgpt.prepare(text, max_tokens=0)
