"""The verbs that use models: sample, chat, eval, export, bench."""

from __future__ import annotations

import sys
from collections import defaultdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from cyclopts import Parameter

from glassgpt.cli.arguments import LIST, ChatOptions, SampleOptions, TrainOptions
from glassgpt.config import (
    CHAT_TEMPERATURE,
    EngineName,
    Format,
    Precision,
    Sampling,
    WeightPrecision,
)

if TYPE_CHECKING:
    from glassgpt.api import LoadedModel
    from glassgpt.inference.engines import Engine
    from glassgpt.system import Reporter

EngineChoice = Annotated[
    EngineName,
    Parameter(
        help="What computes: numba (compiled), numpy, torch (model.py as it is), gpu [the fastest]."
    ),
]
Device = Annotated[
    Literal["auto", "cpu", "cuda", "mps"], Parameter(help="Where to compute: auto, cpu, cuda, mps.")
]
Threads = Annotated[
    int | None, Parameter(help="Of the CPU, for numba and torch; NumPy has its own [all cores].")
]


def sample_verb(
    run: str,
    /,
    *,
    prompt: Annotated[str, Parameter(allow_leading_hyphen=True)] = "",
    text: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    completion_only: bool = False,
    weights: WeightPrecision = "float32",
    engine: EngineChoice = "auto",
    device: Device = "auto",
    threads: Threads = None,
    options: Annotated[SampleOptions, Parameter(name="*")] = {},  # noqa: B006
) -> None:
    """Let a trained model continue a prompt; prints the prompt and what follows.

    RUN is a run directory, any folder with a GPT-2, Llama or Qwen3 checkpoint, a published model
    (gpt2, OWNER/MODEL, openai:124M), or nanoGPT's ckpt.pt. The text appears as it is drawn. How
    it ended (length, stop, end_of_text) goes to stderr. `glassgpt bench decode RUN` shows how
    fast each engine and each precision of the weights is here, `glassgpt eval` what it costs.
    A classifier is asked with --text, and answers with the probability of each of its labels.

    Examples:

    glassgpt sample runs/book --prompt "Once upon a time"

    glassgpt sample gpt2 --prompt "Alan Turing theorized that" --weights int8

    glassgpt sample runs/book --prompt @opening.txt --temperature 0.7 --top-k 50 --num-samples 3

    echo -n "To be" | glassgpt sample runs/book --prompt - --temperature 0 --completion-only

    glassgpt sample runs/reviews --text "A film to remember."

    Parameters
    ----------
    run:
        Run directory, or the name of a model.
    prompt:
        Text to continue; @FILE reads a file, - standard input.
    text:
        Text to classify, by a classifier; @FILE and - as above.
    completion_only:
        Print what was generated without the prompt.
    weights:
        Of the matrices: float32; int8, about four times as fast on a CPU; int4, faster again; on
        a GPU float32 or bfloat16. With int8 and int4, keys and values are float16.
    """
    import glassgpt
    from glassgpt.errors import UserError
    from glassgpt.reporting.terminal import Terminal

    terminal = Terminal()
    model, how = glassgpt.load(run, device=device), Sampling(**options)
    if text is not None:
        if prompt or completion_only or options:
            raise UserError("--text asks a classifier; options of writing do not go with it")
        _print_labels(model, read_prompt(text).rstrip("\r\n"), terminal)  # the last token decides
        return
    opening = read_prompt(prompt)
    chosen = model.engine(engine, weights, threads, reporter=terminal)
    _print_samples(model, chosen, opening, how, terminal, show_prompt=not completion_only)


def _print_labels(model: LoadedModel, text: str, terminal: Reporter) -> None:
    """The probability of each label on stdout, notes to `terminal`."""
    from glassgpt.inference.classify import encode_text
    from glassgpt.reporting.terminal import aligned
    from glassgpt.tokenizers.tokenizer import unknown_note

    found, limit = model.classify(text)[0], model.config.context_length
    if note := unknown_note(model.tokenizer, text):
        terminal.say(f"note: {note}")
    if len(encode_text(model.tokenizer, text)) > limit:
        terminal.say(f"note: only the first {limit} tokens of the text are read")
    print(aligned([(label, f"{probability:.4f}") for label, probability in found.items()]))


