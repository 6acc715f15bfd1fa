"""
Exported detectors: files that run without Detectron2 and this project.

What every file takes and gives, whatever its format; N images, input of height H and width W:

===============  ==================  ===============================================================
input            shape, type         meaning
===============  ==================  ===============================================================
``images``       (N, 3, H, W)        pixels from 0 to 255 with channels as ``input_format`` says,
                 float32 or uint8    in the upper left corner. The rest is padding, whose values do
                                     not matter. H and W are multiples of ``size_divisibility``.
``image_sizes``  (N, 2), int64       height and width of each image without its padding
===============  ==================  ===============================================================

===============  ==================  ===============================================================
output           shape, type         meaning
===============  ==================  ===============================================================
``boxes``        (N, K, 4), float32  x0, y0, x1, y1 in pixels of the input, inside of the image
``scores``       (N, K), float32     in falling order; 0 marks an entry that is no detection
``labels``       (N, K), int64       classes, as positions in ``class_names``
===============  ==================  ===============================================================

With NMS, K is ``max_detections``. Without, they are the candidates before NMS: K depends on H and
W alone. N, H and W are free, or 1 and the given size. Free sides are at least ``min_side``.

The file carries the names in ``code`` above and more, see :func:`gfl_d2.deploy.export.describe`, as
one JSON object with the name "gfl_d2": in the metadata of ONNX, the runtime information of
OpenVINO, and as the extra file "gfl_d2.json" of TorchScript and torch.export.
"""

from .check import Check
from .exporting import describe, export_model
from .options import EXTENSIONS, ExportOptions
from .running import METADATA_KEY, ExportedModel, load_exported
