"""What a config says of data: folders, classes, their number; and data that changes."""

import json
import logging
import os
from pathlib import Path
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json
from PIL import Image

from gfl_d2.config import load_config
from gfl_d2.data import (
    check_datasets,
    compare_classes,
    read_coco,
    register_coco_format,
    register_datasets,
    registration,
    resolve_num_classes,
)
from gfl_d2.errors import InputError
from small_dataset import HEIGHT, WIDTH, Data, make_cfg, warnings
from toy_training import CONFIG

pytestmark = pytest.mark.usefixtures("clean_catalogs")


@pytest.fixture
def data(tmp_path) -> Data:
    return Data(tmp_path / "data")


def ground_truth(name):
    return json.loads(Path(MetadataCatalog.get(name).json_file).read_text())


def boxes_of(name):
    return [[a["category_id"] for a in r["annotations"]] for r in DatasetCatalog.get(name)]


# Changed data


def test_a_corrected_file_is_read_anew(data):
    data.register()
    data.coco["categories"][0]["name"] = "wolf"
    data.coco["annotations"].pop()
    data.register()
    assert MetadataCatalog.get("pets").thing_classes == ["cat", "wolf"]
    assert boxes_of("pets") == [[1], []]


def test_ground_truth_of_changed_data_has_another_file(data):
    data.coco["annotations"][0]["id"] = 0
    data.register()
    first = MetadataCatalog.get("pets").json_file
    assert ground_truth("pets")["annotations"][0]["bbox"] == [2, 3, 10, 8]
    data.coco["annotations"][0]["bbox"] = [1, 1, 5, 5]
    data.register()
    assert MetadataCatalog.get("pets").json_file != first
    assert ground_truth("pets")["annotations"][0]["bbox"] == [1, 1, 5, 5]


def test_a_sound_file_is_its_own_ground_truth(data):
    data.register()
    assert MetadataCatalog.get("pets").json_file == str(data.json_file)
    data.coco["annotations"][0]["iscrowd"] = "1"
    data.write()
    content = data.json_file.read_bytes()
    register_coco_format("pets", data.json_file, data.image_root)
    metadata = MetadataCatalog.get("pets")
    assert metadata.json_file != metadata.annotation_file == str(data.json_file)
    assert [a["iscrowd"] for a in ground_truth("pets")["annotations"]] == [1, 0]
    assert data.json_file.read_bytes() == content
    assert {path.name for path in data.folder.iterdir()} == {"annotations.json", "images"}


def test_one_table_sums_up_the_changes(data, caplog):
    for annotation in data.coco["annotations"]:
        del annotation["area"], annotation["id"]
    data.coco["images"][0]["width"] = None
    data.register()
    (table,) = warnings(caplog)
    lines = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[3:]]
    assert lines == [
        ["2", "annotations without id", "numbered from 1"],
        ["2", "annotations without 'area'", "width x height"],
        ["1", "images without size", "that of the image file"],
    ]


# Boxes that cannot be right


def set_boxes(data, boxes):
    first = data.coco["annotations"][0]
    data.coco["annotations"] = [{**first, "id": i, "bbox": b} for i, b in enumerate(boxes, 1)]
    for annotation in data.coco["annotations"]:
        del annotation["area"]


CORNERS = [[20, 10, 38, 28], [2, 3, 12, 11], [25, 15, 30, 25], [30, 2, 38, 20]]


ARE_CORNERS = "they look like x0, y0, x1, y1: write x0, y0, width, height"
ARE_CENTRES = "they look like centres with width and height: write the left upper corner"
ARE_TURNED = "they fit the images turned by 90 degrees: were these rotated?"
OTHER_SIZE = "were they made on images of another size?"
CORNER, NO_CORNER, NO_WIDTH = [20, 10, 38, 28], [20, 20, 38, 10], [20, 10, 20, 28]


