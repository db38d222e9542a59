"""From runs and models to figures: what `glassgpt plot` draws, and what it says of it.

    print(plot_losses(["runs/a", "runs/b"], Path("loss.svg"), x="tokens"))

Finds what the pictures need (metrics, options, weights, attention patterns); how they look stands
in reporting/plots.py and interpret/figures.py.
"""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Sequence
from pathlib import Path

import numpy as np

import glassgpt
from glassgpt.checkpoints.huggingface import labels_from_json
from glassgpt.checkpoints.load import is_hub_name, load_pretrained
from glassgpt.checkpoints.run_directory import find_model, run_name
from glassgpt.config import DataConfig
from glassgpt.errors import UserError, explain_os_errors, first_of
from glassgpt.interpret.figures import draw_attention, draw_embedding
from glassgpt.reporting.plots import (
    COLOURS,
    Curve,
    X,
    check_target,
    font_note,
    guessing_loss,
    loss_curves,
    shortened,
)
from glassgpt.reporting.run_log import read_metrics
from glassgpt.reporting.terminal import aligned, format_seconds
from glassgpt.system import Json, read_json
from glassgpt.tokenizers.tokenizer import Tokenizer, unknown_note

MAX_TOKENS = 128  # of a text whose attention is drawn: more can't be told apart
_MAX_LABEL = 14  # characters of a token
_MAX_NAME = 48  # characters of a run's
# How long, how often and where to: seen in the curves, or of no matter to them.
_NOT_COMPARED = {
    "out",
    "data",
    "threads",
    "tensorboard",
    "wandb",
    "max_steps",
    "eval_interval",
    "log_interval",
    "checkpoint_interval",
    "sample_tokens",
    "sample_prompt",
    "eval_batches",
    "device",
    "compile",
}
_MAX_DIFFERENCES = 3  # options in the label of a run


def draw_figure(
    runs: Sequence[str],
    out: str | None = None,
    *,
    embedding: bool = False,
    attention: str | None = None,
    x: X | None = None,
    log_x: bool = False,
    log_y: bool = False,
    layer: int | None = None,
    head: int | None = None,
    overwrite: bool = False,
) -> list[str]:
    """What `glassgpt plot` does: one figure, of losses unless another is asked for; returns lines
    that say what it is. Raises `UserError`, before anything is drawn, for what doesn't go
    together."""
    what = "embedding" if embedding else "loss" if attention is None else "attention"
    if embedding and attention is not None:
        raise UserError("--embedding and --attention are two figures; ask for one at a time")
    if what != "loss" and len(runs) > 1:
        raise UserError(f"--{what} draws one model, not {len(runs)}; name one RUN")
    of_losses = {"x": x is not None, "log-x": log_x, "log-y": log_y}
    of_attention = {"layer": layer is not None, "head": head is not None}
    foreign = (of_losses if what != "loss" else {}) | (of_attention if what != "attention" else {})
    for name in (name for name, given in foreign.items() if given):
        asked = f"--{what}" if what != "loss" else "a figure of losses"
        raise UserError(f"--{name} does not go with {asked}")
    several = len({Path(run).resolve() for run in runs}) > 1
    name = "loss-compare" if several else f"{_title(runs[0])}-{what}"
    target = Path(out) if out else Path(re.sub(r"[^\w.-]+", "-", name) + ".png")
    check_target(target, overwrite)
    if what == "loss":
        lines = plot_losses(runs, target, x=x or "step", log_x=log_x, log_y=log_y)
    elif attention is None:
        lines = plot_embedding(runs[0], target)
    else:
        lines = plot_attention(runs[0], attention, target, layer=layer, head=head)
    return [*lines, f"{target} written"]


# -- losses --------------------------------------------------------------------------------------


def plot_losses(
    runs: Sequence[str | Path],
    target: Path,
    *,
    x: X = "step",
    log_x: bool = False,
    log_y: bool = False,
) -> list[str]:
    """Draw the losses of runs into `target` -> what there is to say: a table, and notes.

    A run that has no loss yet is left out, with a note. Raises `UserError` where nothing is left,
    and for what is no run.
    """
    folders = list({Path(run).resolve(): Path(run) for run in runs}.values())
    rows = {folder: _read(folder) for folder in folders}
    known = [folder for folder in folders if any(map(_has_loss, rows[folder]))]
    empty = [str(folder) for folder in folders if folder not in known]
    if not known:
        raise UserError(
            f"{first_of(empty)}: no loss is recorded yet; wait for the first evaluation"
        )
    notes = [f"note: {first_of(empty)} left out: no loss is recorded yet"] if empty else []
    names, abouts = short_names(known), [_about(folder) for folder in known]
    labels = [
        f"{name} ({more})" if more else name
        for name, more in zip(names, differences(abouts), strict=True)
    ]
    guesses = {folder: guess for folder in known if (guess := _guessing(folder))}
    curves = []
    for label, folder in zip(labels, known, strict=True):
        loss, _ = guesses.get(folder, (None, ""))
        curves.append(Curve(label, rows[folder], loss))
    if len(set(guesses.values())) > 1:
        notes.append(
            "note: these runs do not choose among the same tokens, so their losses do not "
            "compare; `glassgpt eval` gives bits per byte, which do"
        )
    broken = sum(_is_broken(row) for folder in known for row in rows[folder])
    if broken:
        notes.append(f"note: {broken} losses left out that are no finite numbers")
    per = " or ".join(sorted({per for _, per in guesses.values()})) or "token"
    header = ["run", "best val loss", "at step", "steps", "tokens", "time"]
    table = aligned([header, *map(_line, curves)])
    loss_curves(target, curves, x=x, log_x=log_x, log_y=log_y, per=per, about=table)
    return [table, *notes]


