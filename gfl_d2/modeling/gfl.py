"""The GFL meta-architecture: assignment, criterion and post-processing around the dense head."""

from __future__ import annotations

import functools

import torch
from detectron2.config import CfgNode, configurable
from detectron2.modeling import BACKBONE_REGISTRY, META_ARCH_REGISTRY, build_backbone
from detectron2.modeling.backbone import Backbone
from detectron2.modeling.meta_arch.dense_detector import DenseDetector
from detectron2.structures import ImageList, Instances
from detectron2.utils.events import get_event_storage
from torch import Tensor, nn

from ..config import check_gfl_config
from ..config_checks import require
from ..errors import InputError, first_line
from .assigner import build_assigner
from .box_ops import distance_to_bbox
from .calibration import ScoreCalibration, build_calibration
from .criterion import GFLCriterion, collect_samples
from .distillation import build_distillation
from .head import GFLHead, head_input_shapes
from .locations import LocationGrid
from .post_processing import Candidates, Sides, select_candidates, suppress
from .structures import GroundTruth, Levels, Matches, Outputs, Predictions, Samples
from .uncertainty import measure_uncertainty, scale_uncertainty

__all__ = ["GFL"]

# Diagnostics are logged when Detectron2's writers write. Reading a value makes a GPU wait.
_LOG_PERIOD = 20


