"""Detectron2's dataset mapper with errors that name the image, and flips in both directions."""

from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import transforms as T
from detectron2.data.detection_utils import SizeMismatchError
from PIL import Image

from ..errors import InputError

__all__ = ["GFLDatasetMapper"]


# Why an image cannot be read, where Pillow's own message is no good.
_REASONS = {
    FileNotFoundError: "no such file",
    Image.UnidentifiedImageError: "it is not an image",
}


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
        Raises InputError, which names the file, if the image is missing, truncated, no image, or
        of another size than the annotations say.
        """
        try:
            return super().__call__(dataset_dict)
        except SizeMismatchError as error:  # names the file already
            raise InputError(str(error)) from None
        # Pillow raises SyntaxError for some kinds of damage in PNG files.
        except (OSError, SyntaxError, Image.DecompressionBombError) as error:
            image = f"{dataset_dict['file_name']} (image_id {dataset_dict.get('image_id')})"
            reason = _REASONS.get(type(error), error)
            raise InputError(f"Cannot read image {image}: {reason}") from None