def short_names(folders: Sequence[Path]) -> list[str]:
    """The last part of each path, and as many before it as it takes to tell them apart."""
    parts = [folder.resolve().parts for folder in folders]
    names = []
    for mine in parts:
        n = 1
        while sum(other[-n:] == mine[-n:] for other in parts) > 1:
            n += 1
        names.append(shortened(str(Path(*mine[-n:])), _MAX_NAME))
    return names


def differences(abouts: Sequence[Json]) -> list[str]:
    """ "n_layer 6, seed 2" for each glassgpt.json: what was asked for and isn't alike in all."""
    if len(abouts) < 2 or not all(abouts):
        return [""] * len(abouts)
    defaults = {"shape": "modern"} | dataclasses.asdict(DataConfig())
    values = [
        defaults | about.get("train", {}) | about.get("model", {}) | about.get("options", {})
        for about in abouts
    ]
    asked = dict.fromkeys(name for about in abouts for name in about.get("options", {}))
    differing = [
        name
        for name in asked
        if name not in _NOT_COMPARED and len({repr(one.get(name)) for one in values}) > 1
    ]
    more = ", …" if len(differing) > _MAX_DIFFERENCES else ""
    return [
        ", ".join(f"{name} {_short(one.get(name))}" for name in differing[:_MAX_DIFFERENCES]) + more
        for one in values
    ]


def _short(value: object) -> str:
    if value is None:
        return "off"
    return f"{value:g}" if isinstance(value, float) else shortened(str(value), 20)


def _read(folder: Path) -> list[Json]:
    """metrics.jsonl; says what to name instead where there is none."""
    path = folder / "metrics.jsonl"
    if not folder.exists():
        if is_hub_name(str(folder)):
            raise UserError(
                f"{folder} is no folder here, and published models keep no record of "
                "their training; --embedding and --attention draw them"
            )
        raise UserError(f"{folder} does not exist; name a run directory (see: ls runs)")
    if not path.exists():
        raise UserError(
            f"{folder} is no run directory (it has no metrics.jsonl); "
            "--embedding and --attention draw a model alone"
        )
    with explain_os_errors(f"read {path}"):
        try:
            rows = read_metrics(path)
        except UnicodeDecodeError:
            raise UserError(f"{path} is damaged: it is no text") from None
    return [row for row in rows if isinstance(row, dict)]


def _has_loss(row: Json) -> bool:
    return row.get("train_loss") is not None or row.get("val_loss") is not None


def _is_broken(row: Json) -> bool:
    return any(
        isinstance(row.get(name), float) and not math.isfinite(row[name])
        for name in ("train_loss", "val_loss")
    )


def _about(folder: Path) -> Json:
    """glassgpt.json; {} before the first evaluation."""
    path = folder / "glassgpt.json"
    return read_json(path) if path.exists() else {}


def _guessing(folder: Path) -> tuple[tuple[float, str], str] | None:
    """The loss of guessing with its name, and what is guessed: a token, or the class of a text."""
    try:
        config = read_json(find_model(folder) / "config.json")
    except UserError:  # metrics without a model, from another machine perhaps
        return None
    labels, vocab_size = labels_from_json(config), config.get("vocab_size")
    if labels:
        return guessing_loss(len(labels), " classes"), "text"
    return (guessing_loss(vocab_size), "token") if vocab_size else None


def _line(curve: Curve) -> list[str]:
    """A run's row of the table."""
    best = curve.best()
    last = {
        name: max((row[name] for row in curve.rows if name in row), default=None)
        for name in ("step", "tokens", "seconds")
    }
    return [
        curve.label,
        f"{best[1]:.4f}" if best else "-",
        f"{best[0]:,}" if best else "-",
        *("-" if last[name] is None else f"{last[name]:,}" for name in ("step", "tokens")),
        "-" if last["seconds"] is None else format_seconds(last["seconds"]),
    ]


# -- inside a model ------------------------------------------------------------------------------


