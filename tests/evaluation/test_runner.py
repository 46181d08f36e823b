"""The whole path from files to figures: exact for a model that sees perfectly, repeatable for a real one."""

from __future__ import annotations

import errno
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import astuple, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
import torch
from PIL import Image

import seg4diff
from seg4diff import files, jobs
from seg4diff.data.prefetch import Loaded, load
from seg4diff.data.registry import Dataset, open_dataset, subset
from seg4diff.evaluation import ProtocolName
from seg4diff.evaluation import evaluator as evaluation
from seg4diff.evaluation.evaluator import EvaluationSettings, Evaluator
from seg4diff.evaluation.protocols import PROTOCOLS
from seg4diff.evaluation.report import EvaluationReport
from seg4diff.evaluation.results import Result, add_up, read_results
from seg4diff.evaluation.runner import evaluate
from seg4diff.kernels.api import backend
from seg4diff.metrics import Counts
from seg4diff.segmentation.passes import run_scores
from tests.support import miniature
from tests.support.painted import CLASSES, LABELS, PerfectMaps, use_maps
from tests.support.paths import ROOT


@pytest.fixture
def painted(tmp_path: Path) -> Dataset:
    """Images whose red channel is their label map."""
    miniature.write_folder(tmp_path / "data", CLASSES, LABELS, painted=True)
    return open_dataset("folder", tmp_path / "data")


def run(
    pipe: Any, dataset: Dataset, out: Path, settings: EvaluationSettings, **options: Any
) -> EvaluationReport:
    return evaluate(pipe, dataset, out, replace(settings, layers=(1,)), progress=False, **options)


def centre(labels: np.ndarray) -> np.ndarray:
    """255 outside the central square."""
    height, width = labels.shape
    side = min(height, width)
    top, left = (height - side) // 2, (width - side) // 2
    seen = np.full_like(labels, 255)
    seen[top : top + side, left : left + side] = labels[top : top + side, left : left + side]
    return seen


SEEN_PERFECTLY: tuple[ProtocolName, ...] = (
    "oracle",
    "full",
    "unsupervised",
)  # `presence` needs more tokens


@pytest.mark.parametrize("preset", ["paper", "reference", "default"])
def test_perfect_sight_scores_one(
    pipe: Any, painted: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, preset: str
) -> None:
    """Every pixel of images of all shapes arrives where it belongs, under every protocol."""
    maps = PerfectMaps()
    use_maps(monkeypatch, maps)
    settings = EvaluationSettings(SEEN_PERFECTLY, preset=preset, batch_size=2)
    report = run(pipe, painted, tmp_path / "out", settings, save_predictions=True)
    assert report.images == 4
    for protocol in SEEN_PERFECTLY:
        rates = report.rates[protocol]
        assert (
            rates.miou == rates.pixel_accuracy == rates.mean_accuracy == rates.frequency_weighted_iou == 1.0
        )
        assert all(value == 1.0 for value in rates.iou)
        assert rates.boundary_iou == (None if protocol == "unsupervised" else 1.0)
    totals = counts_in(tmp_path / "out")
    whole = [np.array(values, np.uint8) for values in LABELS.values()]
    seen = [centre(labels) if preset == "paper" else labels for labels in whole]
    counted = np.bincount(np.concatenate([labels.ravel() for labels in seen]), minlength=256)[:4]
    for protocol in ("oracle", "full"):
        assert totals[protocol].true_positive.tolist() == counted.tolist()
        assert not totals[protocol].false_positive.any()
        assert not totals[protocol].false_negative.any()
        for name, labels, part in zip(LABELS, whole, seen, strict=True):
            predicted = np.asarray(Image.open(tmp_path / "out" / "predictions" / protocol / f"{name}.png"))
            assert predicted.shape == labels.shape  # the original resolution
            assert np.array_equal(predicted[part != 255], labels[part != 255])
            if preset == "paper":
                outside = centre(np.zeros_like(labels)) == 255
                assert (predicted[outside] == 255).all()


