"""One self-contained page with detections and the distributions of their sides."""

from __future__ import annotations

import base64
import html
import json
from collections.abc import Sequence
from importlib import resources

import cv2
import numpy as np
from detectron2.structures import Instances
from torch import Tensor

from ..errors import InputError

__all__ = ["make_page"]

_DIGITS = 4


def make_page(
    image_rgb: np.ndarray,
    detections: Instances,
    class_names: Sequence[str],
    title: str,
    targets: Tensor | None = None,
    gt_boxes: Tensor | None = None,
    score_thresh: float = 0.3,
) -> str:
    """
    Make a page in HTML that needs neither server nor network. Arguments are those of
    :func:`gfl_d2.distributions.draw_distributions`, and:

    Args:
        title: names the image.
        score_thresh: where the slider stands at first.

    Raises:
        InputError: OpenCV cannot encode the image.
    """
    is_encoded, picture = cv2.imencode(".jpg", np.ascontiguousarray(image_rgb[:, :, ::-1]))
    if not is_encoded:
        raise InputError(f"Image '{title}' cannot be written as JPEG")
    height, width = image_rgb.shape[:2]
    data = {
        "width": width,
        "height": height,
        "picture": "data:image/jpeg;base64," + base64.b64encode(picture).decode(),
        "classes": [str(name) for name in class_names],
        "threshold": score_thresh,
        "truth": _round(gt_boxes),
        "detections": [
            {
                "box": _round(detections.pred_boxes.tensor[i]),
                "score": _round(detections.scores[i]),
                "class": int(detections.pred_classes[i]),
                "std": _round(detections.box_std[i]),
                "entropy": _round(detections.box_entropy[i]),
                "places": _round(detections.side_places[i]),
                "probs": _round(detections.side_probs[i]),
                "target": None
                if targets is None or targets[i].isnan().any()
                else _round(targets[i]),
            }
            for i in range(len(detections))
        ],
    }
    # No text ends the script, whatever the names are.
    text = json.dumps(data, allow_nan=False).replace("<", "\\u003c")
    template = resources.files(__package__).joinpath("page.html").read_text(encoding="utf-8")
    head, _, tail = template.partition("$DATA")
    return head.replace("$TITLE", html.escape(title)) + text + tail


def _round(values: Tensor | None) -> list | float:
    """Numbers with a few digits, for a small page."""
    return [] if values is None else np.round(values.double().numpy(), _DIGITS).tolist()
