"""A training step of the modern shape written out for CPUs, forward and backward."""
