"""The image files of a dataset: found, checked by their headers, and read."""

from __future__ import annotations

import collections
import concurrent.futures
import contextlib
import hashlib
import json
import logging
import os
import struct
import unicodedata
from collections.abc import Iterator, Sequence
from typing import IO, NamedTuple
from urllib.parse import unquote

import numpy as np
from detectron2.data import detection_utils
from detectron2.utils import comm
from detectron2.utils.file_io import PathManager
from iopath.common.file_io import get_cache_dir
from PIL import Image, ImageOps
from tqdm import tqdm

from ..errors import InputError, first_line
from ..files import atomic_write

__all__ = [
    "READ_ERRORS", "ImageHeader", "cache_folder", "find_images", "read_headers", "read_image",
    "refuse_programs", "to_array", "why_unreadable",
]  # fmt: skip

logger = logging.getLogger(__name__)

_ORIENTATION = 0x0112  # the EXIF tag
_TURNED = (5, 6, 7, 8)  # its values for pictures that lie on their side
_SIZE = (256, 257)  # the TIFF tags of the stored width and height
# Why an image cannot be read, where Pillow's own message is no good.
_REASONS = {
    FileNotFoundError: "no such file",
    Image.UnidentifiedImageError: "it is not an image",
}
# Pillow raises SyntaxError for some kinds of damage in PNG files.
READ_ERRORS = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)
# What files begin with, after some bytes, that are no images to Pillow, and what they are.
_BEGINNINGS = {
    (0, b"version https://git-lfs"): "it is a placeholder of Git LFS: run 'git lfs pull'",
    (4, b"ftyphei"): "it is in HEIC format: save it as JPEG or PNG",
    (4, b"ftypmif1"): "it is in HEIC format: save it as JPEG or PNG",
    (0, b"II*\0"): "it is a TIFF file of a kind that Pillow does not know: save it with 8 bits",
    (0, b"MM\0*"): "it is a TIFF file of a kind that Pillow does not know: save it with 8 bits",
}
# What may hold an orientation in a PNG file, also behind the pixels (where exiftool writes it).
_PNG_METADATA = (b"eXIf", b"iTXt", b"tEXt", b"zTXt")
_BATCH = 256
_CACHE_VERSION = 2  # another one where headers are read otherwise


class ImageHeader(NamedTuple):
    """What the head of an image file says."""

    width: int  # of the upright picture, in pixels
    height: int
    is_turned: bool  # by its EXIF orientation: width and height are the stored ones swapped
    bits: int  # of a channel: 8, 16 or 32


def cache_folder(name: str) -> str:
    """
    A folder for what can be made anew, under iopath's (``$FVCORE_CACHE``). OSError if it cannot be
    made.
    """
    folder = os.path.join(get_cache_dir(), "gfl_d2", name)
    os.makedirs(folder, exist_ok=True)
    return folder


def find_images(image_root: str, names: Sequence[str]) -> tuple[list[str | None], dict[str, int]]:
    r"""
    The paths of images from their ``file_name``. Where there is no such file, the name is tried
    with / for \, URL-decoded, without the query of a URL, and from its end, so that a path of
    another machine serves; at last, with other case or Unicode normalization, if only one file has
    such a name.

    Returns:
        list: a path for each name, None if there is no such file, or if what is there is that of
        another name too.
        dict: how many names were read in which other way.
    """
    folders = _Folders()
    paths, ways = [], []
    for name in names:
        tries = ((os.path.join(image_root, form), way) for form, way in _forms(name))
        path, way = next(((p, way) for p, way in tries if folders.has_file(p)), (None, ""))
        if path is None:
            alike = (folders.find_alike(image_root, form) for form, _ in _forms(name))
            path = next(filter(None, alike), None)
            way = "in another case or Unicode form" if path else ""
        paths.append(path)
        ways.append(way)
    claims = collections.defaultdict(set)
    for path, name in zip(paths, names):
        if path is not None:
            claims[os.path.abspath(path)].add(os.path.normpath(_decode(name)))
    for i, (path, way) in enumerate(zip(paths, ways)):
        if way and len(claims[os.path.abspath(path)]) > 1:
            paths[i], ways[i] = None, ""
    return paths, dict(collections.Counter(filter(None, ways)))


def _forms(name: str) -> Iterator[tuple[str, str]]:
    """What a file name may mean, the likeliest first, with what was done to it."""
    yield name, ""
    slashed = name.replace("\\", "/")
    yield slashed, "/ for \\"
    decoded = _decode(slashed)
    yield decoded, "URL-decoded"
    forms = dict.fromkeys((slashed, decoded))
    if "?" in slashed:
        value = decoded.rpartition("=")[2]
        yield value, "from the end of the path"
        bare = _decode(slashed.partition("?")[0])
        yield bare, "without ?..."
        forms[bare] = None
    for form in forms:
        parts = form.split("/")
        for start in range(1, len(parts)):
            yield "/".join(parts[start:]), "from the end of the path"


