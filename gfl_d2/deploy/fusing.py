"""Convolutions with what follows them folded in: the same results, up to rounding."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from detectron2.modeling.backbone.resnet import BasicBlock, BottleneckBlock
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

__all__ = ["FrozenNormConv2d", "PackedConv2d", "fold_frozen_norms", "fuse_norms", "pack_convs"]

# The modules below change their class rather than their place in the model: Detectron2's FPN, for
# one, holds its convolutions in lists too.


class FrozenNormConv2d(Conv2d):
    """
    Detectron2's convolution with a :class:`FrozenBatchNorm2d`, which scales the weights rather than
    the output: they are smaller. Parameters, buffers and their names are the same.
    """

    def forward(self, x: Tensor) -> Tensor:
        scale, bias = _affine(self.norm, self.bias)
        weight = self.weight * scale[:, None, None, None]
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def fold_frozen_norms(model: nn.Module) -> None:
    """
    Make each convolution with a :class:`FrozenBatchNorm2d` a :class:`FrozenNormConv2d`, to be
    trained as before.

    Args:
        model: changed in place, but for its parameters and buffers.
    """
    for conv in model.modules():
        if type(conv) is Conv2d and isinstance(conv.norm, FrozenBatchNorm2d):
            conv.__class__ = FrozenNormConv2d


@torch.no_grad()
def fuse_norms(model: nn.Module) -> None:
    """
    Fold each BatchNorm, frozen or in eval mode, into the convolution before it, for good.

    Args:
        model: whose convolutions are Detectron2's, or this project's: with their norm in an
            attribute. Changed in place; it cannot be trained any more.
    """
    for conv in model.modules():
        norm = getattr(conv, "norm", None)
        is_frozen = isinstance(norm, FrozenBatchNorm2d)
        if not is_frozen and (not isinstance(norm, _BatchNorm) or norm.training):
            continue
        scale, bias = _affine(norm, conv.bias)
        weight = conv.weight * scale[:, None, None, None]
        conv.weight = nn.Parameter(weight, requires_grad=False)
        conv.bias = nn.Parameter(bias, requires_grad=False)
        conv.norm = None
        if isinstance(conv, FrozenNormConv2d):
            conv.__class__ = Conv2d


def _affine(
    norm: FrozenBatchNorm2d | _BatchNorm, conv_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Scale and bias, shape (C,) each, of a convolution's output by its bias and norm."""
    scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
    bias = norm.bias - norm.running_mean * scale
    return scale, bias if conv_bias is None else bias + conv_bias * scale


class PackedConv2d(nn.Conv2d):
    """
    A convolution for inference on a CPU. Where inputs of a size come again, its weights are
    arranged for them once, as oneDNN reads them, rather than at each call, and a ReLU, or a sum and
    a ReLU, is computed on the way out. Where sizes are always others, or gradients are recorded, it
    is a plain one. Autocast does not see it. Weights may be loaded later, by ``load_state_dict``,
    but not behind PyTorch's back (``weight.data.copy_``).
    """

    # Set by pack_convs. Of the latest sizes of the input: the weights as oneDNN has them, or None
    # where it has come but once; and how many these are.
    _packed: dict[tuple, Tensor | None]
    _num_sizes: int

    def forward(self, x: Tensor) -> Tensor:
        norm, activation = getattr(self, "norm", None), getattr(self, "activation", None)
        if norm is None and _is_relu(activation):
            return self.relu(x)
        x = self._convolve(x)
        if norm is not None:
            x = norm(x)
        return x if activation is None else activation(x)

    def relu(self, x: Tensor) -> Tensor:
        """ReLU of the convolution alone, without norm and activation."""
        return self._convolve(x, has_relu=True)

    def add_relu(self, x: Tensor, other: Tensor) -> Tensor:
        """ReLU of the sum of the convolution alone and ``other``."""
        return self._convolve(x, other, has_relu=True)

    def _convolve(self, x: Tensor, other: Tensor | None = None, has_relu: bool = False) -> Tensor:
        packed = None if torch.is_grad_enabled() else self._packed_weight(x)
        if packed is None:
            x = self._conv_forward(x, self.weight, self.bias)
            x = x if other is None else x.add_(other)
            return x.relu_() if has_relu else x
        x = x.contiguous(memory_format=torch.channels_last)
        settings = self.padding, self.stride, self.dilation, self.groups
        run, unary = torch.ops.mkldnn._convolution_pointwise, "relu" if has_relu else "none"
        if other is None:
            return run(x, packed, self.bias, *settings, unary, [], "")
        return run.binary(x, other, packed, self.bias, *settings, "add", None, unary, [], "")

    def _packed_weight(self, x: Tensor) -> Tensor | None:
        weight = self.weight.detach()
        # Weights may be loaded or moved later. An arrangement for another size can be slower than
        # none, and to make one takes longer than to do without.
        version = 0 if weight.is_inference() else weight._version
        key = x.shape, weight.data_ptr(), weight.dtype, version
        if key not in self._packed:
            while len(self._packed) >= self._num_sizes:
                del self._packed[next(iter(self._packed))]
            self._packed[key] = None
        elif self._packed[key] is None:
            settings = self.padding, self.stride, self.dilation, self.groups
            self._packed[key] = torch._C._nn.mkldnn_reorder_conv2d_weight(
                weight.to_mkldnn(), *settings, x.shape
            )
        return self._packed[key]

    def __getstate__(self) -> dict:
        # What oneDNN holds cannot be copied, and is made anew.
        return {**self.__dict__, "_packed": {}}


class PackedBasicBlock(BasicBlock):
    """Detectron2's block, of :class:`PackedConv2d` without norms."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.conv2.add_relu(self.conv1.relu(x), shortcut)


class PackedBottleneckBlock(BottleneckBlock):
    """Detectron2's block, of :class:`PackedConv2d` without norms."""

    def forward(self, x: Tensor) -> Tensor:
        shortcut = x if self.shortcut is None else self.shortcut(x)
        return self.conv3.add_relu(self.conv2.relu(self.conv1.relu(x)), shortcut)


def pack_convs(model: nn.Module, num_sizes: int = 1) -> None:
    """
    Make each convolution a :class:`PackedConv2d`. Nothing is done where PyTorch has no oneDNN.

    Args:
        model: on a CPU, after :func:`fuse_norms`. Changed in place, but for its parameters.
        num_sizes: of the input of each convolution, for which its weights are kept.
    """
    if not _can_pack():
        return
    for conv in model.modules():
        has_zeros = getattr(conv, "padding_mode", None) == "zeros"
        if type(conv) in (nn.Conv2d, Conv2d) and has_zeros and not isinstance(conv.padding, str):
            conv.__class__ = PackedConv2d
            conv._packed, conv._num_sizes = {}, num_sizes
    blocks = {BasicBlock: PackedBasicBlock, BottleneckBlock: PackedBottleneckBlock}
    for block in model.modules():
        if type(block) in blocks and all(map(_is_bare, block.children())):
            block.__class__ = blocks[type(block)]


def _is_bare(conv: nn.Module) -> bool:
    """Whether the block's own ReLU, or nothing, comes after the convolution."""
    return isinstance(conv, PackedConv2d) and conv.norm is None and conv.activation is None


def _is_relu(activation: object) -> bool:
    return isinstance(activation, nn.ReLU) or activation in (F.relu, F.relu_)


def _can_pack() -> bool:
    """Whether PyTorch has oneDNN, and the operators for it that its own compiler uses."""
    return (
        torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_convolution_pointwise")
        and hasattr(torch._C._nn, "mkldnn_reorder_conv2d_weight")
    )
