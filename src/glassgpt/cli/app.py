"""The command line: `glassgpt VERB [THING] [--options]`. Arguments in, one call, output; no logic.

Nothing heavy is imported at the top: `glassgpt --help` must answer at once. The verbs' own
signatures and help stand in the other modules of this room.
"""

from __future__ import annotations

import importlib
import io
import os
import sys

from cyclopts import App, CycloptsError

from glassgpt import __version__
from glassgpt.errors import UserError, explain_os_errors

VERBS = {
    "demo": "Train a small GPT on real text for about a minute and see what it has learned.",
    "prepare": "Turn text into token files that training can map into memory, however large.",
    "train": "Train a GPT on text and keep it as a run directory that other tools load as it is.",
    "finetune": "Train a model further: on other text, into a chat partner, or into a classifier.",
    "plan": "Say what a training would take: memory, time and money, here or on the GPUs you name.",
    "sample": "Let a trained model continue a prompt; prints the prompt and what follows.",
    "chat": "Talk with a model finetuned on conversations; a base model continues your text.",
    "eval": "Measure how well a model predicts a text, and what quantised weights cost.",
    "plot": "Draw the losses of runs, or what is inside a model: embeddings and attention.",
    "trace": "Look into one forward pass: every operation with its shapes, and what it means.",
    "export": "Write a model for other programs: llama.cpp, ONNX Runtime, nanoGPT, or NumPy alone.",
    "explore": "See inside a model in the browser: every number, and where it comes from.",
    "bench": "Measure how fast a model generates or trains here, and where the time goes.",
}
GROUPS = {"trace": ("ops", "lens", "attribution", "loss", "patch")}  # verbs with sub-commands
_LEARN = {"demo", "prepare", "train", "finetune", "plan"}  # in cli/training.py
_SEE = {"plot", "trace", "explore"}  # in cli/inspection.py; the rest in cli/inference.py


def module_of(verb: str) -> str:
    room = "training" if verb in _LEARN else "inspection" if verb in _SEE else "inference"
    return f"glassgpt.cli.{room}"


def make_app(arguments: list[str]) -> App:
    """The command line; of the verbs only the one that is used is imported."""
    app = App(
        name="glassgpt",
        version=__version__,
        help="GPTs you can see through: train, sample and understand GPT models on this machine."
        "\n\nStart with `glassgpt demo`: a minute of training on real text, explained.",
        suppress_keyboard_interrupt=False,  # `main` has a word to say
        help_epilogue="Every verb explains itself, for example: glassgpt train --help",
        # Rendering markdown takes 40 ms more: for the verbs' longer texts only.
        help_format="markdown" if arguments[:1] and arguments[0] in VERBS else "plaintext",
    )
    for position, (verb, summary) in enumerate(VERBS.items()):
        own_help = verb in arguments[:1]  # its docstring says more than the summary
        if own_help and verb in GROUPS:
            module = importlib.import_module(module_of(verb))
            group = App(name=verb, sort_key=position)
            group.default(getattr(module, f"{verb}_verb"))
            for order, view in enumerate(GROUPS[verb]):
                group.command(getattr(module, f"{verb}_{view}_verb"), name=view, sort_key=order)
            app.command(group)
            continue
        function = f"{module_of(verb)}:{verb}_verb"
        app.command(function, name=verb, sort_key=position, help=None if own_help else summary)
    return app


def main(arguments: list[str] | None = None) -> None:
    """Run one command; errors of the user become one line and exit status 2."""
    arguments = sys.argv[1:] if arguments is None else arguments
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal that lacks a character shows "?"
            stream.reconfigure(errors="replace")
    try:
        app = make_app(arguments)
        with explain_os_errors("go on"):  # what no room has explained better
            app(arguments, exit_on_error=False, print_error=False, result_action="return_value")
    except (UserError, CycloptsError) as error:
        sys.stdout.flush()
        if os.environ.get("RANK", "0") == "0":  # once, of the processes of a torchrun
            print(f"glassgpt: {' '.join(str(error).split())}", file=sys.stderr)
        raise SystemExit(2) from None
    except KeyboardInterrupt:
        print("\nglassgpt: interrupted; nothing half-done was left behind", file=sys.stderr)
        raise SystemExit(130) from None
    except BrokenPipeError:  # `glassgpt sample ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(141) from None
