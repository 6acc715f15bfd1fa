"""Fold BatchNorms into convolutions: the same results, up to rounding."""

import torch
from detectron2.layers import Conv2d, FrozenBatchNorm2d, NaiveSyncBatchNorm
from torch import nn
from torch.nn.utils import fuse_conv_bn_weights

from ..modeling.backbone import DeformConv2d

__all__ = ["fuse_norms"]

# Exactly these types: a subclass may compute something else. Detectron2's DeformConv and
# ModulatedDeformConv, for two, do not add their bias where they have a norm.
_CONVS = (Conv2d, DeformConv2d)
_NORMS = (FrozenBatchNorm2d, nn.BatchNorm2d, nn.SyncBatchNorm, NaiveSyncBatchNorm)


@torch.no_grad()
def fuse_norms(model: nn.Module) -> None:
    """
    Fold each BatchNorm that is frozen or in eval mode into the convolution before it, in place, for
    good: the model cannot be trained any more.

    Known types are folded: :class:`detectron2.layers.Conv2d` and this project's
    :class:`DeformConv2d`, with their norm in the attribute ``norm``. All others stay as they are.
    """
    for conv in model.modules():
        if type(conv) not in _CONVS or not _can_fold(conv):
            continue
        norm = conv.norm
        statistics = (norm.running_mean, norm.running_var, norm.eps)
        conv.weight, conv.bias = fuse_conv_bn_weights(
            conv.weight, conv.bias, *statistics, norm.weight, norm.bias
        )
        conv.norm = None


def _can_fold(conv: nn.Module) -> bool:
    norm = conv.norm
    if type(norm) not in _NORMS or norm.running_mean is None:
        return False
    # FrozenBatchNorm2d computes the same in training. Only a norm that is called runs its hooks.
    # Pruning and weight normalization compute the weight anew: it is no parameter then.
    is_constant = type(norm) is FrozenBatchNorm2d or not norm.training
    has_hooks = bool(norm._forward_hooks or norm._forward_pre_hooks)
    return is_constant and not has_hooks and isinstance(conv.weight, nn.Parameter)
