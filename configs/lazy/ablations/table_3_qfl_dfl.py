from ..gfl_R_50_FPN_1x import dataloader, datasets, lr_multiplier, model, optimizer, train
