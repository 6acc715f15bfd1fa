from .common.models.resnet import resnet_stages
from .gfl_R_50_FPN_ms_2x import dataloader, datasets, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.stages = resnet_stages(
    deformable=[False, False, False, False], bottleneck_channels=128, num_groups=32
)
# Not in Detectron2's catalog: see ../gfl_X_101_32x4d_FPN_ms_2x.yaml.
train.init_checkpoint = "X-101-32x4d.pth"
