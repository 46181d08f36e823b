"""The names of the data sets, apart from their readers: importing this module imports nothing heavy."""

from typing import Literal

DatasetName = Literal[
    "voc20",
    "voc21",
    "pc59",
    "pc60",
    "coco-object",
    "coco-object-bg",
    "coco-stuff27",
    "coco-stuff171",
    "ade150",
    "cityscapes19",
    "imagenet-seg",
    "folder",
    "scenes",
    "scenes-hard",
]
