"""A training whose loss or weights are no numbers stops, says with which images, saves nothing."""

from __future__ import annotations

import pytest
import torch
from detectron2.engine import HookBase

from gfl_d2.checkpoint import GFLCheckpointer
from gfl_d2.engine import Trainer
from gfl_d2.engine.launch import hide_mistakes_from_log
from gfl_d2.errors import InputError
from test_exact_resume import make_config
from toy_training import write_dataset


class Spoiler(HookBase):
    """Makes a weight NaN after an iteration, before anything is saved."""

    def __init__(self, iteration):
        self._iteration = iteration

    def after_step(self):
        if self.trainer.iter == self._iteration:
            torch.nn.init.constant_(self.trainer.model.head.bbox_pred.bias, torch.nan)


@pytest.fixture(autouse=True)
def _catalogs(clean_catalogs):
    pass


def make_trainer(folder, *opts, iteration=None):
    write_dataset(folder)
    trainer = Trainer(make_config(folder, *opts))
    trainer.resume_or_load(False)
    if iteration is not None:
        hooks, trainer._hooks = trainer._hooks, []
        trainer.register_hooks([Spoiler(iteration), *hooks])
    return trainer


def last_checkpoint(trainer):
    checkpointer = GFLCheckpointer(Trainer.build_model(trainer.cfg), trainer.cfg.OUTPUT_DIR)
    return checkpointer.resume_or_load("")["iteration"]


def test_a_weight(tmp_path, logged_by_training):
    hide_mistakes_from_log()
    trainer = make_trainer(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 2, iteration=4)
    with pytest.raises(InputError) as info:
        trainer.train()
    text = str(info.value)
    assert "iteration 5" in text
    assert "head.bbox_pred.bias" in text
    names = [x["file_name"].rpartition("/")[2] for x in trainer._trainer.data_loader.last_batch]
    assert names and all(name in text for name in names)
    assert last_checkpoint(trainer) == 3
    assert not any(record.exc_info for record in logged_by_training)


def test_nothing_is_saved_over_it(tmp_path):
    trainer = make_trainer(tmp_path, "SOLVER.CHECKPOINT_PERIOD", 2, iteration=3)
    with pytest.raises(InputError, match=r"NaN or infinite: head\.bbox_pred\.bias\. Nothing"):
        trainer.train()
    assert last_checkpoint(trainer) == 1
    assert not (tmp_path / "output" / "model_0000003.pth").exists()


def test_a_picture(tmp_path):
    trainer = make_trainer(tmp_path)
    spoiled = []

    def spoil(module, args):
        if trainer.iter == 2:
            image = args[0][1]
            image["image"] = image["image"].float().fill_(torch.inf)
            spoiled.append(image["file_name"].rpartition("/")[2])

    trainer.model.register_forward_pre_hook(spoil)
    with pytest.raises(InputError) as info:
        trainer.train()
    text = str(info.value)
    assert "iteration 2" in text
    assert f"Pixels are NaN or infinite in {spoiled[0]}: mend" in text
    assert all(p.isfinite().all() for p in trainer.model.parameters())
