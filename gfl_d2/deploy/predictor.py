"""Detection on images as they come, by models made faster for inference."""

from __future__ import annotations

import functools
import itertools
import logging
import os
from collections import deque
from collections.abc import Container, Iterable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Union

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.catalog import Metadata
from detectron2.data.detection_utils import build_augmentation
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.modeling import build_model
from PIL import Image
from torch import Tensor, nn

from ..checkpoint import GFLCheckpointer, load_checkpoint_config
from ..config import choose_device
from ..config_checks import check_calibration
from ..data import adapt_augmentations, to_array
from ..errors import InputError
from ..modeling import GFL
from .compilation import compile_parts
from .fusing import fuse_norms
from .tta import DenseDetectorWithTTA, input_config, uses_views

__all__ = ["Predictor", "has_fast_bfloat16", "prepare_for_inference"]

logger = logging.getLogger(__name__)

ImageLike = Union[str, os.PathLike, Image.Image, np.ndarray]

# What could be taken for several images.
_NO_IMAGES = (Tensor, Mapping, bytes)
_THREADS = 4
_READ_AHEAD = 8
_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


class Predictor:
    """
    Detects on images as they come: one, a list, or an iterator. As Detectron2's
    :class:`DefaultPredictor`, for a model that :func:`prepare_for_inference` makes faster, and for
    any ``INPUT.FORMAT``.

    It loads every parameter or none, and takes the CPU where there is no GPU.

    Attributes:
        cfg: the config.
        model: the module. It takes a list of Detectron2's dicts, as in evaluation.
        metadata: its ``thing_classes`` are the names of the classes, if the checkpoint or
            Detectron2's catalog has them.
        input_format: ``INPUT.FORMAT``, that of the images that the model takes. What is given is
            converted.
    """

    def __init__(self, cfg: CfgNode | str | os.PathLike):
        """
        Args:
            cfg: a config whose ``MODEL.WEIGHTS`` names the weights, or a checkpoint of a training,
                which carries its config: see :func:`gfl_d2.checkpoint.load_checkpoint_config`.

        Raises:
            InputError: the weights or ``TEST.CALIBRATION`` do not fit the model, or the checkpoint
                carries no config.
        """
        is_config = isinstance(cfg, CfgNode)
        self.cfg = cfg = cfg.clone() if is_config else load_checkpoint_config(cfg)
        cfg.defrost()
        choose_device(cfg)
        model = build_model(cfg)
        checkpointer = GFLCheckpointer(model, complete=True, averaged=cfg.MODEL_EMA.ENABLED)
        checkpoint = checkpointer.load(cfg.MODEL.WEIGHTS)
        self.model = prepare_for_inference(cfg, model)
        self.metadata = _find_metadata(cfg, checkpoint.get("class_names"))
        check_calibration(cfg, self.metadata.get("thing_classes"), "the model")
        input_cfg = input_config(cfg)
        resize = build_augmentation(input_cfg, is_train=False)
        self.aug = AugmentationList(adapt_augmentations(resize, input_cfg, is_train=False))
        self.input_format = cfg.INPUT.FORMAT

    def __call__(
        self, images: ImageLike | Iterable[ImageLike], batch_size: int = 1, errors: str = "raise"
    ) -> dict | list[dict] | Iterator[dict]:
        """
        Detect on one image, which gives a dict; on a list or tuple, which gives a list; or on any
        other iterable, which gives an iterator. Results come in the order of the images.

        An image is a path; a PIL image; or an array as of OpenCV, whose channels are BGR: see
        :func:`gfl_d2.data.to_array`. (RGB arrays: ``PIL.Image.fromarray``.)

        Several images are read ahead by threads, at most 4 * ``batch_size`` or 8 of them, so that
        an iterator may be endless. Of these, the ones that have the same size as the model's input
        make a batch. Images of different sizes do not: the smaller ones would be padded, which
        changes their scores, as GroupNorm sees the padding.

        Args:
            images: one image or several.
            batch_size: with 1, results are those of the images one by one, bit for bit. In larger
                batches convolutions sum in another order: results differ by rounding.
            errors: "raise" the error of an image that cannot be read, or "return" it, an
                InputError, in the place of its result.

        Returns:
            For each image ``{"instances": Instances}``, with ``pred_boxes`` in pixels of the image,
            ``scores`` and ``pred_classes``, on the model's device.

        Raises:
            InputError: an image cannot be read.
        """
        if batch_size < 1 or errors not in ("raise", "return"):
            raise InputError(
                "batch_size must be 1 or more and errors 'raise' or 'return', not "
                f"{batch_size!r} and {errors!r}"
            )
        is_iterable = isinstance(images, Iterable) and not isinstance(images, _NO_IMAGES)
        if isinstance(images, (str, os.PathLike, np.ndarray, Image.Image)) or not is_iterable:
            return self._check(self._run([self._read(images)])[0], errors)
        results = self._detect(images, batch_size, errors)
        return list(results) if isinstance(images, (list, tuple)) else results

    def _detect(
        self, images: Iterable[ImageLike], batch_size: int, errors: str
    ) -> Iterator[dict | InputError]:
        images, limit = iter(images), max(4 * batch_size, _READ_AHEAD)
        pool = ThreadPoolExecutor(_THREADS)
        try:
            ahead = deque(pool.submit(self._read, x) for x in itertools.islice(images, limit))
            results = {}  # of images that were in a batch with an earlier one
            while ahead:
                first = ahead[0]
                if first not in results:
                    results.update(self._detect_batch(ahead, results, batch_size))
                yield self._check(results.pop(ahead.popleft()), errors)
                ahead.extend(pool.submit(self._read, x) for x in itertools.islice(images, 1))
        finally:
            pool.shutdown(cancel_futures=True)

    def _detect_batch(
        self, ahead: Iterable[Future], done: Container[Future], batch_size: int
    ) -> dict[Future, dict | InputError]:
        """Results of the first image that has none, and of others of its size."""
        waiting = (future for future in ahead if future not in done)
        first = next(waiting)
        batch, size = {first: first.result()}, _input_size(first.result())
        for future in waiting:
            if len(batch) == batch_size:
                break
            if _input_size(future.result()) == size:
                batch[future] = future.result()
        return dict(zip(batch, self._run(list(batch.values()))))

    @torch.no_grad()
    def _run(self, inputs: list[dict | InputError]) -> list[dict | InputError]:
        """Of inputs of one size. What could not be read has none, and stays as it is."""
        return inputs if _input_size(inputs[0]) is None else self.model(inputs)

    @staticmethod
    def _check(result: dict | InputError, errors: str) -> dict | InputError:
        if isinstance(result, InputError) and errors == "raise":
            raise result
        return result

    def _read(self, image: ImageLike) -> dict | InputError:
        """The input of the model for an image, resized as in evaluation; or why there is none."""
        try:
            array = to_array(image, self.input_format)
        except InputError as error:
            return error
        height, width = array.shape[:2]
        resized = AugInput(array)
        try:
            self.aug(resized)
        except ValueError as error:  # Pillow's, of a side of 0 pixels
            name = image if isinstance(image, (str, os.PathLike)) else "An image"
            return InputError(f"{name} of {width}x{height} pixels cannot be resized: {error}")
        pixels = np.array(resized.image.transpose(2, 0, 1), order="C")  # a copy: it can be written
        return {"image": torch.from_numpy(pixels), "height": height, "width": width}


