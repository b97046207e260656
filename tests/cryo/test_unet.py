"""The convolutional networks: sizes, zero at first, cubes by themselves."""

import pytest
import torch

from lightning_modules.cryo.unet import UNet
from tests.cryo.test_hdit import awake, size


def test_the_small_network_has_the_measured_size():
    with torch.device("meta"):
        assert size(UNet()) == 1_976_648  # 1.98 M


def test_the_output_is_zero_at_first_and_the_loss_that_of_no_prediction():
    torch.manual_seed(0)
    x, noise = torch.randn(2, 24, 24, 24), torch.randn(2, 24, 24, 24)
    velocity = UNet()(x, torch.tensor([0.2, 0.9]))
    assert not velocity.any()
    assert (velocity - (noise - x)).square().mean().item() == pytest.approx(1 + x.var().item(), rel=0.03)


def test_cubes_of_a_batch_do_not_see_each_other():
    torch.manual_seed(0)
    network = awake(UNet((8, 16)))
    x, t, order = torch.randn(3, 8, 8, 8), torch.tensor([0.1, 0.5, 0.9]), torch.tensor([2, 0, 1])
    torch.testing.assert_close(network(x[order], t[order]), network(x, t)[order], rtol=1e-5, atol=1e-6)


def test_the_voxel_of_a_patch_keeps_its_place():
    # with a wider context switched off, what goes in at a voxel comes out at it
    network = UNet((8, 16))
    with torch.no_grad():
        for conv in (network.conv_in, network.conv_out):
            conv.weight.zero_()
            conv.bias.zero_()
            conv.weight[range(8), range(8), 1, 1, 1] = 1
        for block in (*network.down, *network.middle, *network.up):
            block.conv2.bias.zero_()
        skip = network.up[0].skip
        skip.weight.zero_()
        skip.bias.zero_()
        skip.weight[range(8), range(8, 16)] = 1  # the features of the way in
    x = torch.randn(1, 8, 8, 8)
    torch.testing.assert_close(network(x, torch.tensor([0.5])), x)


def test_checkpointing_changes_no_gradient():
    torch.manual_seed(0)
    plain, again = awake(UNet((8, 16))), UNet((8, 16), checkpointing=True)
    again.load_state_dict(plain.state_dict())
    x, t = torch.randn(1, 8, 8, 8), torch.tensor([0.4])
    for network in (plain, again):
        network(x, t).square().mean().backward()
    for ours, theirs in zip(again.parameters(), plain.parameters()):
        torch.testing.assert_close(ours.grad, theirs.grad)
