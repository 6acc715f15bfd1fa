#!/usr/bin/env python3
"""
Train or evaluate what a Python config (LazyConfig) describes, in the form of Detectron2's script of
this name:

    python tools/lazyconfig_train_net.py --config-file configs/lazy/gfl_R_50_FPN_1x.py --num-gpus 8
    python tools/lazyconfig_train_net.py --config-file configs/lazy/gfl_R_50_FPN_1x.py --eval-only \
        train.init_checkpoint=output/model_final.pth
"""

from __future__ import annotations

import copy
import logging
import os
import sys

import torch
from detectron2.config import CfgNode, LazyConfig, get_cfg, instantiate
from detectron2.data import MetadataCatalog
from detectron2.engine import (
    AMPTrainer,
    SimpleTrainer,
    default_argument_parser,
    default_setup,
    default_writers,
    hooks,
)
from detectron2.engine.defaults import create_ddp_model
from detectron2.evaluation import inference_on_dataset, print_csv_format
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger
from omegaconf import DictConfig, OmegaConf

from gfl_d2 import add_gfl_config
from gfl_d2.checkpoint import GFLCheckpointer
from gfl_d2.data import check_datasets, compare_classes, register_datasets
from gfl_d2.deploy import has_fast_bfloat16
from gfl_d2.engine import (
    BestModelSaver,
    BFloat16Trainer,
    check_evaluators,
    check_output_folder,
    claim_output_folder,
)
from gfl_d2.engine.ema import ModelAverager, share_buffers
from gfl_d2.engine.hooks import Evaluation, FinalModelSaver
from gfl_d2.engine.launch import (
    Processes,
    add_arguments,
    find_processes,
    hide_mistakes_from_log,
    joined,
    launch,
    said_once,
)
from gfl_d2.engine.preemption import Preemption
from gfl_d2.engine.solver import clip_all_gradients
from gfl_d2.engine.steps import load_step_state
from gfl_d2.errors import InputError, first_line

logger = logging.getLogger("gfl_d2")

# Whose keys nothing else would miss.
_CHECKED = ("train", "datasets")
_ABSENT = object()  # a value may be None


def read_config(args) -> DictConfig:
    """The config of --config-file with the ``key=value`` pairs. Raises InputError."""
    if not os.path.isfile(args.config_file) or not args.config_file.endswith(".py"):
        raise InputError(f"--config-file must be a Python config, got '{args.config_file}'")
    try:
        cfg = LazyConfig.load(args.config_file)
    except ImportError as error:
        raise InputError(
            f"{args.config_file} needs another version of a package, or one more: {error}"
        ) from None
    for option in args.opts:
        key, found, _ = option.partition("=")
        section = key.partition(".")[0]
        is_known = OmegaConf.select(cfg, key, default=_ABSENT) is not _ABSENT
        if not found or section not in cfg or (section in _CHECKED and not is_known):
            raise InputError(
                f"'{option}' is not key=value with a key of the config, such as train.max_iter=10"
            )
    try:
        cfg = LazyConfig.apply_overrides(cfg, args.opts)
    except Exception as error:  # hydra's and OmegaConf's
        raise InputError(f"Options {args.opts}: {first_line(error)}") from None
    if torch.device(cfg.train.device).type == "cuda" and not torch.cuda.is_available():
        logger.warning(f"train.device is {cfg.train.device!r}, but there is no GPU: using the CPU")
        cfg.train.device = "cpu"
    if cfg.train.amp.enabled and cfg.train.device == "cpu" and not args.eval_only:
        raise InputError("train.amp.enabled is float16 for GPUs: train.bf16 works on a CPU too")
    return cfg


