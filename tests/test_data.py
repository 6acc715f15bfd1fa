import copy
import json
import os
import pickle
import signal

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import (
    DatasetCatalog,
    MapDataset,
    MetadataCatalog,
    build_detection_train_loader,
)
from detectron2.data import transforms as T
from detectron2.data.datasets import register_coco_instances
from PIL import Image

from gfl_d2 import add_gfl_config
from gfl_d2.data import (
    GFLDatasetMapper,
    check_datasets,
    load_training_dicts,
    loading,
    naming_images_of_dead_workers,
    register_coco_format,
    register_datasets,
)
from gfl_d2.data.images import cache_folder
from gfl_d2.errors import InputError, user_message

pytestmark = pytest.mark.usefixtures("clean_catalogs")

WIDTH, HEIGHT = 40, 30
# Category ids as in the wild: neither in order nor without gaps.
COCO = {
    "categories": [{"id": 7, "name": "dog"}, {"id": 3, "name": "cat"}],
    "images": [
        {"id": i, "file_name": f"{i}.png", "width": WIDTH, "height": HEIGHT} for i in (1, 2)
    ],
    "annotations": [
        {
            "id": 10 + i,
            "image_id": i,
            "category_id": category,
            "bbox": [2, 3, 10, 8],
            "area": 80,
            "iscrowd": 0,
        }
        for i, category in ((1, 7), (2, 3))
    ],
}


class Data:
    """A small dataset on disk, whose annotations a test can spoil."""

    def __init__(self, folder):
        self.folder = folder
        self.coco = copy.deepcopy(COCO)
        self.json_file = folder / "annotations.json"
        self.image_root = folder / "images"
        self.image_root.mkdir(parents=True)
        rng = np.random.default_rng(0)
        for image in self.coco["images"]:
            pixels = rng.integers(0, 256, (HEIGHT, WIDTH, 3), dtype=np.uint8)
            Image.fromarray(pixels).save(self.image_root / image["file_name"])

    def write(self):
        self.json_file.write_text(json.dumps(self.coco))

    def register(self, name="pets"):
        self.write()
        register_coco_format(name, self.json_file, self.image_root)

    def error(self) -> str:
        with pytest.raises(InputError) as error:
            self.register()
        assert "pets" not in DatasetCatalog
        assert str(self.json_file) in str(error.value)
        return str(error.value)


@pytest.fixture
def data(tmp_path) -> Data:
    return Data(tmp_path / "data")


def make_cfg(train=("pets",), test=("pets",), num_classes=2, register=()):
    cfg = get_cfg()
    add_gfl_config(cfg)
    cfg.MODEL.META_ARCHITECTURE = "GFL"
    cfg.MODEL.GFL.NUM_CLASSES = num_classes
    cfg.DATASETS.TRAIN, cfg.DATASETS.TEST = train, test
    cfg.DATASETS.REGISTER = [[str(item) for item in entry] for entry in register]
    return cfg


def warnings(caplog) -> list[str]:
    return [r.getMessage() for r in caplog.records if r.name.startswith("gfl_d2")]


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


def test_register_twice(data, tmp_path):
    data.register()
    data.register()
    (tmp_path / "elsewhere").mkdir()
    with pytest.raises(InputError, match=r"'pets' is registered twice.*elsewhere"):
        register_coco_format("pets", data.json_file, tmp_path / "elsewhere")


def test_names_of_detectron2_are_refused(data):
    data.write()
    with pytest.raises(InputError, match=r"'coco_2017_val' belongs to .* already registered"):
        register_coco_format("coco_2017_val", data.json_file, data.image_root)


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


@pytest.mark.parametrize("content", ["[]", "3", '{"images": {}}'])
def test_json_that_is_not_coco(data, content):
    data.json_file.write_text(content)
    with pytest.raises(InputError, match=r"not in COCO format: it has no list 'categories'"):
        register_coco_format("pets", data.json_file, data.image_root)


@pytest.mark.parametrize("kind", ["images", "categories"])
def test_missing_list(data, kind):
    del data.coco[kind]
    assert f"it has no list '{kind}'" in data.error()


@pytest.mark.parametrize(
    ("kind", "key"),
    [
        ("categories", "id"),
        ("categories", "name"),
        ("images", "id"),
        ("images", "file_name"),
        ("annotations", "image_id"),
        ("annotations", "category_id"),
        ("annotations", "bbox"),
    ],
)
def test_missing_key(data, kind, key):
    del data.coco[kind][1][key]
    message = data.error()
    assert f"item 1 of '{kind}'" in message
    assert f"lacks '{key}': add it" in message


