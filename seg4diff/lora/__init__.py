"""Low-rank adapters: added to a transformer, read from and written to files, over quantised weights."""
