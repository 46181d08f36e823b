"""How well label maps fit: figures of merit, data sets and the protocols of the papers."""
