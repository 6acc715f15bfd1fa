"""What is said of a dataset that is read: boxes, sizes, pixels and classes that are not right."""

import logging

import cv2
import numpy as np
import pytest
from detectron2.data import DatasetCatalog
from PIL import Image

from gfl_d2.data import read_coco, register_coco_format
from gfl_d2.errors import InputError
from small_dataset import HEIGHT, WIDTH, Data, boxes_of, warnings

pytestmark = pytest.mark.usefixtures("clean_catalogs")


@pytest.fixture
def data(tmp_path) -> Data:
    return Data(tmp_path / "data")


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


# Classes


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


# All of it


def test_images_are_checked_unless_told_otherwise(data):
    (data.image_root / "1.png").unlink()
    data.write()
    with pytest.raises(InputError, match=r"1 of the 2 images .* do not exist"):
        read_coco(data.json_file, data.image_root)
    assert len(read_coco(data.json_file, data.image_root, check_images=False).boxes) == 2


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
