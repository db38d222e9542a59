"""What all figures share: colours for all eyes, fonts, and files (PNG, SVG, HTML) whole or absent.

    with style(): figure = new_figure(8, 5); ...; save(figure, Path("loss.svg"), "Loss of a run")

Knows matplotlib, which is imported when a figure is made; not what is in the figures.
"""

from __future__ import annotations

import contextlib
import functools
import html
import io
import re
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from glassgpt.errors import UserError
from glassgpt.system import write_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Told apart by all eyes, also in print: Okabe and Ito, jfly.uni-koeln.de/color, but for yellow,
# which is too light for lines on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_SUFFIXES = (".png", ".svg", ".html")
_FONTS = ("DejaVu Sans", "Noto Sans CJK SC", "Noto Sans CJK JP", "Noto Sans CJK KR", "PingFang SC",
          "Hiragino Sans", "Apple SD Gothic Neo", "Microsoft YaHei", "Yu Gothic", "Malgun Gothic",
          "WenQuanYi Micro Hei", "WenQuanYi Zen Hei", "Noto Sans")  # fmt: skip


def check_target(target: Path, overwrite: bool) -> None:
    """Raises `UserError` for a name that no figure can have, before any work is done."""
    if target.suffix.lower() not in _SUFFIXES:
        raise UserError(f"{target}: a figure is a {', '.join(_SUFFIXES[:-1])} or {_SUFFIXES[-1]}; "
                        "end --out with one of these")  # fmt: skip
    if target.is_dir():
        raise UserError(f"{target} is a folder; name a file")
    if not target.parent.is_dir():
        raise UserError(f"{target.parent} is no folder; make it, or choose another --out")
    if target.exists() and not overwrite:
        raise UserError(f"{target} exists; --overwrite replaces it, --out names another file")


@contextlib.contextmanager
def style() -> Iterator[None]:
    """Settings of matplotlib, for as long as a figure is made."""
    import matplotlib

    with matplotlib.rc_context({
        "font.family": _fonts(),
        "svg.fonttype": "none",  # text stays text: searched, copied, in the viewer's fonts
        "svg.hashsalt": "glassgpt",  # the same figure is the same file
    }):  # fmt: skip
        yield


def new_figure(width: float, height: float) -> Figure:
    """Inches."""
    from matplotlib.figure import Figure  # pyplot would keep figures, and choose a display

    return Figure(figsize=(width, height), layout="constrained", facecolor="white")


def save(figure: Figure, target: Path, title: str, about: str = "") -> None:
    """PNG, SVG, or a page of HTML that needs nothing else; all of it or what was there before."""
    kind, buffer = target.suffix.lower().removeprefix("."), io.BytesIO()
    metadata = {"Title": title, **({} if kind == "png" else {"Date": None, "Creator": None})}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Glyph", UserWarning)  # letters that the font lacks
        figure.savefig(buffer, format="svg" if kind == "html" else kind, dpi=120,
                       metadata=metadata)  # fmt: skip
    content = buffer.getvalue()
    if kind == "html":
        svg = re.sub(r"<metadata>.*?</metadata>", "", content.decode(), flags=re.DOTALL)
        content = _page(svg, title, about).encode("utf-8", "replace")
    write_file(target, content)


_PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{title}</title>
<style>
:root {{ color-scheme: light dark }}
body {{ font: 15px system-ui, sans-serif; margin: 1.5rem auto; max-width: {width}px; \
padding: 0 1rem }}
figure {{ margin: 0; padding: .5rem; background: white; border-radius: 8px; overflow-x: auto }}
svg {{ display: block; width: 100%; height: auto }}
pre {{ overflow-x: auto }}
</style>
<figure>
{svg}
</figure>
{about}</html>
"""


def _page(svg: str, title: str, about: str) -> str:
    """The picture keeps its white ground in a dark window: its colours are chosen for that."""
    width = round(float(re.search(r'width="([\d.]+)pt"', svg).group(1)) * 1.6)  # type: ignore
    about = f"<pre>{html.escape(about)}</pre>\n" if about else ""
    return _PAGE.format(title=html.escape(title), svg=svg[svg.index("<svg") :].strip(),
                        about=about, width=width)  # fmt: skip


@functools.cache
def _fonts() -> list[str]:
    from matplotlib.font_manager import get_font_names

    installed = set(get_font_names())
    return [name for name in _FONTS if name in installed]


def readable(text: str, target: Path) -> str:
    """`text` as a picture can show it: in a PNG, a character that no font here has is its code
    point (U+4E2D). SVG and HTML leave letters to the viewer's fonts."""
    if text.isascii() or target.suffix.lower() != ".png":
        return text
    from matplotlib.font_manager import findfont, get_font

    fonts = [get_font(findfont(name)) for name in _fonts()]
    return "".join(char if any(font.get_char_index(ord(char)) for font in fonts)
                   else f"U+{ord(char):04X}" for char in text)  # fmt: skip


def font_note(texts: Iterable[str], target: Path) -> str | None:
    """What to say of the characters in `texts` that `target` can only show as code points."""
    missing = sorted({char for text in texts for char in text if readable(char, target) != char})
    if not missing:
        return None
    return (f"note: {len(missing)} characters appear as code points (U+...), since no font here "
            "has them; --out with .svg or .html leaves them to the viewer's fonts")  # fmt: skip


def shortened(text: str, width: int) -> str:
    """At most so many characters on one line, the middle left out."""
    text = " ".join(text.split())
    half = (width - 1) // 2
    return text if len(text) <= width else f"{text[: width - 1 - half]}…{text[-half:]}"
