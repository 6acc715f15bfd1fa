"""Detectron2's trainer with the data, checks and options of this project."""

from __future__ import annotations

import copy
import logging

import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetFromList, MetadataCatalog, build_detection_test_loader
from detectron2.engine import HookBase, hooks
from detectron2.engine.train_loop import TrainerBase
from detectron2.evaluation import DatasetEvaluator
from detectron2.utils import comm
from detectron2.utils.events import EventWriter
from torch import nn

from ..checkpoint import GFLCheckpointer, describe_model
from ..config import check_config, check_training_config
from ..data import GFLDatasetMapper, load_training_dicts, loading, resolve_num_classes
from ..deploy import compile_parts, has_fast_bfloat16
from ..errors import InputError
from ..modeling import GFL
from .distillation import StudentWithTeacher, find_teacher, load_teacher
from .divergence import describe_divergence
from .ema import ModelAverager, share_buffers
from .evaluation import build_evaluator, check_evaluators
from .hooks import BestModelSaver, EarlyStopping, Evaluation, FinalModelSaver, TrainingEnds
from .loader import TrainingLoader
from .parallel import ParallelTrainer
from .pictures import PictureWriter
from .preemption import Preemption
from .random_state import seed_random_state
from .runs import check_output_folder, check_space, claim_output_folder, inference_folder
from .solver import build_optimizer, describe_changes, override_groups, scale_to_batch
from .steps import AccumulatingTrainer, BFloat16Trainer, find_criterion, load_step_state
from .validation import evaluate_losses
from .writers import build_writer

__all__ = ["Trainer"]

logger = logging.getLogger(__name__)

_START_ANEW = (
    "start a new training from the checkpoint's weights (MODEL.WEIGHTS) with another OUTPUT_DIR"
)


