"""MAGNET on the bundled model over several seeds, beside the same runs without the mask loss.

    python -m benchmarks.magnet_seeds [--seeds 0 1 2] [--out benchmarks/results/magnet_seeds.json]

For every seed four runs of equal length: the mask loss on a layer that is not yet saturated, the same on maps
that are not normalised, the mask loss on the expert layer, and a plain LoRA. All are measured on scenes from
which nothing was learned or chosen, each with its saved adapters in a fresh pipeline: zero-shot mIoU of both
layers, matched unsupervised mIoU, and the flow-matching loss with the same noise and noise levels for all.
``--weights`` adds runs with other weights of the mask loss, for the trade-off.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from statistics import mean
from typing import Any

from seg4diff.backbones import find_backbone
from seg4diff.demo import HELD_OUT, scene
from seg4diff.files import write_atomically
from seg4diff.loading import load_pipeline
from seg4diff.lora.files import load_lora
from seg4diff.training.demo import SETTINGS, layer_to_tune, measure
from seg4diff.training.settings import build_settings, merged
from seg4diff.training.trainer import train


def run(
    changes: Mapping[str, Any], folder: Path, drawn: Sequence[Any], layer: int, expert: int
) -> dict[str, Any]:
    """Train once, measure the saved adapters in a fresh pipeline."""
    settings = build_settings(merged(merged(SETTINGS, changes), {"out": str(folder)}))
    started = time.perf_counter()
    result = train(settings, pipe=load_pipeline("demo", "cpu"), progress=False)
    seconds = time.perf_counter() - started
    found = measure(load_lora(load_pipeline("demo", "cpu"), result.lora), drawn, layer, expert)
    return {**asdict(found), "seconds": round(seconds, 1), "best_step": result.best_step}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n", maxsplit=1)[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--weights", type=float, nargs="*", default=[], help="weights of the mask loss to add"
    )
    parser.add_argument("--scenes", type=int, default=64, help="held-out scenes to measure on")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/magnet_seeds.json"))
    options = parser.parse_args()

    pipe = load_pipeline("demo", "cpu")
    expert = find_backbone(pipe).expert_layers(pipe.transformer)[0]
    layer = layer_to_tune(pipe)
    drawn = [scene(HELD_OUT + number) for number in range(options.scenes)]
    before = measure(pipe, drawn, layer, expert)
    print(f"before, layer {layer} (expert {expert}): {_line(asdict(before), layer, expert)}", flush=True)
    report: dict[str, Any] = {
        "scenes": options.scenes,
        "layer": layer,
        "expert": expert,
        "settings": SETTINGS,
        "versions": {name: version(name) for name in ("torch", "diffusers", "peft")},
        "before": asdict(before),
        "runs": [],
    }
    with tempfile.TemporaryDirectory() as folder:
        for seed in options.seeds:
            variants: dict[str, dict[str, Any]] = {
                "plain LoRA": {"weight": 0.0, "layers": [layer]},
                f"layer {layer}": {"layers": [layer]},
                f"layer {layer}, not normalised": {"layers": [layer], "normalisation": "none"},
                f"layer {expert} (expert)": {"layers": [expert]},
                **{f"layer {layer}, weight {w:g}": {"layers": [layer], "weight": w} for w in options.weights},
            }
            for name, mask in variants.items():
                cache = {"cache": str(Path(folder) / "cache")}
                changes = {"seed": seed, "mask": mask, "data": cache}
                found = run(changes, Path(folder) / f"{seed}-{name}", drawn, layer, expert)
                report["runs"].append({"seed": seed, "variant": name, **found})
                print(f"seed {seed}, {name}: {_line(found, layer, expert)}, {found['seconds']} s", flush=True)
                _write(options.out, report)


def _line(found: Mapping[str, Any], layer: int, expert: int) -> str:
    zero_shot = ", ".join(
        f"layer {number} {100 * found['zero_shot'][number]:.1f}" for number in (layer, expert)
    )
    return f"zero-shot {zero_shot}, unsupervised {100 * found['unsupervised']:.1f}, flow {found['flow']:.4f}"


def _write(out: Path, report: Mapping[str, Any]) -> None:
    """The numbers as JSON and, beside them, as a table."""
    write_atomically(out, lambda path: path.write_text(json.dumps(report, indent=1) + "\n"))
    layer, expert = report["layer"], report["expert"]
    columns = ("seed", "trained", f"layer {layer}", f"layer {expert} (expert)", "unsupervised")
    lines = [f"# MAGNET on the bundled model, {report['scenes']} held-out scenes", ""]
    length = f"{report['settings']['steps']} steps of {report['settings']['batch']} images"
    lines += [
        f"{length}; mIoU in %. The ratio is of flow-matching losses, to the plain LoRA of the same seed.",
        "",
        f"| {' | '.join(columns)} | flow-matching loss | ratio |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        _row("", "before", report["before"], layer, expert, None),
    ]
    plain = {r["seed"]: r["flow"] for r in report["runs"] if r["variant"] == "plain LoRA"}
    for found in report["runs"]:
        lines.append(_row(found["seed"], found["variant"], found, layer, expert, plain.get(found["seed"])))
    for name in dict.fromkeys(r["variant"] for r in report["runs"]):
        several = [r for r in report["runs"] if r["variant"] == name]
        average = {
            "zero_shot": {n: mean(r["zero_shot"][n] for r in several) for n in (layer, expert)},
            "unsupervised": mean(r["unsupervised"] for r in several),
            "flow": mean(r["flow"] for r in several),
        }
        lines.append(_row("mean", name, average, layer, expert, mean(plain.values()) if plain else None))
    write_atomically(out.with_suffix(".md"), lambda path: path.write_text("\n".join(lines) + "\n"))


def _row(
    seed: object, name: str, found: Mapping[str, Any], layer: int, expert: int, plain: float | None
) -> str:
    zero_shot = [f"{100 * found['zero_shot'][number]:.1f}" for number in (layer, expert)]
    ratio = "" if plain is None else f"{found['flow'] / plain:.3f}"
    cells = [str(seed), name, *zero_shot, f"{100 * found['unsupervised']:.1f}", f"{found['flow']:.4f}", ratio]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    main()
