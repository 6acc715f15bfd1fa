"""Pictures in TensorBoard of what a model in training detects."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.engine import HookBase
from detectron2.structures import Instances

from ..data import GFLDatasetMapper, loading
from ..distributions import detect_with_distributions, draw_distributions
from ..modeling import GFL, GeneralDistribution
from ..visualization import draw_comparison, read_images
from .random_state import preserved_random_state

__all__ = ["PictureWriter"]

_NUM_IMAGES = 3
_SCORE_THRESH = 0.3
_NUM_DISTRIBUTIONS = 2  # detections of an image that are shown with theirs


class PictureWriter(HookBase):
    """
    Draw detections on the first images of a dataset, always the same, beside their ground truth,
    and the distributions of the best ones. Neither the model nor any random number changes.

    It comes after the hook that averages weights, and only on the process that writes.
    """

    def __init__(self, cfg: CfgNode, model: GFL):
        """``model``: whose detections are drawn, without DistributedDataParallel."""
        self._cfg, self._model, self._period = cfg, model, cfg.VIS_PERIOD
        self._dataset = (*cfg.DATASETS.TEST, *cfg.DATASETS.TRAIN)[0]

    def after_step(self) -> None:
        is_last = self.trainer.iter + 1 == self.trainer.max_iter
        if (self.trainer.iter + 1) % self._period == 0 or is_last:
            was_training = self._model.training
            self._model.eval()
            try:
                with preserved_random_state():
                    self._draw(self.trainer.storage.put_image)
            finally:
                self._model.train(was_training)

    @torch.no_grad()
    def _draw(self, put: Callable[[str, np.ndarray], None]) -> None:
        metadata = MetadataCatalog.get(self._dataset)
        names = metadata.get("thing_classes") or range(self._model.num_classes)
        mapper = GFLDatasetMapper(self._cfg, is_train=False)
        with loading([self._dataset]):
            records = DatasetCatalog.get(self._dataset)
        for i, (record, image) in enumerate(read_images(records, _NUM_IMAGES)):
            inputs = mapper(record)
            inputs["height"], inputs["width"] = image.shape[:2]
            has_distributions = isinstance(self._model.head.box, GeneralDistribution)
            if has_distributions:
                found = detect_with_distributions(self._model, inputs)
            else:
                found = self._model([inputs])[0]["instances"].to("cpu")
            picture = draw_comparison(image, record, found, metadata, _SCORE_THRESH)
            put(f"detections/{i}", picture.transpose(2, 0, 1))
            if has_distributions:
                put(f"distributions/{i}", _draw_best(image, found, names).transpose(2, 0, 1))


def _draw_best(image: np.ndarray, found: Instances, names) -> np.ndarray:
    number = int((found.scores >= _SCORE_THRESH).sum())  # in order of scores
    chosen = range(min(number, _NUM_DISTRIBUTIONS))
    return draw_distributions(image, found[:number], names, chosen)