@META_ARCH_REGISTRY.register()
class GFL(DenseDetector):
    """
    Generalized Focal Loss (Li et al., NeurIPS 2020): a dense detector whose class scores are
    trained to be the IoU of the predicted box (QFL), and whose box sides are predicted as
    distributions (DFL).

    Both are choices, ``head.quality`` and ``head.box``: others make it ATSS, GFLv2 and what lies
    between.

    Shapes: N images, L levels, C classes, V numbers a box side. Boxes are XYXY in pixels of the
    network input, distances in strides.
    """

    @configurable
    def __init__(
        self,
        *,
        backbone: Backbone,
        head: GFLHead,
        head_in_features: list[str],
        grid: LocationGrid,
        assigner: nn.Module,
        criterion: GFLCriterion,
        test_score_thresh: float = 0.05,
        test_topk_candidates: int = 1000,
        test_nms_thresh: float = 0.6,
        test_nms_class_agnostic: bool = False,
        max_detections_per_image: int = 100,
        test_uncertainty: bool = False,
        test_calibration: ScoreCalibration | None = None,
        pixel_mean: list[float],
        pixel_std: list[float],
    ):
        """
        Args:
            backbone: gives the feature pyramid.
            head: predicts class logits and boxes on each level.
            head_in_features: names of the backbone's features that the head takes, from high to
                low resolution.
            grid: where the locations of each level are.
            assigner: called as :class:`ATSSAssigner` is, in training alone.
            criterion: computes the losses, for the same representation of box and quality as the
                head's.
            test_score_thresh: only (location, class) pairs that score higher are kept.
            test_topk_candidates: best pairs kept on each level before NMS.
            test_nms_thresh: IoU above which NMS suppresses a box of the same class.
            test_nms_class_agnostic: it also suppresses boxes of other classes.
            max_detections_per_image: best detections kept after NMS.
            test_uncertainty: detections have ``box_std`` and ``box_entropy``.
            test_calibration: maps the scores of detections; their own are ``raw_scores``.
            pixel_mean, pixel_std: per channel, in the order of the input images.

        Raises:
            ValueError: head and criterion differ in what is predicted, or that has no uncertainty.
        """
        super().__init__(
            backbone, head, list(head_in_features), pixel_mean=pixel_mean, pixel_std=pixel_std
        )
        if (head.box, head.quality) != (criterion.box, criterion.quality):
            raise ValueError(
                f"The head is for {head.box} and {head.quality}, the criterion for "
                f"{criterion.box} and {criterion.quality}"
            )
        if test_uncertainty and not head.box.has_uncertainty:
            raise ValueError(f"{head.box} has no uncertainty")
        self.num_classes = head.num_classes
        self.grid = grid
        self.assigner = assigner
        self.criterion = criterion

        self.test_score_thresh = test_score_thresh
        self.test_topk_candidates = test_topk_candidates
        self.test_nms_thresh = test_nms_thresh
        self.test_nms_class_agnostic = test_nms_class_agnostic
        self.max_detections_per_image = max_detections_per_image
        self.test_uncertainty = test_uncertainty
        self.test_calibration = test_calibration

    @classmethod
    def from_config(cls, cfg):
        check_gfl_config(cfg)
        allowed = ">= 1 in a model (gfl_d2.data.resolve_num_classes puts the data's for 0)"
        require(cfg, "MODEL.GFL.NUM_CLASSES", cfg.MODEL.GFL.NUM_CLASSES >= 1, allowed)
        backbone = _build_backbone(cfg)
        feature_shapes = head_input_shapes(cfg, backbone)
        head = GFLHead(cfg, feature_shapes)
        return {
            "backbone": backbone,
            "head": head,
            "head_in_features": list(cfg.MODEL.GFL.IN_FEATURES),
            "grid": LocationGrid.from_config(cfg, [shape.stride for shape in feature_shapes]),
            "assigner": build_assigner(cfg, feature_shapes),
            "criterion": GFLCriterion(
                box=head.box,
                quality=head.quality,
                bbox_loss=cfg.MODEL.GFL.BBOX_REG_LOSS_TYPE,
                bbox_weight=cfg.MODEL.GFL.LOSS_BBOX_WEIGHT,
                box_normalizer_min=cfg.MODEL.GFL.BOX_NORMALIZER_MIN,
                box_weight_min=cfg.MODEL.GFL.BOX_WEIGHT_MIN,
                distillation=build_distillation(cfg),
            ),
            "test_score_thresh": cfg.MODEL.GFL.SCORE_THRESH_TEST,
            "test_topk_candidates": cfg.MODEL.GFL.TOPK_CANDIDATES_TEST,
            "test_nms_thresh": cfg.MODEL.GFL.NMS_THRESH_TEST,
            "test_nms_class_agnostic": cfg.MODEL.GFL.NMS_CLASS_AGNOSTIC,
            "max_detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
            "test_uncertainty": cfg.TEST.UNCERTAINTY,
            "test_calibration": build_calibration(cfg),
            "pixel_mean": cfg.MODEL.PIXEL_MEAN,
            "pixel_std": cfg.MODEL.PIXEL_STD,
        }

    def forward(
        self, batched_inputs: list[dict], teacher: Predictions | None = None
    ) -> dict[str, Tensor] | list[dict]:
        """
        As :class:`DenseDetector`. In training, ``teacher`` has what another detector predicts for
        the same images, see :class:`GFLCriterion`. With ``test_uncertainty`` the Instances of D
        detections also have ``box_std``, shape (D, 4), the standard deviations of the left, top,
        right and bottom side, in pixels as ``pred_boxes``, and ``box_entropy``, likewise, in nats.
        """
        if self.training:
            images, features, predictions = self.predict(batched_inputs)
            gt_instances = [x["instances"].to(self.device) for x in batched_inputs]
            return self.forward_training(images, features, predictions, gt_instances, teacher)
        outputs = super().forward(batched_inputs)
        if self.test_uncertainty:
            for output in outputs:
                scale_uncertainty(output["instances"])
        return outputs

    def predict(
        self, batched_inputs: list[dict]
    ) -> tuple[ImageList, list[Tensor], tuple[list[Tensor], ...]]:
        """The batch, its L feature maps, and the predictions of :class:`GFLHead` for them."""
        images = self.preprocess_image(batched_inputs)
        features = self.backbone(images.tensor)
        features = [features[name] for name in self.head_in_features]
        return images, features, self.head(features)

    def forward_training(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], ...],
        gt_instances: list[Instances],
        teacher: Predictions | None = None,
    ) -> dict[str, Tensor]:
        """
        Args:
            images: the batch.
            features: L feature maps.
            predictions: of :class:`GFLHead` for them.
            gt_instances: N Instances with ``gt_boxes`` and ``gt_classes``.
            teacher: as in :meth:`forward`.

        Returns:
            dict[str, Tensor]: weighted scalars, see :class:`GFLCriterion`: in GFL ``loss_qfl``,
            ``loss_bbox`` and ``loss_dfl``; and those of the assigner, if it has any.
        """
        predictions = Predictions(*predictions)
        gt = GroundTruth.from_instances(gt_instances)
        levels = self.levels(predictions, self._image_sizes(images))
        predict = functools.partial(self._predicted_boxes, predictions, levels)
        iteration = get_event_storage().iter
        matches = self.assigner(levels, gt, Outputs(features, predictions, predict, iteration))
        samples = collect_samples(predictions, levels, matches, gt, self.head.box)
        self._log_diagnostics(samples, num_images=len(gt_instances))
        return self.criterion(predictions, levels, samples, teacher) | (matches.losses or {})

    def forward_inference(
        self,
        images: ImageList,
        features: list[Tensor],
        predictions: tuple[list[Tensor], ...],
    ) -> list[Instances]:
        """
        Args:
            images: the batch.
            features: L feature maps.
            predictions: of :class:`GFLHead` for them.

        Returns:
            list[Instances]: per image ``pred_boxes`` (pixels of the network input), ``scores`` and
            ``pred_classes``, by descending score. With ``test_uncertainty`` also ``box_entropy``
            and ``box_std``, here in widths and heights of the image: Detectron2, which resizes
            images, scales boxes only.
        """
        sizes = self._image_sizes(images)
        candidates, sides = self.candidates_and_sides(Predictions(*predictions), sizes)
        results = self.suppress(
            candidates, images.image_sizes, sides if self.test_uncertainty else None
        )
        if self.test_uncertainty:
            for detections in results:
                measure_uncertainty(detections, self.head.box)
        return results

    def suppress(
        self, candidates: Candidates, image_sizes: list[tuple[int, int]], sides: Sides | None = None
    ) -> list[Instances]:
        """
        NMS, as :func:`gfl_d2.modeling.post_processing.suppress`, of this model, and the calibration
        of scores.
        """
        results = suppress(
            candidates,
            image_sizes,
            nms_thresh=self.test_nms_thresh,
            max_detections=self.max_detections_per_image,
            sides=sides,
            class_agnostic=self.test_nms_class_agnostic,
        )
        if self.test_calibration is None:
            return results
        return [self.test_calibration.calibrate(detections) for detections in results]

    def candidates(self, predictions: Predictions, image_sizes: Tensor) -> Candidates:
        """
        What may be detected, before NMS. It can be traced and exported.

        Args:
            predictions: of the head.
            image_sizes: shape (N, 2), int64, height and width in pixels, without padding.
        """
        return self.candidates_and_sides(predictions, image_sizes)[0]

    def candidates_and_sides(
        self, predictions: Predictions, image_sizes: Tensor
    ) -> tuple[Candidates, Sides]:
        """As :meth:`candidates`, with what is predicted of their sides."""
        return select_candidates(
            predictions,
            self.levels(predictions, image_sizes),
            image_sizes,
            quality=self.head.quality,
            box=self.head.box,
            score_thresh=self.test_score_thresh,
            topk=self.test_topk_candidates,
        )

    def levels(self, predictions: Predictions, image_sizes: Tensor) -> Levels:
        """Where predictions are, and which of them are padding. Arguments as in `candidates`."""
        shapes = [tuple(maps.shape[-2:]) for maps in predictions.class_logits]
        return self.grid(shapes, image_sizes, self.backbone.size_divisibility)

    def _image_sizes(self, images: ImageList) -> Tensor:
        # Numbers, or tensors where Detectron2 traces the model.
        sizes = torch.stack([torch.as_tensor(size) for size in images.image_sizes])
        return sizes.to(self.device, non_blocking=True)

    @torch.no_grad()
    def _predicted_boxes(
        self, predictions: Predictions, levels: Levels, matches: Matches
    ) -> Tensor:
        """Shape (M, L, k, 4), in pixels."""
        distances = self.head.box.decode(matches.take(predictions.box_values))
        centers = levels.centers(matches.row, matches.column)
        return distance_to_bbox(centers, distances * levels.strides[:, None, None])

    def _log_diagnostics(self, samples: Samples, num_images: int) -> None:
        storage = get_event_storage()
        if (storage.iter + 1) % _LOG_PERIOD == 0:
            diagnostics = self.criterion.diagnostics(samples, num_images)
            for name, value in zip(diagnostics, torch.stack(list(diagnostics.values())).tolist()):
                storage.put_scalar(f"gfl/{name}", value, smoothing_hint=False)


def _build_backbone(cfg: CfgNode) -> Backbone:
    """Detectron2 asserts what it needs of its keys. Errors of other people's builders stay."""
    name = cfg.MODEL.BACKBONE.NAME
    if name not in BACKBONE_REGISTRY:
        raise InputError(f"MODEL.BACKBONE.NAME {name!r} is no registered backbone")
    module = BACKBONE_REGISTRY.get(name).__module__
    try:
        return build_backbone(cfg)
    except InputError:
        raise
    except (AssertionError, KeyError, RuntimeError, ValueError) as error:
        if module.partition(".")[0] not in ("gfl_d2", "detectron2"):
            raise
        raise InputError(
            f"The keys of MODEL.BACKBONE.NAME {name!r} and its FPN do not fit together: "
            f"{first_line(error)}"
        ) from error
