import pytest
import torch

from gfl_d2.deploy import has_fast_bfloat16


@pytest.mark.parametrize("name", ["_is_avx512_bf16_supported", "_is_amx_tile_supported"])
def test_processors_with_bfloat16(monkeypatch, name):
    for each in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.setattr(torch.cpu, each, lambda: False, raising=False)
    assert not has_fast_bfloat16("cpu")
    monkeypatch.setattr(torch.cpu, name, lambda: True, raising=False)
    assert has_fast_bfloat16("cpu")


def test_pytorch_that_cannot_tell(monkeypatch):
    for each in ("_is_avx512_bf16_supported", "_is_amx_tile_supported"):
        monkeypatch.delattr(torch.cpu, each, raising=False)
    assert not has_fast_bfloat16("cpu")


@pytest.mark.parametrize("capability, expected", [((7, 5), False), ((8, 0), True), ((9, 0), True)])
def test_gpus_with_bfloat16(monkeypatch, capability, expected):
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: capability)
    assert has_fast_bfloat16("cuda") is expected