def _decode(name: str) -> str:
    return unquote(name).replace("\\", "/")


class _Folders:
    """Which files exist. Listing a folder of a network drive is faster than asking for each."""

    def __init__(self):
        self._names = {}
        self._alike = {}

    def has_file(self, path: str) -> bool:
        folder, name = os.path.split(path)
        return name in self._list(folder) or os.path.isfile(path)

    def find_alike(self, root: str, path: str) -> str | None:
        """The only file in ``root`` whose path differs in case or Unicode normalization alone."""
        found = root
        for name in os.path.normpath(path).split(os.sep):
            found = found and self._find_name(found, name)
        return found

    def _find_name(self, folder: str, name: str) -> str | None:
        if name in self._list(folder):
            return os.path.join(folder, name)
        if folder not in self._alike:
            self._alike[folder] = collections.defaultdict(list)
            for other in self._list(folder):
                self._alike[folder][_fold(other)].append(other)
        others = self._alike[folder].get(_fold(name), ())
        return os.path.join(folder, others[0]) if len(others) == 1 else None

    def _list(self, folder: str) -> set[str]:
        if folder not in self._names:
            try:
                self._names[folder] = set(os.listdir(folder))
            except (OSError, ValueError):  # a null character
                self._names[folder] = set()
        return self._names[folder]


def _fold(name: str) -> str:
    return unicodedata.normalize("NFC", unicodedata.normalize("NFC", name).casefold())


def read_headers(image_root: str, paths: Sequence[str]) -> list[ImageHeader | str]:
    """
    Read the headers of image files, in parallel. Those of files that have not changed since are
    remembered in :func:`cache_folder`.

    Returns:
        list: a header for each path, or why the file cannot be read, as text.
    """
    source = repr((os.path.abspath(image_root), ImageHeader._fields, _CACHE_VERSION))
    key = hashlib.blake2b(source.encode(), digest_size=12).hexdigest()
    cache_name = f"{key}.json"
    try:
        with open(os.path.join(cache_folder("images"), cache_name), encoding="utf-8") as file:
            known = json.load(file)
    except (OSError, ValueError):
        known = {}
    known = known if isinstance(known, dict) else {}
    batches = [paths[i : i + _BATCH] for i in range(0, len(paths), _BATCH)]
    results = []
    show = len(paths) > 2000 and comm.is_main_process()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        tasks = pool.map(lambda batch: [_read_header(path, known) for path in batch], batches)
        with tqdm(total=len(paths), desc="Image headers", disable=not show) as progress:
            for batch in tasks:
                results += batch
                progress.update(len(batch))
    new = {path: entry for path, entry in zip(paths, results) if not isinstance(entry, str)}
    if any(known.get(path) != entry for path, entry in new.items()):
        try:
            with atomic_write(os.path.join(cache_folder("images"), cache_name), "w") as file:
                file.write(json.dumps({**known, **new}))
        except OSError as error:  # they are read again the next time
            logger.warning(f"The headers of images cannot be kept: {error}")
    return [e if isinstance(e, str) else ImageHeader(*e[2:]) for e in results]


def _read_header(path: str, known: dict[str, list]) -> list | str:
    """[time of the last change, bytes, *header], or why there is none."""
    try:
        stat = os.stat(path)
        state = [stat.st_mtime_ns, stat.st_size]
        entry = known.get(path)
        if entry is not None and entry[:2] == state:
            return entry
        with Image.open(path) as image:
            refuse_programs(image)
            # The size of a TIFF file is that of the upright picture in some versions of Pillow.
            is_tiff = image.format == "TIFF"
            width, height = (image.tag_v2[tag] for tag in _SIZE) if is_tiff else image.size
            is_turned = _orientation(image) in _TURNED
            size = (height, width) if is_turned else (width, height)
            return [*state, *size, is_turned, _bits(image)]
    except READ_ERRORS as error:
        return why_unreadable(error, path)


def refuse_programs(image: Image.Image) -> None:
    """
    To be called before the pixels are read: Pillow has another program, Ghostscript, execute what
    is in an EPS file. Raises ValueError, one of READ_ERRORS.
    """
    if image.format == "EPS":
        raise ValueError("it is a program in PostScript: save it as PNG")


def _orientation(image: Image.Image) -> int | None:
    """What the EXIF data say; damaged ones say nothing, as in Detectron2."""
    try:
        if image.format == "PNG" and _has_metadata_behind_pixels(image.fp):
            image.load()  # what is behind the pixels is read with them
        # PngImageFile.getexif would decode the pixels of every file.
        return Image.Image.getexif(image).get(_ORIENTATION)
    except Exception:  # of many kinds
        return None


