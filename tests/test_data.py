"""Datasets: registration, files that are not sound, and checks against the config."""

import os

import pytest
from detectron2.data import (
    DatasetCatalog,
    MetadataCatalog,
)
from detectron2.data.datasets import register_coco_instances

from gfl_d2.data import (
    GFLDatasetMapper,
    check_datasets,
    load_training_dicts,
    loading,
    register_coco_format,
    register_datasets,
    registration,
)
from gfl_d2.errors import InputError
from small_dataset import COCO, HEIGHT, WIDTH, Data, make_cfg, warnings

pytestmark = pytest.mark.usefixtures("clean_catalogs")


@pytest.fixture
def data(tmp_path) -> Data:
    return Data(tmp_path / "data")


# Registration


def test_register_sets_metadata_at_once_and_loads(data):
    data.register()
    metadata = MetadataCatalog.get("pets")
    assert metadata.thing_classes == ["cat", "dog"]
    assert metadata.evaluator_type == "coco"
    assert metadata.json_file == str(data.json_file)
    assert metadata.image_root == str(data.image_root)

    records = DatasetCatalog.get("pets")
    assert [r["file_name"] for r in records] == [str(data.image_root / f"{i}.png") for i in (1, 2)]
    assert [r["annotations"][0]["category_id"] for r in records] == [1, 0]
    assert metadata.thing_dataset_id_to_contiguous_id == {3: 0, 7: 1}


def test_register_twice(data, tmp_path, monkeypatch):
    data.register()
    monkeypatch.setattr(registration, "read_coco", lambda *args: pytest.fail("read again"))
    data.register()
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(InputError) as error:
        register_coco_format("pets", data.json_file, tmp_path / "elsewhere")
    assert str(error.value) == (
        f"Dataset 'pets' is registered twice, with {data.json_file} and {data.image_root}, then "
        f"with {data.json_file} and {tmp_path / 'elsewhere'}: choose another name"
    )


def test_names_of_detectron2_are_refused(data):
    data.write()
    with pytest.raises(InputError) as error:
        register_coco_format("coco_2017_val", data.json_file, data.image_root)
    assert str(error.value) == (
        "The name 'coco_2017_val' belongs to a dataset that is already registered, by Detectron2 "
        "or by other code: choose another"
    )


def test_real_photographs(real_data):
    folder = real_data / "coco_sample"
    register_coco_format(
        "sample", folder / "annotations" / "instances_val2017.json", folder / "val2017"
    )
    assert len(MetadataCatalog.get("sample").thing_classes) == 80
    records = DatasetCatalog.get("sample")
    assert (len(records), sum(len(r["annotations"]) for r in records)) == (57, 517)
    check_datasets(make_cfg(("sample",), ("sample",), num_classes=80))
    sample = GFLDatasetMapper(make_cfg(), is_train=True)(records[0])
    assert len(sample["instances"]) == sum(not a["iscrowd"] for a in records[0]["annotations"])


# Files that are not sound


def test_missing_json(data):
    with pytest.raises(InputError, match=r"annotations\.json: no such file"):
        register_coco_format("pets", data.json_file, data.image_root)


@pytest.mark.parametrize("content", [b"", b'{"images": [', b"\xff\xfe\x00", b'{"images": [1,]}'])
def test_malformed_json(data, content):
    data.json_file.write_bytes(content)
    with pytest.raises(InputError, match=r"annotations\.json cannot be read as JSON: .+"):
        register_coco_format("pets", data.json_file, data.image_root)


@pytest.mark.parametrize("content", [b"<a/>", b"\n <!DOCTYPE html>"])
def test_xml(data, content):
    data.json_file.write_bytes(content)
    with pytest.raises(InputError, match=r"cannot be read as JSON: it is XML or HTML; docs/data"):
        register_coco_format("pets", data.json_file, data.image_root)


