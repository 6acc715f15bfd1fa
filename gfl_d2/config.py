"""Configuration keys of GFL, in the style of :mod:`detectron2.config.defaults`."""

import logging
import os
import re
from collections.abc import Callable, Sequence

import torch
import yaml
from detectron2.config import CfgNode as CN
from detectron2.config import get_cfg

from .backbone_config import add_backbone_config
from .config_checks import check_config, check_gfl_config
from .errors import InputError
from .plain_data import check_yaml
from .training_config import add_training_config, check_training_config

__all__ = [
    "add_gfl_config", "check_config", "check_gfl_config", "check_training_config", "choose_device",
    "load_config", "parse_config",
]  # fmt: skip

logger = logging.getLogger(__name__)


def add_gfl_config(cfg: CN) -> None:
    """Add the keys of this project, with their defaults, to a Detectron2 config (in place)."""
    add_backbone_config(cfg)
    add_training_config(cfg)
    # Datasets in COCO format to register before use: a list of [name, json_file, image_root], or of
    # folders, each with one of the layouts that gfl_d2.data.register_datasets knows.
    # Relative paths are looked for in the current directory, then in $DETECTRON2_DATASETS.
    cfg.DATASETS.REGISTER = []
    # Names of the classes to use of these datasets, in this order; all if empty. Boxes of others
    # are left out in training, evaluation and drawing.
    cfg.DATASETS.CLASSES = []

    # How images are resized, in training, evaluation and Predictor: "pillow", its bilinear filter,
    # which averages what a pixel covers, or "opencv", bilinear interpolation of four pixels, as in
    # the reference implementation and many deployed pipelines.
    cfg.INPUT.RESIZE_FILTER = "pillow"

    # Metric whose highest value keeps `model_best.pth`: "bbox/AP", or "<dataset>/bbox/AP" when
    # DATASETS.TEST has several; "" keeps none. Needs TEST.EVAL_PERIOD > 0.
    cfg.TEST.BEST_CHECKPOINT_METRIC = "bbox/AP"

    # Of `train_net.py --eval-only` and gfl_d2.deploy.Predictor. The same results, but for rounding,
    # in less time: BatchNorm folded into the convolutions, and memory format channels_last.
    cfg.TEST.OPTIMIZE = True
    # Precision of backbone and head: "float32", "bfloat16" or "float16" (on a GPU). Boxes are
    # decoded in float32 always.
    cfg.TEST.PRECISION = "float32"
    # Compile backbone and head by torch.compile, in one of its modes: "default", or
    # "reduce-overhead" (CUDA graphs) and so on; "" for not at all. The first images take minutes,
    # and more follow where sizes change.
    cfg.TEST.COMPILE = ""
    # Detections also have `box_std` (pixels) and `box_entropy` (nats), of shape (N, 4): how unsure
    # the left, top, right and bottom side are. Not with BOX_REPRESENTATION "dirac".
    cfg.TEST.UNCERTAINTY = False
    # File that tools/analyze_results.py --fit wrote: maps the scores of detections, after NMS and
    # all thresholds of MODEL.GFL, which are of the scores before it; "" for none. A checkpoint
    # keeps the path alone.
    cfg.TEST.CALIBRATION = ""

    # Detectron2's TEST.AUG keys (ENABLED, MIN_SIZES, MAX_SIZE, FLIP), of --eval-only and Predictor
    # too. How detections of several views of an image become one: "nms" of each class, or "vote",
    # which also averages the boxes that NMS found to be the same, weighted by score.
    cfg.TEST.AUG.MERGE = "nms"
    # Look at tiles of a large image too, each as at an image of its own, and merge as above: side
    # of a tile in pixels of the image, >= 32, or 0 for none; and how much of it neighbours share,
    # in [0, 0.5]. An object that is cut by a tile is found in another if the overlap is as wide.
    cfg.TEST.TILES = CN()
    cfg.TEST.TILES.SIZE = 0
    cfg.TEST.TILES.OVERLAP = 0.2

    # Train under autocast to bfloat16, where the CPU or GPU has it (float32 elsewhere). It needs no
    # gradient scaling, unlike SOLVER.AMP, which is Detectron2's float16 for GPUs; not both.
    cfg.SOLVER.BF16 = False
    # Memory format of weights and feature maps, in which convolutions on a CPU are faster, and
    # tensor cores work. (Not measured on a GPU yet: False is PyTorch's own.)
    cfg.SOLVER.CHANNELS_LAST = True
    # As TEST.COMPILE, for training. CUDA graphs are kept for each size of images: with many,
    # "default" is the one.
    cfg.SOLVER.COMPILE = ""

    # Detectron2's keys that take one value more with this project's trainer:
    # INPUT.RANDOM_FLIP "both", SOLVER.CLIP_GRADIENTS.CLIP_TYPE "full_model".

    cfg.MODEL.GFL = CN()
    # Number of foreground classes. For 0, train_net.py and the Trainer put that of the data.
    cfg.MODEL.GFL.NUM_CLASSES = 80
    # Backbone features used by the head, from high to low resolution. All need the same channels.
    cfg.MODEL.GFL.IN_FEATURES = ["p3", "p4", "p5", "p6", "p7"]
    # Convolutions in each of the two towers (classification and box), >= 0.
    cfg.MODEL.GFL.NUM_CONVS = 4
    # Channels of the towers, >= 1; when NORM is "GN" a multiple of 32, >= 64 (its 32 groups need
    # more than one value each, also on a map of 1x1).
    cfg.MODEL.GFL.CONV_DIM = 256
    # Normalization in the towers: "GN", or another name known to detectron2.layers.get_norm but
    # those with batch statistics ("BN", "SyncBN"), "" for none.
    cfg.MODEL.GFL.NORM = "GN"
    # Score of every class at the start of training, in (0, 1); sets the classifier's bias.
    cfg.MODEL.GFL.PRIOR_PROB = 0.01

    # What a score stands for beside the class: the IoU of the predicted box, trained with Quality
    # Focal Loss ("joint": GFL); that, helped by a quality predicted from the box distributions
    # ("dgqp": GFLv2); the IoU, trained with Varifocal Loss ("vfl") or Matchability-Aware Loss
    # ("mal", its power); nothing, trained with focal loss ("none"), with a branch whose prediction
    # multiplies it at inference ("centerness": ATSS; "iou"), or with the positives' classification
    # loss weighted ("centerness_guided", "iou_guided").
    cfg.MODEL.GFL.QUALITY = "joint"
    # What is predicted of the distance to a side: its distribution ("general"), one number
    # ("dirac"), or mean and variance ("gaussian").
    cfg.MODEL.GFL.BOX_REPRESENTATION = "general"
    # Of "general": n, the last of n + 1 bins, >= 1, and their width in strides, > 0. Distances lie
    # in [0, REG_MAX * BIN_WIDTH].
    cfg.MODEL.GFL.REG_MAX = 16
    cfg.MODEL.GFL.BIN_WIDTH = 1.0
    # Of "dgqp", which needs "general": how many of a distribution's largest probabilities it sees,
    # in [1, REG_MAX + 1], and channels of its hidden layer, >= 1.
    cfg.MODEL.GFL.DGQP_TOPK = 4
    cfg.MODEL.GFL.DGQP_CHANNELS = 64

    # Side of the one square anchor of a location, in strides, > 0. The anchor centre of cell
    # (i, j) is at ((i + o) * stride, (j + o) * stride), o = MODEL.ANCHOR_GENERATOR.OFFSET (0.0).
    cfg.MODEL.GFL.ANCHOR_SCALE = 8.0
    # Anchor centres at ((i + 1/2) * stride - 1/2, ...) instead: those of the authors' first code
    # base, whose checkpoints need it. Only with MODEL.ANCHOR_GENERATOR.OFFSET 0.0.
    cfg.MODEL.GFL.LEGACY_ANCHOR_CENTERS = False
    # "atss"; "dynamic_atss", which adds the IoUs of the predicted boxes to those of the anchors; or
    # "sapd": all locations near the middle of a box, weighted, on levels that a network chooses.
    cfg.MODEL.GFL.ASSIGNER = "atss"
    # Candidates per level and ground-truth box in the ATSS assignment, >= 1.
    cfg.MODEL.GFL.ATSS_TOPK = 9
    # Of "sapd": the part of a box's width and height in which its locations lie, in (0, 1], and how
    # many levels it learns on, >= 1. Until half of SOLVER.MAX_ITER that is one.
    cfg.MODEL.GFL.SAPD_SHRINK = 0.2
    cfg.MODEL.GFL.SAPD_LEVELS = 3

    # Exponent beta of the modulating factor |y - sigma|^beta of QFL ("joint", "dgqp"): 0, or >= 1.
    cfg.MODEL.GFL.QFL_BETA = 2.0
    # Of "vfl": weight alpha >= 0 of the negatives, and exponent gamma of their score: 0, or >= 1.
    cfg.MODEL.GFL.VFL_ALPHA = 0.75
    cfg.MODEL.GFL.VFL_GAMMA = 2.0
    # Of "mal": exponent gamma of the negatives' score and of the positives' IoU: 0, or >= 1.
    cfg.MODEL.GFL.MAL_GAMMA = 1.5
    # Focal loss, for any other QUALITY: alpha in [0, 1], or negative for none; gamma 0, or >= 1.
    cfg.MODEL.GFL.FOCAL_LOSS_ALPHA = 0.25
    cfg.MODEL.GFL.FOCAL_LOSS_GAMMA = 2.0
    # Loss of the decoded box: "giou", 1 - GIoU, or "iou", -ln IoU.
    cfg.MODEL.GFL.BBOX_REG_LOSS_TYPE = "giou"
    # Weights of the losses, >= 0: QFL; focal loss, that of "vfl" and of "mal"; that of the
    # "centerness" or "iou" branch; the decoded box; DFL ("general"; 0 for none); the KL loss of
    # "gaussian"; the cross-entropy of the network that chooses levels ("sapd").
    cfg.MODEL.GFL.LOSS_QFL_WEIGHT = 1.0
    cfg.MODEL.GFL.LOSS_CLS_WEIGHT = 1.0
    cfg.MODEL.GFL.LOSS_QUALITY_WEIGHT = 1.0
    cfg.MODEL.GFL.LOSS_BBOX_WEIGHT = 2.0
    cfg.MODEL.GFL.LOSS_DFL_WEIGHT = 0.25
    cfg.MODEL.GFL.LOSS_KL_WEIGHT = 0.25
    cfg.MODEL.GFL.LOSS_LEVEL_WEIGHT = 0.1
    # Lower bound, > 0, of the sum of the positives' weights by which the box losses are divided, as
    # a mean over the processes. In "joint" and "dgqp" the weights are scores.
    # 1.0 is the reference implementation's. It shrinks both box losses while that sum is smaller,
    # at the very start of training or with few objects an image; a small value prevents that.
    cfg.MODEL.GFL.BOX_NORMALIZER_MIN = 1.0
    # A positive weighs at least this in the box losses, in [0, 1]. Where the weights are scores, a
    # class that is rare or hard has hardly any at first, so its boxes stay bad, and so do its
    # scores, which are to be their IoUs. 1.0 (all weigh the same) prevents that in short trainings,
    # see docs/ablations.md. 0.0 is GFL.
    cfg.MODEL.GFL.BOX_WEIGHT_MIN = 0.0

    # Distillation, in training only: what is learned from a teacher, a trained GFL of the same
    # classes and bins but of any backbone and head: a list of "ld" and "ld_vlr" (its distributions
    # at positives, and near boxes: LD), "kd" (its classes at positives) and "bckd" (its scores and
    # boxes everywhere: BCKD); [] for no distillation. See docs/distillation.md.
    cfg.MODEL.GFL.DISTILL = CN()
    cfg.MODEL.GFL.DISTILL.TERMS = []
    # Its weights, and its config file; "" for the config that the weights' file carries.
    cfg.MODEL.GFL.DISTILL.TEACHER_WEIGHTS = ""
    cfg.MODEL.GFL.DISTILL.TEACHER_CONFIG = ""
    # Weights of the terms, >= 0, and the temperatures, > 0, that soften what is compared.
    cfg.MODEL.GFL.DISTILL.LD_WEIGHT = 0.25
    cfg.MODEL.GFL.DISTILL.VLR_WEIGHT = 0.25
    cfg.MODEL.GFL.DISTILL.LD_TEMPERATURE = 10.0
    cfg.MODEL.GFL.DISTILL.KD_WEIGHT = 10.0
    cfg.MODEL.GFL.DISTILL.KD_TEMPERATURE = 2.0
    cfg.MODEL.GFL.DISTILL.BCKD_CLS_WEIGHT = 1.0
    cfg.MODEL.GFL.DISTILL.BCKD_BOX_WEIGHT = 4.0

    # Inference. Only (location, class) pairs that score higher than this are kept, in [0, 1).
    cfg.MODEL.GFL.SCORE_THRESH_TEST = 0.05
    # Best pairs kept on each level before NMS, >= 1.
    cfg.MODEL.GFL.TOPK_CANDIDATES_TEST = 1000
    # IoU above which NMS suppresses a box of the same class, in [0, 1].
    cfg.MODEL.GFL.NMS_THRESH_TEST = 0.6
    # NMS also suppresses boxes of other classes: one box for each object, True or False.
    cfg.MODEL.GFL.NMS_CLASS_AGNOSTIC = False


