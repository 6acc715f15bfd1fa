from detectron2.config import LazyCall as L

from gfl_d2.modeling.backbone import DeepStem

from .common.models.resnet import res2net_stages
from .gfl_v2_R_50_FPN_ms_2x import dataloader, datasets, lr_multiplier, model, optimizer, train

_resnet = model.backbone.bottom_up
_resnet.stem = L(DeepStem)(in_channels=3, out_channels=64, norm="FrozenBN")
_resnet.stages = res2net_stages(deformable=[False, False, True, True])
# Not in Detectron2's catalog: see ../gfl_v2_R2_101_DCN_FPN_ms_2x.yaml.
train.init_checkpoint = "R2-101.pth"
