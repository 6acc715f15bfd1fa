from .table_3_atss import dataloader, datasets, lr_multiplier, model, optimizer, train
