from .table_2a_general_dfl import dataloader, datasets, lr_multiplier, model, optimizer, train
