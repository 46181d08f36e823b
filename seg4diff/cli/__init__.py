"""The command line: one module and one dataclass for each verb of `seg4diff`. Light to import."""