def load_config(config_file: str, opts: Sequence[str] = ()) -> CN:
    """
    Read a config file, change it by ``KEY VALUE`` pairs and check the values.

    Args:
        config_file: a yaml file, which may have a ``_BASE_``.
        opts: alternately keys and values.

    Returns:
        CfgNode: frozen. ``MODEL.DEVICE`` is "cpu" where there is no GPU.

    Raises:
        InputError: the file is missing or malformed, or a key or value is wrong.
    """
    if not os.path.isfile(config_file):
        raise InputError(f"Config file '{config_file}' does not exist")

    def merge(cfg: CN) -> None:
        with open(config_file, encoding="utf-8") as file:
            check_yaml(file.read())
        cfg.merge_from_file(config_file, allow_unsafe=False)  # execute nothing

    return _make_config(merge, opts, f"Config file '{config_file}'")


def parse_config(text: str, path: str, opts: Sequence[str] = ()) -> CN:
    """
    As :func:`load_config`, for the config that a checkpoint carries: what ``CfgNode.dump`` wrote,
    perhaps of other versions. Keys that it lacks have their defaults. Those that are unknown here,
    such as a user's own, are kept. ``MODEL.DEVICE`` is chosen anew, as machines differ.

    Args:
        text: the config in yaml.
        path: of the checkpoint, which becomes ``MODEL.WEIGHTS``.
        opts: alternately keys and values.
    """

    def merge(cfg: CN) -> None:
        device = cfg.MODEL.DEVICE
        check_yaml(text)
        cfg.set_new_allowed(True)
        cfg.merge_from_other_cfg(CN.load_cfg(text))
        cfg.set_new_allowed(False)
        cfg.MODEL.DEVICE, cfg.MODEL.WEIGHTS = device, path

    return _make_config(merge, opts, f"The config in weights file {path}")


