#!/usr/bin/env python3
"""
Train or evaluate GFL, in the form of Detectron2's own training script:

    python train_net.py --config-file configs/gfl_R_50_FPN_1x.yaml --num-gpus 8
    python train_net.py --config-file configs/gfl_R_50_FPN_1x.yaml --eval-only \
        MODEL.WEIGHTS output/model_final.pth
"""

import logging
import os
import sys

import torch
import yaml
from detectron2.config import get_cfg
from detectron2.data import build_detection_test_loader, build_detection_train_loader
from detectron2.engine import DefaultTrainer, default_argument_parser, default_setup, hooks, launch
from detectron2.evaluation import COCOEvaluator, verify_results
from detectron2.utils import comm

from gfl_d2 import add_gfl_config
from gfl_d2.checkpoint import GFLCheckpointer
from gfl_d2.data import GFLDatasetMapper, check_datasets, load_training_dicts, register_datasets
from gfl_d2.errors import InputError, user_message
from gfl_d2.precision import autocast_in_training
from gfl_d2.solver import build_optimizer

logger = logging.getLogger("gfl_d2.train_net")


class Trainer(DefaultTrainer):
    def __init__(self, cfg):
        super().__init__(cfg)
        # Loads in the place of Detectron2's, which only warns of weights that do not fit.
        self.checkpointer = GFLCheckpointer(
            self.checkpointer.model, cfg.OUTPUT_DIR, **self.checkpointer.checkpointables
        )

    @classmethod
    def build_model(cls, cfg):
        model = super().build_model(cfg)
        if cfg.MODEL.DEVICE == "cpu":
            # Same results up to rounding, and convolutions on a CPU are faster.
            model = model.to(memory_format=torch.channels_last)
        if cfg.SOLVER.BF16:
            if cfg.SOLVER.AMP.ENABLED:
                raise InputError("SOLVER.BF16 and SOLVER.AMP.ENABLED exclude each other")
            device_type = torch.device(cfg.MODEL.DEVICE).type
            model = autocast_in_training(model, device_type, torch.bfloat16)
        return model

    @classmethod
    def build_optimizer(cls, cfg, model):
        return build_optimizer(cfg, model)

    @classmethod
    def build_train_loader(cls, cfg):
        return build_detection_train_loader(
            cfg, mapper=GFLDatasetMapper(cfg, is_train=True), dataset=load_training_dicts(cfg)
        )

    @classmethod
    def build_test_loader(cls, cfg, dataset_name):
        mapper = GFLDatasetMapper(cfg, is_train=False)
        return build_detection_test_loader(cfg, dataset_name, mapper=mapper)

    @classmethod
    def build_evaluator(cls, cfg, dataset_name, output_folder=None):
        if output_folder is None:
            output_folder = os.path.join(cfg.OUTPUT_DIR, "inference")
        return COCOEvaluator(
            dataset_name, output_dir=output_folder, use_fast_impl=has_fast_coco_eval()
        )

    def build_hooks(self):
        ret = super().build_hooks()
        metric = self.cfg.TEST.BEST_CHECKPOINT_METRIC
        if comm.is_main_process() and self.cfg.TEST.EVAL_PERIOD > 0 and metric:
            # Right after the evaluation that produces the metric.
            after = max(i for i, hook in enumerate(ret) if isinstance(hook, hooks.EvalHook)) + 1
            best = hooks.BestCheckpointer(self.cfg.TEST.EVAL_PERIOD, self.checkpointer, metric)
            ret.insert(after, best)
        return ret


def has_fast_coco_eval():
    """Whether Detectron2's C++ COCO evaluation is there; pycocotools is what replaces it."""
    try:
        from detectron2 import _C
    except ImportError:
        return False
    return hasattr(_C, "COCOevalEvaluateImages")


def setup(args):
    """Create the config and check it against the data, before anything is written."""
    if not os.path.isfile(args.config_file):
        raise InputError(f"--config-file: no file '{args.config_file}'")
    cfg = get_cfg()
    add_gfl_config(cfg)
    try:
        cfg.merge_from_file(args.config_file)
        cfg.merge_from_list(args.opts)
    except (KeyError, ValueError, AssertionError, yaml.YAMLError) as error:
        raise InputError(f"{args.config_file} or the options after it: {error}") from None
    if cfg.MODEL.DEVICE.startswith("cuda") and not torch.cuda.is_available():
        logger.warning("MODEL.DEVICE is 'cuda' but there is no GPU: running on the CPU.")
        cfg.MODEL.DEVICE = "cpu"
    cfg.freeze()
    register_datasets(cfg)
    check_datasets(cfg, eval_only=args.eval_only)
    default_setup(cfg, args)
    return cfg


def main(args):
    try:
        return run(args)
    except InputError as error:
        sys.exit(f"Error: {user_message(error)}")


def run(args):
    cfg = setup(args)

    if args.eval_only:
        model = Trainer.build_model(cfg)
        GFLCheckpointer(model, save_dir=cfg.OUTPUT_DIR, complete=True).resume_or_load(
            cfg.MODEL.WEIGHTS, resume=args.resume
        )
        results = Trainer.test(cfg, model)
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    launch(
        main,
        args.num_gpus,
        num_machines=args.num_machines,
        machine_rank=args.machine_rank,
        dist_url=args.dist_url,
        args=(args,),
    )
