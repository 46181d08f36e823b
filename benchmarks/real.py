"""One command from real weights to evidence: layers, data sets, the steps of "best", time and memory.

    make real MODEL=stabilityai/stable-diffusion-3-medium-diffusers DATA=data
    python -m benchmarks.real --model MODEL --data-root data --out real-results

Ranks the layers on labelled images, evaluates the presets on Pascal VOC, Pascal Context and ADE20K with the
names present ("oracle") and with all names ("full", "presence"), takes the steps of "best" one by one on
the first data set, and times `segment`. OUT/report.md holds all tables, to be pasted. The same command
continues an interrupted run: what is in OUT is not measured again.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any, get_args

import seg4diff
from benchmarks.measuring import compare, device_name
from benchmarks.memory import peak_bytes
from benchmarks.segmentation_ablation import variants
from seg4diff.cli.rank_layers import RankLayers
from seg4diff.data.names import DatasetName
from seg4diff.data.registry import Dataset, open_dataset, subset
from seg4diff.evaluation import ProtocolName
from seg4diff.evaluation.contact_sheet import write_contact_sheet
from seg4diff.evaluation.evaluator import EvaluationSettings, Evaluator
from seg4diff.evaluation.published import PAPER_ROWS, PUBLISHED
from seg4diff.evaluation.report import (
    EvaluationReport,
    failures_line,
    markdown_row,
    versions_of,
    write_report,
)
from seg4diff.evaluation.runner import evaluate
from seg4diff.files import check_folder, write_atomically
from seg4diff.segmentation.presets import Preset

DATASETS = ["voc20", "pc59", "ade150"]
PRESETS = ("paper", "default", "fast", "best")
PROTOCOLS: tuple[ProtocolName, ...] = ("oracle", "full", "presence")
LEVELS = (4, 8, 14, 20, 28)
TIMED = 4  # images


def rank(options: argparse.Namespace) -> dict[str, Any]:
    """The ranking of `seg4diff rank-layers` on the first data set."""
    out = options.out / "layers"
    asked = {
        "dataset": options.dataset[0],
        "data_root": options.data_root,
        "limit": options.rank_limit,
        "partial": options.partial,
        "model": options.model,
        "device": options.device,
        "dtype": options.dtype,
        "offload": options.offload,
        "batch_size": options.batch_size,
    }
    asked_file, found_file = out / "asked.json", out / "ranking.json"
    text = json.dumps(asked, default=str)
    if not (asked_file.is_file() and asked_file.read_text() == text and found_file.is_file()):
        asked_file.unlink(missing_ok=True)
        RankLayers(**asked, noise_levels=LEVELS, out=out).run()
        write_atomically(asked_file, lambda path: path.write_text(text))
    ranking: dict[str, Any] = json.loads(found_file.read_text())
    return ranking


def measured(
    pipe: Any, dataset: Dataset, preset: str | Preset, out: Path, options: argparse.Namespace
) -> EvaluationReport:
    """One evaluation, with its report and contact sheet."""
    settings = EvaluationSettings(
        PROTOCOLS,
        preset,  # type: ignore[arg-type]
        None if options.layers is None else tuple(options.layers),
        batch_size=options.batch_size,
    )
    report = evaluate(pipe, dataset, out, settings, about={"model": options.model})
    write_report(report, out)
    if not (out / "contact-sheet.png").is_file():
        write_contact_sheet(Evaluator(pipe, dataset, settings), dataset, out)
    return report


def timed(pipe: Any, dataset: Dataset, options: argparse.Namespace) -> dict[str, dict[str, float]]:
    """Seconds per image, and peak bytes beside the weights, of `segment` with all names."""
    path: Path = options.out / "time.json"
    if path.is_file():
        found: dict[str, dict[str, float]] = json.loads(path.read_text())
        return found
    images = [item.image() for item in dataset.items[:TIMED]]  # type: ignore[attr-defined]
    names = list(dict.fromkeys(several[0] for several in dataset.prompts))
    modules = [module for module in pipe.components.values() if hasattr(module, "parameters")]
    weights = sum({p.data_ptr(): p.nbytes for m in modules for p in m.parameters()}.values())

    def run(preset: str) -> Any:
        return seg4diff.segment(
            pipe, images, names, preset=preset, layers=options.layers, batch_size=options.batch_size,
            progress=False,
        )  # type: ignore[call-overload]  # fmt: skip

    calls = {preset: (lambda preset=preset: run(preset)) for preset in PRESETS}
    seconds = compare(calls["default"], {name: call for name, call in calls.items() if name != "default"}, 3)
    seconds["default"] = seconds.pop("ours")
    parameters = [p for module in modules for p in module.parameters()]
    found = {
        preset: {
            "seconds": seconds[preset] / len(images),
            "peak_mib": (peak_bytes(call, parameters) - weights) / 2**20,
        }
        for preset, call in calls.items()
    }
    write_atomically(path, lambda temporary: temporary.write_text(json.dumps(found, indent=1)))
    return found


def table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A Markdown table whose first column is words."""
    return "\n".join(map(markdown_row, [head, ["---", *["---:"] * (len(head) - 1)], *rows]))


