from detectron2.config import LazyCall as L

from gfl_d2.modeling import DiracDelta, LevelSelector, NoQuality, SAPDAssigner

from .gfl import model

model.head.box = L(DiracDelta)(prior=4.0)
model.head.quality = L(NoQuality)(alpha=0.25, gamma=2.0, weight=1.0)
model.grid.offset = 0.5
model.assigner = L(SAPDAssigner)(
    selector=L(LevelSelector)(input_shape="${...head.input_shape}"),
    hard_iterations=45000,  # half of train.max_iter
    shrink=0.2,
    num_levels=3,
    level_weight=0.1,
    focal_loss_alpha="${..head.quality.alpha}",
    focal_loss_gamma="${..head.quality.gamma}",
)
model.criterion.bbox_loss = "iou"
model.criterion.bbox_weight = 1.0
