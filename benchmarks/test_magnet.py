"""One MAGNET training step at 1024 px: peak memory and time, beside what it replaces, in one run.

Random weights. On a GPU SD3-medium's exact size in bfloat16; on a CPU four blocks of four heads in float32,
with the token counts of 1024 px, or with ``--full-size`` the memory of the exact size in bfloat16 (some ten
minutes, 16 GiB). Rivals: the same step with the attention matrix materialised, and a plain LoRA step without
mask loss. The estimate of ``seg4diff estimate`` has to be within 10 % of the measurement.
"""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch

from benchmarks.measuring import compare
from benchmarks.memory import peak_bytes
from seg4diff.kernels.api import backend
from seg4diff.kernels.types import Backend
from seg4diff.lora.adapters import add_adapters
from seg4diff.training.memory import estimate_memory, model_shape
from seg4diff.training.objective.magnet import Batch, Magnet
from seg4diff.training.optimizers import make_optimizer
from seg4diff.training.settings import TrainSettings, build_settings

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
SD3_MEDIUM = model_shape("stabilityai/stable-diffusion-3-medium-diffusers")[0]
REDUCED = {
    **SD3_MEDIUM,
    "num_layers": 4,
    "num_attention_heads": 4,
    "caption_projection_dim": 256,
    "joint_attention_dim": 512,
    "pooled_projection_dim": 256,
}
MASKS, TEXT = 8, 154
GIB = 2**30


@dataclass(frozen=True)
class Size:
    """A transformer's shape and precision, and the layer whose maps are trained."""

    config: Mapping[str, Any]
    precision: str
    layer: int

    @property
    def exact(self) -> bool:
        """Whether this is SD3-medium's own size."""
        return self.config is SD3_MEDIUM

    def settings(self, **changes: Any) -> TrainSettings:
        values = {"mask": {"layers": [self.layer]}, "memory": {"precision": self.precision}, **changes}
        return build_settings(values)

    def plain(self) -> TrainSettings:
        """A LoRA without mask loss."""
        return self.settings(mask={"weight": 0.0, "layers": [self.layer]})


@pytest.fixture(scope="module")
def size(request: pytest.FixtureRequest) -> Size:
    exact = GPU or request.config.getoption("--full-size")
    return Size(SD3_MEDIUM, "bfloat16", 9) if exact else Size(REDUCED, "float32", 1)


