"""Edits of what a model generates: attention blurred, words replaced, guidance away from a blurred model."""
