from detectron2.config import LazyCall as L
from detectron2.solver import WarmupParamScheduler
from fvcore.common.param_scheduler import CosineParamScheduler, MultiStepParamScheduler


def multi_step(max_iter, steps, warmup):
    """A tenth of the learning rate after each step. It scales with train.max_iter."""
    scheduler = L(MultiStepParamScheduler)(
        values=[0.1**i for i in range(len(steps) + 1)], milestones=[*steps, max_iter]
    )
    return _with_warmup(scheduler, warmup / max_iter)


def cosine(max_iter, warmup):
    return _with_warmup(L(CosineParamScheduler)(start_value=1, end_value=0), warmup / max_iter)


def _with_warmup(scheduler, length):
    return L(WarmupParamScheduler)(
        scheduler=scheduler, warmup_length=length, warmup_method="linear", warmup_factor=0.001
    )


lr_multiplier_1x = multi_step(90000, [60000, 80000], warmup=500)
lr_multiplier_2x = multi_step(180000, [120000, 160000], warmup=500)