@pytest.mark.parametrize(
    ("boxes", "share", "guess"),
    [
        (CORNERS, 75, ARE_CORNERS),
        ([[20, 15, 38, 28], [30, 20, 18, 18], [25, 20, 28, 18]], 100, ARE_CENTRES),
        ([[2, 5, 20, 34], [5, 20, 10, 19], [3, 25, 12, 14]], 100, ARE_TURNED),
        ([[90, 60, 20, 30], [5, 20, 100, 19], [70, 5, 40, 30]], 100, OTHER_SIZE),
        # As centres they leave the image too, on the left and on the right.
        ([[13, 15, 38, 10]] * 3, 100, OTHER_SIZE),
        ([[27, 15, 38, 10]] * 3, 100, OTHER_SIZE),
        # A few that do not fit.
        ([CORNER] * 99 + [NO_CORNER], 100, ARE_CORNERS),
        ([CORNER] * 95 + [NO_CORNER] * 5, 100, OTHER_SIZE),
        ([CORNER] * 95 + [NO_WIDTH] * 5, 100, ARE_CORNERS),
    ],
)
def test_boxes_that_leave_their_image(data, caplog, boxes, share, guess):
    set_boxes(data, boxes)
    data.register()
    (warning,) = [text for text in warnings(caplog) if "leave their image" in text]
    assert warning == f"{data.json_file}: {share}% of the boxes leave their image; {guess}"


@pytest.mark.parametrize(
    ("start", "end", "leaves"),
    [
        (0, 41.3, False),
        (0, 41.5, True),
        (-1.3, 30, False),
        (-1.5, 30, True),
    ],
)
def test_tolerance_of_the_border(data, caplog, start, end, leaves):
    """One pixel, and 1% of the side."""
    set_boxes(data, [[start, 1, end - start, 9]] * 3)
    data.register()
    assert len([text for text in warnings(caplog) if "leave their image" in text]) == leaves


@pytest.mark.parametrize(
    ("inside", "outside", "is_told"), [(97, 3, False), (96, 4, True), (7, 3, True), (8, 2, False)]
)
def test_a_few_boxes_may_leave_their_image(data, caplog, inside, outside, is_told):
    set_boxes(data, [[1, 1, 9, 9]] * inside + [CORNER] * outside)
    data.register()
    assert len([text for text in warnings(caplog) if "leave their image" in text]) == is_told


def test_an_image_of_one_pixel(data, caplog):
    set_boxes(data, [*[[5, 5, 9, 9]] * 3, [1, 1, 9, 9]])
    data.coco["annotations"][-1]["image_id"] = 2
    Image.new("RGB", (1, 1)).save(data.image_root / "1.png")
    data.coco["images"][0].update(width=1, height=1)
    data.write()
    read = read_coco(data.json_file, data.image_root)
    assert read.boxes.tolist() == [[1, 1, 9, 9]]
    what = (
        f"boxes without area in their image (first: [5.0, 5.0, 9.0, 9.0] of {read.file_names[0]})"
    )
    assert read.changes[-1] == (3, what, "left out")
    assert "75% of the boxes leave their image" in warnings(caplog)[0]
    assert type(read.to_records()[1]["annotations"][0]["iscrowd"]) is int


@pytest.mark.parametrize(
    ("boxes", "count"),
    [
        ([[0.1, 0.2, 0.5, 0.6], [0, 0, 1, 1.02], [5, 5, 9, 9]], "2 of 3"),
        ([[0, 0, 1.05, 1], [0, 0, 1, 1.05], [5, 5, 9, 9]], "2 of 3"),
        ([[0, 0, 0.5, 0.5], [0, 0, 0, 1], [0, 0, 1, 0], [0, 0, 0, 0]], "1 of 1"),
    ],
)
def test_normalized_boxes_are_refused(data, boxes, count):
    set_boxes(data, boxes)
    assert data.error() == (
        f"{data.json_file}: in {count} boxes all values of 'bbox' are at most 1, so they are "
        "normalized: multiply x and width by the width of the image, y and height by its height"
    )


