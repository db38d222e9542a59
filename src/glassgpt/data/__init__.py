"""From any text to batches of tokens: sources -> prepare -> batches."""
