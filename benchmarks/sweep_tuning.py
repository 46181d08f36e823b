"""Times alternatives to the tuning table on this GPU: ``python -m benchmarks.sweep_tuning --out FOLDER``.

For each heavy kernel, at Stable Diffusion 3's 1024 px and with a map, every candidate is compiled, its result
compared with that of the table's own entry, and timed. All of it goes to ``FOLDER/tuning.json``; the rows
with the fastest candidates are printed, to be written into ``kernels/triton/tuning.py`` by hand.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import logging
import math
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any
from unittest.mock import patch

import torch
import triton
from torch import Tensor

from seg4diff.kernels.testing import attention_inputs
from seg4diff.kernels.triton import backend, backward, tuning
from seg4diff.kernels.triton.launch import Launch
from seg4diff.kernels.triton.tuning import Config, Tuning, target_of, tuning_of
from seg4diff.kernels.types import Inputs, Request

log = logging.getLogger(__name__)

KERNELS = {
    "forward": "attention_kernel",
    "log_sum_exp": "attention_kernel",
    "query_gradient": "query_gradient_kernel",
    "key_gradient": "key_gradient_kernel",
    "scores": "map_kernel",
}
ROWS_AND_COLUMNS = {
    "forward": [(128, 128), (128, 64), (64, 64), (128, 32)],
    "log_sum_exp": [(128, 128), (128, 64), (64, 64), (128, 32)],
    "query_gradient": [(128, 64), (64, 64), (128, 32), (64, 32)],
    "key_gradient": [(64, 128), (64, 64), (32, 128), (32, 64)],
    "scores": [(64, 64), (128, 64), (64, 32), (32, 64)],
}


def candidates(kind: str, current: Config) -> Iterator[Config]:
    """The table's own entry, then the alternatives."""
    yield current
    for (rows, columns), warps, stages in itertools.product(ROWS_AND_COLUMNS[kind], (4, 8), (2, 3)):
        config = Config(rows, columns, warps, stages)
        if kind in ("forward", "log_sum_exp"):
            shifted = replace(config, shifted=True)
            alternatives = [config, shifted, replace(shifted, lanes=8)]
            if warps == 8:  # two programs share a multiprocessor
                alternatives.append(replace(shifted, lanes=8, registers=128))
        else:
            alternatives = [config]
        yield from (alternative for alternative in alternatives if alternative != current)


@contextmanager
def using(configs: Tuning) -> Iterator[None]:
    """Let host code choose its configurations from ``configs``."""
    with patch.object(tuning, "tuning_for", lambda tensor: configs):
        yield


def launch_of(kind: str, configs: Tuning, run: Callable[[], object]) -> Launch:
    """The launch of one kernel among those that ``run`` makes; the others run, this one as well."""
    made: list[Launch] = []
    start = Launch.start

    def watched(launch: Launch) -> None:
        output = launch.arguments.get("OUTPUT", False)
        if launch.kernel.__name__ == KERNELS[kind] and (kind != "log_sum_exp" or not output):
            made.append(launch)
        start(launch)

    with using(configs), patch.object(Launch, "start", watched):
        run()
    return made[0]


def microseconds(launch: Launch) -> float:
    """Median time of a launch over a tenth of a second."""
    launch.start()
    torch.cuda.synchronize()
    times = []
    until = time.monotonic() + 0.1
    while time.monotonic() < until:
        first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        first.record()
        launch.start()
        last.record()
        last.synchronize()
        times.append(1e3 * first.elapsed_time(last))
    return median(times)


def outputs(launch: Launch, names: tuple[str, ...]) -> list[Tensor]:
    tensors = [launch.arguments[name].data for name in names if name in launch.arguments]
    return [tensor.clone() for tensor in tensors if tensor is not None]


