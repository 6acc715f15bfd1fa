"""What to say of a training whose loss is NaN or infinite."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from torch import nn

from ..errors import name_some

__all__ = ["describe_divergence"]


def describe_divergence(model: nn.Module, batch: Sequence[dict], iteration: int) -> str:
    """
    One line: the images of the iteration, what of them and of the weights is NaN or infinite, and
    remedies.

    Args:
        model: as it was in that iteration.
        batch: of this process, as the model got it. Empty if it is not known.
        iteration: of the training, from 0.
    """
    names = [Path(str(x.get("file_name", "an image without a name"))).name for x in batch]
    wrong = [name for name, x in zip(names, batch) if not x["image"].isfinite().all()]
    weights = [name for name, p in model.named_parameters() if not p.isfinite().all()]
    parts = [f"The loss is NaN or infinite in iteration {iteration}"]
    if names:
        parts[0] += f", with {name_some(names, 8)}"
    if wrong:
        parts.append(f"Pixels are NaN or infinite in {name_some(wrong)}: mend or remove them")
    elif weights:
        parts.append(f"Weights are, too: {name_some(weights, 3)}")
    if not wrong:
        parts.append(
            "Lower SOLVER.BASE_LR, lengthen SOLVER.WARMUP_ITERS, or set "
            "SOLVER.CLIP_GRADIENTS.ENABLED True"
        )
    return ". ".join([*parts, "Checkpoints of before are whole: --resume goes on from the last"])
