"""What people are told: the terminal, the log of metrics, the report, loss curves."""