def sweep(head_dim: int, seconds: float) -> list[dict[str, Any]]:
    """Times of the candidates for a head dim, each kernel's within its share of ``seconds``."""
    device = torch.device("cuda", torch.cuda.current_device())
    target = target_of(device)
    if target is None:
        raise SystemExit(f"{torch.cuda.get_device_name()} has no row in the tuning table")
    table = tuning_of(target, head_dim, torch.bfloat16)
    drawn = attention_inputs(1, 4096, 154, 24, head_dim, torch.bfloat16, device="cuda", edited=True)
    inputs = Inputs(**drawn)
    request = Request(head_dim**-0.5, "probability", "mean", 0, 154)
    joint, lse, entries = backend.forward(inputs, request)
    streams = request.split(joint, 4096)

    maps_alone = replace(inputs, value=None, text_value=None, text_value_for_image=None)

    def run() -> None:
        backend.forward(inputs, request)
        backend.forward(maps_alone, request)
        backward.backward(*streams, entries, inputs, *streams, lse, request)

    written = ("image", "text", "lse", "d_query", "d_key", "d_text_key", "d_value", "maps")
    found = []
    for kind in KERNELS:
        current: Config = getattr(table, kind)
        expected: list[Tensor] = []
        deadline = time.monotonic() + seconds / len(KERNELS)
        for config in candidates(kind, current):
            if time.monotonic() > deadline:
                log.warning("out of time at head dim %d, %s", head_dim, kind)
                break
            record: dict[str, Any] = {"head_dim": head_dim, "kernel": kind, **dataclasses.asdict(config)}
            record["in_table"] = config == current
            try:
                launch = launch_of(kind, replace(table, **{kind: config}), run)
                record["microseconds"] = microseconds(launch)
            except triton.runtime.errors.OutOfResources as error:
                record["refused"] = str(error)
            else:
                results = outputs(launch, written)
                expected = expected or results
                worst = max(
                    float((a.float() - b.float()).norm() / b.float().norm().clamp_min(1e-30))
                    for a, b in zip(results, expected, strict=True)
                )
                record["difference"] = worst
                if not worst < 0.02 or math.isnan(worst):
                    record["wrong"] = True
            log.info("%s", record)
            found.append(record)
    return found


def fastest(found: list[dict[str, Any]]) -> dict[str, dict[str, Any]]:
    """The fastest candidate of every kernel and head dim whose results were right."""
    best: dict[str, dict[str, Any]] = {}
    for record in found:
        if "microseconds" in record and not record.get("wrong"):
            name = f"{record['kernel']}, head dim {record['head_dim']}"
            if name not in best or record["microseconds"] < best[name]["microseconds"]:
                best[name] = record
    return best


def rows(best: dict[str, dict[str, Any]], target: str) -> dict[int, Tuning]:
    """By head dim the configurations of all kernels, the table's own where none was measured."""
    found: dict[int, Tuning] = {}
    for record in best.values():
        head_dim = record["head_dim"]
        own = found.get(head_dim, tuning_of(target, head_dim, torch.bfloat16))
        config = Config(**{field.name: record[field.name] for field in dataclasses.fields(Config)})
        found[head_dim] = replace(own, **{record["kernel"]: config})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="folder to write tuning.json to")
    parser.add_argument("--seconds", type=float, default=150, help="time for the whole sweep")
    options = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    if not torch.cuda.is_available():
        raise SystemExit("a sweep needs a GPU")
    found = [record for head_dim in (64, 128) for record in sweep(head_dim, options.seconds / 2)]
    best = fastest(found)
    target = target_of(torch.device("cuda", torch.cuda.current_device()))
    assert target is not None
    options.out.mkdir(parents=True, exist_ok=True)
    report = {
        "device": torch.cuda.get_device_name(),
        "triton": triton.__version__,
        "best": best,
        "all": found,
    }
    (options.out / "tuning.json").write_text(json.dumps(report, indent=1) + "\n")
    for name, record in best.items():
        mark = "in the table" if record["in_table"] else "NOT in the table"
        log.info("%s: %.1f us, %s: %s", name, record["microseconds"], mark, record)
    for head_dim, row in rows(best, target).items():
        log.info("%s, %d: %s", target, head_dim, row)


if __name__ == "__main__":
    main()
