"""Any text or examples -> batches of tokens: sources, texts, prepare, dataset, batches."""

from glassgpt.data.batches import Split as Split
from glassgpt.data.dataset import Dataset as Dataset
from glassgpt.data.dataset import load_data as load_data
