"""Captioned images drawn by rule: things in front of stuff, with a label for every pixel.

A scene is 128 x 128 pixels: a ground of one or two stuff classes (grass, water, ...) and one to four things
(apple, zebra, ...) that do not overlap. Every outline is a signed distance field in pixels, positive inside:
the image takes its soft edge (`_blend`), the labels its sign. `scene(seed)` depends on the seed alone, and so
does its hard version, `scene(seed, "hard")`: the same labels, and an image that is difficult to read.
`scene(seed, "touching")` is another scene, of several things of one class that touch.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

import numpy as np
from numpy.typing import NDArray
from PIL import Image
from scipy.ndimage import gaussian_filter

__all__ = ["CLASSES", "HELD_OUT", "SIZE", "STUFF", "THINGS", "Conditions", "Scene", "describe", "scene"]

Conditions = Literal["clean", "hard", "touching"]
"""`"clean"`: things apart from each other, as they are drawn. `"hard"`: in other hues and light, with
shadows, texture, blur and noise. `"touching"`: two or three things of one class in contact."""

SIZE = 128
"""Width and height of a scene in pixels."""

HELD_OUT = 10_000_000
"""Seeds from here up are for evaluation; training draws none of them."""

Array = NDArray[np.floating[Any]]
Colour = tuple[int, int, int]
Drawing = tuple[Array, Array]
"""Signed distance in pixels [h, w], positive inside, and colour [h, w, 3] in 0..255."""


@dataclass(frozen=True)
class Scene:
    """An image and what is in it.

    image:     RGB, 128 x 128.
    labels:    [height, width] int64, indices into `classes`; every pixel has one.
    classes:   the names present, each at least once in `labels`, in the order of `CLASSES`.
    caption:   one English sentence that names them all.
    instances: [height, width] int64, a number from 0 for each thing, -1 for the ground.
    """

    image: Image.Image
    labels: NDArray[np.int64]
    classes: tuple[str, ...]
    caption: str
    instances: NDArray[np.int64]


@dataclass(frozen=True)
class _Thing:
    """A thing to draw: class, centre and radius in pixels, tilt in radians, -1 to mirror it, brightness."""

    name: str
    cx: float
    cy: float
    radius: float
    angle: float
    mirror: float
    brightness: float


# ----------------------------------------------------------------------------------------------------
# Drawing: coordinates are pixels relative to the centre of the thing, x to the right and y downwards.


def _fill(colour: Colour, like: Array) -> Array:
    return np.broadcast_to(np.asarray(colour, np.float32), (*like.shape, 3)).copy()


def _blend(below: Array, colour: Array | Colour, distance: Array, softness: float = 1.0) -> Array:
    """`colour` over `below` [h, w, 3] where `distance` [h, w] is positive, with an edge of `softness`."""
    alpha = np.clip(distance / softness + 0.5, 0.0, 1.0)[..., None]
    return below + (np.asarray(colour, np.float32) - below) * alpha


def _circle(x: Array, y: Array, cx: float, cy: float, radius: float) -> Array:
    return radius - np.hypot(x - cx, y - cy)


def _ellipse(x: Array, y: Array, cx: float, cy: float, rx: float, ry: float) -> Array:
    return (1.0 - np.hypot((x - cx) / rx, (y - cy) / ry)) * min(rx, ry)


def _box(x: Array, y: Array, cx: float, cy: float, half_width: float, half_height: float) -> Array:
    return np.minimum(half_width - np.abs(x - cx), half_height - np.abs(y - cy))


def _polygon(x: Array, y: Array, corners: list[tuple[float, float]]) -> Array:
    """Exact signed distance to a simple polygon."""
    a = np.asarray(corners, np.float32)
    b = np.roll(a, -1, axis=0)
    edge = b - a
    px, py = x[..., None] - a[:, 0], y[..., None] - a[:, 1]  # [h, w, corners]
    along = np.clip((px * edge[:, 0] + py * edge[:, 1]) / (edge**2).sum(1), 0.0, 1.0)
    away = np.hypot(px - along * edge[:, 0], py - along * edge[:, 1]).min(-1)
    above, below = y[..., None] >= a[:, 1], y[..., None] < b[:, 1]
    side = edge[:, 0] * py - edge[:, 1] * px > 0
    crossings = ((above & below & side) | (~above & ~below & ~side)).sum(-1)
    return np.where(crossings % 2 == 1, away, -away).astype(np.float32)


def _shaded(colour: Colour, x: Array, y: Array, radius: float, strength: float = 0.35) -> Array:
    """A round body lit from the upper left."""
    light = 1.0 - strength * np.clip(np.hypot(x + 0.4 * radius, y + 0.4 * radius) / radius - 0.3, 0.0, 1.4)
    return _fill(colour, x) * light[..., None]


# ----------------------------------------------------------------------------------------------------
# Things: (x, y, radius in pixels) -> Drawing


def _apple(x: Array, y: Array, r: float) -> Drawing:
    body = np.maximum(_circle(x, y, -0.3 * r, 0.08 * r, 0.64 * r), _circle(x, y, 0.3 * r, 0.08 * r, 0.64 * r))
    leaf = _ellipse(x, y, 0.3 * r, -0.68 * r, 0.3 * r, 0.17 * r)
    stem = _box(x, y, 0.0, -0.6 * r, 0.08 * r, 0.28 * r)
    colour = _blend(_shaded((224, 30, 36), x, y, r), (92, 60, 34), stem)
    return np.maximum(np.maximum(body, leaf), stem), _blend(colour, (88, 190, 60), leaf)


def _pumpkin(x: Array, y: Array, r: float) -> Drawing:
    body = np.maximum(
        _ellipse(x, y, 0.0, 0.12 * r, 0.55 * r, 0.76 * r),
        np.maximum(
            _ellipse(x, y, -0.46 * r, 0.12 * r, 0.52 * r, 0.7 * r),
            _ellipse(x, y, 0.46 * r, 0.12 * r, 0.52 * r, 0.7 * r),
        ),
    )
    ribs = 0.85 + 0.15 * np.cos(x / r * 9.0)
    stem = _box(x, y, 0.0, -0.74 * r, 0.14 * r, 0.2 * r)
    colour = _fill((250, 128, 16), x) * ribs[..., None]
    return np.maximum(body, stem), _blend(colour, (70, 110, 40), stem)


def _heart(x: Array, y: Array, r: float) -> Drawing:
    turn = np.linspace(0.0, 2.0 * np.pi, 25)[:-1]
    across = 16.0 * np.sin(turn) ** 3
    down = -(13.0 * np.cos(turn) - 5.0 * np.cos(2 * turn) - 2.0 * np.cos(3 * turn) - np.cos(4 * turn))
    scale = r / 16.5
    corners = list(zip(across * scale, (down - 2.0) * scale, strict=True))
    return _polygon(x, y, corners), _fill((255, 84, 168), x)


def _star(x: Array, y: Array, r: float) -> Drawing:
    turn = np.arange(10) * np.pi / 5.0
    reach = np.where(np.arange(10) % 2 == 0, 1.08, 0.6) * r
    distance = _polygon(x, y, list(zip(reach * np.sin(turn), -reach * np.cos(turn), strict=True)))
    return distance, _blend(_fill((206, 150, 0), x), (255, 232, 40), distance - 0.13 * r)


def _moon(x: Array, y: Array, r: float) -> Drawing:
    distance = np.minimum(_circle(x, y, 0.0, 0.0, r), -_circle(x, y, 0.78 * r, -0.28 * r, 0.74 * r))
    colour = _fill((176, 178, 196), x)
    for cx, cy, size in ((-0.55, -0.2, 0.17), (-0.3, 0.45, 0.2), (-0.22, -0.62, 0.12)):
        colour = _blend(colour, (126, 128, 150), _circle(x, y, cx * r, cy * r, size * r), 2.0)
    return distance, colour


def _plum(x: Array, y: Array, r: float) -> Drawing:
    colour = _shaded((128, 32, 140), x, y, r)
    colour = _blend(colour, (206, 130, 214), _ellipse(x, y, -0.34 * r, -0.36 * r, 0.24 * r, 0.15 * r), 3.0)
    return _ellipse(x, y, 0.0, 0.0, 0.84 * r, 0.95 * r), colour


def _blue_ball(x: Array, y: Array, r: float) -> Drawing:
    return _circle(x, y, 0.0, 0.0, 0.93 * r), _shaded((36, 60, 240), x, y, r, 0.45)


def _cheese(x: Array, y: Array, r: float) -> Drawing:
    corners = [(-1.0, 0.05), (0.35, -0.75), (0.98, -0.3), (0.98, 0.72), (-1.0, 0.72)]
    distance = _polygon(x, y, [(cx * r, cy * r) for cx, cy in corners])
    colour = _fill((255, 216, 92), x)
    for cx, cy, size in ((-0.55, 0.36, 0.17), (0.02, 0.12, 0.2), (0.55, -0.2, 0.15), (0.5, 0.42, 0.21)):
        colour = _blend(colour, (214, 140, 40), _circle(x, y, cx * r, cy * r, size * r))
    return distance, colour


def _leaf(x: Array, y: Array, r: float) -> Drawing:
    distance = np.minimum(_circle(x, y, -0.42 * r, 0.0, 1.08 * r), _circle(x, y, 0.42 * r, 0.0, 1.08 * r))
    ribs = 1.0 - np.abs(np.mod(y - np.abs(x), 0.42 * r) - 3.0)
    vein = np.maximum(_box(x, y, 0.0, 0.1 * r, 0.05 * r, 0.85 * r), ribs)
    return distance, _blend(_fill((12, 92, 58), x), (112, 176, 96), vein)


def _zebra(x: Array, y: Array, r: float) -> Drawing:
    body = _ellipse(x, y, 0.16 * r, 0.0, 0.82 * r, 0.48 * r)
    corners = [(-0.72, -0.68), (-0.3, -0.66), (0.06, -0.2), (-0.5, 0.2)]
    neck = _polygon(x, y, [(cx * r, cy * r) for cx, cy in corners])
    head = _ellipse(x, y, -0.7 * r, -0.58 * r, 0.36 * r, 0.25 * r)
    legs = [_box(x, y, cx * r, 0.5 * r, 0.19 * r, 0.42 * r) for cx in (-0.3, 0.62)]
    distance = np.maximum.reduce([body, neck, head, *legs])
    stripes = np.sin((x + 0.25 * y) / r * 13.0) * 2.2
    return distance, _blend(_fill((248, 248, 248), x), (16, 16, 20), stripes)


def _chess_board(x: Array, y: Array, r: float) -> Drawing:
    half, cell = 0.84 * r, 0.42 * r
    dark = np.sin(x / cell * np.pi) * np.sin(y / cell * np.pi) * 0.5 * cell
    colour = _blend(_fill((240, 222, 178), x), (84, 48, 24), dark)
    return _box(x, y, 0.0, 0.0, half, half), colour


def _brick_wall(x: Array, y: Array, r: float) -> Drawing:
    height, width = 0.36 * r, 0.66 * r
    row = np.floor((y + 0.72 * r) / height)
    across = np.mod(x + np.where(row % 2 == 0, 0.0, 0.5 * width), width)
    down = np.mod(y + 0.72 * r, height)
    brick = (
        np.minimum(0.5 * width - np.abs(across - 0.5 * width), 0.5 * height - np.abs(down - 0.5 * height))
        - 0.9
    )
    return _box(x, y, 0.0, 0.0, 0.95 * r, 0.72 * r), _blend(_fill((214, 206, 200), x), (158, 62, 44), brick)


_THINGS: dict[str, Callable[[Array, Array, float], Drawing]] = {
    "apple": _apple,
    "pumpkin": _pumpkin,
    "heart": _heart,
    "star": _star,
    "moon": _moon,
    "plum": _plum,
    "blue ball": _blue_ball,
    "cheese": _cheese,
    "leaf": _leaf,
    "zebra": _zebra,
    "chess board": _chess_board,
    "brick wall": _brick_wall,
}
_TILT = {"zebra": 8.0, "brick wall": 8.0, "apple": 12.0, "pumpkin": 12.0, "leaf": 180.0, "star": 36.0}
"""Largest rotation in degrees, either way; 20 for the others."""


# ----------------------------------------------------------------------------------------------------
# Stuff: (x, y in pixels from the upper left corner, generator) -> colour [h, w, 3]


def _mix(low: Colour, high: Colour, share: Array) -> Array:
    return (
        np.asarray(low, np.float32)
        + (np.asarray(high, np.float32) - np.asarray(low, np.float32)) * share[..., None]
    )


def _grass(x: Array, y: Array, rng: np.random.Generator) -> Array:
    a, b, c = rng.uniform(0.0, 2.0 * np.pi, 3)
    tufts = np.sin(0.6 * x + 1.2 * np.sin(0.16 * y + a) + b) * (0.6 + 0.4 * np.sin(0.3 * y + 0.11 * x + c))
    return _mix((62, 152, 34), (112, 206, 66), 0.5 + 0.5 * tufts)


def _water(x: Array, y: Array, rng: np.random.Generator) -> Array:
    a, b = rng.uniform(0.0, 2.0 * np.pi, 2)
    waves = np.sin(0.62 * y + 1.4 * np.sin(0.13 * x + a) + b)
    return _mix((0, 118, 136), (52, 178, 186), 0.5 + 0.5 * waves)


def _sand(x: Array, y: Array, rng: np.random.Generator) -> Array:
    a, b = rng.uniform(0.0, 2.0 * np.pi, 2)
    dunes = np.sin(0.09 * x + 0.17 * y + 1.5 * np.sin(0.06 * x + a) + b)
    return _mix((214, 182, 138), (238, 212, 176), 0.5 + 0.5 * dunes)


def _sky(x: Array, y: Array, rng: np.random.Generator) -> Array:
    clouds = np.zeros_like(x)
    for cx, cy in rng.uniform(0.0, SIZE, (3, 2)):
        clouds = np.maximum(clouds, np.exp(-(((x - cx) / 20.0) ** 2) - ((y - cy) / 8.0) ** 2))
    return _mix((112, 180, 250), (222, 238, 254), 0.25 * y / SIZE + 0.75 * clouds)


def _snow(x: Array, y: Array, rng: np.random.Generator) -> Array:
    a, b = rng.uniform(0.0, 2.0 * np.pi, 2)
    drifts = np.sin(0.1 * x + a) * np.sin(0.14 * y + 0.05 * x + b)
    return _mix((226, 234, 246), (252, 253, 255), 0.5 + 0.5 * drifts)


def _lava(x: Array, y: Array, rng: np.random.Generator) -> Array:
    a, b, c = rng.uniform(0.0, 2.0 * np.pi, 3)
    flow = np.sin(0.13 * x + 1.2 * np.sin(0.1 * y + a) + b) * np.sin(0.12 * y + 1.2 * np.sin(0.09 * x + c))
    return _mix((70, 12, 10), (255, 96, 0), np.exp(-((flow / 0.32) ** 2)))


_STUFF: dict[str, Callable[[Array, Array, np.random.Generator], Array]] = {
    "grass": _grass,
    "water": _water,
    "sand": _sand,
    "sky": _sky,
    "snow": _snow,
    "lava": _lava,
}

THINGS: tuple[str, ...] = tuple(_THINGS)
"""Names of the countable classes."""

STUFF: tuple[str, ...] = tuple(_STUFF)
"""Names of the classes that fill the ground."""

CLASSES: tuple[str, ...] = THINGS + STUFF
"""All names that a scene can hold."""


# ----------------------------------------------------------------------------------------------------
# Composition

_RADII = {1: (30.0, 42.0), 2: (26.0, 34.0), 3: (23.0, 29.0), 4: (21.0, 26.0)}
"""Smallest and largest radius in pixels, by the number of things."""


def _ground(
    names: list[str], x: Array, y: Array, rng: np.random.Generator
) -> tuple[Array, NDArray[np.int64]]:
    """Colour [h, w, 3] and class indices [h, w] of one stuff, or of two that a tilted line divides."""
    colour = _STUFF[names[0]](x, y, rng)
    labels = np.full(x.shape, CLASSES.index(names[0]), np.int64)
    if len(names) == 2:
        tilt, level = rng.uniform(-0.35, 0.35), rng.uniform(0.38, 0.62) * SIZE
        distance = ((y - level) * np.cos(tilt) + (x - SIZE / 2) * np.sin(tilt)).astype(np.float32)
        colour = _blend(colour, _STUFF[names[1]](x, y, rng), distance)
        labels[distance > 0] = CLASSES.index(names[1])
    return colour, labels


def _places(count: int, rng: np.random.Generator) -> list[tuple[float, float, float]]:
    """Up to `count` circles (x, y, radius) in pixels that keep clear of each other."""
    placed: list[tuple[float, float, float]] = []
    for _ in range(60):
        radius = rng.uniform(*_RADII[count])
        cx, cy = rng.uniform(0.9 * radius, SIZE - 0.9 * radius, 2)
        if all(np.hypot(cx - ox, cy - oy) > 1.02 * (radius + other) for ox, oy, other in placed):
            placed.append((cx, cy, radius))
        if len(placed) == count:
            break
    return placed


def _posed(name: str, place: tuple[float, float, float], rng: np.random.Generator) -> _Thing:
    angle = np.deg2rad(rng.uniform(-1.0, 1.0) * _TILT.get(name, 20.0))
    mirror = 1.0 if rng.random() < 0.5 else -1.0
    return _Thing(name, *place, angle, mirror, rng.uniform(0.92, 1.05))


def _drawn(thing: _Thing, x: Array, y: Array) -> tuple[tuple[slice, slice], Drawing]:
    """The window of the image that a thing fits into, and its drawing there."""
    reach = 1.3 * thing.radius
    rows, columns = (slice(max(int(c - reach), 0), int(c + reach) + 1) for c in (thing.cy, thing.cx))
    dx, dy = x[rows, columns] - np.float32(thing.cx), y[rows, columns] - np.float32(thing.cy)
    across = (np.cos(thing.angle) * dx + np.sin(thing.angle) * dy) * thing.mirror
    down = np.cos(thing.angle) * dy - np.sin(thing.angle) * dx
    distance, colour = _THINGS[thing.name](across.astype(np.float32), down.astype(np.float32), thing.radius)
    return (rows, columns), (distance, colour * thing.brightness)


def _inside(thing: _Thing, x: Array, y: Array) -> NDArray[np.bool_]:
    """The pixels of a thing [h, w], whatever covers it."""
    inside = np.zeros(x.shape, bool)
    window, (distance, _) = _drawn(thing, x, y)
    inside[window] = distance > 0
    return inside


_TOUCHING_RADII = (18.0, 24.0)
_CONTACT = 16  # pixels in common, at least, of things that touch
_COVERED = 0.2  # share of a thing, at most, that others cover


def _touching(x: Array, y: Array, rng: np.random.Generator) -> list[_Thing]:
    """Two or three things of one class, each in contact with an earlier one, and perhaps one of another.

    A thing is moved towards the one it shall touch until they have pixels in common.
    """
    kind, other = (str(name) for name in rng.choice(THINGS, 2, replace=False))
    wanted = int(rng.choice([2, 3], p=[0.6, 0.4]))
    things = [_posed(kind, (*rng.uniform(0.35 * SIZE, 0.65 * SIZE, 2), rng.uniform(*_TOUCHING_RADII)), rng)]
    covered = [_inside(things[0], x, y)]
    while len(things) < wanted:
        target = things[rng.integers(len(things))]
        new = _posed(kind, (0.0, 0.0, rng.uniform(*_TOUCHING_RADII)), rng)
        direction = rng.uniform(0.0, 2.0 * np.pi)
        for gap in np.arange(1.1, 0.5, -0.04) * (target.radius + new.radius):
            cx, cy = target.cx + gap * np.cos(direction), target.cy + gap * np.sin(direction)
            moved = replace(new, cx=cx, cy=cy)
            if not 0.9 * new.radius < min(cx, cy, SIZE - cx, SIZE - cy):
                continue
            pixels = _inside(moved, x, y)
            common = [int((pixels & below).sum()) for below in covered]
            if max(common) >= _CONTACT:
                if all(c <= _COVERED * below.sum() for c, below in zip(common, covered, strict=True)):
                    things.append(moved)
                    covered.append(pixels)
                break
    for _ in range(20):
        radius = rng.uniform(*_TOUCHING_RADII)
        cx, cy = rng.uniform(0.9 * radius, SIZE - 0.9 * radius, 2)
        if all(np.hypot(cx - one.cx, cy - one.cy) > 1.1 * (radius + one.radius) for one in things):
            return [*things, _posed(other, (cx, cy, radius), rng)]
    return things


def describe(names: Sequence[str], rng: np.random.Generator) -> str:
    """A sentence that names `names` in the order given, things before the ground they are on."""
    phrases = [f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names if name in THINGS]
    listed = " and ".join([", ".join(phrases[:-1]), phrases[-1]] if len(phrases) > 1 else phrases)
    ground = f" {rng.choice(['above', 'and'])} ".join(name for name in names if name in STUFF)
    if not (listed and ground):
        return str(rng.choice(["{0}", "a picture of {0}"])).format(listed or ground)
    forms = ["{0} on {1}", "{0} in front of {1}", "{1} with {0}", "a picture of {0} and {1}"]
    return str(rng.choice(forms)).format(listed, ground)


def _turned_hue(colour: Array, degrees: float) -> Array:
    """Colours [h, w, 3] rotated about the grey axis of RGB: brightness and saturation stay."""
    angle = np.deg2rad(degrees)
    axis = np.full(3, 1 / np.sqrt(3))
    cross = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / np.sqrt(3)
    turn = np.cos(angle) * np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * np.outer(axis, axis)
    return colour @ turn.T.astype(np.float32)


def _across(x: Array, y: Array, rng: np.random.Generator) -> Array:
    """Pixels from the centre along a random direction."""
    direction = rng.uniform(0.0, 2.0 * np.pi)
    return np.cos(direction) * (x - SIZE / 2) + np.sin(direction) * (y - SIZE / 2)


def _disturbed(colour: Array, x: Array, y: Array, rng: np.random.Generator) -> Array:
    """A `colour` [h, w, 3] in 0..255 as a bad camera sees it in bad light.

    In this order: hue turned by up to 14 degrees either way; light that changes along a line; two straight
    shadows, whose edges bound no object; a fine texture; blur of sigma 1 pixel; noise of sigma 13.
    """
    colour = _turned_hue(colour, rng.uniform(-14.0, 14.0))
    light = 1.0 + rng.uniform(0.05, 0.2) * _across(x, y, rng) / (SIZE / 2)
    for _ in range(2):
        half_width, offset = rng.uniform(10.0, 22.0), rng.uniform(-0.35, 0.35) * SIZE
        inside = np.clip(half_width - np.abs(_across(x, y, rng) - offset) + 0.5, 0.0, 1.0)
        light = light * (1.0 - rng.uniform(0.12, 0.25) * inside)
    texture = gaussian_filter(rng.standard_normal((SIZE, SIZE)), 1.5)
    light = light * (1.0 + 0.03 * texture / texture.std())
    blurred = gaussian_filter(colour * light[..., None], (1.0, 1.0, 0.0))
    return blurred + rng.normal(0.0, 13.0, blurred.shape)


def scene(seed: int, conditions: Conditions = "clean") -> Scene:
    """The scene of a seed.

    Args:
        seed: any non-negative integer; those from `HELD_OUT` up are never trained on.
        conditions: `"hard"`: the same scene with another image, whose hues are turned by up to 14 degrees,
            in uneven light, with two straight shadows, texture, blur and noise. `"touching"`: another scene,
            of two or three things of one class in contact, where no other covers more than a fifth of one,
            and often one thing of another class. Neither is trained on.

    Raises:
        TypeError: the seed is not an integer (a bool included).
        ValueError: the seed is negative, or the conditions are unknown.
    """
    if conditions not in get_args(Conditions):
        raise ValueError(
            f"conditions={conditions!r} are unknown; accepted: {', '.join(map(repr, get_args(Conditions)))}"
        )
    if isinstance(seed, (bool, np.bool_)):
        raise TypeError(f"seed must be an integer, not a bool: {seed!r}")
    try:
        seed = operator.index(seed)
    except TypeError:
        raise TypeError(f"seed must be an integer, not {type(seed).__name__}: {seed!r}") from None
    if seed < 0:
        raise ValueError(f"seed must not be negative: {seed}")
    rng = np.random.default_rng(seed)

    y, x = np.mgrid[0:SIZE, 0:SIZE].astype(np.float32) + np.float32(0.5)
    stuff = [str(name) for name in rng.choice(STUFF, 2 if rng.random() < 0.4 else 1, replace=False)]
    stuff.sort(key=lambda name: name != "sky")  # the sky is never below the horizon
    places: list[tuple[float, float, float]] = []
    if conditions != "touching":
        places = _places(int(rng.choice([1, 2, 3, 4], p=[0.2, 0.35, 0.3, 0.15])), rng)
    names = [str(name) for name in rng.choice(THINGS, len(places), replace=False)]

    pixels, index = _ground(stuff, x, y, rng)
    things = [_posed(name, place, rng) for name, place in zip(names, places, strict=True)]
    if conditions == "touching":
        things = _touching(x, y, rng)
        names = list(dict.fromkeys(thing.name for thing in things))
    instances = np.full(index.shape, -1, np.int64)
    for number, thing in enumerate(things):
        window, (distance, colour) = _drawn(thing, x, y)
        pixels[window] = _blend(pixels[window], colour, distance)
        index[window][distance > 0] = CLASSES.index(thing.name)
        instances[window][distance > 0] = number

    if conditions == "hard":  # by a generator of its own, so that the caption stays as it is
        own = np.random.default_rng(np.random.SeedSequence(seed, spawn_key=(1,)))
        pixels = _disturbed(pixels, x, y, own)
    present, labels = np.unique(index, return_inverse=True)
    return Scene(
        image=Image.fromarray(np.clip(np.rint(pixels), 0, 255).astype(np.uint8)),
        labels=labels.reshape(index.shape).astype(np.int64),
        classes=tuple(CLASSES[i] for i in present),
        caption=describe(names + stuff, rng),
        instances=instances,
    )
