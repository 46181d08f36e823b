"""ImageNet-Segmentation (Guillaumin et al., IJCV 2014): one object a picture, named by its WordNet id."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from seg4diff.data.layout import Sample, look_up, require, value_table

_FILE, _WORDS = "gtsegs_ijcv.mat", "words.txt"
_DOWNLOAD = (
    "Get gtsegs_ijcv.mat from http://calvin-vision.net/bigstuff/proj-imagenet/data/gtsegs_ijcv.mat, and "
    "words.txt of ImageNet (lines of WordNet id and names; LOC_synset_mapping.txt under that name will do), "
    "and put both in the data root."
)


def read_imagenet(root: Path) -> tuple[tuple[Sample, ...], str]:
    """The pictures of ``gtsegs_ijcv.mat``: class 0 is background, class 1 the object that the sample's names
    name.

    Returns:
        The samples, and what their labels are.

    Raises:
        IncompleteDatasetError: a file is missing.
        ModuleNotFoundError: h5py is not installed.
        ValueError: the file is damaged, or names an object that ``words.txt`` lacks.
    """
    require("imagenet-seg", root, [_FILE, _WORDS], _DOWNLOAD)
    path = root / _FILE
    words = _read_words(root / _WORDS)
    samples = []
    with _open(path) as file:
        try:
            identities = [_text(file, reference) for reference in file["/value/id"][:, 0]]
        except (KeyError, ValueError, TypeError) as error:
            raise ValueError(f"{str(path)!r} is no gtsegs_ijcv.mat ({error})") from error
    for index, identity in enumerate(identities):
        synset = identity.split("_")[0]
        if synset not in words:
            raise ValueError(
                f"{str(root / _WORDS)!r} has no line for {synset!r}, the object of picture {index}"
            )
        samples.append(
            Sample(
                f"{index:05d}_{identity}",
                partial(_image, path, index),
                partial(_labels, path, index),
                {1: (words[synset],)},
                (path, root / _WORDS),
            )
        )
    return tuple(samples), _FILE


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
    return look_up(values.astype(np.int64), value_table({0: 0, 1: 1}), f"picture {index} of {str(path)!r}")


def _read_words(path: Path) -> dict[str, str]:
    """The first name of each WordNet id."""
    words = {}
    for line in path.read_text(encoding="utf-8").splitlines():
        identity, *rest = line.split(maxsplit=1)[:2] if line.strip() else [""]
        if rest:
            words[identity] = rest[0].split(",")[0].strip()
    return words