def describe_data(cfg: DictConfig) -> CfgNode:
    """The datasets in a config of keys, which is what reads and checks them."""

    def names(key):
        value = OmegaConf.select(cfg, f"dataloader.{key}.dataset.names", default=())
        return (value,) if isinstance(value, str) else tuple(value)

    keys = get_cfg()
    add_gfl_config(keys)
    keys.DATASETS.TRAIN, keys.DATASETS.TEST = names("train"), names("test")
    keys.DATASETS.REGISTER = OmegaConf.to_container(cfg.datasets.register)
    keys.DATASETS.CLASSES = OmegaConf.to_container(cfg.datasets.classes)
    filters = OmegaConf.select(cfg, "dataloader.train.dataset.filter_empty", default=True)
    keys.DATALOADER.FILTER_EMPTY_ANNOTATIONS = filters
    keys.MODEL.GFL.NUM_CLASSES = OmegaConf.select(cfg, "model.head.num_classes", default=0)
    if keys.MODEL.GFL.NUM_CLASSES:
        keys.MODEL.META_ARCHITECTURE = "GFL"  # whose number of classes is checked
    return keys


def check_data(data: CfgNode, eval_only: bool) -> None:
    """Raises InputError if the data or its number of classes is wrong."""
    train, test = data.DATASETS.TRAIN, data.DATASETS.TEST
    if len(test) > 1:
        raise InputError(
            f"dataloader.test.dataset.names must be one dataset, which is evaluated, got {test}"
        )
    register_datasets(data, test if eval_only else None)
    if not (train or test):  # loaders of the user's own may need no dataset
        return
    try:
        check_datasets(data, eval_only=eval_only or not train)
    except InputError as error:
        message = str(error).replace("MODEL.GFL.NUM_CLASSES", "model.head.num_classes")
        raise InputError(message) from None
    check_evaluators(data.DATASETS.TEST)


def choose_device(processes: Processes, cfg: DictConfig) -> str:
    try:
        return processes.choose_device(cfg.train.device)
    except InputError as error:
        raise InputError(str(error).replace("MODEL.DEVICE", "train.device")) from None


def build_model(cfg: DictConfig) -> torch.nn.Module:
    model = instantiate(cfg.model).to(cfg.train.device)
    if cfg.train.channels_last:
        model = model.to(memory_format=torch.channels_last)
    return model


def do_test(cfg: DictConfig, model: torch.nn.Module) -> dict:
    if "evaluator" not in cfg.dataloader:
        return {}
    loader, evaluator = (instantiate(cfg.dataloader[key]) for key in ("test", "evaluator"))
    results = inference_on_dataset(model, loader, evaluator)
    if comm.is_main_process():
        print_csv_format(results)
    return results


def choose_step(cfg: DictConfig) -> type[SimpleTrainer]:
    if cfg.train.amp.enabled:
        return AMPTrainer
    if cfg.train.bf16 and has_fast_bfloat16(torch.device(cfg.train.device).type):
        return BFloat16Trainer
    return SimpleTrainer


class ResumedStep:
    """What is saved of a trainer, with an InputError at ``--resume`` if it does not fit."""

    def __init__(self, step: SimpleTrainer):
        self._step = step
        self.state_dict = step.state_dict

    def load_state_dict(self, state: dict) -> None:
        try:
            load_step_state(self._step, state)
        except InputError as error:
            raise InputError(
                f"{error}. Model and optimizer must stay as they are at --resume: keep them, or "
                "start from its weights (train.init_checkpoint) with another train.output_dir"
            ) from None


