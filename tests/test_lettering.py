"""Texts that matplotlib's own font lacks. The fonts are those that come with matplotlib."""

from __future__ import annotations

import warnings

import matplotlib
import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances
from fontTools.fontBuilder import FontBuilder
from fontTools.pens.ttGlyphPen import TTGlyphPen
from matplotlib.font_manager import fontManager

from gfl_d2.lettering import choose_letters, find_fonts, make_plain
from gfl_d2.visualization import draw_comparison

CAT, DOG = "\u732b", "\u72ac"


@pytest.fixture(autouse=True)
def own_fonts(monkeypatch):
    own = [f for f in fontManager.ttflist if f.fname.startswith(matplotlib.get_data_path())]
    monkeypatch.setattr(fontManager, "ttflist", own)


@pytest.fixture
def add_font(tmp_path):
    """Add a font to matplotlib's, in which every one of some characters is a filled square."""

    def add_font(family, characters):
        names = [".notdef", *(f"u{ord(c):x}" for c in characters)]
        pen = TTGlyphPen(None)
        corners = [(0, 0), (0, 1000), (1000, 1000), (1000, 0)]
        pen.moveTo(corners[0])
        for corner in corners[1:]:
            pen.lineTo(corner)
        pen.closePath()
        glyph = pen.glyph()
        font = FontBuilder(1000, isTTF=True)
        font.setupGlyphOrder(names)
        font.setupCharacterMap({ord(c): name for c, name in zip(characters, names[1:])})
        font.setupGlyf({name: glyph for name in names})
        font.setupHorizontalMetrics(dict.fromkeys(names, (1000, 0)))
        font.setupHorizontalHeader(ascent=1000, descent=0)
        font.setupNameTable({"familyName": family, "styleName": "Regular"})
        font.setupOS2(sTypoAscender=1000, usWinAscent=1000)
        font.setupPost()
        font.save(str(tmp_path / f"{family}.ttf"))
        fontManager.addfont(str(tmp_path / f"{family}.ttf"))

    return add_font


def draw(*names, file="1.jpg"):
    """A picture of one box for each of these classes."""
    boxes = [[50.0 + 200 * i, 50.0, 150.0 + 200 * i, 350.0] for i in range(len(names))]
    annotations = [
        {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": i}
        for i, box in enumerate(boxes)
    ]
    detections = Instances(
        (400, 600),
        pred_boxes=Boxes(torch.tensor(boxes)),
        scores=torch.full([len(boxes)], 0.9),
        pred_classes=torch.arange(len(boxes)),
    )
    record = {"file_name": file, "annotations": annotations}
    image = np.full((400, 600, 3), 90, np.uint8)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # matplotlib's, of a missing glyph
        return draw_comparison(image, record, detections, Metadata(thing_classes=list(names)))


def test_matplotlibs_own_font_is_preferred():
    assert find_fonts("cat, caf\xe9, \u043a\u043e\u0442") == (["sans-serif"], set())


def test_fonts_are_found(add_font):
    add_font("Test Cat", CAT)
    assert find_fonts(f"a {CAT}{DOG}") == (["sans-serif", "Test Cat"], {DOG})
    add_font("Test Dog", DOG)
    assert find_fonts(f"a {CAT}{DOG}") == (["sans-serif", "Test Cat", "Test Dog"], set())


def test_fonts_that_have_all_characters_but_no_pictures_are_not_taken(add_font):
    add_font("Test Color Emoji", DOG)
    assert find_fonts(DOG) == (["sans-serif"], {DOG})


def test_a_font_that_was_removed_is_not_taken(add_font, tmp_path):
    add_font("Test Dog", DOG)
    (tmp_path / "Test Dog.ttf").unlink()
    assert find_fonts(DOG) == (["sans-serif"], {DOG})


def test_names_and_title_are_drawn_in_the_font(add_font, caplog):
    add_font("Test Cat", CAT)
    numbered, drawn = draw("class 0"), draw(CAT)
    assert not np.array_equal(drawn[28:], numbered[28:])
    assert np.array_equal(drawn[:28], numbered[:28])
    titled = draw("class 0", file=f"{CAT}.jpg")
    assert not np.array_equal(titled[:28], numbered[:28])
    assert np.array_equal(titled[28:], numbered[28:])
    assert caplog.text == ""


def test_names_without_font_are_spelled_in_latin_letters(caplog):
    assert np.array_equal(draw("a", f"{DOG} \xe9"), draw("a", "Quan \xe9"))
    assert np.array_equal(draw(file=f"{DOG}.jpg"), draw(file="Quan.jpg"))
    assert caplog.text.count(f"No font has the characters {DOG}") == 1


def test_letters(add_font):
    add_font("Test Cat", CAT)
    families, letters = choose_letters([f"{CAT}\n{DOG}", "Quan"], 8)
    assert families == ["sans-serif", "Test Cat"]
    assert letters == {f"{CAT}\n{DOG}": f"{CAT} Quan", "Quan": "Quan"}


def test_a_dollar_is_a_dollar():
    assert not np.array_equal(draw("$x$"), draw("x"))
    draw("$x^$", file="$x^$.jpg")  # no formula


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a\tb\n c", "a b c"),
        ("\x00a\u200b\ud83d", "a"),
        ("abcdefgh", "abcdefgh"),
        ("abcdefghi", "abcdefg\u2026"),
        ("", ""),
    ],
)
def test_plain_text(text, expected):
    assert make_plain(text, 8) == expected


def test_long_and_odd_names_are_drawn():
    draw("x" * 5000, "\n\x00", "", file="y" * 5000)
