"""Detectron2's trainer with the data, checks and options of this project."""

from __future__ import annotations

import logging
import time

import torch
from detectron2.config import CfgNode
from detectron2.data import (
    MetadataCatalog,
    build_detection_test_loader,
    build_detection_train_loader,
)
from detectron2.engine import DefaultTrainer, HookBase, SimpleTrainer
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from torch import nn

from ..checkpoint import GFLCheckpointer, describe_model
from ..config import check_config, check_training_config
from ..data import GFLDatasetMapper, load_training_dicts, loading, resolve_num_classes
from ..deploy import compile_parts, has_fast_bfloat16
from ..errors import InputError
from .distillation import StudentWithTeacher, find_teacher, load_teacher
from .evaluation import build_evaluator, check_evaluators
from .hooks import BestModelSaver
from .runs import check_output_folder, inference_folder

__all__ = ["BFloat16Trainer", "Trainer"]

logger = logging.getLogger(__name__)

# What an optimizer keeps in its checkpoint, and the key it comes from.
_KEYS_OF_GROUPS = {
    "initial_lr": "SOLVER.BASE_LR",
    "weight_decay": "SOLVER.WEIGHT_DECAY",
    "momentum": "SOLVER.MOMENTUM",
}
_TO_CHANGE = (
    "to change it, start a new training from the checkpoint's weights (MODEL.WEIGHTS) with another "
    "OUTPUT_DIR"
)


class BFloat16Trainer(SimpleTrainer):
    """
    :class:`SimpleTrainer` whose forward pass runs under autocast to bfloat16. Weights, gradients
    and the optimizer stay in float32. bfloat16 has the range of float32, so gradients need no
    scaling, unlike those of Detectron2's :class:`AMPTrainer`; and it works on a CPU too.
    """

    def run_step(self) -> None:
        assert self.model.training, "The model was changed to eval mode"
        start = time.perf_counter()
        data = next(self._data_loader_iter)
        data_time = time.perf_counter() - start
        device_type = next(self.model.parameters()).device.type
        with torch.autocast(device_type, dtype=torch.bfloat16):
            losses = self.model(data)
        self.optimizer.zero_grad()
        sum(losses.values()).backward()
        self._write_metrics(losses, data_time)
        self.optimizer.step()


