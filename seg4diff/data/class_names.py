"""Names of the classes of every data set, as the paper prompts them, and names that say more.

The order is that of the label maps: :mod:`seg4diff.data` maps label values to positions in it.
"""

from __future__ import annotations

BACKGROUND = "background"


def _names(text: str) -> tuple[str, ...]:
    return tuple(" ".join(name.split()) for name in text.split(","))


VOC = _names(
    """aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike,
    person, pottedplant, sheep, sofa, train, tvmonitor"""
)
"""Pascal VOC 2012 without background, label values 1 to 20."""

PASCAL_CONTEXT = _names(
    """aeroplane, bicycle, bird, boat, bottle, bus, car, cat, chair, cow, diningtable, dog, horse, motorbike,
    person, pottedplant, sheep, sofa, train, tvmonitor, bag, bed, bench, book, building, cabinet, ceiling,
    cloth, computer, cup, door, fence, floor, flower, food, grass, ground, keyboard, light, mountain, mouse,
    curtain, platform, sign, plate, road, rock, shelves, sidewalk, sky, snow, bedclothes, track, tree, truck,
    wall, water, window, wood"""
)
"""Pascal Context's 59 frequent classes in the order of its ``59_labels.txt``, label values 1 to 59."""

COCO_THINGS = _names(
    """person, bicycle, car, motorcycle, airplane, bus, train, truck, boat, traffic light, fire hydrant,
    stop sign, parking meter, bench, bird, cat, dog, horse, sheep, cow, elephant, bear, zebra, giraffe,
    backpack, umbrella, handbag, tie, suitcase, frisbee, skis, snowboard, sports ball, kite, baseball bat,
    baseball glove, skateboard, surfboard, tennis racket, bottle, wine glass, cup, fork, knife, spoon, bowl,
    banana, apple, sandwich, orange, broccoli, carrot, hot dog, pizza, donut, cake, chair, couch,
    potted plant, bed, dining table, toilet, tv, laptop, mouse, remote, keyboard, cell phone, microwave, oven,
    toaster, sink, refrigerator, book, clock, vase, scissors, teddy bear, hair drier, toothbrush"""
)
"""COCO's 80 things in the order of their category ids."""

COCO_STUFF = _names(
    """banner, blanket, branch, bridge, building-other, bush, cabinet, cage, cardboard, carpet, ceiling-other,
    ceiling-tile, cloth, clothes, clouds, counter, cupboard, curtain, desk-stuff, dirt, door-stuff, fence,
    floor-marble, floor-other, floor-stone, floor-tile, floor-wood, flower, fog, food-other, fruit,
    furniture-other, grass, gravel, ground-other, hill, house, leaves, light, mat, metal, mirror-stuff, moss,
    mountain, mud, napkin, net, paper, pavement, pillow, plant-other, plastic, platform, playingfield,
    railing, railroad, river, road, rock, roof, rug, salad, sand, sea, shelf, sky-other, skyscraper, snow,
    solid-other, stairs, stone, straw, structural-other, table, tent, textile-other, towel, tree, vegetable,
    wall-brick, wall-concrete, wall-other, wall-panel, wall-stone, wall-tile, wall-wood, water-other,
    waterdrops, window-blind, window-other, wood"""
)
"""COCO-Stuff's 91 kinds of stuff, ids 92 to 182."""

COCO_UNUSED_IDS = (12, 26, 29, 30, 45, 66, 68, 69, 71, 83, 91)
"""Category ids from 1 to 91 that name things without annotations."""

COCO_STUFF_27 = _names(
    """electronic-things, appliance-things, food-things, furniture-things, indoor-things, kitchen-things,
    accessory-things, animal-things, outdoor-things, person-things, sports-things, vehicle-things,
    ceiling-stuff, floor-stuff, food-stuff, furniture-stuff, rawmaterial-stuff, textile-stuff, wall-stuff,
    window-stuff, building-stuff, ground-stuff, plant-stuff, sky-stuff, solid-stuff, structural-stuff,
    water-stuff"""
)
"""The super-categories of COCO-Stuff, in the order of the unsupervised literature since IIC."""

# Super-categories of the 80 things: (position in COCO_STUFF_27, how many things in a row belong to it).
_THING_GROUPS = (
    (9, 1), (11, 8), (8, 5), (7, 10), (6, 5), (10, 10), (5, 7), (2, 10), (3, 6), (0, 6), (1, 5), (4, 7),
)  # fmt: skip

# Of each of the 91 kinds of stuff.
_STUFF_GROUPS = (
    17, 17, 22, 20, 20, 22, 15, 25, 16, 13, 12, 12, 17, 17, 23, 15, 15, 17, 15, 21, 15, 25, 13, 13,
    13, 13, 13, 22, 26, 14, 14, 15, 22, 21, 21, 24, 20, 22, 15, 17, 16, 15, 22, 24, 21, 17, 25, 16,
    21, 17, 22, 16, 21, 21, 25, 21, 26, 21, 24, 20, 17, 14, 21, 26, 15, 23, 20, 21, 24, 15, 24, 22,
    25, 15, 20, 17, 17, 22, 14, 18, 18, 18, 18, 18, 18, 18, 26, 26, 19, 19, 24,
)  # fmt: skip

COCO_SUPERCATEGORIES = tuple(group for group, count in _THING_GROUPS for _ in range(count)) + _STUFF_GROUPS
"""For each of the 171 classes of COCO-Stuff, things first, its position in ``COCO_STUFF_27``."""

