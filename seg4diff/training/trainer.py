"""The training loop: one process or many, resumable at every step.

Called by ``seg4diff train``. A step is a function of the weights, the optimizer's state and the step's number
alone (:mod:`seg4diff.training.data.samples`); these are what a checkpoint holds.
"""

from __future__ import annotations

import dataclasses
import importlib.util
import logging
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from tqdm import tqdm

from seg4diff.backbones import transformer_of
from seg4diff.data.training_sets import Source, open_source
from seg4diff.files import write_atomically
from seg4diff.lora.adapters import add_adapters
from seg4diff.lora.files import FILE_NAME, save_lora
from seg4diff.training.checkpoints import Checkpoint, latest_checkpoint, write_checkpoint
from seg4diff.training.data.cache import Encodings, encode
from seg4diff.training.data.samples import HeldOutSamples, TrainingSamples, collate, positions, split
from seg4diff.training.objective.magnet import Batch, Losses, Magnet, mask_layers
from seg4diff.training.optimizers import learning_rate, make_optimizer
from seg4diff.training.settings import TrainSettings, build_settings
from seg4diff.training.tracking import SamplePrompts, mask_overlays

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


@dataclass(frozen=True)
class TrainResult:
    """What a run came to.

    Attributes:
        lora: the adapters to use: the best by the held-out split, or the last without one.
        last: the adapters after the last step.
        steps: optimizer steps done.
        best_step: the step that ``lora`` is of.
        held_out: mean losses on the held-out split after the last step ("total", "flow", "focal", "dice"),
            empty without one.
        skipped_steps: steps that were left out for a NaN or infinite gradient.
        unusable: pictures and words left out, by reason.
    """

    lora: Path
    last: Path
    steps: int
    best_step: int
    held_out: Mapping[str, float]
    skipped_steps: int
    unusable: Mapping[str, int]


def train(
    settings: TrainSettings,
    *,
    pipe: Any = None,
    progress: bool = True,
    after_step: Callable[[int], None] | None = None,
) -> TrainResult:
    """Fine-tune a pipeline's transformer so that its attention maps follow masks.

    Writes into ``settings.out``: ``checkpoints/``, ``cache/`` (unless set elsewhere), ``last/`` and, in the
    folder itself, the adapters to use, as diffusers expects them. A run that was interrupted goes on where
    its latest checkpoint is.

    Args:
        settings: see :class:`seg4diff.training.settings.TrainSettings`.
        pipe: train this pipeline instead of loading ``settings.model``. Its transformer is frozen, gets the
            adapters and keeps them, with the weights of the last step.
        progress: whether to show progress bars.
        after_step: called after every optimizer step with the number of steps done.

    Raises:
        FileNotFoundError, ValueError: a setting, a file or the data set is of no use; see
            :mod:`seg4diff.training.settings` and :mod:`seg4diff.data.training_sets`.
        FloatingPointError: losses stayed NaN or infinite; the latest checkpoint is untouched.
        ImportError: ``report``, ``optimizer.name`` or ``memory.quantise`` needs a package that is missing.
        OSError: the adapters could not be written at the end. A checkpoint that cannot be written meanwhile
            is an error in the log, and training goes on.
    """
    _check_packages(settings)
    accelerator = _accelerator(settings)
    run = _Run(settings, accelerator, pipe, progress and accelerator.is_local_main_process)
    return run.train(after_step or (lambda step: None))


def _check_packages(settings: TrainSettings) -> None:
    """Raise ImportError for what is not installed, before hours go into encoding a data set."""
    wanted = {
        f"report={settings.report!r}": (settings.report != "none", settings.report, settings.report),
        "optimizer.name='adamw8bit'": (
            settings.optimizer.name == "adamw8bit",
            "bitsandbytes",
            "seg4diff[quant]",
        ),
        "memory.quantise='nf4'": (settings.memory.quantise == "nf4", "bitsandbytes", "seg4diff[quant]"),
    }
    for setting, (asked, package, install) in wanted.items():
        if asked and importlib.util.find_spec(package) is None:
            raise ImportError(f"{setting} needs {package}: pip install '{install}'")


@dataclass
class _Progress:
    """What a run has come to so far; part of a checkpoint.

    Attributes:
        best: lowest score on the held-out split.
        best_step: the step that it is of; 0 before the first evaluation.
        skipped: steps left out for a NaN or infinite gradient.
        bad: how many of them were the latest, without one in between that was not.
        held_out: the latest losses on the held-out split.
    """

    best: float = math.inf
    best_step: int = 0
    skipped: int = 0
    bad: int = 0
    held_out: dict[str, float] = field(default_factory=dict)


