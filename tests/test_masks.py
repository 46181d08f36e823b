"""Masks in COCO's formats: what pycocotools makes of good ones, and bad ones that it does not survive."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from pycocotools import mask as coco_masks

from seg4diff.masks import decode_mask
from seg4diff.training.data.cache import areas, decode_masks
from tests.support import miniature

ROOT = Path(__file__).parents[1]
HEIGHT, WIDTH = 30, 40


def compressed(mask: np.ndarray) -> dict[str, Any]:
    found = coco_masks.encode(np.asfortranarray(mask.astype(np.uint8)))
    return {"size": found["size"], "counts": found["counts"].decode()}


def random_masks() -> list[np.ndarray]:
    """From speckles to large areas, with and without the first and last pixel."""
    generator = np.random.default_rng(0)
    masks = [generator.random((HEIGHT, WIDTH)) < share for share in (0, 0.01, 0.5, 0.99, 1)]
    wide = np.zeros((900, 1100), bool)  # runs of more than 15 bits
    wide[10:, 200:900] = True
    wide[17, 300] = False
    return [*masks, wide, ~wide]


@pytest.mark.parametrize("number", range(7))
def test_run_lengths(number: int) -> None:
    mask = random_masks()[number]
    encoded = compressed(mask)
    runs = np.diff(np.flatnonzero(np.diff(np.r_[~mask.T.ravel()[:1], mask.T.ravel()])), append=mask.size)
    runs = runs.tolist() if not mask[0, 0] else [0, *runs.tolist()]
    plain = {"size": list(mask.shape), "counts": runs}
    for segmentation in (encoded, {**encoded, "counts": encoded["counts"].encode()}, plain):
        found = decode_mask(segmentation, *mask.shape)
        assert found.dtype == bool
        assert np.array_equal(found, mask)


@pytest.mark.parametrize(
    "polygons",
    [
        [[1, 1, 3, 1, 3, 3, 1, 3]],
        [[0.0, 0.0, 40.5, 0.0, 40.5, 30.5, 0.0, 30.5]],  # half a pixel outside, as COCO has them
        [[2.5, 3.1, 20.2, 5.9, 11.0, 27.3], [30, 20, 39, 20, 35, 29, 31, 28]],
    ],
)
def test_polygons(polygons: list[list[float]]) -> None:
    expected = coco_masks.decode(coco_masks.merge(coco_masks.frPyObjects(polygons, HEIGHT, WIDTH)))
    found = decode_mask(polygons, HEIGHT, WIDTH)
    assert found.any()
    assert np.array_equal(found, expected.astype(bool))


def test_masks_of_a_cache() -> None:
    masks = random_masks()[1:3]
    encoded = [compressed(mask) for mask in masks]
    assert areas(encoded) == [mask.mean() for mask in masks]
    assert np.array_equal(decode_masks(encoded).numpy(), np.stack(masks))


GOOD = compressed(random_masks()[2])
SIZE = [HEIGHT, WIDTH]
SQUARE = [1, 1, 9, 1, 9, 9, 1, 9]
HOSTILE: dict[str, Any] = {
    "other size": {"size": [100_000, 100_000], "counts": [0, 10]},
    "swapped size": {"size": [WIDTH, HEIGHT], "counts": [0, 1200]},
    "negative size": {"size": [-30, -40], "counts": [0, 1200]},
    "no size": {"counts": [0, 1200]},
    "text for size": {"size": "30", "counts": [0, 1200]},
    "too short": {"size": SIZE, "counts": [100, 100]},
    "too long": {"size": SIZE, "counts": [100, 2000]},
    "much too long": {"size": SIZE, "counts": [0, 2**31]},
    "wraps around": {"size": SIZE, "counts": [0, 2**32 + 1200]},
    "negative": {"size": SIZE, "counts": [1300, -100]},
    "huge": {"size": SIZE, "counts": [10**30, -(10**30)]},
    "fractions": {"size": SIZE, "counts": [600.5, 599.5]},
    "true": {"size": SIZE, "counts": [1199, True]},
    "empty": {"size": SIZE, "counts": []},
    "nested": {"size": SIZE, "counts": [[0, 1200]]},
    "compressed of another size": {"size": [3000, 4000], "counts": GOOD["counts"]},
    "compressed too short": {"size": SIZE, "counts": GOOD["counts"][:100]},
    "compressed too long": {"size": SIZE, "counts": GOOD["counts"] * 2},
    "compressed cut off": {"size": SIZE, "counts": "PPPo"},
    "compressed number too large": {"size": SIZE, "counts": "o" * 40 + "1"},
    "compressed negative": {"size": SIZE, "counts": "O" * 8},
    "compressed sum wraps": {"size": SIZE, "counts": "ooooo3ooooo3"},
    "compressed empty": {"size": SIZE, "counts": ""},
    "other letters": {"size": SIZE, "counts": "\u732b~\x00"},
    "polygon far outside": [[0, 0, 1e9, 0, 1e9, 1e9]],
    "polygon too far outside": [[0, 0, 1e300, 0, 1e300, 1e300]],
    "whole polygon far outside": [[1e9, 1e9, 1e9 + 9, 1e9, 1e9, 1e9 + 9]],
    "integers far outside": [[0, 0, 10**400, 0, 9, 9]],
    "negative polygon": [[-1e9, -1e9, 9, 9, 0, 9]],
    "infinite": [[0, 0, float("inf"), 0, 9, 9]],
    "not a number": [[0, 0, float("nan"), 0, 9, 9]],
    "zigzag": [[0, 0, 40, 30] * 100_000],
    "many points": [[5, 5] * 100_000],
    "two points": [[1, 1, 9, 9]],
    "odd": [[*SQUARE, 3]],
    "one bad of two": [SQUARE, [0, 0, 1e9, 0, 1e9, 1e9]],
    "no polygon": [],
    "empty polygon": [[]],
    "numbers": SQUARE,
    "texts": [["1"] * 8],
    "objects": [{"size": SIZE, "counts": [0, 10]}],
    "nothing": None,
    "text": "mask",
}

ATTEMPT = """
import json, sys
from pathlib import Path
from seg4diff.data.registry import open_dataset
from seg4diff.training.data.cache import decode_masks