def do_train(cfg: DictConfig, data: CfgNode, resume: bool) -> None:
    model = build_model(cfg)
    logger.info(f"Model:\n{model}")
    cfg.optimizer.params.model = model
    optimizer = instantiate(cfg.optimizer)
    if cfg.train.clip_gradients:
        clip_all_gradients(optimizer, cfg.train.clip_gradients)
    loader = instantiate(cfg.dataloader.train)
    ddp = dict(cfg.train.ddp)
    if cfg.train.device == "cpu":
        ddp["device_ids"] = None  # Detectron2 takes a GPU for granted
    trainer = choose_step(cfg)(create_ddp_model(model, **ddp), loader, optimizer)

    ema, evaluated, before_saving, averages = cfg.train.ema, model, [], {}
    if ema.enabled:
        evaluated = copy.deepcopy(model)
        before_saving = [ModelAverager(model, evaluated, ema.decay, ema.warmup)]
        averages = {"ema": evaluated}
    train = data.DATASETS.TRAIN
    names = MetadataCatalog.get(train[0]).get("thing_classes", []) if train else []
    checkpointer = GFLCheckpointer(
        model,
        cfg.train.output_dir,
        description={"class_names": list(names)},
        trainer=ResumedStep(trainer),
        **averages,
    )

    def evaluate():
        if ema.enabled:
            share_buffers(evaluated)
        return do_test(cfg, evaluated)

    main_only = []
    if comm.is_main_process():
        writers = default_writers(cfg.train.output_dir, cfg.train.max_iter)
        main_only = [
            FinalModelSaver(checkpointer),
            hooks.PeriodicWriter(writers, period=cfg.train.log_period),
        ]
        if cfg.train.eval_period and cfg.train.best_metric:
            main_only.insert(0, BestModelSaver(checkpointer, cfg.train.best_metric, evaluated))
    saver = hooks.PeriodicCheckpointer(checkpointer, **cfg.train.checkpointer)
    trainer.register_hooks(
        [
            hooks.IterationTimer(),
            *before_saving,
            hooks.LRScheduler(scheduler=instantiate(cfg.lr_multiplier)),
            saver if comm.is_main_process() else None,
            Evaluation(cfg.train.eval_period, evaluate),
            *main_only,
            Preemption(checkpointer),
        ]
    )
    checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=resume)
    is_resumed = resume and checkpointer.has_checkpoint()
    try:
        trainer.train(trainer.iter + 1 if is_resumed else 0, cfg.train.max_iter)
    except FloatingPointError as error:  # Detectron2's
        raise InputError(" ".join(str(error).split())) from None


def read_and_check(args, rank: int) -> tuple[DictConfig, CfgNode]:
    """Config and data. Raises InputError before anything is written."""
    setup_logger(distributed_rank=rank, name="gfl_d2")
    cfg = read_config(args)
    data = describe_data(cfg)
    check_data(data, args.eval_only)
    if not (args.eval_only or args.resume):
        check_output_folder(cfg.train.output_dir)
    return cfg, data


def run(args) -> dict | None:
    """In each of the processes that are launched."""
    return train_or_evaluate(*read_and_check(args, comm.get_rank()), args)


def train_or_evaluate(cfg: DictConfig, data: CfgNode, args) -> dict | None:
    # Held until the end.
    lock = None if args.eval_only else claim_output_folder(cfg.train.output_dir)  # noqa: F841
    setup = copy.deepcopy(cfg)
    if args.eval_only:  # its log and config go beside its results
        setup.train.output_dir = os.path.join(cfg.train.output_dir, "inference")
    default_setup(setup, args)
    setup_logger(setup.train.output_dir, distributed_rank=comm.get_rank(), name="gfl_d2")
    if not args.eval_only:
        return do_train(cfg, data, args.resume)
    model = build_model(cfg)
    checkpointer = GFLCheckpointer(
        model, cfg.train.output_dir, complete=True, averaged=cfg.train.ema.enabled
    )
    checkpoint = checkpointer.resume_or_load(cfg.train.init_checkpoint, resume=args.resume)
    compare_classes(data.DATASETS.TEST, checkpoint.get("class_names"), "train.init_checkpoint")
    return do_test(cfg, model)


def main(args) -> dict | None:
    hide_mistakes_from_log()
    try:
        with said_once():  # before processes start, rather than by each of them
            processes = find_processes(args)
            cfg, data = read_and_check(args, processes.rank)
            device = choose_device(processes, cfg)
        if processes.total == 1:
            return train_or_evaluate(cfg, data, args)
        if processes.local_rank is None:
            return launch(run, (args,), processes, device, args.dist_url)
        with joined(processes, device):
            return train_or_evaluate(cfg, data, args)
    except InputError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    parser = default_argument_parser()
    add_arguments(parser)
    main(parser.parse_args())
