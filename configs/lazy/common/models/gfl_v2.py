from detectron2.config import LazyCall as L

from gfl_d2.modeling import DistributionGuidedQuality

from .gfl import model

model.head.quality = L(DistributionGuidedQuality)(beta=2.0, weight=1.0, topk=4, channels=64)
model.criterion.box_normalizer_min = 1e-6
