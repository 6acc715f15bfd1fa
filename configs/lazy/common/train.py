# Of tools/lazyconfig_train_net.py: Detectron2's common/train.py, and what this project adds.
train = dict(
    output_dir="./output",
    init_checkpoint="",
    max_iter=90000,
    amp=dict(enabled=False),  # float16 on a GPU
    bf16=False,  # SOLVER.BF16 of the yaml configs, and so on
    channels_last=True,
    ddp=dict(broadcast_buffers=False, find_unused_parameters=False, fp16_compression=False),
    clip_gradients=0.0,  # the largest norm of all gradients together; 0 for no clipping
    ema=dict(enabled=False, decay=0.9998, warmup=2000),
    checkpointer=dict(period=5000, max_to_keep=None),
    best_metric="bbox/AP",
    eval_period=0,  # evaluation after the last iteration alone
    log_period=20,
    device="cuda",
    seed=-1,
)
# As DATASETS.REGISTER and DATASETS.CLASSES.
datasets = dict(register=[], classes=[])
