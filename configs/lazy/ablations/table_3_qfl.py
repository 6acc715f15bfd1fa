from .table_1a_joint_qfl import dataloader, datasets, lr_multiplier, model, optimizer, train
