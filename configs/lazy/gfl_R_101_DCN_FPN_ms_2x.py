from detectron2.config import LazyCall as L

from gfl_d2.modeling.backbone import use_torchvision_deform_conv

from .common.models.resnet import resnet_stages
from .gfl_R_50_FPN_ms_2x import dataloader, datasets, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages = resnet_stages(
    deformable=[False, True, True, True], modulated=True
)
model.backbone.bottom_up = L(use_torchvision_deform_conv)(model=model.backbone.bottom_up)
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-101.pkl"