class Trainer(ParallelTrainer):
    """
    Detectron2's trainer with :class:`GFLDatasetMapper`, :class:`GFLCheckpointer`, evaluation by
    the type of the dataset, the best model, and the keys of :mod:`gfl_d2.training_config`.
    """

    def __init__(self, cfg: CfgNode):
        """
        Raises InputError if config or data are wrong, nothing has been written then, or if another
        training runs in ``OUTPUT_DIR``.
        """
        check_config(cfg)
        check_training_config(cfg, comm.get_world_size())
        check_evaluators(cfg.DATASETS.TEST)
        cfg = _with_seed(scale_to_batch(resolve_num_classes(cfg)))
        self._seed = cfg.SEED
        teacher_cfg = find_teacher(cfg)
        self._lock = claim_output_folder(cfg.OUTPUT_DIR)
        super().__init__(cfg)
        self._choose_step()
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

    def _choose_step(self) -> None:
        """Put another kind of step in the place of Detectron2's, if the config says so."""
        step, solver = self._trainer, self.cfg.SOLVER
        if solver.BF16 and has_fast_bfloat16(next(self.model.parameters()).device.type):
            step = BFloat16Trainer(step.model, step.data_loader, step.optimizer)
        elif solver.BF16:
            logger.warning("SOLVER.BF16: no bfloat16 convolutions on this machine, using float32.")
        if solver.ACCUMULATE > 1:
            step = AccumulatingTrainer(step, solver.ACCUMULATE)
        self._trainer = step

    def build_hooks(self) -> list[HookBase]:
        # A loader of the user's own may need no dataset.
        train = self.cfg.DATASETS.TRAIN
        class_names = MetadataCatalog.get(train[0]).get("thing_classes") if train else None
        model, cfg = self.checkpointer.model, self.cfg
        # In evaluation, pictures and the best checkpoint this takes the place of the model.
        self._evaluated_model = copy.deepcopy(model) if cfg.MODEL_EMA.ENABLED else model
        averages = {"ema": self._evaluated_model} if cfg.MODEL_EMA.ENABLED else {}
        # Detectron2 builds its hook that saves with this one then.
        self.checkpointer = GFLCheckpointer(
            model,
            cfg.OUTPUT_DIR,
            description=describe_model(cfg, class_names),
            **self.checkpointer.checkpointables,
            **averages,
        )
        ret = self._change_hooks(super().build_hooks())
        if comm.is_main_process():
            ret.append(FinalModelSaver(self.checkpointer))
        test, stopping = cfg.TEST, cfg.SOLVER.EARLY_STOPPING
        is_evaluated = bool(cfg.DATASETS.TEST) and test.EVAL_PERIOD > 0
        if comm.is_main_process() and is_evaluated and test.BEST_CHECKPOINT_METRIC:
            metric = test.BEST_CHECKPOINT_METRIC
            ret.append(BestModelSaver(self.checkpointer, metric, self._evaluated_model))
        if stopping.PATIENCE:
            savers = [hook for hook in ret if isinstance(hook, hooks.PeriodicCheckpointer)]
            ret = [hook for hook in ret if hook not in savers]
            arguments = (test.EVAL_PERIOD, stopping.PATIENCE, stopping.MIN_DELTA)
            ret += [EarlyStopping(test.BEST_CHECKPOINT_METRIC, *arguments), *savers]
        return [*ret, Preemption(self.checkpointer)]

    def _change_hooks(self, ret: list[HookBase]) -> list[HookBase]:
        """Detectron2's hooks, with those that average and draw, and another evaluation."""
        cfg, model = self.cfg, self.checkpointer.model
        before_saving = []
        if cfg.MODEL_EMA.ENABLED:
            ema = cfg.MODEL_EMA
            before_saving.append(ModelAverager(model, self._evaluated_model, ema.DECAY, ema.WARMUP))
        if cfg.VIS_PERIOD and comm.is_main_process() and isinstance(model, GFL):
            before_saving.append(PictureWriter(cfg, self._evaluated_model))
        if cfg.TEST.EVAL_LOSS:
            find_criterion(model, "TEST.EVAL_LOSS False")
        evaluation = Evaluation(cfg.TEST.EVAL_PERIOD, self._evaluate)
        ret = [evaluation if isinstance(hook, hooks.EvalHook) else hook for hook in ret]
        return [*ret[:1], *before_saving, *ret[1:]]  # the first is the timer

    def _evaluate(self) -> dict:
        """The metrics that Detectron2's hook logs."""
        cfg, model = self.cfg, self._evaluated_model
        share_buffers(model)
        if model is self.checkpointer.model:
            model = self.model
        self._last_eval_results = results = self.test(cfg, model)
        if not cfg.TEST.EVAL_LOSS:
            return results
        results = dict(results)
        for name in cfg.DATASETS.TEST:
            prefix = "val" if len(cfg.DATASETS.TEST) == 1 else f"{name}/val"
            results[prefix] = evaluate_losses(cfg, self._evaluated_model, name)
        return results

    def build_writers(self) -> list[EventWriter]:
        return super().build_writers() + [build_writer(name, self.cfg) for name in self.cfg.WRITERS]

    def train(self) -> dict | None:
        number = (self.max_iter - self.start_iter) // self.cfg.SOLVER.CHECKPOINT_PERIOD + 1
        check_space(self.checkpointer, self.optimizer, number)
        self.checkpointer.check_states()
        try:
            return super().train()
        except TrainingEnds as end:
            logger.warning(str(end))

    @classmethod
    def build_model(cls, cfg: CfgNode) -> nn.Module:
        model = super().build_model(cfg)
        if cfg.SOLVER.CHANNELS_LAST:
            model = model.to(memory_format=torch.channels_last)
        return model

    @classmethod
    def build_optimizer(cls, cfg: CfgNode, model: nn.Module) -> torch.optim.Optimizer:
        """See :func:`gfl_d2.engine.solver.build_optimizer`."""
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg: CfgNode):
        # Worker processes share it.
        records = DatasetFromList(load_training_dicts(cfg), copy=False)
        return TrainingLoader(cfg, records, GFLDatasetMapper(cfg, is_train=True, records=records))

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
        starts = comm.all_gather(self.start_iter)
        if len(set(starts)) > 1:
            raise InputError(
                f"Processes would resume after {starts} iterations: OUTPUT_DIR "
                f"{self.cfg.OUTPUT_DIR} must be the same folder on all machines"
            )
        loader = self._trainer.data_loader
        if isinstance(loader, TrainingLoader):
            loader.start(self._seed, self.start_iter)
        elif self.start_iter > 0:
            logger.warning(f"{type(loader).__name__} starts anew: images come in another order.")

    def before_step(self) -> None:
        # Each step has random numbers of its own: a resumed training draws them too.
        seed_random_state(self._seed, comm.get_rank(), self.iter)
        super().before_step()

    def run_step(self) -> None:
        """Raises InputError if the loss is NaN or infinite; no weight has changed by it."""
        try:
            super().run_step()
        except FloatingPointError:  # Detectron2's
            batch = getattr(self._trainer.data_loader, "last_batch", [])
            raise InputError(describe_divergence(self.model, batch, self.iter)) from None

    # Detectron2 0.6 leaves the optimizer out of the checkpoint, and resumes without its momentum.
    def state_dict(self) -> dict:
        steps = {"_trainer": self._trainer.state_dict(), "seed": self._seed}
        return {**super().state_dict(), **steps}

    def load_state_dict(self, state_dict: dict) -> None:
        groups = [dict(group) for group in self.optimizer.param_groups]
        TrainerBase.load_state_dict(self, state_dict)
        if "seed" not in state_dict:
            logger.warning("The checkpoint has no seed: images come in another order from here on.")
        self._seed = state_dict.get("seed", self._seed)
        if "_trainer" not in state_dict:
            logger.warning("The checkpoint has no optimizer state: momentum starts anew.")
            return
        try:
            load_step_state(self._trainer, state_dict["_trainer"])
        except InputError as error:
            # Detectron2 groups parameters of the same learning rate and decay.
            raise InputError(
                f"{error}. SOLVER.OPTIMIZER, MODEL.BACKBONE.FREEZE_AT and which of the SOLVER keys "
                "LAYER_DECAY, BIAS_LR_FACTOR and WEIGHT_DECAY_… are set must stay as they are at "
                f"--resume: keep them, or {_START_ANEW}"
            ) from None
        changed = describe_changes(groups, self.optimizer.param_groups)
        overrides = self.cfg.SOLVER.OVERRIDE_ON_RESUME
        if overrides:
            override_groups(self.scheduler, groups)
        if changed and overrides:
            logger.warning(f"SOLVER.OVERRIDE_ON_RESUME: the checkpoint has {changed} as from now.")
        elif changed:
            logger.warning(
                f"The checkpoint's values are used: {changed}; to change it, set "
                f"SOLVER.OVERRIDE_ON_RESUME True, or {_START_ANEW}."
            )


def _with_seed(cfg: CfgNode) -> CfgNode:
    """The config with a seed, the same in all processes, if it has none."""
    if cfg.SEED < 0:
        cfg = cfg.clone()
        cfg.defrost()
        cfg.SEED = comm.shared_random_seed()
    return cfg
