"""What the explorer's page shows of a forward pass in a real browser: its numbers are torch's."""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from tests.browser import GOLDEN, Explorer, explored, trained
from tests.conftest import tiny_config, tiny_model, weights_of

import glassgpt
from glassgpt.checkpoints.run_directory import Checkpoint, save_model
from glassgpt.interpret.trace import Trace, record
from glassgpt.tokenizers.tokenizer import byte_tokenizer

pytestmark = pytest.mark.browser

TEXT = "the cat sat"


def model_of_bytes(folder: Path, shape: str) -> Path:
    tokenizer = byte_tokenizer()
    config = tiny_config(shape, vocab_size=tokenizer.vocab_size, context_length=24)
    save_model(folder, Checkpoint(config, weights_of(tiny_model(config)), tokenizer))
    return folder


def llama(folder: Path) -> Path:
    """As transformers saves it, beside a tokenizer."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(3)
    tokenizer = model_of_bytes(folder.with_name("tokenizer"), "modern")
    LlamaForCausalLM(LlamaConfig(
        vocab_size=byte_tokenizer().vocab_size, hidden_size=24, intermediate_size=44,
        num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=10,
        max_position_embeddings=32, initializer_range=0.2,
    )).save_pretrained(folder)  # fmt: skip
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(tokenizer / name, folder / name)
    return folder


MAKE = {
    "character": trained,
    "gpt2": lambda folder: model_of_bytes(folder, "gpt2"),
    "modern": lambda folder: model_of_bytes(folder, "modern"),
    "llama": llama,
}


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Explorer]:
    with explored(trained(tmp_path_factory.mktemp("runs") / "book")) as explorer:
        yield explorer


def expected(run: Path, text: str = TEXT) -> Trace:
    loaded = glassgpt.load(run, device="cpu")
    return record(loaded.model, torch.tensor([loaded.encode_prompt(text)]), loss=True)


def same(cells: dict[tuple[int, ...], float | None], tensor: np.ndarray) -> int:
    """Every cell is the tensor's; returns how many are masked."""
    for index, value in cells.items():
        wanted = tensor[index]
        assert (value is None) or value == pytest.approx(float(wanted), abs=1e-4), index
        assert (value is None) <= (wanted in (0, -math.inf)), index
    return sum(value is None for value in cells.values())


@pytest.mark.parametrize("kind", MAKE)
def test_tables_show_torchs_numbers(kind: str, tmp_path: Path) -> None:
    run = MAKE[kind](tmp_path / kind)
    truth = expected(run)
    T = truth["logits"].shape[1]
    later = T * (T - 1) // 2
    with explored(run) as page:
        for name in ("token_embedding", "blocks.1.qkv", "blocks.0.v", "blocks.1.scores",
                     "blocks.1.masked_scores", "blocks.0.pattern", "blocks.1.mlp_hidden",
                     "blocks.0.resid_post", "final", "logits"):  # fmt: skip
            page.open("tensor", TEXT, tensor=name, head=1, table=True)
            tensor = truth[name][0]
            masked = same(page.cells(name), tensor)
            assert masked == (later if name.endswith(("pattern", "masked_scores")) else 0), name
        for stage in ("raw_scores", "scores", "masked_scores", "pattern"):
            page.open("attention", TEXT, stage=stage, layer=1, head=2, table=True)
            cells = page.cells(f"blocks.1.{stage}")
            assert len(cells) == T * T
            masked = same(cells, truth[f"blocks.1.{stage}"][0])
            assert masked == (later if stage in ("masked_scores", "pattern") else 0)
        gathered(page, truth)
        renormalised(page, truth)


def test_a_full_context_sends_little_before_a_head_is_opened(tmp_path: Path) -> None:
    """As many tokens, layers and heads as GPT-2 has, in a narrow model."""
    tokenizer, H = byte_tokenizer(), 12
    config = tiny_config("gpt2", vocab_size=tokenizer.vocab_size, context_length=1024, n_layer=12,
                         n_head=H, n_embd=4 * H, n_hidden=50)  # fmt: skip
    save_model(tmp_path / "run", Checkpoint(config, weights_of(tiny_model(config)), tokenizer))
    text = "".join(chr(97 + i * i % 26) for i in range(1024))
    with explored(tmp_path / "run") as page:
        sent: list[int] = []
        page.page.on("response", lambda answer: sent.append(int(answer.headers["content-length"])))
        for view in ("tokens", "map", "attention"):
            page.open(view, text, layer=11, head=3)
        assert 200_000 < sum(sent) < 2_000_000  # three fresh pages, the maps of 144 heads
        with page.change():
            page.page.get_by_role("button", name="Open this head (4.2 MB)").click()
        assert max(sent) == 4 * 1024**2
        pattern = expected(tmp_path / "run", text)["blocks.11.pattern"][0]
        with page.change():
            opened = page.page.get_by_role("group", name="Attention of the opened head")
            opened.get_by_role("button", name="Table").click()
        cells = page.cells("blocks.11.pattern")
        assert len(cells) <= 64 * 64
        same(cells, pattern)


