"""The run directory, and every foreign format: one file a format."""
