"""The state of a run: what is trained, how far it is, and how all of it is kept and taken up again."""

from __future__ import annotations

import dataclasses
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from seg4diff.files import write_atomically
from seg4diff.kernels.api import provider_identity
from seg4diff.lora.files import FILE_NAME, save_lora
from seg4diff.training.checkpoints import Checkpoint, latest_checkpoint, write_checkpoint
from seg4diff.training.objective.magnet import Magnet
from seg4diff.training.settings import TrainSettings, build_settings

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class TrainResult:
    """Result of a training run.

    Attributes:
        lora: the adapters to use: the best by the held-out split, or the last without one.
        last: the adapters after the last step.
        steps: optimizer steps done.
        best_step: the step after which ``lora`` was saved.
        held_out: mean losses on the held-out split after the last step ("total", "flow", "focal", "dice"),
            empty without one.
        skipped_steps: steps that were left out for a NaN or infinite gradient.
        unusable: images and words left out, by reason.
    """

    lora: Path
    last: Path
    steps: int
    best_step: int
    held_out: Mapping[str, float]
    skipped_steps: int
    unusable: Mapping[str, int]


@dataclass
class Progress:
    """Progress of a run; part of a checkpoint.

    Attributes:
        best: lowest score on the held-out split.
        best_step: the step after which ``best`` was reached; 0 before the first evaluation.
        skipped: number of steps skipped for a NaN or infinite gradient.
        bad: number of steps skipped in a row, up to now.
        held_out: the latest losses on the held-out split.
    """

    best: float = math.inf
    best_step: int = 0
    skipped: int = 0
    bad: int = 0
    held_out: dict[str, float] = field(default_factory=dict)


class Run:
    """One process of a run.

    Attributes:
        settings: what was asked for.
        accelerator: of Accelerate.
        magnet: the transformer with its adapters, and the loss on it.
        optimizer: of ``weights``.
        weights: trained parameters by name.
        average: their running average by name; empty without one.
        progress: see :class:`Progress`.
    """

    def __init__(
        self, settings: TrainSettings, accelerator: Any, magnet: Magnet, optimizer: torch.optim.Optimizer
    ) -> None:
        self.settings = settings
        self.accelerator = accelerator
        self.magnet = magnet
        self.optimizer = optimizer
        self.weights = {name: w for name, w in magnet.named_parameters() if w.requires_grad}
        self.average: dict[str, Tensor] = {}
        if settings.ema > 0:
            self.average = {name: weight.detach().clone() for name, weight in self.weights.items()}
        self.progress = Progress()
        self._out = Path(settings.out)

    def resume(self) -> int:
        """Load the latest checkpoint; returns the number of steps done.

        Raises:
            ValueError: the run was started with other settings.
        """
        with self.accelerator.main_process_first():
            checkpoint = latest_checkpoint(self._out / "checkpoints")
        if checkpoint is None:
            return 0
        changed = build_settings(checkpoint.settings).changed_in(self.settings)
        attention = provider_identity(self.accelerator.device)
        if checkpoint.attention != attention:
            changed["attention kernels"] = checkpoint.attention, attention
        if changed:
            listed = ", ".join(f"{name}: {then!r}, now {now!r}" for name, (then, now) in changed.items())
            raise ValueError(
                f"the run in {str(self._out)!r} was started with other settings ({listed}); restore them, or "
                "give another folder"
            )
        with torch.no_grad():
            for name, weight in self.weights.items():
                weight.copy_(checkpoint.weights[name])
            for name, average in self.average.items():
                average.copy_(checkpoint.average[name])
        self.optimizer.load_state_dict(checkpoint.optimizer)
        self.progress = Progress(**checkpoint.progress)
        logger.info("going on after step %d of the run in %s", checkpoint.step, self._out)
        return checkpoint.step

    @torch.no_grad()
    def update_average(self, step: int) -> None:
        """Let the running average follow the weights of ``step``, faster in the first steps."""
        decay = min(self.settings.ema, (1 + step) / (10 + step))
        for name, average in self.average.items():
            average.lerp_(self.weights[name], 1.0 - decay)

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The running average in place of the weights, where there is one."""
        current = {name: self.weights[name].detach().clone() for name in self.average}
        with torch.no_grad():
            for name, average in self.average.items():
                self.weights[name].copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in current.items():
                    self.weights[name].copy_(weight)

    def keep_best(self, score: float, done: int) -> None:
        """Save the adapters as they are if ``score`` is the lowest so far."""
        if self.progress.best_step and not score < self.progress.best:
            return
        self.progress.best, self.progress.best_step = score, done
        if self.accelerator.is_main_process:
            self._try_saving(lambda: save_lora(self.magnet.transformer, self._out / "best"))

    def checkpoint(self, done: int) -> None:
        """Write what the run needs to go on after step ``done``; an error in the log if that fails."""
        if not self.accelerator.is_main_process:
            return
        checkpoint = Checkpoint(
            step=done,
            weights={name: weight.detach() for name, weight in self.weights.items()},
            average=self.average,
            optimizer=self.optimizer.state_dict(),
            progress=dataclasses.asdict(self.progress),
            settings=dataclasses.asdict(self.settings),
            attention=provider_identity(self.accelerator.device),
        )
        folder = self._out / "checkpoints"
        self._try_saving(lambda: write_checkpoint(folder, checkpoint, keep=self.settings.keep))

    def _try_saving(self, save: Callable[[], object]) -> None:
        try:
            save()
        except OSError as error:
            logger.error(
                "could not save (%s); what was saved before is untouched, training goes on. Free some space "
                "in %s before the next checkpoint",
                error,
                self._out,
            )

    def finish(self, unusable: Mapping[str, int]) -> TrainResult:
        """Write the adapters, the last and the ones to use.

        Raises:
            OSError: they cannot be written.
        """
        last, lora = self._out / "last" / FILE_NAME, self._out / FILE_NAME
        if self.accelerator.is_main_process:
            with self.averaged():
                try:
                    save_lora(self.magnet.transformer, last)
                    best = self._out / "best" / FILE_NAME
                    chosen = best if best.is_file() and self.progress.best_step else last
                    write_atomically(lora, lambda temporary: temporary.write_bytes(chosen.read_bytes()))
                except OSError as error:
                    raise OSError(
                        f"the adapters could not be written to {str(self._out)!r} ({error}); free space and "
                        "start again: the run goes on from its latest checkpoint"
                    ) from error
        self.accelerator.wait_for_everyone()
        return TrainResult(
            lora=lora,
            last=last,
            steps=self.settings.steps,
            best_step=self.progress.best_step or self.settings.steps,
            held_out=self.progress.held_out,
            skipped_steps=self.progress.skipped,
            unusable=Counter(unusable),
        )
