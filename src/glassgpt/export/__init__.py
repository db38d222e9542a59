"""A model as files for other programs."""
