"""The assignment rules as they are written in the papers, for anchors anywhere: the oracle."""

from __future__ import annotations

import torch
from detectron2.structures import Boxes

from gfl_d2.modeling import Levels, Matches, aligned_iou


@torch.no_grad()
def plain_atss(
    anchors: list[Boxes],
    gt_boxes: Boxes,
    valid: torch.Tensor,
    topk: int = 9,
    predicted: torch.Tensor | None = None,
) -> torch.Tensor:
    """
    Distances to all anchors, sorted. Of equals the first comes first: of distances the anchor, of
    IoUs the box. With ``predicted`` boxes, shape (R, 4), it is dynamic ATSS.

    Returns:
        Tensor: shape (R,), the number of the box of each anchor, or -1.
    """
    boxes, gt = Boxes.cat(anchors).tensor, gt_boxes.tensor
    best_iou = torch.full((len(boxes),), -1.0).to(gt)
    assigned = torch.full((len(boxes),), -1)
    if len(gt) == 0:
        return assigned
    parts, first = [], 0
    for level in anchors:
        centers = level.get_centers().double()
        offset = centers - gt_boxes.get_centers().double()[:, None]
        distance = offset.square().sum(dim=-1)  # (M, Ri)
        distance[:, ~valid[first : first + len(level)]] = torch.inf
        distance, index = distance.sort(dim=1, stable=True)
        parts.append((distance[:, :topk].isfinite(), index[:, :topk] + first))
        first += len(level)
    is_candidate, index = (torch.cat(part, dim=1) for part in zip(*parts))

    ious = [aligned_iou(boxes[index], gt[:, None])]
    if predicted is not None:
        ious.append(aligned_iou(predicted[index], gt[:, None]))
    centers = Boxes.cat(anchors).get_centers()
    for m in range(len(gt)):
        candidates = index[m][is_candidate[m]].tolist()
        values = [iou[m][is_candidate[m]] for iou in ious]
        threshold = sum(x.mean() + (x.std() if len(x) > 1 else 0) for x in values)
        for i, iou in zip(candidates, sum(values)):
            x, y = centers[i]
            inside = min(x - gt[m, 0], y - gt[m, 1], gt[m, 2] - x, gt[m, 3] - y) > 0.01
            if inside and iou >= threshold and iou > best_iou[i]:
                best_iou[i], assigned[i] = iou, m
    return assigned


def dense(matches: Matches, levels: Levels) -> torch.Tensor:
    """Shape (N, R): the number of the box of each location, counted over all images, or -1."""
    maps = []
    for i, shape in enumerate(levels.shapes):
        matched = torch.full((len(levels.valid_sizes), *shape), -1)
        box, candidate = matches.is_positive[:, i].nonzero(as_tuple=True)
        row, column = matches.row[box, i, candidate], matches.column[box, i, candidate]
        matched[matches.image[box], row, column] = box
        maps.append(matched.flatten(1))
    return torch.cat(maps, dim=1)
