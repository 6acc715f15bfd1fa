# Objects of 1 to 6 pixels, see ../gfl_R_50_FPN_tiny_objects.yaml.
from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from .gfl_R_50_FPN_1x import dataloader, datasets, lr_multiplier, model, optimizer, train

_fpn = model.backbone
_fpn.in_features = _fpn.bottom_up.out_features = ["res2", "res3", "res4", "res5"]
model.head_in_features = ["p2", "p3", "p4", "p5", "p6", "p7"]
model.grid.strides = [4, 8, 16, 32, 64, 128]
model.grid.anchor_scale = 2.0
model.head.input_shape = [
    L(ShapeSpec)(channels="${....backbone.out_channels}", stride=stride)
    for stride in [4, 8, 16, 32, 64, 128]
]
