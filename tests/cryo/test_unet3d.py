"""CryoFM2's network: its size, and that it is diffusers' U-Net where nothing changes along z."""

import pytest
import torch

from lightning_modules.cryo.unet3d import UNet3D
from tests.cryo.test_hdit import size


def test_the_published_size():
    with torch.device("meta"):
        assert size(UNet3D()) == 168_089_089  # 168.09 M


def flat(two: torch.Tensor, three: torch.Tensor) -> torch.Tensor:
    """A weight of two dimensions as the middle plane of one of three."""
    if two.ndim != 4:
        return two
    found = torch.zeros_like(three)
    found[:, :, three.shape[2] // 2] = two
    return found


def test_on_cubes_that_are_constant_along_z_it_is_the_network_of_diffusers():
    diffusers = pytest.importorskip("diffusers")
    torch.manual_seed(0)
    theirs = diffusers.UNet2DModel(
        **{"sample_size": 8, "in_channels": 2, "out_channels": 1, "block_out_channels": (32, 64, 96)},
        down_block_types=("DownBlock2D", "DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D", "UpBlock2D"),
        **{"layers_per_block": 2, "attention_head_dim": 8, "norm_num_groups": 32, "norm_eps": 1e-5},
        resnet_time_scale_shift="scale_shift",
    )
    ours = UNet3D((32, 64, 96), attending=1)
    shapes, weights = ours.state_dict(), theirs.state_dict()
    ours.load_state_dict({name: flat(weights[name], shapes[name]) for name in shapes})
    assert shapes.keys() == weights.keys()
    plane, t = torch.randn(2, 1, 8, 8), torch.tensor([0.25, 0.75])
    with torch.no_grad():
        expected = theirs(torch.cat([plane, torch.zeros_like(plane)], 1), 1000 * t).sample
        found = ours(plane.expand(-1, 8, -1, -1).contiguous(), t)
    torch.testing.assert_close(found, expected.expand(-1, 8, -1, -1), rtol=1e-3, atol=1e-4)
