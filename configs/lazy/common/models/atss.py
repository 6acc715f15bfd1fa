from detectron2.config import LazyCall as L

from gfl_d2.modeling import CenternessBranch, DiracDelta

from .gfl import model

model.head.box = L(DiracDelta)(prior=4.0)  # half an anchor
model.head.quality = L(CenternessBranch)(alpha=0.25, gamma=2.0, weight=1.0, quality_weight=1.0)