class Trainer(DefaultTrainer):
    """
    :class:`DefaultTrainer` with :class:`GFLDatasetMapper`, :class:`GFLCheckpointer`, evaluation by
    the type of the dataset, the best model, and the keys that this project adds to ``SOLVER``.
    """

    def __init__(self, cfg: CfgNode):
        """Raises InputError if config or data are wrong; nothing has been written then."""
        check_config(cfg)
        check_training_config(cfg)
        check_evaluators(cfg.DATASETS.TEST)
        cfg = resolve_num_classes(cfg)
        teacher_cfg = find_teacher(cfg)
        super().__init__(cfg)
        step = self._trainer
        if cfg.SOLVER.BF16 and has_fast_bfloat16(next(self.model.parameters()).device.type):
            self._trainer = BFloat16Trainer(step.model, step.data_loader, step.optimizer)
        elif cfg.SOLVER.BF16:
            logger.warning("SOLVER.BF16: no bfloat16 convolutions on this machine, using float32.")
        compile_parts(self.checkpointer.model, cfg.SOLVER.COMPILE)
        if teacher_cfg is not None:
            teacher = load_teacher(cfg, teacher_cfg, self.checkpointer.model)
            self._trainer.model = StudentWithTeacher(self._trainer.model, teacher)
        num_frozen = sum(not p.requires_grad for p in self.model.parameters())
        if num_frozen and not cfg.MODEL.WEIGHTS:
            logger.warning(
                f"MODEL.WEIGHTS is empty, but {num_frozen} parameters are frozen "
                "(MODEL.BACKBONE.FREEZE_AT): unless training is resumed, they stay random."
            )

    @property
    def model(self) -> nn.Module:
        """What is trained, evaluated and saved: the student alone, where there is a teacher."""
        model = self._trainer.model
        return model.student if isinstance(model, StudentWithTeacher) else model

    def build_hooks(self) -> list[HookBase]:
        # In the place of Detectron2's, before the hook that saves is made with it.
        # A loader of the user's own may need no dataset.
        train = self.cfg.DATASETS.TRAIN
        class_names = MetadataCatalog.get(train[0]).get("thing_classes") if train else None
        self.checkpointer = GFLCheckpointer(
            self.checkpointer.model,
            self.cfg.OUTPUT_DIR,
            description=describe_model(self.cfg, class_names),
            **self.checkpointer.checkpointables,
        )
        ret = super().build_hooks()
        test = self.cfg.TEST
        is_evaluated = bool(self.cfg.DATASETS.TEST) and test.EVAL_PERIOD > 0
        if comm.is_main_process() and is_evaluated and test.BEST_CHECKPOINT_METRIC:
            ret.append(BestModelSaver(self.checkpointer, test.BEST_CHECKPOINT_METRIC))
        return ret

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        if cfg.SOLVER.CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """
        Detectron2's, which knows the ``SOLVER.CLIP_GRADIENTS.CLIP_TYPE`` "value" and "norm" (of
        each parameter by itself), and "full_model": the norm of all gradients together is clipped.
        """
        clip = cfg.SOLVER.CLIP_GRADIENTS
        if not clip.ENABLED or clip.CLIP_TYPE != "full_model":
            return super().build_optimizer(cfg, model)

        def clip_gradients(optimizer, args, kwargs):
            parameters = [p for group in optimizer.param_groups for p in group["params"]]
            nn.utils.clip_grad_norm_(parameters, clip.CLIP_VALUE, clip.NORM_TYPE)

        without_clipping = cfg.clone()
        without_clipping.defrost()
        without_clipping.SOLVER.CLIP_GRADIENTS.ENABLED = False
        optimizer = super().build_optimizer(without_clipping, model)
        optimizer.register_step_pre_hook(clip_gradients)
        return optimizer

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        mapper, records = GFLDatasetMapper(cfg, is_train=True), load_training_dicts(cfg)
        return build_detection_train_loader(cfg, mapper=mapper, dataset=records)

    @classmethod
    def build_test_loader(cls, cfg: CfgNode, dataset_name: str):
        mapper = GFLDatasetMapper(cfg, is_train=False)
        with loading([dataset_name]):
            return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(
        cls, cfg: CfgNode, dataset_name: str, output_folder: str | None = None
    ) -> DatasetEvaluator:
        folder = output_folder or inference_folder(cfg, dataset_name)
        return build_evaluator(dataset_name, folder, cfg.TEST.DETECTIONS_PER_IMAGE)

    def resume_or_load(self, resume: bool = True) -> None:
        """
        Raises InputError if weights do not fit, or if ``OUTPUT_DIR`` holds an earlier training
        that is not resumed.
        """
        if not resume:
            check_output_folder(self.cfg.OUTPUT_DIR)
        super().resume_or_load(resume)

    # Detectron2 0.6 leaves the optimizer out of the checkpoint, and resumes without its momentum.
    def state_dict(self) -> dict:
        return {**super().state_dict(), "_trainer": self._trainer.state_dict()}

    def load_state_dict(self, state_dict: dict) -> None:
        groups = [dict(group) for group in self.optimizer.param_groups]
        TrainerBase.load_state_dict(self, state_dict)
        if "_trainer" not in state_dict:
            logger.warning("The checkpoint has no optimizer state: momentum starts anew.")
            return
        try:
            self._trainer.load_state_dict(state_dict["_trainer"])
        except ValueError as error:
            # Detectron2 groups parameters of the same learning rate and decay.
            raise InputError(
                f"The checkpoint's optimizer does not fit: {error}. MODEL.BACKBONE.FREEZE_AT and "
                f"the SOLVER.WEIGHT_DECAY keys must stay as they are at --resume; {_TO_CHANGE}"
            ) from None
        changed = _describe_changes(groups, self.optimizer.param_groups)
        if changed:
            logger.warning(f"The checkpoint's values are used: {changed}; {_TO_CHANGE}.")


def _describe_changes(configured: list[dict], loaded: list[dict]) -> str:
    """What differs in the first group where it does, e.g. 'SOLVER.BASE_LR 0.01, not 0.1'."""
    changes = {
        name: f"{name} {there[key]:g}, not {here[key]:g}"
        for here, there in reversed(list(zip(configured, loaded)))
        for key, name in _KEYS_OF_GROUPS.items()
        if key in here and key in there and here[key] != there[key]
    }
    return ", ".join(changes.values())