def _print_samples(
    model: LoadedModel,
    engine: Engine,
    prompt: str,
    how: Sampling,
    terminal: Reporter,
    *,
    show_prompt: bool,
) -> None:
    """Text on stdout as it comes; of several samples one after the other. Notes to `terminal`."""
    from glassgpt.inference.generate import stream
    from glassgpt.tokenizers.tokenizer import unknown_note

    if note := unknown_note(model.tokenizer, prompt):
        terminal.say(f"note: {note}")
    ids, opening = model.encode_prompt(prompt), prompt if show_prompt else ""
    pieces = stream(engine, model.tokenizer, [ids], how, model.checkpoint.ends)
    if how.num_samples == 1:
        print(opening, end="", flush=True)
        reason = None
        for piece in pieces:
            print(piece.text, end="", flush=True)
            reason = piece.finish_reason or reason
        print(flush=True)
        terminal.say(f"[{reason}]")
        return
    texts, reasons, shown = defaultdict(str), {}, 0
    for piece in pieces:
        texts[piece.sample] += piece.text
        if piece.finish_reason:
            reasons[piece.sample] = piece.finish_reason
        while shown in reasons:  # in order, each as soon as it can be
            print(f"--- sample {shown + 1} [{reasons[shown]}]")
            print(opening + texts.pop(shown), flush=True)
            shown += 1


def chat_verb(
    run: str,
    /,
    *,
    system: Annotated[str | None, Parameter(allow_leading_hyphen=True)] = None,
    weights: WeightPrecision = "float32",
    engine: EngineChoice = "auto",
    device: Device = "auto",
    threads: Threads = None,
    options: Annotated[ChatOptions, Parameter(name="*")] = {},  # noqa: B006
) -> None:
    """Talk with a model finetuned on conversations; a base model continues your text.

    RUN is what `sample` takes. Ctrl-C stops an answer, Ctrl-D leaves. /help lists what else there
    is: take back, try again, save, load, set how answers are drawn. From a pipe, each line is a
    message.

    Examples:

    glassgpt chat runs/helper --system "Answer in one sentence."

    echo "What is a prime number?" | glassgpt chat runs/helper --temperature 0

    Parameters
    ----------
    run:
        Run directory, or the name of a model.
    system:
        What the model is told before everything else.
    weights:
        Of the matrices: float32, int8, int4; on a GPU float32 or bfloat16.
    """
    import glassgpt
    from glassgpt.cli.chat_session import ChatSession, talk
    from glassgpt.reporting.terminal import Terminal

    model = glassgpt.load(run, device=device)
    how = Sampling(**({"temperature": CHAT_TEMPERATURE} | dict(options)))
    terminal = Terminal()
    chosen = model.engine(engine, weights, threads, reporter=terminal)
    session = ChatSession(model, chosen, how, system=system, reporter=terminal)
    terminal.say(session.greeting(run))
    talk(session)


def eval_verb(
    run: str,
    text: Annotated[str, Parameter(allow_leading_hyphen=True)],
    /,
    *,
    weights: Annotated[list[WeightPrecision | Literal["all"]], LIST] = ["float32"],  # noqa: B006
    max_tokens: int | None = None,
    engine: EngineChoice = "auto",
    device: Device = "auto",
    threads: Threads = None,
) -> None:
    """Measure how well a model predicts a text, and what quantised weights cost.

    RUN is what `sample` takes; TEXT is a text file that the model was not trained on, best. Every
    token but the first is predicted once, given half a context before it or more. Loss (nats per
    token) and perplexity compare models with the same tokenizer, bits per byte any two.

    Examples:

    glassgpt eval runs/book held-out.txt

    glassgpt eval runs/book held-out.txt --weights all

    glassgpt eval gpt2 - --weights float32 int8 --max-tokens 10000 < article.txt

    Parameters
    ----------
    run:
        Run directory, or the name of a model.
    text:
        Text file, UTF-8; - is standard input.
    weights:
        How the engine holds the matrices: float32, int8, int4, or all of them in turn.
    max_tokens:
        Look only at so many tokens at the beginning of the text [all].
    """
    from glassgpt.checkpoints.load import load_pretrained
    from glassgpt.checkpoints.run_directory import require_language_model
    from glassgpt.evaluation.text_loss import compare_weights, loss_table, read_text
    from glassgpt.reporting.terminal import Terminal
    from glassgpt.tokenizers.tokenizer import unknown_note

    content, terminal = read_text(text), Terminal()
    checkpoint = require_language_model(load_pretrained(run), run)
    note = unknown_note(checkpoint.tokenizer, content)
    if note:
        terminal.say(f"note: {note}")
    every = ["float32", "int8", "int4"] if "all" in weights or not weights else []
    chosen = list(dict.fromkeys([*every, *(w for w in weights if w != "all")]))
    try:
        found = compare_weights(
            checkpoint,
            content,
            chosen,
            engine=engine,
            device=device,
            threads=threads,
            max_tokens=max_tokens,
            reporter=terminal,
        )
    finally:
        terminal.close()
    print(loss_table(found))


