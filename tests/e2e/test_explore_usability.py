"""The explorer's page in a real browser, for everybody: keyboard, screen reader, phone, both
languages, addresses that were saved, and whatever goes wrong."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from tests.browser import PHONE, Explorer, explored, trained

pytestmark = pytest.mark.browser

TEXT = "the cat sat"
VIEWS = ["tour", "tokens", "map", "tensor", "attention", "lens", "next", "experiments", "loss",
         "cache", "training"]  # fmt: skip


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Explorer]:
    with explored(trained(tmp_path_factory.mktemp("runs") / "book")) as explorer:
        yield explorer


def axe() -> str:
    package = pytest.importorskip("axe_playwright_python", reason="left out: needs axe")
    return (Path(package.__file__).parent / "axe.min.js").read_text()


@pytest.mark.parametrize(("scheme", "lang", "table"), [
    ("light", "en", False), ("dark", "zh", False), ("dark", "en", True), ("light", "zh", True),
])  # fmt: skip
def test_axe_finds_nothing(page: Explorer, scheme: Any, lang: str, table: bool) -> None:
    page.page.emulate_media(color_scheme=scheme, reduced_motion="reduce")
    for view in VIEWS:
        page.open(view, TEXT, lang=lang, table=table, tensor="blocks.1.scores", cell=[0, 2, 1])
        assert (
            page.page.locator("html").get_attribute("lang") == {"en": "en", "zh": "zh-Hans"}[lang]
        )
        page.page.evaluate(axe())
        found = page.page.evaluate("axe.run().then(result => result.violations)")
        said = [f"{one['id']}: {node['html'][:150]} {node['failureSummary'][:300]}"
                for one in found for node in one["nodes"]]  # fmt: skip
        assert not said, (view, said[:5])
    page.page.emulate_media(color_scheme="light", reduced_motion="no-preference")


def test_a_phone_never_scrolls_sideways(page: Explorer) -> None:
    usual = page.page.viewport_size
    page.page.set_viewport_size(PHONE)
    for view in VIEWS:
        for lang, table in (("en", False), ("zh", True)):
            page.open(view, TEXT, lang=lang, table=table)
            assert page.overflow <= 0, (view, lang, table)
    page.page.set_viewport_size(usual)


def test_both_languages_have_every_word(page: Explorer) -> None:
    page.open("tokens")
    en, zh = page.page.evaluate(
        """Promise.all([import("/words/en.js"), import("/words/zh.js")])
           .then((all) => all.map((words) => words.default))"""
    )
    assert sorted(en) == sorted(zh)
    views = page.page.evaluate("""import("/views/index.js").then(({VIEWS}) => VIEWS.map(
        ({key, title, intro, words}) => ({key, title, intro, words})))""")
    assert [view["key"] for view in views] == VIEWS
    for view in views:
        assert sorted(view["title"]) == sorted(view["intro"]) == ["en", "zh"]
        assert sorted(view["words"]["en"]) == sorted(view["words"]["zh"]), view["key"]


def test_keyboard_alone(page: Explorer) -> None:
    keys = page.page.keyboard
    page.open("tokens", TEXT)
    keys.press("Tab")
    assert page.page.evaluate("document.activeElement.className") == "skip"
    keys.press("/")
    assert page.page.evaluate("document.activeElement.tagName") == "TEXTAREA"
    keys.type("]j")  # letters are letters here
    assert page.page.input_value("#prompt textarea").endswith("]j")
    page.open("attention", TEXT)
    for key, state in (("j", "layer=1"), ("l", "head=1"), ("p", "position=9")):
        with page.change():
            keys.press(key)
        assert state in page.page.url
    page.page.focus(".view-attention .panel:nth-child(2) canvas")
    for key in ("ArrowUp", "ArrowLeft"):
        keys.press(key)
    with page.change():
        keys.press("Enter")
    assert page.page.locator(".terms .formula").inner_text().startswith("blocks.1.pattern[1, 8, 8]")
    keys.press("?")
    assert page.page.locator("dialog[open] kbd").count() > 10
    keys.press("Escape")
    page.until(lambda: page.page.locator("dialog").count() == 0)
    page.page.locator("#top .brand").focus()
    with page.change():
        keys.press("]")
    assert "view=lens" in page.page.url


def test_the_address_carries_everything(page: Explorer) -> None:
    page.open("attention", TEXT, layer=1, head=3, position=4, stage="scores", theme="dark",
              off=["0.mlp"])  # fmt: skip
    assert page.page.locator("#head-title").inner_text().startswith("Layer 1, head 3")
    assert page.page.locator("html").get_attribute("data-theme") == "dark"
    assert (
        page.page.locator('#prompt-tokens [aria-selected="true"]').get_attribute("data-at") == "4"
    )
    assert "0.mlp" in page.page.locator(".changes").inner_text()
    page.press("#views a:has-text('Map')")
    assert "view=map" in page.page.url
    with page.change():
        page.page.go_back()
    assert page.page.locator("#head-title").inner_text().startswith("Layer 1, head 3")


def test_saved_as_one_file(page: Explorer, tmp_path: Path) -> None:
    page.open("attention", TEXT, table=True)
    for words, ending in (("HTML", "html"), ("PNG", "png")):
        page.page.click(".menu summary")
        with page.page.expect_download() as download:
            page.page.click(f".sheet button:has-text('{words}')")
        download.value.save_as(tmp_path / f"view.{ending}")
    html = (tmp_path / "view.html").read_text()
    assert "data-value" in html
    for outside in ("<script", "http://", "https://", 'src="/', "<link"):
        assert outside not in html.replace("http://www.w3.org/", "")
    assert (tmp_path / "view.png").read_bytes().startswith(b"\x89PNG")


# -- what goes wrong -----------------------------------------------------------------------------


def test_an_address_that_asks_for_too_much(page: Explorer) -> None:
    page.open("attention", TEXT, layer=99, head=77, position=500)
    page.says("Layer 99 does not exist: this model and text have 0 to 1")
    page.says("Head 77")
    page.says("Position 500")
    assert page.page.locator("#head-title").inner_text().startswith("Layer 1, head 3")
    page.open("tensor", TEXT, tensor="blocks.9.q")
    page.says("no tensor “blocks.9.q”")
    page.open("nonsense", TEXT)
    page.says("no view “nonsense”")
    page.open("next", TEXT, sampling=None, drawn={"a": 1})  # as if it were not there
    assert page.page.locator("#alerts .alert").count() == 0


def test_text_that_does_not_fit(page: Explorer) -> None:
    page.open("tokens", TEXT)
    page.page.fill("#prompt textarea", "the cat " * 40)
    page.says("48")  # the context
    page.page.fill("#prompt textarea", "the ☃")
    page.says("☃")
    page.page.fill("#prompt textarea", TEXT)
    page.until(lambda: page.alerts() == [])


def test_a_run_that_is_deleted_and_a_server_that_ends(tmp_path: Path) -> None:
    run = trained(tmp_path / "book")
    with explored(run) as page:
        page.open("tokens", TEXT)
        run.rename(tmp_path / "elsewhere")
        page.page.fill("#prompt textarea", "the dog")
        page.says("is gone")
        (tmp_path / "elsewhere").rename(run)
        page.page.fill("#prompt textarea", "the do")
        page.until(lambda: page.alerts() == [])
        page.server.terminate()
        page.server.wait()
        page.page.fill("#prompt textarea", "the d")
        page.says("server does not answer")
        assert page.page.locator("#views a").count() == len(VIEWS)
