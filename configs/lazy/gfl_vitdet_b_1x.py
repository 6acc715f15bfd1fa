# ViTDet with a ViT-B, which Detectron2's main branch has, see ../gfl_vitdet_b_1x.yaml.
from functools import partial

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import ViT, get_vit_lr_decay_rate
from torch import nn

from gfl_d2.modeling.backbone import LastLevelP6P7OnP5, ViTPyramid

from .gfl_swin_tiny_FPN_1x import dataloader, datasets, lr_multiplier, model, optimizer, train

model.backbone = L(ViTPyramid)(
    net=L(ViT)(
        img_size=1024,
        patch_size=16,
        embed_dim=768,
        depth=12,
        num_heads=12,
        drop_path_rate=0.1,
        norm_layer=partial(nn.LayerNorm, eps=1e-6),
        window_size=14,
        window_block_indexes=[0, 1, 3, 4, 6, 7, 9, 10],
        use_rel_pos=True,
    ),
    in_feature="last_feat",
    out_channels=256,
    scale_factors=[2.0, 1.0, 0.5],
    top_block=L(LastLevelP6P7OnP5)(channels="${..out_channels}"),
)
optimizer.weight_decay = 0.1
optimizer.params.lr_factor_func = partial(
    get_vit_lr_decay_rate, lr_decay_rate=0.7, num_layers=model.backbone.net.depth
)
train.init_checkpoint = (
    "detectron2://ImageNetPretrained/MAE/mae_pretrain_vit_base.pth?matching_heuristics=True"
)
