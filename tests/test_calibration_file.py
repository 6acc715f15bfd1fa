import json

import numpy as np
import pytest

from gfl_d2.calibration import Calibration, Curve, load_calibration, save_calibration
from gfl_d2.errors import InputError

CONTENT = {
    "format": 1,
    "kind": "isotonic",
    "thing_classes": ["cat", "dog"],
    "fitted_on": "pets",
    "curves": {"dog": {"scores": [0.2, 0.4, 0.8], "calibrated": [0.1, 0.5, 0.5]}},
}


def write(path, content):
    path.write_text(content if isinstance(content, str) else json.dumps(content))
    return path


def test_linear_between_knots_and_level_beyond(tmp_path):
    calibration = load_calibration(write(tmp_path / "c.json", CONTENT))
    scores = np.array([0.1, 0.2, 0.25, 0.4, 0.6, 0.9])
    dogs = calibration.apply(scores, np.ones(6, dtype=int))
    # A quarter of the way from 0.1 to 0.5 is 0.2.
    np.testing.assert_allclose(dogs, [0.1, 0.1, 0.2, 0.5, 0.5, 0.5], rtol=1e-12)
    # A class without a curve keeps its scores, and the input is not changed.
    assert calibration.apply(scores, np.zeros(6, dtype=int)).tolist() == scores.tolist()
    assert scores[0] == 0.1
    mixed = calibration.apply(scores[:2], np.array([0, 1]))
    assert mixed.tolist() == [0.1, 0.1]
    assert calibration.apply(scores[:0], np.zeros(0, dtype=int)).shape == (0,)


def test_written_and_read_back_to_the_last_bit(tmp_path):
    rng = np.random.default_rng(0)
    curve = Curve(np.sort(rng.random(30)), np.sort(rng.random(30)))
    save_calibration(tmp_path / "c.json", Calibration(["a", "ж"], "set", {"ж": curve}))
    read = load_calibration(tmp_path / "c.json")
    assert (read.thing_classes, read.fitted_on, list(read.curves)) == (["a", "ж"], "set", ["ж"])
    assert np.array_equal(read.curves["ж"].scores, curve.scores)
    assert np.array_equal(read.curves["ж"].calibrated, curve.calibrated)
    assert json.loads((tmp_path / "c.json").read_text()).keys() == CONTENT.keys()


def curves(scores, calibrated):
    return {"curves": {"dog": {"scores": scores, "calibrated": calibrated}}}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "is no calibration"),
        ("{}", "is no calibration"),
        ({"format": 2}, "format and kind 2 and isotonic"),
        ({"kind": "linear"}, "1 and linear"),
        ({"thing_classes": "dog"}, "list of texts"),
        ({"thing_classes": ["dog", "dog"]}, "twice"),
        ({"curves": []}, "must be an object"),
        ({"fitted_on": 3}, "fitted_on a text"),
        ({"thing_classes": ["cat"]}, "a curve of dog, not in its thing_classes"),
        ({"curves": {"dog": None}}, "curve of dog"),
        (curves([], []), "curve of dog"),
        (curves([0.1], [0.1, 0.2]), "curve of dog"),
        (curves([0.2, 0.1], [0.1, 0.2]), "curve of dog"),
        (curves([0.1, 0.1], [0.1, 0.2]), "curve of dog"),
        (curves([0.1, 0.2], [0.2, 0.1]), "curve of dog"),
        (curves([0.1, 2], [0.1, 0.2]), "curve of dog"),
        (curves([0.1, 0.2], [0.1, float("nan")]), "curve of dog"),
        (curves([0.1, "0.2"], [0.1, 0.2]), "curve of dog"),
    ],
)
def test_other_files_are_refused_in_one_line(tmp_path, change, message):
    content = change if isinstance(change, str) else {**CONTENT, **change}
    with pytest.raises(InputError, match=message) as caught:
        load_calibration(write(tmp_path / "c.json", content))
    assert "\n" not in str(caught.value)
    assert "c.json" in str(caught.value)


def test_files_that_are_not_there(tmp_path):
    with pytest.raises(InputError, match="cannot be read"):
        load_calibration(tmp_path / "none.json")
    with pytest.raises(InputError, match="cannot be written"):
        save_calibration(tmp_path / "none" / "c.json", Calibration([], "set", {}))


def test_other_classes_are_refused(tmp_path):
    calibration = load_calibration(write(tmp_path / "c.json", CONTENT))
    calibration.check_classes(["cat", "dog"], "the model")
    for names in (["dog", "cat"], ["cat"], []):
        with pytest.raises(InputError, match="fitted on 'pets' with the classes cat, dog"):
            calibration.check_classes(names, "the model")
