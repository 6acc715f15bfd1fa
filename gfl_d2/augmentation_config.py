"""Configuration keys of the augmentations in training, and their checks."""

from detectron2.config import CfgNode as CN

from .config_checks import get_value, require

__all__ = ["add_augmentation_config", "check_augmentation_config"]


def add_augmentation_config(cfg: CN) -> None:
    """Add the keys, with their defaults, to a Detectron2 config (in place). All are off."""
    # Detectron2's INPUT.CROP works too. It comes before all of these.

    # Large-scale jitter, in the place of MIN_SIZE_TRAIN and MAX_SIZE_TRAIN: the image is resized to
    # fit into SIZE (height, width) times a factor from [MIN_SCALE, MAX_SCALE], and what is larger
    # than SIZE is cropped at random.
    cfg.INPUT.LSJ = CN()
    cfg.INPUT.LSJ.ENABLED = False
    cfg.INPUT.LSJ.SIZE = [1024, 1024]
    cfg.INPUT.LSJ.MIN_SCALE = 0.1
    cfg.INPUT.LSJ.MAX_SCALE = 2.0

    # Colours: factors from [1 - x, 1 + x] for brightness, contrast and saturation, x in [0, 1];
    # and AlexNet's noise along the main axes of ImageNet's colours, of this standard deviation,
    # >= 0 (0.1 there). For INPUT.FORMAT "RGB" and "BGR"; for "L" brightness and contrast.
    cfg.INPUT.COLOR = CN()
    cfg.INPUT.COLOR.BRIGHTNESS = 0.0
    cfg.INPUT.COLOR.CONTRAST = 0.0
    cfg.INPUT.COLOR.SATURATION = 0.0
    cfg.INPUT.COLOR.LIGHTING = 0.0

    # Probability, in [0, 1], that a training image is made of parts of four.
    cfg.INPUT.MOSAIC = CN()
    cfg.INPUT.MOSAIC.PROB = 0.0
    # Probability, in [0, 1], that boxes of another image are pasted where no box is.
    cfg.INPUT.COPY_PASTE = CN()
    cfg.INPUT.COPY_PASTE.PROB = 0.0
    # Neither of the two in this share of SOLVER.MAX_ITER, at its end, in [0, 1].
    cfg.INPUT.CLOSE_MIXING = 0.0
    # With CROP, LSJ, MOSAIC or COPY_PASTE, a box is left out if less than this share of its area,
    # in [0, 1], is left in the training image.
    cfg.INPUT.MIN_VISIBILITY = 0.1


def check_augmentation_config(cfg: CN) -> None:
    """
    Check these keys and Detectron2's INPUT.CROP.

    Raises:
        InputError: the message names the key.
    """
    colors, lsj, crop = cfg.INPUT.COLOR, cfg.INPUT.LSJ, cfg.INPUT.CROP
    for key in ("MOSAIC.PROB", "COPY_PASTE.PROB", "CLOSE_MIXING", "MIN_VISIBILITY"):
        _require(cfg, key, lambda x: 0 <= x <= 1, "in [0, 1]")
    for key in ("BRIGHTNESS", "CONTRAST", "SATURATION"):
        _require(cfg, f"COLOR.{key}", lambda x: 0 <= x <= 1, "in [0, 1]")
    _require(cfg, "COLOR.LIGHTING", lambda x: x >= 0, ">= 0")
    formats = ("RGB", "BGR") if colors.SATURATION or colors.LIGHTING else ("RGB", "BGR", "L")
    if any(colors.values()):
        names = "SATURATION and LIGHTING" if len(formats) == 2 else "BRIGHTNESS and CONTRAST"
        _require(cfg, "FORMAT", lambda x: x in formats, f"one of {formats} for INPUT.COLOR.{names}")
    if lsj.ENABLED:
        _require(cfg, "LSJ.SIZE", _is_size, "height and width, in pixels, >= 32")
        is_range = 0 < lsj.MIN_SCALE <= lsj.MAX_SCALE
        _require(cfg, "LSJ.MIN_SCALE", lambda _: is_range, "> 0, and at most LSJ.MAX_SCALE")
        least = lsj.MIN_SCALE * min(lsj.SIZE)
        _require(cfg, "LSJ.MIN_SCALE", lambda _: least >= 8, "8 pixels of LSJ.SIZE or more")
    if crop.ENABLED:
        _check_crop(cfg)
    if cfg.INPUT.MOSAIC.PROB or cfg.INPUT.COPY_PASTE.PROB:
        when = "with INPUT.MOSAIC and INPUT.COPY_PASTE"
        for key in ("MODEL.MASK_ON", "MODEL.KEYPOINT_ON"):
            require(cfg, key, not get_value(cfg, key), f"False {when}: they have boxes only")
        allowed = f"False {when}: its statistics would be of mixed images to the end"
        is_precise = cfg.TEST.PRECISE_BN.ENABLED
        require(cfg, "TEST.PRECISE_BN.ENABLED", not is_precise, allowed)


def _require(cfg: CN, key: str, holds, allowed: str) -> None:
    require(cfg, f"INPUT.{key}", holds(get_value(cfg, f"INPUT.{key}")), allowed)


def _is_size(value) -> bool:
    return len(value) == 2 and all(isinstance(x, int) and x >= 32 for x in value)


def _check_crop(cfg: CN) -> None:
    kinds = ("relative", "relative_range", "absolute", "absolute_range")
    kind = cfg.INPUT.CROP.TYPE
    _require(cfg, "CROP.TYPE", lambda x: x in kinds, f"one of {kinds}")
    _require(cfg, "CROP.SIZE", lambda x: len(x) == 2, f"two numbers for CROP.TYPE {kind!r}")
    if kind.startswith("relative"):
        allowed = f"shares of height and width, in (0, 1], for CROP.TYPE {kind!r}"
        _require(cfg, "CROP.SIZE", lambda x: all(0 < side <= 1 for side in x), allowed)
    else:
        allowed = f"pixels, whole numbers >= 1, for CROP.TYPE {kind!r}"
        are_pixels = all(isinstance(x, int) and x >= 1 for x in cfg.INPUT.CROP.SIZE)
        _require(cfg, "CROP.SIZE", lambda _: are_pixels, allowed)
    if kind == "absolute_range":
        allowed = "least and largest side, in this order, for CROP.TYPE 'absolute_range'"
        _require(cfg, "CROP.SIZE", lambda x: x[0] <= x[1], allowed)
