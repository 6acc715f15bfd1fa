"""Configuration keys of GFL, in the style of :mod:`detectron2.config.defaults`."""

from detectron2.config import CfgNode as CN

from .errors import InputError

__all__ = ["add_gfl_config", "check_gfl_config"]


def add_gfl_config(cfg: CN) -> None:
    """Add the keys of this project, with their defaults, to a Detectron2 config (in place)."""
    _C = cfg

    # Datasets in COCO format to register before use: a list of [name, json_file, image_root].
    # Relative paths are looked for in the current directory, then in $DETECTRON2_DATASETS.
    _C.DATASETS.REGISTER = []

    # Metric whose best value keeps `model_best.pth`, e.g. "bbox/AP"; "" keeps none.
    # Needs TEST.EVAL_PERIOD > 0.
    _C.TEST.BEST_CHECKPOINT_METRIC = "bbox/AP"

    # Train under autocast to bfloat16, on a CPU or GPU that has it. It needs no gradient scaling,
    # unlike SOLVER.AMP, which is Detectron2's float16 for GPUs; not both.
    _C.SOLVER.BF16 = False

    # Start every residual block as the identity, by a zero scale in its last normalization: for
    # training from random initialization with build_gfl_resnet_fpn_backbone. Needs a trainable
    # MODEL.RESNETS.NORM.
    _C.MODEL.RESNETS.ZERO_INIT_RESIDUAL = False

    _C.MODEL.GFL = CN()
    # Number of foreground classes, >= 1.
    _C.MODEL.GFL.NUM_CLASSES = 80
    # Backbone features used by the head, from high to low resolution. All need the same channels.
    _C.MODEL.GFL.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions in each of the two towers (classification and box), >= 0.
    _C.MODEL.GFL.NUM_CONVS = 4
    # Channels of the towers, >= 1; when NORM is "GN" a multiple of 32, >= 64 (its 32 groups need
    # more than one value each, also on a map of 1x1).
    _C.MODEL.GFL.CONV_DIM = 256
    # Normalization in the towers: any name known to detectron2.layers.get_norm, "" for none.
    _C.MODEL.GFL.NORM = "GN"
    # Score of every class at the start of training, in (0, 1); sets the classifier's bias.
    _C.MODEL.GFL.PRIOR_PROB = 0.01
    # n, the last bin of the box distributions, in strides: n + 1 bins, distances in [0, n]. >= 1.
    _C.MODEL.GFL.REG_MAX = 16

    # Side of the one square anchor of a location, in strides, > 0. The anchor centre of cell
    # (i, j) is at ((i + o) * stride, (j + o) * stride), o = MODEL.ANCHOR_GENERATOR.OFFSET (0.0).
    _C.MODEL.GFL.ANCHOR_SCALE = 8.0
    # Candidates per level and ground-truth box in the ATSS assignment, >= 1.
    _C.MODEL.GFL.ATSS_TOPK = 9

    # Exponent beta of the modulating factor |y - sigma|^beta of QFL: 0, or >= 1.
    _C.MODEL.GFL.QFL_BETA = 2.0
    # Weights of the three losses, >= 0.
    _C.MODEL.GFL.LOSS_QFL_WEIGHT = 1.0
    _C.MODEL.GFL.LOSS_BBOX_WEIGHT = 2.0
    _C.MODEL.GFL.LOSS_DFL_WEIGHT = 0.25
    # Lower bound, > 0, of the sum of the positives' scores by which the box losses are divided.
    # 1.0 is the reference implementation's. It shrinks both box losses while that sum is smaller,
    # at the very start of training or with few objects an image; a small value prevents that.
    _C.MODEL.GFL.BOX_NORMALIZER_MIN = 1.0

    # Inference. Only (location, class) pairs that score higher than this are kept, in [0, 1).
    _C.MODEL.GFL.SCORE_THRESH_TEST = 0.05
    # Best pairs kept on each level before NMS, >= 1.
    _C.MODEL.GFL.TOPK_CANDIDATES_TEST = 1000
    # IoU above which NMS suppresses a box of the same class, in [0, 1].
    _C.MODEL.GFL.NMS_THRESH_TEST = 0.6


def check_gfl_config(cfg: CN) -> None:
    """
    Check the values of ``MODEL.GFL`` and of the keys that GFL depends on.

    Raises:
        InputError: a value is out of range or contradicts another; the message names the key.
    """
    gfl = cfg.MODEL.GFL
    rules = {
        "NUM_CLASSES": (gfl.NUM_CLASSES >= 1, ">= 1"),
        "IN_FEATURES": (len(gfl.IN_FEATURES) >= 1, "a list of at least one feature name"),
        "NUM_CONVS": (gfl.NUM_CONVS >= 0, ">= 0"),
        "CONV_DIM": (gfl.CONV_DIM >= 1, ">= 1"),
        "PRIOR_PROB": (0 < gfl.PRIOR_PROB < 1, "in (0, 1)"),
        "REG_MAX": (gfl.REG_MAX >= 1, ">= 1"),
        "ANCHOR_SCALE": (gfl.ANCHOR_SCALE > 0, "> 0"),
        "ATSS_TOPK": (gfl.ATSS_TOPK >= 1, ">= 1"),
        # For 0 < beta < 1 the gradient of QFL is infinite where the prediction meets the target.
        "QFL_BETA": (gfl.QFL_BETA == 0 or gfl.QFL_BETA >= 1, "0 or >= 1"),
        "LOSS_QFL_WEIGHT": (gfl.LOSS_QFL_WEIGHT >= 0, ">= 0"),
        "LOSS_BBOX_WEIGHT": (gfl.LOSS_BBOX_WEIGHT >= 0, ">= 0"),
        "LOSS_DFL_WEIGHT": (gfl.LOSS_DFL_WEIGHT >= 0, ">= 0"),
        "BOX_NORMALIZER_MIN": (gfl.BOX_NORMALIZER_MIN > 0, "> 0"),
        "SCORE_THRESH_TEST": (0 <= gfl.SCORE_THRESH_TEST < 1, "in [0, 1)"),
        "TOPK_CANDIDATES_TEST": (gfl.TOPK_CANDIDATES_TEST >= 1, ">= 1"),
        "NMS_THRESH_TEST": (0 <= gfl.NMS_THRESH_TEST <= 1, "in [0, 1]"),
    }
    for key, (holds, allowed) in rules.items():
        if not holds:
            raise InputError(f"MODEL.GFL.{key} must be {allowed}, got {gfl[key]!r}")
    if gfl.NORM == "GN" and gfl.NUM_CONVS > 0 and (gfl.CONV_DIM % 32 or gfl.CONV_DIM < 64):
        raise InputError(
            "MODEL.GFL.CONV_DIM must be a multiple of 32, and at least 64, when MODEL.GFL.NORM is "
            f"'GN', got {gfl.CONV_DIM}"
        )
    if cfg.MODEL.RESNETS.ZERO_INIT_RESIDUAL and cfg.MODEL.RESNETS.NORM in ("", "FrozenBN"):
        raise InputError(
            "MODEL.RESNETS.ZERO_INIT_RESIDUAL needs a trainable MODEL.RESNETS.NORM such as 'BN', "
            f"not {cfg.MODEL.RESNETS.NORM!r}"
        )
    if not 0 <= cfg.MODEL.ANCHOR_GENERATOR.OFFSET < 1:
        raise InputError(
            "MODEL.ANCHOR_GENERATOR.OFFSET must be in [0, 1), "
            f"got {cfg.MODEL.ANCHOR_GENERATOR.OFFSET}"
        )
