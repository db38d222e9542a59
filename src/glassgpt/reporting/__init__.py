"""What people are told: the terminal, the log of metrics, the report, loss curves."""

from glassgpt.reporting.run_log import RunLog as RunLog
from glassgpt.reporting.run_log import TrainResult as TrainResult
from glassgpt.reporting.terminal import Terminal as Terminal
