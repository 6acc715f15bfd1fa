import json
import os
import struct
import zlib
from unittest.mock import Mock

import cv2
import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngImageFile

from gfl_d2.data import images
from gfl_d2.data.images import find_images, read_headers, read_image, to_array, why_unreadable
from gfl_d2.errors import InputError


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FVCORE_CACHE", str(tmp_path / "cache"))


def touch(folder, *names):
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).touch()


ALIKE = "in another case or Unicode form"


@pytest.mark.parametrize(
    ("name", "file", "way"),
    [
        ("a.jpg", "a.jpg", ""),
        ("b/a.jpg", "b/a.jpg", ""),
        ("b\\a.jpg", "b/a.jpg", "/ for \\"),
        ("b%20c/a%2B.jpg", "b c/a+.jpg", "URL-decoded"),
        ("b\\c%20d.jpg", "b/c d.jpg", "URL-decoded"),
        ("images/a.jpg", "a.jpg", "from the end of the path"),
        ("/home/x/b/a.jpg", "b/a.jpg", "from the end of the path"),
        ("C:\\x\\images\\a%20b.jpg", "a b.jpg", "from the end of the path"),
        ("http://host/x/a%20b.jpg", "a b.jpg", "from the end of the path"),
        ("x%20y.jpg", "x%20y.jpg", ""),
        ("odd\\name.jpg", "odd\\name.jpg", ""),
        ("https://host/x/a%20b.jpg?token=a%2Fb&v=1", "a b.jpg", "from the end of the path"),
        ("https://host/get?v=1&file=a.jpg", "a.jpg", "from the end of the path"),
        ("a.jpg?raw=true", "a.jpg", "without ?..."),
        ("a.jpg?raw=true?v=1", "a.jpg", "without ?..."),
        ("why?.jpg", "why?.jpg", ""),
        ("a.jpg", "A.JPG", ALIKE),
        ("x/B/a.JPEG", "B/a.jpeg", ALIKE),
        ("caf\u00e9.jpg", "cafe\u0301.jpg", ALIKE),
        ("cafe\u0301.jpg", "caf\u00e9.jpg", ALIKE),
    ],
)
def test_file_names_of_other_machines(tmp_path, name, file, way):
    touch(tmp_path, file, "other.jpg")
    paths, ways = find_images(str(tmp_path), [name, "other.jpg"])
    assert os.path.samefile(paths[0], tmp_path / file)
    assert os.path.samefile(paths[1], tmp_path / "other.jpg")
    assert ways == ({way: 1} if way else {})


def test_the_name_as_it_stands_comes_first(tmp_path):
    touch(tmp_path, "b/a.jpg", "a.jpg", "a b.jpg", "a%20b.jpg")
    paths, ways = find_images(str(tmp_path), ["b/a.jpg", "a%20b.jpg"])
    assert [os.path.relpath(p, tmp_path) for p in paths] == ["b/a.jpg", "a%20b.jpg"]
    assert ways == {}


def test_one_file_is_not_taken_for_two_images(tmp_path):
    touch(tmp_path, "1.jpg", "2.jpg")
    names = ["cats/1.jpg", "dogs/1.jpg", "cats/2.jpg", "2.jpg", "nowhere.jpg"]
    paths, ways = find_images(str(tmp_path), names)
    assert paths == [None, None, None, str(tmp_path / "2.jpg"), None]
    assert ways == {}
    # Two ways to write one name are one image, which a file may list twice.
    assert None not in find_images(str(tmp_path), ["x\\1.jpg", "x/1.jpg"])[0]


def test_a_folder_that_cannot_be_listed(tmp_path, monkeypatch):
    touch(tmp_path, "a.jpg")
    monkeypatch.setattr(images.os, "listdir", Mock(side_effect=PermissionError))
    assert find_images(str(tmp_path), ["a.jpg", "b.jpg"]) == ([str(tmp_path / "a.jpg"), None], {})


