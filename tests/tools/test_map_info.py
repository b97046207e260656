"""The command that shows what is in maps."""

import sys

import numpy as np

from datamodules.mrc import MapRecord, save_map
from tools import map_info


def _write(path, nstart: int) -> str:
    voxels = np.random.default_rng(0).standard_normal((8, 9, 10)).astype(np.float32)
    save_map(path, MapRecord(voxels, (1.5, 1.5, 1.5), nstart=(nstart, 0, 0)))
    return str(path)


def test_maps_are_shown_and_compared_and_what_is_none_is_named(tmp_path, monkeypatch, capsys):
    first, same, moved = (_write(tmp_path / f"{name}.mrc", start) for name, start in [("a", 4), ("b", 4), ("c", 9)])
    monkeypatch.setattr(sys, "argv", ["map_info", first, same])
    assert map_info.main() == 0
    told = capsys.readouterr().out
    assert "10 x 9 x 8" in told
    assert "lies on the grid of" in told
    (tmp_path / "d.mrc").write_bytes(b"nothing")
    monkeypatch.setattr(sys, "argv", ["map_info", first, moved, str(tmp_path / "d.mrc")])
    assert map_info.main() == 1
    told = capsys.readouterr().err
    assert "differ in position" in told
    assert "ends within its header" in told
