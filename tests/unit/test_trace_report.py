"""`glassgpt trace`: what it says of a pass is what the pass computed."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
import torch

from conftest import tiny_config, tiny_model, weights_of
from glassgpt.api import LoadedModel
from glassgpt.checkpoints.run_directory import Checkpoint
from glassgpt.cli.app import main
from glassgpt.cli.arguments import Changes, FigureFile
from glassgpt.cli.trace_report import Reading, describe_preset
from glassgpt.errors import UserError
from glassgpt.tokenizers.tokenizer import CharTokenizer

LETTERS = [chr(ord("a") + i) for i in range(26)] + list(" .,!?0123")
TEXT = "abcab ca"


@pytest.fixture(params=["gpt2", "modern"])
def loaded(request: pytest.FixtureRequest) -> LoadedModel:
    tokenizer = CharTokenizer.from_characters(LETTERS)
    config = tiny_config(request.param, vocab_size=tokenizer.vocab_size)
    model = tiny_model(config)
    return LoadedModel(Checkpoint(config, weights_of(model), tokenizer), "cpu", "tiny")


def logits(loaded: LoadedModel, text: str = TEXT) -> torch.Tensor:
    with torch.no_grad():
        return loaded.model(torch.tensor([loaded.tokenizer.encode(text)]))[0]


def test_operations_of_one_block_or_of_all(loaded: LoadedModel) -> None:
    lines = Reading(loaded, TEXT).operations()
    assert lines[0].split()[:3] == ["operation", "gives", "shape"]
    assert sum("attn.qkv" in line for line in lines) == 1
    assert sum("attn.qkv" in line for line in Reading(loaded, TEXT).operations(every=True)) == 2
    assert "block 1:" in Reading(loaded, TEXT).operations(layer=1)
    assert f"{loaded.config.n_parameters:,}" in "\n".join(lines)


def test_the_last_line_of_the_lens_is_the_likeliest_next_token(loaded: LoadedModel) -> None:
    best = logits(loaded)[-1].softmax(-1)
    last = Reading(loaded, TEXT).lens()[-1].split("  ")
    label, chance = next(cell for cell in last[1:] if cell.strip()).rsplit(" ", 1)
    assert float(chance) == pytest.approx(best.max().item(), abs=5e-4)
    shown = loaded.tokenizer.decode([int(best.argmax())])
    assert label.strip() == shown.replace(" ", "␣")


def test_losses_are_those_of_the_logits(loaded: LoadedModel) -> None:
    ids = torch.tensor(loaded.tokenizer.encode(TEXT))
    expected = torch.nn.functional.cross_entropy(logits(loaded)[:-1], ids[1:], reduction="none")
    rows = [line.split() for line in Reading(loaded, TEXT).loss()[1:]]
    assert [float(row[1]) for row in rows[:-1]] == pytest.approx(expected.tolist(), abs=1e-4)
    assert float(rows[-1][1]) == pytest.approx(expected.mean().item(), abs=1e-4)
    ranks = [int((row > row[i]).sum()) + 1 for row, i in zip(logits(loaded), ids[1:], strict=False)]
    assert [int(row[2]) for row in rows[:-1]] == ranks
    with pytest.raises(UserError, match="two tokens at least"):
        Reading(loaded, "a").loss()


def test_contributions_add_up_to_what_is_said(loaded: LoadedModel) -> None:
    lines = Reading(loaded, TEXT).attribution("c")
    rows = [line.rsplit(maxsplit=1) for line in lines[1:]]
    assert rows[-1][0] == "logit of c"
    values = [float(value) for _, value in rows]
    assert sum(values[:-1]) == pytest.approx(values[-1], abs=2e-3)
    wanted = logits(loaded)[-1, loaded.tokenizer.encode("c")[0]].item()
    assert values[-1] == pytest.approx(wanted, abs=2e-4)


def test_what_is_switched_off_is_said_to_matter(loaded: LoadedModel) -> None:
    before, after = Reading(loaded, TEXT, Changes(off=("1",))).operations()[:2]
    assert before.startswith("as it is: loss ")
    assert after.startswith("changed: loss ")
    assert before.split("loss")[1] != after.split("loss")[1]
    other = Changes(patch_from="bcabc ab", parts=("blocks.0.resid_pre",))
    everything = Reading(loaded, TEXT, other).operations()
    there = Reading(loaded, "bcabc ab").lens()[-1].split("  ")
    chance = next(cell for cell in there[1:] if cell.strip()).rsplit(" ", 1)[1]
    assert chance in everything[1]


def test_the_patch_of_the_last_place_of_the_last_block_is_the_other_text(
    loaded: LoadedModel,
) -> None:
    lines = Reading(loaded, TEXT).patch("bcabc ab", "d")
    moved = float(lines[-1].split()[-1])
    d = loaded.tokenizer.encode("d")[0]
    expected = logits(loaded, "bcabc ab")[-1, d] - logits(loaded)[-1, d]
    assert moved == pytest.approx(expected.item(), abs=6e-3)
    assert {float(x) for x in lines[-1].split()[1:-1]} == {0.0}


@pytest.mark.parametrize("show", ["lens", "attribution", "loss", "patch"])
def test_figures_name_their_axes(loaded: LoadedModel, tmp_path: Path, show: str) -> None:
    other = {"other": "bcabc ab"} if show == "patch" else {}
    target = tmp_path / "figure.svg"
    lines = getattr(Reading(loaded, TEXT), show)(**other, target=FigureFile(str(target)).target())
    assert lines[-1] == f"figure: {target}"
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", target.read_text())
    wanted = {"lens": "token that was read", "attribution": "added to the logit",
              "loss": "loss (nats)", "patch": "token whose place is taken"}  # fmt: skip
    assert wanted[show] in texts
    assert ("block 1" if show in ("lens", "patch") else "1.mlp" if show != "loss" else "b") in texts
    with pytest.raises(UserError, match="--overwrite replaces it"):
        FigureFile(str(target)).target()


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        (Changes(off=("7.mlp",)), "no block 7; the model has 2"),
        (Changes(parts=("0",)), "name it with --patch-from"),
        (Changes(patch_from="abcabc ab"), "say with --parts"),
        (Changes(patch_from="abc", parts=("0",)), "texts with as many tokens"),
    ],
)
def test_what_can_not_be_changed(loaded: LoadedModel, changes: Changes, says: str) -> None:
    with pytest.raises(UserError, match=says):
        Reading(loaded, TEXT, changes).operations()


def test_what_can_not_be_shown(loaded: LoadedModel) -> None:
    reading = Reading(loaded, TEXT)
    with pytest.raises(UserError, match="layer=2: the model has blocks 0 to 1"):
        reading.operations(2)
    with pytest.raises(UserError, match="give one of them"):
        reading.operations(0, every=True)
    with pytest.raises(UserError, match="'ab' is 2 tokens"):
        reading.attribution("ab")
    with pytest.raises(UserError, match="texts with as many tokens"):
        reading.patch("abc")
    with pytest.raises(UserError, match=r"a figure is a \.png"):
        FigureFile("x.gif").target()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        (["runs/book", "To be"], 'glassgpt trace ops runs/book "To be"'),
        (["--preset", "gpt2-124m"], "glassgpt trace ops --preset gpt2-124m"),
        (["gpt2", "a", "--show", "lens", "--off", "1"], "glassgpt trace lens gpt2 a --off 1"),
        (["gpt2", "--show=loss", ""], 'glassgpt trace loss gpt2 ""'),
    ],
)
def test_the_old_spelling_names_the_new_one(
    capsys: pytest.CaptureFixture[str], old: list[str], new: str
) -> None:
    with pytest.raises(SystemExit) as refused:
        main(["trace", *old])
    assert refused.value.code == 2
    assert capsys.readouterr().err == f"glassgpt: write: {new}\n"


def test_unknown_characters_and_what_is_not_read_are_named(loaded: LoadedModel) -> None:
    assert Reading(loaded, "ab#c").operations()[0].startswith("note: not in the training text")
    lines = Reading(loaded, "a" * 14).operations()
    assert lines[0] == "note: only the first 13 of 14 tokens are read"
    assert any("(1, 13, " in line for line in lines)
    with pytest.raises(UserError, match="14 tokens; the context holds 1 to 13"):
        loaded.trace("a" * 14)
    assert Reading(loaded, "").operations()  # the token before texts


def test_a_preset_without_weights() -> None:
    text = describe_preset("gpt2-124m", {}, 10, 2)
    assert "(2, 12, 10, 64)" in text
    assert "124,337,664" in text  # without biases, as nanoGPT
    with pytest.raises(UserError, match="tokens=2000; the context holds 1 to 1024"):
        describe_preset("gpt2-124m", {}, 2000, 1)
    for batch in (0, -1, 10**20):
        with pytest.raises(UserError, match=f"batch={batch} must be 1 to"):
            describe_preset("gpt2-124m", {}, 10, batch)
    assert "block 11:" in describe_preset("gpt2-124m", {}, 10, 1, layer=11)
    small = describe_preset(None, {"n_layer": 1, "n_embd": 32, "n_head": 2}, 5, 1)
    assert "(1, 2, 5, 16)" in small
    assert "vocabulary of 96 tokens (char)" in small


def test_trace_from_python(loaded: LoadedModel) -> None:
    trace = loaded.trace(TEXT)
    assert isinstance(trace["blocks.1.pattern"], np.ndarray)
    np.testing.assert_allclose(trace["logits"][0], logits(loaded).numpy(), atol=1e-5)
    assert trace["loss"].shape == (1, len(TEXT) - 1)
    edited = loaded.trace(TEXT, off=["0.h1"])
    assert not np.allclose(edited["logits"], trace["logits"])
