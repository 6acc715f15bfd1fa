"""Measures of detections, against plain computations and COCO's evaluation."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.datasets import register_coco_instances
from detectron2.structures import BoxMode
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from gfl_d2.errors import InputError
from gfl_d2.result_analysis import analyze_results, load_result_set
from gfl_d2.result_analysis.average_precision import average_precision
from gfl_d2.result_analysis.confusion import confusion_matrix
from gfl_d2.result_analysis.matching import find_overlaps
from result_sets import (
    CAT,
    DOG,
    make_results,
    num_objects,
    plain_matches,
    random_results,
    six_errors,
)

SEEDS = range(3)


@pytest.mark.parametrize("seed", SEEDS)
def test_average_precision_is_that_of_pycocotools(seed):
    results = random_results(seed)
    truth, detections = results.to_coco()
    for i, box in enumerate(truth["annotations"], start=1):
        box["id"] = i
    api = COCO()
    api.dataset = {**truth, "categories": [{"id": 0}, {"id": 1}]}
    api.createIndex()
    coco_eval = COCOeval(api, api.loadRes(detections), "bbox")
    coco_eval.evaluate()
    coco_eval.accumulate()
    coco_eval.summarize()
    found = average_precision(results, 100)
    keys = ("AP", "AP50", "AP75", "APs", "APm", "APl")
    expected = coco_eval.stats[:6] * 100
    np.testing.assert_allclose([found.overall[k] for k in keys], expected, rtol=1e-9)
    precision = coco_eval.eval["precision"][..., 2]
    np.testing.assert_allclose(found.classes["APm"], 100 * precision[:, :, :, 2].mean((0, 1)))
    np.testing.assert_allclose(found.precision, precision[0, :, :, 0].T)


def test_what_is_not_annotated_has_no_ap():
    results = make_results([(0, CAT, (0, 0, 9, 9))], [(0, k, (0, 0, 9, 9), 0.5) for k in (0, 1)])
    found = average_precision(results, 100)
    assert found.classes["APs"].tolist()[0] == pytest.approx(100)
    assert np.isnan(found.classes["APm"]).all()
    assert np.isnan(found.classes["AP"]).tolist() == [False, True]
    assert found.overall["AP"] == pytest.approx(100)


class TestThresholds:
    def test_by_hand(self):
        """Three cats in a row; IoUs 0.8 and 0.7 with two of them, and two false detections."""
        truth = [(0, CAT, (200 * i, 0, 100, 100)) for i in range(3)]
        boxes = [((0, 0, 80, 100), 0.9), ((0, 500, 10, 10), 0.7)]
        boxes += [((200, 0, 70, 100), 0.6), ((0, 700, 10, 10), 0.2)]
        found = analyze_results(make_results(truth, [(0, CAT, *x) for x in boxes]), 100)
        # LRP errors: (.4 + 0 + 2) / 3, (.4 + 1 + 2) / 4, (.4 + .6 + 1 + 1) / 4, (1 + 2 + 1) / 5.
        f1, lrp = found.thresholds[CAT]
        assert lrp.score == f1.score == 0.6
        assert lrp.lrp == pytest.approx(3 / 4)
        assert lrp.mean_iou == pytest.approx(0.75)
        assert (lrp.precision, lrp.recall) == (pytest.approx(2 / 3), pytest.approx(2 / 3))
        assert f1.f1 == pytest.approx(2 / 3)
        assert found.thresholds[DOG] is None
        (row,) = found.classes()
        shares = [row[key] for key in ("oLRP", "oLRP_loc", "oLRP_FP", "oLRP_FN")]
        assert shares == pytest.approx([75, 25, 100 / 3, 100 / 3])
        assert found.overall()["oLRP"] == pytest.approx(75)

    @pytest.mark.parametrize("seed", SEEDS)
    def test_plain_search(self, seed):
        results = random_results(seed, has_ties=seed == 0)
        found = analyze_results(results, 100)
        for animal in (CAT, DOG):
            rows, count = plain_matches(results, animal, 0.5), num_objects(results, animal)
            lrp, f1 = {}, {}
            for score in {row[0] for row in rows}:
                ious = [iou for s, iou in rows if s >= score]
                true = [iou for iou in ious if iou is not None]
                false, missed = len(ious) - len(true), count - len(true)
                total = len(true) + false + missed
                lrp[score] = (sum((1 - iou) / 0.5 for iou in true) + false + missed) / total
                f1[score] = 2 * len(true) / (2 * len(true) + false + missed)
            by_f1, by_lrp = found.thresholds[animal]
            assert by_lrp.lrp == pytest.approx(min(lrp.values()))
            assert lrp[by_lrp.score] == pytest.approx(min(lrp.values()))
            assert by_f1.f1 == pytest.approx(max(f1.values()))
            assert f1[by_f1.score] == pytest.approx(max(f1.values()))

    def test_nothing_is_found(self):
        results = make_results([(0, CAT, (0, 0, 9, 9))], [(0, CAT, (50, 0, 9, 9), 0.5)])
        found = analyze_results(results, 100)
        for best in found.thresholds[CAT]:
            assert math.isnan(best.score)
            assert (best.f1, best.lrp) == (0, 1)
        assert math.isnan(found.overall()["LaECE0"])
        assert found.overall()["oLRP"] == 100


@pytest.mark.parametrize("seed", SEEDS)
def test_calibration_errors_are_those_of_a_plain_computation(seed):
    results = random_results(seed)
    found = analyze_results(results, 100)
    laece, laace = [], []
    for animal in (CAT, DOG):
        threshold = found.thresholds[animal][1].score
        rows = [(s, iou or 0) for s, iou in plain_matches(results, animal, 0) if s >= threshold]
        error = 0
        for i in range(25):
            inside = [(s, iou) for s, iou in rows if i / 25 < s <= (i + 1) / 25]
            if inside:
                gap = sum(iou for _, iou in inside) - sum(s for s, _ in inside)
                error += abs(gap) / len(rows)
        laece.append(100 * error)
        laace.append(100 * sum(abs(s - iou) for s, iou in rows) / len(rows))
    assert found.reliability.laece.tolist() == pytest.approx(laece)
    assert found.reliability.laace.tolist() == pytest.approx(laace)
    assert found.overall()["LaECE0"] == pytest.approx(sum(laece) / 2)
    assert found.overall()["LaACE0"] == pytest.approx(sum(laace) / 2)


class TestConfusion:
    def test_by_hand(self):
        """Of the six errors, the cat on a dog is a confusion, and two are not found."""
        results = six_errors()
        overlaps = find_overlaps(results)
        assert confusion_matrix(results, overlaps, 0, 0.5).tolist() == [
            [1, 0, 1],
            [1, 0, 1],
            [2, 2, 0],
        ]
        assert confusion_matrix(results, overlaps, 0.65, 0.5).tolist()[1] == [0, 0, 2]
        # At an IoU of 0.25, more are near enough; a detection of a cat is taken before a dog's.
        assert confusion_matrix(results, overlaps, 0, 0.2).tolist()[0] == [2, 0, 0]

    @pytest.mark.parametrize("seed", SEEDS)
    def test_sums(self, seed):
        results = random_results(seed)
        matrix = confusion_matrix(results, find_overlaps(results), 0.3, 0.5)
        for animal in (CAT, DOG):
            rows = [x for x in plain_matches(results, animal, 0.5) if x[0] >= 0.3]
            assert matrix[animal].sum() == num_objects(results, animal)
            assert matrix[animal, animal] == sum(iou is not None for _, iou in rows)
            # A detection in a crowd may be paired with an object of the other class.
            assert matrix[:, animal].sum() >= len(rows)
        assert matrix[2, 2] == 0


def test_detections_in_crowds_count_nowhere():
    box, crowd, inside = (0, 0, 50, 50), (200, 200, 300, 300), (250, 250, 40, 40)
    truth = [(0, CAT, box), (0, CAT, crowd, True)]
    alone = make_results(truth, [(0, CAT, box, 0.8)])
    more = make_results(truth, [(0, CAT, box, 0.8), *[(0, CAT, inside, 0.9)] * 3])
    one, other = (analyze_results(x, 100) for x in (alone, more))
    assert other.overall() == pytest.approx(one.overall(), nan_ok=True)
    assert other.errors() == one.errors()
    assert other.confusion.tolist() == one.confusion.tolist() == [[1, 0, 0], [0, 0, 0], [0, 0, 0]]
    assert other.images == one.images
    # A dog in a crowd of cats is a mistake.
    dog = analyze_results(make_results(truth, [(0, CAT, box, 0.8), (0, DOG, inside, 0.9)]), 100)
    assert dog.tide.num_false == 1


def test_images_from_the_worst_to_the_best():
    box, far = (0, 0, 100, 100), (500, 500, 10, 10)
    truth = [(i, CAT, box) for i in (0, 1, 2)]
    detections = [(0, CAT, box, 0.9), (1, CAT, (0, 0, 80, 100), 0.9), (3, CAT, far, 0.9)]
    detections += [(0, CAT, far, 0.1)]  # below the threshold
    found = analyze_results(make_results(truth, detections, num_images=5), 100)
    # An object that is missed and a false detection weigh the same. The last image is empty.
    assert [(x.image, round(x.lrp, 9)) for x in found.images] == [(2, 1), (3, 1), (1, 0.4), (0, 0)]
    assert [(x.found, x.false, x.not_found) for x in found.images][:2] == [(0, 0, 1), (0, 1, 0)]


class TestResultSet:
    def test_halves_do_not_overlap_and_are_all(self):
        results = random_results(0)
        halves = [results.take_half(half) for half in ("first", "second")]
        assert sorted(halves[0].image_ids + halves[1].image_ids) == results.image_ids
        for half in halves:
            assert len(half.image_ids) > 5
            for i, id in enumerate(half.image_ids):
                for images, boxes in (("gt_images", "gt_boxes"), ("images", "scores")):
                    expected = getattr(results, boxes)[getattr(results, images) == id]
                    assert np.array_equal(
                        getattr(half, boxes)[getattr(half, images) == i], expected
                    )

    def test_a_half_without_anything(self):
        with pytest.raises(InputError, match=r"0 annotated boxes and 0 detections"):
            for half in ("first", "second"):  # the only image is in one of them
                six_errors().take_half(half)

    def test_limit_keeps_the_best(self):
        assert six_errors().limit(2).scores.tolist() == [0.9, 0.8]
        results = random_results(1)
        limited = results.limit(3)
        for image in range(len(results.image_ids)):
            scores = results.scores[results.images == image]
            kept = limited.scores[limited.images == image].tolist()
            assert kept == sorted(scores, reverse=True)[:3]

    def test_other_scores_are_sorted(self):
        results = six_errors()
        changed = results.replace_scores(np.array([0.1, 0.3, 0.2, 0.3, 0.5, 0.0]))
        assert changed.scores.tolist() == [0.5, 0.3, 0.3, 0.2, 0.1, 0.0]
        assert changed.boxes[:, 0].tolist() == [400, 10, 0, 260, 0, 260]


class TestLoading:
    RESULTS = tuple(
        {"image_id": id, "category_id": 0, "bbox": [0, 0, 10, 10], "score": score}
        for id, score in (("b", 0.2), ("a", 0.3), ("b", 0.4))
    )

    def load(self, tmp_path, results=RESULTS):
        (tmp_path / "results.json").write_text(json.dumps(results))
        return load_result_set("shelf", tmp_path / "results.json")

    @pytest.fixture
    def shelf(self, clean_catalogs):
        """A dataset that is a function, with ids of its own; the image "c" is empty."""
        box = {"bbox": [0, 0, 10, 10], "bbox_mode": BoxMode.XYXY_ABS, "category_id": 0}
        record = {"file_name": "x.png", "width": 20, "height": 20}
        records = [
            record | {"image_id": id, "annotations": [box] * number}
            for id, number in (("b", 1), ("c", 0), ("a", 1))
        ]
        DatasetCatalog.register("shelf", lambda: records)
        MetadataCatalog.get("shelf").thing_classes = ["book"]

    def test_a_function_as_a_dataset(self, shelf, tmp_path):
        results = self.load(tmp_path)
        assert results.image_ids == ["a", "b", "c"]
        assert results.class_names == ["book"]
        assert results.images.tolist() == [0, 1, 1]
        assert results.scores.tolist() == [0.3, 0.4, 0.2]
        assert results.gt_images.tolist() == [1, 0]
        assert results.gt_areas.tolist() == [100, 100]
        assert analyze_results(results, 100).overall()["AP"] == pytest.approx(100)

    def test_other_results(self, shelf, tmp_path):
        with pytest.raises(InputError, match="image_id 'd', which dataset 'shelf' does not have"):
            self.load(tmp_path, [self.RESULTS[0] | {"image_id": "d"}])
        with pytest.raises(InputError, match="no detections"):
            self.load(tmp_path, [])

    def test_an_area_that_is_no_number(self, clean_catalogs, tmp_path):
        """Of a file that Detectron2 itself registered."""
        ids = {"id": 1, "image_id": "a", "category_id": 1}
        truth = {
            "images": [{"id": "a", "file_name": "a.png", "width": 20, "height": 20}],
            "categories": [{"id": 1, "name": "book"}],
            "annotations": [{**ids, "bbox": [0, 0, 9, 9], "area": "x", "iscrowd": 0}],
        }
        (tmp_path / "truth.json").write_text(json.dumps(truth))
        register_coco_instances("shelf", {}, str(tmp_path / "truth.json"), str(tmp_path))
        results = [{"image_id": "a", "category_id": 1, "bbox": [0, 0, 9, 9], "score": 0.5}]
        with pytest.raises(InputError, match="'shelf' has a bbox or area that is no number"):
            self.load(tmp_path, results)
