"""Stages of ResNets that ResNet.make_default_stages cannot make."""

from detectron2.config import LazyCall as L
from detectron2.modeling.backbone import BottleneckBlock, ResNet
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock

from gfl_d2.modeling.backbone import Res2NetBlock

BLOCKS_OF_101 = (3, 4, 23, 3)


def resnet_stages(deformable, modulated=False, bottleneck_channels=64, num_groups=1):
    """ResNet-101 or ResNeXt-101; ``deformable`` says for each of res2 to res5 whether it is."""
    plain = dict(block_class=BottleneckBlock)
    deform = dict(block_class=DeformBottleneckBlock, deform_modulated=modulated)
    return _make_stages(
        [
            dict(
                bottleneck_channels=bottleneck_channels * 2**i,
                num_groups=num_groups,
                stride_in_1x1=False,
                **(deform if is_deformable else plain),
            )
            for i, is_deformable in enumerate(deformable)
        ]
    )


def res2net_stages(deformable, base_width=26, scales=4):
    """Res2Net-101, likewise."""
    return _make_stages(
        [
            dict(
                block_class=Res2NetBlock,
                width=base_width * 2**i,
                scales=scales,
                is_first_per_block=[True] + [False] * (BLOCKS_OF_101[i] - 1),
                deformable=is_deformable,
            )
            for i, is_deformable in enumerate(deformable)
        ]
    )


def _make_stages(options):
    return [
        L(ResNet.make_stage)(
            num_blocks=number,
            stride_per_block=[1 if i == 0 else 2] + [1] * (number - 1),
            in_channels=64 if i == 0 else 128 * 2**i,
            out_channels=256 * 2**i,
            norm="FrozenBN",
            **options[i],
        )
        for i, number in enumerate(BLOCKS_OF_101)
    ]
