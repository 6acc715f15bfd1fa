"""The teacher of a training with ``MODEL.GFL.DISTILL``."""

from __future__ import annotations

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn

from ..checkpoint import GFLCheckpointer, find_config, get_local_path
from ..config_checks import get_value
from ..data import compare_classes
from ..deploy import fuse_norms
from ..errors import InputError
from ..modeling import GFL, Predictions

__all__ = ["StudentWithTeacher", "find_teacher", "load_teacher"]

# What must be the same of both: the keys that say what a number of the head means, and which
# channel of an image is which.
_SHARED = (
    "MODEL.META_ARCHITECTURE", "MODEL.GFL.NUM_CLASSES", "MODEL.GFL.BOX_REPRESENTATION",
    "MODEL.GFL.REG_MAX", "MODEL.GFL.BIN_WIDTH", "MODEL.GFL.ANCHOR_SCALE",
    "MODEL.ANCHOR_GENERATOR.OFFSET", "MODEL.GFL.LEGACY_ANCHOR_CENTERS", "INPUT.FORMAT",
)  # fmt: skip


class StudentWithTeacher(nn.Module):
    """
    What the trainer calls in each step in the place of a student: it asks the teacher first, and
    hands its predictions to the student with the batch.

    The teacher belongs to the trainer. It could be a submodule of the student instead, but would
    then have to be hidden from ``state_dict``, the optimizer, averages of weights and copies. As it
    is, the student is a plain GFL that knows of no teacher but its predictions, as Detectron2's
    R-CNNs know precomputed proposals. Only the student is wrapped in DistributedDataParallel, saved
    and evaluated. The teacher runs where the student does: in the same autocast.
    """

    def __init__(self, student: nn.Module, teacher: GFL):
        """
        Args:
            student: a GFL with terms of distillation, perhaps in DistributedDataParallel.
            teacher: see :func:`load_teacher`.
        """
        super().__init__()
        self.student = student
        self.teacher = teacher.requires_grad_(False)
        self.train(student.training)

    def train(self, mode: bool = True) -> StudentWithTeacher:
        """Of the student. The teacher stays in eval mode."""
        super().train(mode)
        self.teacher.eval()
        return self

    def forward(self, batched_inputs: list[dict]) -> dict[str, Tensor]:
        """The losses of the student in training mode."""
        return self.student(batched_inputs, self.ask_teacher(batched_inputs))

    @torch.no_grad()
    def ask_teacher(self, batched_inputs: list[dict]) -> Predictions:
        """What the teacher predicts. The class logits are those of its scores."""
        predictions = Predictions(*self.teacher.predict(batched_inputs)[2])
        qualities = predictions.quality_logits or [None] * len(predictions.class_logits)
        to_score = self.teacher.head.quality.score_logits
        scores = [to_score(*logits) for logits in zip(predictions.class_logits, qualities)]
        return Predictions(scores, predictions.box_values)


def find_teacher(cfg: CfgNode) -> CfgNode | None:
    """
    The config of the teacher, with its weights as ``MODEL.WEIGHTS``, on the student's device. None
    if there is no distillation.

    Args:
        cfg: of the student, with its number of classes.

    Raises:
        InputError: a file is missing, carries no config where none is named, or is of a detector
            whose predictions cannot be compared with the student's.
    """
    distill = cfg.MODEL.GFL.DISTILL
    if not distill.TERMS:
        return None
    weights = distill.TEACHER_WEIGHTS
    opts = ["MODEL.WEIGHTS", weights, "MODEL.DEVICE", cfg.MODEL.DEVICE]
    try:
        get_local_path(weights)
        teacher = find_config(distill.TEACHER_CONFIG, opts)
    except InputError as error:
        raise InputError(
            f"MODEL.GFL.DISTILL (TEACHER_WEIGHTS, TEACHER_CONFIG if they carry none): {error}"
        ) from None
    for key in _SHARED:
        here, there = get_value(cfg, key), get_value(teacher, key)
        if here != there:
            raise InputError(
                f"{key} is {here!r}, but {there!r} of the teacher {weights} (MODEL.GFL.DISTILL."
                "TEACHER_WEIGHTS): both must agree"
            )
    return teacher


def load_teacher(cfg: CfgNode, teacher_cfg: CfgNode, student: GFL) -> GFL:
    """
    The teacher with all of its weights, for inference: BatchNorms are folded into convolutions, and
    the memory format is ``SOLVER.CHANNELS_LAST``'s. No random number is drawn, so that a student
    starts as it does without a teacher.

    Args:
        cfg: of the student; ``DATASETS.TRAIN`` are registered.
        teacher_cfg: see :func:`find_teacher`.
        student: what it is compared with.

    Raises:
        InputError: the weights do not fit the config, or are of the same classes in another order;
            or the two have other levels.
    """
    with torch.random.fork_rng(devices=[]):
        teacher = build_model(teacher_cfg)
    path = teacher_cfg.MODEL.WEIGHTS
    checkpoint = GFLCheckpointer(teacher, complete=True).load(path)
    names = checkpoint.get("class_names")
    compare_classes(cfg.DATASETS.TRAIN, names, "MODEL.GFL.DISTILL.TEACHER_WEIGHTS")
    here, there = (
        (model.grid.strides.tolist(), model.backbone.size_divisibility)
        for model in (student, teacher)
    )
    if here != there:
        raise InputError(
            f"Strides of the levels and divisibility of images are {here}, but {there} of the "
            f"teacher {path}: both must agree (MODEL.GFL.IN_FEATURES, MODEL.BACKBONE)"
        )
    fuse_norms(teacher.eval())
    if cfg.SOLVER.CHANNELS_LAST:
        teacher = teacher.to(memory_format=torch.channels_last)
    return teacher
