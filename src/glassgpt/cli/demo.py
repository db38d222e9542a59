"""`glassgpt demo`: a minute of training on real text, with everything a newcomer wants to see."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from glassgpt.checkpoints.run_directory import RunDirectory
from glassgpt.data import corpora
from glassgpt.errors import UserError
from glassgpt.reporting.terminal import program
from glassgpt.system import Reporter
from glassgpt.training.loop import TrainResult
from glassgpt.training.run import train


def demo(
    reporter: Reporter, out: str | None = None, *, budget: str = "60s", **options: Any
) -> TrainResult:
    """Train for a minute on Shakespeare, or on the Python manual without a network.

    `options` as in `glassgpt.train`.
    """
    reporter.say("GlassGPT demo: a small GPT learns to write, character by character.")
    text = _text_at_hand(reporter)
    run = Path(out) if out else RunDirectory.named_after("demo").path
    options = {"sample_tokens": 300, "budget": budget} | options
    result = train(text, out=str(run), reporter=reporter, **options)
    if not result.finished:
        return result
    before, after = result.samples[0], result.samples[-1]
    reporter.say(
        f"\nBefore training it wrote:\n\n{_indent(before, 3)}\n\n"
        f"After {result.seconds:.0f} seconds it writes:\n\n{_indent(after, 12)}\n\n"
        f"Validation loss fell from {result.first_val_loss:.2f} to {result.best_val_loss:.2f} nats "
        f"per character.\n" + "\n".join(result.summary) + "\n"
        f"All of it with the loss curve: {run / 'report.md'}\n"
        f"Run directory: {run} (transformers loads it as it is)\n\n"
        f"Try next:\n"
        f'  {program()} sample {run} --prompt "The " --temperature 0.8\n'
        f"  {program()} train {text} --budget 5m --out runs/longer\n"
        f"  {program()} train your-own-text.txt --budget 5m"
    )
    return result


def _text_at_hand(reporter: Reporter) -> str:
    """Shakespeare if it is cached or comes quickly, else the manual that Python carries."""
    try:
        reporter.status("fetching Shakespeare (1 MB)")
        corpora.fetch_corpus("shakespeare", timeout=5.0)
        return "shakespeare"
    except UserError:
        reporter.say("Shakespeare can't be fetched now; using the Python manual on this machine.")
        return "python-manual"


def _indent(text: str, lines: int) -> str:
    return "\n".join(f"    {line[:100]}" for line in text.strip().splitlines()[:lines])
