"""A prior in a folder: what is written is read, and nothing else is."""

import json
from functools import partial

import mrcfile
import pytest
import torch

from lightning_modules.cryo import map_files, prior
from lightning_modules.cryo.unet import UNet
from tests.cryo.test_hdit import awake


@pytest.fixture
def folder(tmp_path):
    build = partial(UNet, widths=[8, 16], time_width=8)
    torch.manual_seed(0)
    network = awake(build())
    prior.save(tmp_path / "export", prior.DensityPrior(network, 0.04, 0.09, 3.0, 8), build)
    return tmp_path / "export", network


def test_a_prior_that_was_written_predicts_the_same(folder):
    path, network = folder
    read = prior.load(path)
    x, t = torch.randn(1, 8, 8, 8), torch.tensor(0.5, dtype=torch.float64)
    assert torch.equal(read.prediction.velocity(x, t), network(x, t.float()[None]))
    assert (read.mean, read.std, read.voxel_size, read.box) == (0.04, 0.09, 3.0, 8)
    torch.testing.assert_close(read.standardised(read.density(x)), x)
    assert not any(p.requires_grad for p in read.network.parameters())


def test_an_interrupted_export_and_an_unknown_network_are_refused(folder):
    path, _ = folder
    config = json.loads((path / "config.json").read_text())
    (path / "config.json").write_text(json.dumps(config | {"network": {"class": "Popen", "args": "true"}}))
    with pytest.raises(ValueError, match="a network Popen, and known are HDiT"):
        prior.load(path)
    (path / "config.json").write_text(json.dumps({"network": {}}))
    with pytest.raises(ValueError, match="says nothing of mean"):
        prior.load(path)
    (path / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"has no config\.json"):
        prior.load(path)


def test_a_map_opens_in_mrcfile_with_its_voxel_size(tmp_path):
    density = torch.rand(4, 5, 6)
    map_files.write(tmp_path / "samples" / "a.mrc", density, 1.5)
    assert mrcfile.validate(tmp_path / "samples" / "a.mrc")
    with mrcfile.open(tmp_path / "samples" / "a.mrc") as file:
        assert torch.equal(torch.from_numpy(file.data.copy()), density)
        assert file.voxel_size.tolist() == (1.5, 1.5, 1.5)
    assert [path.name for path in (tmp_path / "samples").iterdir()] == ["a.mrc"]
