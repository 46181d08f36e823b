"""The names of data sets and vocabularies; importing this module imports nothing heavy."""

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

VocabularyName = Literal["coco", "ade20k", "lvis", "wordnet"]
"""The built-in vocabularies, see `seg4diff.data.vocabularies.read_vocabulary`."""
