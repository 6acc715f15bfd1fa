# Detectron2's RegNetX-4GF, see ../gfl_regnetx_4gf_FPN_1x.yaml.
from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import RegNet
from detectron2.modeling.backbone.regnet import ResBottleneckBlock, SimpleStem

from .gfl_R_50_FPN_1x import dataloader, datasets, lr_multiplier, model, optimizer, train

model.backbone.in_features = ["s2", "s3", "s4"]
model.backbone.bottom_up = L(RegNet)(
    stem_class=SimpleStem,
    stem_width=32,
    block_class=ResBottleneckBlock,
    depth=23,
    w_a=38.65,
    w_0=96,
    w_m=2.43,
    group_width=40,
    norm="FrozenBN",
    out_features="${..in_features}",
    freeze_at=2,
)
# BGR
model.pixel_mean = [103.53, 116.28, 123.675]
model.pixel_std = [57.375, 57.12, 58.395]
dataloader.train.mapper.image_format = "BGR"
optimizer.weight_decay = 5e-5
train.init_checkpoint = "RegNetX-4.0GF_dds_8gpu.pyth"