def _make_config(merge: Callable[[CN], None], opts: Sequence[str], source: str) -> CN:
    cfg = get_cfg()
    add_gfl_config(cfg)
    defaults = cfg.clone()
    # What yacs raises for files and options that it cannot use.
    errors = (AssertionError, AttributeError, KeyError, OSError, TypeError, ValueError)
    errors = (*errors, RecursionError, yaml.YAMLError)  # a config that is its own _BASE_
    try:
        merge(cfg)
        cfg.merge_from_list([_as_written(item) for item in opts])
        _refuse_none(cfg, defaults)
    except errors as error:
        reason = " ".join(str(error).split())  # PyYAML's has several lines
        if re.search(r"<class '(list|tuple)'> vs\. <class 'str'>", reason):
            reason += """, which takes a list: write "['name']" in quotation marks"""
        raise InputError(f"{source} or options: {reason}") from None
    choose_device(cfg)
    check_config(cfg)
    cfg.freeze()
    return cfg


def _refuse_none(cfg: CN, defaults: CN, prefix: str = "") -> None:
    """yacs takes None ("null" in YAML, or nothing) for a value of any type."""
    for key, default in defaults.items():
        if default is not None and cfg[key] is None:
            raise ValueError(f"{prefix}{key} has no value, but a default: {str(default)[:60]}")
        if isinstance(default, CN):
            _refuse_none(cfg[key], default, f"{prefix}{key}.")


def _as_written(option: str) -> str:
    r"""
    An option whose paths are read as they are written: values are parsed as Python, in which
    ``[['C:\new\train.json']]`` has a line break. If all its backslashes are doubled, it is Python.
    """
    is_list = isinstance(option, str) and option.lstrip().startswith(("[", "("))
    has_single = is_list and re.search(r"(?<!\\)(\\\\)*\\(?![\\'\"])", option)
    return option.replace("\\", "\\\\") if has_single else option


def choose_device(cfg: CN) -> None:
    """Make ``MODEL.DEVICE`` "cpu" (in place), with a warning, if it is a GPU and there is none."""
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}, but there is no GPU: using the CPU.")
        cfg.MODEL.DEVICE = "cpu"
