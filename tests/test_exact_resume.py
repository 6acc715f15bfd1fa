"""A training that is killed and resumed is, bit for bit, the one that was not."""

from __future__ import annotations

import functools
import json
import random

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import HookBase

import models  # noqa: F401  (registers the tiny backbone)
from gfl_d2 import load_config
from gfl_d2.data import load_training_dicts, register_datasets
from gfl_d2.engine import Trainer
from gfl_d2.engine.loader import TrainingLoader
from gfl_d2.errors import InputError
from processes import run_processes
from toy_training import CONFIG, options, write_dataset

TINY = (
    *("MODEL.BACKBONE.NAME", "build_tiny_backbone", "MODEL.RESNETS.ZERO_INIT_RESIDUAL", False),
    *("DATASETS.TEST", "()", "TEST.EVAL_PERIOD", 0, "SOLVER.CHECKPOINT_PERIOD", 3),
    *("INPUT.MIN_SIZE_TRAIN", "(48, 56, 64)", "INPUT.RANDOM_FLIP", "both", "SOLVER.MAX_ITER", 8),
)
KINDS = {
    "plain": (),
    "ungrouped": ("DATALOADER.ASPECT_RATIO_GROUPING", False),
    "workers": ("DATALOADER.NUM_WORKERS", 2),
    "all": (
        *("MODEL_EMA.ENABLED", True, "MODEL_EMA.DECAY", 0.9, "MODEL_EMA.WARMUP", 3),
        *("SOLVER.ACCUMULATE", 2, "SOLVER.LR_SCHEDULER_NAME", "WarmupCosineLR"),
        *("SOLVER.OPTIMIZER", "AdamW", "SOLVER.BASE_LR", 0.0001),
    ),
    "bfloat16": ("SOLVER.BF16", True),
}


class Killed(BaseException):
    pass


class Killer(HookBase):
    """Ends a training after an iteration, and keeps random numbers of each."""

    def __init__(self, iteration):
        self._iteration, self.numbers = iteration, {}

    def after_step(self):
        drawn = (random.random(), np.random.rand(), torch.rand(()).item())
        self.numbers[self.trainer.iter] = drawn
        if self.trainer.iter == self._iteration:
            raise Killed


def write_standing_images(folder):
    """The toy dataset, with two of its six images turned by their diagonal."""
    write_dataset(folder)
    path = folder / "instances.json"
    data = json.loads(path.read_text())
    for image in data["images"][3:5]:
        name = str(folder / "images" / image["file_name"])
        cv2.imwrite(name, cv2.imread(name).transpose(1, 0, 2))
        image["width"], image["height"] = image["height"], image["width"]
        for annotation in data["annotations"]:
            if annotation["image_id"] == image["id"]:
                x, y, w, h = annotation["bbox"]
                annotation["bbox"] = [y, x, h, w]
    path.write_text(json.dumps(data))


def make_config(folder, *opts):
    cfg = load_config(CONFIG, options(folder, *TINY, "SEED", 3, *opts))
    register_datasets(cfg)
    return cfg


def train(folder, name, *opts, killed=None, resume=False):
    """Weights are drawn from SEED alone, as train_net.py does; gives random numbers of steps."""
    cfg = make_config(folder, *opts, "OUTPUT_DIR", folder / name)
    torch.manual_seed(int(resume))
    np.random.seed(int(resume))
    trainer = Trainer(cfg)
    trainer.resume_or_load(resume)
    killer = Killer(killed)
    trainer.register_hooks([killer])
    try:
        trainer.train()
    except Killed:
        assert killed is not None
    return killer.numbers


def train_in_parts(folder, name, *opts, killed):
    """Killed after these iterations, one after the other."""
    numbers = {}
    for i, iteration in enumerate([*killed, None]):
        numbers.update(train(folder, name, *opts, killed=iteration, resume=i > 0))
    return numbers


def read(folder, name="model_final.pth"):
    content = torch.load(folder / name, weights_only=True)
    content.pop("config")  # has OUTPUT_DIR
    return content


def assert_equal(a, b, where=""):
    """Of whole checkpoints: tensors in dictionaries and lists, to the bit."""
    assert type(a) is type(b), where
    if isinstance(a, dict):
        assert a.keys() == b.keys(), where
    if isinstance(a, (dict, list, tuple)):
        keys = a if isinstance(a, dict) else range(len(a))
        assert len(a) == len(b), where
        for key in keys:
            assert_equal(a[key], b[key], f"{where}/{key}")
    elif isinstance(a, torch.Tensor):
        assert torch.equal(a, b), where
    else:
        assert a == b, where


