"""NMS in ONNX's operators and in the graph of PyTorch's formats, beside the model's own."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch

from gfl_d2.deploy.export.graph import DetectorGraph
from gfl_d2.deploy.export.onnx_files import append_nms
from gfl_d2.modeling.post_processing import Candidates
from models import build_gfl

SIZE = HEIGHT, WIDTH = 200, 300
CLASSES = 3
NAMES = ("boxes", "scores", "labels")


def make_candidates(number: int, seed: int = 0) -> Candidates:
    """Of two images: groups of boxes that overlap, of several classes, some without a score."""
    generator = torch.Generator().manual_seed(seed)
    centers = torch.rand(2, 1 + number // 8, 2, generator=generator).repeat(1, 8, 1)[:, :number]
    centers = centers * torch.tensor([WIDTH, HEIGHT]) * 0.8
    noise = torch.randn(2, number, 4, generator=generator) * 6
    boxes = torch.cat((centers, centers + 45), dim=-1) + noise
    limits = torch.tensor([WIDTH, HEIGHT, WIDTH, HEIGHT])
    boxes = boxes.clamp(min=0).minimum(limits.float())
    scores = torch.rand(2, number, generator=generator)
    scores = torch.where(scores > 0.3, scores, 0)
    classes = torch.randint(CLASSES, (2, number), generator=generator)
    return Candidates(boxes, scores, classes)


def make_model(class_agnostic: bool, limit: int):
    model = build_gfl().eval()
    model.test_score_thresh = 0.3
    model.test_nms_thresh, model.test_nms_class_agnostic = 0.5, class_agnostic
    model.max_detections_per_image = limit
    return model


def run_onnx(model, candidates):
    onnx = pytest.importorskip("onnx")
    onnxruntime = pytest.importorskip("onnxruntime")
    session = onnxruntime.InferenceSession(make_graph(onnx, model).SerializeToString())
    return session.run(NAMES, dict(zip(("b", "s", "l"), (x.numpy() for x in candidates))))


def run_openvino(model, candidates):
    onnx, openvino = pytest.importorskip("onnx"), pytest.importorskip("openvino")
    graph = openvino.convert_model(io.BytesIO(make_graph(onnx, model).SerializeToString()))
    compiled = openvino.compile_model(graph, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    outputs = compiled(dict(zip(("b", "s", "l"), (x.numpy() for x in candidates))))
    return [outputs[name] for name in NAMES]


def make_graph(onnx, model):
    candidates = onnx.parser.parse_model("""
        <ir_version: 10, opset_import: ["" : 20]>
        candidates (float[N, K, 4] b, float[N, K] s, int64[N, K] l)
            => (float[N, K, 4] in_boxes, float[N, K] in_scores, int64[N, K] in_labels)
        { in_boxes = Identity (b) in_scores = Identity (s) in_labels = Identity (l) }
    """)
    graph = append_nms(candidates, model)
    onnx.checker.check_model(graph, full_check=True)
    return graph


def run_torch(model, candidates):
    graph = DetectorGraph(model, with_nms=True)
    return [x.numpy() for x in graph.best_detections(candidates, torch.tensor([SIZE] * 2))]


@pytest.mark.slow
@pytest.mark.parametrize("run", [run_onnx, run_openvino, run_torch])
@pytest.mark.parametrize("class_agnostic", [False, True])
@pytest.mark.parametrize(("number", "limit"), [(400, 30), (400, 1000), (7, 30)])
def test_same_as_the_model(run, class_agnostic, number, limit):
    model, candidates = make_model(class_agnostic, limit), make_candidates(number)
    expected = model.suppress(candidates, [SIZE] * 2)
    boxes, scores, labels = run(model, candidates)
    assert boxes.shape == (2, limit, 4) and scores.shape == labels.shape == (2, limit)
    for i, one in enumerate(expected):
        count = len(one)
        assert 0 < count < number
        np.testing.assert_array_equal(boxes[i, :count], one.pred_boxes.tensor.numpy())
        np.testing.assert_array_equal(scores[i, :count], one.scores.numpy())
        np.testing.assert_array_equal(labels[i, :count], one.pred_classes.numpy())
        assert (scores[i, count:] == 0).all()


@pytest.mark.slow
@pytest.mark.parametrize("run", [run_onnx, run_openvino, run_torch])
def test_nothing_found(run):
    boxes, scores, labels = make_candidates(20)
    outputs = run(make_model(False, 30), Candidates(boxes, torch.zeros_like(scores), labels))
    assert outputs[1].shape == (2, 30) and (outputs[1] == 0).all()
