"""The training loop: one process or many, resumable at every step.

A step is a function of the weights, the optimizer's state and the step's number
alone (:mod:`seg4diff.training.data.samples`); these are what a checkpoint holds.
"""

from __future__ import annotations

import importlib.util
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader
from tqdm import tqdm

from seg4diff.backbones import Pipeline, find_backbone, transformer_of
from seg4diff.data.examples import open_training_set
from seg4diff.data.registry import Dataset
from seg4diff.lora.adapters import add_adapters
from seg4diff.training.data.cache import Encodings, encode
from seg4diff.training.data.samples import HeldOutSamples, TrainingSamples, collate, positions, split
from seg4diff.training.objective.magnet import Batch, Losses, Magnet, mask_layers
from seg4diff.training.optimizers import learning_rate, make_optimizer
from seg4diff.training.run import Run, TrainResult
from seg4diff.training.settings import TrainSettings
from seg4diff.training.tracking import SamplePrompts, mask_overlays

logger = logging.getLogger(__name__)

_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}


def train(
    settings: TrainSettings,
    *,
    pipe: Pipeline | None = None,
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
        FileNotFoundError, ValueError: a setting, a file or the data set is invalid; see
            :mod:`seg4diff.training.settings` and :mod:`seg4diff.data.examples`.
        NotImplementedError: the model has no joint attention.
        FloatingPointError: losses stayed NaN or infinite; the latest checkpoint is untouched.
        ImportError: ``report``, ``optimizer.name`` or ``memory.quantise`` needs a package that is missing.
        OSError: the adapters could not be written at the end. A checkpoint that cannot be written meanwhile
            is an error in the log, and training goes on.
    """
    _check_packages(settings)
    _check_folder(settings)
    accelerator = _accelerator(settings)
    progress = progress and accelerator.is_local_main_process
    dataset = open_training_set(settings.data)  # before a model is loaded, which takes longer
    pipe = _load(settings, accelerator.device) if pipe is None else pipe
    transformer: Any = transformer_of(pipe)
    family = find_backbone(transformer)
    if family.cross_attention:
        raise NotImplementedError(
            f"{family.name} reads text by cross-attention, and training is for joint attention"
        )
    if settings.mask.weight > 0:
        mask_layers(transformer, settings.mask)  # refused here rather than after hours of encoding

    encodings = _encode(pipe, dataset, settings, accelerator, progress)
    drawn = SamplePrompts(pipe, settings.sample_prompts) if settings.sample_prompts else None
    training, held_out, unusable = split(encodings, settings)
    samples = TrainingSamples(encodings, training, settings)
    held_out_samples = HeldOutSamples(encodings, held_out, settings)
    del pipe
    _free_memory()

    magnet = _adapted(transformer, settings, accelerator.device)
    prepared = accelerator.prepare(magnet)
    optimizer = make_optimizer([w for w in magnet.parameters() if w.requires_grad], settings.optimizer)
    run = Run(settings, accelerator, magnet, optimizer)
    start = run.resume()

    _start_trackers(run)
    batches = iter(_loader(samples, run, start))
    with tqdm(total=settings.steps, initial=start, desc="training", unit="step", disable=not progress) as bar:
        for step in range(start, settings.steps):
            losses, norm = _take_step(run, prepared, step, batches)
            done = step + 1
            last = done == settings.steps
            bar.set_postfix(loss=f"{float(losses.total):.3f}", memory=peak_memory())
            bar.update()
            _log_step(run, losses, norm, done)
            if last or (settings.evaluate_every and done % settings.evaluate_every == 0):
                _evaluate(run, held_out_samples, encodings, drawn, done)
            if last or done % settings.checkpoint_every == 0:
                run.checkpoint(done)
            if after_step is not None:
                after_step(done)
    if settings.report != "none":
        accelerator.end_training()
    return run.finish(encodings.skipped + unusable)


# Before the first step


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


def _check_folder(settings: TrainSettings) -> None:
    out = Path(settings.out)
    if out.exists() and not out.is_dir():
        raise NotADirectoryError(f"out={str(out)!r} is a file; give a folder")
    if settings.resume == "never" and any((out / "checkpoints").glob("checkpoint-*")):
        raise ValueError(
            f"out={str(out)!r} holds a run already; give another folder, or resume='latest' to go on"
        )


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


def _load(settings: TrainSettings, device: torch.device) -> Pipeline:
    """The pipeline on the CPU, its transformer in the run's precision."""
    from seg4diff.loading import load_pipeline

    precision = settings.memory.precision
    if precision == "auto":
        precision = "bfloat16" if device.type == "cuda" else "float32"
    return load_pipeline(settings.model, "cpu", _DTYPES[precision])


def _encode(
    pipe: Pipeline, dataset: Dataset, settings: TrainSettings, accelerator: Any, progress: bool
) -> Encodings:
    """The cache, built by the first process of each machine if it has to be."""
    folder = Path(settings.data.cache) if settings.data.cache else Path(settings.out) / "cache"
    with accelerator.local_main_process_first(), _encoders_on(pipe, accelerator.device):
        return encode(pipe, dataset, settings.data, folder, progress=progress)


@contextmanager
def _encoders_on(pipe: Pipeline, device: torch.device) -> Iterator[None]:
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


def _adapted(transformer: Any, settings: TrainSettings, device: torch.device) -> Magnet:
    """The transformer with its adapters, and the loss on it; what is frozen may be in 4 bits."""
    if settings.memory.quantise == "nf4":
        from seg4diff.lora.quantise import quantise_nf4

        quantise_nf4(transformer, device)
    layers = mask_layers(transformer, settings.mask) if settings.mask.weight > 0 else ()
    stop_after = layers[-1] if layers and settings.fm_weight == 0 else None
    add_adapters(transformer, settings.lora, seed=settings.seed, stop_after=stop_after)
    if settings.memory.gradient_checkpointing:
        transformer.enable_gradient_checkpointing()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(settings.seed)
        return Magnet(transformer, settings.mask, fm_weight=settings.fm_weight)


def _loader(samples: TrainingSamples, run: Run, start: int) -> DataLoader[Batch]:
    """The batches of this process, from optimizer step ``start`` on."""
    settings, accelerator = run.settings, run.accelerator
    return DataLoader(
        samples,
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


# One step


def _take_step(run: Run, prepared: Any, step: int, batches: Iterator[Batch]) -> tuple[Losses, float]:
    """One optimizer step; returns mean losses of this process and the gradient's norm.

    Args:
        run: whose weights are changed.
        prepared: its module, as Accelerate wraps it.
        step: number of steps done before.
        batches: of this process, one for each forward.
    """
    settings, accelerator = run.settings, run.accelerator
    for group in run.optimizer.param_groups:
        group["lr"] = learning_rate(step, settings.steps, settings.optimizer)
    seen: list[Losses] = []
    names: list[str] = []
    for forward in range(settings.accumulation):
        batch = next(batches).to(accelerator.device)
        names += batch.names
        last = forward == settings.accumulation - 1
        with accelerator.no_sync(prepared) if not last else nullcontext():
            losses = prepared(batch)
            (losses.total / settings.accumulation).backward()
        seen.append(Losses(*(value.detach() for value in losses)))
    weights = list(run.weights.values())
    norm = float(torch.nn.utils.clip_grad_norm_(weights, settings.optimizer.clip))
    if math.isfinite(norm):
        run.optimizer.step()
        run.progress.bad = 0
        run.update_average(step)
    else:
        _skip_step(run, step, names)
    for weight in weights:
        weight.grad = None
    return Losses(*(torch.stack(values).mean() for values in zip(*seen, strict=True))), norm


def _skip_step(run: Run, step: int, names: Sequence[str]) -> None:
    """Leave out an update whose gradient is not finite; it is the same on every process."""
    run.progress.skipped += 1
    run.progress.bad += 1
    where = f"step {step + 1} ({', '.join(names[:4])})"
    if run.progress.bad >= run.settings.bad_steps:
        raise FloatingPointError(
            f"the gradient was NaN or infinite in {run.progress.bad} consecutive steps, the last one "
            f"{where}; lower optimizer.learning_rate={run.settings.optimizer.learning_rate:g} or "
            "mask.weight, or use memory.precision='float32'. Weights and checkpoints are as before"
        )
    logger.warning("the gradient of %s is NaN or infinite; the step is skipped", where)


# What is measured and shown


def _start_trackers(run: Run) -> None:
    if run.settings.report != "none":
        values = run.settings.by_name()
        shown = {name: v if isinstance(v, (int, float)) else str(v) for name, v in values.items()}
        run.accelerator.init_trackers("magnet", config=shown)


def _log_step(run: Run, losses: Losses, norm: float, done: int) -> None:
    if run.settings.report == "none":
        return
    means = run.accelerator.reduce(torch.stack(list(losses)), reduction="mean")
    values = dict(zip((f"train/{name}" for name in Losses._fields), means.tolist(), strict=True))
    rate = run.optimizer.param_groups[0]["lr"]
    run.accelerator.log({**values, "train/gradient_norm": norm, "train/learning_rate": rate}, step=done)


@torch.no_grad()
def _evaluate(
    run: Run, samples: HeldOutSamples, encodings: Encodings, drawn: SamplePrompts | None, done: int
) -> None:
    """Losses on the held-out split, images for the trackers, and the best adapters so far."""
    if len(samples) == 0:
        return
    accelerator = run.accelerator
    with run.averaged():
        exact = torch.float32 if accelerator.device.type == "mps" else torch.float64  # MPS has no float64
        sums = torch.zeros(len(Losses._fields), dtype=exact, device=accelerator.device)
        for number in range(accelerator.process_index, len(samples), accelerator.num_processes):
            losses = run.magnet(samples[number].to(accelerator.device))
            sums += torch.stack(list(losses)).to(exact)
        means = accelerator.reduce(sums, reduction="sum") / len(samples)
        values = dict(zip(Losses._fields, means.tolist(), strict=True))
        run.progress.held_out = values
        mask = run.settings.mask
        score = {
            "total": values["total"],
            "flow": values["flow"],
            "mask": mask.focal_weight * values["focal"] + mask.dice_weight * values["dice"],
        }[run.settings.select]
        run.keep_best(score, done)
        if run.settings.report != "none":
            accelerator.log({f"held-out/{name}": value for name, value in values.items()}, step=done)
            if accelerator.is_main_process:
                _log_images(run, samples, encodings, drawn, done)


def _log_images(
    run: Run, samples: HeldOutSamples, encodings: Encodings, drawn: SamplePrompts | None, done: int
) -> None:
    images: dict[str, Any] = {}
    if run.settings.mask.weight > 0:
        images["masks"] = mask_overlays(run.magnet, samples, encodings)
    if drawn is not None:
        images["samples"] = drawn.draw(run.magnet.transformer)
    for tracker in run.accelerator.trackers:
        if hasattr(tracker, "log_images"):
            layout = {"dataformats": "NHWC"} if tracker.name == "tensorboard" else {}
            tracker.log_images({name: p for name, p in images.items() if len(p)}, step=done, **layout)


def peak_memory() -> str:
    """Peak memory so far: of the GPU if there is one, else of the process."""
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    else:
        import resource
        import sys

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    return f"{peak / 2**30:.1f}GiB"
