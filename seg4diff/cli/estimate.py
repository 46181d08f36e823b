"""`seg4diff estimate`."""

from __future__ import annotations

import re
from dataclasses import dataclass

from seg4diff.cli.options import OptionalText, announce
from seg4diff.cli.train import ConfigOptions

_UNITS = {
    f"{prefix}{suffix}": base**power
    for suffix, base in (("b", 1000), ("ib", 1024))
    for power, prefix in enumerate("kmgt", start=1)
}


@dataclass(frozen=True, kw_only=True)
class Estimate(ConfigOptions):
    """Predict the memory that training takes, part by part, without loading the model.

    Compares the configuration with others that save memory:

        seg4diff estimate --config magnet.toml --memory 12GiB
        seg4diff estimate --set data.resolution=512 batch=2
    """

    memory: OptionalText = None
    """Memory of the GPU with its unit, such as 12GiB or "12 GB"; exit code 1 if no configuration of the table
    fits."""

    def run(self) -> None:
        """Print the estimates.

        Raises:
            ValueError, FileNotFoundError: an option or a setting makes no sense, or files are missing.
            RuntimeError: no configuration fits in `memory`.
        """
        memory = None if self.memory is None else size_in_bytes(self.memory)
        settings = self.settings()

        from rich.console import Console

        from seg4diff.training.memory import estimate_variants, report

        announce(f"tracing training steps of {settings.model}, without its weights")
        found = estimate_variants(settings, progress=True)
        Console().print(report(found))
        smallest = min(found, key=lambda name: found[name].peak)
        peak = found[smallest].peak
        if memory is not None and peak > memory:
            raise RuntimeError(
                f"nothing fits in --memory {self.memory}: the smallest peak is {peak / 2**30:.2f} GiB "
                f"({smallest}); lower data.resolution or batch"
            )


def size_in_bytes(text: str) -> float:
    """Bytes from a number and its unit, kB to TB or KiB to TiB.

    Raises:
        ValueError: there is no unit, or the number is not above 0.
    """
    found = re.fullmatch(r"\s*(\d+\.?\d*|\.\d+)\s*([kmgt]i?b)\s*", text, re.IGNORECASE)
    if found is None or not float(found[1]) > 0:
        number = re.match(r"\s*(\d+\.?\d*)\s*$", text)
        example = f"{number[1] if number else 12}GiB"
        raise ValueError(f"--memory {text!r} is not an amount with its unit; write it like {example}")
    return float(found[1]) * _UNITS[found[2].lower()]
