"""A sound small set in COCO format, ways to change it, and what can come of that."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

WIDTH, HEIGHT = 96, 64
IMAGES = range(4)
BOXES = range(8)  # two on each image: a cat, then a dog
SOUND_BOXES = [[(8, 48)[i % 2], 10 + 4 * (i // 2), 30, 24] for i in BOXES]
COLOURS = {1: (200, 80, 40), 2: (40, 120, 220)}


@dataclasses.dataclass(frozen=True)
class Reads:
    """
    The set is read. ``crowds`` and ``left_out`` are indices of annotations, ``boxes`` new boxes by
    index. ``notes`` are the lines of the summary: a word in it, and the number that it counts.
    ``warning`` is a pattern of a warning of its own. ``classes`` are those of the model; ``names``
    says how the class of an annotation is called, if not "cat" and "dog". ``notes`` None: any.
    ``files`` are the indices of the files that the images show,
    ``copies`` tells how often each box is there.
    """

    crowds: tuple = ()
    left_out: tuple = ()
    boxes: dict = dataclasses.field(default_factory=dict)
    notes: dict | None = dataclasses.field(default_factory=dict)
    warning: str = ""
    classes: tuple = ("cat", "dog")
    names: tuple = ("cat", "dog")
    files: tuple = tuple(IMAGES)
    copies: int = 1


@dataclasses.dataclass(frozen=True)
class Refused:
    """One line says why: a pattern. ``decoding``: at the latest when the image is decoded."""

    pattern: str
    decoding: bool = False


@dataclasses.dataclass(frozen=True)
class Variant:
    """``topic`` is what the change touches; those of different topics can be combined."""

    topic: str
    change: Callable[[CocoSet], None]
    outcome: Reads | Refused
    can_combine: bool = True


ABSENT = object()  # takes the place of a value
VARIANTS: dict[str, Variant] = {}


def add(topic: str, name: str, change, outcome: Reads | Refused, can_combine: bool = True) -> None:
    assert name not in VARIANTS
    VARIANTS[name] = Variant(topic, change, outcome, can_combine)


class CocoSet:
    """The sound set, which changes spoil before it is written."""

    def __init__(self, folder: Path):
        self.json_file = folder / "a.json"
        self.image_root = folder / "images"
        self.image_root.mkdir(parents=True)
        self.categories = [{"id": 1, "name": "cat"}, {"id": 2, "name": "dog"}]
        self.images, self.annotations = [], []
        for i in IMAGES:
            image = {"id": i + 1, "file_name": f"{i + 1}.png", "width": WIDTH, "height": HEIGHT}
            self.images.append(image)
            for category in (1, 2):
                self.annotations.append(
                    {
                        "id": len(self.annotations) + 1,
                        "image_id": i + 1,
                        "category_id": category,
                        "bbox": list(SOUND_BOXES[len(self.annotations)]),
                        "area": 720,
                        "iscrowd": 0,
                        "segmentation": [],
                    }
                )
            picture = Image.fromarray(np.full((HEIGHT, WIDTH, 3), 90, dtype=np.uint8))
            for a in self.annotations[-2:]:
                x, y, w, h = a["bbox"]
                box = (x, y, x + w - 1, y + h - 1)
                ImageDraw.Draw(picture).rectangle(box, COLOURS[a["category_id"]])
            picture.save(self.path(i))
        self.is_written = False

    def path(self, i: int) -> Path:
        return self.image_root / self.images[i]["file_name"]

    def to_text(self) -> str:
        """As json.dumps writes it: NaN and Infinity stand there as they do in real files."""
        kinds = ("images", "annotations", "categories")
        lists = {kind: getattr(self, kind) for kind in kinds}
        return json.dumps({kind: v for kind, v in lists.items() if v is not ABSENT})

    def write(self) -> None:
        if not self.is_written:
            self.json_file.write_text(self.to_text(), encoding="utf-8")

    def write_bytes(self, content: bytes) -> None:
        self.json_file.write_bytes(content)
        self.is_written = True


def put(kind: str, key: str, value, items: range | tuple | None = None):
    """A change that sets a key of all items, or of some, to a value or to what it gives."""

    def change(data: CocoSet) -> None:
        records = getattr(data, kind)
        for i in range(len(records)) if items is None else items:
            if value is ABSENT:
                del records[i][key]
            else:
                is_function = callable(value)
                records[i][key] = value(records[i]) if is_function else copy.deepcopy(value)

    return change


def in_turn(kind: str, key: str, values: list):
    """A change that gives each item the next value; ABSENT takes the key away."""

    def change(data: CocoSet) -> None:
        for i, value in enumerate(values):
            put(kind, key, value, (i,))(data)

    return change


def both(*changes):
    def change(data: CocoSet) -> None:
        for part in changes:
            part(data)

    return change


def set_list(kind: str, function):
    """A change that replaces a whole list by what a function makes of it."""
    return lambda data: setattr(data, kind, function(getattr(data, kind)))


def rename(new_name: Callable[[str], str], new_path: str = "{}", items: tuple = tuple(IMAGES)):
    """``file_name`` becomes ``new_name(old)``; the file is moved to ``new_path``."""

    def change(data: CocoSet) -> None:
        for i in items:
            old = data.images[i]["file_name"]
            path = data.image_root / new_path.format(old)
            path.parent.mkdir(parents=True, exist_ok=True)
            data.path(i).rename(path)
            data.images[i]["file_name"] = new_name(old)

    return change


def recode(suffix: str, convert: Callable[[Image.Image], Image.Image], **save):
    """The images are saved in another way."""

    def change(data: CocoSet) -> None:
        for i in IMAGES:
            with Image.open(data.path(i)) as image:
                image.load()
            data.path(i).unlink()
            data.images[i]["file_name"] = f"{i + 1}{suffix}"
            convert(image).save(data.path(i), **save)

    return change


def grey(dtype, factor: float):
    """A conversion to grey values of another type."""

    def convert(image: Image.Image) -> Image.Image:
        values = np.array(image.convert("L"), dtype=np.float64)
        return Image.fromarray((values * factor).astype(dtype))

    return convert


def turn(data: CocoSet, suffix: str = ".jpg") -> None:
    """The images are stored lying on their side, and EXIF says so."""
    exif = Image.Exif()
    exif[0x0112] = 6  # to be turned by 90 degrees to the right
    recode(suffix, lambda image: image.transpose(Image.Transpose.ROTATE_90), exif=exif)(data)


def spoil(i: int, content: Callable[[bytes], bytes]):
    """The bytes of an image file become others."""
    return lambda data: data.path(i).write_bytes(content(data.path(i).read_bytes()))


add("nothing", "sound", lambda data: None, Reads())