def test_what_is_prompted(
    pipe: Any, painted: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    maps = PerfectMaps()
    use_maps(monkeypatch, maps)
    run(pipe, painted, tmp_path / "out", EvaluationSettings(PROTOCOLS, preset="default"))
    everything = "cat red sofa tree dog house"
    present = ["cat red sofa tree", "cat tree dog house", "red sofa", "cat dog house"]
    # `presence` reads what `full` has read
    assert sorted(maps.prompts) == sorted([name] for name in [*present, *[everything] * 4, *[""] * 4])


def test_pixels_counted_by_hand(
    pipe: Any, painted: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The model calls every red sofa a tree. Under "oracle" image c has nothing but sofas to choose."""
    use_maps(monkeypatch, PerfectMaps(confused={1: 2}))
    report = run(pipe, painted, tmp_path / "out", EvaluationSettings(("oracle", "full"), preset="default"))
    totals = counts_in(tmp_path / "out")
    cats, sofas_a, sofas_c, trees, houses = 6 + 1 + 1, 12, 9, 6 + 4, 3 + 6
    for name, sofas, trees_for_sofas in (("oracle", sofas_c, sofas_a), ("full", 0, sofas_a + sofas_c)):
        assert totals[name].true_positive.tolist() == [cats, sofas, trees, houses]
        assert totals[name].false_positive.tolist() == [0, 0, trees_for_sofas, 0]
        assert totals[name].false_negative.tolist() == [0, trees_for_sofas, 0, 0]
    assert report.rates["oracle"].miou == pytest.approx((1 + 9 / 21 + 10 / 22 + 1) / 4)
    assert report.rates["full"].miou == pytest.approx((1 + 0 + 10 / 31 + 1) / 4)


def test_background_by_threshold(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the image shows background, no name has any attention to speak of."""
    labels = {"a": [[0, 0, 1], [2, 2, 255]], "b": [[0, 0], [0, 0]]}
    miniature.write_folder(tmp_path / "data", ["background", "cat", "dog"], labels, painted=True)
    dataset = open_dataset("folder", tmp_path / "data")
    maps = PerfectMaps(["background", "cat", "dog"])
    use_maps(monkeypatch, maps)
    for background, prompt in (("threshold", "cat dog"), ("prompt", "background cat dog")):
        settings = EvaluationSettings(("oracle", "full"), preset="default", background=background)  # type: ignore[arg-type]
        maps.prompts.clear()
        report = run(pipe, dataset, tmp_path / background, settings)
        assert prompt in maps.prompts[0] + maps.prompts[1]
        assert report.rates["oracle"].miou == 1.0


def test_the_stray_name_counts_as_a_miss(pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The public code's quirk on COCO-Object: what goes to "background" is a miss, and accuses no class."""
    labels = {"a": [[0, 0, 1, 1], [0, 255, 1, 1]]}
    miniature.write_folder(tmp_path / "data", ["cat", "dog"], labels, painted=True)
    dataset = replace(open_dataset("folder", tmp_path / "data"), stray_name="red")
    maps = PerfectMaps(["red", "dog"])  # sees something else where the cat is
    use_maps(monkeypatch, maps)
    report = run(pipe, dataset, tmp_path / "out", EvaluationSettings(preset="reference"))
    assert maps.prompts == [["cat dog red"]]
    assert report.rates["oracle"].iou == (0.0, 1.0)
    assert report.rates["oracle"].pixel_accuracy == pytest.approx(4 / 7)


@pytest.mark.parametrize("preset", ["default", "paper", "reference"])
def test_labels_are_those_of_segment(pipe: Any, preset: str) -> None:
    """The evaluation answers as the library: with names `segment`, without `segment_unsupervised`."""
    dataset = subset(open_dataset("scenes"), limit=2)
    settings = EvaluationSettings(("full", "unsupervised"), preset=preset, layers=(1,), seed=3)
    items = [load(item, index) for index, item in enumerate(dataset.items)]
    for item, result in zip(items, Evaluator(pipe, dataset, settings).results(items), strict=True):
        assert isinstance(item, Loaded)
        image = item.image
        named = seg4diff.segment(pipe, image, dataset.classes, preset=preset, layers=(1,), seed=3)
        assert torch.equal(result.predicted["full"].long(), named.labels)
        regions = seg4diff.segment_unsupervised(pipe, image, preset=preset, layers=(1,), seed=3)
        pairs = torch.stack([result.predicted["unsupervised"].long().flatten(), regions.labels.flatten()])
        assert pairs.unique(dim=1).shape[1] == len(regions.classes)  # the same regions, numbered anew
        assert len(named.labels.unique()) > 1


@pytest.mark.parametrize("layers", ["auto", None])
def test_layers_that_are_chosen_are_those_of_segment(
    pipe: Any, monkeypatch: pytest.MonkeyPatch, layers: Literal["auto"] | None
) -> None:
    """For each image and prompt; None is `auto` for this model, of which no expert is known."""
    read: list[tuple[int, ...]] = []
    monkeypatch.setattr(
        evaluation,
        "run_scores",
        lambda *given, **options: read.append(given[4]) or run_scores(*given, **options),
    )
    dataset = subset(open_dataset("scenes"), limit=2)
    settings = EvaluationSettings(("full", "presence", "unsupervised"), "best", layers)
    evaluator = Evaluator(pipe, dataset, settings)
    assert evaluator.settings.layers == "auto"
    for index, entry in enumerate(dataset.items):
        item = load(entry, index)
        assert isinstance(item, Loaded)
        (result,) = evaluator.results([item])
        kept, found = (
            seg4diff.segment(pipe, item.image, dataset.classes, preset="best", layers="auto", absent=absent)
            for absent in ("keep", "ignore")
        )
        assert torch.equal(result.predicted["full"].long(), kept.labels)
        assert torch.equal(result.predicted["presence"].long(), found.labels)
        regions = seg4diff.segment_unsupervised(pipe, item.image, preset="best", layers="auto")
        assert torch.equal(result.predicted["unsupervised"].long(), regions.labels)
        assert read.pop() == kept.metadata["layers"]
        assert not read  # `presence` reads what `full` has read


SCENES = EvaluationSettings(("oracle", "full", "unsupervised"), preset="default", batch_size=1)


@pytest.fixture(scope="module")
def uninterrupted(pipe: Any, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, EvaluationReport]:
    out = tmp_path_factory.mktemp("uninterrupted")
    return out, run(pipe, subset(open_dataset("scenes"), limit=10), out, SCENES)


def lines_of(out: Path) -> list[str]:
    """All different lines of results that are whole, by image."""
    lines = [line for path in out.glob("results-*.jsonl") for line in path.read_text().splitlines()]
    return sorted({line for line in lines if line.endswith("}")}, key=lambda line: json.loads(line)["index"])


def test_killed_and_resumed_equals_uninterrupted(
    pipe: Any,
    uninterrupted: tuple[Path, EvaluationReport],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    """Killed while it writes the results of the second group of four images."""
    dataset = subset(open_dataset("scenes"), limit=10)
    append = jobs.Job.append
    written: list[list[int]] = []

    def killed(self: jobs.Job, entries: Iterable[Any]) -> None:
        several = list(entries)
        written.append([entry["index"] for entry in several])
        if len(written) == 1:
            append(self, several)
        if len(written) == 2:
            append(self, several[:1])
            with open(tmp_path / "results-00000.jsonl", "a") as file:
                file.write(json.dumps(several[1])[:30])
            raise KeyboardInterrupt
        append(self, several)

    monkeypatch.setattr(jobs.Job, "append", killed)
    with pytest.raises(KeyboardInterrupt):
        run(pipe, dataset, tmp_path, SCENES)
    report = run(pipe, dataset, tmp_path, SCENES)
    assert written == [[0, 1, 2, 3], [4, 5, 6, 7], [4, 5, 6, 7], [8, 9]]  # the second group again
    assert "were cut off" in caplog.text
    assert same_figures(report, uninterrupted[1])
    assert lines_of(tmp_path) == lines_of(uninterrupted[0])
    again = run(pipe, dataset, tmp_path, SCENES)
    assert again.images_per_second is None  # nothing left to do
    assert same_figures(again, report)


def counts_in(out: Path) -> dict[str, Counts]:
    """Sums over the results of four classes in a folder, by protocol."""
    return add_up(result.counts for result in read_results(out, 4).values())


def same_figures(one: EvaluationReport, other: EvaluationReport) -> bool:
    return (one.images, one.total, repr(one.rates)) == (other.images, other.total, repr(other.rates))


def test_results_of_other_settings_are_not_mixed(pipe: Any, tmp_path: Path) -> None:
    dataset = subset(open_dataset("scenes"), limit=2)
    first = run(pipe, dataset, tmp_path, EvaluationSettings(seed=1), about={"model": "one"})
    with pytest.raises(
        ValueError, match=r"other settings: model was 'one', is 'two'; seed was 1, is 2\. Give another"
    ):
        run(pipe, dataset, tmp_path, EvaluationSettings(seed=2), about={"model": "two"})
    with backend("aten"), pytest.raises(ValueError, match="attention was None, is 'aten'"):
        run(pipe, dataset, tmp_path, EvaluationSettings(seed=1), about={"model": "one"})
    with pytest.raises(ValueError, match="items was 2, is 1"):
        run(
            pipe,
            subset(dataset, limit=1),
            tmp_path,
            EvaluationSettings(seed=1),
            about={"model": "one"},
        )
    other = run(pipe, dataset, tmp_path, EvaluationSettings(seed=2), about={"model": "one"}, overwrite=True)
    assert other.settings["seed"] == 2
    assert not same_figures(first, other)
    (tmp_path / "settings.json").write_text("{")
    with pytest.raises(ValueError, match="is damaged"):
        run(pipe, dataset, tmp_path, EvaluationSettings(seed=2))
    with pytest.raises(NotADirectoryError, match="is a file"):
        run(pipe, dataset, tmp_path / "settings.json", EvaluationSettings())


def damaged_image(root: Path) -> None:
    path = root / "images" / "b.png"
    path.write_bytes(path.read_bytes()[:60])


def size_differs(root: Path) -> None:
    miniature.write_labels(root / "labels" / "b.png", [[0, 1], [0, 1]])


def value_out_of_range(root: Path) -> None:
    miniature.write_labels(root / "labels" / "b.png", [[3, 4], [3, 255], [2, 2], [2, 2], [255, 0]])


def file_vanishes(root: Path) -> None:
    (root / "labels" / "b.png").unlink()


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        (damaged_image, "b.png' is damaged or truncated"),
        (size_differs, "the image is 2 x 5, its label map 2 x 2"),
        (value_out_of_range, "b.png' holds 4, which stands for no class"),
        (file_vanishes, "b.png' is unreadable"),
    ],
    ids=lambda value: value.__name__ if callable(value) else "",
)
def test_bad_files_are_counted_and_named_and_may_be_mended(
    pipe: Any,
    painted: Dataset,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[Path], None],
    reason: str,
) -> None:
    use_maps(monkeypatch, PerfectMaps())
    settings = EvaluationSettings(("full",), preset="default")
    kept = {name: (tmp_path / "data" / name).read_bytes() for name in ("images/b.png", "labels/b.png")}
    damage(tmp_path / "data")
    report = run(pipe, painted, tmp_path / "out", settings)
    assert (report.images, report.total, len(report.failures)) == (3, 4, 1)
    assert report.failures.keys() == {"b"}
    assert reason in report.failures["b"]
    assert report.rates["full"].miou == 1.0
    found = counts_in(tmp_path / "out")["full"].true_positive.tolist()
    assert found == [7, 21, 6, 6]  # of images a, c and d alone
    for name, content in kept.items():
        (tmp_path / "data" / name).write_bytes(content)
    mended = run(pipe, painted, tmp_path / "out", settings)
    assert (mended.images, mended.failures) == (4, {})
    assert counts_in(tmp_path / "out")["full"].true_positive.tolist() == [8, 21, 10, 9]


def test_no_space_left(pipe: Any, painted: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The second prediction does not fit: the run ends with what to do, and no result claims the image."""
    use_maps(monkeypatch, PerfectMaps())
    settings = EvaluationSettings(("full",), preset="default")
    write = files.write_atomically

    def full_disk(path: Path, content: Any) -> Any:
        if path.name == "b.png":
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return write(path, content)

    monkeypatch.setattr(files, "write_atomically", full_disk)
    with pytest.raises(OSError, match="no space left for .*b.png.*run the same command again"):
        run(pipe, painted, tmp_path / "out", settings, save_predictions=True)
    assert read_results(tmp_path / "out", 4) == {}
    monkeypatch.setattr(files, "write_atomically", write)
    report = run(pipe, painted, tmp_path / "out", settings, save_predictions=True)
    assert report.rates["full"].miou == 1.0
    assert len(list((tmp_path / "out" / "predictions").rglob("*.png"))) == 4


def test_pictures_without_a_pixel_that_counts(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where only the centre is looked at, and nothing there counts."""
    labels = {"a": [[0, 0, 1]], "b": [[255, 255]], "c": [[0, 255, 1]]}
    miniature.write_folder(tmp_path / "data", ["cat", "dog"], labels, painted=True)
    use_maps(monkeypatch, PerfectMaps(["cat", "dog"]))
    report = run(
        pipe, open_dataset("folder", tmp_path / "data"), tmp_path / "out", EvaluationSettings(preset="paper")
    )
    assert (report.images, report.empty, report.failures) == (3, 2, {})
    assert report.rates["oracle"].pixel_accuracy == 1.0


def test_each_prompt_is_encoded_once_and_each_image_once_per_protocol(
    pipe: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    dataset = subset(open_dataset("scenes"), limit=6)
    encoded: list[int] = []
    prompts: list[str] = []
    handle = pipe.vae.encoder.register_forward_pre_hook(lambda _, args: encoded.append(len(args[0])))
    encode_prompt = type(pipe).encode_prompt
    monkeypatch.setattr(
        type(pipe),
        "encode_prompt",
        lambda self, prompt, **kw: prompts.extend(prompt) or encode_prompt(self, prompt, **kw),
    )
    try:
        run(pipe, dataset, tmp_path, replace(SCENES, batch_size=1))
    finally:
        handle.remove()
    assert sum(encoded) == 6 * 3
    prompts = [prompt for prompt in prompts if prompt]  # the empty one is `segment_unsupervised`'s own
    assert len(prompts) == len(set(prompts))


def test_prompts_met_long_ago_are_forgotten(pipe: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(evaluation, "_KEPT_PROMPTS", 3)
    dataset = subset(open_dataset("scenes"), limit=6)
    evaluator = Evaluator(
        pipe, dataset, EvaluationSettings(("oracle", "full"), preset="default", layers=(1,))
    )
    whole = [p.text for p in evaluator.protocols["full"].question(np.zeros((1, 1), np.uint8)).prompts]
    for index, item in enumerate(dataset.items):
        evaluator.results([load(item, index)])
        assert len(evaluator._text) <= 3
        assert whole[-1] in evaluator._text  # prompted for every image, so never forgotten


def test_versions_and_settings_are_reported(uninterrupted: tuple[Path, EvaluationReport]) -> None:
    report = uninterrupted[1]
    assert report.versions["torch"] == torch.__version__
    assert report.versions["device"].startswith("cpu")
    assert report.settings["layers"] == [1]
    assert report.settings["noise"] == {"steps": 28, "level": 8}
    assert report.settings["prompts"][0] == [report.classes[0]]
    assert json.loads((uninterrupted[0] / "settings.json").read_text()) == report.settings


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"protocols": ()}, "one or several different"),
        ({"protocols": ("oracle", "oracle")}, "one or several different"),
        ({"batch_size": 0}, "batch_size=0 must be a positive integer"),
        ({"preset": "worst"}, "preset='worst' is unknown"),
        ({"layers": (7,)}, "layer 7 is out of range"),
        ({"layers": "best"}, "layers='best' is unknown; accepted: numbers, \"auto\", None"),
    ],
)
def test_bad_settings(pipe: Any, tmp_path: Path, settings: dict[str, Any], message: str) -> None:
    dataset = subset(open_dataset("scenes"), limit=1)
    with pytest.raises(ValueError, match=message):
        evaluate(pipe, dataset, tmp_path, EvaluationSettings(**settings), progress=False)
    assert not list(tmp_path.iterdir())


