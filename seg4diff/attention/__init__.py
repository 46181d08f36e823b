"""Joint attention inside diffusers: interception, contexts, capture."""