ADE20K = _names(
    """wall, building, sky, floor, tree, ceiling, road, bed, windowpane, grass, cabinet, sidewalk, person,
    earth, door, table, mountain, plant, curtain, chair, car, water, painting, sofa, shelf, house, sea,
    mirror, rug, field, armchair, seat, fence, desk, rock, wardrobe, lamp, bathtub, railing, cushion, base,
    box, column, signboard, chest of drawers, counter, sand, sink, skyscraper, fireplace, refrigerator,
    grandstand, path, stairs, runway, case, pool table, pillow, screen door, stairway, river, bridge,
    bookcase, blind, coffee table, toilet, flower, book, hill, bench, countertop, stove, palm, kitchen island,
    computer, swivel chair, boat, bar, arcade machine, hovel, bus, towel, light, truck, tower, chandelier,
    awning, streetlight, booth, television receiver, airplane, dirt track, apparel, pole, land, bannister,
    escalator, ottoman, bottle, buffet, poster, stage, van, ship, fountain, conveyer belt, canopy, washer,
    plaything, swimming pool, stool, barrel, basket, waterfall, tent, bag, minibike, cradle, oven, ball, food,
    step, tank, trade name, microwave, pot, animal, bicycle, lake, dishwasher, screen, blanket, sculpture,
    hood, sconce, vase, traffic light, tray, ashcan, fan, pier, crt screen, plate, monitor, bulletin board,
    shower, radiator, glass, clock, flag"""
)
"""ADE20K's 150 classes of the scene parsing challenge, label values 1 to 150."""

CITYSCAPES = _names(
    """road, sidewalk, building, wall, fence, pole, traffic light, traffic sign, vegetation, terrain, sky,
    person, rider, car, truck, bus, train, motorcycle, bicycle"""
)
"""The 19 evaluated classes of Cityscapes."""

CITYSCAPES_IDS = (7, 8, 11, 12, 13, 17, 19, 20, 21, 22, 23, 24, 25, 26, 27, 28, 31, 32, 33)
"""Their values in ``labelIds`` maps."""

_BACKGROUND_NAMES = ("sky", "wall", "tree", "grass", "road", "water", "floor", "building", BACKGROUND)

BETTER: dict[str, tuple[str, ...]] = {
    BACKGROUND: _BACKGROUND_NAMES,
    # Pascal: compound words, which the tokenizer cuts into pieces that mean something else
    "aeroplane": ("airplane",),
    "diningtable": ("dining table",),
    "motorbike": ("motorcycle",),
    "pottedplant": ("potted plant",),
    "tvmonitor": ("television", "monitor"),
    "bedclothes": ("bed sheets", "blanket"),
    "shelves": ("shelf", "shelves"),
    # COCO-Stuff: the name without the word that only tells classes apart
    **{
        name: (name.removesuffix("-other").removesuffix("-stuff").replace("-", " "),)
        for name in COCO_STUFF
        if name.endswith(("-other", "-stuff"))
    },
    **{
        f"{kind}-{material}": (f"{material} {kind}",)
        for kind, materials in (
            ("floor", ("marble", "stone", "wood")),
            ("wall", ("brick", "concrete", "stone", "wood")),
        )
        for material in materials
    },
    "ceiling-tile": ("ceiling tiles",),
    "floor-tile": ("floor tiles",),
    "wall-panel": ("wall panel",),
    "wall-tile": ("wall tiles",),
    "window-blind": ("window blind",),
    "playingfield": ("playing field",),
    "waterdrops": ("water drops",),
    "solid-other": ("solid object",),
    "structural-other": ("structure",),
    # its super-categories, by things of each
    "electronic-things": ("electronics", "laptop", "tv"),
    "appliance-things": ("appliance", "oven", "refrigerator"),
    "food-things": ("food", "fruit", "pizza"),
    "furniture-things": ("furniture", "chair", "couch", "bed"),
    "indoor-things": ("book", "vase", "clock"),
    "kitchen-things": ("dishes", "cup", "bottle", "bowl"),
    "accessory-things": ("bag", "umbrella"),
    "animal-things": ("animal",),
    "outdoor-things": ("traffic light", "bench", "street sign"),
    "person-things": ("person",),
    "sports-things": ("sports equipment",),
    "vehicle-things": ("vehicle", "car", "bus"),
    "ceiling-stuff": ("ceiling",),
    "floor-stuff": ("floor",),
    "food-stuff": ("vegetables", "salad"),
    "furniture-stuff": ("table", "cabinet", "shelf"),
    "rawmaterial-stuff": ("metal", "plastic", "paper"),
    "textile-stuff": ("cloth", "curtain", "towel"),
    "wall-stuff": ("wall",),
    "window-stuff": ("window",),
    "building-stuff": ("building", "house"),
    "ground-stuff": ("ground", "road", "sand", "snow"),
    "plant-stuff": ("tree", "grass", "bush"),
    "sky-stuff": ("sky", "clouds"),
    "solid-stuff": ("rock", "mountain"),
    "structural-stuff": ("fence", "railing"),
    "water-stuff": ("water", "sea", "river"),
    # ADE20K and Cityscapes: words of another register
    "windowpane": ("window",),
    "earth": ("soil", "ground"),
    "apparel": ("clothes",),
    "ashcan": ("trash can",),
    "bannister": ("stair railing",),
    "crt screen": ("old television",),
    "hovel": ("hut",),
    "minibike": ("motorbike",),
    "plaything": ("toy",),
    "conveyer belt": ("conveyor belt",),
    "television receiver": ("television",),
    "trade name": ("brand name",),
    "sconce": ("wall lamp",),
    "hood": ("kitchen hood",),
    "vegetation": ("trees", "vegetation"),
    "terrain": ("grass", "soil"),
    "rider": ("cyclist", "rider"),
}
"""Names to prompt for a class in place of its own; its score is the largest of theirs."""
