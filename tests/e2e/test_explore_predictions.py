"""What the explorer's page shows of predictions in a real browser: the logit lens, attribution,
sampling, parts that are switched off or patched, losses, the cache. All numbers are torch's."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tests.browser import GOLDEN, PHONE, Explorer, explored
from tests.conftest import tiny_config, tiny_model, weights_of

import glassgpt
from glassgpt.cache import KVCache
from glassgpt.checkpoints.run_directory import Checkpoint, save_model
from glassgpt.config import Sampling
from glassgpt.evaluation.text_loss import cross_entropies, text_loss
from glassgpt.inference.engines.reference import ReferenceEngine
from glassgpt.inference.generate import filter_logits, probabilities
from glassgpt.interpret.lens import attribution, logit_lens, patch_map, patched, without
from glassgpt.interpret.trace import record
from glassgpt.tokenizers.tokenizer import byte_tokenizer

pytestmark = pytest.mark.browser

TEXT, OTHER = "The small bird slept", "The small bird sleep"


class Views(Explorer):
    """The page, and the model that it shows."""

    def __init__(self, explorer: Explorer, run: Path) -> None:
        super().__init__(explorer.page, explorer.url, explorer.server)
        self.loaded = glassgpt.load(run, device="cpu")
        self.model = self.loaded.model

    def write(self, selector: str, value: object) -> None:
        with self.change():
            self.page.fill(selector, str(value))
            self.page.press(selector, "Enter")

    def data(self, selector: str) -> list[dict[str, str]]:
        """The data attributes of every such element of the view."""
        script = "nodes => nodes.map(node => ({...node.dataset}))"
        return self.page.eval_on_selector_all(f"#view {selector}", script)

    def found(self, name: str) -> dict[str, dict[str, str]]:
        """Every element that carries a number of this name, by its index."""
        return {one["index"]: one for one in self.data(f'[data-name="{name}"]')}

    def values(self, name: str, key: str = "value") -> dict[str, float]:
        return {index: float(one[key]) for index, one in self.found(name).items() if key in one}

    def ids(self, text: str = TEXT) -> list[int]:
        return self.loaded.tokenizer.encode(text)

    def batch(self, text: str = TEXT) -> torch.Tensor:
        return torch.tensor([self.ids(text)])

    def logits(self, ids: list[int], edits: Any = None) -> np.ndarray:
        """(T, V) float32"""
        return record(self.model, torch.tensor([ids]), edits=edits)["logits"][0]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A trained modern model, the same a little changed, and a GPT-2 of bytes with random weights,
    which reads only 24 tokens."""
    folder, tokenizer = tmp_path_factory.mktemp("explored"), byte_tokenizer()
    golden = glassgpt.load(GOLDEN).checkpoint
    generator = np.random.default_rng(5)
    weights = {name: np.asarray(array) * generator.uniform(0.9, 1.1, np.shape(array))
               for name, array in golden.weights.items()}  # fmt: skip
    weights = {name: array.astype(np.float32) for name, array in weights.items()}
    save_model(folder / "tuned", dataclasses.replace(golden, weights=weights))
    config = tiny_config("gpt2", vocab_size=tokenizer.vocab_size, context_length=24)
    save_model(folder / "bytes", Checkpoint(config, weights_of(tiny_model(config)), tokenizer))
    return {"modern": GOLDEN, "tuned": folder / "tuned", "bytes": folder / "bytes"}


@pytest.fixture(scope="module")
def modern(runs: dict[str, Path]) -> Iterator[Views]:
    with explored(runs["modern"], "--with", runs["tuned"]) as explorer:
        yield Views(explorer, runs["modern"])


@pytest.fixture(scope="module")
def of_bytes(runs: dict[str, Path]) -> Iterator[Views]:
    with explored(runs["bytes"]) as explorer:
        yield Views(explorer, runs["bytes"])


@pytest.fixture(params=["modern", "of_bytes"])
def explorer(request: pytest.FixtureRequest) -> Views:
    return request.getfixturevalue(request.param)


# -- the logit lens --------------------------------------------------------------------------------


