"""One MAGNET training step at 1024 px: peak memory and time, beside what it replaces, in one run.

Random weights. On a GPU SD3-medium's exact size in bfloat16; on a CPU four blocks of four heads in float32,
with the token counts of 1024 px. Rivals: the same step with the attention matrix materialised, and a
plain LoRA step without mask loss. The estimate of ``seg4diff train --estimate`` has to be within 10 % of the
measurement.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from typing import Any

import pytest
import torch

from benchmarks.measuring import compare
from benchmarks.memory import peak_bytes
from seg4diff.kernels.api import Backend
from seg4diff.magnet.adapters import add_adapters
from seg4diff.magnet.estimate import SD3_MEDIUM, estimate_memory
from seg4diff.magnet.objective import Batch, Magnet
from seg4diff.magnet.optimizers import make_optimizer
from seg4diff.magnet.settings import TrainSettings, build_settings

GPU = torch.cuda.is_available()
DEVICE = "cuda" if GPU else "cpu"
DTYPE = torch.bfloat16 if GPU else torch.float32
REDUCED = {
    **SD3_MEDIUM,
    "num_layers": 4,
    "num_attention_heads": 4,
    "caption_projection_dim": 256,
    "joint_attention_dim": 512,
    "pooled_projection_dim": 256,
}
CONFIG = SD3_MEDIUM if GPU else REDUCED
LAYER = 9 if GPU else 1
MASKS, TEXT = 8, 154
GIB = 2**30


def settings(**changes: Any) -> TrainSettings:
    precision = "bfloat16" if GPU else "float32"
    values = {"mask": {"layers": [LAYER]}, "memory": {"precision": precision}, **changes}
    return build_settings(values)


class Step:
    """A training step and everything that it keeps alive."""

    def __init__(self, chosen: TrainSettings, backend: Backend) -> None:
        from diffusers import SD3Transformer2DModel

        torch.manual_seed(0)
        with torch.device(DEVICE):
            transformer: Any = SD3Transformer2DModel.from_config(CONFIG).to(DTYPE)
        if chosen.memory.quantise == "nf4":
            from seg4diff.magnet.quantisation import quantise_nf4

            quantise_nf4(transformer, torch.device(DEVICE))
        stop_after = LAYER if chosen.fm_weight == 0 else None
        weights = add_adapters(transformer, chosen.lora, stop_after=stop_after)
        transformer.enable_gradient_checkpointing()
        self.magnet = Magnet(transformer, chosen.mask, fm_weight=chosen.fm_weight, backend=backend)
        self.optimizer = make_optimizer(weights, chosen.optimizer)
        self.batch = batch().to(DEVICE)

    def __call__(self) -> None:
        self.magnet(self.batch).total.backward()
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)

    def resident(self) -> list[torch.Tensor]:
        states = [t for s in self.optimizer.state.values() for t in s.values() if isinstance(t, torch.Tensor)]
        return [*self.magnet.parameters(), *self.magnet.buffers(), *states]


def batch() -> Batch:
    """A picture of 1024 x 1024 pixels with eight masks."""
    generator = torch.Generator().manual_seed(0)
    masks = torch.rand(MASKS, 256, 256, generator=generator) < 0.2
    return Batch(
        latents=torch.randn(1, 16, 128, 128, generator=generator),
        noise=torch.randn(1, 16, 128, 128, generator=generator),
        sigma=torch.tensor([0.5]),
        text={
            "encoder_hidden_states": torch.randn(1, TEXT, CONFIG["joint_attention_dim"], generator=generator),
            "pooled_projections": torch.randn(1, CONFIG["pooled_projection_dim"], generator=generator),
        },
        masks=(masks.to(torch.uint8),),
        columns=(tuple((1 + c, 2 + c) for c in range(MASKS)),),
    )


def peak_of(chosen: TrainSettings, backend: Backend = "auto") -> int:
    """Peak of a second step, with nothing else of this module alive."""
    step = Step(chosen, backend)
    step()
    return peak_bytes(step, step.resident())


def test_memory_and_estimate(training: dict[str, Any]) -> None:
    variants: dict[str, tuple[TrainSettings, Backend]] = {
        "MAGNET": (settings(), "auto"),
        "MAGNET, map materialised": (settings(), "reference"),
        "plain LoRA": (settings(mask={"weight": 0.0, "layers": [LAYER]}), "auto"),
        "MAGNET without flow matching": (
            settings(fm_weight=0.0, data={"caption_dropout": 0.0}),
            "auto",
        ),
    }
    if GPU and importlib.util.find_spec("bitsandbytes") is not None:
        variants["MAGNET, NF4"] = (settings(memory={"precision": "bfloat16", "quantise": "nf4"}), "auto")
    print()
    peaks = {}
    for name, (chosen, backend) in variants.items():
        peaks[name] = peak_of(chosen, backend)
        found = {"measured": peaks[name]}
        if backend == "auto":
            found["estimated"] = estimate_memory(
                CONFIG, chosen, device=DEVICE, text_tokens=TEXT, masks=MASKS
            ).peak
        print(f"{name}: " + ", ".join(f"{what} {size / GIB:.3f} GiB" for what, size in found.items()))
        training.setdefault("peak_bytes", {})[name] = found
        if backend == "auto":
            assert found["estimated"] == pytest.approx(found["measured"], rel=0.1), name
    assert peaks["MAGNET"] < peaks["MAGNET, map materialised"]
    if GPU:
        assert peaks["MAGNET"] <= 6 * GIB
        assert peaks.get("MAGNET, NF4", 0) <= 3.5 * GIB


def test_time(benchmark: Any, training: dict[str, Any]) -> None:
    magnet = Step(settings(), "auto")
    plain = Step(settings(mask={"weight": 0.0, "layers": [LAYER]}), "auto")
    rivals: dict[str, Callable[[], object]] = {"plain LoRA": plain}
    if GPU:
        rivals["map materialised"] = Step(settings(), "reference")
    medians = compare(benchmark, magnet, rivals, rounds=10 if GPU else 2)
    training["seconds"] = medians
    ratio = medians["ours"] / medians["plain LoRA"]
    print(f"\nMAGNET step: {medians['ours']:.3f} s, {ratio:.3f} of a plain LoRA step")
