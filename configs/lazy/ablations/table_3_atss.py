from ..common.data.coco import dataloader
from ..common.models.atss import model
from ..common.optim import optimizer
from ..common.schedule import lr_multiplier_1x as lr_multiplier
from ..common.train import datasets, train

train.init_checkpoint = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
