"""What is said of a file in COCO format: what is read otherwise than it is written, and refused."""

import json

import numpy as np
import pytest

from gfl_d2.data.coco_format import read_annotations
from gfl_d2.errors import InputError
from small_dataset import Data


@pytest.fixture
def data(tmp_path) -> Data:
    return Data(tmp_path / "data")


def update(kind, index=0, **values):
    """A change of an item; None deletes a key."""

    def change(coco):
        item = coco[kind][index]
        item.update(values)
        for key in [key for key, value in values.items() if value is None]:
            del item[key]

    return change


def repeat(kind, **values):
    return lambda coco: coco[kind].append({**coco[kind][0], **values})


def replace(kind, value):
    return lambda coco: coco.update({kind: value})


def set_ids(categories=None, images=None):
    """Of classes and images, and where annotations name them. The file has 7, 3 and 1, 2."""

    def change(coco):
        for kind, key, ids in (
            ("categories", "category_id", categories or {}),
            ("images", "image_id", images or {}),
        ):
            for item in coco[kind]:
                item["id"] = ids.get(item["id"], item["id"])
            for item in coco["annotations"]:
                item[key] = ids.get(item[key], item[key])

    return change


@pytest.mark.parametrize(
    ("changes", "note"),
    [
        # Classes
        ([repeat("categories")], (1, "categories that repeat another", "merged")),
        (
            [update("categories", id="7"), update("categories", 1, id=3.0)],
            (2, "category ids that are not written as integers", "integers"),
        ),
        (
            [set_ids(categories={7: "d", 3: "c"})],
            (2, "category ids that are text", "numbered from 1, as they come"),
        ),
        ([update("categories", name=5)], (1, "class names that are numbers", "text")),
        (
            [update("categories", name="cat")],
            (2, "categories of the same name", "told apart by their ids"),
        ),
        # Images
        ([repeat("images")], (1, "images that repeat another", "merged")),
        (
            [update("images", id=1.0)],
            (1, "image ids that are not written as integers", "integers"),
        ),
        ([set_ids(images={2: "b"})], (2, "image ids of several types", "text")),
        (
            [set_ids(images={2: "1"})],
            (2, "image ids of several types", "numbered from 1, as they come"),
        ),
        # Annotations
        (
            [replace("annotations", [])],
            (1, "file without annotations", "a test set: predictions, and no AP"),
        ),
        (
            [replace("annotations", None)],
            (1, "file without annotations", "a test set: predictions, and no AP"),
        ),
        (
            [update("annotations", image_id="1")],
            (1, "annotations whose image_id is of another type", "the image's"),
        ),
        (
            [update("annotations", image_id=1.0)],
            (1, "annotations whose image_id is not written as an integer", "integers"),
        ),
        (
            [set_ids(categories={7: "d", 3: "8"}), update("annotations", 1, category_id=8)],
            (2, "category ids that are text", "numbered from 1, as they come"),
        ),
        (
            [update("annotations", category_id="07")],
            (1, "annotations whose category_id is not written as an integer", "integers"),
        ),
        ([update("annotations", id=None)], (1, "annotations without id", "numbered from 1")),
        *(
            (
                [update("annotations", id=id)],
                (1, "annotation ids that are not integers from 1", "numbered from 1"),
            )
            for id in ("11", 0, 1.5, True)
        ),
        (
            [update("annotations", id=12)],
            (1, "annotation ids that repeat another", "numbered from 1"),
        ),
        ([update("annotations", ignore=1)], (1, "annotations with 'ignore'", "crowds")),
        ([update("annotations", iscrowd=None)], (1, "annotations without 'iscrowd'", "0")),
        *(
            (
                [update("annotations", **{key: value})],
                (1, f"annotations whose '{key}' is not written as 0 or 1", "0 or 1"),
            )
            for key, value in (("iscrowd", "0"), ("iscrowd", False), ("ignore", "0"))
        ),
        ([update("annotations", area=None)], (1, "annotations without 'area'", "width x height")),
        *(
            (
                [update("annotations", area=area)],
                (1, "annotations of wrong 'area'", "width x height"),
            )
            for area in (0, -1, 100, "80", 1e300, 10**400)
        ),
    ],
)
def test_what_is_noted(data, changes, note):
    for change in changes:
        change(data.coco)
    data.write()
    assert read_annotations(data.json_file).changes == [note]


