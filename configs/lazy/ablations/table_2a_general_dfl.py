from detectron2.config import LazyCall as L

from gfl_d2.modeling import GeneralDistribution

from .table_3_atss import dataloader, datasets, lr_multiplier, model, optimizer, train

model.head.box = L(GeneralDistribution)(reg_max=16, bin_width=1.0, dfl_weight=0.25)
