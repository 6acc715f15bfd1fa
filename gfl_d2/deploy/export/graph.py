"""The detector from pixels to boxes as one module of tensors."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import nms

from ...modeling import GFL, Predictions
from ...modeling.post_processing import Candidates

__all__ = ["DetectorGraph"]


class DetectorGraph(nn.Module):
    """
    Inputs and outputs as in :mod:`gfl_d2.deploy.export`. No shape depends on a value, but inside of
    NMS. It can be traced and exported.
    """

    def __init__(self, model: GFL, *, with_nms: bool):
        """``model``: in eval mode; backbone and head may be in another precision."""
        super().__init__()
        self.model = model
        self.with_nms = with_nms

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        model = self.model
        pixels = (images - model.pixel_mean) / model.pixel_std
        # The padding is 0 after normalization, whatever it was before.
        pixels = torch.where(_inside(pixels, image_sizes), pixels, 0)
        features = model.backbone(pixels.to(model.head.scales.dtype))
        predictions = model.head([features[name] for name in model.head_in_features])
        candidates = model.candidates(Predictions(*predictions), image_sizes)
        if not self.with_nms:
            return _best(candidates, candidates.scores.shape[1])
        return self.best_detections(candidates, image_sizes)

    def best_detections(
        self, candidates: Candidates, image_sizes: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """NMS of all images at once."""
        limit = self.model.max_detections_per_image
        kept = self._kept_scores(candidates, image_sizes)
        # As many more without a score: there may be fewer candidates than `limit`.
        boxes = F.pad(candidates.boxes, (0, 0, 0, limit))
        labels = F.pad(candidates.classes, (0, limit))
        return _best(Candidates(boxes, F.pad(kept, (0, limit)), labels), limit)

    def _kept_scores(self, candidates: Candidates, image_sizes: Tensor) -> Tensor:
        """Shape (N, K): the scores of what NMS leaves; 0 elsewhere."""
        boxes, scores, groups = candidates
        image = torch.arange(scores.shape[0], device=scores.device)[:, None]
        if self.model.test_nms_class_agnostic:
            groups = image.expand_as(groups)
        else:
            groups = groups + image * self.model.num_classes
        # Boxes of different groups are moved apart. In float64, where this rounds nothing away.
        offsets = groups * (image_sizes.amax() + 1)
        boxes = boxes.double() + offsets[..., None]
        flat = scores.flatten()
        (found,) = flat.nonzero(as_tuple=True)
        boxes = boxes.flatten(0, 1)[found]
        kept = found[nms(boxes, flat[found].to(boxes), self.model.test_nms_thresh)]
        return torch.zeros_like(flat).scatter(0, kept, flat[kept]).view_as(scores)


def _inside(images: Tensor, image_sizes: Tensor) -> Tensor:
    """Shape (N, 1, H, W), False in the padding."""
    height, width = images.shape[-2:]
    rows = torch.arange(height, device=images.device) < image_sizes[:, :1]
    columns = torch.arange(width, device=images.device) < image_sizes[:, 1:]
    return (rows[:, :, None] & columns[:, None, :])[:, None]


def _best(candidates: Candidates, number: int | Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The ``number`` best of each image, by falling score."""
    scores, order = candidates.scores.topk(number, dim=1)
    boxes = candidates.boxes.gather(1, order[..., None].expand(-1, -1, 4))
    return boxes, scores, candidates.classes.gather(1, order)
