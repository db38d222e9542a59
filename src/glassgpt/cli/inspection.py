"""The verbs that show what is inside: plot, trace, explore."""

from __future__ import annotations

from typing import Annotated, Literal

from cyclopts import Parameter

from glassgpt.cli.arguments import LIST, TrainOptions
from glassgpt.cli.inference import Device, read_prompt


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
    from glassgpt.cli import figures

    options = dict(x=x, log_x=log_x, log_y=log_y, layer=layer, head=head)
    text = None if attention is None else read_prompt(attention)
    for line in figures.draw(runs, out, embedding=embedding, attention=text, overwrite=overwrite,
                             **{name: value for name, value in options.items()
                                if value is not None and value is not False}):  # fmt: skip
        print(line)


def trace_verb(
    run: str | None = None,
    text: Annotated[str, Parameter(allow_leading_hyphen=True)] = "",
    /,
    *,
    show: Literal["operations", "lens", "attribution", "loss", "patch"] = "operations",
    layer: int | None = None,
    every: bool = False,
    off: Annotated[list[str], LIST] = [],  # noqa: B006
    fill: Literal["zero", "mean"] = "zero",
    patch_from: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    parts: Annotated[list[str], LIST] = [],  # noqa: B006
    token: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    out: str | None = None,
    overwrite: bool = False,
    device: Device = "auto",
    preset: str | None = None,
    tokens: int | None = None,
    batch: int | None = None,
    options: Annotated[TrainOptions, Parameter(name="*")] = {},  # noqa: B006
) -> None:
    """Look into one forward pass: every operation with its shapes, and what it means.

    RUN is what `sample` takes, TEXT what the model reads. operations: the whole pass as a table,
    operation by operation, shapes in letters (B batch, T tokens, S tokens seen, C width, H heads,
    K key/value heads, D head width, F hidden width, V vocabulary) and in numbers, parameters,
    FLOPs, and what the numbers are like. lens: what the model would write, read from each layer.
    attribution: which part added how much to a token's logit. loss: how surprised it is by each
    token. patch: which place of which layer makes the difference between two texts.

    With --off, parts are switched off first, with --patch-from and --parts taken from another
    text: 3 is a block, 3.attn and 3.mlp are its halves, 3.h2 is a head; --parts also takes names of
    activations (blocks.3.resid_mid). What that changes is said. --out draws it as well.

    Without RUN, the model is the one that `train` with these options (--preset, --n-layer ...)
    would make, and has no numbers yet: shapes, parameters and FLOPs.

    Examples:

    glassgpt trace runs/book "To be or not to be"

    glassgpt trace gpt2 "The Eiffel Tower is in" --show lens --out lens.png

    glassgpt trace gpt2 "When Mary and John went home, John gave" --off 9.h9 9.h6 --show attribution

    glassgpt trace gpt2 "Rome is in" --patch-from "Paris is in" --show patch --token " Italy"

    glassgpt trace --preset gpt2-124m --tokens 1024

    Parameters
    ----------
    run:
        Run directory, or the name of a model.
    text:
        What it reads; @FILE reads a file, - standard input.
    show:
        operations, lens, attribution, loss, patch.
    layer:
        operations: of this block [0].
    every:
        operations: of all blocks.
    off:
        Parts to switch off.
    fill:
        What takes their place: zero, or the mean over all positions of this text.
    patch_from:
        Another text, of as many tokens.
    parts:
        What to take from it.
    token:
        attribution, patch: of this token [the likeliest next one].
    out:
        Figure to draw: .png, .svg or .html.
    overwrite:
        Replace OUT if it exists.
    preset:
        Without RUN: a packaged recipe.
    tokens:
        Without RUN: how many of them are read [10].
    batch:
        Without RUN: texts side by side [1].
    """
    import glassgpt
    from glassgpt.cli.trace_report import describe_preset, look
    from glassgpt.errors import UserError

    if run is None:
        if show != "operations" or off or patch_from or parts or token or out:
            raise UserError("without a RUN there are no numbers to change, to show or to draw; "
                            "name one, or give only --preset, --tokens, --batch, --layer and "
                            "--every")  # fmt: skip
        n_tokens, batch = (10 if tokens is None else tokens), (1 if batch is None else batch)
        print(describe_preset(preset, dict(options), n_tokens, batch, layer=layer, every=every))
        return
    if preset or options or tokens is not None or batch is not None:
        raise UserError("a RUN has its shape, and TEXT its tokens; --preset, --tokens, --batch and "
                        "options of training go without one")  # fmt: skip
    for line in look(glassgpt.load(run, device=device), read_prompt(text), show=show, layer=layer,
                     every=every, off=off, fill=fill, parts=parts, token=token, out=out,
                     patch_from=None if patch_from is None else read_prompt(patch_from),
                     overwrite=overwrite):  # fmt: skip
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

    from glassgpt.studio.server import listen, serve
    from glassgpt.studio.session import Session

    with listen(host, port) as listener, contextlib.suppress(KeyboardInterrupt):
        session = Session(run, other, device)
        port = listener.getsockname()[1]
        url = f"http://{f'[{host}]' if ':' in host else host}:{port}/"
        print(f"{url} (Ctrl-C ends)", flush=True)
        if browser:
            webbrowser.open(url)
        serve(session, listener, host)