@pytest.mark.parametrize("size", [0, -3, None, "wide", float("nan")])
def test_image_size_that_is_none_is_read_from_the_image(data, size):
    data.coco["images"][1]["width"] = size
    data.register()
    assert [r["width"] for r in DatasetCatalog.get("pets")] == [WIDTH, WIDTH]


def test_missing_images(data):
    data.coco["images"] += [
        {"id": i, "file_name": f"sub/{i}.png", "width": 4, "height": 4} for i in range(3, 10)
    ]
    message = data.error()
    assert "7 of the 9 images" in message
    assert str(data.image_root / "sub" / "3.png") in message
    assert "and 2 more. Correct the folder of the images, or the file names" in message


def test_image_in_a_folder_below(data):
    (data.image_root / "sub").mkdir()
    (data.image_root / "2.png").rename(data.image_root / "sub" / "2.png")
    # Written carelessly, but every system finds the file.
    data.coco["images"][1]["file_name"] = "./sub//2.png"
    data.register()


def test_missing_image_folder(data):
    data.write()
    with pytest.raises(InputError, match=r"nowhere, which must have the images of .*json, is not"):
        register_coco_format("pets", data.json_file, data.folder / "nowhere")


@pytest.mark.parametrize(
    "bbox", [[5, 5, 0, 4], [5, 5, 4, 0], [WIDTH, 5, 4, 4], [-9, 5, 9, 4], [5, HEIGHT + 2, 4, 4]]
)
def test_boxes_without_area_are_left_out(data, caplog, bbox):
    data.coco["annotations"].append({**COCO["annotations"][0], "id": 13, "bbox": bbox})
    data.register()
    (warning,) = warnings(caplog)
    assert warning.startswith(f"{data.json_file} is used with these changes")
    assert f"(first: {[float(x) for x in bbox]} of {data.image_root}" in warning
    assert [len(r["annotations"]) for r in DatasetCatalog.get("pets")] == [1, 1]


@pytest.mark.parametrize("bbox", [[3, 3, 0, 0], [400, 300, 4, 4]])
def test_no_box_with_area(data, bbox):
    """Else it would be evaluated as a test set whose annotations nobody has."""
    for annotation in data.coco["annotations"]:
        annotation["bbox"] = bbox
    message = data.error()
    assert "none of its 2 boxes has an area" in message
    assert f"first: [{bbox[0]}.0, {bbox[1]}.0, " in message and "1.png" in message


def test_box_partly_outside_is_kept(data, caplog):
    data.coco["annotations"][0].update(bbox=[-4, -4, 5, 5], area=25)
    data.register()
    assert warnings(caplog) == []
    assert [len(r["annotations"]) for r in DatasetCatalog.get("pets")] == [1, 1]


# Registration from a config


def test_register_from_command_line(data, monkeypatch):
    data.write()
    monkeypatch.chdir(data.folder)
    cfg = make_cfg()
    cfg.merge_from_list(["DATASETS.REGISTER", "[['pets','annotations.json','images']]"])
    register_datasets(cfg)
    check_datasets(cfg)
    assert len(DatasetCatalog.get("pets")) == 2


@pytest.mark.parametrize("variable", ["DETECTRON2_DATASETS", None])
def test_relative_to_the_datasets_folder(data, monkeypatch, tmp_path, variable):
    data.write()
    root = tmp_path / "work" / "datasets"
    root.parent.mkdir()
    data.folder.rename(root)
    monkeypatch.delenv("DETECTRON2_DATASETS", raising=False)
    if variable:
        monkeypatch.setenv(variable, str(root))
    else:
        monkeypatch.chdir(root.parent)
    register_datasets(make_cfg(register=[["pets", "annotations.json", "images"]]))
    assert os.path.samefile(MetadataCatalog.get("pets").image_root, root / "images")


