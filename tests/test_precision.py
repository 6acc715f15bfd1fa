import torch
from torch import nn

from gfl_d2.deploy.precision import autocast_in_training


def test_autocast_in_training():
    model = nn.Sequential(nn.Conv2d(3, 4, 3))
    names = list(model.state_dict())
    images = torch.randn(1, 3, 8, 8)
    expected = model(images)
    autocast_in_training(model, "cpu", torch.bfloat16)

    output = model.train()(images)
    assert output.dtype == torch.bfloat16
    output.float().sum().backward()
    assert model[0].weight.grad.dtype == torch.float32
    assert torch.equal(model.eval()(images), expected)
    assert list(model.state_dict()) == names