def test_every_cell_of_the_lens_is_what_the_head_reads_there(explorer: Views):
    explorer.open("lens", TEXT)
    trace = record(explorer.model, explorer.batch())
    shown = {(one["name"], int(one["index"])): one for one in explorer.data(".lens button")}
    for name, logits in logit_lens(explorer.model, trace):
        chance = logits[0].softmax(-1)
        for at in range(len(chance)):
            cell = shown.pop((name, at))
            assert int(cell["token"]) == chance[at].argmax()
            assert float(cell["value"]) == pytest.approx(chance[at].max().item(), abs=1e-5)
    assert not shown
    output = torch.tensor(explorer.logits(explorer.ids())).softmax(-1)
    last = [float(one["value"]) for one in explorer.data(".lens tbody tr:last-child button")]
    np.testing.assert_allclose(last, output.max(-1).values, atol=1e-5)


def test_a_cell_of_the_lens_opens_its_distribution(modern: Views):
    modern.open("lens", TEXT)
    modern.press(".lens tbody tr:nth-child(2) td:nth-child(6) button")
    trace = record(modern.model, modern.batch())
    chance = dict(logit_lens(modern.model, trace))["blocks.0.resid_post"][0, 4].softmax(-1)
    rows = modern.data('.bars [data-name="lens"]')
    assert len(rows) == 8
    for row in rows:
        assert float(row["value"]) == pytest.approx(chance[int(row["index"])].item(), abs=1e-5)


def test_the_parts_of_a_logit_add_up_to_it(explorer: Views):
    explorer.open("lens", TEXT, position=7)
    logits = explorer.logits(explorer.ids())[7]
    assert explorer.values("attribution")["total"] == pytest.approx(logits.max(), abs=1e-4)
    rows = explorer.values("attribution")
    total = rows.pop("total")
    assert sum(rows.values()) == pytest.approx(total, abs=1e-4)
    trace = record(explorer.model, explorer.batch())
    parts = attribution(explorer.model, trace, int(logits.argmax()), position=7)
    shown = explorer.values("part")
    for part in parts:
        if part.part in shown:
            assert shown[part.part] == pytest.approx(part.value, abs=1e-5)


def test_the_parts_of_a_changed_model_add_up_too(explorer: Views):
    explorer.open("lens", TEXT, off=["0.attn", "1"])
    logits = explorer.logits(explorer.ids(), without(["0.attn", "1"], explorer.model.config))
    written = explorer.values("attribution")
    assert written["total"] == pytest.approx(logits[-1].max(), abs=1e-4)
    assert sum(written.values()) - written["total"] == pytest.approx(written["total"], abs=1e-4)
    shown = explorer.page.locator(".view-lens").inner_text()
    assert "block 0: what was put in its place" in shown


def test_the_lens_moves_by_keyboard(modern: Views):
    modern.open("lens", TEXT, position=3)
    modern.page.focus('.lens [aria-pressed="true"]')
    modern.page.keyboard.press("ArrowUp")
    modern.page.keyboard.press("ArrowLeft")
    with modern.change():
        modern.page.keyboard.press("Enter")
    pressed = modern.data('.lens [aria-pressed="true"]:focus')
    assert [(one["name"], one["index"]) for one in pressed] == [("blocks.0.resid_post", "2")]


# -- the next token --------------------------------------------------------------------------------

HOW = dict(repetition_penalty=1.3, temperature=0.7, top_k=14, top_p=0.93, min_p=0.05)


def test_the_distribution_is_that_of_the_sampler(explorer: Views):
    explorer.open("next", TEXT)
    for name, value in HOW.items():
        explorer.write(f'[data-knob="{name}"]', value)
    vocabulary = explorer.loaded.tokenizer.vocab_size
    logits = explorer.logits(explorer.ids())[-1, :vocabulary]
    filtered = filter_logits(logits, set(explorer.ids()), Sampling(**HOW))  # type: ignore[arg-type]
    own, final = probabilities(logits), probabilities(filtered)
    shown = explorer.found("distribution")
    assert len(shown) == min(60, vocabulary)
    for index, cell in shown.items():
        assert float(cell["value"]) == pytest.approx(own[int(index)], abs=1e-6)
        assert float(cell["final"]) == pytest.approx(final[int(index)], abs=1e-6)
        assert float(cell["logit"]) == pytest.approx(logits[int(index)], abs=1e-4)
        assert ("cut" in cell) == (filtered[int(index)] == -np.inf)
    stages = explorer.found("stage")
    assert list(stages) == ["all", *HOW]
    assert int(stages["top_k"]["kept"]) == 14
    assert int(stages["min_p"]["kept"]) == np.isfinite(filtered).sum()


