"""Which images, masks and captions a training run reads."""

from __future__ import annotations

from typing import Literal

from pydantic.dataclasses import dataclass

from seg4diff.settings import CHECKED, Count, Share, Whole


@dataclass(frozen=True, config=CHECKED)
class DataSettings:
    """Pictures, masks and captions.

    Attributes:
        kind: ``"folder"``, ``"coco"``, ``"sa1b"`` or ``"demo"``; see :mod:`seg4diff.data.training_sets`.
        images: folder of the pictures.
        masks: COCO: the panoptic or stuff JSON. Others: none, masks lie beside the pictures.
        captions: COCO's captions JSON, or a JSON of picture name -> caption(s) as ``seg4diff caption``
            writes.
        resolution: side in pixels of the square that pictures are resized to, once.
        geometry: the central square (``"crop"``), or the whole picture regardless of its aspect
            (``"squash"``).
        text: train on ``"captions"``, or on the joined names of the classes present (``"classes"``).
        caption_dropout: share of the samples that see an empty prompt, and no mask loss.
        held_out: share of the pictures kept aside to choose the best checkpoint.
        held_out_limit: most pictures kept aside.
        limit: use this many pictures only; 0 for all.
        cache: folder for encoded pictures and captions; empty for ``cache`` in the run's folder.
        shard: pictures in one file of the cache.
        workers: processes that read ahead.
        scenes: of the demo scenes, how many, from seed ``first_scene`` on.
        first_scene: see ``scenes``.
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
