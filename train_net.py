#!/usr/bin/env python3
"""
Train or evaluate GFL, in the form of Detectron2's own training script:

    python train_net.py --config-file configs/gfl_R_50_FPN_1x.yaml --num-gpus 8
    python train_net.py --config-file configs/gfl_R_50_FPN_1x.yaml --num-processes 4
    torchrun --nproc-per-node 8 train_net.py --config-file configs/gfl_R_50_FPN_1x.yaml
    python train_net.py --config-file configs/gfl_R_50_FPN_1x.yaml --eval-only \
        MODEL.WEIGHTS output/model_final.pth

Checkpoints of a training carry their config, so --eval-only MODEL.WEIGHTS alone is enough for them.
"""

import sys

from detectron2.engine import default_argument_parser, default_setup
from detectron2.evaluation import verify_results
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from gfl_d2.checkpoint import GFLCheckpointer, find_config
from gfl_d2.config import check_training_config
from gfl_d2.data import (
    check_datasets,
    compare_classes,
    naming_images_of_dead_workers,
    register_datasets,
    resolve_num_classes,
)
from gfl_d2.deploy import input_config, prepare_for_inference
from gfl_d2.engine import (
    Trainer,
    check_evaluators,
    check_output_folder,
    claim_output_folder,
    find_teacher,
    inference_folder,
)
from gfl_d2.engine.launch import (
    add_arguments,
    find_processes,
    hide_mistakes_from_log,
    joined,
    launch,
    said_once,
)
from gfl_d2.errors import InputError


def read_config(args):
    """The config of --config-file, or else of the checkpoint to evaluate."""
    if not args.config_file and not args.eval_only:
        raise InputError("Give --config-file. Only --eval-only can do without")
    return find_config(args.config_file, args.opts)


def setup(args, rank=0, num_processes=1):
    """Create the config and check it against the data, before anything is written."""
    setup_logger(distributed_rank=rank, name="gfl_d2")
    cfg = read_config(args)
    register_datasets(cfg, cfg.DATASETS.TEST if args.eval_only else None)
    cfg = resolve_num_classes(cfg, args.eval_only)
    check_datasets(cfg, eval_only=args.eval_only)
    check_evaluators(cfg.DATASETS.TEST)
    if not args.eval_only:
        check_training_config(cfg, num_processes)
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
    """In each of the processes that are launched."""
    return train_or_evaluate(setup(args, comm.get_rank(), comm.get_world_size()), args)


@naming_images_of_dead_workers()
def train_or_evaluate(cfg, args):
    # Held until the end.
    lock = None if args.eval_only else claim_output_folder(cfg.OUTPUT_DIR)  # noqa: F841
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
    hide_mistakes_from_log()
    try:
        with said_once():  # before processes start, rather than by each of them
            processes = find_processes(args)
            cfg = setup(args, processes.rank, processes.total)
            device = processes.choose_device(cfg.MODEL.DEVICE)
        if processes.total == 1:
            return train_or_evaluate(cfg, args)
        if processes.local_rank is None:
            return launch(run, (args,), processes, device, args.dist_url)
        with joined(processes, device):
            return train_or_evaluate(cfg, args)
    except InputError as error:
        sys.exit(f"Error: {error}")


if __name__ == "__main__":
    parser = default_argument_parser()
    add_arguments(parser)
    main(parser.parse_args())
