"""COCO's evaluation of boxes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from pycocotools.coco import COCO

try:
    from faster_coco_eval import COCOeval_faster as COCOeval
except ImportError:  # no wheel for every system: ten times slower
    from detectron2.evaluation.coco_evaluation import COCOevalMaxDets as COCOeval

__all__ = ["COCOeval", "evaluate_boxes", "max_detections"]


def max_detections(per_image: int) -> int:
    """
    How many detections of a class and an image count, the best ones: COCO's 100, or more for a
    model that may have more, ``per_image``.
    """
    return max(100, per_image)


def evaluate_boxes(
    data: dict,
    results: Sequence[dict],
    classes: Mapping[object, int],
    max_dets: Sequence[int],
    img_ids: Sequence | None = None,
) -> COCOeval:
    """
    Compare detections with ground truth. Image and annotation ids may be anything, image ids of
    several types too.

    Args:
        data: ground truth in COCO's format. Annotations of other images or categories are left out.
        results: detections in COCO's result format, at least one.
        classes: the class for each category id.
        max_dets: numbers of detections of a class and an image that count, the best ones.
        img_ids: images to look at, by default all.

    Returns:
        Its ``eval["precision"]`` has the axes IoU, recall, class, area, number of detections.
    """
    # Image ids must be numbers for the C++ code; their order decides between equal scores. An
    # annotation of id 0 would match nothing. Categories have the order of the classes' names.
    ids = sorted({image["id"] for image in data["images"]}, key=lambda i: (type(i).__name__, i))
    images = {image_id: i for i, image_id in enumerate(ids)}
    truth, results = (
        [
            {
                **box,
                "id": i,
                "image_id": images[box["image_id"]],
                "category_id": classes[box["category_id"]],
            }
            for i, box in enumerate(boxes, start=1)
            if box["image_id"] in images and box["category_id"] in classes
        ]
        for boxes in (data["annotations"], results)
    )
    api = COCO()
    api.dataset = {
        "images": [{"id": i} for i in images.values()],
        "annotations": truth,
        "categories": [{"id": i, "name": str(i)} for i in sorted(classes.values())],
    }
    api.createIndex()
    coco_eval = COCOeval(api, api.loadRes(results), "bbox")
    coco_eval.params.maxDets = max_dets
    if img_ids is not None:
        coco_eval.params.imgIds = [images[image_id] for image_id in img_ids]
    coco_eval.evaluate()
    coco_eval.accumulate()
    return coco_eval