@pytest.fixture
def dataset(tmp_path, clean_catalogs):
    write_standing_images(tmp_path)
    return tmp_path


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_resumed_training_is_the_uninterrupted_one(dataset, kind):
    """Killed in an epoch of three iterations, and at the end of one."""
    opts = KINDS[kind]
    numbers = train(dataset, "whole", *opts)
    assert train_in_parts(dataset, "parts", *opts, killed=[4, 5]) == numbers
    assert len({n for drawn in numbers.values() for n in drawn}) == 8 * 3
    whole = read(dataset / "whole")
    assert_equal(read(dataset / "parts"), whole)
    start = read(dataset / "whole", "model_0000002.pth")
    assert not torch.equal(
        whole["model"]["head.cls_score.weight"], start["model"]["head.cls_score.weight"]
    )


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
def test_scaler_of_mixed_precision(dataset):
    """A GPU adds in no fixed order, so weights are not the same to the bit."""
    opts = ("MODEL.DEVICE", "cuda", "SOLVER.AMP.ENABLED", True)
    train(dataset, "whole", *opts)
    train_in_parts(dataset, "parts", *opts, killed=[4])
    whole, parts = read(dataset / "whole"), read(dataset / "parts")
    scalers = [content["trainer"]["_trainer"]["grad_scaler"] for content in (whole, parts)]
    assert scalers[0] == scalers[1]
    assert scalers[0]["_growth_tracker"] > 5  # steps of both parts
    for name, value in whole["model"].items():
        torch.testing.assert_close(parts["model"][name], value, rtol=0.01, atol=0.01)


def test_killed_after_the_last_iteration(dataset):
    train(dataset, "parts", killed=7)
    before = read(dataset / "parts")
    assert train(dataset, "parts", resume=True) == {}
    assert_equal(read(dataset / "parts"), before)


def test_two_trainings_with_one_seed(dataset):
    """And neither with another, nor with none, whose seed is drawn."""
    names = {"a": (), "b": ("DATALOADER.NUM_WORKERS", 1), "c": ("SEED", 4), "d": ("SEED", -1)}
    weights = {}
    for name, opts in names.items():
        train(dataset, name, *opts, "SOLVER.MAX_ITER", 3)
        weights[name] = read(dataset / name)["model"]
    assert_equal(weights["a"], weights["b"])
    for name in ("c", "d"):
        with pytest.raises(AssertionError):
            assert_equal(weights["a"], weights[name])


def test_a_seed_that_was_drawn_is_kept(dataset):
    opts = ("SEED", -1)
    numbers = train(dataset, "parts", *opts, killed=4)
    seed = read(dataset / "parts", "model_0000002.pth")["trainer"]["seed"]
    resumed = train(dataset, "parts", *opts, resume=True)
    assert (resumed[3], resumed[4]) == (numbers[3], numbers[4])
    assert read(dataset / "parts")["trainer"]["seed"] == seed


def test_checkpoints_of_earlier_versions(dataset, caplog):
    train(dataset, "parts", killed=4)
    path = dataset / "parts" / "model_0000002.pth"
    content = torch.load(path, weights_only=True)
    del content["trainer"]["seed"]
    torch.save(content, path)
    train(dataset, "parts", resume=True)
    assert "The checkpoint has no seed" in caplog.text


def test_loaders_of_others(dataset, caplog, monkeypatch):
    batch = next(iter(Trainer.build_train_loader(make_config(dataset))))
    monkeypatch.setattr(Trainer, "build_train_loader", classmethod(lambda cls, cfg: [batch] * 9))
    train(dataset, "parts", killed=4)
    assert "starts anew" not in caplog.text
    train(dataset, "parts", resume=True)
    assert "list starts anew" in caplog.text
    assert read(dataset / "parts")["iteration"] == 7


# The loader


def take(loader, number=12):
    """Ids and pixels."""
    batches = iter(loader)
    return [[(x["image_id"], x["image"]) for x in next(batches)] for _ in range(number)]


def assert_equal_batches(a, b):
    assert [[image_id for image_id, _ in batch] for batch in a] == [
        [image_id for image_id, _ in batch] for batch in b
    ]
    for first, second in zip(a, b):
        assert all(torch.equal(x, y) for (_, x), (_, y) in zip(first, second))


