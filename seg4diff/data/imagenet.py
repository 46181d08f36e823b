"""ImageNet-Segmentation (Guillaumin et al., IJCV 2014): one object per image, named by its WordNet id."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seg4diff.data.items import Item, Items
from seg4diff.data.label_maps import look_up, value_table
from seg4diff.data.paths import require
from seg4diff.files import checked_name

_FILE, _WORDS = "gtsegs_ijcv.mat", "words.txt"
_DOWNLOAD = (
    "Get gtsegs_ijcv.mat from http://calvin-vision.net/bigstuff/proj-imagenet/data/gtsegs_ijcv.mat, and "
    "words.txt of ImageNet (lines of WordNet id and names; LOC_synset_mapping.txt under that name will do), "
    "and put both in the data root."
)


def read_imagenet(dataset: str, root: Path, classes: tuple[str, ...]) -> tuple[Items, str]:
    """The images of `gtsegs_ijcv.mat`; each item names its object in its prompts. A `Reader`.

    Raises:
        ModuleNotFoundError: h5py is not installed.
    """
    require(dataset, root, [_FILE, _WORDS], _DOWNLOAD)
    path = root / _FILE
    words = _read_words(root / _WORDS)
    with _open(path) as file:
        try:
            identities = [_text(file, reference) for reference in file["/value/id"][:, 0]]
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is not a gtsegs_ijcv.mat ({error})") from error
    for index, identity in enumerate(identities):
        checked_name(identity, f"{str(path)!r}")
        if _synset(identity) not in words:
            raise ValueError(
                f"{str(root / _WORDS)!r} has no line for {_synset(identity)!r}, the object of image {index}"
            )

    def make(name: str) -> Item:
        number, _, identity = name.partition("_")
        return Item(
            name,
            partial(_image, path, int(number)),
            partial(_labels, path, int(number)),
            classes=classes,
            prompts={1: (words[_synset(identity)],)},
            files=(path, root / _WORDS),
        )

    return Items([f"{index:05d}_{identity}" for index, identity in enumerate(identities)], make), _FILE


def _synset(identity: str) -> str:
    """The WordNet id that an image's name begins with."""
    return identity.split("_")[0]


def _open(path: Path) -> Any:
    try:
        import h5py
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("ImageNet-Segmentation needs h5py: pip install 'seg4diff[eval]'") from error
    try:
        return h5py.File(path, "r")
    except OSError as error:
        raise ValueError(f"{str(path)!r} is damaged ({error}); get a whole copy of it") from error


def _text(file: Any, reference: Any) -> str:
    """A string of MATLAB: character codes of 16 bits."""
    return "".join(chr(code) for code in np.asarray(file[reference]).ravel().tolist()).strip()


def _image(path: Path, index: int) -> Image.Image:
    with _open(path) as file:
        pixels = np.asarray(file[file["/value/img"][index, 0]])  # [3, width, height], as MATLAB stores it
    return Image.fromarray(np.ascontiguousarray(pixels.transpose(2, 1, 0)))


def _labels(path: Path, index: int) -> np.ndarray:
    with _open(path) as file:
        values = np.asarray(file[file[file["/value/gt"][index, 0]][0, 0]]).T  # stored as [width, height]
    return look_up(values.astype(np.int64), value_table({0: 0, 1: 1}), f"image {index} of {str(path)!r}")


def _read_words(path: Path) -> dict[str, str]:
    """The first name of each WordNet id."""
    words = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        identity, *rest = line.split(maxsplit=1)[:2] if line.strip() else [""]
        if rest:
            words[identity] = rest[0].split(",")[0].strip()
    return words
