"""What people's COCO-format files become: each variant of a sound set, and combinations."""

from __future__ import annotations

import tempfile
from pathlib import Path

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from hypothesis import given, settings
from hypothesis import strategies as st

from coco_checks import check_evaluation, check_read, check_records, check_refused, read, write
from coco_set import BOXES, IMAGES, VARIANTS, Reads, Refused
from gfl_d2.data import register_coco_format

pytestmark = pytest.mark.usefixtures("clean_catalogs")

READ = [name for name, variant in VARIANTS.items() if isinstance(variant.outcome, Reads)]
REFUSED = [name for name in VARIANTS if name not in READ]


@pytest.mark.parametrize("name", READ)
def test_variant_is_read(tmp_path, name):
    data = write([name], tmp_path / "set")
    outcomes = [VARIANTS[name].outcome]
    check_read(outcomes, data.json_file, data.image_root, tmp_path / "results")


@pytest.mark.parametrize("name", REFUSED)
def test_variant_is_refused(tmp_path, name):
    data = write([name], tmp_path / "set")
    check_refused(VARIANTS[name].outcome, data.json_file, data.image_root)


@pytest.mark.parametrize(
    "name, same",
    [
        ("png_grey16", "pixels_png_grey"),
        ("tif_grey16", "pixels_png_grey"),
        ("png_rgb16", "sound"),
        ("tif_rgb16", "sound"),
    ],
)
def test_values_of_16_bits_are_scaled(tmp_path, name, same):
    """As OpenCV does, by 256. Here they are those of 8 bits times 257."""
    sets = [write([variant], tmp_path / variant) for variant in (name, same)]
    actual, expected = (read(data.json_file, data.image_root)[2] for data in sets)
    assert np.array_equal(actual, expected)


TOPICS: dict[str, list[str]] = {}
for name in READ:
    if VARIANTS[name].can_combine:
        TOPICS.setdefault(VARIANTS[name].topic, []).append(name)


@st.composite
def combinations(draw) -> tuple[str, ...]:
    """At most one variant of each topic."""
    topics = draw(st.sets(st.sampled_from(sorted(TOPICS)), min_size=2))
    # In their order: images are renamed when they are recoded, and the file is encoded last.
    return tuple(draw(st.sampled_from(TOPICS[topic])) for topic in TOPICS if topic in topics)


@pytest.mark.slow
@settings(max_examples=60)
@given(names=combinations())
def test_combinations_are_read(names):
    with tempfile.TemporaryDirectory() as folder:
        data = write(names, Path(folder) / "set")
        outcomes = [VARIANTS[name].outcome for name in names]
        check_read(outcomes, data.json_file, data.image_root, Path(folder) / "results")


@pytest.mark.parametrize("wanted", [("dog",), ("dog", "cat")])
@pytest.mark.parametrize(
    "name", ["sound", "category_id_text", "category_without_boxes", "id_from_0"]
)
def test_some_classes(tmp_path, name, wanted):
    """Only the classes that are asked for, in that order."""
    data = write([name], tmp_path / "set")
    register_coco_format("some", data.json_file, data.image_root, wanted)
    assert MetadataCatalog.get("some").thing_classes == list(wanted)
    records = DatasetCatalog.get("some")
    objects = [a for record in records for a in record["annotations"]]
    assert sorted(wanted[a["category_id"]] for a in objects) == sorted(wanted * len(IMAGES))
    assert all(wanted[a["category_id"]] == ("cat", "dog")[a["bbox"][0] == 48] for a in objects)
    check_evaluation("some", records, tmp_path / "results")


def test_names_that_look_like_those_told_apart(tmp_path):
    data = write(["category_name_same"], tmp_path / "set")
    data.categories.append({"id": 3, "name": "cat (id 1)"})
    data.write()
    register_coco_format("alike", data.json_file, data.image_root)
    assert len(set(MetadataCatalog.get("alike").thing_classes)) == 3