def test_names_alike(tmp_path):
    """A file in another case is taken only if it is the only one, and of no other image."""
    touch(tmp_path, "a.jpg", "A.jpg", "b.jpg", "c.jpg")
    names = ["A.JPG", "a.jpg", "b.jpg", "B.jpg", "C.jpg", "\0.jpg"]
    paths, ways = find_images(str(tmp_path), names)
    assert [p and os.path.basename(p) for p in paths] == [
        None,
        "a.jpg",
        "b.jpg",
        None,
        "c.jpg",
        None,
    ]
    assert ways == {ALIKE: 1}


def test_a_folder_of_that_very_name_is_not_another(tmp_path):
    touch(tmp_path, "b/x.jpg", "B/y.jpg")
    paths, ways = find_images(str(tmp_path), ["b/X.jpg"])
    assert paths == [str(tmp_path / "b" / "x.jpg")]
    assert ways == {ALIKE: 1}


def turned(path):
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (30, 20)).save(path, exif=exif)


TURNS = {2: 0, 3: 3, 4: 1, 5: 5, 6: 4, 7: 6, 8: 2}  # orientation -> Image.Transpose


def png_chunk(kind, orientation):
    """A chunk of a PNG file with the orientation."""
    exif = Image.Exif()
    exif[0x0112] = orientation
    hexadecimal = b"\nexif\n%8d\n%s\n" % (len(exif.tobytes()), exif.tobytes().hex().encode())
    packet = b'<x:xmpmeta xmlns:x="adobe:ns:meta/" tiff:Orientation="%d"/>' % orientation
    data = {
        b"eXIf": exif.tobytes()[6:],
        b"iTXt": b"XML:com.adobe.xmp\0\0\0\0\0" + packet,
        b"tEXt": b"Raw profile type exif\0" + hexadecimal,
        b"zTXt": b"Raw profile type exif\0\0" + zlib.compress(hexadecimal),
    }[kind]
    checksum = zlib.crc32(kind + data)
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", checksum)


def check_orientation(path, pixels, orientation):
    """Header and pixels agree, and are those that Pillow makes of the plain picture."""
    expected = Image.fromarray(pixels)
    if orientation > 1:
        expected = expected.transpose(Image.Transpose(TURNS[orientation]))
    (header,) = read_headers(str(path.parent), [str(path)])
    assert header[:3] == (*expected.size, orientation > 4)
    difference = np.abs(read_image(str(path), "RGB").astype(int) - np.asarray(expected))
    assert difference.mean() < 12  # JPEG's edges


def corners():
    pixels = np.zeros((48, 64, 3), np.uint8)
    pixels[:24, :32], pixels[24:, :32], pixels[:24, 32:] = (250, 10, 10), (10, 250, 10), 200
    return pixels


@pytest.mark.parametrize("orientation", range(1, 9))
@pytest.mark.parametrize("kind", ["jpg", "png", "tif", "webp"])
def test_orientation(tmp_path, kind, orientation):
    exif = Image.Exif()
    exif[0x0112] = orientation
    path = tmp_path / f"a.{kind}"
    Image.fromarray(corners()).save(path, exif=exif)
    check_orientation(path, corners(), orientation)


@pytest.mark.parametrize("place", [b"IDAT", b"IEND"])
@pytest.mark.parametrize("kind", [b"eXIf", b"iTXt", b"tEXt", b"zTXt"])
@pytest.mark.parametrize("bits", [8, 16])
def test_orientation_of_png_files(tmp_path, bits, kind, place):
    """Before the pixels and behind them."""
    pixels = corners()
    if bits == 16:
        pixels[:] = pixels[:, :, :1]
        assert cv2.imwrite(str(tmp_path / "a.png"), pixels[:, :, 0].astype(np.uint16) * 256)
    else:
        Image.fromarray(pixels).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    at = content.index(place) - 4
    content = content[:at] + png_chunk(kind, 6) + content[at:]
    (tmp_path / "a.png").write_bytes(content)
    check_orientation(tmp_path / "a.png", pixels, 6)