def _input_size(item: dict | InputError) -> torch.Size | None:
    return None if isinstance(item, InputError) else item["image"].shape


def _find_metadata(cfg: CfgNode, names: list[str] | None) -> Metadata:
    """
    The catalog's, unless the checkpoint has other names of classes. What a dataset is called may
    be another one here than where the model was trained, such as COCO of many configs.
    """
    metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0]) if cfg.DATASETS.TEST else Metadata()
    if names and list(metadata.get("thing_classes", ())) != names:
        return Metadata(name=cfg.MODEL.WEIGHTS, thing_classes=names)
    return metadata


def has_fast_bfloat16(device_type: str) -> bool:
    """Whether convolutions in bfloat16 are not slower than in float32 on this machine."""
    if device_type == "cuda":
        return torch.cuda.get_device_capability() >= (8, 0)
    # Not in every version of PyTorch, nor on every processor.
    names = ("_is_avx512_bf16_supported", "_is_amx_tile_supported")
    return any(getattr(torch.cpu, name, bool)() for name in names)


def prepare_for_inference(cfg: CfgNode, model: nn.Module) -> nn.Module:
    """
    Make a :class:`detectron2.modeling.meta_arch.dense_detector.DenseDetector` faster that has its
    weights, as ``TEST.OPTIMIZE``, ``TEST.PRECISION`` and ``TEST.COMPILE`` say. It is changed in
    place, returned in eval mode, and cannot be trained any more. With ``TEST.AUG`` or
    ``TEST.TILES`` it is returned in a :class:`DenseDetectorWithTTA`, which needs images of
    :func:`input_config`.
    """
    model.eval()
    if isinstance(model, GFL):
        model.assigner = None  # only training uses it
    device_type = next(model.parameters()).device.type
    if cfg.TEST.OPTIMIZE:
        fuse_norms(model)
    model.to(memory_format=torch.channels_last if cfg.TEST.OPTIMIZE else torch.contiguous_format)
    dtype = _DTYPES[cfg.TEST.PRECISION]
    if dtype == torch.bfloat16 and not has_fast_bfloat16(device_type):
        logger.warning("TEST.PRECISION: no bfloat16 on this machine, using float32.")
    elif dtype != torch.float32:
        for part in (model.backbone, model.head):
            part.to(dtype)
        model.backbone.register_forward_pre_hook(functools.partial(_cast_images, dtype=dtype))
    compile_parts(model, cfg.TEST.COMPILE)
    return DenseDetectorWithTTA(cfg, model) if uses_views(cfg) else model


def _cast_images(_: nn.Module, inputs: tuple[Tensor], dtype: torch.dtype) -> tuple[Tensor]:
    """A forward pre-hook that can be copied and pickled with its module, unlike a closure."""
    return (inputs[0].to(dtype),)