class Step:
    """A training step and everything that it keeps alive."""

    def __init__(self, size: Size, chosen: TrainSettings) -> None:
        from diffusers import SD3Transformer2DModel

        torch.manual_seed(0)
        dtype = getattr(torch, size.precision)
        with torch.device(DEVICE), default_dtype(dtype):
            model = SD3Transformer2DModel.from_config(dict(size.config))
        transformer: Any = model.to(dtype)  # its position embedding is made in float32 all the same
        if chosen.memory.quantise == "nf4":
            from seg4diff.lora.quantise import quantise_nf4

            quantise_nf4(transformer, torch.device(DEVICE))
        stop_after = size.layer if chosen.fm_weight == 0 else None
        weights = add_adapters(transformer, chosen.lora, stop_after=stop_after)
        transformer.enable_gradient_checkpointing()
        self.magnet = Magnet(transformer, chosen.mask, fm_weight=chosen.fm_weight)
        self.optimizer = make_optimizer(weights, chosen.optimizer)
        self.batch = batch(size, 1024).to(DEVICE)
        self.small = batch(size, 256).to(DEVICE)

    def __call__(self) -> None:
        self._run(self.batch)

    def warm_up(self) -> None:
        """A step on a small image: afterwards the optimizer has its states."""
        self._run(self.small)

    def _run(self, batch: Batch) -> None:
        self.magnet(batch).total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def resident(self) -> list[torch.Tensor]:
        states = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        scales = []  # of weights in 4 bits, and the scales' own
        for weight in self.magnet.parameters():
            quantised = getattr(weight, "quant_state", None)
            while quantised is not None:
                scales += [t for t in vars(quantised).values() if isinstance(t, torch.Tensor)]
                quantised = quantised.state2
        return [*self.magnet.parameters(), *self.magnet.buffers(), *states, *scales]


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """Weights are made in the dtype that they stay in."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def batch(size: Size, pixels: int) -> Batch:
    """One square image with eight masks."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(MASKS, 256, 256, generator=generator) < 0.2
    shape = (1, 16, pixels // 8, pixels // 8)
    config = size.config
    return Batch(
        latents=torch.randn(shape, generator=generator),
        noise=torch.randn(shape, generator=generator),
        sigma=torch.tensor([0.5]),
        text={
            "encoder_hidden_states": torch.randn(1, TEXT, config["joint_attention_dim"], generator=generator),
            "pooled_projections": torch.randn(1, config["pooled_projection_dim"], generator=generator),
        },
        masks=(masks.to(torch.uint8),),
        columns=(tuple((1 + c, 2 + c) for c in range(MASKS)),),
    )


def peak_of(size: Size, chosen: TrainSettings) -> tuple[int, float]:
    """Peak and seconds of a step, with nothing else of this module alive."""
    step = Step(size, chosen)
    step.warm_up()
    started = time.perf_counter()
    peak = peak_bytes(step, step.resident())
    return peak, time.perf_counter() - started


def test_memory_and_estimate(size: Size, training: dict[str, Any]) -> None:
    variants: dict[str, tuple[TrainSettings, Backend]] = {
        "MAGNET": (size.settings(), "auto"),
        "plain LoRA": (size.plain(), "auto"),
        "MAGNET without flow matching": (
            size.settings(fm_weight=0.0, data={"caption_dropout": 0.0}),
            "auto",
        ),
        "MAGNET, map materialised": (size.settings(), "reference"),
    }
    if size.exact and importlib.util.find_spec("bitsandbytes") is not None:
        nf4 = size.settings(memory={"precision": "bfloat16", "quantise": "nf4"})
        variants["MAGNET, NF4"] = (nf4, "auto")
    print()
    training["size"] = {"model": "SD3-medium" if size.exact else "reduced", "precision": size.precision}
    peaks: dict[str, int] = {}
    for name, (chosen, attention) in variants.items():
        with backend(attention):
            peaks[name], seconds = peak_of(size, chosen)
        found = {"measured_bytes": peaks[name]}
        if attention == "auto":
            found["estimated_bytes"] = estimate_memory(
                size.config, chosen, device=DEVICE, text_tokens=TEXT, masks=MASKS
            ).peak
        shown = ", ".join(f"{what[:-6]} {number / GIB:.3f} GiB" for what, number in found.items())
        print(f"{name}: {shown}; {seconds:.1f} s", flush=True)
        training.setdefault("steps", {})[name] = {**found, "seconds": round(seconds, 1)}
        if attention == "auto":
            assert found["estimated_bytes"] == pytest.approx(peaks[name], rel=0.1), name
    assert peaks["MAGNET"] < peaks["MAGNET, map materialised"]
    if size.exact:
        assert peaks["MAGNET"] <= 6 * GIB
        assert peaks.get("MAGNET, NF4", 0) <= 3.5 * GIB


def test_time(size: Size, training: dict[str, Any]) -> None:
    if size.exact and not GPU:
        pytest.skip("minutes a step")
    magnet, plain = Step(size, size.settings(), "auto"), Step(size, size.plain(), "auto")
    rivals: dict[str, Callable[[], object]] = {"plain LoRA": plain}
    if GPU:
        rivals["map materialised"] = Step(size, size.settings(), "reference")
    medians = compare(magnet, rivals, rounds=10 if GPU else 4)
    training["median_seconds"] = medians
    ratio = medians["ours"] / medians["plain LoRA"]
    print(f"\nMAGNET step: {medians['ours']:.3f} s, {ratio:.3f} of a plain LoRA step")