@pytest.mark.parametrize(
    ("before", "behind", "is_decoded"),
    [
        ([], [], False),
        ([b"tEXt", b"eXIf"], [], False),
        ([], [b"tIME"], False),
        ([b"tEXt"], [b"tIME", b"eXIf"], True),
    ],
)
def test_pixels_are_decoded_for_what_is_behind_them_only(
    tmp_path, monkeypatch, before, behind, is_decoded
):
    """Of a whole dataset that would take long."""
    Image.fromarray(corners()).save(tmp_path / "a.png")
    content = (tmp_path / "a.png").read_bytes()
    time = struct.pack(">I4s7sI", 7, b"tIME", b"\x07\xd0\1\1\1\1\1", 0)
    for place, kinds in ((b"IEND", behind), (b"IDAT", before)):
        at = content.index(place) - 4
        chunks = b"".join(time if kind == b"tIME" else png_chunk(kind, 6) for kind in kinds)
        content = content[:at] + chunks + content[at:]
    (tmp_path / "a.png").write_bytes(content)
    decoded, load = [], PngImageFile.load
    monkeypatch.setattr(PngImageFile, "load", lambda image: decoded.append(1) or load(image))
    (header,) = read_headers(str(tmp_path), [str(tmp_path / "a.png")])
    assert header.is_turned == (b"eXIf" in [*before, *behind])
    assert bool(decoded) == is_decoded


def test_headers(tmp_path):
    grey16 = np.full((20, 30), 40000, dtype=np.uint16)
    Image.new("RGB", (30, 20)).save(tmp_path / "8.png")
    cv2.imwrite(str(tmp_path / "16.png"), grey16)
    cv2.imwrite(str(tmp_path / "16.tif"), grey16)
    Image.new("F", (30, 20)).save(tmp_path / "float.tif")
    Image.new("I", (30, 20)).save(tmp_path / "32.tif")
    turned(tmp_path / "turned.jpg")
    turned(tmp_path / "turned.png")
    (tmp_path / "empty.jpg").touch()
    names = ["8.png", "16.png", "16.tif", "float.tif", "32.tif", "turned.jpg", "turned.png"]
    paths = [str(tmp_path / name) for name in [*names, "empty.jpg", "missing.jpg"]]
    for _ in range(2):  # the second from what is remembered
        headers = read_headers(str(tmp_path), paths)
        assert [h[3] for h in headers[:5]] == [8, 16, 16, 32, 32]
        assert headers[0] == (30, 20, False, 8)
        assert headers[5] == headers[6] == (20, 30, True, 8)
        assert headers[7:] == ["it is not an image", "no such file"]


def test_headers_are_remembered_until_the_file_changes(tmp_path, monkeypatch):
    path = str(tmp_path / "a.png")
    Image.new("RGB", (30, 20)).save(path)
    read_headers(str(tmp_path), [path])
    with monkeypatch.context() as patch:
        patch.setattr(images.Image, "open", lambda _: pytest.fail("read again"))
        assert read_headers(str(tmp_path), [path])[0][:2] == (30, 20)
    Image.new("RGB", (31, 20)).save(path)
    os.utime(path, (0, 0))  # the clock of a file system may be too coarse to tell the two apart
    assert read_headers(str(tmp_path), [path])[0][:2] == (31, 20)


def test_folders_are_remembered_apart(tmp_path):
    for name in ("a", "b", "a"):
        touch(tmp_path, f"{name}/1.png")
        Image.new("RGB", (30, 20)).save(tmp_path / name / "1.png")
        read_headers(str(tmp_path / name), [str(tmp_path / name / "1.png")])
    assert len(list((tmp_path / "cache" / "gfl_d2" / "images").iterdir())) == 2


