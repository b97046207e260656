"""Maps for tests: written byte by byte with the header that a test wants, and the real ones."""

import os
from pathlib import Path

import mrcfile
import numpy as np
import pytest

REAL = Path(os.environ.get("TESSERA_DATA", Path(__file__).parents[3] / "shared" / "data")) / "emdb"


def real(name: str) -> Path:
    if not (REAL / name).exists():
        pytest.skip(f"no real data in {REAL}")
    return REAL / name


def write(path: Path, voxels: np.ndarray, voxel_size: float = 1.5, compression: str | None = None, **header) -> Path:
    """A map by mrcfile with other values in its header: `nxstart=3`, `mapc=2`, `cella=(...)`."""
    with mrcfile.new(path, voxels, compression=compression, overwrite=True) as mrc:
        if voxels.ndim == 3:
            mrc.set_volume()
            mrc.voxel_size = voxel_size
        for name, value in header.items():
            mrc.header[name] = value
    return path


def blob(shape: tuple[int, int, int], sigma: float = 2.0, off: tuple[float, ...] = (0, 0, 0)) -> np.ndarray:
    """A Gaussian `off` voxels (z, y, x) beside the centre N // 2."""
    axes = [np.exp(-0.5 * ((np.arange(n) - n // 2 - o) / sigma) ** 2) for n, o in zip(shape, off)]
    return np.einsum("z,y,x->zyx", *axes).astype(np.float32)


def patched(path: Path, offset: int, content: bytes) -> Path:
    whole = bytearray(path.read_bytes())
    whole[offset : offset + len(content)] = content
    path.write_bytes(whole)
    return path
