from ..common.models.sapd import model
from ..gfl_R_101_FPN_ms_2x import dataloader, datasets, lr_multiplier, optimizer, train

model.backbone.bottom_up.stages.depth = 101
model.assigner.hard_iterations = 90000  # half of train.max_iter
