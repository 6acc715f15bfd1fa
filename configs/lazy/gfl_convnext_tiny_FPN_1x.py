# ConvNeXt-T by timm, see ../gfl_convnext_tiny_FPN_1x.yaml.
from .gfl_swin_tiny_FPN_1x import dataloader, datasets, lr_multiplier, model, optimizer, train

model.backbone.bottom_up.name = "convnext_tiny"
train.init_checkpoint = "convnext_tiny.pth"