def export_verb(
    run: str,
    /,
    *,
    to: Format,
    out: str | None = None,
    precision: Precision = "F32",
    overwrite: bool = False,
) -> None:
    """Write a model for other programs: llama.cpp, ONNX Runtime, nanoGPT, or NumPy alone.

    RUN is what `sample` takes. The file is read back and compared: the largest difference of a
    logit is printed. transformers and vLLM need no export: they load a run directory as it is.

    Examples:

    glassgpt export runs/book --to gguf --precision Q8_0

    glassgpt export gpt2 --to onnx --out gpt2.onnx

    Parameters
    ----------
    run:
        Run directory, or the name of a model.
    to:
        gguf (llama.cpp, Ollama), onnx (with inputs for the cache), nanogpt (ckpt.pt, meta.pkl),
        numpy (one .npz).
    out:
        File to write, for nanogpt a folder [the name of RUN with a suffix, in this folder].
    precision:
        Of the matrices of a GGUF: F32, F16, Q8_0.
    overwrite:
        Replace OUT if it exists.
    """
    from glassgpt.checkpoints.formats import SUFFIXES, export_model
    from glassgpt.checkpoints.load import load_pretrained
    from glassgpt.checkpoints.run_directory import require_language_model, run_name

    name = run_name(run).replace(":", "-")
    target = Path(out) if out else Path(name.rpartition("/")[2].removesuffix(".pt") + SUFFIXES[to])
    checkpoint = require_language_model(load_pretrained(run), run)
    done = export_model(checkpoint, to, target, precision=precision, overwrite=overwrite)
    print(
        f"{done.path}: {done.n_bytes / 1e6:,.1f} MB · largest difference in logits "
        f"{done.difference:.2g}" + (f" · {done.note}" if done.note else "")
    )


def bench_verb(
    what: Literal["decode", "train"],
    run: str | None = None,
    /,
    *,
    engine: Annotated[list[EngineName] | None, LIST] = None,
    weights: Annotated[list[WeightPrecision] | None, LIST] = None,
    prompt_tokens: Annotated[list[int], LIST] = [32, 512],  # noqa: B006
    new_tokens: int = 128,
    preset: str | None = None,
    seconds: float = 5.0,
    options: Annotated[TrainOptions, Parameter(name="*")] = {},  # noqa: B006
) -> None:
    """Measure how fast a model generates or trains here, and where the time goes.

    decode: tokens per second with every engine and precision. Prompt of N is reading a prompt;
    batch 1 and 8 is writing, so many texts side by side. MB/token is what a step reads of the
    weights; the last column is the share of this machine's memory speed that batch 1 reaches.

    train: what of a training step is data, forward, backward, optimizer, and what evaluation takes;
    and the share of the matrix products that this device can do (MFU). The options are those of
    `glassgpt train`; with RUN, the shape is that model's.

    Examples:

    glassgpt bench decode gpt2 --engine numba numpy --weights float32 int8 --threads 2

    glassgpt bench train runs/book

    glassgpt bench train --preset gpt2-124m --batch-tokens 4096 --micro-batch-size 4

    Parameters
    ----------
    what:
        decode or train.
    run:
        Run directory, or the name of a model [train: the shape that the options make].
    engine:
        decode: only these: numba, numpy, torch, gpu [all].
    weights:
        decode: only these: float32, int8, int4 [all].
    prompt_tokens:
        decode: lengths of the prompts; new tokens follow the shortest.
    new_tokens:
        decode: generated for every row.
    preset:
        train: a packaged recipe.
    seconds:
        train: how long to measure.
    """
    from glassgpt.reporting.terminal import Terminal

    decode = dict(
        engines=engine or (),
        weights=weights or (),
        prompt_tokens=prompt_tokens,
        new_tokens=new_tokens,
    )
    terminal = Terminal()
    try:
        print(_measure(what, run, preset, seconds, dict(options), decode, terminal))
    finally:
        terminal.close()


def _measure(
    what: str, run: Any, preset: Any, seconds: float, options: Any, decode: Any, reporter: Reporter
) -> str:
    from glassgpt.errors import UserError

    if what == "train":
        from glassgpt.training.step_timing import bench_train

        return bench_train(run, preset, options, seconds=seconds, reporter=reporter)
    if run is None or set(options) - {"threads"} or preset:
        raise UserError("bench decode needs a RUN, and takes no options of training")
    from glassgpt.evaluation.decoding_speed import describe_decode

    return describe_decode(run, threads=options.get("threads"), reporter=reporter, **decode)


def read_prompt(prompt: str) -> str:
    """TEXT, @FILE or - for standard input."""
    if prompt == "-":
        return sys.stdin.buffer.read().decode("utf-8", "replace")
    if prompt.startswith("@") and len(prompt) > 1:
        from glassgpt.errors import explain_os_errors

        with explain_os_errors(f"read the prompt {prompt[1:]}"):
            return Path(prompt[1:]).read_bytes().decode("utf-8", "replace")
    return prompt
