import cv2
import numpy as np
import pytest
import torch
from detectron2.data import Metadata
from detectron2.structures import Boxes, BoxMode, Instances

from gfl_d2.visualization import draw_comparison, results_to_instances, stack_rows

NAMES = Metadata(name="pets", thing_classes=["cat", "dog"])


def grey(height=420, width=500):
    return np.full((height, width, 3), 90, dtype=np.uint8)


def truth(image, boxes, classes):
    return Instances(
        image.shape[:2],
        gt_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        gt_classes=torch.tensor(classes, dtype=torch.int64),
    )


def detections(image, boxes, scores, classes):
    return Instances(
        image.shape[:2],
        pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4)),
        scores=torch.tensor(scores),
        pred_classes=torch.tensor(classes, dtype=torch.int64),
    )


def halves(picture):
    """The left and the right half, between which there is a gap."""
    width = picture.shape[1]
    return picture[:, : width // 2 - 5], picture[:, width // 2 + 5 :]


def is_colored(picture):
    """(H, W), bool: pixels that are neither grey, black nor white."""
    return np.ptp(picture.astype(int), axis=2) > 40


def test_each_side_shows_its_own_boxes():
    image = grey()
    boxes = [[100, 100, 300, 300]]
    empty = draw_comparison(image, truth(image, [], []), detections(image, [], [], []), NAMES)
    assert not is_colored(empty).any()

    left, right = halves(
        draw_comparison(image, truth(image, boxes, [0]), detections(image, [], [], []), NAMES)
    )
    assert is_colored(left).any()
    assert not is_colored(right).any()

    left, right = halves(
        draw_comparison(image, truth(image, [], []), detections(image, boxes, [0.9], [0]), NAMES)
    )
    assert not is_colored(left).any()
    assert is_colored(right).any()


def test_boxes_are_where_they_belong():
    image = grey()
    picture = draw_comparison(
        image, truth(image, [[100, 120, 300, 320]], [1]), detections(image, [], [], []), NAMES
    )
    ys, xs = np.nonzero(is_colored(halves(picture)[0]))
    title = picture.shape[0] - image.shape[0]
    found = np.array([xs.min(), ys.min() - title, xs.max(), ys.max() - title])
    assert np.abs(found - [100, 120, 300, 320]).max() <= 3  # half the width of a line


def test_score_threshold():
    image = grey()
    boxes = [[50, 50, 150, 150], [250, 250, 350, 350]]
    drawn = [
        is_colored(
            draw_comparison(
                image,
                truth(image, [], []),
                detections(image, boxes, [0.9, 0.4], [0, 0]),
                NAMES,
                score_thresh=thresh,
            )
        ).sum()
        for thresh in (0.3, 0.4, 0.5, 0.95)
    ]
    assert drawn[0] == drawn[1] > drawn[2] > drawn[3] == 0


def test_a_class_has_one_colour_and_classes_differ():
    image = grey()
    box = [[100, 100, 300, 300]]

    def hue(classes):
        picture = draw_comparison(
            image, truth(image, box, classes), detections(image, box, [0.9], classes), NAMES
        )
        hues = []
        for half in halves(picture):
            hsv = cv2.cvtColor(half, cv2.COLOR_RGB2HSV)
            hues.append(float(np.median(hsv[is_colored(half)][:, 0])))
        return hues

    cat, dog = hue([0]), hue([1])
    assert cat[0] == pytest.approx(cat[1], abs=2)
    assert dog[0] == pytest.approx(dog[1], abs=2)
    assert abs(cat[0] - dog[0]) > 20


def test_dataset_dict_equals_instances():
    image = grey()
    record = {
        "annotations": [
            {"bbox": [100, 120, 200, 180], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 1}
        ]
    }
    none = detections(image, [], [], [])
    instances = truth(image, [[100, 120, 300, 300]], [1])
    expected = draw_comparison(image, instances, none, NAMES)
    assert np.array_equal(draw_comparison(image, record, none, NAMES), expected)
    record["annotations"][0]["iscrowd"] = 1
    assert not np.array_equal(draw_comparison(image, record, none, NAMES), expected)


def test_picture_without_annotations_or_class_names():
    image = grey()
    picture = draw_comparison(
        image, {}, detections(image, [[9, 9, 99, 99]], [0.8], [3]), Metadata(name="x")
    )
    assert is_colored(halves(picture)[1]).any()


def test_small_pictures_are_enlarged_and_large_ones_kept():
    for (height, width), expected in (((48, 64), (400, 533)), ((700, 500), (700, 500))):
        image = grey(height, width)
        picture = draw_comparison(image, {}, detections(image, [], [], []), NAMES)
        assert picture.dtype == np.uint8
        left = picture.shape[1] // 2 - 4
        assert (picture.shape[0] - 28, left) == expected


def test_boxes_move_with_an_enlarged_picture():
    image = grey(50, 80)
    picture = draw_comparison(
        image, truth(image, [[10, 20, 30, 40]], [0]), detections(image, [], [], []), NAMES
    )
    ys, xs = np.nonzero(is_colored(halves(picture)[0]))
    # Enlarged eightfold, below a title of 28 pixels.
    found = np.array([xs.min(), ys.min() - 28, xs.max(), ys.max() - 28])
    assert np.abs(found - [80, 160, 240, 320]).max() <= 3


def test_stack_rows():
    rows = [np.full((10, 30, 3), 7, np.uint8), np.full((20, 50, 3), 9, np.uint8)]
    stacked = stack_rows(rows)
    assert stacked.shape == (10 + 8 + 20, 50, 3)
    assert (stacked[:10, :30] == 7).all()
    assert (stacked[-20:] == 9).all()
    assert (stacked[:18, 30:] == 255).all()
    assert (stacked[10:18] == 255).all()


def test_results_to_instances():
    metadata = Metadata(name="toy", thing_dataset_id_to_contiguous_id={7: 0, 9: 1})
    results = [
        {"image_id": 3, "category_id": 9, "bbox": [10.0, 20.0, 5.0, 6.0], "score": 0.75},
        {"image_id": 3, "category_id": 7, "bbox": [0.0, 1.0, 2.0, 3.0], "score": 0.5},
    ]
    instances = results_to_instances(results, (40, 50), metadata)
    assert instances.image_size == (40, 50)
    assert instances.pred_boxes.tensor.tolist() == [[10, 20, 15, 26], [0, 1, 2, 4]]
    assert instances.scores.tolist() == [0.75, 0.5]
    assert instances.pred_classes.tolist() == [1, 0]
    assert len(results_to_instances([], (40, 50), metadata)) == 0
