"""FLOPs and utilisation are the published formulas over the published peaks."""

import pytest
import torch

from lightning_modules.language.flops import flops_per_token, mfu

SMALL = 854_770_176


def test_flops_of_gpt2_small():
    assert flops_per_token(123_587_328, 12, 768, 1024) == SMALL


@pytest.mark.parametrize(
    ("device", "peak"),
    [
        ("NVIDIA A100-SXM4-40GB", 312e12),
        ("NVIDIA A100 80GB PCIe", 312e12),
        ("NVIDIA H100 80GB HBM3", 989.4e12),
        ("NVIDIA H200", 989.4e12),
    ],
)
def test_utilisation_is_a_share_of_the_device_s_peak(device, peak):
    assert mfu(peak / SMALL, SMALL, device, torch.bfloat16) == pytest.approx(1)


def test_the_published_throughputs_have_the_published_utilisation():
    assert mfu(1_157_504.0, SMALL, "NVIDIA H200", torch.bfloat16) == pytest.approx(1, abs=1e-5)
    assert mfu(107_000.0, SMALL, "NVIDIA A100-SXM4-40GB", torch.bfloat16) == pytest.approx(0.29, abs=0.005)
    assert mfu(475_000.0, SMALL, "NVIDIA H100 80GB HBM3", torch.bfloat16) == pytest.approx(0.41, abs=0.005)


@pytest.mark.parametrize(
    "device", ["NVIDIA H100 PCIe", "NVIDIA H200 NVL", "NVIDIA A100-SXM4-40GB MIG 1g.5gb", "NVIDIA GH200 480GB", "cpu"]
)
def test_an_unknown_peak_is_none(device):
    assert mfu(1e5, SMALL, device, torch.bfloat16) is None


def test_float32_has_no_peak_here():
    assert mfu(1e5, SMALL, "NVIDIA H200", torch.float32) is None
