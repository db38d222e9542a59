"""Weights in other people's formats, in both directions."""
