import torch
from detectron2.config import LazyCall as L
from detectron2.solver import get_default_optimizer_params

optimizer = L(torch.optim.SGD)(
    # The training puts the model there as `params.model`.
    params=L(get_default_optimizer_params)(weight_decay_norm="${..weight_decay}"),
    lr=0.01,
    momentum=0.9,
    weight_decay=1e-4,
)

# Norms are not decayed.
adamw = L(torch.optim.AdamW)(
    params=L(get_default_optimizer_params)(
        base_lr="${..lr}", weight_decay="${..weight_decay}", weight_decay_norm=0.0
    ),
    lr=1e-4,
    weight_decay=0.05,
)
