"""Data sets: read from their downloads, prepared, captioned."""