def test_current_directory_comes_first(data, monkeypatch, tmp_path):
    other = Data(tmp_path / "other")
    for folder in (data, other):
        folder.write()
    monkeypatch.setenv("DETECTRON2_DATASETS", str(other.folder))
    monkeypatch.chdir(data.folder)
    register_datasets(make_cfg(register=[["pets", "annotations.json", "images"]]))
    assert os.path.samefile(MetadataCatalog.get("pets").json_file, data.json_file)


def test_variables_and_home_in_paths(data, monkeypatch):
    data.write()
    monkeypatch.setenv("HOME", str(data.folder))
    monkeypatch.setenv("PETS", str(data.folder))
    register_datasets(make_cfg(register=[["pets", "$PETS/annotations.json", "~/images"]]))
    assert os.path.samefile(MetadataCatalog.get("pets").image_root, data.image_root)


def test_error_names_the_places_looked_in(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DETECTRON2_DATASETS", str(tmp_path / "sets"))
    with pytest.raises(InputError) as error:
        register_datasets(make_cfg(register=[["pets", "a.json", "images"]]))
    message = str(error.value)
    assert message.startswith("DATASETS.REGISTER, 'pets': no file 'a.json'")
    assert str(tmp_path / "a.json") in message
    assert str(tmp_path / "sets" / "a.json") in message


@pytest.mark.parametrize(
    "entry", [3, ["pets", "a.json"], ["pets", "a.json", 3], ["pets", "", "images"]]
)
def test_malformed_entry(entry):
    cfg = make_cfg()
    cfg.DATASETS.REGISTER = [entry]
    with pytest.raises(InputError) as error:
        register_datasets(cfg)
    assert "DATASETS.REGISTER must be a list of [name, json_file, image_root]" in str(error.value)
    assert repr(entry) in str(error.value)


def test_only_required_data_has_to_be_there(data):
    data.write()
    entries = [["pets", data.json_file, data.image_root], ["pets_train", "a.json", "images"]]
    cfg = make_cfg(train=("pets_train",), register=entries)
    register_datasets(cfg, cfg.DATASETS.TEST)
    assert "pets" in DatasetCatalog
    assert "pets_train" not in DatasetCatalog
    check_datasets(cfg, eval_only=True)
    with pytest.raises(InputError, match=r"'pets_train': no file 'a\.json'"):
        register_datasets(cfg)


# Checks against the config


@pytest.mark.parametrize("eval_only", [False, True])
@pytest.mark.parametrize("architecture", ["GFL", "RetinaNet"])
def test_number_of_classes(data, eval_only, architecture):
    data.register()
    cfg = make_cfg(num_classes=80)
    cfg.MODEL.META_ARCHITECTURE = architecture
    with pytest.raises(InputError) as error:
        check_datasets(cfg, eval_only)
    node = {"GFL": "GFL", "RetinaNet": "RETINANET"}[architecture]
    message = str(error.value)
    assert f"MODEL.{node}.NUM_CLASSES is 80, but dataset 'pets' has 2 classes" in message
    assert "cat, dog" in message
    assert ("DATASETS.CLASSES" in message) == eval_only  # the weights may be right


def test_number_of_classes_of_other_architectures_is_not_checked(data):
    data.register()
    cfg = make_cfg(num_classes=80)
    cfg.MODEL.META_ARCHITECTURE = "GeneralizedRCNN"
    check_datasets(cfg)


def test_unknown_name(data):
    data.register("pets_train")
    cfg = make_cfg(train=("pets_trian",), test=())
    cfg.DATASETS.REGISTER = [["other", "a.json", "images"], "folders/cells"]
    told = r"'pets_trian' is not registered; close names: pets_tra.*: here other, cells_<split>$"
    with pytest.raises(InputError, match=told):
        check_datasets(cfg)


@pytest.mark.parametrize(("eval_only", "key"), [(False, "TRAIN"), (True, "TEST")])
def test_no_dataset_named(eval_only, key):
    with pytest.raises(InputError, match=f"DATASETS.{key} names no dataset"):
        check_datasets(make_cfg(train=(), test=()), eval_only)


def test_missing_data_of_detectron2():
    # Its place was fixed when Detectron2 was imported.
    json_file = MetadataCatalog.get("coco_2017_val").json_file
    if os.path.exists(json_file):
        pytest.skip("COCO is there")
    with pytest.raises(InputError) as error:
        check_datasets(make_cfg(test=("coco_2017_val",), num_classes=80), eval_only=True)
    assert json_file in str(error.value)
    assert "'coco_2017_val'" in str(error.value)
    assert "DETECTRON2_DATASETS" in str(error.value)


def test_classes_of_train_and_test_must_agree(data, tmp_path):
    data.register("pets_train")
    other = Data(tmp_path / "other")
    other.coco["categories"] = [{"id": 3, "name": "dog"}, {"id": 7, "name": "cat"}]
    other.register("pets_val")
    cfg = make_cfg(("pets_train",), ("pets_val",))
    with pytest.raises(InputError, match=r"'pets_train' and 'pets_val' .* class 0 is 'cat'"):
        check_datasets(cfg)
    check_datasets(cfg, eval_only=True)


def test_dataset_without_images(data):
    data.coco["images"] = data.coco["annotations"] = []
    data.register()
    for eval_only in (False, True):
        with pytest.raises(InputError, match=r"'pets' is empty: .*annotations\.json has no images"):
            check_datasets(make_cfg(), eval_only)


def test_nothing_left_to_train_on(data):
    for annotation in data.coco["annotations"]:
        annotation["iscrowd"] = 1
    data.register()
    cfg = make_cfg()
    with pytest.raises(InputError, match=r"No image of .*'pets'.* has a box to train on .*\.json"):
        check_datasets(cfg)
    with pytest.raises(InputError, match=r"Dataset pets \(.*\.json\).*No valid data"):
        load_training_dicts(cfg)
    check_datasets(cfg, eval_only=True)
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
    check_datasets(cfg)
    assert len(load_training_dicts(cfg)) == 2


def test_one_image_with_boxes_is_enough(data):
    data.coco["annotations"][0]["bbox"] = [3, 3, 0, 0]
    data.register()
    check_datasets(make_cfg())
    assert [r["image_id"] for r in load_training_dicts(make_cfg())] == [2]


def test_dataset_of_other_code_that_knows_its_classes_late(data):
    def load():
        MetadataCatalog.get("late").thing_classes = ["cat", "dog", "cow"]
        return [{"annotations": []}]

    DatasetCatalog.register("late", load)
    with pytest.raises(InputError, match=r"'late' has 3 classes \(cat, dog, cow\)"):
        check_datasets(make_cfg(("late",), ()))


def test_an_error_in_a_users_own_dataset_keeps_its_traceback():
    """It is in no file that is read here."""

    def load():
        return [{"file_name": {}["file"], "annotations": []}]

    DatasetCatalog.register("own", load)
    with pytest.raises(KeyError) as error:
        load_training_dicts(make_cfg(("own",), ()))
    assert error.traceback[-1].name == "load"


def test_an_error_in_a_file_that_detectron2_reads(tmp_path):
    (tmp_path / "annotations.json").write_text('{"images": [], "categories": [')
    register_coco_instances("other", {}, str(tmp_path / "annotations.json"), str(tmp_path))
    with pytest.raises(InputError, match=r"Dataset other \(.*annotations\.json\) cannot be loaded"):
        load_training_dicts(make_cfg(("other",), ()))
    # Also where a script loads it.
    with pytest.raises(InputError, match=r"Dataset other .* cannot be loaded"), loading(["other"]):
        DatasetCatalog.get("other")


def test_an_error_that_says_what_is_wrong_stays_as_it_is():
    with pytest.raises(InputError, match=r"^results\.json is wrong$"), loading(["other"]):
        raise InputError("results.json is wrong")
