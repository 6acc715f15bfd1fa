"""The conversions of docs/data.md, run as they stand there."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from gfl_d2.data import register_coco_format
from test_docs import code_blocks

pytest.importorskip("supervision", minversion="0.31.2", exc_type=ImportError)
pytestmark = pytest.mark.usefixtures("clean_catalogs")

# Split -> image -> (width, height) and objects: class, x0, y0, x1, y1. The splits meet the classes
# in another order, and "val" has no cat.
SPLITS = {
    "train": {
        "a": ((80, 64), [("dog", 10, 5, 40, 33), ("cat", 0, 0, 80, 64)]),
        "b": ((100, 60), [("cat", 13, 7, 99, 59)]),
        "empty": ((33, 47), []),
    },
    "val": {"c": ((57, 43), [("dog", 1, 2, 3, 43), ("cow", 50, 0, 57, 1)])},
}
YOLO_NAMES = ["dog", "cat", "cow"]
COMMON, YOLO, VOC, LABELME = range(4)


def draw(folder: Path, images: dict):
    folder.mkdir(parents=True, exist_ok=True)
    for stem, (size, _) in images.items():
        Image.new("RGB", size, (90, 120, 30)).save(folder / f"{stem}.jpg")


def write_yolo(root: Path):
    for split, images in SPLITS.items():
        draw(root / "images" / split, images)
        labels = root / "labels" / split
        labels.mkdir(parents=True)
        for stem, ((w, h), objects) in images.items():
            lines = [
                f"{YOLO_NAMES.index(name)} {(x0 + x1) / 2 / w:.6f} {(y0 + y1) / 2 / h:.6f} "
                f"{(x1 - x0) / w:.6f} {(y1 - y0) / h:.6f}\n"
                for name, x0, y0, x1, y1 in objects
            ]
            if lines:  # YOLO needs no file for an image without objects
                (labels / f"{stem}.txt").write_text("".join(lines))
    names = "".join(f"  {i}: {name}\n" for i, name in enumerate(YOLO_NAMES))
    text = f"path: .\ntrain: images/train\nval: images/val\nnames:\n{names}"
    (root / "data.yaml").write_text(text)


def write_voc(root: Path):
    """Pixels count from 1, and the last one belongs to the box."""
    for folder in ("Annotations", "ImageSets/Main"):
        (root / folder).mkdir(parents=True)
    for split, images in SPLITS.items():
        draw(root / "JPEGImages", images)
        (root / f"ImageSets/Main/{split}.txt").write_text("\n".join(images) + "\n")
        for stem, ((w, h), objects) in images.items():
            boxes = "".join(
                f"<object><name>{name}</name><difficult>0</difficult><bndbox>"
                f"<xmin>{x0 + 1}</xmin><ymin>{y0 + 1}</ymin><xmax>{x1}</xmax><ymax>{y1}</ymax>"
                "</bndbox></object>"
                for name, x0, y0, x1, y1 in objects
            )
            size = f"<size><width>{w}</width><height>{h}</height><depth>3</depth></size>"
            (root / "Annotations" / f"{stem}.xml").write_text(
                f"<annotation><filename>{stem}.jpg</filename>{size}{boxes}</annotation>"
            )


def write_labelme(root: Path):
    """The corners of a rectangle in any order; polygons; one object in two parts."""
    for split, images in SPLITS.items():
        draw(root / split, images)
        for stem, ((w, h), objects) in images.items():
            shapes = []
            for name, x0, y0, x1, y1 in objects:
                kinds = {
                    "dog": [("rectangle", [[x1, y1], [x0, y0]])],
                    "cat": [("polygon", [[x0, y0], [x1, y0], [x1, y1], [x0, y1]])],
                    "cow": [
                        ("rectangle", [[x0, y0], [x0 + 2, y1]]),
                        ("polygon", [[x1 - 2, y0], [x1, y0], [x1, y1]]),
                    ],
                }
                group = 7 if name == "cow" else None
                shapes += [
                    {"label": name, "shape_type": kind, "points": points, "group_id": group}
                    for kind, points in kinds[name]
                ]
            sizes = {"imageHeight": h, "imageWidth": w}
            content = {"shapes": shapes, "imagePath": f"{stem}.jpg", "imageData": None, **sizes}
            (root / split / f"{stem}.json").write_text(json.dumps(content))


def objects_of(record: dict, classes: list[str]) -> list[tuple]:
    """(class, x0, y0, x1, y1, iscrowd) of each object of a record, sorted."""
    found = []
    for annotation in record["annotations"]:
        x, y, w, h = annotation["bbox"]
        box = np.round([x, y, x + w, y + h], 3).tolist()
        found.append((classes[annotation["category_id"]], *box, annotation["iscrowd"]))
    return sorted(found)


@pytest.mark.parametrize(
    "block, write, root, image_roots",
    [
        (YOLO, write_yolo, "cells", "cells/images/{}"),
        (VOC, write_voc, "VOC2007", "VOC2007/JPEGImages"),
        (LABELME, write_labelme, "cells", "cells/{}"),
    ],
    ids=["yolo", "voc", "labelme"],
)
def test_conversion(tmp_path, monkeypatch, block, write, root, image_roots):
    write(tmp_path / root)
    monkeypatch.chdir(tmp_path)
    blocks = [code for code in code_blocks("docs/data.md", "python") if "save(" in code]
    scope = {}
    exec(blocks[COMMON], scope)
    exec(blocks[block], scope)

    all_classes = []
    for split, images in SPLITS.items():
        register_coco_format(split, tmp_path / f"{split}.json", image_roots.format(split))
        classes = MetadataCatalog.get(split).thing_classes
        records = {Path(r["file_name"]).stem: r for r in DatasetCatalog.get(split)}
        assert set(records) == set(images)
        for stem, (size, objects) in images.items():
            assert (records[stem]["width"], records[stem]["height"]) == size
            assert objects_of(records[stem], classes) == sorted((*o, 0) for o in objects)
        all_classes.append(classes)
    assert set(all_classes[0]) == set(YOLO_NAMES)
    assert all_classes[0] == all_classes[1]
    if block == YOLO:
        assert all_classes[0] == YOLO_NAMES