def test_the_line_lies_where_top_k_cuts(modern: Views):
    modern.open("next", TEXT, sampling={"top_k": 5})
    rows = modern.page.locator(".dist tbody tr")
    assert rows.nth(5).get_attribute("data-stage") == "top_k"
    assert modern.page.locator(".dist .out").count() == modern.loaded.tokenizer.vocab_size - 5
    kept = sorted(modern.values("distribution").values(), reverse=True)[:5]
    assert modern.values("stage")["top_k"] == pytest.approx(sum(kept), abs=1e-6)


def drawn_text(explorer: Views) -> str:
    return explorer.page.locator('[data-name="text"]').text_content()


@pytest.mark.parametrize("seed", [1337, 8])
def test_drawing_gives_the_text_of_glassgpt_sample(explorer: Views, seed: int):
    how: dict[str, Any] = dict(temperature=0.9, top_k=20)
    explorer.open("next", TEXT, sampling=how, seed=seed)
    for _ in range(3):
        explorer.press('[data-act="draw"]')
    explorer.press('[data-act="drawMany"]')  # with the bytes' model, over the end of the context
    expected = explorer.loaded.generate(TEXT, max_new_tokens=23, seed=seed, engine="torch", **how)
    path = explorer.page.locator(".tree [aria-current]").get_attribute("data-index")
    ids = [int(one) for one in path.split(",")]
    assert explorer.loaded.tokenizer.decode(ids) == expected.text


def test_an_empty_text_begins_as_sample_does(modern: Views):
    modern.open("next", text="", sampling={"repetition_penalty": 1.5})
    modern.press('[data-act="drawMany"]')
    expected = modern.loaded.generate("", max_new_tokens=20, repetition_penalty=1.5, engine="torch")
    assert drawn_text(modern) == expected.text


def test_another_sample_is_sample_s_second_text(modern: Views):
    modern.open("next", TEXT, sample=1)
    modern.press('[data-act="drawMany"]')
    both = modern.loaded.generate_many([TEXT], n=2, max_new_tokens=20, engine="torch")
    assert drawn_text(modern) == both[1].text


def test_force_branch_and_undo_grow_one_tree(modern: Views):
    modern.open("next", TEXT)
    modern.press('[data-act="draw"]')
    first = modern.page.locator(".tree [aria-current]").get_attribute("data-index")
    unlikely = modern.page.locator(".dist tbody tr").last
    token = unlikely.get_attribute("data-index")
    with modern.change():
        unlikely.locator("button").click()
    forced = modern.page.locator(".tree [aria-current]")
    assert forced.get_attribute("data-index") == f"{first},{token}"
    assert forced.get_attribute("data-how") == "forced"
    logits = modern.logits([*modern.ids(), int(first), int(token)])[-1]
    chance = probabilities(logits)
    for index, p in modern.values("distribution").items():
        assert p == pytest.approx(chance[int(index)], abs=1e-6)
    modern.press(f'.tree [data-index="{first}"]')
    modern.press('[data-act="branch"]')
    branch = modern.page.locator(".tree [aria-current]").get_attribute("data-index")
    assert branch.startswith(f"{first},")
    assert branch != f"{first},{token}"
    assert modern.page.locator(".branches > li").count() == 2
    modern.press('[data-act="undo"]')
    assert modern.page.locator(".tree [aria-current]").get_attribute("data-index") == first
    assert modern.page.locator(f'.tree [data-index="{branch}"]').count() == 0
    assert modern.page.locator(f'.tree [data-index="{first},{token}"]').count() == 1
    with modern.change():
        modern.page.go_back()  # the address of before still leads to the branch
    assert modern.page.locator(".tree [aria-current]").get_attribute("data-index") == branch


def test_what_was_drawn_is_in_the_address(modern: Views):
    modern.open("next", TEXT, drawn=modern.ids(" in the"))
    assert drawn_text(modern) == " in the"
    chance = probabilities(modern.logits(modern.ids(TEXT + " in the"))[-1])
    for index, p in modern.values("distribution").items():
        assert p == pytest.approx(chance[int(index)], abs=1e-6)
    modern.press('[data-act="startOver"]')
    assert drawn_text(modern) == ""


# -- experiments -----------------------------------------------------------------------------------


