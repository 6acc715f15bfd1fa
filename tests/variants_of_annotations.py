"""Variants of the sound set in what annotations have: ids, flags, areas, boxes and the rest."""

from __future__ import annotations

import math

from coco_set import (
    ABSENT,
    BOXES,
    HEIGHT,
    SOUND_BOXES,
    WIDTH,
    CocoSet,
    Reads,
    Refused,
    add,
    both,
    in_turn,
    put,
    set_list,
)

HUGE = 10**400  # no float
INFINITY, NAN = math.inf, math.nan


def add_values(key: str, cases: dict, outcome: Reads | Refused, items: tuple | None = None) -> None:
    """One variant for each value of a key of annotations."""
    for case, value in cases.items():
        add(key, f"{key}_{case}", put("annotations", key, value, items), outcome)


# Ids of annotations

ids = {
    "from_0": (range(8), 1),
    "negative": (range(-8, 0), 8),
    "float": ([i + 1.0 for i in BOXES], 8),
    "fraction": ([i + 0.5 for i in BOXES], 8),
    "text": ([str(i + 1) for i in BOXES], 8),
    "uuid": ([f"4f-{i}" for i in BOXES], 8),
    "repeated": ([1, 1, 2, 2, 3, 3, 4, 4], 4),
    "all_1": ([1] * 8, 7),
    "missing": ([ABSENT] * 8, 8),
    "null": ([None] * 8, 8),
    "half_missing": ([1, ABSENT] * 4, 4),
    "list": ([[i] for i in BOXES], 8),
    "true": ([True, *range(2, 9)], 1),
}
for case, (values, count) in ids.items():
    add("id", f"id_{case}", in_turn("annotations", "id", list(values)), Reads(notes={"id": count}))
huge = [10**30 + i for i in BOXES]
add("id", "id_huge", in_turn("annotations", "id", huge), Reads(notes=None))
far_apart = [10**12 + 7 * i for i in BOXES]
add("id", "id_far_apart", in_turn("annotations", "id", far_apart), Reads())

# Crowds, of all boxes or of the first and the sixth

TWO = (0, 5)
ZEROS = {
    "text_0": "0",
    "false": False,
    "text_false": "false",
    "text_False": "False",
    "float_0": 0.0,
}
ONES = {"true": True, "text_1": "1", "text_true": "true", "text_True": "True", "float_1": 1.0}
NEITHER = {
    "2": 2, "negative": -1, "list": [], "list_1": [1], "x": "x", "half": 0.5, "nan": NAN,
    "dict": {}, "no": "no",
}  # fmt: skip
for key in ("iscrowd", "ignore"):
    add_values(key, ZEROS, Reads(notes={key: 8}))
    add_values(key, {f"two_{case}": v for case, v in ZEROS.items()}, Reads(notes={key: 2}), TWO)
    counts = {"with 'ignore'": 2} if key == "ignore" else {}
    add_values(key, ONES, Reads(crowds=TWO, notes={f"whose '{key}'": 2, **counts}), TWO)
    add_values(key, {"1": 1}, Reads(crowds=TWO, notes=counts), TWO)
    add_values(key, {"all_1": 1}, Reads(crowds=tuple(BOXES), notes=dict.fromkeys(counts, 8)))
    add_values(key, NEITHER, Refused(rf"annotation 6 .*'{key}'"), (5,))
add_values("iscrowd", {"missing": ABSENT, "null": None}, Reads(notes={"iscrowd": 8}))
add_values("iscrowd", {"two_missing": ABSENT, "two_null": None}, Reads(notes={"iscrowd": 2}), TWO)
add_values("ignore", {"0": 0, "null": None}, Reads())

# Areas: whatever is wrong is computed anew

AREAS = {
    "missing": ABSENT, "null": None, "text": "720", "x": "x", "list": [720], "dict": {}, "zero": 0,
    "negative": -5, "nan": NAN, "infinite": INFINITY, "too_large": 1e9, "huge": HUGE, "true": True,
}  # fmt: skip
add_values("area", AREAS, Reads(notes={"area": 8}))
add_values("area", {f"two_{case}": v for case, v in AREAS.items()}, Reads(notes={"area": 2}), TWO)
add_values("area", {"of_mask": 500.5, "of_pixels": 31 * 25}, Reads())

# What boxes have nothing to do with

SEGMENTATIONS = {
    "missing": ABSENT, "null": None, "empty_polygon": [[]], "two_empty": [[], []], "number": 0.5,
    "flat": [8, 10, 38, 10, 38, 34], "two_points": [[8, 10, 38, 34]],
    "odd": [[1, 2, 3, 4, 5, 6, 7]], "nested": [[[8, 10], [17, 10], [17, 19]]], "text": "none",
    "texts": [["8", "10", "38", "10", "38", "34"]], "nulls": [[None] * 6], "nan": [[NAN] * 6],
    "dict": {}, "no_counts": {"size": [HEIGHT, WIDTH]}, "empty_counts": {"counts": [], "size": []},
    "text_size": {"counts": [10, 20, 6114], "size": ["64", "96"]},
    "bad_rle": {"counts": "~~~", "size": [HEIGHT, WIDTH]}, "true": True,
}  # fmt: skip
add_values("segmentation", SEGMENTATIONS, Reads())
add_values("segmentation", {"one_empty": [[]], "one_number": 0.5}, Reads(), (3,))
KEYPOINTS = {
    "nulls": [None, None, 0], "nested": [[10, 10, 2]], "texts": ["10", "10", "2"], "text": "none",
    "null": None, "empty": [], "short": [1], "nan": [NAN] * 3, "dict": {},
}  # fmt: skip
add_values("keypoints", KEYPOINTS, Reads())
add_values("num_keypoints", {"text": "x", "null": None}, Reads())
add_values("attributes", {"dict": {"occluded": False}, "null": None, "list": []}, Reads())
add_values("score", {"text": "0.5"}, Reads())

