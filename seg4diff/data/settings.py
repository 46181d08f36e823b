"""Which images, masks and captions a training run reads."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from seg4diff.settings import CHECKED, Count, Share, Whole


@dataclass(frozen=True, config=CHECKED)
class DataSettings:
    """Images, masks and captions.

    Attributes:
        kind: `"folder"`, `"coco"`, `"sa1b"` or `"demo"` (drawn scenes); docs/data.md describes their files.
        images: the folder of the data set; of COCO the folder of the images.
        masks: COCO's panoptic, stuff or instances JSON; unused by the other kinds.
        captions: COCO's captions JSON, or a JSON of image name -> caption(s) as `seg4diff caption` writes.
        resolution: side in pixels of the square that images are resized to, once.
        geometry: the central square (`"crop"`), or the whole image regardless of its aspect (`"squash"`).
        text: train on `"captions"`, or on the joined names of the classes present (`"classes"`).
        caption_dropout: share of the samples that see an empty prompt, and no mask loss.
        held_out: share of the images kept aside to choose the best checkpoint.
        held_out_limit: largest number of images kept aside.
        limit: use this many images only; 0 for all.
        cache: folder for encoded images and captions; empty for `cache` in the run's folder.
        shard: images per file of the cache.
        workers: processes that read ahead.
        scenes: number of demo scenes, from seed `first_scene` on.
        first_scene: see `scenes`.
    """

    kind: Literal["folder", "coco", "sa1b", "demo"] = "folder"
    images: str = ""
    masks: str = ""
    captions: str = ""
    resolution: Count = 1024
    geometry: Literal["crop", "squash"] = "crop"
    text: Literal["captions", "classes"] = "captions"
    caption_dropout: Share = 0.1
    held_out: Share = 0.02
    held_out_limit: Whole = 64
    limit: Whole = 0
    cache: str = ""
    shard: Count = 64
    workers: Whole = 0
    scenes: Count = 512
    first_scene: Whole = 5_000_000
