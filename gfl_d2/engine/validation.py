"""Losses on datasets with ground truth."""

from __future__ import annotations

import logging

import torch
from detectron2.config import CfgNode
from detectron2.data import build_detection_test_loader
from detectron2.utils import comm
from detectron2.utils.events import EventStorage
from torch import Tensor

from ..data import GFLDatasetMapper, loading
from ..modeling import GFL
from ..modeling.criterion import LossSums, divide
from .random_state import preserved_random_state
from .steps import find_criterion, undivided_losses

__all__ = ["evaluate_losses"]

logger = logging.getLogger(__name__)


@torch.no_grad()
def evaluate_losses(cfg: CfgNode, model: GFL, dataset: str) -> dict[str, float]:
    """
    The losses that the model has on a dataset, as if all its images, at their size in evaluation,
    were one batch of the training; BatchNorm takes its running averages. Neither the model nor any
    random number changes.

    Args:
        model: without DistributedDataParallel. Each process takes a part of the images.

    Returns:
        dict: by name, and "total_loss"; the same on all processes. Empty if the dataset has no
        annotations.
    """
    criterion, was_training = find_criterion(model, "TEST.EVAL_LOSS False"), model.training
    mapper = GFLDatasetMapper(**{**GFLDatasetMapper.from_config(cfg, False), "is_train": True})
    model.eval()
    # Of the detector itself, not of its layers: it computes losses, they do not learn statistics.
    model.training = True
    try:
        # What the model logs is of no training.
        with preserved_random_state(), undivided_losses(criterion) as parts, EventStorage():
            with loading([dataset]):
                loader = build_detection_test_loader(cfg, dataset, mapper=mapper)
            for batch in loader:
                batch = [inputs for inputs in batch if "instances" in inputs]
                if batch:
                    model(batch)
    finally:
        model.train(was_training)
    # Processes have images in different numbers, perhaps none.
    shares = [share for share in comm.all_gather(_add_up(parts)) if share]
    if not shares:
        logger.warning(f"TEST.EVAL_LOSS: '{dataset}' has no annotations")
        return {}
    total = _add_up(shares)
    losses = divide(total, criterion.normalizers(total.divisors))
    losses["total_loss"] = sum(losses.values())
    return {name: loss.item() for name, loss in losses.items()}


def _add_up(parts: list[LossSums]) -> LossSums | None:
    """On the CPU, in float64; None of none."""
    if not parts:
        return None

    def add(values: list[Tensor]) -> Tensor:
        return torch.stack([value.double().cpu() for value in values]).sum(dim=0)

    return LossSums(
        scores={name: add([part.scores[name] for part in parts]) for name in parts[0].scores},
        boxes={name: add([part.boxes[name] for part in parts]) for name in parts[0].boxes},
        divisors=add([part.divisors for part in parts]),
    )
