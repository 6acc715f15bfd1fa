#!/usr/bin/env python3
"""
Train or evaluate GFL, in the form of Detectron2's own training script:

    python train_net.py --config-file configs/gfl_R_50_FPN_1x.yaml --num-gpus 8
    python train_net.py --config-file configs/gfl_R_50_FPN_1x.yaml --eval-only \
        MODEL.WEIGHTS output/model_final.pth

Checkpoints of a training carry their config, so --eval-only MODEL.WEIGHTS alone is enough for them.
"""

import logging
import sys

import torch
import torch.multiprocessing as mp
from detectron2.engine import default_argument_parser, default_setup, launch
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from gfl_d2.checkpoint import GFLCheckpointer, find_config
from gfl_d2.config import check_training_config
from gfl_d2.data import (
    check_datasets,
    compare_classes,
    register_datasets,
    resolve_num_classes,
)
from gfl_d2.deploy import input_config, prepare_for_inference
from gfl_d2.engine import (
    Trainer,
    check_evaluators,
    check_output_folder,
    find_teacher,
    inference_folder,
)
from gfl_d2.errors import InputError, user_message


def read_config(args):
    """The config of --config-file, or else of the checkpoint to evaluate."""
    if not args.config_file and not args.eval_only:
        raise InputError("Give --config-file. Only --eval-only can do without")
    return find_config(args.config_file, args.opts)


def setup(args):
    """Create the config and check it against the data, before anything is written."""
    setup_logger(distributed_rank=comm.get_rank(), name="gfl_d2")
    cfg = read_config(args)
    register_datasets(cfg, cfg.DATASETS.TEST if args.eval_only else None)
    cfg = resolve_num_classes(cfg, args.eval_only)
    check_datasets(cfg, eval_only=args.eval_only)
    check_evaluators(cfg.DATASETS.TEST)
    if not args.eval_only:
        check_training_config(cfg)
        find_teacher(cfg)
        if not args.resume:
            check_output_folder(cfg.OUTPUT_DIR)
    return cfg


def setup_output(cfg, args):
    """Log and config of an evaluation go beside its results, and leave those of the training."""
    cfg = cfg.clone()
    if args.eval_only:
        cfg.defrost()
        cfg.OUTPUT_DIR = inference_folder(cfg)
        cfg.freeze()
    default_setup(cfg, args)
    setup_logger(cfg.OUTPUT_DIR, distributed_rank=comm.get_rank(), name="gfl_d2")


def run(args):
    cfg = setup(args)
    setup_output(cfg, args)
    if args.eval_only:
        model = Trainer.build_model(cfg)
        checkpointer = GFLCheckpointer(
            model, save_dir=cfg.OUTPUT_DIR, complete=True, averaged=cfg.MODEL_EMA.ENABLED
        )
        checkpoint = checkpointer.resume_or_load(cfg.MODEL.WEIGHTS, resume=args.resume)
        compare_classes(cfg.DATASETS.TEST, checkpoint.get("class_names"))
        results = Trainer.test(input_config(cfg), prepare_for_inference(cfg, model))
        if comm.is_main_process():
            verify_results(cfg, results)
        return results

    trainer = Trainer(cfg)
    trainer.resume_or_load(resume=args.resume)
    return trainer.train()


def main(args):
    # Detectron2 logs what ends a training with its stack trace. A user's mistake needs none.
    logging.getLogger("detectron2.engine.train_loop").addFilter(
        lambda record: not (record.exc_info and isinstance(record.exc_info[1], InputError))
    )
    try:
        return run(args)
    except InputError as error:
        sys.exit(f"Error: {user_message(error)}")


def launch_processes(args):
    """One process per GPU. A user's mistake is found before, rather than by each of them."""
    try:
        if args.num_gpus > torch.cuda.device_count():
            raise InputError(
                f"--num-gpus {args.num_gpus}, but this machine has {torch.cuda.device_count()}"
            )
        setup(args)
    except InputError as error:
        sys.exit(f"Error: {user_message(error)}")
    try:
        launch(
            main,
            args.num_gpus,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(args,),
        )
    except mp.ProcessExitedException as error:  # the process has said why
        sys.exit(error.exit_code)


if __name__ == "__main__":
    args = default_argument_parser().parse_args()
    if args.num_gpus * args.num_machines > 1:
        launch_processes(args)
    else:
        main(args)
