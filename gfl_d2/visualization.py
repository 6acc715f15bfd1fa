"""Pictures of detections, alone or beside ground truth."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import check_image_size
from detectron2.structures import Boxes, BoxMode, Instances
from detectron2.utils.visualizer import Visualizer
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure
from PIL import Image
from tqdm import tqdm

from .data import read_image, to_array
from .drawing import class_color, draw_boxes, set_fonts
from .errors import InputError, name_some
from .lettering import choose_letters
from .results import load_results

__all__ = [
    "check_picture_path", "draw_annotations", "draw_comparison", "draw_detections", "draw_results",
    "read_images", "save_picture", "save_plot", "stack_columns", "stack_rows",
]  # fmt: skip

logger = logging.getLogger(__name__)

_GAP = 8
_WHITE = 255
_NAME_LENGTH = 40


def draw_results(
    dataset: str,
    results: str | Path,
    num_images: int = 4,
    skip: int = 0,
    min_boxes: int = 0,
    score_thresh: float = 0.4,
) -> np.ndarray:
    """
    Draw images of a dataset below each other: ground truth on the left, detections on the right.
    Images that cannot be read are left out with a warning.

    Args:
        dataset: a registered name.
        results: a ``coco_instances_results.json`` of this dataset.
        num_images, skip: how many images, at most, and how many to leave out first.
        min_boxes, score_thresh: images with fewer annotated boxes are left out, and detections that
            score lower.

    Returns:
        ndarray: RGB, uint8, shape (H, W, 3).

    Raises:
        InputError: the results are of another dataset or cannot be read, no image is left, or a
            number makes no sense.
    """
    if num_images < 1 or skip < 0 or math.isnan(score_thresh):
        raise InputError(
            "The number of images must be 1 or more, those left out 0 or more, and the least score "
            f"a number, not {num_images}, {skip} and {score_thresh}"
        )
    records = DatasetCatalog.get(dataset)
    metadata = MetadataCatalog.get(dataset)
    # The same in the results where the dataset has no ids of its own.
    same = {index: index for index in range(len(metadata.get("thing_classes", ())))}
    ids = metadata.get("thing_dataset_id_to_contiguous_id", same)
    by_image = load_results(results, dataset, {r["image_id"] for r in records}, ids)
    records = [r for r in records if len(r.get("annotations", [])) >= min_boxes]
    if skip >= len(records):
        raise InputError(
            f"Nothing to draw: '{dataset}' has {len(records)} images of {min_boxes} boxes or more, "
            f"and {skip} of them are left out"
        )
    rows = []
    for record, image in tqdm(read_images(records[skip:], num_images), desc="Drawing", delay=2):
        detections = _to_instances(by_image[record["image_id"]], image.shape[:2], ids)
        rows.append(draw_comparison(image, record, detections, metadata, score_thresh))
    return stack_rows(rows)


def read_images(records: Iterable[dict], count: int) -> Iterator[tuple[dict, np.ndarray]]:
    """
    Read the first ``count`` images in Detectron2's dataset format, one after the other. Those that
    cannot be read or have another size than their record are left out, with one warning at the end.

    Yields:
        The record and the image: RGB, uint8, shape (H, W, 3).

    Raises:
        InputError: none can be read.
    """
    number, problems = 0, []
    for record in records:
        try:
            image = read_image(record["file_name"], format="RGB")
            check_image_size(record, image)
        except ValueError as error:  # InputError, or Detectron2's SizeMismatchError
            problems.append(" ".join(str(error).split()))
        else:
            number += 1
            yield record, image
            if number == count:
                break
    if problems:
        message = (
            f"{len(problems)} of {number + len(problems)} images cannot be read or are of another "
            f"size than the dataset says: {name_some(problems)}"
        )
        if not number:
            raise InputError(message)
        logger.warning(f"Left out: {message}")


def check_picture_path(path: str | Path, is_plot: bool = False) -> None:
    """
    Check, before long work, that a picture can be written; its folder is made if needed.

    Args:
        path: the picture.
        is_plot: whether Matplotlib writes it, which knows ``.pdf`` and ``.svg`` too.

    Raises:
        InputError: no format has the path's ending, or there can be no such file.
    """
    path = Path(path)
    if is_plot:
        is_known = path.suffix[1:].lower() in FigureCanvasBase.get_supported_filetypes()
    else:
        is_known = cv2.haveImageWriter(path.name)
    if not is_known:
        raise InputError(f"Picture '{path}': its ending names no format, as .png and .jpg do")
    if path.is_dir():
        raise InputError(f"Picture '{path}': there is a folder of this name")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"Picture '{path}': its folder cannot be made: {error}") from None


def save_plot(path: str | Path, figure: Figure, dpi: int) -> None:
    """
    Write a figure of Matplotlib. The path's ending says in which format.

    Raises:
        InputError: it cannot be written.
    """
    check_picture_path(path, is_plot=True)
    try:
        figure.savefig(path, dpi=dpi)
    except (OSError, RuntimeError) as error:  # .pgf needs LaTeX
        raise InputError(f"Picture '{path}' cannot be written: {error}") from None


def save_picture(path: str | Path, picture: np.ndarray) -> None:
    """
    Write a picture, RGB, uint8, shape (H, W, 3). The path's ending says in which format; its folder
    is made if needed.

    Raises:
        InputError: it cannot be written.
    """
    check_picture_path(path)
    try:
        if cv2.imwrite(str(path), picture[:, :, ::-1]):
            return
        reason = "OpenCV could not write it"
    except cv2.error as error:
        reason = " ".join(str(error).split())
    height, width = picture.shape[:2]
    raise InputError(f"Picture '{path}', {width} x {height} pixels: {reason}")


def draw_comparison(
    image_rgb: np.ndarray,
    ground_truth: dict,
    predictions: Instances,
    metadata: Metadata,
    score_thresh: float = 0.5,
    title: str = "",
) -> np.ndarray:
    """
    Draw ground truth, on the left, beside detections with their scores, on the right. A class has
    the same colour on both sides. What no font on this system has is spelled in Latin letters.

    Args:
        image_rgb: shape (H, W, 3), uint8.
        ground_truth: an image in Detectron2's dataset format, boxes in pixels of ``image_rgb``.
        predictions: Instances with ``pred_boxes``, ``scores`` and ``pred_classes``, likewise.
        metadata: its ``thing_classes`` name the classes; without them they are numbered.
        score_thresh: detections that score lower are left out.
        title: of the right side, by default how much its detections score.

    Returns:
        ndarray: as ``image_rgb``, of another size. Small images are enlarged, huge ones reduced.
    """
    file = Path(ground_truth.get("file_name", "")).name
    annotations = ground_truth.get("annotations", [])
    left = draw_annotations(image_rgb, annotations, metadata, "ground truth", file)
    kept = predictions[predictions.scores >= score_thresh].to("cpu")
    notes = [f" {score:.2f}" for score in kept.scores.tolist()]
    title = title or f"detections that score {score_thresh:g} or more"
    boxes, classes = kept.pred_boxes.tensor, kept.pred_classes.tolist()
    right = _draw_classes(image_rgb, boxes, classes, notes, metadata, title)
    return stack_columns([left, right])


def draw_annotations(
    image_rgb: np.ndarray,
    annotations: Sequence[dict],
    metadata: Metadata,
    title: str,
    file: str = "",
) -> np.ndarray:
    """
    Draw annotations in Detectron2's dataset format, crowds marked as such, on their image. The name
    of its ``file`` stands behind the title; else as :func:`draw_comparison`.
    """
    boxes = [BoxMode.convert(a["bbox"], a["bbox_mode"], BoxMode.XYXY_ABS) for a in annotations]
    classes = [a["category_id"] for a in annotations]
    notes = [" (crowd)" if a.get("iscrowd", 0) else "" for a in annotations]
    return _draw_classes(image_rgb, boxes, classes, notes, metadata, title, file)


def _draw_classes(
    image_rgb: np.ndarray,
    boxes: Sequence,
    classes: list[int],
    notes: list[str],
    metadata: Metadata,
    title: str,
    file: str = "",
) -> np.ndarray:
    names = [str(name) for name in metadata.get("thing_classes") or ()]
    families, letters = choose_letters([file, *names], _NAME_LENGTH)
    labels = [(letters[names[c]] if names else str(c)) + note for c, note in zip(classes, notes)]
    colors = [class_color(c) for c in classes]
    return draw_boxes(
        image_rgb, f"{title}   {letters[file]}".strip(), boxes, labels, colors, families
    )


def draw_detections(
    image: str | Path | Image.Image | np.ndarray, detections: Instances, metadata: Metadata
) -> Image.Image:
    """
    Draw detections with their scores on their image, which is given as to
    :func:`gfl_d2.data.to_array`. ``metadata`` has the ``thing_classes``, if they are known.

    Returns:
        RGB, of the image's own size. A notebook shows it.

    Raises:
        InputError: the image cannot be read, or has another size than that of the detections.
    """
    pixels = to_array(image, "RGB")
    if pixels.shape[:2] != detections.image_size:
        sizes = f"{detections.image_size}, not {pixels.shape[:2]} as this one"
        raise InputError(f"The detections are of an image of height and width {sizes}")
    boxes, scores = detections.pred_boxes.to("cpu"), detections.scores.tolist()
    classes = detections.pred_classes.tolist()
    names = [str(name) for name in metadata.get("thing_classes") or ()]
    families, letters = choose_letters(names, _NAME_LENGTH)
    labels = [f"{letters[names[c]] if names else c} {s:.2f}" for c, s in zip(classes, scores)]
    visualizer, colors = Visualizer(pixels), [class_color(c) for c in classes]
    visualizer.overlay_instances(boxes=boxes, labels=labels, assigned_colors=colors)
    set_fonts(visualizer.output, families)
    return Image.fromarray(visualizer.output.get_image())


def _to_instances(results: list[dict], image_size: tuple[int, int], ids: dict) -> Instances:
    """
    Detections of one image, from COCO's result format. ``image_size`` is (height, width), ``ids``
    has the class index for each category id.
    """
    boxes = torch.tensor([result["bbox"] for result in results]).reshape(-1, 4)
    return Instances(
        image_size,
        pred_boxes=Boxes(BoxMode.convert(boxes, BoxMode.XYWH_ABS, BoxMode.XYXY_ABS)),
        scores=torch.tensor([result["score"] for result in results]),
        pred_classes=torch.tensor([ids[result["category_id"]] for result in results]),
    )


def stack_rows(rows: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures, (Hi, Wi, 3), below each other, the narrower ones filled up with white."""
    width = max(row.shape[1] for row in rows)
    margins = [((0, _GAP), (0, width - row.shape[1]), (0, 0)) for row in rows]
    padded = [np.pad(row, m, constant_values=_WHITE) for row, m in zip(rows, margins)]
    return np.concatenate(padded)[:-_GAP]


def stack_columns(columns: Sequence[np.ndarray]) -> np.ndarray:
    """Pictures, (H, W, 3), beside each other, as :func:`stack_rows`."""
    return stack_rows([column.transpose(1, 0, 2) for column in columns]).transpose(1, 0, 2)
