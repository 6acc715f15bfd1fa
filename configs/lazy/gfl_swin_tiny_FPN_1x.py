# Swin-T by timm, see ../gfl_swin_tiny_FPN_1x.yaml.
from detectron2.config import LazyCall as L

from gfl_d2.modeling.backbone import TimmBackbone

from .common.data.coco import dataloader
from .common.models.gfl import model
from .common.optim import adamw as optimizer
from .common.schedule import multi_step
from .common.train import datasets, train

model.backbone.bottom_up = L(TimmBackbone)(
    name="swin_tiny_patch4_window7_224",
    out_features="${..in_features}",
    drop_path_rate=0.2,
)
lr_multiplier = multi_step(90000, [60000, 80000], warmup=1000)
train.init_checkpoint = "swin_tiny_patch4_window7_224.pth"
