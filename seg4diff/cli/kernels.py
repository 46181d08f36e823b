"""`seg4diff kernels`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from seg4diff.cli.options import DebugOptions, announce, at_least_one
from seg4diff.files import write_atomically


@dataclass(frozen=True, kw_only=True)
class Kernels(DebugOptions):
    """Measure which kernel computes attention fastest on this GPU; later processes use it.

    Our own kernels, PyTorch's and flash-attention's where they are installed, each checked against float64.
    The result is a table in ~/.cache/seg4diff; without one, our own kernels compute everything:

        seg4diff kernels tune
        seg4diff kernels tune --head-dims 64 --image-tokens 4096 --text-tokens 333 --heads 24
    """

    action: Annotated[Literal["tune"], tyro.conf.Positional]
    """What to do."""
    head_dims: tuple[int, ...] = (64, 128)
    """Length of a head's vectors: 64 in Stable Diffusion 3, 128 in Flux."""
    image_tokens: tuple[int, ...] = (1024, 4096)
    """Image tokens: 1024 for 512 px, 4096 for 1024 px. A measurement serves half to twice its tokens."""
    text_tokens: int = 154
    """Text tokens."""
    heads: int = 24
    """Attention heads."""
    rounds: int = 30
    """How often each kernel runs."""

    def run(self) -> None:
        """Measure, and add to the table.

        Raises:
            ValueError: an option makes no sense, or the table that is there is damaged.
            RuntimeError: there is no GPU, or the kernels fail on it.
        """
        at_least_one(self, "text_tokens", "heads", "rounds")
        for option in ("head_dims", "image_tokens"):
            if not getattr(self, option) or min(getattr(self, option)) < 1:
                raise ValueError(
                    f"--{option.replace('_', '-')} {getattr(self, option)}: give numbers from 1 on"
                )

        import torch

        from seg4diff.kernels import measured

        path = measured.user_table()
        measured.read_rows(path)
        if not torch.cuda.is_available():
            raise RuntimeError(
                "kernels tune measures on a GPU, and PyTorch sees none; without one there is nothing to tune"
            )

        from seg4diff.kernels.tune import tune

        device = torch.device("cuda", torch.cuda.current_device())
        for head_dim in self.head_dims:
            for tokens in self.image_tokens:
                announce(f"measuring head dim {head_dim}, {tokens} + {self.text_tokens} tokens")
                row = tune(tokens, self.text_tokens, self.heads, head_dim, rounds=self.rounds, device=device)
                rows = measured.with_rows(measured.read_rows(path), [row])
                text = measured.as_text(rows)
                write_atomically(path, lambda temporary, text=text: temporary.write_text(text, "utf-8"))  # type: ignore[misc]
                for name, (forward, training) in row.evidence["milliseconds"].items():
                    print(f"{name:>14}: forward {forward:8.3f} ms, with backward {training:8.3f} ms")
                for name, reason in row.evidence["rejected"].items():
                    print(f"{name:>14}: {reason}")
                print(f"{'fastest':>14}: {row.forward}, with backward {row.training}")
        print(f"written to {path}")