@pytest.mark.slow
@pytest.mark.parametrize("num_workers", [0, 3])
@pytest.mark.parametrize("sampler", ["TrainingSampler", "RepeatFactorTrainingSampler"])
@pytest.mark.parametrize("is_grouped", [False, True])
def test_batches_from_anywhere(dataset, is_grouped, sampler, num_workers):
    opts = ("DATALOADER.ASPECT_RATIO_GROUPING", is_grouped, "SOLVER.IMS_PER_BATCH", 4)
    opts += ("DATALOADER.SAMPLER_TRAIN", sampler, "DATALOADER.REPEAT_THRESHOLD", 4.0)
    expected = take(Trainer.build_train_loader(make_config(dataset, *opts)))
    cfg = make_config(dataset, *opts, "DATALOADER.NUM_WORKERS", num_workers, "SEED", 9)
    for start in (0, 7):
        loader = Trainer.build_train_loader(cfg)
        loader.start(3, start)
        assert_equal_batches(take(loader, 12 - start), expected[start:])
    lying = [{x.shape[1] < x.shape[2] for _, x in batch} for batch in expected]
    assert (max(map(len, lying)) == 1) == is_grouped


def test_groups_and_order_are_those_of_detectron2(dataset):
    """Of its own loader, with as many images as the sampler gives it."""
    cfg = make_config(dataset, "SOLVER.IMS_PER_BATCH", 3)
    loader = Trainer.build_train_loader(cfg)
    order = iter(loader._sampler)
    buckets, expected = {True: [], False: []}, []
    sizes = [(record["width"], record["height"]) for record in load_training_dicts(cfg)]
    while len(expected) < 8:
        index = next(order)
        bucket = buckets[sizes[index][0] > sizes[index][1]]
        bucket.append(index + 1)  # its id
        if len(bucket) == 3:
            expected.append(bucket[:])
            bucket.clear()
    assert [[image_id for image_id, _ in batch] for batch in take(loader, 8)] == expected


def test_each_image_has_random_numbers_of_its_own(dataset):
    """In whatever process it is, and the process goes on with its own."""
    cfg = make_config(dataset)

    def mapper(record):
        assert record["iteration"] == next(iterations)
        return [random.random(), np.random.rand(), torch.rand(()).item()]

    loader = TrainingLoader(cfg, load_training_dicts(cfg), mapper)
    torch.manual_seed(5)
    loader.start(3, 4)
    iterations = iter([i for i in range(4, 24) for _ in range(2)])
    batches = iter(loader)
    seen = [x for _ in range(20) for element in next(batches) for x in element]
    assert len(set(seen)) == 20 * 2 * 3
    after = torch.rand(())
    torch.manual_seed(5)
    assert torch.equal(torch.rand(()), after)


def test_another_image_for_one_without_input(dataset):
    cfg = make_config(dataset)
    records = load_training_dicts(cfg)

    def first_three(record):
        return record if record["image_id"] <= 3 else None

    batches = [next(iter(TrainingLoader(cfg, records, first_three))) for _ in range(2)]
    assert batches[0] == batches[1]
    loader = iter(TrainingLoader(cfg, records, first_three))
    assert {x["image_id"] for _ in range(20) for x in next(loader)} == {1, 2, 3}
    with pytest.raises(InputError, match="None of all images"):
        next(iter(TrainingLoader(cfg, records, lambda record: None)))


# Two processes


def train_share(folder, kind, rank):
    opts = (*KINDS[kind], "SOLVER.IMS_PER_BATCH", 4)
    numbers = train(folder, "whole", *opts)
    parts = train_in_parts(folder, "parts", *opts, killed=[4, 5])
    cfg = make_config(folder, "DATALOADER.ASPECT_RATIO_GROUPING", False, "SOLVER.IMS_PER_BATCH", 4)
    batches = take(Trainer.build_train_loader(cfg))
    return numbers, parts, batches


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["plain", "all"])
def test_two_processes(dataset, kind):
    results = run_processes(functools.partial(train_share, dataset, kind), 2, dataset)
    assert_equal(read(dataset / "parts"), read(dataset / "whole"))
    drawn = set()
    for numbers, parts, _ in results:
        assert parts == numbers
        drawn.update(numbers.values())
    assert len(drawn) == 2 * 8
    cfg = make_config(dataset, "DATALOADER.ASPECT_RATIO_GROUPING", False, "SOLVER.IMS_PER_BATCH", 4)
    # Processes take turns, so that together they have the batch of one.
    both = [
        [x for pair in zip(first, second) for x in pair]
        for first, second in zip(results[0][2], results[1][2])
    ]
    assert_equal_batches(both, take(Trainer.build_train_loader(cfg)))
