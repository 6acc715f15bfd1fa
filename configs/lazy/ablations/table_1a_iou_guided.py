from detectron2.config import LazyCall as L

from gfl_d2.modeling import IoUGuided

from .table_3_atss import dataloader, datasets, lr_multiplier, model, optimizer, train

model.head.quality = L(IoUGuided)(alpha=0.25, gamma=2.0, weight=1.0)