def assert_same_but_for_rounding(out: Path, expected: Path) -> None:
    """The same images with the same counts, but for two pixels in a thousand.

    Weights read from a file lie at other addresses in memory than weights drawn in the process. That can
    change the last bit of a matrix product, and with it the label of a pixel.
    """
    results, wanted = read_results(out, classes=18), read_results(expected, classes=18)
    assert results.keys() == wanted.keys()
    for index, result in results.items():
        other = wanted[index]
        assert (result.name, result.group) == (other.name, other.group)
        assert (result.counts.keys(), result.boundary.keys()) == (other.counts.keys(), other.boundary.keys())
        assert result.counts
        for ours, theirs in zip(counted(result), counted(other), strict=True):
            assert (ours - theirs).abs().sum() <= 0.004 * theirs.sum()


def counted(result: Result) -> list[torch.Tensor]:
    tables = (*result.counts.values(), *result.boundary.values())
    return [torch.stack(astuple(counts)) for counts in tables]


@pytest.mark.slow
def test_two_processes_equal_one(
    pipe: Any, uninterrupted: tuple[Path, EvaluationReport], tmp_path: Path
) -> None:
    """Through `accelerate launch` and the command line; each image is evaluated by one of the two."""
    pipe.save_pretrained(tmp_path / "model")
    launch = "--multi_gpu --num_processes 2 --num_machines 1 --mixed_precision no --dynamo_backend no"
    command = f"evaluate --dataset scenes --limit 10 --protocol {' '.join(SCENES.protocols)} --preset default"
    folders = ["--model", str(tmp_path / "model"), "--out", str(tmp_path / "out")]
    launcher = [sys.executable, "-m", "accelerate.commands.launch"]
    done = subprocess.run(
        [*launcher, *launch.split(), "-m", "seg4diff", *command.split(), "--layers", "1", *folders],
        cwd=tmp_path,
        env={
            **os.environ,
            "OMP_NUM_THREADS": "1",
            "PYTHONPATH": str(ROOT),
            "TOKENIZERS_PARALLELISM": "false",
        },
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    out = tmp_path / "out" / "scenes"
    files = sorted(out.glob("results-*.jsonl"))
    assert [path.name for path in files] == ["results-00000.jsonl", "results-00001.jsonl"]
    indices = [[json.loads(line)["index"] for line in path.read_text().splitlines()] for path in files]
    assert indices == [[0, 1, 2, 3, 8, 9], [4, 5, 6, 7]]
    assert_same_but_for_rounding(out, uninterrupted[0])
    report = json.loads((out / "report.json").read_text())
    assert report["processes"] == 2
    assert report["images"] == 10
    for protocol, rates in uninterrupted[1].rates.items():
        assert report["rates"][protocol]["miou"] == pytest.approx(rates.miou, rel=0.01)
    assert (out / "contact-sheet.png").is_file()


def test_pictures_may_have_names_of_their_own(
    pipe: Any, painted: Dataset, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = [replace(item, prompts={2: ("dog",)}) if item.name == "b" else item for item in painted.items]
    maps = PerfectMaps(["cat", "red sofa", "dog", "dog house"])
    use_maps(monkeypatch, maps)
    run(pipe, replace(painted, items=tuple(own[:2])), tmp_path / "out", EvaluationSettings(preset="default"))
    assert sorted(maps.prompts) == [["cat dog dog house"], ["cat red sofa tree"]]
