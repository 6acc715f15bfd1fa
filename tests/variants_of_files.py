"""Variants of the sound set in images, their names, ids and sizes, in categories and the file."""

from __future__ import annotations

import bz2
import gzip

import cv2
import numpy as np

from coco_set import (
    ABSENT,
    BOXES,
    HEIGHT,
    IMAGES,
    WIDTH,
    CocoSet,
    Reads,
    Refused,
    add,
    both,
    grey,
    in_turn,
    put,
    recode,
    rename,
    set_list,
    spoil,
    turn,
)

# Sizes of images

UNKNOWN_SIZES = {
    "missing": ABSENT, "null": None, "zero": 0, "x": "x", "negative": -1, "list": [96],
    "nan": np.nan,
}  # fmt: skip
for case, value in UNKNOWN_SIZES.items():
    for keys in (("width",), ("height",), ("width", "height")):
        name = f"size_{'_'.join(keys)}_{case}"
        change = both(*(put("images", key, value) for key in keys))
        add("size", name, change, Reads(notes={"size": 4}))
add("size", "size_one_missing", put("images", "width", ABSENT, (2,)), Reads(notes={"size": 1}))
for case, convert in {"text": str, "float": float, "text_float": lambda n: f"{n}.0"}.items():
    change = both(
        put("images", "width", convert(WIDTH)), put("images", "height", convert(HEIGHT))
    )  # fmt: skip
    add("size", f"size_{case}", change, Reads())


def mismatch(count: int, name: str, size: str = f"{WIDTH}.*{HEIGHT}", hint: str = "") -> Refused:
    return Refused(rf"{count} of the 4 images.*{name}.*{size}{hint}")


swap = both(put("images", "width", HEIGHT), put("images", "height", WIDTH))
add("size", "size_off_by_one", put("images", "width", 97, (3,)), mismatch(1, "4.png", "97"))
add("size", "size_text_off_by_one", put("images", "width", "97", (3,)), mismatch(1, "4.png", "97"))
resized = both(put("images", "width", 2 * WIDTH), put("images", "height", 2 * HEIGHT))
add("size", "size_of_originals", resized, mismatch(4, "1.png", hint=".*resized"))
add("size", "size_swapped", swap, mismatch(4, "1.png", hint=".*swap"))
add("size", "size_swapped_exif", both(turn, swap), mismatch(4, "1.jpg", hint=".*EXIF"))

# Pixels


def save_16_bits(suffix: str):
    """Colours of 16 bits, which Pillow does not write."""

    def change(data: CocoSet) -> None:
        for i in IMAGES:
            pixels = cv2.imread(str(data.path(i))).astype(np.uint16) * 257
            data.path(i).unlink()
            data.images[i]["file_name"] = f"{i + 1}{suffix}"
            cv2.imwrite(str(data.path(i)), pixels)

    return change


SCALED = Reads(notes={"16 bits": 4})
add("pixels", "png_grey16", recode(".png", grey(np.uint16, 257)), SCALED)
add("pixels", "tif_grey16", recode(".tif", grey(np.uint16, 257)), SCALED)
add("pixels", "tif_grey12in16", recode(".tif", grey(np.uint16, 16)), SCALED)
REFUSED_BITS = Refused(r"4 of the 4 images.*1\.tif.*32 bits")
add("pixels", "tif_grey32", recode(".tif", grey(np.int32, 257)), REFUSED_BITS)
add("pixels", "tif_float", recode(".tif", grey(np.float32, 1 / 255)), REFUSED_BITS)
MODES = {
    "png_grey": (".png", "L"), "png_bilevel": (".png", "1"), "png_palette": (".png", "P"),
    "png_rgba": (".png", "RGBA"), "png_grey_alpha": (".png", "LA"), "jpg_cmyk": (".jpg", "CMYK"),
    "jpg_grey": (".jpg", "L"), "jpg": (".JPG", "RGB"), "bmp": (".bmp", "RGB"),
    "webp": (".webp", "RGB"), "gif": (".gif", "P"), "tif": (".tiff", "RGB"),
}  # fmt: skip
for case, (suffix, mode) in MODES.items():
    # Not before the loop ends: mode must be that of its turn.
    convert = lambda image, mode=mode: image.convert(mode)  # noqa: E731
    add("pixels", f"pixels_{case}", recode(suffix, convert), Reads())