@pytest.mark.parametrize("kind", ["images", "annotations", "categories"])
def test_item_of_wrong_type(data, kind):
    data.coco[kind][1] = 5
    assert f"item 1 of '{kind}' is not an object, but 5: correct or delete it" in data.error()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        ("images", "image id 1 occurs twice, for 1.png (40x30) and 2.png (40x30): give each an id"),
        ("categories", "category id 7 occurs twice, for 'dog' and 'cat'"),
    ],
)
def test_repeated_id(data, kind, message):
    first, second = data.coco[kind]
    second["id"] = first["id"]
    assert message in data.error()


@pytest.mark.parametrize("kind", ["image", "category"])
def test_id_of_wrong_type(data, kind):
    data.coco[{"image": "images", "category": "categories"}[kind]][0]["id"] = [1]
    assert f"{kind} id [1] is neither a number nor a text" in data.error()


def test_no_categories(data):
    data.coco["categories"] = []
    assert "has no categories" in data.error()


def test_unknown_image(data):
    data.coco["annotations"][0]["image_id"] = 99
    message = data.error()
    assert "annotation 11 (image 99, unknown; category 7) is of unknown image 99" in message
    assert "known: 1, 2. Add the image, or delete the annotation" in message


@pytest.mark.parametrize("category_id", [5, [7], None])
def test_unknown_category(data, category_id):
    data.coco["annotations"][1]["category_id"] = category_id
    message = data.error()
    assert f"category {category_id!r}) is of unknown category {category_id!r}" in message
    assert "annotation 12 (image 2, 2.png;" in message
    assert "known: 3, 7. Add the category" in message


@pytest.mark.parametrize(
    "bbox",
    [
        [1, 2, 3],
        [1, 2, 3, 4, 5],
        [1, 2, float("nan"), 4],
        [float("inf"), 2, 3, 4],
        [1, 2, 10**400, 4],
        [1, 2, True, 4],
        [1, 2, None, 4],
        [1, 2, "3", 4],
        {"x": 1},
        [],
    ],
)
def test_bbox_that_is_not_four_numbers(data, bbox):
    data.coco["annotations"][1]["bbox"] = bbox
    message = data.error()
    assert "annotation 12 (image 2, 2.png; category 3) has bbox" in message
    assert "not four finite numbers x, y, width, height: correct or delete" in message


@pytest.mark.parametrize("bbox", [[5, 5, -1, 4], [5, 5, 4, -1]])
def test_negative_bbox(data, bbox):
    data.coco["annotations"][0]["bbox"] = bbox
    message = data.error()
    assert f"annotation 11 (image 1, 1.png; category 7) has bbox {bbox}" in message
    assert "negative width or height" in message


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


# Mapper


def test_mapper_names_a_missing_image(data):
    data.register()
    record = DatasetCatalog.get("pets")[0]
    os.remove(record["file_name"])
    with pytest.raises(InputError, match=r"image .*1\.png: no such file"):
        GFLDatasetMapper(make_cfg(), is_train=True)(record)


