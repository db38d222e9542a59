"""The verbs that show what is inside: plot, trace, explore."""

from __future__ import annotations

from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from glassgpt.cli.arguments import Changes, FigureFile, Removal, TrainOptions
from glassgpt.cli.inference import Device, read_prompt

if TYPE_CHECKING:
    from glassgpt.cli.trace_report import Reading

Text = Annotated[str, Parameter(allow_leading_hyphen=True)]
Token = Annotated[str | None, Parameter(allow_leading_hyphen=True)]
_AS_IT_IS, _NOTHING_OFF, _NO_FIGURE = Changes(), Removal(), FigureFile()


def plot_verb(
    runs: Annotated[list[str], Parameter(negative_iterable=())],
    /,
    *,
    x: Literal["step", "tokens", "time"] | None = None,
    log_x: bool = False,
    log_y: bool = False,
    embedding: bool = False,
    attention: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    layer: int | None = None,
    head: int | None = None,
    out: str | None = None,
    overwrite: bool = False,
) -> None:
    """Draw the losses of runs, or what is inside a model: embeddings and attention.

    RUNS are run directories, also of a training that still goes on. Each has a colour: training
    loss, smoothed, as a thin line, validation loss with marks, the best one filled; a dotted line
    is the loss of guessing, ln(vocabulary). Where runs differ in options, the legend says in
    which. The table printed beside it holds the best losses.

    --embedding and --attention draw one model, and take whatever `sample` takes: where two
    principal components put each token, and how alike learned positions are; or which tokens each
    head looks at while the model reads a text.

    The figure is a file in this folder, named after RUN (book-loss.png, book-embedding.png,
    book-attention.png, of several runs loss-compare.png), or --out, whose suffix decides: .png;
    .svg; .html, a page that needs nothing else.

    Examples:

    glassgpt plot runs/book

    glassgpt plot runs/* --x tokens --log-x --out losses.svg

    glassgpt plot runs/book --embedding --out embedding.html

    glassgpt plot gpt2 --attention "The cat sat because it was tired" --layer 4 --head 11

    Parameters
    ----------
    runs:
        Run directories; for --embedding and --attention one of them, or the name of a model.
    x:
        What losses are drawn against: step, tokens, or time since the training began [step].
    log_x:
        A logarithmic axis for that, without step 0: laws of scaling become straight lines.
    log_y:
        A logarithmic axis for the loss.
    embedding:
        Draw the token embeddings, and the position embeddings of models that learn some.
    attention:
        Draw the attention patterns for this text; @FILE reads a file, - standard input.
    layer:
        With --attention: only this layer, from 0 [all].
    head:
        With --attention: only this head, from 0 [all].
    out:
        File to write: .png, .svg or .html.
    overwrite:
        Replace OUT if it exists.
    """
    from glassgpt.cli.figures import draw_figure

    for line in draw_figure(
        runs,
        out,
        embedding=embedding,
        attention=None if attention is None else read_prompt(attention),
        x=x,
        log_x=log_x,
        log_y=log_y,
        layer=layer,
        head=head,
        overwrite=overwrite,
    ):
        print(line)


# -- trace -----------------------------------------------------------------------------------------


def trace_verb(
    *words: Annotated[str, Parameter(allow_leading_hyphen=True, show=False)],
) -> None:
    """Look into one forward pass: every operation with its shapes, and what it means.

    Each view reads a text with a model: ops is the whole pass as a table; lens, what the model
    would write, read from each layer; attribution, which part added how much to a token's logit;
    loss, how surprised it is by each token; patch, which place of which layer makes the difference
    between two texts.

    Try these:

    glassgpt trace ops runs/book "To be or not to be"

    glassgpt trace lens gpt2 "The Eiffel Tower is in" --out lens.png

    glassgpt trace patch --help
    """
    from glassgpt.errors import UserError

    if not words:
        raise UserError("say what to show: glassgpt trace ops, lens, attribution, loss or patch")
    raise UserError(f"write: {_new_spelling(list(words))}")