def gathered(page: Explorer, truth: Trace) -> None:
    """Shares times values, at one position; added up they are the head's output."""
    page.open("attention", TEXT, stage="weighted", layer=1, head=2, position=4, table=True)
    group = truth.config.n_head // truth.config.n_kv_head
    value, share = truth["blocks.1.v"][0, 2 // group], truth["blocks.1.pattern"][0, 2, 4]
    cells = page.cells("blocks.1.weighted")
    assert len(cells) == 5 * value.shape[1]
    for (_, _, s, d), got in cells.items():
        assert got == pytest.approx(float(share[s] * value[s, d]), abs=1e-4)
    off = page.page.locator("[data-off]").get_attribute("data-off")
    assert float(off) < 1e-4


def renormalised(page: Explorer, truth: Trace) -> None:
    with page.change():
        page.page.click("text=4 softmax")
    with page.change():
        page.page.check("#hide-first")
    pattern = truth["blocks.1.pattern"][0, 2].copy()
    pattern[:, 0] = 0
    for (_, t, s), got in page.cells("blocks.1.pattern").items():
        if got is not None:
            assert got == pytest.approx(float(pattern[t, s] / pattern[t].sum()), abs=1e-4)
        assert (got is None) == (s > t or s == 0)


def test_where_a_cell_came_from(page: Explorer) -> None:
    truth = expected(GOLDEN)
    page.open("tensor", TEXT, tensor="blocks.1.resid_post", cell=[3, 5])
    shown = page.page.locator(".terms")
    number = lambda name: float(shown.locator(f"[data-{name}]").get_attribute(f"data-{name}"))  # noqa: E731
    assert number("cell") == pytest.approx(float(truth["blocks.1.resid_post"][0, 3, 5]), abs=1e-4)
    assert number("total") == pytest.approx(number("cell"), abs=1e-4)
    rows = shown.locator("tbody tr")
    terms = [float(row.get_attribute("data-value")) for row in rows.all()]
    rest = shown.locator("[data-rest]")
    left = float(rest.get_attribute("data-rest")) if rest.count() else 0.0
    assert sum(terms) + left == pytest.approx(number("total"), abs=1e-6)
    with page.change():  # terms lead on to the cells that they are
        shown.locator("button.link").first.click()
    assert "resid_post" not in page.page.locator(".terms .formula").inner_text().split("=")[0]


def test_tokens_with_white_space_and_bytes(tmp_path: Path) -> None:
    with explored(model_of_bytes(tmp_path / "bytes", "gpt2")) as page:
        page.open("tokens", "a é\n", position=2)
        texts = page.page.locator("#prompt-tokens .token b").all_inner_texts()
        assert texts == ["a", "·", "C3", "A9", "⏎"]
        rows = page.page.locator(".view-tokens tbody tr[data-id]")
        assert [row.locator(".hex").inner_text() for row in rows.all()] == ["61", "20", "C3", "A9",
                                                                           "0A"]  # fmt: skip
        with page.change():
            page.page.fill("#prompt textarea", "ab")
        assert page.page.locator("#prompt-tokens .token b").all_inner_texts() == ["a", "b"]


def test_map_shows_live_shapes_and_the_lines_of_the_model(page: Explorer) -> None:
    page.open("map", TEXT, layer=1)
    loaded = expected(GOLDEN)
    n_outside = sum(op.layer is None for op in loaded.operations)
    n_block = sum(op.layer == 1 for op in loaded.operations)
    drawn = page.page.locator(".drawing [data-operation]")
    assert drawn.count() == n_outside + n_block
    shapes = [node.get_attribute("data-shape") for node in drawn.all()]
    wanted = [op for op in loaded.operations if op.layer in (None, 1)]
    assert shapes == [",".join(map(str, op.output)) for op in wanted]
    softmax = next(i for i, op in enumerate(wanted) if op.name == "softmax")
    drawn.nth(softmax).hover()
    page.until(lambda: page.page.locator(".side h2").inner_text() == "softmax")
    assert "scores.softmax(dim=-1)" in page.page.locator(".side .lit").inner_text()
    page.page.locator(".side .symbol").last.hover()
    assert "tokens" in page.page.locator("#tip").inner_text()


# -- training, tour ------------------------------------------------------------------------------


def test_training_curve_slider_and_a_run_in_progress(tmp_path: Path) -> None:
    run = trained(tmp_path / "book")
    with explored(run) as page:
        page.open("training", TEXT, table=True)
        assert page.cells("train_loss")[20,] == pytest.approx(1.0)
        assert page.cells("val_loss")[30,] == pytest.approx(3.1 / 4)
        with (run / "metrics.jsonl").open("a") as file:
            file.write(json.dumps({"step": 40, "train_loss": 0.5, "tokens": 160}) + "\n")
        page.until(lambda: (40,) in page.cells("train_loss"))
        with page.change():
            page.page.locator(".moment input").fill("0")
        assert "snapshot=10" in page.page.url
        assert page.page.locator(".moment output").inner_text() == "step 10"
        written = page.page.locator(".written [data-id]")
        ids = [int(one.get_attribute("data-id")) for one in written.all()]
        text = glassgpt.load(run).generate(TEXT, max_new_tokens=len(ids), seed=1337).text
        assert "".join(written.all_inner_texts()) == text
        page.press(".view-training .picture:not(.curve) button:has-text('Picture')")
        assert page.page.locator(".view-training canvas").is_visible()
        page.press(".view-training .curve button:has-text('Table')")
        assert page.page.locator("table.heads").is_visible()


def test_tour_asks_before_it_shows(page: Explorer) -> None:
    truth = expected(GOLDEN)
    page.open("tour", TEXT, stop=1)
    assert page.page.locator("[data-answer]").count() == 0
    options = page.page.locator(".option")
    assert options.count() == 4
    options.first.click()
    answer = page.page.locator("[data-answer]").get_attribute("data-answer")
    assert int(answer) == truth["logits"][0, -1].argmax()
    assert page.page.locator(".option.right").get_attribute("data-option") == answer
    for stop in range(8):
        page.open("tour", TEXT, stop=stop)
        page.page.locator(".option").last.click()
        assert page.page.locator(".option.right").count() == 1