@pytest.mark.parametrize("suffix", ["png", "jpg"])
@pytest.mark.parametrize("is_train", [True, False])
def test_mapper_names_a_truncated_image(data, suffix, is_train):
    data.register()
    record = DatasetCatalog.get("pets")[0]
    record["file_name"] = str(data.image_root / f"cut.{suffix}")
    Image.open(data.image_root / "1.png").save(record["file_name"])
    with open(record["file_name"], "r+b") as file:
        file.truncate(os.path.getsize(record["file_name"]) // 2)
    with pytest.raises(InputError) as error:
        GFLDatasetMapper(make_cfg(), is_train)(record)
    assert str(error.value).startswith(f"Cannot read image {record['file_name']}: ")
    assert len(str(error.value)) < 300


@pytest.mark.parametrize("content", [b"", b"this is no image"])
def test_a_file_that_is_no_image(data, content):
    data.register()
    record = DatasetCatalog.get("pets")[0]
    (data.image_root / "1.png").write_bytes(content)
    with pytest.raises(InputError, match=r"1\.png: it is not an image$"):
        GFLDatasetMapper(make_cfg(), is_train=True)(record)
    with pytest.raises(
        InputError, match=r"1 of the 2 images .* 1\.png \(it is not an image\)\. Replace"
    ):
        register_coco_format("again", data.json_file, data.image_root)


def test_mapper_names_an_image_of_another_size(data):
    data.register()
    Image.new("RGB", (12, 34)).save(data.image_root / "1.png")
    with pytest.raises(InputError, match=r"1\.png, got \(12, 34\), expect \(40, 30\)"):
        GFLDatasetMapper(make_cfg(), is_train=True)(DatasetCatalog.get("pets")[0])


def test_message_survives_a_worker_process(data):
    data.register()
    records = DatasetCatalog.get("pets")
    for record in records:
        os.remove(record["file_name"])
    cfg = make_cfg()
    cfg.DATALOADER.NUM_WORKERS = 1
    cfg.SOLVER.IMS_PER_BATCH = 1
    mapper = GFLDatasetMapper(cfg, is_train=True)
    loader = build_detection_train_loader(cfg, mapper=mapper, dataset=records)
    with pytest.raises(InputError) as error:
        next(iter(loader))
    message = str(error.value)
    assert message.startswith("Cannot read image ")
    assert message.endswith("no such file")


class DyingMapper(GFLDatasetMapper):
    """Killed at the second image, as when the memory is full."""

    def __call__(self, record):
        super().__call__(record)
        if record["file_name"].endswith("2.png"):
            os.kill(os.getpid(), signal.SIGKILL)
        return record


def test_a_worker_that_dies_names_its_image(data):
    data.register()
    loader = torch.utils.data.DataLoader(
        MapDataset(DatasetCatalog.get("pets"), DyingMapper(make_cfg(), is_train=False)),
        batch_size=None,
        num_workers=1,
    )
    message = r"DataLoader worker .* It was at \S+2\.png: is that"
    with pytest.raises(InputError, match=message), naming_images_of_dead_workers():
        list(loader)
    assert os.listdir(cache_folder("workers")) == []
    with pytest.raises(RuntimeError, match=r"^other$"), naming_images_of_dead_workers():
        raise RuntimeError("other")


def test_messages_are_one_line():
    error = InputError("A: b\nc\0\ud800")
    assert str(error) == r"A: b\nc\x00\ud800"
    assert str(InputError(error)) == str(pickle.loads(pickle.dumps(error))) == str(error)
    assert len(str(InputError("x" * 10**5 + "remedy"))) < 1500
    assert str(InputError("x" * 10**5 + "remedy")).endswith("remedy")
    assert user_message(KeyError("x")) == "'x'"


class CornerPixel:
    """Which corner the one bright pixel of an image is in, after the mapper's augmentations."""

    def __init__(self, cfg):
        self.augmentations = GFLDatasetMapper(cfg, is_train=True).augmentations

    def __call__(self) -> tuple[int, int]:
        image = np.zeros((40, 60, 3), dtype=np.uint8)
        image[0, 0] = 255
        augmented = T.AugInput(image)
        self.augmentations(augmented)
        y, x = np.argwhere(augmented.image[:, :, 0])[0]
        return int(y > 0), int(x > 0)


@pytest.mark.parametrize(
    ("flip", "corners"),
    [
        ("both", {(0, 0), (0, 1), (1, 0), (1, 1)}),
        ("horizontal", {(0, 0), (0, 1)}),
        ("vertical", {(0, 0), (1, 0)}),
        ("none", {(0, 0)}),
    ],
)
def test_flips(flip, corners):
    cfg = make_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (40,), flip
    cfg.freeze()
    np.random.seed(0)
    find_corner = CornerPixel(cfg)
    counts = {}
    for _ in range(400):
        corner = find_corner()
        counts[corner] = counts.get(corner, 0) + 1
    assert set(counts) == corners
    # Each equally likely: 400 / 4 with standard deviation 9, 400 / 2 with 10.
    assert all(abs(n - 400 / len(corners)) < 40 for n in counts.values())
    assert flip == cfg.INPUT.RANDOM_FLIP


def test_flips_move_boxes_with_the_image(data):
    data.register()
    cfg = make_cfg()
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.RANDOM_FLIP = (HEIGHT,), "both"
    mapper = GFLDatasetMapper(cfg, is_train=True)
    record = DatasetCatalog.get("pets")[0]
    pixels = np.asarray(Image.open(record["file_name"]))[:, :, ::-1]  # cfg's default is BGR
    x, y, w, h = map(int, record["annotations"][0]["bbox"])
    inside = {tuple(p) for p in pixels[y : y + h, x : x + w].reshape(-1, 3).tolist()}
    for _ in range(20):
        sample = mapper(record)
        x0, y0, x1, y1 = sample["instances"].gt_boxes.tensor[0].int().tolist()
        crop = sample["image"][:, y0:y1, x0:x1].permute(1, 2, 0).reshape(-1, 3)
        assert {tuple(p) for p in crop.tolist()} == inside


def test_no_augmentation_at_test_time():
    cfg = make_cfg()
    cfg.INPUT.RANDOM_FLIP = "both"
    augmentations = GFLDatasetMapper(cfg, is_train=False).augmentations.augs
    assert not any(isinstance(augmentation, T.RandomFlip) for augmentation in augmentations)
