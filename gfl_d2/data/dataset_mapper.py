"""Detectron2's dataset mapper for boxes."""

import copy

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T

from ..errors import InputError
from .images import read_image

__all__ = ["GFLDatasetMapper"]


class GFLDatasetMapper(DatasetMapper):
    """
    :class:`detectron2.data.DatasetMapper` for boxes. It reads images by
    :func:`gfl_d2.data.read_image`, and takes ``INPUT.RANDOM_FLIP: "both"``: a horizontal and a
    vertical flip, each with probability 0.5, independently.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        flips_both_ways = cfg.INPUT.RANDOM_FLIP == "both"
        if flips_both_ways:
            cfg = cfg.clone()
            cfg.defrost()
            cfg.INPUT.RANDOM_FLIP = "horizontal"
        ret = super().from_config(cfg, is_train)
        if flips_both_ways and is_train:
            ret["augmentations"].append(T.RandomFlip(horizontal=False, vertical=True))
        return ret

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Raises InputError, which names the file, if the image cannot be read or is of another size
        than the annotations say.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        image = read_image(dataset_dict["file_name"], self.image_format)
        try:
            detection_utils.check_image_size(dataset_dict, image)
        except detection_utils.SizeMismatchError as error:  # names the file
            raise InputError(str(error)) from None
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        image = aug_input.image
        dataset_dict["image"] = torch.as_tensor(np.ascontiguousarray(image.transpose(2, 0, 1)))
        if self.is_train and "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image.shape[:2])
        else:
            dataset_dict.pop("annotations", None)
        return dataset_dict
