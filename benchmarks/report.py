"""Benchmark results as a Markdown table and a plot: ``python -m benchmarks.report benchmarks/results``.

Reads every ``<device>.json`` of a folder that ``pytest benchmarks/ --results FOLDER`` wrote, prints the table
and draws ``joint-attention.png`` beside it.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import logging
from pathlib import Path
from typing import Any

log = logging.getLogger(__name__)

HEADER = [
    "| device | case | direction | ours | SDPA, no map | ratio | materialising / ours | TFLOP/s | memory |",
    "| --- | --- | --- | ---: | ---: | ---: | ---: | ---: | ---: |",
]


def load(folder: Path) -> list[dict[str, Any]]:
    """Reports of joint attention, one a device."""
    reports = [json.loads(path.read_text()) for path in sorted(folder.glob("*.json"))]
    return [report for report in reports if isinstance(report, dict) and "cases" in report]


def shown(number: float) -> str:
    """Three significant digits, without an exponent."""
    return f"{number:.0f}" if number >= 100 else f"{number:.3g}"


def row(device: str, case: dict[str, Any]) -> str:
    times, memory = case["milliseconds"], case["peak_mebibytes"]
    ours, plain = times["ours"], times["sdpa"]
    rival = times.get("materialising")
    if rival is not None:
        speed_up = f"{rival / ours:.1f}x"
    else:
        speed_up = "does not fit" if "materialising" in case["cannot_run"] else "not measured"
    cells = [
        device,
        case["case"],
        case["direction"],
        f"{shown(ours)} ms",
        f"{shown(plain)} ms ({case['sdpa_backend'].removesuffix('_ATTENTION').lower()})",
        f"{ours / plain:.2f}",
        speed_up,
        f"{case['teraflops']['ours']:.3g}",
        f"{memory['ours']:.0f} MiB ({memory['ours'] - memory['sdpa']:+.0f})",
    ]
    return "| " + " | ".join(cells) + " |"


def table(reports: list[dict[str, Any]]) -> str:
    """All cases of all devices; the ratio is ours to SDPA's; memory in brackets is above SDPA's."""
    return "\n".join(HEADER + [row(report["device"], case) for report in reports for case in report["cases"]])


def plot(reports: list[dict[str, Any]], path: Path) -> None:
    """Time of every rival as a multiple of SDPA without a map, by case."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    cases = [(report["device"], case) for report in reports for case in report["cases"]]
    figure, axes = pyplot.subplots(figsize=(8, 1.2 + 0.55 * len(cases)), layout="constrained")
    colours = {"ours": "tab:blue", "aten": "tab:green", "materialising": "tab:red"}
    for name, offset in zip(colours, (-0.27, 0.0, 0.27), strict=True):
        ratios = [case["milliseconds"].get(name, 0) / case["milliseconds"]["sdpa"] for _, case in cases]
        places = [index + offset for index in range(len(cases))]
        axes.barh(places, ratios, height=0.25, color=colours[name], label=name)
    axes.axvline(1, color="black", linewidth=1, label="SDPA, no map")
    axes.set_yticks(range(len(cases)), [f"{device}\n{c['case']}, {c['direction']}" for device, c in cases])
    axes.tick_params(axis="y", labelsize=7)
    axes.invert_yaxis()
    axes.set_xlabel("time as a multiple of attention without a map")
    axes.legend()
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path, help="where the results are")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    reports = load(options.folder)
    if not reports:
        raise SystemExit(
            f"no results in {options.folder}; run: pytest benchmarks/ --results {options.folder}"
        )
    print(table(reports))
    if importlib.util.find_spec("matplotlib") is None:
        log.warning("no plot: matplotlib is missing (pip install matplotlib)")
    else:
        plot(reports, options.folder / "joint-attention.png")


if __name__ == "__main__":
    main()