def table_of(reports: Sequence[tuple[str, EvaluationReport]]) -> str:
    """mIoU (boundary IoU) in %, by protocol."""
    rows = []
    for name, report in reports:
        cells = [f"{name}, {report.title}", f"{report.images} of {report.expected or report.total}"]
        for protocol in PROTOCOLS:
            rates = report.rates.get(protocol)
            if rates is None or rates.boundary_iou is None:
                cells.append("-")
            else:
                cells.append(f"{100 * rates.miou:.1f} ({100 * rates.boundary_iou:.1f})")
        published = PUBLISHED["oracle"].get(report.dataset, (None,))[0]
        rows.append([*cells, "-" if published is None else str(published)])
    return table(["", "images", *PROTOCOLS, f"paper, {PAPER_ROWS[0]}, oracle"], rows)


def layers_table(ranking: dict[str, Any]) -> str:
    """mIoU in % by layer, best first, and noise level."""
    head = [f"{n} (t {t:.0f})" for n, t in zip(ranking["noise_levels"], ranking["timesteps"], strict=True)]
    scores = dict(zip(ranking["layers"], zip(*ranking["scores"], strict=True), strict=True))
    rows = [[str(layer), *(f"{100 * score:.1f}" for score in scores[layer])] for layer in ranking["order"]]
    return table(["layer", *head], rows)


PAGE = """# {model}

{device}, {dtype}; {versions}. Layers read: {layers}. Recipe: {recipe}.

## Presets

mIoU (boundary IoU) in %, one confusion matrix per data set. oracle: the names present in each image are asked
for; full: all names; presence: all names, and those that are not found are left out.

{presets}

## Steps of "best"

{steps}

## Layers

mIoU in % with the names present, {ranked} images of {first}, by steps left of 28.

{ranking}

## Time and memory

`segment` with all names of {first}: median of 3 rounds in turns, and the peak beside the weights.

{costs}

{failures}
"""


def page(
    pipe: Any,
    options: argparse.Namespace,
    ranking: dict[str, Any],
    presets: list[tuple[str, EvaluationReport]],
    steps: list[tuple[str, EvaluationReport]],
    costs: dict[str, dict[str, float]],
) -> str:
    """All tables."""
    reports = [report for _, report in [*presets, *steps]]
    failures = dict(chain.from_iterable(report.failures.items() for report in reports))
    times = [
        [f"`{name}`", f"{1000 * cost['seconds']:.0f}", f"{cost['peak_mib']:.0f}"]
        for name, cost in costs.items()
    ]
    return (
        PAGE.format(
            model=options.model,
            device=device_name(),
            dtype=str(pipe.transformer.dtype).removeprefix("torch."),
            versions=", ".join(f"{name} {version}" for name, version in versions_of(pipe).items()),
            layers=reports[0].settings["layers"],
            recipe=json.dumps(reports[0].settings["recipe"]),
            presets=table_of(presets),
            steps=table_of(steps),
            ranked=ranking["images"],
            first=options.dataset[0],
            ranking=layers_table(ranking),
            costs=table(["preset", "ms per image", "MiB"], times),
            failures=failures_line(failures, sum(report.total for report in reports)) if failures else "",
        ).rstrip()
        + "\n"
    )


def main(words: Sequence[str] | None = None) -> Path:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--model", required=True, help='a folder or name on the hub; "demo" for the bundled one'
    )
    parser.add_argument("--data-root", type=Path, help="as of `seg4diff evaluate`")
    parser.add_argument("--out", type=Path, default=Path("real-results"))
    parser.add_argument(
        "--dataset", nargs="+", choices=get_args(DatasetName), default=["voc20", "pc59", "ade150"]
    )
    parser.add_argument("--limit", type=int, help="only the first N images of each data set")
    parser.add_argument("--rank-limit", type=int, default=100, help="images on which layers are ranked")
    parser.add_argument("--step-limit", type=int, default=200, help='images for the steps of "best"')
    parser.add_argument("--partial", action="store_true", help="accept data sets of which images are missing")
    parser.add_argument("--layers", type=int, nargs="+", help="by default the model's expert layers")
    parser.add_argument("--batch-size", type=int, default=1)
    parser.add_argument("--device")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"))
    parser.add_argument("--offload", action="store_true")
    options = parser.parse_args(words)
    datasets = [
        subset(open_dataset(name, options.data_root, partial=options.partial), limit=options.limit)
        for name in options.dataset
    ]
    check_folder(options.out)
    ranking = rank(options)
    pipe = seg4diff.load_pipeline(options.model, options.device, options.dtype, offload=options.offload)
    presets = [
        (f"`{preset}`", measured(pipe, dataset, preset, options.out / preset / dataset.name, options))
        for dataset in datasets
        for preset in PRESETS
    ]
    first = subset(datasets[0], limit=min(options.step_limit, len(datasets[0].items)))
    steps = []
    for number, (row, preset) in enumerate(variants().items()):
        out = options.out / "steps" / f"{number:02}"
        steps.append((row, measured(pipe, first, replace(preset, name=row), out, options)))
    costs = timed(pipe, datasets[0], options)
    text = page(pipe, options, ranking, presets, steps, costs)
    path = write_atomically(options.out / "report.md", lambda path: path.write_text(text, encoding="utf-8"))
    print(text)
    return Path(path)


if __name__ == "__main__":
    main()
