"""Anchors of the boxes of a dataset, and what is advised, against figures by hand."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from detectron2.data import transforms as T
from detectron2.structures import Boxes

from box_tables import make_config, make_table, random_boxes
from gfl_d2.analysis.advice import (
    advise_anchor_scale,
    advise_detections,
    advise_reg_max,
    advise_size,
    covering_reg_max,
)
from gfl_d2.analysis.assignment import REASONS, Assignment, assign_boxes
from gfl_d2.analysis.boxes import InputSize
from gfl_d2.errors import InputError
from plain_assigner import plain_atss
from test_assigner import make_anchors, make_levels, valid_anchors

STRIDES = (8, 16, 32, 64, 128)
AS_THEY_ARE = ("INPUT.MIN_SIZE_TRAIN", "(0,)")


def assign(table, *opts):
    return assign_boxes(make_config(*(opts or AS_THEY_ARE)), table, np.unique(table.image))


def assign_with(cfg, table):
    """As the rules of the advice ask for it."""

    def assign(*opts):
        changed = cfg.clone()
        changed.defrost()
        changed.merge_from_list([item for pair in opts for item in pair])
        return assign_boxes(changed, table, np.unique(table.image))

    return assign


class TestInput:
    @pytest.mark.parametrize("shape", [(480, 640), (640, 480), (100, 900), (33, 33)])
    @pytest.mark.parametrize(("short", "longest"), [(240, 320), (800, 1333)])
    def test_shapes_are_those_of_the_augmentation(self, shape, short, longest):
        resize = T.ResizeShortestEdge(short, longest, "choice")
        image = resize.get_transform(np.zeros((*shape, 3), np.uint8))
        expected = (image.new_h, image.new_w)
        shapes = InputSize((short,), longest).shapes(np.array([shape, (50, 60), shape]))
        assert tuple(shapes[0]) == tuple(shapes[2]) == expected

    def test_sizes_that_training_samples(self):
        opts = ["INPUT.MIN_SIZE_TRAIN", "(640,480,640)", "INPUT.MAX_SIZE_TRAIN", "1333"]
        size = InputSize.from_config(make_config(*opts), is_train=True)
        assert size == InputSize((480, 640), 1333)
        opts = [*opts[:1], "(480,800)", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "range"]
        size = InputSize.from_config(make_config(*opts), is_train=True)
        assert size.short == (480, 560, 640, 720, 800)
        assert InputSize.from_config(make_config(*opts), is_train=False) == InputSize((192,), 256)

    def test_boxes_are_scaled_and_clipped(self):
        table = make_table([[-10, 20, 30, 40]], sizes=[(100, 200)])
        assert table.boxes_at(np.array([[50, 400]])).tolist() == [[0, 10, 60, 20]]


class TestAssignment:
    def test_levels_by_hand(self):
        """A box that is an anchor of a level gets that anchor: sides 8 times the stride."""
        boxes = [[256 - 4 * s, 256 - 4 * s, 256 + 4 * s, 256 + 4 * s] for s in (8, 16, 32, 64)]
        for level, box in enumerate(boxes):
            found = assign(make_table([box]))
            assert found.positives[0].argmax() == level
            assert found.reason.tolist() == [0]
            # The anchor's own target: four sides of 4 strides.
            assert found.targets[level][4] >= 4

    def test_as_the_plain_algorithm(self):
        """Positives of each level and their targets, box by box and anchor by anchor."""
        rng = np.random.default_rng(0)
        boxes = random_boxes(rng, 60, side=200, largest=150)
        image = np.repeat([0, 1], 30)
        table = make_table(boxes, image, classes=range(60), sizes=[(200, 250), (230, 200)])
        found = assign(table)
        counts, sides = np.zeros((60, 5), int), [[] for _ in STRIDES]
        for i, (height, width) in enumerate([(224, 256), (256, 224)]):  # to multiples of 32
            levels = make_levels(height, width)
            anchors = make_anchors(levels)
            gt = torch.tensor(boxes[image == i], dtype=torch.float32)
            matched = plain_atss(anchors, Boxes(gt), valid_anchors(levels))
            level_of = np.repeat(range(5), [len(x) for x in anchors])
            centers = Boxes.cat(anchors).get_centers()
            for level, center, box in zip(level_of, centers, matched.tolist()):
                if box >= 0:
                    counts[box + 30 * i, level] += 1
                    distance = torch.cat([center - gt[box, :2], gt[box, 2:] - center])
                    sides[level] += (distance / STRIDES[level]).tolist()
        order = np.argsort(found.classes)
        assert np.array_equal(found.positives[order], counts)
        assert np.array_equal(found.reason[order] > 0, counts.sum(axis=1) == 0)
        assert (counts.sum(axis=1) == 0).any()
        for level, values in enumerate(sides):
            expected = np.bincount(np.ceil(values).astype(int), minlength=found.targets.shape[1])
            assert np.array_equal(found.targets[level], expected)
            assert found.longest_target[level] == pytest.approx(max(values, default=0), rel=1e-5)

    def test_no_centre_inside(self):
        """Locations are at multiples of 8: none lies between 9 and 15."""
        found = assign(make_table([[9, 9, 15, 15], [9, 0, 15, 300]]))
        assert [REASONS[x - 1] for x in found.reason] == ["no candidate's centre inside"] * 2
        assert found.share_without == 1

    def test_lost_to_another(self):
        found = assign(make_table([[100, 100, 180, 180]] * 2))
        assert [REASONS[x - 1] if x else "" for x in found.reason] == ["", "lost to other boxes"]
        assert found.positives[1].sum() == 0

    def test_below_the_threshold(self):
        """Of two different IoUs none reaches their mean plus standard deviation."""
        opts = ("MODEL.GFL.IN_FEATURES", "['p3', 'p4']", "MODEL.GFL.ATSS_TOPK", 1)
        found = assign(make_table([[60, 60, 140, 140]]), *AS_THEY_ARE, *opts)
        assert [REASONS[x - 1] for x in found.reason] == ["IoUs below the threshold"]

    def test_every_size_counts(self):
        table = make_table([[10, 10, 60, 60], [100, 100, 200, 150]], sizes=[(256, 256)])
        opts = ("INPUT.MAX_SIZE_TRAIN", 1000, "INPUT.MIN_SIZE_TRAIN")
        both = assign(table, *opts, "(256, 512)")
        parts = [assign(table, *opts, f"({x},)") for x in (256, 512)]
        assert np.array_equal(both.positives, np.concatenate([x.positives for x in parts]))
        assert np.array_equal(both.targets, sum(x.targets for x in parts))

    def test_keys_of_the_config(self):
        table = make_table([[192, 192, 320, 320]])
        levels = ("MODEL.GFL.IN_FEATURES", "['p4', 'p6']")
        one, half = (
            assign(table, *AS_THEY_ARE, *levels, "MODEL.GFL.BIN_WIDTH", x) for x in (1.0, 0.5)
        )
        assert (one.level_names, one.strides) == (["p4", "p6"], [16, 64])
        assert np.array_equal(half.longest_target, 2 * one.longest_target)
        assert one.longest_target.max() > 0
        with pytest.raises(InputError, match="IN_FEATURES names"):
            assign(table, "MODEL.GFL.IN_FEATURES", "['p1']")


class TestAdvice:
    def test_covering_reg_max_by_hand(self):
        """[i] counts the sides in (i - 1, i] bins."""
        counts = np.zeros(30, dtype=np.int64)
        counts[3], counts[20] = 999, 1
        assert covering_reg_max(counts) == 3
        counts[20] = 2
        assert covering_reg_max(counts) == 20
        assert covering_reg_max(np.zeros(30, dtype=np.int64)) == 1

    @pytest.mark.parametrize(
        ("boxes", "in_test", "reg_max"), [(999, 5, None), (1000, 5, 8), (1000, 6.5, None)]
    )
    def test_lower_reg_max_only_if_it_is_safe(self, boxes, in_test, reg_max):
        """The longest in train is of 6 bins: a quarter more is 7.5."""
        targets = np.zeros((5, 20), dtype=np.int64)
        targets[0, 6] = boxes
        size, zeros, longest = InputSize((0,), 0), np.zeros(boxes), np.array([6.0, 0, 0, 0, 0])
        assignment = Assignment(size, [], [], zeros, zeros, zeros, zeros, targets, longest)
        opts = advise_reg_max(make_config(), assignment, in_test).opts
        assert opts == ({} if reg_max is None else {"MODEL.GFL.REG_MAX": reg_max})

    def test_detections(self):
        cfg = make_config("TEST.DETECTIONS_PER_IMAGE", 100)
        assert advise_detections(cfg, np.array([3, 100])).opts == {}
        advice = advise_detections(cfg, np.array([3, 101, 210]))
        assert advice.opts == {"TEST.DETECTIONS_PER_IMAGE": 350}  # 1.5 * 210, to fifties
        assert "2 images have more boxes than the limit of 100, up to 210" in advice.reason

    def advise_size(self, side: float, image: int, cfg) -> dict:
        """Of squares of this side, in images of this side."""
        places = np.linspace(10, image - 10 - side, 10)
        boxes = [[x, y, x + side, y + side] for x in places for y in places]
        table = make_table(boxes, sizes=[(image, image)])
        return advise_size(cfg, table, assign_with(cfg, table))[0].opts

    def test_larger_input_for_small_boxes(self):
        """Boxes of 40 in images of 1024 have 10 pixels at 256: they need 24, so 640 at least."""
        cfg = make_config("INPUT.MIN_SIZE_TRAIN", "(256,)", "INPUT.MIN_SIZE_TEST", 256)
        assert self.advise_size(40, 1024, cfg) == {
            "INPUT.MIN_SIZE_TRAIN": (640,),
            "INPUT.MAX_SIZE_TRAIN": 640,
            "INPUT.MIN_SIZE_TEST": 640,
            "INPUT.MAX_SIZE_TEST": 640,
        }

    def test_size_that_is_right(self):
        cfg = make_config("INPUT.MIN_SIZE_TRAIN", "(256,)")
        assert self.advise_size(100, 512, cfg) == {}
        assert self.advise_size(20, 256, cfg) == {}  # small, but there is no more detail

    def test_images_enlarged_for_nothing(self):
        opts = ["INPUT.MIN_SIZE_TRAIN", "(512,)", "INPUT.MAX_SIZE_TRAIN", 800]
        cfg = make_config(*opts, "INPUT.MIN_SIZE_TEST", 512, "INPUT.MAX_SIZE_TEST", 800)
        assert self.advise_size(60, 256, cfg)["INPUT.MIN_SIZE_TRAIN"] == (256,)
        assert self.advise_size(60, 256, cfg)["INPUT.MAX_SIZE_TEST"] == 400
        assert self.advise_size(20, 256, cfg) == {}  # 20 pixels are too few

    def test_anchor_scale(self):
        """Two squares about one centre: large anchors fit the larger one best everywhere."""
        boxes, image = [], []
        for i in range(40):
            for half in (11, 13):
                boxes.append([64 - half, 64 - half, 64 + half, 64 + half])
                image.append(i)
        table = make_table(boxes, image, sizes=[(128, 128)] * 40)
        cfg = make_config(*AS_THEY_ARE)
        advice, figures = advise_anchor_scale(cfg, assign_with(cfg, table))
        shares = {scale: values["share_without_anchor"] for scale, values in figures.items()}
        assert shares["8"] == assign(table).share_without == 0.5  # the inner one of each image
        scale = advice.opts.get("MODEL.GFL.ANCHOR_SCALE", 8.0)
        assert shares[f"{scale:g}"] == min(shares.values())
