"""Detectron2's dataset mapper with errors that name the image, and flips in both directions."""

from __future__ import annotations

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image

from ..errors import InputError

__all__ = ["GFLDatasetMapper"]


class GFLDatasetMapper(DatasetMapper):
    """
    :class:`detectron2.data.DatasetMapper`, which also takes ``INPUT.RANDOM_FLIP: "both"``: a
    horizontal and a vertical flip, each with probability 0.5, independently.
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
        Args:
            dataset_dict: one image in Detectron2's dataset format.

        Returns:
            dict: what Detectron2's models take.

        Raises:
            InputError: the image is missing, truncated, no image, or of another size than the
                annotations say; the message names the file.
        """
        try:
            return super().__call__(dataset_dict)
        except SizeMismatchError as error:  # names the file already
            raise InputError(str(error)) from None
        # Pillow raises SyntaxError for some kinds of damage in PNG files.
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            raise InputError(f"Cannot read image {_describe(dataset_dict, error)}") from None


def _describe(dataset_dict: dict, error: Exception) -> str:
    image = f"{dataset_dict['file_name']} (image_id {dataset_dict.get('image_id')})"
    if isinstance(error, FileNotFoundError):
        return f"{image}: no such file"
    if isinstance(error, Image.UnidentifiedImageError):
        return f"{image}: it is not an image"
    return f"{image}: {error}"