class _Run:
    """One process of a run."""

    def __init__(self, settings: TrainSettings, accelerator: Any, pipe: Any, progress: bool) -> None:
        self._settings = settings
        self._accelerator = accelerator
        self._progress = progress
        self._out = Path(settings.out)
        self._check_folder()
        source = open_source(settings.data)  # before a model is loaded, which takes longer
        pipe = _load(settings, accelerator.device) if pipe is None else pipe
        transformer: Any = transformer_of(pipe)
        layers = mask_layers(transformer, settings.mask) if settings.mask.weight > 0 else ()
        stop_after = layers[-1] if layers and settings.fm_weight == 0 else None
        self._set_up_data(pipe, source)
        del pipe
        _free_memory()
        self._set_up_model(transformer, stop_after)
        self._optimizer = make_optimizer(list(self._weights.values()), settings.optimizer)
        self._state = _Progress()

    # Before training

    def _set_up_data(self, pipe: Any, source: Source) -> None:
        settings = self._settings
        encodings = self._encodings(pipe, source)
        self._samples = SamplePrompts(pipe, settings.sample_prompts) if settings.sample_prompts else None
        training, held_out, unusable = split(encodings, settings)
        self._unusable = encodings.skipped + unusable
        self._encodings_used = encodings
        self._training = TrainingSamples(encodings, training, settings)
        self._held_out = HeldOutSamples(encodings, held_out, settings)

    def _set_up_model(self, transformer: Any, stop_after: int | None) -> None:
        settings, accelerator = self._settings, self._accelerator
        if settings.memory.quantise == "nf4":
            from seg4diff.lora.quantise import quantise_nf4

            quantise_nf4(transformer, accelerator.device)
        add_adapters(transformer, settings.lora, seed=settings.seed, stop_after=stop_after)
        if settings.memory.gradient_checkpointing:
            transformer.enable_gradient_checkpointing()
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(settings.seed)
            self._magnet = Magnet(transformer, settings.mask, fm_weight=settings.fm_weight)
        self._prepared = accelerator.prepare(self._magnet)
        self._weights = {n: w for n, w in self._magnet.named_parameters() if w.requires_grad}
        self._average: dict[str, Tensor] = {}
        if settings.ema > 0:
            self._average = {name: weight.detach().clone() for name, weight in self._weights.items()}

    def _check_folder(self) -> None:
        if self._out.exists() and not self._out.is_dir():
            raise NotADirectoryError(f"out={str(self._out)!r} is a file; give a folder")
        if self._settings.resume == "never" and any((self._out / "checkpoints").glob("checkpoint-*")):
            raise ValueError(
                f"out={str(self._out)!r} holds a run already; give another folder, or "
                "resume='latest' to go on"
            )

    def _encodings(self, pipe: Any, source: Source) -> Encodings:
        """The cache, built by the first process of each machine if it has to be."""
        data = self._settings.data
        folder = Path(data.cache) if data.cache else self._out / "cache"
        with (
            self._accelerator.local_main_process_first(),
            _encoders_on(pipe, self._accelerator.device),
        ):
            return encode(pipe, source, data, folder, progress=self._progress)

    def _resume(self) -> int:
        """Load the latest checkpoint; returns the number of steps done."""
        with self._accelerator.main_process_first():
            checkpoint = latest_checkpoint(self._out / "checkpoints")
        if checkpoint is None:
            return 0
        changed = build_settings(checkpoint.settings).changed_in(self._settings)
        if changed:
            listed = ", ".join(f"{name}: {then!r}, now {now!r}" for name, (then, now) in changed.items())
            raise ValueError(
                f"the run in {str(self._out)!r} was started with other settings ({listed}); restore them, or "
                "give another folder"
            )
        with torch.no_grad():
            for name, weight in self._weights.items():
                weight.copy_(checkpoint.weights[name])
            for name, average in self._average.items():
                average.copy_(checkpoint.average[name])
        self._optimizer.load_state_dict(checkpoint.optimizer)
        self._state = _Progress(**checkpoint.progress)
        logger.info("going on after step %d of the run in %s", checkpoint.step, self._out)
        return checkpoint.step

    # Training

    def train(self, after_step: Callable[[int], None]) -> TrainResult:
        settings, accelerator = self._settings, self._accelerator
        start = self._resume()
        loader: DataLoader[Batch] = DataLoader(
            self._training,
            batch_sampler=positions(
                range(start * settings.accumulation, settings.steps * settings.accumulation),
                settings.batch,
                process=accelerator.process_index,
                processes=accelerator.num_processes,
            ),
            collate_fn=collate,
            num_workers=settings.data.workers,
            persistent_workers=settings.data.workers > 0,
        )
        if settings.report != "none":
            shown = {n: v if isinstance(v, (int, float)) else str(v) for n, v in settings.by_name().items()}
            accelerator.init_trackers("magnet", config=shown)
        batches = iter(loader)
        with tqdm(
            total=settings.steps, initial=start, desc="training", unit="step", disable=not self._progress
        ) as bar:
            for step in range(start, settings.steps):
                losses, norm = self._step(step, batches)
                done = step + 1
                self._show(bar, losses, norm, done)
                if done == settings.steps or (
                    settings.evaluate_every and done % settings.evaluate_every == 0
                ):
                    self._evaluate(done)
                if done == settings.steps or done % settings.checkpoint_every == 0:
                    self._checkpoint(done)
                after_step(done)
        if settings.report != "none":
            accelerator.end_training()
        return self._finish()

    def _step(self, step: int, batches: Iterator[Batch]) -> tuple[Losses, float]:
        """One optimizer step; returns mean losses of this process and the gradient's norm."""
        settings, accelerator = self._settings, self._accelerator
        for group in self._optimizer.param_groups:
            group["lr"] = learning_rate(step, settings.steps, settings.optimizer)
        seen: list[Losses] = []
        names: list[str] = []
        for forward in range(settings.accumulation):
            batch = next(batches).to(accelerator.device)
            names += batch.names
            last = forward == settings.accumulation - 1
            with accelerator.no_sync(self._prepared) if not last else nullcontext():
                losses = self._prepared(batch)
                (losses.total / settings.accumulation).backward()
            seen.append(Losses(*(value.detach() for value in losses)))
        weights = list(self._weights.values())
        norm = float(torch.nn.utils.clip_grad_norm_(weights, settings.optimizer.clip))
        if math.isfinite(norm):
            self._optimizer.step()
            self._state.bad = 0
            self._update_average(step)
        else:
            self._skip_step(step, names)
        for weight in weights:
            weight.grad = None
        return Losses(*(torch.stack(values).mean() for values in zip(*seen, strict=True))), norm

    def _skip_step(self, step: int, names: Sequence[str]) -> None:
        """Leave out an update whose gradient is not finite; it is the same on every process."""
        made = self._state
        made.skipped += 1
        made.bad += 1
        where = f"step {step + 1} ({', '.join(names[:4])})"
        if made.bad >= self._settings.bad_steps:
            raise FloatingPointError(
                f"the gradient was NaN or infinite in {made.bad} consecutive steps, the last one "
                f"{where}; lower optimizer.learning_rate={self._settings.optimizer.learning_rate:g} or "
                "mask.weight, or use memory.precision='float32'. Weights and checkpoints are as before"
            )
        logger.warning("the gradient of %s is NaN or infinite; the step is skipped", where)

    @torch.no_grad()
    def _update_average(self, step: int) -> None:
        decay = min(self._settings.ema, (1 + step) / (10 + step))
        for name, average in self._average.items():
            average.lerp_(self._weights[name], 1.0 - decay)

    # What is measured and shown

    def _show(self, bar: Any, losses: Losses, norm: float, done: int) -> None:
        if self._progress:
            bar.set_postfix(loss=f"{float(losses.total):.3f}", memory=peak_memory())
            bar.update()
        if self._settings.report != "none":
            means = self._accelerator.reduce(torch.stack(list(losses)), reduction="mean")
            values = dict(zip((f"train/{name}" for name in Losses._fields), means.tolist(), strict=True))
            rate = self._optimizer.param_groups[0]["lr"]
            self._accelerator.log(
                {**values, "train/gradient_norm": norm, "train/learning_rate": rate}, step=done
            )

    @torch.no_grad()
    def _evaluate(self, done: int) -> None:
        """Losses on the held-out split, pictures for the trackers, and the best adapters so far."""
        if len(self._held_out) == 0:
            return
        accelerator = self._accelerator
        with self._averaged():
            sums = torch.zeros(len(Losses._fields), dtype=torch.float64, device=accelerator.device)
            for number in range(accelerator.process_index, len(self._held_out), accelerator.num_processes):
                losses = self._magnet(self._held_out[number].to(accelerator.device))
                sums += torch.stack(list(losses)).double()
            means = accelerator.reduce(sums, reduction="sum") / len(self._held_out)
            values = dict(zip(Losses._fields, means.tolist(), strict=True))
            made = self._state
            made.held_out = values
            mask = self._settings.mask
            score = {
                "total": values["total"],
                "flow": values["flow"],
                "mask": mask.focal_weight * values["focal"] + mask.dice_weight * values["dice"],
            }[self._settings.select]
            if score < made.best or made.best_step == 0:
                made.best, made.best_step = score, done
                if accelerator.is_main_process:
                    self._try_saving(lambda: save_lora(self._magnet.transformer, self._out / "best"))
            if self._settings.report != "none":
                accelerator.log({f"held-out/{name}": value for name, value in values.items()}, step=done)
                if accelerator.is_main_process:
                    self._log_pictures(done)

    def _log_pictures(self, done: int) -> None:
        pictures: dict[str, Any] = {}
        if self._settings.mask.weight > 0:
            pictures["masks"] = mask_overlays(self._magnet, self._held_out, self._encodings_used)
        if self._samples is not None:
            pictures["samples"] = self._samples.draw(self._magnet.transformer)
        for tracker in self._accelerator.trackers:
            if hasattr(tracker, "log_images"):
                layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
                tracker.log_images({name: p for name, p in pictures.items() if len(p)}, step=done, **layout)

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The running average in place of the weights, where there is one."""
        current = {name: self._weights[name].detach().clone() for name in self._average}
        with torch.no_grad():
            for name, average in self._average.items():
                self._weights[name].copy_(average)
        try:
            yield
        finally:
            with torch.no_grad():
                for name, weight in current.items():
                    self._weights[name].copy_(weight)

    # What is kept

    def _checkpoint(self, done: int) -> None:
        if not self._accelerator.is_main_process:
            return
        checkpoint = Checkpoint(
            step=done,
            weights={name: weight.detach() for name, weight in self._weights.items()},
            average=self._average,
            optimizer=self._optimizer.state_dict(),
            progress=dataclasses.asdict(self._state),
            settings=dataclasses.asdict(self._settings),
        )
        self._try_saving(
            lambda: write_checkpoint(self._out / "checkpoints", checkpoint, keep=self._settings.keep)
        )

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

    def _finish(self) -> TrainResult:
        settings = self._settings
        last, lora = self._out / "last" / FILE_NAME, self._out / FILE_NAME
        made = self._state
        if self._accelerator.is_main_process:
            with self._averaged():
                try:
                    save_lora(self._magnet.transformer, last)
                    best = self._out / "best" / FILE_NAME
                    chosen = best if best.is_file() and made.best_step else last
                    write_atomically(lora, lambda temporary: temporary.write_bytes(chosen.read_bytes()))
                except OSError as error:
                    raise OSError(
                        f"the adapters could not be written to {str(self._out)!r} ({error}); free space and "
                        "start again: the run goes on from its latest checkpoint"
                    ) from error
        self._accelerator.wait_for_everyone()
        return TrainResult(
            lora=lora,
            last=last,
            steps=settings.steps,
            best_step=made.best_step or settings.steps,
            held_out=made.held_out,
            skipped_steps=made.skipped,
            unusable=Counter(self._unusable),
        )


def peak_memory() -> str:
    """Peak memory so far: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{peak / 2**30:.1f}GiB"


