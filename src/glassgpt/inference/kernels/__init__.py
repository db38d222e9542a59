"""Compiled loops that read quantised weights at the speed of memory."""
