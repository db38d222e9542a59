"""The short report that `glassgpt prepare` ends with."""

from __future__ import annotations

from pathlib import Path

from glassgpt.data.prepare import Report


def describe(report: Report, out: str | Path) -> str:
    """Facts first, then what should make the reader look twice."""
    tokens = report.train_tokens + report.val_tokens
    lines = [
        f"{out}: already prepared from the same input; nothing to do" if report.unchanged
        else f"{out}: ready",
        f"  documents    {report.documents:,} ({report.val_documents:,} for validation)",
        f"  characters   {report.characters:,}",
        f"  tokens       {tokens:,} ({report.train_tokens:,} training, "
        f"{report.val_tokens:,} validation)",
        f"  per token    {report.characters / max(1, tokens):.2f} characters",
        f"  vocabulary   {report.vocab_used:,} of {report.vocab_size:,} tokens occur",
        f"  duplicates   {report.duplicates:,} documents are exact copies of earlier ones",
        f"  overlap      {report.overlap:.1%} of the validation text (windows of 50 tokens) "
        "also stands in the training text",
        f"  too short    {report.too_short:,} blank documents left out",
    ]  # fmt: skip
    if report.unknown_tokens:
        lines.append(f"  unknown      {report.unknown_tokens:,} characters are not in the "
                     "vocabulary")  # fmt: skip
    if report.skipped:
        lines.append(f"  skipped      {len(report.skipped):,} files, such as {report.skipped[0]}")
    if report.val_tokens < 1000:
        lines.append("  note: so little validation text gives a noisy loss; "
                     "see --val-fraction and --val")  # fmt: skip
    if report.overlap > 0.1:
        lines.append("  note: the validation loss will look better than it is; remove copies "
                     "from the text, or give --val FILE")  # fmt: skip
    return "\n".join(lines)
