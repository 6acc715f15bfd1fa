"""What a config says of data: folders, classes, their number; and data that changes."""

import json
import os
from pathlib import Path
from unittest.mock import Mock

import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import load_coco_json

from gfl_d2.config import load_config
from gfl_d2.data import (
    check_datasets,
    compare_classes,
    register_coco_format,
    register_datasets,
    registration,
    resolve_num_classes,
)
from gfl_d2.errors import InputError
from small_dataset import WIDTH, Data, boxes_of, make_cfg, warnings
from toy_training import CONFIG

pytestmark = pytest.mark.usefixtures("clean_catalogs")


@pytest.fixture
def data(tmp_path) -> Data:
    return Data(tmp_path / "data")


def ground_truth(name):
    return json.loads(Path(MetadataCatalog.get(name).json_file).read_text())


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


def test_boxes_of_an_absent_image_without_size_are_kept(data, caplog):
    data.coco["annotations"] += [{**data.coco["annotations"][0], "id": 20 + i} for i in range(4)]
    (data.image_root / "1.png").unlink()
    for image in data.coco["images"]:
        del image["width"], image["height"]
    data.write()
    register_coco_format("pets", data.json_file, data.image_root, check_images=False)
    assert boxes_of("pets") == [[1] * 5, [0]]
    assert len(warnings(caplog)) == 1  # of the sizes


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
