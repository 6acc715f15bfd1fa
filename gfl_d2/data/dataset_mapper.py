"""Detectron2's dataset mapper for boxes."""

from __future__ import annotations

import copy
from collections.abc import Sequence

import numpy as np
import torch
from detectron2.config import CfgNode, configurable
from detectron2.data import DatasetMapper, detection_utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode

from ..errors import InputError
from .augmentation import adapt_augmentations
from .images import read_image
from .mixing import Mixing, Sample, area, cut, is_visible
from .workers import note_image

__all__ = ["GFLDatasetMapper"]


class GFLDatasetMapper(DatasetMapper):
    """
    :class:`detectron2.data.DatasetMapper` for boxes. It reads images by
    :func:`gfl_d2.data.read_image`, and takes ``INPUT.RANDOM_FLIP: "both"``: a horizontal and a
    vertical flip, each with probability 0.5, independently; and the other augmentations of
    :mod:`gfl_d2.augmentation_config`.
    """

    @configurable
    def __init__(
        self,
        is_train: bool,
        *,
        min_visibility: float = 0.0,
        mixing: Mixing | None = None,
        records: Sequence[dict] = (),
        **kwargs,
    ):
        """
        Args:
            min_visibility: ``INPUT.MIN_VISIBILITY``, 0 where nothing is cut off.
            mixing: mixes a training image with others.
            records: the images to mix with, in Detectron2's dataset format.
            kwargs: as of :class:`DatasetMapper`.
        """
        super().__init__(is_train, **kwargs)
        self.min_visibility, self.mixing, self.records = min_visibility, mixing, records

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        inputs = cfg.INPUT
        flips_both_ways = inputs.RANDOM_FLIP == "both"
        plain_cfg = cfg
        if flips_both_ways:
            plain_cfg = cfg.clone()
            plain_cfg.defrost()
            plain_cfg.INPUT.RANDOM_FLIP = "horizontal"
        ret = super().from_config(plain_cfg, is_train)
        if flips_both_ways and is_train:
            ret["augmentations"].append(T.RandomFlip(horizontal=False, vertical=True))
        ret["augmentations"] = adapt_augmentations(ret["augmentations"], cfg, is_train)
        if not is_train:
            return ret
        ret["mixing"] = Mixing.from_config(cfg)
        has_masks = ret["use_instance_mask"] or ret["use_keypoint"]
        if ret["mixing"] or ((inputs.CROP.ENABLED or inputs.LSJ.ENABLED) and not has_masks):
            ret["min_visibility"] = inputs.MIN_VISIBILITY
        return ret

    def __call__(self, dataset_dict: dict) -> dict:
        """
        Raises InputError, which names the file, if the image cannot be read or is of another size
        than the annotations say.
        """
        dataset_dict = copy.deepcopy(dataset_dict)
        if (self.mixing or self.min_visibility) and "annotations" in dataset_dict:
            image, dataset_dict["annotations"] = self.augment(dataset_dict)
            transforms = T.TransformList([])
        else:
            image, transforms = self._augment_image(dataset_dict)
        # A copy: arrays of Pillow cannot be written to.
        dataset_dict["image"] = torch.as_tensor(np.array(image.transpose(2, 0, 1), order="C"))
        if self.is_train and "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image.shape[:2])
        else:
            dataset_dict.pop("annotations", None)
        return dataset_dict

    def augment(self, dataset_dict: dict) -> Sample:
        """
        What the model gets of an image with boxes, and its crowds, which it does not get.

        Args:
            dataset_dict: with ``annotations``, and the ``iteration`` of the training, 0 if it is
                not there.
        """
        sample = self._augment_alone(dataset_dict)
        if not self.mixing:
            return sample
        return self._drop(self.mixing(sample, self._draw, dataset_dict.get("iteration", 0)))

    def _draw(self) -> Sample:
        if len(self.records) == 0:
            raise InputError("INPUT.MOSAIC and INPUT.COPY_PASTE need GFLDatasetMapper(records=...)")
        return self._augment_alone(self.records[np.random.randint(len(self.records))])

    def _augment_alone(self, dataset_dict: dict) -> Sample:
        """An image and its boxes, before it is mixed."""
        image, transforms = self._augment_image(dataset_dict)
        # Of a box that was annotated beyond its image, the whole is what is inside.
        sides = np.tile([dataset_dict["width"], dataset_dict["height"]], 2)
        annotations = []
        for annotation in dataset_dict.get("annotations", ()):
            box = BoxMode.convert(annotation["bbox"], annotation["bbox_mode"], BoxMode.XYXY_ABS)
            # As float: transforms of integers give integers.
            box = transforms.apply_box(np.clip([box], 0.0, sides))[0]
            annotations.append({
                **annotation, "bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "whole_area": area(box)
            })  # fmt: skip
        return self._drop(Sample(image, cut(annotations, (0, 0, image.shape[1], image.shape[0]))))

    def _drop(self, sample: Sample) -> Sample:
        """Without boxes of which too little is left."""
        least = self.min_visibility
        return Sample(sample.image, [a for a in sample.annotations if is_visible(a, least)])

    def _augment_image(self, dataset_dict: dict) -> tuple[np.ndarray, T.TransformList]:
        note_image(dataset_dict["file_name"])
        image = read_image(dataset_dict["file_name"], self.image_format)
        try:
            detection_utils.check_image_size(dataset_dict, image)  # which adds a missing size
        except detection_utils.SizeMismatchError as error:  # names the file
            raise InputError(str(error)) from None
        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        return aug_input.image, transforms
