from detectron2.config import LazyCall as L

from gfl_d2.modeling import Gaussian

from .table_3_atss import dataloader, datasets, lr_multiplier, model, optimizer, train

model.head.box = L(Gaussian)(prior=4.0, kl_weight=0.25)