def _has_metadata_behind_pixels(file: IO[bytes]) -> bool:
    """Of a PNG file, by the heads of its chunks. The position in the file stays."""
    position, pixels_seen = file.tell(), False
    file.seek(len(b"\x89PNG\r\n\x1a\n"))
    try:
        while len(head := file.read(8)) == 8:
            length, kind = struct.unpack(">I4s", head)
            if pixels_seen and kind in _PNG_METADATA:
                return True
            pixels_seen |= kind == b"IDAT"
            file.seek(length + 4, os.SEEK_CUR)  # and its checksum
        return False
    finally:
        file.seek(position)


def _bits(image: Image.Image) -> int:
    if image.mode.startswith("I;16"):
        return 16
    if image.mode == "I":  # these formats have 16 bits at most
        return 16 if image.format in ("PNG", "PPM") else 32
    return 32 if image.mode == "F" else 8


def read_image(path: str, format: str) -> np.ndarray:
    """
    :func:`detectron2.data.detection_utils.read_image`, which also reads grey images of 16 bits (as
    OpenCV does, their values are divided by 256) and TIFF files that have an orientation.

    Returns:
        ndarray: shape (H, W, C), uint8, upright.

    Raises:
        InputError: the file is missing, truncated, no image, or has 32 bits per channel.
    """
    try:
        with PathManager.open(path, "rb") as file, Image.open(file) as image:
            refuse_programs(image)
            bits = _bits(image)
            # Pillow turns TIFF files as it reads them; Detectron2 would turn them once more.
            if bits == 8 and image.format != "TIFF":
                return detection_utils.read_image(path, format=format)
            if _orientation(image) is not None:
                image = ImageOps.exif_transpose(image)
            return _convert(image, format, bits)
    except READ_ERRORS as error:
        raise InputError(f"Cannot read image {path}: {why_unreadable(error, path)}") from None


def to_array(image: str | os.PathLike | Image.Image | np.ndarray, format: str) -> np.ndarray:
    """
    An image, however it is given, in one of the formats of :func:`read_image`.

    Args:
        image: a path, read by :func:`read_image`; a PIL image of any mode, as it is (not turned by
            its EXIF data); or an array as of OpenCV, uint8 or uint16, of shape (H, W) or (H, W, 1),
            which is grey, (H, W, 3), which is BGR, or (H, W, 4), which is BGRA.
        format: a mode of PIL, "BGR" or "YUV-BT.601".

    Returns:
        ndarray: shape (H, W, C), uint8 but for "YUV-BT.601".

    Raises:
        InputError: the file cannot be read, or it is none of these kinds of image.
    """
    if isinstance(image, (str, os.PathLike)):
        return read_image(os.fspath(image), format)
    if isinstance(image, np.ndarray):
        image = _from_opencv(image)
    if not isinstance(image, Image.Image):
        raise InputError(f"An image is a path, a PIL image or an array, not {type(image).__name__}")
    try:
        refuse_programs(image)
        return _convert(image, format, _bits(image))
    except READ_ERRORS as error:  # the file of a PIL image is read only now
        raise InputError(f"Cannot read a PIL image: {why_unreadable(error, '')}") from None


def _from_opencv(array: np.ndarray) -> Image.Image:
    is_image = array.dtype in (np.uint8, np.uint16) and array.ndim in (2, 3) and array.size > 0
    if not is_image or array.shape[2:] not in ((), (1,), (3,), (4,)):
        raise InputError(
            "An image as an array is uint8 or uint16, of shape (H, W) or (H, W, 1, 3 or 4), not "
            f"{array.dtype} of shape {array.shape}"
        )
    if array.dtype == np.uint16:
        array = (array >> 8).astype(np.uint8)
    if array.ndim == 3:
        array = array[..., 0] if array.shape[2] == 1 else array[..., [2, 1, 0, 3][: array.shape[2]]]
    return Image.fromarray(np.ascontiguousarray(array))


def _convert(image: Image.Image, format: str, bits: int) -> np.ndarray:
    if bits == 32:
        raise ValueError("it has 32 bits per pixel, or signed ones: save it with 8 or 16")
    if bits == 16:
        image = Image.fromarray((np.asarray(image) >> 8).astype(np.uint8))
    return detection_utils.convert_PIL_to_numpy(image, format)


def why_unreadable(error: Exception, path: str) -> str:
    """What is wrong with an image file, from one of READ_ERRORS."""
    if isinstance(error, Image.UnidentifiedImageError):
        with contextlib.suppress(OSError), open(path, "rb") as file:
            content = file.read(100)
            for (start, beginning), reason in _BEGINNINGS.items():
                if content[start:].startswith(beginning):
                    return reason
    return _REASONS.get(type(error)) or " ".join(str(error).split()) or first_line(error)