@pytest.mark.parametrize("name", ["bbox_corners", "iscrowd_1", "category_order", "id_from_0"])
def test_corrected_file_is_read_anew(tmp_path, name):
    """Under the same name, and evaluated into the same folder."""
    data = write([name], tmp_path / "set")
    for text in (data.json_file.read_text(), write([], tmp_path / "other").to_text()):
        data.json_file.write_text(text)
        register_coco_format("again", data.json_file, data.image_root)
        check_evaluation("again", DatasetCatalog.get("again"), tmp_path / "results")
    check_records([Reads()], "again", DatasetCatalog.get("again"))


ALL = tuple(BOXES)
# What must come of each folder of coco_variants. Its set is the sound one, with images of its own.
FOLDERS = {
    "ann_id_missing": Reads(notes={"without id": 8}),
    "ann_id_repeat": Reads(notes={"repeat": 4}),
    "ann_id_string": Reads(notes={"ids": 8}),
    "ann_id_zero": Reads(notes={"ids": 1}),
    "area_missing": Reads(notes={"area": 8}),
    "area_negative": Reads(notes={"area": 8}),
    "area_null": Reads(notes={"area": 8}),
    "area_string": Reads(notes={"area": 8}),
    "bbox_1e400": Refused("annotation 1 .*bbox"),
    "bbox_xyxy": VARIANTS["bbox_corners"].outcome,
    "cat_dummy": Reads(classes=("objects", "cat", "dog")),
    "cat_dup_names": VARIANTS["category_name_same"].outcome,
    "cat_name_int": VARIANTS["category_name_numbers"].outcome,
    "cat_name_unicode": VARIANTS["category_name_unicode"].outcome,
    "crowd_all_1": Reads(crowds=ALL),
    "crowd_missing": Reads(notes={"iscrowd": 8}),
    "crowd_null_one": Reads(notes={"iscrowd": 1}),
    "crowd_string_0_half": Reads(notes={"iscrowd": 4}),
    "crowd_string_false": Reads(notes={"iscrowd": 8}),
    "enc_bom": Reads(
        classes=("chat noirâtre", "dog"), names=("chat noirâtre", "dog"), notes={"encoding": 1}
    ),
    "exif_json_has_stored_size": Refused("4 of the 4 images.*EXIF"),
    "fn_backslash": Reads(notes={"/ for": 4}),
    "fn_repeated": VARIANTS["name_repeated"].outcome,
    "ignore_null": Reads(),
    "ignore_one": Reads(crowds=(0,), notes={"ignore": 1}),
    "image_id_float": Reads(notes={"image ids": 4, "image_id": 8}),
    "img_png_grey16": Reads(notes={"16 bits": 4}),
    "img_tif_float": Refused(r"4 of the 4 images.*1\.tif.*32 bits"),
    "img_tif_grey12in16": Reads(notes={"16 bits": 4}),
    "img_tif_grey16": Reads(notes={"16 bits": 4}),
    "img_truncated": Refused(r"\.jpg", decoding=True),
    "img_zero_bytes": Refused(r"1 of the 4 images.*4\.jpg"),
    "many_objects": VARIANTS["many_objects"].outcome,
    "no_annotations_key": Reads(left_out=ALL, notes={"test set": 1}),
    "ok": Reads(),
    "size_missing": Reads(notes={"size": 4}),
    "size_one_off": Refused(r"1 of the 4 images.*4\.jpg.*97"),
}


IRRELEVANT = (
    "kp_nested kp_null kp_string seg_dict_empty_counts seg_dict_no_counts seg_dict_size_string "
    "seg_empty_polygon_all seg_empty_polygon_one seg_flat seg_nested_points seg_number "
    "seg_odd_numbers seg_string_text seg_two_points_half"
)
FOLDERS.update(dict.fromkeys(IRRELEVANT.split(), Reads()))


@pytest.mark.parametrize("name", sorted(FOLDERS))
def test_folder_of_variants(tmp_path, real_data, name):
    folder = real_data / "coco_variants" / name
    if not folder.is_dir():
        pytest.skip(f"no {folder}")
    if isinstance(FOLDERS[name], Refused):
        check_refused(FOLDERS[name], folder / "a.json", folder / "images")
    else:
        check_read([FOLDERS[name]], folder / "a.json", folder / "images", tmp_path)


def test_every_folder_of_variants_is_known(real_data):
    folders = {path.name for path in (real_data / "coco_variants").glob("*") if path.is_dir()}
    assert folders <= set(FOLDERS)
