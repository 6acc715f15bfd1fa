from detectron2.config import LazyCall as L

from gfl_d2.modeling.backbone import zero_init_residual

from .common.data.coco import dataloader
from .common.models.gfl import model
from .common.optim import optimizer
from .common.schedule import multi_step
from .common.train import datasets, train

datasets.register = [
    ["bccd_train", "bccd/instances_train.json", "bccd/images"],
    ["bccd_val", "bccd/instances_val.json", "bccd/images"],
]
_resize = dataloader.train.mapper.augmentations[0]
_resize.short_edge_length, _resize.max_size = [240], 320
dataloader.train.dataset.names = "bccd_train"
dataloader.train.total_batch_size = 8
_resize = dataloader.test.mapper.augmentations[0]
_resize.short_edge_length, _resize.max_size = 240, 320
dataloader.test.dataset.names = "bccd_val"
dataloader.train.num_workers = dataloader.test.num_workers = 1

_resnet = model.backbone.bottom_up
_resnet.stem.norm, _resnet.freeze_at = "BN", 0
_resnet.stages.depth = 18
del _resnet.stages.stride_in_1x1
model.backbone.bottom_up = L(zero_init_residual)(resnet=_resnet)
model.backbone.out_channels = 128
model.head.num_classes, model.head.num_convs, model.head.conv_dim = 3, 2, 128

lr_multiplier = multi_step(1200, [900, 1104], warmup=100)
train.max_iter, train.eval_period, train.clip_gradients = 1200, 400, 35.0