def test_progress_is_shown_of_thousands(tmp_path, capsys):
    paths = [str(tmp_path / f"{i}.jpg") for i in range(2001)]
    assert read_headers(str(tmp_path), paths[:2000]) == ["no such file"] * 2000
    assert capsys.readouterr().err == ""
    assert read_headers(str(tmp_path), paths) == ["no such file"] * 2001
    last = capsys.readouterr().err.split("\r")[-1]
    assert last.startswith("Image headers: 100%")
    assert "2001/2001" in last


def test_a_damaged_memory_is_made_anew(tmp_path):
    path = str(tmp_path / "a.png")
    Image.new("RGB", (30, 20)).save(path)
    read_headers(str(tmp_path), [path])
    (file,) = (tmp_path / "cache" / "gfl_d2" / "images").iterdir()
    for content in ("{", "[]", "null"):
        file.write_text(content)
        assert read_headers(str(tmp_path), [path])[0][:2] == (30, 20)
    assert json.loads(file.read_text())[path][2:4] == [30, 20]


@pytest.mark.parametrize("suffix", ["png", "tif"])
@pytest.mark.parametrize("format", ["BGR", "RGB", "L"])
def test_16_bits_are_read_as_opencv_reads_them(tmp_path, suffix, format):
    path = str(tmp_path / f"a.{suffix}")
    values = np.random.default_rng(0).integers(0, 65536, (20, 30), dtype=np.uint16)
    cv2.imwrite(path, values)
    image = read_image(path, format)
    assert image.dtype == np.uint8
    expected = cv2.imread(path, cv2.IMREAD_COLOR)
    assert np.array_equal(image, expected if format != "L" else expected[:, :, :1])
    assert np.array_equal(expected[:, :, 0], values >> 8)


@pytest.mark.parametrize("mode", ["F", "I"])
def test_32_bits_are_refused(tmp_path, mode):
    Image.new(mode, (30, 20)).save(tmp_path / "a.tif")
    with pytest.raises(InputError, match=r"a\.tif: it has 32 bits per pixel, or signed ones: save"):
        read_image(str(tmp_path / "a.tif"), "BGR")


def test_other_images_are_read_as_detectron2_reads_them(tmp_path):
    turned(tmp_path / "turned.jpg")
    assert read_image(str(tmp_path / "turned.jpg"), "BGR").shape == (30, 20, 3)


def test_no_cache(tmp_path, monkeypatch, caplog):
    """Headers are read without one."""
    cache = tmp_path / "cache"
    cache.write_text("no folder")
    monkeypatch.setenv("FVCORE_CACHE", str(cache))
    Image.new("RGB", (9, 7)).save(tmp_path / "a.png")
    (header,) = read_headers(str(tmp_path), [str(tmp_path / "a.png")])
    assert header[:2] == (9, 7)
    assert "The headers of images cannot be kept: " in caplog.text


@pytest.mark.parametrize("shape", [(1, 1), (1, 1, 1), (1, 1, 3), (1, 1, 4)])
def test_an_image_may_have_one_pixel(shape):
    image = to_array(np.full(shape, 7, dtype=np.uint8), "RGB")
    assert (image == 7).all()
    assert image.shape == (1, 1, 3)


@pytest.mark.parametrize(
    "array",
    [np.zeros((0, 3), np.uint8), np.zeros((2, 2)), np.zeros((2, 2, 2), np.uint8), np.zeros(3)],
)
def test_arrays_that_are_no_images(array):
    with pytest.raises(InputError) as error:
        to_array(array, "RGB")
    assert str(error.value) == (
        "An image as an array is uint8 or uint16, of shape (H, W) or (H, W, 1, 3 or 4), not "
        f"{array.dtype} of shape {array.shape}"
    )


def test_why_an_image_cannot_be_read(tmp_path):
    unknown = Image.UnidentifiedImageError()
    assert why_unreadable(unknown, str(tmp_path / "elsewhere.jpg")) == "it is not an image"
    assert why_unreadable(ValueError("two\n lines"), "") == "two lines"
    assert why_unreadable(ValueError(), "") == "ValueError: "
