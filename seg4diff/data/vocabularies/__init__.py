"""Lists of names to search an image for. NOTICE.txt has sources and licences of the built-in ones."""

from __future__ import annotations

import os
from importlib.resources import files
from pathlib import Path
from typing import get_args

from seg4diff.data.class_names import ADE20K, BETTER, COCO_STUFF, COCO_THINGS
from seg4diff.data.names import VocabularyName


def read_vocabulary(source: VocabularyName | str | os.PathLike[str]) -> tuple[str, ...]:
    """The names of a vocabulary.

    Args:
        source: `"coco"`: 80 things and 91 kinds of stuff, by names that can be prompted. `"ade20k"`: 150.
            `"lvis"`: 1,198 things. `"wordnet"`: 4,424 nouns, most frequent first. Or a text file (UTF-8) with
            one name per line; blank lines are skipped.

    Raises:
        ValueError: there is neither such a vocabulary nor such a file, or the file is not UTF-8 text.
    """
    if source == "coco":
        return tuple(dict.fromkeys((*COCO_THINGS, *(BETTER.get(name, (name,))[0] for name in COCO_STUFF))))
    if source == "ade20k":
        return ADE20K
    if source in get_args(VocabularyName):
        return _names(files(__name__).joinpath(f"{source}.txt").read_text(encoding="utf-8"))
    try:
        return _names(Path(source).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(f"vocabulary {str(source)!r} is not UTF-8 text ({error}); save it as such") from None
    except OSError as error:
        accepted = ", ".join(map(repr, get_args(VocabularyName)))
        raise ValueError(
            f"vocabulary={str(source)!r} is neither {accepted}, nor a text file of one name per line "
            f"({error.strerror}); give one of them, or a list of names"
        ) from None


def _names(text: str) -> tuple[str, ...]:
    return tuple(line.strip() for line in text.splitlines() if line.strip())
