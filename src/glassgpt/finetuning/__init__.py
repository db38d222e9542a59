"""From a base and examples to a run of the same training loop."""
