"""What the analysis of a dataset finds, against plain computations and figures by hand."""

from __future__ import annotations

import json

import cv2
import numpy as np
import pytest
import torch
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.data import transforms as T
from detectron2.structures import Boxes, BoxMode

from gfl_d2 import load_config
from gfl_d2.analysis import analyze, format_report
from gfl_d2.analysis.advice import (
    SizeFigures,
    advise_anchor_scale,
    advise_detections,
    advise_reg_max,
    advise_size,
    covering_reg_max,
)
from gfl_d2.analysis.assignment import REASONS, Assignment, AssignmentRule, assign_boxes
from gfl_d2.analysis.boxes import BoxTable, InputSize, boxes_at, input_shapes, read_boxes
from gfl_d2.errors import InputError
from gfl_d2.modeling import ATSSAssigner, LocationGrid
from plain_assigner import plain_atss
from scripts import ROOT
from test_assigner import make_anchors, make_levels, valid_anchors

CONFIG = str(ROOT / "configs" / "gfl_R_18_FPN_demo.yaml")
STRIDES = (8, 16, 32, 64, 128)


def make_table(boxes, image=None, classes=None, sizes=((512, 512),)) -> BoxTable:
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    zeros = np.zeros(len(boxes), dtype=np.int64)
    classes = zeros if classes is None else np.array(classes)
    return BoxTable(
        names=("set",),
        class_names=[f"class {i}" for i in range(classes.max(initial=0) + 1)],
        files=[f"{i}.png" for i in range(len(sizes))],
        sizes=np.array(sizes),
        boxes=boxes,
        classes=classes,
        image=zeros if image is None else np.array(image),
        is_crowd=zeros.astype(bool),
    )


def make_rule(strides=STRIDES, topk: int = 9, **kwargs) -> AssignmentRule:
    return AssignmentRule(
        level_names=[f"p{i + 3}" for i in range(len(strides))],
        grid=LocationGrid(strides, **kwargs),
        assigner=ATSSAssigner(topk),
        divisibility=32,
        bin_width=1.0,
    )


def assign(table: BoxTable, rule=None, size=None):
    images = np.unique(table.image)
    return assign_boxes(table, images, size or InputSize((0,), 0), rule or make_rule())


def make_config(*opts: object):
    return load_config(CONFIG, ["MODEL.DEVICE", "cpu", *map(str, opts)])


def random_boxes(rng, number: int, side: float, largest: float) -> np.ndarray:
    size = np.exp(rng.uniform(np.log(3), np.log(largest), (number, 2)))
    corner = rng.uniform(0, 1, (number, 2)) * (side - size)
    return np.concatenate([corner, corner + size], axis=1)