def _new_spelling(words: list[str]) -> str:
    """The command that does what `glassgpt trace WORDS` did when --show chose the view."""
    view, rest = "operations", []
    while words:
        word = words.pop(0)
        if word == "--show" and words:
            view = words.pop(0)
        elif word.startswith("--show="):
            view = word.removeprefix("--show=")
        else:
            rest.append(word)
    quoted = (f'"{word}"' if " " in word or not word else word for word in rest)
    return " ".join(["glassgpt trace", {"operations": "ops"}.get(view, view), *quoted])


def trace_ops_verb(
    run: str | None = None,
    text: Text = "",
    /,
    *,
    layer: int | None = None,
    every: bool = False,
    changes: Changes = _AS_IT_IS,
    device: Device = "auto",
    preset: str | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    options: Annotated[TrainOptions, Parameter(name="*")] = {},  # noqa: B006
) -> None:
    """Show a forward pass operation by operation: shapes, parameters, FLOPs, what numbers are like.

    Shapes stand in letters (B batch, T tokens, S tokens seen, C width, H heads, K key/value heads,
    D head width, F hidden width, V vocabulary) and in numbers. With --off, parts are switched off
    first, with --patch-from and --parts taken from another text; what that changes is said.

    Without RUN, the model is the one that `train` with these options (--preset, --n-layer ...)
    would make, and has no numbers yet: shapes, parameters and FLOPs.

    Examples:

    glassgpt trace ops runs/book "To be or not to be"

    glassgpt trace ops gpt2 "To be or not to be" --layer 11 --off 9.h9

    glassgpt trace ops --preset gpt2-124m --tokens 1024

    Parameters
    ----------
    run:
        Run directory, or the name of a model.
    text:
        What it reads; @FILE reads a file, - standard input.
    layer:
        Show this block [0].
    every:
        Show all blocks.
    preset:
        Without RUN: a packaged recipe.
    tokens:
        Without RUN: how many of them are read [10].
    batch:
        Without RUN: texts side by side [1].
    """
    from glassgpt.cli.trace_report import describe_preset
    from glassgpt.errors import UserError

    if run is None:
        if changes != _AS_IT_IS:
            raise UserError(
                "without a RUN there are no numbers to change; name one, or give only "
                "--preset, --tokens, --batch, --layer and --every"
            )
        n_tokens, batch = (10 if tokens is None else tokens), (1 if batch is None else batch)
        print(describe_preset(preset, dict(options), n_tokens, batch, layer=layer, every=every))
        return
    if preset or options or tokens is not None or batch is not None:
        raise UserError(
            "a RUN has its shape, and TEXT its tokens; --preset, --tokens, --batch and "
            "options of training go without one"
        )
    _print(_reading(run, text, changes, device).operations(layer, every=every))


def trace_lens_verb(
    run: str,
    text: Text = "",
    /,
    *,
    changes: Changes = _AS_IT_IS,
    figure: FigureFile = _NO_FIGURE,
    device: Device = "auto",
) -> None:
    """Show what a model would write after the text if each layer were its last.

    The head reads the residual stream before the first block and after every block (the logit
    lens); the likeliest next tokens stand beside each. The figure shows this for every token.

    Examples:

    glassgpt trace lens runs/book "To be or not to be"

    glassgpt trace lens gpt2 "The Eiffel Tower is in" --out lens.png

    Parameters
    ----------
    run:
        Run directory, or the name of a model.
    text:
        What it reads; @FILE reads a file, - standard input.
    """
    target = figure.target()
    _print(_reading(run, text, changes, device).lens(target))


def trace_attribution_verb(
    run: str,
    text: Text = "",
    /,
    *,
    token: Token = None,
    changes: Changes = _AS_IT_IS,
    figure: FigureFile = _NO_FIGURE,
    device: Device = "auto",
) -> None:
    """Show which part of a model added how much to the logit of a token after the text.

    Parts are embeddings, heads (9.h6), MLPs (9.mlp) and biases; what they add is the whole logit
    (direct logit attribution).

    Examples:

    glassgpt trace attribution runs/book "To be or not to be"

    glassgpt trace attribution gpt2 "When Mary and John went home, John gave" --off 9.h9 9.h6

    Parameters
    ----------
    run:
        Run directory, or the name of a model.
    text:
        What it reads; @FILE reads a file, - standard input.
    token:
        Whose logit [the likeliest next token].
    """
    target = figure.target()
    _print(_reading(run, text, changes, device).attribution(token, target))


