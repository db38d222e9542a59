"""The one training loop, the step, optimizers and schedules; what a training costs."""