def plot_embedding(run: str, target: Path) -> list[str]:
    """Draw a model's token embeddings, and how alike its positions are where it learned some."""
    checkpoint = load_pretrained(run)
    tokenizer, weights = checkpoint.tokenizer, checkpoint.weights
    V = min(tokenizer.vocab_size, checkpoint.config.vocab_size)  # some tables are padded
    table = _finite(weights["token_embedding.weight"][:V], run)
    positions = None
    if checkpoint.config.position == "learned":
        positions = _finite(weights["position_embedding.weight"], run)
    kinds = [token_kind(tokenizer, token) for token in range(V)]
    # Labels are given in this order while there is room: whole characters before odd bytes.
    order = sorted(range(V), key=lambda token: (kinds[token] == _ODD, token))
    labels = [label_of(tokenizer, token) for token in order]
    of_labels, title = [kinds[token] for token in order], _title(run)
    draw_embedding(target, table[order], labels, of_labels, KINDS, positions=positions, title=title)
    what = f"{V:,} tokens" + ("" if positions is None else f", {len(positions):,} positions")
    note = font_note(labels, target)
    return [what, note] if note else [what]


def plot_attention(
    run: str, text: str, target: Path, *, layer: int | None = None, head: int | None = None
) -> list[str]:
    """Draw where the heads of a model look while it reads `text`; of all layers and heads, or one
    of them."""
    import torch  # losses are drawn without it

    from glassgpt.interpret.trace import record

    loaded = glassgpt.load(run, device="cpu")
    config, tokenizer = loaded.config, loaded.tokenizer
    for name, value, n in (("layer", layer, config.n_layer), ("head", head, config.n_head)):
        if value is not None and not 0 <= value < n:
            raise UserError(f"--{name} {value}: this model has {name}s 0 to {n - 1}")
    tokens, notes = loaded.encode_prompt(text), []
    if not tokens:
        raise UserError("--attention needs a text for the model to read, of one token or more")
    if note := unknown_note(tokenizer, text):
        notes.append(f"note: {note}")
    most = min(config.context_length, MAX_TOKENS)
    if len(tokens) > most:
        notes.append(f"note: only the first {most} of {len(tokens):,} tokens are drawn")
        tokens = tokens[:most]
    layers = range(config.n_layer) if layer is None else [layer]
    heads = range(config.n_head) if head is None else [head]
    trace = record(loaded.model, torch.tensor([tokens]), keep=["pattern"])
    patterns = np.stack([trace[f"blocks.{i}.pattern"][0] for i in layers])[:, heads]  # (L, H, T, T)
    patterns = _finite(patterns, run)
    chosen = [
        f"{name} {only[0]}" for name, only in (("layer", layers), ("head", heads)) if len(only) == 1
    ]
    labels = [label_of(tokenizer, token) for token in tokens]
    if note := font_note(labels, target):
        notes.append(note)
    title = ", ".join([_title(run), *chosen])
    draw_attention(target, patterns, labels, layers=layers, heads=heads, title=title)
    return [f"{len(layers)} layers x {len(heads)} heads, {len(tokens)} tokens", *notes]


def _finite(array: np.ndarray, run: str) -> np.ndarray:
    array = np.asarray(array, dtype=np.float32)
    if not np.isfinite(array).all():
        raise UserError(
            f"{run} holds numbers that are none (NaN or infinity): its weights are broken"
        )
    return array


def _title(run: str) -> str:
    return shortened(run_name(run), 60)


# -- tokens as labels ----------------------------------------------------------------------------

_MARKS = {" ": "␣", "\n": "⏎", "\t": "⇥", "\r": "\\r"}
_ODD = "part of a character, control"
KINDS = {  # of tokens: the colour of each
    "lower case, other letters": COLOURS[0],
    "Capital": COLOURS[1],
    "number": COLOURS[2],
    "blank, line end, special": COLOURS[3],
    "punctuation, sign": COLOURS[6],
    _ODD: COLOURS[4],
}


def label_of(tokenizer: Tokenizer, token: int) -> str:
    """A token as a short visible word: blanks as ␣, line ends as ⏎, stray bytes in hexadecimal."""
    content = tokenizer.token_bytes(token)
    try:
        text = content.decode()
    except UnicodeDecodeError:
        return shortened("".join(f"\\x{byte:02x}" for byte in content), _MAX_LABEL)
    marked = "".join(_MARKS.get(char) or _visible(char) for char in text)
    return shortened(marked, _MAX_LABEL) or "(empty)"


def _visible(char: str) -> str:
    return char if char.isprintable() else f"\\u{ord(char):04x}"


def token_kind(tokenizer: Tokenizer, token: int) -> str:
    """Which of `KINDS` it is, by its first character that is no blank."""
    try:
        text = tokenizer.token_bytes(token).decode()
    except UnicodeDecodeError:
        return _ODD
    word = text.strip()
    if not word or text == tokenizer.unknown_token or text in tokenizer.special:
        return "blank, line end, special"
    if not word[0].isprintable():
        return _ODD
    if word[0].isalpha():
        return "Capital" if word[0].isupper() else "lower case, other letters"
    return "number" if word[0].isalnum() else "punctuation, sign"