def against(explorer: Views, one: np.ndarray, two: np.ndarray) -> None:
    """The page compares these two: logits (T, V) each."""
    p, q = probabilities(one[-1]), probabilities(two[-1])
    shown = explorer.found("compare")
    for index, cell in shown.items():
        if index.isdecimal():
            assert float(cell["a"]) == pytest.approx(p[int(index)], abs=1e-5)
            assert float(cell["b"]) == pytest.approx(q[int(index)], abs=1e-5)
    kl = float((p * np.log(p / q)).sum())
    assert float(shown["kl"]["value"]) == pytest.approx(kl, abs=1e-5)


@pytest.mark.parametrize("fill", ["zero", "mean"])
def test_switching_parts_off_and_reset(explorer: Views, fill: str):
    explorer.open("experiments", TEXT, fill=fill)
    whole = explorer.logits(explorer.ids())
    against(explorer, whole, whole)
    before = explorer.found("compare"), explorer.found("lossChange")
    for part in ("1.mlp", "0.h2"):
        explorer.press(f'[data-part="{part}"]')
    off = explorer.logits(explorer.ids(), without(["1.mlp", "0.h2"], explorer.model.config, fill))  # type: ignore[arg-type]
    against(explorer, whole, off)
    losses = cross_entropies(off[:-1], np.array(explorer.ids()[1:]))
    shown = explorer.values("lossChange", "b")
    np.testing.assert_allclose([shown[str(i + 1)] for i in range(len(losses))], losses, atol=1e-4)
    assert abs(explorer.values("compare")["kl"]) > 1e-4
    explorer.press('[data-act="reset"]')
    assert (explorer.found("compare"), explorer.found("lossChange")) == before


def test_patching_from_a_second_text(explorer: Views):
    explorer.open("experiments", TEXT, experiment="prompt")
    explorer.write("#other-text", OTHER)
    here, there = explorer.logits(explorer.ids()), explorer.logits(explorer.ids(OTHER))
    against(explorer, here, there)
    explorer.press('[data-part="1.attn"]')
    source = record(explorer.model, explorer.batch(OTHER))
    against(explorer, here, explorer.logits(explorer.ids(), patched(source, ["1.attn"])))
    cells = explorer.values("patch_map")
    token = int(there[-1].argmax())
    expected = patch_map(explorer.model, explorer.batch(), source, token)
    assert len(cells) == expected.size
    for index, value in cells.items():
        assert value == pytest.approx(expected[tuple(map(int, index.split(",")))], abs=1e-4)


def test_a_text_patched_with_itself_stays_as_it_is(explorer: Views):
    explorer.open("experiments", TEXT, experiment="prompt", other=TEXT)
    for part in ("0", "1.h1", "1.mlp"):
        explorer.press(f'[data-part="{part}"]')
    assert explorer.page.locator("#prompt .badge").count() == 1  # something is patched
    for index, cell in explorer.found("compare").items():
        if index.isdecimal():
            assert float(cell["a"]) == pytest.approx(float(cell["b"]), abs=1e-6)
    assert explorer.values("compare")["kl"] == pytest.approx(0, abs=1e-6)
    moved = explorer.values("patch_map").values()
    assert max(map(abs, moved)) < 1e-5  # other sums are rounded in a batch


def test_texts_of_other_lengths_are_compared_but_not_patched(modern: Views):
    modern.open("experiments", TEXT, experiment="prompt", other="The small bird")
    against(modern, modern.logits(modern.ids()), modern.logits(modern.ids("The small bird")))
    assert modern.page.locator("[data-part]:visible").count() == 0
    says = modern.page.locator(".view-experiments").inner_text()
    assert "patching needs texts with the same number" in says


def test_two_models_side_by_side(modern: Views, runs: dict[str, Path]):
    modern.open("experiments", TEXT, experiment="models")
    with torch.no_grad():
        other = glassgpt.load(runs["tuned"], device="cpu").model(modern.batch())[0].numpy()
    against(modern, modern.logits(modern.ids()), other)
    losses = cross_entropies(other[:-1], np.array(modern.ids()[1:]))
    assert modern.values("compare")["loss.b"] == pytest.approx(losses.mean(), abs=1e-4)


# -- loss ------------------------------------------------------------------------------------------


