"""Weights for colour images in models for other channels."""

from __future__ import annotations

import pytest
import torch
from detectron2.modeling import build_model

from gfl_d2 import load_config
from gfl_d2.checkpoint import GFLCheckpointer
from gfl_d2.errors import InputError
from scripts import ROOT
from test_checkpoint import save, save_imagenet


def build(image_format: str, *opts):
    number = {"L": 1, "RGB": 3, "RGBA": 4, "LA": 2}[image_format]
    # Of equal means, so that a grey image stays one.
    opts = ["INPUT.FORMAT", image_format, "MODEL.DEVICE", "cpu", "MODEL.RESNETS.DEPTH", 18, *opts]
    opts += ["MODEL.PIXEL_MEAN", [116.0] * number, "MODEL.PIXEL_STD", [57.0] * number]
    opts += ["MODEL.RESNETS.RES2_OUT_CHANNELS", 64, "MODEL.FPN.OUT_CHANNELS", 32]
    opts += ["MODEL.GFL.CONV_DIM", 64, "MODEL.GFL.NUM_CONVS", 1]
    return build_model(load_config(str(ROOT / "configs/Base-GFL.yaml"), opts)).eval()


@torch.no_grad()
def features(model, image):
    images = model.preprocess_image([{"image": image}])
    return model.backbone.bottom_up(images.tensor)["res3"]


@pytest.mark.parametrize("kind", [save, save_imagenet])
@pytest.mark.parametrize("image_format", ["L", "RGBA"])
def test_a_model_of_other_channels_sees_the_same(tmp_path, caplog, kind, image_format):
    """A grey image; and a colour image, whatever the fourth channel has."""
    source, target = build("RGB"), build(image_format)
    path = tmp_path / ("model.pth" if kind is save else "model.pkl")
    GFLCheckpointer(target).load(kind(source, path))
    image = torch.rand(4, 64, 96, generator=torch.Generator().manual_seed(0)) * 255
    colours = image[:1].expand(3, -1, -1) if image_format == "L" else image[:3]
    channels = image[:1] if image_format == "L" else image
    torch.testing.assert_close(
        features(target, channels), features(source, colours), rtol=1e-4, atol=1e-4
    )
    number = len(channels)
    (warning,) = (
        r.getMessage() for r in caplog.records if "is for images of 3 channels" in r.getMessage()
    )
    assert f"stem.conv1.weight was changed to shape (64, {number}, 7, 7)" in warning


def test_additional_channels_learn():
    target = build("RGBA", "MODEL.BACKBONE.FREEZE_AT", 0)
    weight = target.backbone.bottom_up.stem.conv1.weight
    with torch.no_grad():
        weight[:, 3] = 0
    images = target.preprocess_image([{"image": torch.rand(4, 64, 96) * 255}])
    target.backbone(images.tensor)["p3"].sum().backward()
    assert weight.grad[:, 3].abs().max() > 0


def test_stems_that_are_not_changed(tmp_path):
    """In evaluation, and of 2 channels, of which no one knows what they are."""
    path = save(build("RGB"), tmp_path / "model.pth")
    message = r"stem\.conv1\.weight is \(64, 3, 7, 7\), not"
    with pytest.raises(InputError, match=message):
        GFLCheckpointer(build("RGBA"), complete=True).load(path)
    with pytest.raises(InputError, match=message):
        GFLCheckpointer(build("LA")).load(path)
