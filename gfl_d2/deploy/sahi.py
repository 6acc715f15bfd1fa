"""Our detectors in SAHI (sliced inference), as one of its detection models."""

from __future__ import annotations

import numpy as np
from sahi.models.detectron2 import Detectron2DetectionModel

from ..checkpoint import load_checkpoint_config
from ..config import load_config
from .predictor import Predictor

__all__ = ["GFLDetectionModel"]


class GFLDetectionModel(Detectron2DetectionModel):
    """
    SAHI's detection model for Detectron2, with this project's config and :class:`Predictor`. It
    takes the arguments of SAHI's ``AutoDetectionModel.from_pretrained`` after ``model_type``:
    ``model_path`` is a checkpoint. ``config_path`` is only needed if that carries no config.
    ``model`` may be a :class:`Predictor`.

    Raises:
        InputError: as :class:`Predictor` does.
    """

    def load_model(self) -> None:
        opts = ["MODEL.DEVICE", str(self.device)]
        if self.image_size is not None:
            opts += ["INPUT.MIN_SIZE_TEST", self.image_size, "INPUT.MAX_SIZE_TEST", self.image_size]
        if self.config_path is None:
            cfg = load_checkpoint_config(self.model_path, opts)
        else:
            cfg = load_config(self.config_path, [*opts, "MODEL.WEIGHTS", self.model_path])
        self.set_model(Predictor(cfg))

    def set_model(self, model: Predictor, **kwargs: object) -> None:
        self.model = model
        if self.category_mapping is None:
            number = model.cfg.MODEL.GFL.NUM_CLASSES
            names = model.metadata.get("thing_classes") or map(str, range(number))
            self.category_mapping = {str(i): name for i, name in enumerate(names)}
        self.category_names = list(self.category_mapping.values())

    def perform_inference(self, image: np.ndarray) -> None:
        """``image``: shape (H, W, 3), RGB."""
        # A Predictor takes BGR, whatever its model needs. SAHI's own class does so for BGR alone.
        self._original_predictions = self.model(np.ascontiguousarray(image[:, :, ::-1]))