def test_the_loss_is_that_of_evaluate(explorer: Views):
    explorer.open("loss", TEXT)
    found = text_loss(ReferenceEngine(explorer.model), explorer.loaded.tokenizer, TEXT)
    logits = explorer.logits(explorer.ids())[:-1]
    targets = np.array(explorer.ids()[1:])
    shown = explorer.values("loss")
    assert shown.pop("mean") == pytest.approx(found.loss, abs=1e-4)
    assert shown.pop("bits_per_byte") == pytest.approx(found.bits_per_byte, abs=1e-4)
    losses = cross_entropies(logits, targets)
    np.testing.assert_allclose([shown[str(i + 1)] for i in range(len(losses))], losses, atol=1e-4)
    rank = (logits > logits[np.arange(len(targets)), targets][:, None]).sum(1)
    ranks = explorer.values("loss", "rank")
    assert [ranks[str(i + 1)] for i in range(len(rank))] == rank.tolist()


def test_a_surprise_says_what_was_expected_instead(modern: Views):
    modern.open("loss", TEXT, lossOrder="loss")
    rows = modern.data(".losses tbody tr")
    losses = [float(row["value"]) for row in rows[:-1]]  # the text's first token comes last
    assert losses == sorted(losses, reverse=True)
    modern.press(".losses tbody tr:first-child button")
    at = int(rows[0]["index"])
    chance = probabilities(modern.logits(modern.ids())[at - 1])
    expected = modern.values("expected")
    assert list(map(int, expected)) == np.argsort(-chance, kind="stable")[:8].tolist()
    for index, p in expected.items():
        assert p == pytest.approx(chance[int(index)], abs=1e-6)


def test_one_token_has_no_loss(modern: Views):
    modern.open("loss", text="T")
    assert "two tokens" in modern.page.locator(".view-loss").inner_text()


# -- the cache -------------------------------------------------------------------------------------


def test_the_cache_is_as_large_as_its_tensors(explorer: Views):
    text = TEXT[:9]
    explorer.open("cache", text=text, seed=explorer.loaded.config.vocab_size)  # asked by nobody yet
    explorer.page.click('[data-act="step"]')
    explorer.until(lambda: "0" in explorer.found("cache"))
    explorer.page.click('[data-act="stepMany"]')
    explorer.until(lambda: "10" in explorer.found("cache"))
    steps = explorer.found("cache")
    cache = KVCache(explorer.model.config, 1)
    with torch.no_grad():
        explorer.model(explorer.batch(text), cache=cache)
    for i in range(11):
        step, length = steps[str(i)], len(text) + i
        assert int(step["reused"]) + int(step["computed"]) == length
        used = cache.keys[:, :, :, :1].nbytes + cache.values[:, :, :, :1].nbytes
        assert int(step["value"]) == length * used
        if i:
            assert int(step["computed"]) == 1
    held = cache.keys[:, :, :, : cache.length].nbytes + cache.values[:, :, :, : cache.length].nbytes
    assert int(steps["0"]["value"]) == held
    context = explorer.model.config.context_length
    full = KVCache(explorer.model.config, 1, capacity=context)
    assert int(steps["full"]["value"]) == full.keys.nbytes + full.values.nbytes


# -- all of these views ----------------------------------------------------------------------------

STATES: list[tuple[str, dict[str, Any]]] = [
    ("next", {"sampling": {"top_k": 5, "top_p": 0.9}}), ("experiments", {"off": ["1", "0.h1"]}),
    ("experiments", {"experiment": "prompt", "other": OTHER}),
    ("experiments", {"experiment": "models"}), ("loss", {"lossOrder": "loss"}),
]  # fmt: skip


@pytest.mark.parametrize(("theme", "lang"), [("light", "en"), ("dark", "zh")])
def test_axe_finds_nothing_and_a_phone_is_wide_enough(modern: Views, theme: str, lang: str):
    axe = pytest.importorskip("axe_playwright_python.sync_playwright", reason="needs axe").Axe()
    desk = modern.page.viewport_size
    modern.page.set_viewport_size(PHONE)
    for view, state in STATES:
        if view == "next":
            state = state | {"drawn": modern.ids(" in")}
        modern.open(view, TEXT, theme=theme, lang=lang, **state)
        found = axe.run(modern.page)
        assert not found.response["violations"], (view, state, found.generate_report())
        assert modern.overflow <= 0, (view, state)
        assert modern.alerts() == []
    modern.page.set_viewport_size(desk)
