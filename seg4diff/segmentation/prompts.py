"""Prompts made of class names, and the text columns of each name's tokens."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from seg4diff.backbones.text import TextSpan


@dataclass(frozen=True)
class PlannedPrompt:
    """One prompt made of names.

    Attributes:
        text: the text that the text encoders get.
        columns: for each of its names, the text columns of its tokens.
    """

    text: str
    columns: tuple[tuple[int, ...], ...]


def plan_prompts(
    names: Sequence[str], span: TextSpan, *, cut_at_hyphen: bool = False
) -> tuple[PlannedPrompt, ...]:
    """Spread names, in order, over as few prompts as the text encoder's length allows.

    Args:
        names: the class names.
        span: the text encoder whose tokens are read.
        cut_at_hyphen: whether `"wall-brick"` enters the prompt as `"wall"`.

    Raises:
        ValueError: a name has no tokens, or more than one prompt holds.
    """
    room = span.room
    groups: list[list[str]] = []
    used = room
    for name in names:
        spoken = name.split("-")[0].strip() or name if cut_at_hyphen else name
        count = span.token_count(spoken)
        if count == 0:
            raise ValueError(f"class name {name!r} has no tokens; use a name made of letters or digits")
        if count > room:
            raise ValueError(f"class name {name!r} has {count} tokens, but a prompt holds {room}; shorten it")
        if used + count > room:
            groups.append([])
            used = 0
        groups[-1].append(spoken)
        used += count
    return tuple(_plan(group, span) for group in groups)


def _plan(group: Sequence[str], span: TextSpan) -> PlannedPrompt:
    text = " ".join(group)
    offsets = span.offsets(text)
    columns = []
    start = 0
    for name in group:
        found = [column for column, first, last in offsets if first < start + len(name) and last > start]
        if not found:
            raise ValueError(f"class name {name!r} has no tokens of its own in the prompt {text!r}")
        columns.append(tuple(found))
        start += len(name) + 1
    return PlannedPrompt(text, tuple(columns))


def names_for_each(classes: Sequence[str] | Sequence[Sequence[str]], images: int) -> list[tuple[str, ...]]:
    """The checked names of every image, from one list of names for all or one list per image.

    Raises:
        ValueError: no names, blank or repeated ones, or another number of lists than of images.
    """
    if isinstance(classes, str):
        raise ValueError(f"classes={classes!r} is one string; give a list of names, such as [{classes!r}]")
    given = list(classes)
    if not given:
        raise ValueError("classes is empty; name at least one thing to look for")
    if all(isinstance(name, str) for name in given):
        return [checked_names(given)] * images  # type: ignore[arg-type]
    if any(isinstance(name, str) for name in given):
        raise ValueError("classes mixes names and lists of names; give one list, or one list for each image")
    if len(given) != images:
        raise ValueError(f"classes holds {len(given)} lists of names for {images} images")
    return [checked_names(list(names)) for names in given]


def checked_names(names: Sequence[str]) -> tuple[str, ...]:
    """Names without surrounding white space.

    Raises:
        ValueError: there are none, or one is not a string, blank, or the same as another but for case.
    """
    if not names:
        raise ValueError("an image's list of classes is empty; name at least one thing to look for")
    seen: dict[str, str] = {}
    for name in names:
        if not isinstance(name, str):
            raise ValueError(f"class name {name!r} is not a string")
        if not name.strip():
            raise ValueError(f"class name {name!r} is blank")
        same = seen.get(name.strip().casefold())
        if same is not None:
            raise ValueError(
                f"class names {same!r} and {name!r} are the same to the model; name each class once"
            )
        seen[name.strip().casefold()] = name
    return tuple(name.strip() for name in names)
