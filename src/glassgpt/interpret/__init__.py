"""What happens inside a model: traces, lenses, edits, and where a number comes from."""
