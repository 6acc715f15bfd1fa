from detectron2.config import LazyCall as L
from detectron2.data import transforms as T

from .common.schedule import cosine
from .gfl_R_18_FPN_bccd_reference import dataloader, datasets, model, optimizer, train

dataloader.train.mapper.augmentations.append(L(T.RandomFlip)(horizontal=False, vertical=True))
lr_multiplier = cosine(1200, warmup=100)
optimizer.lr = 0.02
train.bf16 = True