add("pixels", "png_rgb16", save_16_bits(".png"), Reads())  # Pillow scales colours itself
add("pixels", "tif_rgb16", save_16_bits(".tif"), Reads())
for suffix in (".jpg", ".png", ".tif", ".webp"):
    lying = lambda data, suffix=suffix: turn(data, suffix)  # noqa: E731
    add("pixels", f"exif_upright_sizes_{suffix[1:]}", lying, Reads())
add("pixels", "zero_bytes", spoil(3, lambda content: b""), Refused(r"1 of the 4 images.*4\.png"))
add("pixels", "no_image", spoil(3, lambda content: b"<html>"), Refused(r"4\.png.*not an image"))
OTHER_FILES = {
    "eps": (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 96 64\n", "PostScript"),
    "heic": (b"\0\0\0\x18ftypheic", "HEIC"),
    "tif_of_a_kind": (b"II*\0\x08\0\0\0\0\0", "TIFF file of a kind"),
}
for case, (content, pattern) in OTHER_FILES.items():
    change = spoil(3, lambda _, content=content: content)
    add("pixels", case, change, Refused(rf"1 of the 4 images.*4\.png.*{pattern}"))
for suffix in (".png", ".webp"):
    change = recode(suffix, lambda image: image, exif=b"Exif\0\0garbage!")
    add("pixels", f"exif_damaged_{suffix[1:]}", change, Reads())
placeholder = spoil(3, lambda content: b"version https://git-lfs.github.com/spec/v1\noid sha256:1")
add("pixels", "git_lfs", placeholder, Refused(r"4\.png.*git lfs pull"))
add(
    "pixels", "truncated", spoil(3, lambda content: content[: len(content) // 2]),
    Refused(r"4\.png", decoding=True),
)  # fmt: skip

# File names

TAIL, ALIKE = {"from the end": 4}, {"case or Unicode": 4}
NAMES = {
    "backslash": ("images\\{}", "images/{}", {"/ for": 4}),
    "backslash_to_root": ("images\\{}", "{}", TAIL),
    "escaped": ("a%20b%C3%A9 {}", "a bé {}", {"URL": 4}),
    "percent_is_meant": ("100%20 {}", "100%20 {}", {}),
    "absolute": ("/home/someone/set/images/{}", "{}", TAIL),
    "absolute_windows": ("C:\\Users\\new\\images\\{}", "{}", TAIL),
    "absolute_with_subfolder": ("/home/someone/set/sub/{}", "sub/{}", TAIL),
    "absolute_and_escaped": ("/my%20sets/images/a%20b {}", "a b {}", TAIL),
    "folder_repeated": ("images/{}", "{}", TAIL),
    "subfolder": ("sub/folder/{}", "sub/folder/{}", {}),
    "dot": ("./{}", "{}", {}),
    "url": ("https://example.org/images/{}", "{}", TAIL),
    "backslash_escaped": ("images%5C{}", "images/{}", {"URL": 4}),
    "label_studio": ("data/local-files/?d=images/{}", "{}", TAIL),
    "label_studio_windows": ("data/local-files/?d=images%5C{}", "{}", TAIL),
    "label_studio_without_folder": ("data/local-files/?d={}", "{}", TAIL),
    "url_query": ("https://example.org/images/{}?token=a%2Fb&v=1", "{}", TAIL),
    "query": ("{}?raw=true", "{}", {"without ?": 4}),
    "case": ("IMG_{}", "img_{}", ALIKE),
    "case_of_folder": ("Train/{}", "train/{}", ALIKE),
    "nfd_folder_on_disk": ("Pr\u00fcfung/a {}", "Pru\u0308fung/a {}", ALIKE),
    "nfd_on_disk": ("caf\u00e9 {}", "cafe\u0301 {}", ALIKE),
    "nfc_on_disk": ("cafe\u0301 {}", "caf\u00e9 {}", ALIKE),
    "parent": ("../images/{}", "{}", {}),
    "unicode": ("猫 é {}", "猫 é {}", {}),
}
for case, (name, path, notes) in NAMES.items():
    add("file name", f"name_{case}", rename(name.format, path), Reads(notes=notes))
mixed = both(
    rename("images\\{}".format, "images/{}", (0,)),
    rename("a%20{}".format, "a {}", (1,)),
    rename("/elsewhere/{}".format, "{}", (2,)),
)
same_file = lambda data: data.images[1].update(file_name=data.images[0]["file_name"])  # noqa: E731
add("file name", "name_repeated", same_file, Reads(files=(0, 0, 2, 3)))
add("file name", "name_several_ways", mixed, Reads(notes={"/ for": 1, "URL": 1, "from the end": 1}))


def missing(number: int, name: str) -> Refused:
    return Refused(rf"{number} of the 4 images.*{name}")


add("file name", "name_missing", put("images", "file_name", "9.png", (2,)), missing(1, r"9\.png"))
add("file name", "name_all_missing", put("images", "file_name", "x/9.png"), missing(4, r"x/9\.png"))
collision = in_turn("images", "file_name", ["/a/x/1.png", "/a/y/1.png", "3.png", "4.png"])
add("file name", "name_tails_collide", collision, missing(2, r"/a/x/1\.png.*/a/y/1\.png"))
collision = in_turn("images", "file_name", ["1.png", "/a/y/1.png", "3.png", "4.png"])
add("file name", "name_tail_is_another", collision, missing(1, r"/a/y/1\.png"))
collision = in_turn("images", "file_name", ["./1.png", "/a/y/1.png", "3.png", "4.png"])
add("file name", "name_tail_is_another_way", collision, missing(1, r"/a/y/1\.png"))
newline = put("images", "file_name", lambda image: image["file_name"] + "\n", (2,))
add("file name", "name_newline", newline, missing(1, r"3\.\w+\\n"))
for case, value in {"missing": ABSENT, "null": None, "empty": "", "number": 1, "list": []}.items():
    change = put("images", "file_name", value, (2,))
    add("file name", f"name_is_{case}", change, Refused("(image 3 |id 3).*file_name"))

# Ids of images


def set_image_ids(in_images: list, in_annotations: list):
    return both(
        in_turn("images", "id", in_images),
        in_turn("annotations", "image_id", [id for id in in_annotations for _ in range(2)]),
    )


IMAGE_IDS = {
    "from_0": ([0, 1, 2, 3], [0, 1, 2, 3], {}),
    "text": ([*"abcd"], [*"abcd"], {}),
    "digits": ([*"1234"], [*"1234"], {}),
    "zero_padded": (["001", "002", "003", "004"], ["001", "002", "003", "004"], {}),
    "float": ([1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0], {"image ids": 4, "image_id": 8}),
    "float_here": ([1.0, 2.0, 3.0, 4.0], [1, 2, 3, 4], {"image ids": 4}),
    "float_there": ([1, 2, 3, 4], [1.0, 2.0, 3.0, 4.0], {"image_id": 8}),
    "huge": ([10**18 + i for i in range(4)], [10**18 + i for i in range(4)], {}),
    "text_here": ([*"1234"], [1, 2, 3, 4], {"image_id": 8}),
    "text_there": ([1, 2, 3, 4], [*"1234"], {"image_id": 8}),
    "padded_here": (["01", "02", "03", "04"], [1, 2, 3, 4], {"image_id": 8}),
    "padded_there": ([1, 2, 3, 4], ["01", "02", "03", "04"], {"image_id": 8}),
    "text_float_there": ([1, 2, 3, 4], ["1.0", "2.0", "3.0", " 4"], {"image_id": 8}),
    "mixed": ([1, "b", 3.0, "4"], [1, "b", 3.0, "4"], None),
    "mixed_same_text": ([1, "1", 3, "3"], [1, "1", 3, "3"], None),
    "mixed_fractions": ([0.5, 1, "1.5", 2.5], [0.5, 1, "1.5", 2.5], None),
    "scalars": ([None, True, False, 1], [None, True, False, 1], None),
    "beyond_64_bits": ([10**30 + i for i in range(4)], [10**30 + i for i in range(4)], None),
    "unsorted": ([4, 2, 3, 1], [4, 2, 3, 1], {}),
}
for case, (here, there, notes) in IMAGE_IDS.items():
    add("image id", f"image_id_{case}", set_image_ids(here, there), Reads(notes=notes))
for case, value in {"list": [1], "dict": {}}.items():
    add("image id", f"image_id_is_{case}", put("images", "id", value, (2,)), Refused("image id"))
add(
    "image id",
    "image_id_missing",
    put("images", "id", ABSENT, (2,)),
    Refused("item 2 .*images.*id"),
)
add(
    "image id", "image_repeated", set_list("images", lambda items: items + items[:2]),
    Reads(notes={"images that repeat": 2}),
)  # fmt: skip
again = lambda items: [*items, *({**item, "width": 0} for item in items[:2])]  # noqa: E731
add(
    "image id", "image_repeated_without_size", set_list("images", again),
    Reads(notes={"images that repeat": 2}),
)  # fmt: skip
first = lambda items: [{**item, "height": 0} for item in items[:2]] + items  # noqa: E731
add(
    "image id", "image_repeated_with_size", set_list("images", first),
    Reads(notes={"images that repeat": 2}),
)  # fmt: skip
twice = Refused(r"image id 1 occurs twice, for 1\.\w+ .* and .*: give each")
add("image id", "image_id_twice", put("images", "id", 1, (1,)), twice)
UNKNOWN = {"unknown": 9, "null": None, "list": [1], "missing": ABSENT, "text": "x"}
for case, value in UNKNOWN.items():
    change = put("annotations", "image_id", value, (5,))
    add("image id", f"image_id_of_box_{case}", change, Refused(r"(annotation 6 |id 6\)).*image"))

# Categories


def set_category_ids(cat, dog, in_boxes=None):
    return both(
        in_turn("categories", "id", [cat, dog]),
        in_turn("annotations", "category_id", list(in_boxes or (cat, dog)) * 4),
    )


CATEGORY_IDS = {
    "from_0": (0, 1, None, {}),
    "far_apart": (7, 900, None, {}),
    "digits": ("1", "2", None, {"category ids": 2, "category_id": 8}),
    "digits_here": ("1", "2", (1, 2), {"category ids": 2}),
    "digits_there": (1, 2, ("1", "2"), {"category_id": 8}),
    "float": (1.0, 2.0, None, {"category ids": 2, "category_id": 8}),
    "text": ("z", "a", None, {"category ids": 2}),
    "negative": (-2, -1, None, {}),
    "beyond_64_bits": (10**30, 10**30 + 1, None, None),
}
for case, (cat, dog, there, notes) in CATEGORY_IDS.items():
    add("category", f"category_id_{case}", set_category_ids(cat, dog, there), Reads(notes=notes))
reverse = Reads(classes=("dog", "cat"))
add("category", "category_order", set_category_ids(2, 1), reverse)
CLASS_NAMES = {
    "numbers": ([1, 2], ("1", "2"), {"names": 2}),
    "unicode": (["猫", "chien é 🐶"], ("猫", "chien é 🐶"), {}),
    "same": (["cat", "cat"], ("cat (id 1)", "cat (id 2)"), {"same name": 2}),
    "spaces": ([" cat", "hot dog"], (" cat", "hot dog"), {}),
}
for case, (values, classes, notes) in CLASS_NAMES.items():
    outcome = Reads(classes=classes, names=classes, notes=notes)
    add("category", f"category_name_{case}", in_turn("categories", "name", values), outcome)
for case, value in {"missing": ABSENT, "null": None, "empty": "", "list": []}.items():
    change = put("categories", "name", value, (1,))
    add("category", f"category_name_{case}", change, Refused("(category 2 |id 2).*name"))
for case, value in {"null": None, "list": [], "missing": ABSENT}.items():
    change = put("categories", "id", value, (1,))
    add("category", f"category_id_{case}", change, Refused("category id|item 1 .*categories.*id"))
add("image id", "images_empty", set_list("images", lambda items: []), Refused("image"))
more = [{"id": 0, "name": "animals", "supercategory": "none"}]
add(
    "category", "category_without_boxes", set_list("categories", lambda items: more + items),
    Reads(classes=("animals", "cat", "dog")),
)  # fmt: skip
add(
    "category", "categories_repeated", set_list("categories", lambda items: items + items[::-1]),
    Reads(notes={"repeat": 2}),
)  # fmt: skip
add("category", "category_id_twice", put("categories", "id", 1, (1,)), Refused("id 1 .*twice"))
add("category", "category_extra", put("categories", "skeleton", None), Reads())
for case, value in {"empty": [], "missing": ABSENT, "null": None, "dict": {"1": "cat"}}.items():
    change = set_list("categories", lambda items, value=value: value)
    add("category", f"categories_{case}", change, Refused("categories"))
for case, value in UNKNOWN.items():
    change = put("annotations", "category_id", value, (5,))
    add("category", f"category_of_box_{case}", change, Refused(r"(annotation 6 |id 6\)).*category"))

# The file

ENCODINGS = {"bom": "utf-8-sig", "utf_16": "utf-16", "utf_16_le": "utf-16-le"}
for case, encoding in ENCODINGS.items():

    def change(data: CocoSet, encoding=encoding) -> None:
        data.write_bytes(data.to_text().encode(encoding))

    add("file", f"file_{case}", change, Reads(notes={"encoding": 1}))
cut = lambda data: data.write_bytes(data.to_text().encode()[:-9])  # noqa: E731
add("file", "file_truncated", cut, Refused("JSON"))
again = lambda data: data.write_bytes(data.to_text().encode()[:-1] + b', "annotations": []}')  # noqa: E731
add("file", "file_list_twice", again, Refused("'annotations' 2 times: join them"))
NO_FILES = {
    "empty": (b"", "JSON: it is empty"),
    "blank": (b" \n", "JSON: it is empty"),
    "list": (b"[]", "COCO format"),
    "number": (b"1", "COCO format"),
    "latin": (b'{"images": "\xe9"}', "JSON.*UTF-8"),
    "bz2": (bz2.compress(b"{}"), "JSON.*bunzip2"),
    "gzip": (gzip.compress(b"{}"), "JSON.*gunzip"),
    "git_lfs": (b"version https://git-lfs.github.com/spec/v1\noid sha256:1", "JSON.*git lfs pull"),
    "xml": (b"<annotation></annotation>", "JSON.*XML"),
    "json_lines": (b'{"image_id": 1}\n{"image_id": 2}', "JSON.*several"),
    "python": (b"{'images': []}", "JSON.*line 1"),
}
for case, (content, pattern) in NO_FILES.items():
    change = lambda data, content=content: data.write_bytes(content)  # noqa: E731
    add("file", f"file_{case}", change, Refused(pattern))
NO_BOXES = Reads(left_out=tuple(BOXES), notes={"test set": 1})
for case, value in {"missing": ABSENT, "null": None, "empty": []}.items():
    change = set_list("annotations", lambda items, value=value: value)
    add("bbox", f"annotations_{case}", change, NO_BOXES, can_combine=False)
for case, value in {"dict": {}, "text": "none"}.items():
    change = set_list("annotations", lambda items, value=value: value)
    add("bbox", f"annotations_{case}", change, Refused("annotations"))
for kind in ("images", "annotations", "categories"):
    for case, item in {"null": None, "text": "cat", "list": list(range(1000))}.items():
        change = set_list(kind, lambda items, item=item: [*items, item])
        add("file", f"item_of_{kind}_{case}", change, Refused(f"item . of '{kind}'.*correct"))
add("file", "images_missing", set_list("images", lambda items: ABSENT), Refused("images"))