class TestInput:
    @pytest.mark.parametrize("shape", [(480, 640), (640, 480), (100, 900), (33, 33)])
    @pytest.mark.parametrize(("short", "longest"), [(240, 320), (800, 1333)])
    def test_shapes_are_those_of_the_augmentation(self, shape, short, longest):
        resize = T.ResizeShortestEdge(short, longest, "choice")
        image = resize.get_transform(np.zeros((*shape, 3), np.uint8))
        expected = (image.new_h, image.new_w)
        shapes = input_shapes(np.array([shape, (50, 60), shape]), short, longest)
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
        assert boxes_at(table, np.array([[50, 400]])).tolist() == [[0, 10, 60, 20]]


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
        table = make_table(boxes, image, sizes=[(200, 250), (230, 200)])
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
        order = np.argsort(found.box)
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
        assert [REASONS[x] for x in found.reason] == ["no candidate's centre inside"] * 2
        assert found.share_without == 1

    def test_lost_to_another(self):
        found = assign(make_table([[100, 100, 180, 180]] * 2))
        assert [REASONS[x] for x in found.reason] == ["", "lost to other boxes"]
        assert found.positives[1].sum() == 0

    def test_below_the_threshold(self):
        """Of two different IoUs none reaches their mean plus standard deviation."""
        found = assign(make_table([[60, 60, 140, 140]]), make_rule((8, 16), topk=1))
        assert [REASONS[x] for x in found.reason] == ["IoUs below the threshold"]

    def test_every_size_counts(self):
        table = make_table([[10, 10, 60, 60], [100, 100, 200, 150]], sizes=[(256, 256)])
        both = assign(table, size=InputSize((256, 512), 1000))
        parts = [assign(table, size=InputSize((x,), 1000)) for x in (256, 512)]
        assert np.array_equal(both.positives, np.concatenate([x.positives for x in parts]))
        assert np.array_equal(both.targets, sum(x.targets for x in parts))

    def test_rule_of_a_config(self):
        cfg = make_config("MODEL.GFL.IN_FEATURES", "['p4', 'p6']", "MODEL.GFL.BIN_WIDTH", 0.5)
        rule = AssignmentRule.from_config(cfg)
        assert (rule.strides, rule.divisibility, rule.bin_width) == ([16, 64], 32, 0.5)
        with pytest.raises(InputError, match="IN_FEATURES names"):
            AssignmentRule.from_config(make_config("MODEL.GFL.IN_FEATURES", "['p1']"))


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
        zeros, longest = np.zeros(boxes, dtype=np.int64), np.array([6.0, 0, 0, 0, 0])
        assignment = Assignment(zeros, zeros, zeros, zeros, targets, longest)
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
        size, rule = InputSize.from_config(cfg, is_train=True), AssignmentRule.from_config(cfg)
        images = np.array([0])
        now = SizeFigures.of_assignment(table, assign(table, rule, size), size, rule)
        return advise_size(cfg, table, images, now, rule)[0].opts

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
        cfg, size, images = make_config(), InputSize((0,), 0), np.arange(40)
        rule = make_rule()
        now = assign_boxes(table, images, size, rule)
        advice, figures, _ = advise_anchor_scale(cfg, table, images, now, size, rule)
        shares = {scale: values["share_without_anchor"] for scale, values in figures.items()}
        assert shares[8.0] == now.share_without == 0.5  # the inner one of each image
        assert advice.opts.get("MODEL.GFL.ANCHOR_SCALE", 8.0) == min(shares, key=shares.get)


@pytest.fixture
def register(clean_catalogs):
    """Registers records as a dataset of Python code. Called with its name and records."""

    def register(name: str, records: list[dict], classes: tuple[str, ...] = ("a", "b")):
        DatasetCatalog.register(name, lambda: records)
        MetadataCatalog.get(name).set(thing_classes=list(classes))

    return register


def make_record(index: int, boxes=(), classes=(), crowd: int = 0, file: str = "absent") -> dict:
    annotations = [
        {"bbox": list(box), "bbox_mode": BoxMode.XYWH_ABS, "category_id": c, "iscrowd": crowd}
        for box, c in zip(boxes, classes)
    ]
    record = {"file_name": f"{file}{index}.png", "image_id": index, "annotations": annotations}
    return {**record, "height": 192, "width": 256}


