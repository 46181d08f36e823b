"""The built-in vocabularies and files of names."""

from __future__ import annotations

from pathlib import Path
from typing import get_args

import pytest

from seg4diff.data import vocabularies
from seg4diff.data.names import VocabularyName
from seg4diff.data.vocabularies import read_vocabulary
from seg4diff.segmentation.prompts import checked_names


def test_built_in_vocabularies() -> None:
    sizes = {name: len(checked_names(read_vocabulary(name))) for name in get_args(VocabularyName)}
    assert sizes == {"coco": 171, "ade20k": 150, "lvis": 1198, "wordnet": 4424}
    assert read_vocabulary("wordnet")[:3] == ("person", "man", "location")  # by frequency
    assert {"aerosol can", "bat", "computer monitor", "zucchini"} <= set(read_vocabulary("lvis"))
    assert {"traffic light", "brick wall", "door"} <= set(read_vocabulary("coco"))
    for name in get_args(VocabularyName):
        assert not [word for word in read_vocabulary(name) if {"_", "("} & set(word)]


def test_sources_and_licences_come_along() -> None:
    folder = Path(vocabularies.__file__).parent
    notice = (folder / "NOTICE.txt").read_text(encoding="utf-8")
    for file in {path.name for path in folder.glob("*.txt")} - {"NOTICE.txt"}:
        assert f"\n{file}\n" in notice
    assert "WordNet 3.0 Copyright 2006 by Princeton University" in notice
    assert "Creative Commons Attribution 4.0" in notice
    assert sum(path.stat().st_size for path in folder.glob("*.txt")) < 100_000


def test_files_of_names(tmp_path: Path) -> None:
    path = tmp_path / "names.txt"
    path.write_text("red sofa \n\n Käfig\n", encoding="utf-8")
    assert read_vocabulary(path) == read_vocabulary(str(path)) == ("red sofa", "Käfig")
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"names.txt' is not UTF-8 text .* save it as such"):
        read_vocabulary(path)
    with pytest.raises(ValueError, match=r"absent.txt' is neither 'coco', .* give one of them"):
        read_vocabulary(tmp_path / "absent.txt")