for line in sys.stdin:
    name, mask = json.loads(line)
    root = Path(sys.argv[1])
    def evaluation():
        document = {
            "images": [{"id": 1, "file_name": "1.jpg", "height": 30, "width": 40}],
            "annotations": [{"id": 1, "image_id": 1, "category_id": 1, "segmentation": mask}],
        }
        (root / "coco/annotations/instances_val2017.json").write_text(json.dumps(document))
        return open_dataset("coco-object-bg", root, partial=True).items[0].labels()
    def training():
        (root / "sa1b/1.json").write_text(json.dumps({"annotations": [{"segmentation": mask}]}))
        return open_dataset("sa1b", root / "sa1b").items[0].masks(30, 40)
    outcomes = []
    for attempt in (evaluation, training, lambda: decode_masks([mask])):
        try:
            outcomes.append("accepted" if attempt() is not None else "")
        except ValueError:
            outcomes.append("refused")
        except Exception as error:
            outcomes.append(repr(error))
    print(json.dumps([name, outcomes]), flush=True)
"""


def test_hostile_masks_are_refused_and_end_nothing(tmp_path: Path) -> None:
    """In one process of its own: what slips through writes beyond its memory, and ends it."""
    miniature.write_image(tmp_path / "coco" / "val2017" / "1.jpg", HEIGHT, WIDTH)
    (tmp_path / "coco" / "annotations").mkdir()
    miniature.write_image(tmp_path / "sa1b" / "1.jpg", HEIGHT, WIDTH)
    lines = "".join(f"{json.dumps([name, mask])}\n" for name, mask in [*HOSTILE.items(), ("good", GOOD)])
    run = subprocess.run(
        [sys.executable, "-c", ATTEMPT, str(tmp_path)], input=lines, capture_output=True, text=True, cwd=ROOT
    )
    assert run.returncode == 0, run.stdout[-500:] + run.stderr[-2000:]
    outcomes = dict(map(json.loads, run.stdout.splitlines()))
    assert outcomes.pop("good") == ["accepted"] * 3
    wrong = {name: found for name, found in outcomes.items() if found[:2] != ["refused"] * 2}
    assert wrong == {}
    assert outcomes.keys() == HOSTILE.keys()
    stored = {name: found[2] for name, found in outcomes.items() if isinstance(HOSTILE[name], dict)}
    assert {name for name, found in stored.items() if found == "accepted"} == {"swapped size"}


def test_annotations_of_another_image(tmp_path: Path) -> None:
    """A size that the annotations claim is compared with the image, before that much memory is taken."""
    from seg4diff.data.registry import open_dataset

    miniature.write_coco(tmp_path, pixel_maps=False, instances=True)
    path = tmp_path / "coco" / "annotations" / "instances_val2017.json"
    document = json.loads(path.read_text())
    document["images"][0]["height"] = document["images"][0]["width"] = 10_000_000
    path.write_text(json.dumps(document))
    with pytest.raises(ValueError, match=r"000000000285: 6 x 4, its annotations 10000000 x 10000000"):
        open_dataset("coco-object", tmp_path, partial=True).items[1].labels()