class TestAnalyze:
    def config(self, *opts):
        return make_config("DATASETS.TRAIN", "('one', 'two')", "DATASETS.TEST", "('test',)", *opts)

    def test_counts(self, register):
        one = [make_record(0, [[10, 10, 50, 60]] * 2, [0, 1]), make_record(1)]
        one.append(make_record(2, [[0, 0, 200, 100]], [1], crowd=1))
        two = [make_record(3, [[5, 5, 40, 30], [60, 60, 50, 50]], [0, 0])]
        register("one", one, ("a", "b", "c"))
        register("two", two, ("a", "b", "c"))
        register("test", [{**make_record(0), "annotations": []}], ("a", "b", "c"))
        analysis = analyze(self.config())
        train = analysis.facts["train"]
        assert (train["images"], train["images_without_boxes"]) == (4, 2)
        assert (train["boxes"], train["crowds"]) == (4, 1)
        counts = {name: (x["boxes"], x["images"]) for name, x in train["classes"].items()}
        assert counts == {"a": (3, 2), "b": (1, 1), "c": (0, 0)}
        assert train["classes_without_boxes"] == ["c"]
        assert analysis.facts["test"]["boxes"] == 0
        assert analysis.facts["duplicate_boxes"]["train"]["other_class"] == 1
        assert analysis.facts["anchors"]["without_anchor"]["lost to other boxes"] == 1
        assert analysis.facts["anchors"]["without_anchor_by_class"] == {"b": 1}
        assert len(analysis.facts["files"]["unreadable"]) == 4
        # Of 40 x 30 and 50 x 50 pixels and so on: the input is as large as the images.
        roots = np.sqrt([50 * 60, 50 * 60, 40 * 30, 50 * 50])
        assert train["size_percentiles"]["50"] == pytest.approx(np.median(roots))
        assert analysis.opts == {}
        json.loads(json.dumps(analysis.facts, allow_nan=False))

    def test_reg_max(self, register):
        """Of a box of 250 x 24 pixels most anchors are on the finest level: it needs many bins."""
        records = [make_record(i, [[2, 40 + i, 250, 24]], [0]) for i in range(20)]
        for name in ("one", "two", "test"):
            register(name, records)
        analysis = analyze(self.config("MODEL.GFL.REG_MAX", 16))
        level = analysis.facts["levels"]["p3"]
        assert level["longest_side"] > 16
        assert analysis.opts["MODEL.GFL.REG_MAX"] == level["reg_max"]
        analysis = analyze(self.config("MODEL.GFL.REG_MAX", 40))
        assert analysis.opts == {}
        dirac = ["MODEL.GFL.BOX_REPRESENTATION", "dirac"]
        assert analyze(self.config("MODEL.GFL.REG_MAX", 16, *dirac)).opts == {}

    def test_some_images(self, register):
        rng = np.random.default_rng(0)
        for name in ("one", "two", "test"):
            boxes = [random_boxes(rng, 3, 190, 90).tolist() for _ in range(15)]
            register(name, [make_record(i, x, [0, 1, 0]) for i, x in enumerate(boxes)])
        analyses = [analyze(self.config(), max_images=n) for n in (0, 8, 8, 100)]
        used = [x.facts["anchors"]["images"] for x in analyses]
        assert used == [30, 8, 8, 30]
        assert analyses[1].facts == analyses[2].facts
        assert "Anchors are those of 8 images, drawn from the 30" in format_report(analyses[1])
        assert "drawn from" not in format_report(analyses[0])

    @pytest.mark.parametrize(
        ("records", "message"),
        [
            ([], "Dataset one, two is empty"),
            ([make_record(0)], "has no box to learn: 0 boxes"),
            ([make_record(0, [[1, 1, 9, 9]], [0], crowd=1)], "has no box to learn: 2 boxes, 2 of"),
            ([make_record(0, [[1, 1, 9, 9]], [7])], "category_id 7 to 7, but 2 classes"),
            ([make_record(0, [[1, 1, 9]], [0])], "are not in Detectron2's format"),
        ],
    )
    def test_mistakes(self, register, records, message):
        for name in ("one", "two", "test"):
            register(name, records)
        with pytest.raises(InputError, match=message):
            analyze(self.config())

    def test_other_box_modes_and_unknown_sizes(self, register, tmp_path):
        cv2.imwrite(str(tmp_path / "0.png"), np.zeros((30, 40, 3), np.uint8))
        record = make_record(0, [[1, 2, 10, 20]], [0], file=f"{tmp_path}/")
        record["annotations"].append({**record["annotations"][0], "bbox_mode": BoxMode.XYXY_ABS})
        del record["height"], record["width"], record["annotations"][0]["iscrowd"]
        register("one", [record])
        table = read_boxes(["one"])
        assert table.boxes.tolist() == [[1, 2, 11, 22], [1, 2, 10, 20]]
        assert table.sizes.tolist() == [[30, 40]]
        record["file_name"] = "absent.png"
        with pytest.raises(InputError, match=r"absent\.png has no height and width"):
            read_boxes(["one"])
