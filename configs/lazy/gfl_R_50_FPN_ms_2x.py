from .common.data.coco import dataloader
from .common.models.gfl import model
from .common.optim import optimizer
from .common.schedule import lr_multiplier_2x as lr_multiplier
from .common.train import datasets, train

_resize = dataloader.train.mapper.augmentations[0]
_resize.short_edge_length, _resize.sample_style = [480, 800], "range"
train.max_iter = 180000
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