@pytest.mark.parametrize(
    "changes",
    [
        [],
        [update("annotations", area=99)],  # 11 x 9: with the pixels of both edges
        [update("annotations", area=0.5)],  # of a mask
        [update("annotations", ignore=0)],
        [update("images", width=None)],
        [set_ids(images={1: "a", 2: "b"})],
    ],
)
def test_what_is_not_noted(data, changes):
    for change in changes:
        change(data.coco)
    data.write()
    assert read_annotations(data.json_file).changes == []


def test_encodings(data):
    data.json_file.write_bytes(json.dumps(data.coco).encode("utf-16"))
    changes = read_annotations(data.json_file).changes
    assert changes == [(1, "file in the encoding utf-16", "decoded")]


def test_what_is_read_of_odd_values(data):
    first, second = data.coco["annotations"]
    first.update(area=None, iscrowd="1")
    second.update(area=85, ignore=True, bbox=[2, 3, 10, -1e-7])
    data.coco["categories"][0]["name"] = "cat"
    data.coco["images"][1].update(width="41", height=29.5)
    data.write()
    read = read_annotations(data.json_file)
    assert read.category_ids == [3, 7]
    assert read.class_names == ["cat (id 3)", "cat (id 7)"]
    assert read.sizes.tolist() == [[40, 30], [41, 30]]
    assert np.array_equal(read.boxes, [[2, 3, 10, 8], [2, 3, 10, 0]])
    assert np.array_equal(read.areas, [80, 0])
    assert read.is_crowd.tolist() == [True, True]
    assert read.class_indices.tolist() == [1, 0]
    assert read.image_indices.tolist() == [0, 1]


def test_ids_that_are_numbered(data):
    for change in (set_ids(categories={7: "d", 3: "c"}), set_ids(images={2: "1"})):
        change(data.coco)
    data.write()
    read = read_annotations(data.json_file)
    assert (read.category_ids, read.class_names) == ([1, 2], ["dog", "cat"])
    assert (read.image_ids, read.file_names) == ([1, 2], ["1.png", "2.png"])
    assert read.class_indices.tolist() == read.image_indices.tolist() == [0, 1]


@pytest.mark.parametrize(
    ("width", "expected"), [(2**31 - 1, 2**31 - 1), (2**31, 0), (-1, 0), (0.5, 1), ("x", 0)]
)
def test_sizes(data, width, expected):
    data.coco["images"][0]["width"] = width
    data.write()
    assert read_annotations(data.json_file).sizes.tolist()[0] == [expected, 30]


def test_a_folder_is_no_file(data):
    with pytest.raises(InputError) as error:
        read_annotations(data.image_root)
    assert str(error.value).startswith(f"{data.image_root} cannot be read: ")


FIRST, SECOND = "annotation 11 (image 1, 1.png; category 7)", "annotation 12 (image 2, 2.png; "
REMEDY = "correct or delete that annotation"
TWICE = "give each an id of its own"