# Boxes: in the first of image 3, that is annotation 5

FIFTH = (4,)
BAD_BOXES = {
    "missing": ABSENT, "null": None, "dict": {"x": 8, "y": 18, "w": 30, "h": 24}, "empty": [],
    "three": [8, 18, 30], "five": [8, 18, 30, 24, 0.9], "nested": [[8, 18, 30, 24]],
    "nan": [NAN, 18, 30, 24], "infinite": [8, 18, INFINITY, 24], "huge": [8, 18, HUGE, 24],
    "overflow": [8, 18, 1e300, 1e300], "texts": ["8", "18", "30", "24"],
    "nulls": [None, 18, 30, 24], "lists": [[8], 18, 30, 24],
    "negative_width": [38, 18, -30, 24], "negative_height": [8, 42, 30, -24], "text": "8 18 30 24",
}  # fmt: skip
add_values("bbox", BAD_BOXES, Refused(r"(annotation 5 |id 5\)).*bbox"), FIFTH)
add_values("bbox", {"all_texts": [*"1234"]}, Refused("annotation 1 .*bbox.*8 of 8"))
add_values("bbox", {"all_outside": [960, 640, 30, 24]}, Refused("none of its 8 boxes.*pixels"))
EMPTY_BOXES = {
    "no_width": [8, 18, 0, 24], "no_height": [8, 18, 30, 0], "point": [8, 18, 0, 0],
    "residue": [8, 18, 30, 5.7e-14], "negative_residue": [8, 18, -1e-14, 24],
    "right": [WIDTH, 18, 30, 24], "below": [8, HEIGHT + 5, 30, 24], "left": [-30, 18, 30, 24],
}  # fmt: skip
for case, box in EMPTY_BOXES.items():
    # Its area is not that of the box any more, unless the box has the same.
    change = both(put("annotations", "bbox", box, FIFTH), put("annotations", "area", 720, FIFTH))
    notes = {"without area in": 1, **({"'area'": 1} if min(box[2:]) < 1 else {})}
    add("bbox", f"bbox_{case}", change, Reads(left_out=FIFTH, notes=notes))
GOOD_BOXES = {
    "fractions": [8.25, 18.5, 30, 24], "floats": [8.0, 18.0, 30.0, 24.0],
    "half_outside": [-15, 18, 30, 24], "whole_image": [0, 0, WIDTH, HEIGHT],
}  # fmt: skip
for case, box in GOOD_BOXES.items():
    change = put("annotations", "bbox", box, FIFTH)
    add("bbox", f"bbox_{case}", change, Reads(boxes={4: box}))


def to_corners(annotation: dict) -> list:
    x, y, w, h = annotation["bbox"]
    return [x, y, x + w, y + h]


def normalize(annotation: dict) -> list:
    x, y, w, h = annotation["bbox"]
    return [x / WIDTH, y / HEIGHT, w / WIDTH, h / HEIGHT]


# 720 is possible as the area of the larger boxes too.
corners = {i: [x, y, x + 30, y + 24] for i, (x, y, _, _) in enumerate(SOUND_BOXES)}
corners_outcome = Reads(boxes=corners, warning="leave their image.*x0, y0, x1, y1")
add("bbox", "bbox_corners", put("annotations", "bbox", to_corners), corners_outcome)
larger = {i: [1.5 * side for side in box] for i, box in enumerate(SOUND_BOXES)}
outcome = Reads(boxes=larger, warning="leave their image.*another size")
add("bbox", "bbox_of_larger", in_turn("annotations", "bbox", list(larger.values())), outcome)
normalized = Refused("normali[sz]ed")
add("bbox", "bbox_normalized", put("annotations", "bbox", normalize), normalized)
no_sizes = both(*(put("images", key, ABSENT) for key in ("width", "height")))
add(
    "bbox", "bbox_normalized_no_sizes", both(put("annotations", "bbox", normalize), no_sizes),
    normalized,
)  # fmt: skip


def add_small_objects(data: CocoSet) -> None:
    data.annotations = [
        {
            "id": i + 1,
            "image_id": 1,
            "category_id": 1,
            "bbox": [1 + 6 * (i % 15), 1 + 6 * (i // 15), 5, 5],
            "area": 25,
            "iscrowd": 0,
        }
        for i in range(150)
    ]


many = {i: [1 + 6 * (i % 15), 1 + 6 * (i // 15), 5, 5] for i in range(150)}
add("bbox", "many_objects", add_small_objects, Reads(boxes=many), can_combine=False)

# Boxes twice, and an image without any

twice = set_list("annotations", lambda items: [{**a} for a in items for _ in range(2)])
add("bbox", "boxes_twice", twice, Reads(copies=2, notes={"id": 8}), can_combine=False)
few = set_list("annotations", lambda items: items[2:])
add("bbox", "image_without_boxes", few, Reads(left_out=(0, 1)), can_combine=False)
