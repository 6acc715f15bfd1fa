"""SAPD as it is written in the paper, location by location, in float64: the oracle."""

from __future__ import annotations

import math

import torch
from torch import Tensor

ALPHA, GAMMA, SHRINK, NUM_LEVELS = 0.25, 2, 0.2, 3


def find_owners(stride: int, boxes: list[list[float]]) -> dict[tuple[float, float], int]:
    """By the x and y of a location: the smallest box that has it among its own."""
    areas = [(right - left) * (bottom - top) for left, top, right, bottom in boxes]
    owners = {}
    for m in sorted(range(len(boxes)), key=areas.__getitem__):
        left, top, right, bottom = boxes[m]
        for x in central(left, right, stride):
            for y in central(top, bottom, stride):
                if min(x - left, y - top, right - x, bottom - y) > 0.01:
                    owners.setdefault((x, y), m)
    return owners


def central(start: float, end: float, stride: int) -> list[float]:
    """The locations in the middle part of a side, or the nearest to the middle if there is none."""
    middle, half = (start + end) / 2, SHRINK * (end - start) / 2
    around = [(math.floor(middle / stride) + i + 0.5) * stride for i in range(-99, 100)]
    return [x for x in around if abs(x - middle) <= half] or [
        min(around, key=lambda x: abs(x - middle))
    ]


def plain_focal_loss(logits: Tensor, label: int | None) -> Tensor:
    """A scalar, of the logits of one location. A location of no object has no label."""
    p = logits.sigmoid()
    loss = -(1 - ALPHA) * p**GAMMA * (1 - p).log()
    if label is None:
        return loss.sum()
    p = p[label]
    return loss.sum() - loss[label] - ALPHA * (1 - p) ** GAMMA * p.log()


def plain_iou_loss(box: Tensor, target: list[float]) -> Tensor:
    width = torch.clamp(box[2], max=target[2]) - torch.clamp(box[0], min=target[0])
    height = torch.clamp(box[3], max=target[3]) - torch.clamp(box[1], min=target[1])
    area = (box[2] - box[0]) * (box[3] - box[1])
    both = width * height
    return -(both / (area + (target[2] - target[0]) * (target[3] - target[1]) - both)).log()


def plain_sapd(
    images: list[tuple[list[list[float]], list[int], tuple[int, int]]],
    strides: tuple[int, ...],
    logits: list[Tensor],
    boxes: list[Tensor],
    level_probs: list[list[list[float]]],
    is_hard: bool,
) -> tuple[list[Tensor], list[list[int | None]], Tensor, Tensor]:
    """
    Args:
        images: of each the ground-truth boxes, their classes, and its height and width.
        logits: L maps of shape (N, C, Hi, Wi).
        boxes: L maps of shape (N, 4, Hi, Wi), what is predicted, in pixels.
        level_probs: for each image and box, of the L levels.

    Returns:
        weights: L maps of shape (N, Hi, Wi): of positives in the losses, and -1 elsewhere.
        best: for each image and box the level of least loss, None for a box without locations.
        loss_cls, loss_bbox: scalars.
    """
    weights = [torch.full((x.shape[0], *x.shape[2:]), -1.0, dtype=torch.float64) for x in logits]
    best, parts, total = [], [], 0.0
    for n, (gt, classes, (height, width)) in enumerate(images):
        of_level = []  # by level: box -> its locations, with their losses
        for i, stride in enumerate(strides):
            of_level.append([[] for _ in gt])
            owners = find_owners(stride, gt)
            for row in range(-(-height // stride)):
                for column in range(-(-width // stride)):
                    x, y = (column + 0.5) * stride, (row + 0.5) * stride
                    m, at = owners.get((x, y)), logits[i][n, :, row, column]
                    if m is None:
                        parts.append((1.0, plain_focal_loss(at, None), at.new_zeros(())))
                        continue
                    losses = (
                        plain_focal_loss(at, classes[m]),
                        plain_iou_loss(boxes[i][n, :, row, column], gt[m]),
                    )
                    of_level[i][m].append((row, column, x, y, losses))
        best.append([])
        for m, (left, top, right, bottom) in enumerate(gt):
            found = [level[m] for level in of_level]
            means = {
                i: sum(float(sum(losses).detach()) for *_, losses in places) / len(places)
                for i, places in enumerate(found)
                if places
            }
            best[n].append(min(means, key=means.get, default=None))
            probs = {i: level_probs[n][m][i] for i in means}
            chosen = sorted(probs, key=probs.get, reverse=True)[:NUM_LEVELS]
            share = {best[n][m]: 1.0} if is_hard else {i: probs[i] for i in chosen}
            for i, places in enumerate(found):
                for row, column, x, y, losses in places:
                    lr, tb = sorted((x - left, right - x)), sorted((y - top, bottom - y))
                    weight = share.get(i, 0.0) * (lr[0] * tb[0]) / (lr[1] * tb[1])
                    weights[i][n, row, column] = weight
                    parts.append((weight, *losses))
                    total += weight
    total = max(total, 1)
    loss_cls, loss_bbox = (sum(part[0] * part[k] for part in parts) / total for k in (1, 2))
    return weights, best, loss_cls, loss_bbox
