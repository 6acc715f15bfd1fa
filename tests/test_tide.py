"""Kinds of errors and what they cost, by hand and against the package tidecv."""

from __future__ import annotations

import numpy as np
import pytest

from gfl_d2.result_analysis.tide import KINDS, tide
from result_sets import CAT, DOG, make_results, matched, plain_matches, random_results, six_errors

SEEDS = range(3)


def test_one_error_of_each_kind():
    found = tide(six_errors(), *matched(six_errors()))
    assert found.counts == dict.fromkeys(KINDS, 1)
    # One of two cats is found first: precision 1 at the 51 recalls up to 0.5. No dog is.
    half = 51 / 101 * 100
    assert found.ap == pytest.approx(half / 2)
    expected = dict.fromkeys(KINDS, 0.0)
    expected["classification"] = half / 2  # one of two dogs, first
    # The other cat is the third detection: precision 2 / 3 at the other 50 recalls.
    expected["localization"] = 50 * 2 / 3 / 101 * 100 / 2
    assert found.costs == pytest.approx(expected)
    assert (found.num_false, found.num_not_found) == (5, 3)
    assert found.cost_of_false == pytest.approx(0)  # they score lower already
    assert found.cost_of_not_found == pytest.approx((100 - half) / 2)  # all cats, still no dog


def test_an_object_is_mended_once():
    """By the detection with the highest score; the other one goes."""
    box, aside = (0, 0, 100, 100), (60, 0, 100, 100)
    detections = [(0, CAT, aside, 0.9), (0, DOG, box, 0.8), (0, CAT, (50, 0, 100, 100), 0.7)]
    results = make_results([(0, CAT, box)], detections)
    found = tide(results, *matched(results))
    assert (found.counts["localization"], found.counts["classification"]) == (2, 1)
    assert found.counts["missed"] == 0
    assert found.costs["localization"] == pytest.approx(100)
    # The dog's detection goes; that of the cat at 0.9 stays.
    assert found.costs["classification"] == 0


def test_false_detections_are_of_one_kind_each():
    for seed in SEEDS:
        results = random_results(seed)
        found = tide(results, *matched(results))
        rows = [x for animal in (CAT, DOG) for x in plain_matches(results, animal, 0.5)]
        assert found.num_false == sum(iou is None for _, iou in rows)
        assert sum(found.counts[kind] for kind in KINDS[:-1]) == found.num_false
        right = sum(iou is not None for _, iou in rows)
        assert found.num_not_found == (~results.is_crowd).sum() - right


@pytest.mark.parametrize("seed", range(6))
def test_tidecv_gives_the_same(seed):
    tidecv = pytest.importorskip("tidecv")
    results = random_results(seed, has_ties=seed % 2 == 0)
    truth, detections = tidecv.Data("truth"), tidecv.Data("detections")
    for i in range(len(results.image_ids)):
        truth.add_image(i, str(i))
        detections.add_image(i, str(i))
    data, found = results.to_coco()
    for a in data["annotations"]:
        add = truth.add_ignore_region if a["iscrowd"] else truth.add_ground_truth
        add(a["image_id"], a["category_id"], box=a["bbox"])
    for d in found:
        detections.add_detection(d["image_id"], d["category_id"], d["score"], box=d["bbox"])
    run = tidecv.TIDE().evaluate(truth, detections, mode=tidecv.TIDE.BOX)
    ours = tide(results, *matched(results))
    costs = [*ours.costs.values(), ours.cost_of_false, ours.cost_of_not_found]
    names = ("Cls", "Loc", "Both", "Dupe", "Bkg", "Miss")
    theirs = {kind.short_name: cost for kind, cost in run.fix_main_errors().items()}
    expected = [*(theirs[name] for name in names), *run.fix_special_errors().values()]
    np.testing.assert_allclose([ours.ap, *costs], [run.ap, *expected], atol=1e-9)
    # It counts detections in crowds as errors too.
    counts = {
        kind.short_name: sum(e.original[1] is not None or kind.short_name == "Miss" for e in all)
        for kind, all in run.error_dict.items()
    }
    assert list(ours.counts.values()) == [counts[name] for name in names]
