"""The run directory, and every foreign format: one file a format."""

from glassgpt.checkpoints.load import load_pretrained as load_pretrained
from glassgpt.checkpoints.run_directory import Checkpoint as Checkpoint
from glassgpt.checkpoints.run_directory import RunDirectory as RunDirectory
