"""The training objective of GFL: samples of the predictions with their targets, and the losses."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from detectron2.utils import comm
from torch import Tensor, nn

from ..errors import InputError
from .box_ops import aligned_iou, bbox_to_distance, distance_to_bbox
from .box_representation import BoxRepresentation, GeneralDistribution
from .distillation import Comparison, DistillationTerm
from .distributed import all_reduce_mean
from .losses import giou_loss, iou_loss
from .quality import JointQuality, Quality
from .structures import GroundTruth, Levels, Matches, Predictions, Samples

__all__ = ["GFLCriterion", "LossSums", "collect_samples", "divide"]

# By MODEL.GFL.BBOX_REG_LOSS_TYPE.
_BBOX_LOSSES = {"giou": giou_loss, "iou": iou_loss}


def collect_samples(
    predictions: Predictions,
    levels: Levels,
    matches: Matches,
    gt: GroundTruth,
    box: BoxRepresentation,
) -> Samples:
    """
    Args:
        predictions: of the head.
        levels: where they are.
        matches: the candidates of each ground-truth box.
        gt: the ground truth.
        box: how ``predictions.box_values`` stand for a box.

    Returns:
        Samples: the predictions at the candidates, with their targets. Gradients flow through
        ``box_values``, ``boxes`` and ``quality_logits`` only.
    """
    # 0 where nothing is positive: a prediction that overflows there must not reach the gradients.
    is_positive = matches.is_positive[..., None]
    box_values = torch.where(is_positive, matches.take(predictions.box_values), 0)
    strides = levels.strides[:, None, None]
    centers = levels.centers(matches.row, matches.column) / strides
    boxes = distance_to_bbox(centers, box.decode(box_values))
    gt_boxes = (gt.boxes[:, None, None] / strides).expand_as(boxes)
    quality_logits = None
    if predictions.quality_logits is not None:
        quality_logits = matches.take(predictions.quality_logits)
        quality_logits = torch.where(is_positive, quality_logits, 0).flatten()
    shape = matches.is_positive.shape
    return Samples(
        matches=matches,
        gt=gt,
        is_positive=matches.is_positive.flatten(),
        image=gt.image[:, None, None].expand(shape).flatten(),
        classes=gt.classes[:, None, None].expand(shape).flatten(),
        quality_logits=quality_logits,
        box_values=box_values.flatten(0, 2),
        boxes=boxes.flatten(0, 2),
        gt_boxes=gt_boxes.flatten(0, 2),
        gt_distances=bbox_to_distance(centers, gt_boxes).flatten(0, 2),
        iou=aligned_iou(boxes.detach(), gt_boxes).flatten(),
        weight=None if matches.weight is None else matches.weight.flatten(),
    )


class LossSums(NamedTuple):
    """Weighted sums over a batch, scalars by name, and what they are divided by."""

    scores: dict[str, Tensor]  # over all locations
    boxes: dict[str, Tensor]  # over the positives, weighted
    divisors: Tensor  # shape (2,): number of positives, sum of their weights


class GFLCriterion(nn.Module):
    """
    The sum of these terms:

    - of the scores, by ``quality``: sums over all locations, divided by the number of positives;
    - of the boxes, GIoU loss and those of ``box``: sums over the positives, weighted by ``quality``
      and divided by the sum of the weights;
    - those of ``distillation``, which compare with the predictions of a teacher.

    If the assigner gives the positives weights, these weigh all of it, and their sum is the number
    of positives.

    Both divisors are means over the processes. The criterion has no parameters.

    Losses of several batches, such as the parts of one, are those of all of them together if their
    :meth:`sums` are added up before the division, or each is given the divisors of all. Those of
    ``distillation`` are not among these.
    """

    def __init__(
        self,
        *,
        box: BoxRepresentation = GeneralDistribution(),
        quality: Quality = JointQuality(),
        bbox_loss: str = "giou",
        bbox_weight: float = 2.0,
        box_normalizer_min: float = 1.0,
        box_weight_min: float = 0.0,
        distillation: Sequence[DistillationTerm] = (),
    ):
        """
        Args:
            box, quality: those of the head.
            bbox_loss: of decoded boxes, "giou" or "iou".
            bbox_weight: weight of that loss.
            box_normalizer_min: lower bound of the sum of the weights.
            box_weight_min: lower bound of each weight.
            distillation: terms that need a teacher.
        """
        super().__init__()
        self.box = box
        self.quality = quality
        self.bbox_loss = _BBOX_LOSSES[bbox_loss]
        self.bbox_weight = bbox_weight
        self.box_normalizer_min = box_normalizer_min
        self.box_weight_min = box_weight_min
        self.distillation = list(distillation)

    def forward(
        self,
        predictions: Predictions,
        levels: Levels,
        samples: Samples,
        teacher: Predictions | None = None,
        normalizers: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            predictions: of the head.
            levels: where they are, and which of them are padding.
            samples: see :func:`collect_samples`.
            teacher: what a teacher predicts at the same places, for ``distillation``. Its class
                logits are those of its scores.
            normalizers: shape (2,), by which the terms of scores and of boxes are divided; by
                default the :meth:`normalizers` of this batch.

        Returns:
            dict[str, Tensor]: weighted scalars by name: ``loss_bbox`` and those of ``quality``,
            ``box`` and ``distillation``. They are finite, and connected to every prediction, also
            where there is no positive or no ground truth at all.

        Raises:
            InputError: there is ``distillation``, but no teacher.
        """
        if self.distillation and teacher is None:
            raise InputError(
                "MODEL.GFL.DISTILL.TERMS needs a teacher's predictions: train with gfl_d2.engine."
                "Trainer, give the model a `teacher`, or set MODEL.GFL.DISTILL.TERMS []"
            )
        sums = self.sums(predictions, levels, samples)
        if normalizers is None:
            normalizers = self.normalizers(sums.divisors)
        losses = divide(sums, normalizers)
        if self.distillation:
            scores = self.quality.score_maps(predictions, levels)
            student = Predictions(scores, predictions.box_values)
            weights = self.box_weights(predictions, samples)
            comparison = Comparison(
                student, teacher, levels, samples, weights, normalizers[0], self.box
            )
            for term in self.distillation:
                losses.update(term.losses(comparison))
        return losses

    def sums(self, predictions: Predictions, levels: Levels, samples: Samples) -> LossSums:
        """The losses before their division. Arguments as in :meth:`forward`."""
        score_terms = self.quality.losses(predictions, levels, samples)
        box_terms = {
            "loss_bbox": self.bbox_weight * self.bbox_loss(samples.boxes, samples.gt_boxes),
            **self.box.losses(samples.box_values, samples.gt_distances),
        }
        weights = self.box_weights(predictions, samples)
        num_pos = count_positives(samples, len(predictions.class_logits[0])).to(weights)
        return LossSums(
            scores=score_terms,
            boxes={name: (weights * samples.mask(loss)).sum() for name, loss in box_terms.items()},
            divisors=torch.stack((num_pos, weights.sum())),
        )

    def box_weights(self, predictions: Predictions, samples: Samples) -> Tensor:
        """
        Shape (P,): weights of the samples in the losses of the boxes, 0 of those that are not
        positive. Arguments as in :meth:`forward`.
        """
        weights = self.quality.box_weights(predictions, samples)
        return samples.weigh(weights.clamp(min=self.box_weight_min))

    def normalizers(self, divisors: Tensor) -> Tensor:
        """
        Shape (2,): what losses are divided by, the mean over the processes of these
        :attr:`LossSums.divisors`, of one batch or of several added up.
        """
        score_norm, box_norm = all_reduce_mean(divisors).unbind()
        score_norm = score_norm.clamp(min=1 / comm.get_world_size())  # 1 of all processes
        return torch.stack((score_norm, box_norm.clamp(min=self.box_normalizer_min)))

    @torch.no_grad()
    def diagnostics(self, samples: Samples, num_images: int) -> dict[str, Tensor]:
        """
        Scalars that tell whether training goes well: positives per image, their mean IoU, and the
        fraction of their box sides farther away than can be predicted. If the last is not small,
        objects are too large for n strides.
        """
        num_pos = samples.weigh(samples.is_positive.long()).sum()
        is_beyond = (samples.gt_distances > self.box.max_distance).sum(dim=1)
        return {
            "num_pos_per_image": num_pos / num_images,
            "pos_quality": samples.weigh(samples.iou).sum() / num_pos.clamp(min=1),
            "frac_sides_beyond_reg_max": samples.weigh(is_beyond).sum()
            / (4 * num_pos.clamp(min=1)),
        }


def divide(sums: LossSums, normalizers: Tensor) -> dict[str, Tensor]:
    """The losses by name; ``normalizers`` as in :meth:`GFLCriterion.forward`."""
    score_norm, box_norm = normalizers.unbind()
    losses = {name: loss / score_norm for name, loss in sums.scores.items()}
    losses.update({name: loss / box_norm for name, loss in sums.boxes.items()})
    return losses


def count_positives(samples: Samples, num_images: int) -> Tensor:
    """
    A scalar: the positives of all images, where an image without any counts as if it had one; or
    the sum of the weights, where positives have some.
    """
    if samples.weight is not None:
        return samples.mask(samples.weight).sum()
    counts = samples.image.new_zeros(num_images)
    counts.index_add_(0, samples.image, samples.is_positive.long())
    return counts.clamp(min=1).sum()
