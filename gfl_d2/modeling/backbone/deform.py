"""Deformable convolutions that need no Detectron2 extension."""

from __future__ import annotations

from detectron2.layers import Conv2d, DeformConv, ModulatedDeformConv
from detectron2.modeling.backbone.resnet import DeformBottleneckBlock
from torch import Tensor, nn
from torchvision.ops import deform_conv2d

from ..precision import full_precision

__all__ = ["DeformConv2d", "use_torchvision_deform_conv"]


class DeformConv2d(nn.Module):
    """
    What :class:`detectron2.layers.DeformConv` and :class:`ModulatedDeformConv` compute, with the
    same parameter names, by torchvision's operator, which runs on CPU and GPU.
    """

    def __init__(self, conv: DeformConv | ModulatedDeformConv | Conv2d):
        """``conv``: what parameters, normalization and settings are taken from."""
        super().__init__()
        self.weight, self.bias = conv.weight, getattr(conv, "bias", None)
        self.norm, self.activation = conv.norm, conv.activation
        self.stride, self.padding, self.dilation = conv.stride, conv.padding, conv.dilation

    def forward(self, x: Tensor, offset: Tensor, mask: Tensor | None = None) -> Tensor:
        """
        Args:
            x: shape (N, C, H, W).
            offset: shape (N, 2 * groups * kernel_h * kernel_w, H', W'), (y, x) of each tap.
            mask: shape (N, groups * kernel_h * kernel_w, H', W'), factor of each tap in [0, 1];
                None for the plain, non-modulated layer.

        Returns:
            Tensor: shape (N, C', H', W').
        """
        # In float32 under autocast too: on CPU the operator has no other, and wherever it runs,
        # offsets of many pixels in half precision would be rounded to a fraction of one.
        x = deform_conv2d(
            full_precision(x),
            full_precision(offset),
            full_precision(self.weight),
            None if self.bias is None else full_precision(self.bias),
            stride=self.stride,
            padding=self.padding,
            dilation=self.dilation,
            mask=None if mask is None else full_precision(mask),
        ).to(x.dtype)
        if self.norm is not None:
            x = self.norm(x)
        if self.activation is not None:
            x = self.activation(x)
        return x


def use_torchvision_deform_conv(model: nn.Module) -> nn.Module:
    """
    Replace the convolution of every deformable bottleneck in ``model``, in place, by
    :class:`DeformConv2d`, and return it. Names and values of parameters stay.
    """
    for module in model.modules():
        if isinstance(module, DeformBottleneckBlock):
            module.conv2 = DeformConv2d(module.conv2)
    return model