@pytest.mark.parametrize(
    "boxes",
    [
        [[0, 0, 1, 1], [5, 5, 9, 9]],
        [[1, 1, 2, 2], [0, 0, 2, 1]],
        [[0, 0, 0, 1], [0, 0, 1, 0], [5, 5, 9, 9]],
    ],
)
def test_small_boxes_that_are_not_normalized(data, boxes):
    set_boxes(data, boxes)
    data.write()
    expected = [box for box in boxes if box[2] and box[3]]
    assert read_coco(data.json_file, data.image_root).boxes.tolist() == expected


def test_boxes_of_one_pixel_in_images_of_one(data):
    set_boxes(data, [[0, 0, 1, 1]])
    for image in data.coco["images"]:
        Image.new("RGB", (1, 1)).save(data.image_root / image["file_name"])
        image.update(width=1, height=1)
    data.write()
    assert read_coco(data.json_file, data.image_root).boxes.tolist() == [[0, 0, 1, 1]]


# Sizes


@pytest.mark.parametrize(
    ("size", "exif", "hint"),
    [
        (
            (HEIGHT, WIDTH),
            True,
            "The file has the sizes before the EXIF rotation, which is applied here. If the boxes "
            "are of the upright pictures, swap width and height in the file; else remove the EXIF "
            "orientation from the images",
        ),
        ((HEIGHT, WIDTH), False, "Width and height are swapped in the file: swap them back"),
        (
            (WIDTH // 2, HEIGHT // 2),
            False,
            "If the boxes are right for the images as they are, remove width and height from the "
            "file; if the images are resized copies, use the original ones",
        ),
    ],
)
def test_sizes_that_are_not_those_of_the_images(data, size, exif, hint):
    orientation = Image.Exif()
    orientation[0x0112] = 6 if exif else 1
    for image in data.coco["images"]:
        image["width"], image["height"] = size
        stored = (HEIGHT, WIDTH) if exif else (WIDTH, HEIGHT)
        Image.new("RGB", stored).save(data.image_root / image["file_name"], exif=orientation)
    message = data.error()
    assert "2 of the 2 images" in message
    assert f"1.png is {WIDTH}x{HEIGHT}, not {size[0]}x{size[1]}" in message
    assert message.endswith(f" {hint}")


def test_three_of_many_wrong_sizes_are_shown(data):
    for i in range(3, 6):
        Image.new("RGB", (WIDTH, HEIGHT)).save(data.image_root / f"{i}.png")
        data.coco["images"].append({**data.coco["images"][0], "id": i, "file_name": f"{i}.png"})
    for image in data.coco["images"]:
        image["width"] = WIDTH + image["id"]
    sizes = (f"{i}.png is {WIDTH}x{HEIGHT}, not {WIDTH + i}x{HEIGHT}" for i in (1, 2, 3))
    shown = ", ".join(sizes)
    assert f"have another size than it says: {shown} and 2 more. If" in data.error()


# DATASETS.CLASSES


def test_classes_are_taken_in_the_order_of_the_config(data, caplog):
    data.coco["categories"].append({"id": 5, "name": "cow"})
    data.coco["annotations"].append({**data.coco["annotations"][0], "id": 13, "category_id": 5})
    data.write()
    entry = ["pets", data.json_file, data.image_root]
    cfg = make_cfg(num_classes=2, register=[entry])
    cfg.DATASETS.CLASSES = ["dog", "cow"]
    register_datasets(cfg)
    check_datasets(cfg)
    metadata = MetadataCatalog.get("pets")
    assert metadata.thing_classes == ["dog", "cow"]
    assert boxes_of("pets") == [[0, 1], []]
    # The ids of the ground truth are in the order of the classes, as the table of APs has it.
    sound = ground_truth("pets")
    assert [c["name"] for c in sorted(sound["categories"], key=lambda c: c["id"])] == ["dog", "cow"]
    assert len(sound["annotations"]) == 2
    # They are none of the file's, so that results are not taken for those of its classes.
    assert sorted(c["id"] for c in sound["categories"]) == [8, 9]
    assert "left out, with 1 boxes" in warnings(caplog)[0]
    assert "with the category ids 8 to 9, in results too" in warnings(caplog)[0]


@pytest.mark.parametrize(
    ("classes", "changes"),
    [
        (["cat", "dog", "cow", "owl"], []),
        (["cat", "cow"], [(2, "classes not in DATASETS.CLASSES", "left out, with 2 boxes")]),
        (
            ["dog", "cat", "owl", "cow"],
            [
                (
                    4,
                    "classes in the order of DATASETS.CLASSES",
                    "with the category ids 10 to 13, in results too",
                )
            ],
        ),
    ],
)
def test_what_is_noted_of_chosen_classes(data, classes, changes):
    data.coco["categories"] += [{"id": 8, "name": "cow"}, {"id": 9, "name": "owl"}]
    data.coco["annotations"].append({**data.coco["annotations"][0], "id": 13, "category_id": 9})
    data.write()
    read = read_coco(data.json_file, data.image_root, classes)
    assert read.class_names == classes
    assert read.changes == changes
    sound = read.to_coco()
    assert [a["id"] for a in sound["annotations"]] == list(range(1, len(read.boxes) + 1))


def test_twenty_of_many_classes_are_shown(data):
    data.coco["categories"] = [{"id": i, "name": f"c{i}"} for i in range(1, 26)]
    data.write()
    with pytest.raises(InputError) as error:
        read_coco(data.json_file, data.image_root, ["owl"])
    shown = ", ".join(f"c{i}" for i in range(1, 21))
    assert str(error.value) == (
        f"DATASETS.CLASSES names 'owl', which {data.json_file} does not have; its classes: "
        f"{shown} and 5 more"
    )


def test_classes_whose_names_are_numbers(data):
    for category, name in zip(data.coco["categories"], (1, 2)):
        category["name"] = name
    data.write()
    cfg = make_cfg(num_classes=1, register=[["pets", data.json_file, data.image_root]])
    cfg.DATASETS.CLASSES = [2]
    register_datasets(cfg)
    assert MetadataCatalog.get("pets").thing_classes == ["2"]


@pytest.mark.parametrize("classes", [["cat", "cow"], ["dog", "dog"]])
def test_classes_that_there_are_not(data, classes):
    data.write()
    cfg = make_cfg(register=[["pets", data.json_file, data.image_root]])
    cfg.DATASETS.CLASSES = classes
    with pytest.raises(InputError, match=r"DATASETS.CLASSES names ('cow'|a class twice)"):
        register_datasets(cfg)


def test_classes_are_for_registered_data_only():
    cfg = make_cfg(("coco_2017_train",), ("coco_2017_val",))
    cfg.DATASETS.CLASSES = ["car"]
    with pytest.raises(InputError, match=r"'coco_2017_train' is none: add \['my_coco_2017_train'"):
        register_datasets(cfg)


# The number of classes


def test_number_of_classes_of_the_data(data):
    data.register()
    cfg = make_cfg(num_classes=0)
    cfg.freeze()
    resolved = resolve_num_classes(cfg)
    assert (resolved.MODEL.GFL.NUM_CLASSES, cfg.MODEL.GFL.NUM_CLASSES) == (2, 0)
    check_datasets(resolved)
    assert resolve_num_classes(resolved) is resolved
    with pytest.raises(InputError, match=r"NUM_CLASSES is 0, and no dataset says how many"):
        resolve_num_classes(make_cfg((), (), num_classes=0))


def test_classes_of_the_weights(data, caplog):
    data.register()
    for known in (None, ["cat", "dog"]):
        compare_classes(["pets"], known)
    assert not warnings(caplog)
    with pytest.raises(InputError, match=r"in another order: set DATASETS.CLASSES \['dog', 'cat'"):
        compare_classes(["pets"], ["dog", "cat"])
    compare_classes(["pets"], ["cat", "wolf"])
    assert "Class 1 of dataset 'pets' is 'dog', and was 'wolf'" in warnings(caplog)[0]


# Images that do not matter


def test_images_are_not_checked_where_they_can_be_done_without(data):
    (data.image_root / "1.png").write_bytes(b"")
    data.coco["images"] += [
        {"id": 3, "file_name": "3.png", "width": 5, "height": 5},
        {"id": 4, "file_name": "4.png"},
    ]
    data.coco["images"][1]["width"] += 1
    data.write()
    for check_images in (False, True):  # what was registered without is checked then
        if check_images:
            with pytest.raises(InputError, match=r"2 of the 4 images .* do not exist"):
                register_coco_format("pets", data.json_file, data.image_root)
        else:
            register_coco_format("pets", data.json_file, data.image_root, check_images=False)
    records = DatasetCatalog.get("pets")
    assert [r["width"] for r in records] == [WIDTH, WIDTH + 1, 5, 0]
    assert [len(r["annotations"]) for r in records] == [1, 1, 0, 0]


def test_images_are_checked_unless_told_otherwise(data):
    (data.image_root / "1.png").unlink()
    data.write()
    with pytest.raises(InputError, match=r"1 of the 2 images .* do not exist"):
        read_coco(data.json_file, data.image_root)
    assert len(read_coco(data.json_file, data.image_root, check_images=False).boxes) == 2


def test_boxes_of_an_absent_image_without_size_are_kept(data, caplog):
    data.coco["annotations"] += [{**data.coco["annotations"][0], "id": 20 + i} for i in range(4)]
    (data.image_root / "1.png").unlink()
    for image in data.coco["images"]:
        del image["width"], image["height"]
    data.write()
    register_coco_format("pets", data.json_file, data.image_root, check_images=False)
    assert boxes_of("pets") == [[1] * 5, [0]]
    assert len(warnings(caplog)) == 1  # of the sizes


# What boxes and pixels look like


def test_placeholders_of_boxes_are_not_normalized(data, caplog):
    data.coco["annotations"] += [
        {**data.coco["annotations"][0], "id": 20 + i, "bbox": [0, 0, 0, 0]} for i in range(5)
    ]
    data.register()
    assert boxes_of("pets") == [[1], [0]]
    assert "boxes without area" in warnings(caplog)[0]


@pytest.mark.parametrize(
    ("value", "is_dark"), [(255, True), (4095, True), (4096, False), (65535, False)]
)
def test_few_of_16_bits(data, caplog, value, is_dark):
    for image in data.coco["images"]:
        pixels = np.full((HEIGHT, WIDTH), value, np.uint16)
        cv2.imwrite(str(data.image_root / image["file_name"]), pixels)
    data.register()
    messages = [m for m in warnings(caplog) if "nearly black. Scale the images up" in m]
    assert len(messages) == is_dark


# What is said of the images


def test_table_of_what_is_read_otherwise(data, caplog):
    for image in data.coco["images"]:
        image["file_name"] = f"photos/{image['file_name']}"
        del image["width"]
    cv2.imwrite(str(data.image_root / "2.png"), np.full((HEIGHT, WIDTH), 5000, np.uint16))
    data.register()
    (text,) = warnings(caplog)
    first, headers, _, *rows = (line.strip("|") for line in text.splitlines())
    assert first == f"{data.json_file} is used with these changes; the file stays as it is:"
    assert [cell.strip() for cell in headers.split("|")] == ["number", "what", "read as"]
    assert [[cell.strip() for cell in row.split("|")] for row in rows] == [
        ["2", "images not found by their file_name", "from the end of the path"],
        ["2", "images without size", "that of the image file"],
        ["1", "images of 16 bits", "8 bits: value / 256, as OpenCV does"],
    ]


def test_images_that_cannot_be_used(data):
    (data.image_root / "1.png").write_bytes(b"")
    Image.new("F", (WIDTH, HEIGHT)).save(data.image_root / "2.png", format="TIFF")
    assert data.error() == (
        f"2 of the 2 images of {data.json_file}, in {data.image_root}, cannot be used: "
        "1.png (it is not an image), 2.png (32 bits per channel, or signed ones: save it with 8). "
        "Replace them, or delete them from the file"
    )


# Where copies are kept


def test_a_copy_names_images_by_absolute_paths(data, monkeypatch):
    data.coco["annotations"][0]["id"] = 0
    data.write()
    monkeypatch.chdir(data.image_root.parent)
    register_coco_format("pets", data.json_file, data.image_root.name)
    metadata = MetadataCatalog.get("pets")
    copy = Path(metadata.json_file)
    assert copy.name.startswith("annotations-")
    assert copy.parent == Path(os.environ["FVCORE_CACHE"], "gfl_d2", "annotations")
    theirs = load_coco_json(metadata.json_file, metadata.image_root)
    assert all(Path(record["file_name"]).is_file() for record in theirs)


def test_a_cache_that_cannot_be_written(data, tmp_path, monkeypatch):
    data.coco["annotations"][0]["id"] = 0
    data.write()
    long = data.json_file.with_name("\u00fc" * 100 + ".json")
    data.json_file.rename(long)
    register_coco_format("pets", long, data.image_root)
    assert Path(MetadataCatalog.get("pets").json_file).name.startswith("\u00fc" * 50 + "-")
    monkeypatch.setattr(registration, "atomic_write", Mock(side_effect=PermissionError("no")))
    data.coco["annotations"][0]["id"] = -1
    data.coco["annotations"][0]["bbox"][0] += 1
    long.write_text(json.dumps(data.coco))
    with pytest.raises(InputError, match=r"cannot be written: no. \$FVCORE_CACHE names"):
        register_coco_format("pets", long, data.image_root)


# The real cause first


def test_different_classes_are_told_before_their_number(data, tmp_path):
    data.register("pets_train")
    other = Data(tmp_path / "other")
    other.coco["categories"].append({"id": 9, "name": "cow"})
    other.register("pets_val")
    with pytest.raises(InputError) as error:
        check_datasets(make_cfg(("pets_train",), ("pets_val",), num_classes=80))
    assert "'pets_train' and 'pets_val' must have the same classes" in str(error.value)
    assert "DATASETS.CLASSES ['cat', 'dog'] takes what both have" in str(error.value)


def test_crowds_alone_are_the_cause(data):
    for annotation, crowd in zip(data.coco["annotations"], ({"iscrowd": 1}, {"ignore": 1})):
        annotation.update(crowd)
    data.register()
    with pytest.raises(InputError, match="all 2 boxes are crowds"):
        check_datasets(make_cfg())


def test_a_test_set_without_annotations(data):
    data.coco["annotations"] = []
    data.register()
    check_datasets(make_cfg(), eval_only=True)
    assert "annotations" not in ground_truth("pets")


# Folders


def make_folder(folder, files, data):
    for file, images in files.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(json.dumps(data.coco))
        (folder / images).mkdir(parents=True, exist_ok=True)
        for path in data.image_root.iterdir():
            (folder / images / path.name).write_bytes(path.read_bytes())


@pytest.mark.parametrize(
    "files",
    [
        {"train/_annotations.coco.json": "train", "valid/_annotations.coco.json": "valid"},
        {
            "annotations/instances_train.json": "train",
            "annotations/instances_valid.json": "images/valid",
        },
        {
            "annotations/instances_train.json": "images",
            "annotations/instances_valid.json": "images",
        },
    ],
)
def test_a_folder_is_enough(data, tmp_path, files, monkeypatch):
    make_folder(tmp_path / "cells", files, data)
    monkeypatch.chdir(tmp_path)
    cfg = make_cfg(("cells_train",), ("cells_valid",), num_classes=0)
    cfg.merge_from_list(["DATASETS.REGISTER", "['cells/']"])
    register_datasets(cfg)
    check_datasets(resolve_num_classes(cfg))
    for name in ("cells_train", "cells_valid"):
        assert boxes_of(name) == [[1], [0]]
    assert MetadataCatalog.get("cells_valid").annotation_file == "cells/" + list(files)[1]


@pytest.mark.parametrize("order", [["cells", "cells_v2"], ["cells_v2", "cells"]])
def test_a_folder_whose_name_begins_with_another(data, tmp_path, order):
    make_folder(tmp_path / "cells", {"train/_annotations.coco.json": "train"}, data)
    make_folder(tmp_path / "cells_v2", {"val/_annotations.coco.json": "val"}, data)
    cfg = make_cfg(("cells_train",), ("cells_v2_val",))
    cfg.DATASETS.REGISTER = [str(tmp_path / name) for name in order]
    register_datasets(cfg)
    assert boxes_of("cells_train") == boxes_of("cells_v2_val") == [[1], [0]]


@pytest.mark.parametrize("empty", [False, True])
def test_a_folder_that_is_not_wanted_may_be_absent(data, tmp_path, empty):
    make_folder(tmp_path / "cells_v2", {"train/_annotations.coco.json": "train"}, data)
    if empty:
        (tmp_path / "cells").mkdir()
    cfg = make_cfg(("cells_v2_train",), ())
    cfg.DATASETS.REGISTER = [str(tmp_path / name) for name in ("cells", "cells_v2")]
    register_datasets(cfg)
    assert boxes_of("cells_v2_train") == [[1], [0]]


def test_a_folder_that_a_variable_names(data, tmp_path, monkeypatch):
    make_folder(tmp_path / "cells", {"train/_annotations.coco.json": "train"}, data)
    monkeypatch.setenv("CELLS", str(tmp_path / "cells"))
    cfg = make_cfg(("cells_train",), ())
    cfg.DATASETS.REGISTER = ["$CELLS"]
    register_datasets(cfg)
    assert boxes_of("cells_train") == [[1], [0]]


def test_a_folder_without_the_dataset(data, tmp_path):
    make_folder(tmp_path / "cells", {"train/_annotations.coco.json": "train"}, data)
    cfg = make_cfg(("cells_train",), ("cells_val",))
    cfg.DATASETS.REGISTER = [str(tmp_path / "cells")]
    with pytest.raises(InputError, match="cells has no dataset 'cells_val', but cells_train"):
        register_datasets(cfg)
    (tmp_path / "cells" / "train" / "_annotations.coco.json").unlink()
    with pytest.raises(InputError, match=r"has neither train/_annotations\.coco\.json"):
        register_datasets(cfg)
    cfg.DATASETS.REGISTER = [str(tmp_path / "nowhere" / "cells")]
    with pytest.raises(InputError, match=r"no folder .*nowhere"):
        register_datasets(cfg)


# Paths of Windows


@pytest.mark.parametrize(
    "value",
    [
        r"[['a', 'C:\new\train.json', 'C:\Users\x']]",
        r"[['a', 'C:\\new\\train.json', 'C:\\Users\\x']]",
    ],
)
def test_backslashes_are_read_as_written(value):
    cfg = load_config(CONFIG, ["DATASETS.REGISTER", value])
    assert cfg.DATASETS.REGISTER == [["a", "C:\\new\\train.json", "C:\\Users\\x"]]


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (r"[['a', '\\server\share', 'D:\data\']]", ["a", r"\\server\share", "D:\\data\\"]),
        (r"[['it\'s', 'b', 'c']]", ["it's", "b", "c"]),
    ],
)
def test_more_backslashes(value, expected):
    (entry,) = load_config(CONFIG, ["DATASETS.REGISTER", value]).DATASETS.REGISTER
    assert entry == expected


def test_control_characters_in_a_path(tmp_path):
    config = tmp_path / "c.yaml"
    config.write_text('DATASETS: {REGISTER: [["a", "C:\\new.json", "b"]], TRAIN: ["a"]}')
    with pytest.raises(InputError, match=r"in which \\ begins a control character"):
        register_datasets(load_config(str(config)))


def test_read_coco_alone(data, caplog):
    caplog.set_level(logging.WARNING)
    data.write()
    read = read_coco(data.json_file, data.image_root)
    assert read.boxes.tolist() == [[2, 3, 10, 8]] * 2
    assert read.class_names == ["cat", "dog"]
    assert read.class_indices.tolist() == [1, 0]
    assert read.sizes.tolist() == [[WIDTH, HEIGHT]] * 2
    assert not warnings(caplog)
    register_coco_format("pets", data.json_file, data.image_root)
    assert DatasetCatalog.get("pets") == read.to_records()