def trace_loss_verb(
    run: str,
    text: Text,
    /,
    *,
    changes: Changes = _AS_IT_IS,
    figure: FigureFile = _NO_FIGURE,
    device: Device = "auto",
) -> None:
    """Show how surprised a model is by each token of the text: its loss in nats, and its rank.

    Rank 1 is the token that the model held to be the likeliest.

    Examples:

    glassgpt trace loss runs/book "To be or not to be"

    glassgpt trace loss gpt2 @article.txt --out loss.svg

    Parameters
    ----------
    run:
        Run directory, or the name of a model.
    text:
        What it reads; @FILE reads a file, - standard input.
    """
    target = figure.target()
    _print(_reading(run, text, changes, device).loss(target))


def trace_patch_verb(
    run: str,
    text: Text = "",
    /,
    *,
    patch_from: Annotated[str, Parameter(allow_leading_hyphen=True)],
    token: Token = None,
    removal: Removal = _NOTHING_OFF,
    figure: FigureFile = _NO_FIGURE,
    device: Device = "auto",
) -> None:
    """Show which place of which layer makes the difference between two texts.

    The model reads TEXT again and again; each time the residual stream after one block, at one
    token, is the one of the other text (activation patching). What that adds to a token's logit
    is said for every block and token.

    Examples:

    glassgpt trace patch gpt2 "Rome is in" --patch-from "Paris is in" --token " Italy"

    Parameters
    ----------
    run:
        Run directory, or the name of a model.
    text:
        What it reads; @FILE reads a file, - standard input.
    patch_from:
        Another text, of as many tokens; @FILE and - as for TEXT.
    token:
        Whose logit [the likeliest next token].
    """
    target, changes = figure.target(), Changes(removal.off, removal.fill)
    _print(_reading(run, text, changes, device).patch(read_prompt(patch_from), token, target))


def _reading(run: str, text: str, changes: Changes, device: str) -> Reading:
    """The model that reads the text, parts of it changed."""
    import glassgpt
    from glassgpt.cli.trace_report import Reading

    if changes.patch_from is not None:
        changes = replace(changes, patch_from=read_prompt(changes.patch_from))
    return Reading(glassgpt.load(run, device=device), read_prompt(text), changes)


def _print(lines: list[str]) -> None:
    for line in lines:
        print(line)


def explore_verb(
    run: str,
    /,
    *,
    other: Annotated[str | None, Parameter(name="--with")] = None,
    host: str = "127.0.0.1",
    port: int = 8321,
    browser: bool = True,
    device: Device = "auto",
) -> None:
    """See inside a model in the browser: every number, and where it comes from.

    RUN is what `sample` takes. A server on this machine shows the page; Ctrl-C ends it. Nothing is
    fetched from elsewhere, and only this machine can open the page.

    Examples:

    glassgpt explore runs/book

    glassgpt explore runs/helper --with gpt2 --port 9000 --no-browser

    Parameters
    ----------
    run:
        Run directory, or the name of a model.
    other:
        Another model, to compare.
    host:
        Address to listen on; 0.0.0.0 lets other machines in.
    port:
        To listen on; 0 takes a free one.
    browser:
        Open the page in a browser.
    """
    import contextlib
    import webbrowser

    from glassgpt.studio.explorer import Explorer
    from glassgpt.studio.server import listen, serve

    with listen(host, port) as listener, contextlib.suppress(KeyboardInterrupt):
        explorer = Explorer(run, other, device)
        port = listener.getsockname()[1]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        print(f"{url} (Ctrl-C ends)", flush=True)
        if browser:
            webbrowser.open(url)
        serve(explorer, listener, host)
