"""Any text or examples -> batches of tokens: sources, texts, prepare, dataset, batches."""