@pytest.mark.parametrize(
    ("change", "message"),
    [
        *(
            (
                update(kind, 1, **{key: None}),
                f"item 1 of '{kind}'{name} lacks '{key}': add it, or delete the item",
            )
            for kind, name, key in (
                ("categories", "", "id"),
                ("categories", " (id 3)", "name"),
                ("images", "", "id"),
                ("images", " (id 2)", "file_name"),
                ("annotations", " (id 12)", "image_id"),
                ("annotations", " (id 12)", "category_id"),
                ("annotations", " (id 12)", "bbox"),
            )
        ),
        *(
            (
                replace(kind, [5]),
                f"item 0 of '{kind}' is not an object, but 5: correct or delete it",
            )
            for kind in ("categories", "images", "annotations")
        ),
        (
            replace("annotations", ["x" * 99]),
            f"item 0 of 'annotations' is not an object, but '{'x' * 59}: correct or delete it",
        ),
        # Classes
        (replace("categories", []), "it has no categories: add the classes"),
        *(
            (
                update("categories", id=id),
                f"category id {id!r} is neither a number nor a text: correct it",
            )
            for id in ([1], 1.5, True)
        ),
        *(
            (
                update("categories", name=name),
                f"category 7 has no proper name, but {name!r}: correct it",
            )
            for name in ("", True, ["dog"])
        ),
        (
            update("categories", 1, id=7),
            f"category id 7 occurs twice, for 'dog' and 'cat': {TWICE}",
        ),
        # Images
        (update("images", id={}), "image id {} is neither a number nor a text: correct it"),
        (update("images", id=[]), "image id [] is neither a number nor a text: correct it"),
        (update("images", file_name=""), "image 1 has no proper file_name, but '': correct it"),
        (update("images", file_name=5), "image 1 has no proper file_name, but 5: correct it"),
        (
            update("images", 1, id=1),
            f"image id 1 occurs twice, for 1.png (40x30) and 2.png (40x30): {TWICE}",
        ),
        (
            repeat("images", width=41),
            f"image id 1 occurs twice, for 1.png (40x30) and 1.png (41x30): {TWICE}",
        ),
        # Annotations
        (
            update("annotations", image_id=99),
            "annotation 11 (image 99, unknown; category 7) is of unknown image 99; known: 1, 2. "
            "Add the image, or delete the annotation; 1 of 2 are like that",
        ),
        (
            update("annotations", image_id=[1]),
            "annotation 11 (image [1], unknown; category 7) is of unknown image [1]; known: 1, 2. "
            "Add the image, or delete the annotation; 1 of 2 are like that",
        ),
        *(
            (
                update("annotations", 1, category_id=id),
                f"{SECOND}category {id!r}) is of unknown category {id!r}; known: 3, 7. Add the "
                "category, or delete the annotation; 1 of 2 are like that",
            )
            for id in (5, [7], True)
        ),
        (
            lambda coco: coco["annotations"][1].update(category_id=None),
            f"{SECOND}category None) is of unknown category None; known: 3, 7. Add the category, "
            "or delete the annotation; 1 of 2 are like that",
        ),
        *(
            (
                update("annotations", 1, bbox=bbox),
                f"{SECOND}category 3) has bbox {str(bbox)[:60]}, not four finite numbers x, y, "
                f"width, height: {REMEDY}; 1 of 2 are like that",
            )
            for bbox in (
                [],
                [1, 2, 3],
                [1, 2, 3, 4, 5],
                [1, 2, float("nan"), 4],
                [float("inf"), 2, 3, 4],
                [1, 2, 10**400, 4],
                [1, 2, 1e150, 4],
                [1, 2, True, 4],
                [1, 2, None, 4],
                [1, 2, "3", 4],
                {"x": 1},
            )
        ),
        *(
            (
                update("annotations", bbox=bbox),
                f"{FIRST} has bbox {bbox}, of negative width or height: {REMEDY}",
            )
            for bbox in ([5, 5, -1, 4], [5, 5, 4, -1], [5, 5, 4, -2e-5])
        ),
        *(
            (
                update("annotations", **{key: value}),
                f"{FIRST} has '{key}' {str(value)[:60]}, neither 0 nor 1: {REMEDY}",
            )
            for key in ("iscrowd", "ignore")
            for value in (2, 0.5, [1], {}, [0] * 99)
        ),
    ],
)
def test_what_is_refused(data, change, message):
    change(data.coco)
    data.write()
    with pytest.raises(InputError) as error:
        read_annotations(data.json_file)
    assert str(error.value) == f"{data.json_file}: {message}"


@pytest.mark.parametrize(
    ("coco", "kind"),
    [
        ([], "categories"),
        (3, "categories"),
        ({"images": []}, "categories"),
        ({"categories": None}, "categories"),
        ({"categories": [{"id": 1, "name": "cat"}], "images": {}}, "images"),
    ],
)
def test_what_is_not_in_coco_format(data, coco, kind):
    data.coco = coco
    data.write()
    with pytest.raises(InputError) as error:
        read_annotations(data.json_file)
    assert str(error.value) == (
        f"{data.json_file} is not in COCO format: it has no list '{kind}'. docs/data.md tells how "
        "to convert other formats"
    )


def test_all_that_are_alike_are_counted(data):
    for annotation, image_id, bbox in zip(data.coco["annotations"], (98, 99), ([1], [2])):
        annotation.update(image_id=image_id, bbox=bbox)
    data.write()
    with pytest.raises(InputError, match=r"is of unknown image 98; .*; 2 of 2 are like that$"):
        read_annotations(data.json_file)
    for annotation in data.coco["annotations"]:
        annotation["image_id"] = 1
    data.write()
    with pytest.raises(InputError, match=r"has bbox \[1\], not .*; 2 of 2 are like that$"):
        read_annotations(data.json_file)


def test_an_annotation_without_id_is_named_by_its_place(data):
    del data.coco["annotations"][1]["id"]
    for image_id in (99, [1]):
        data.coco["annotations"][1]["image_id"] = image_id
        data.write()
        with pytest.raises(InputError) as error:
            read_annotations(data.json_file)
        name = f"item 1 of 'annotations' (image {image_id}, unknown; category 3)"
        assert str(error.value).startswith(f"{data.json_file}: {name} is of unknown image")
