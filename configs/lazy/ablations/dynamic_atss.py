from gfl_d2.modeling import DynamicATSSAssigner

from ..common.data.coco import dataloader
from ..common.models.gfl import model
from ..common.optim import optimizer
from ..common.schedule import lr_multiplier_1x as lr_multiplier
from ..common.train import datasets, train

model.assigner._target_ = DynamicATSSAssigner
train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