def _accelerator(settings: TrainSettings) -> Any:
    from accelerate import Accelerator
    from accelerate.utils import InitProcessGroupKwargs

    # Precision is ours: frozen weights in half precision need no autocast, adapters stay float32.
    return Accelerator(
        cpu=settings.device == "cpu" or not (torch.cuda.is_available() or torch.backends.mps.is_available()),
        mixed_precision="no",
        # The others wait while one process encodes the data set, which may take hours.
        kwargs_handlers=[InitProcessGroupKwargs(timeout=timedelta(days=2))],
        log_with=None if settings.report == "none" else settings.report,
        project_dir=settings.out,
    )


def _load(settings: TrainSettings, device: torch.device) -> Any:
    """The pipeline on the CPU, its transformer in the run's precision."""
    from seg4diff.loading import load_pipeline

    precision = settings.memory.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    return load_pipeline(settings.model, "cpu", _DTYPES[precision])


@contextmanager
def _encoders_on(pipe: Any, device: torch.device) -> Iterator[None]:
    """VAE and text encoders run on ``device``, one at a time, and leave it afterwards."""
    if device.type != "cuda":
        yield
        return
    pipe.enable_model_cpu_offload(device=device)
    try:
        yield
    finally:
        pipe.maybe_free_model_hooks()
        pipe.remove_all_hooks()
        pipe.to("cpu")
        _free_memory()


def _free_memory() -> None:
    from diffusers.training_utils import free_memory

    free_memory()
