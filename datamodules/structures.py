"""Density of atomic structures: files in the formats of the PDB, read by biotite, as maps at a resolution."""

import gzip
import io
import logging
import zlib
from pathlib import Path

import biotite.structure as structure
import biotite.structure.io.pdb as pdb
import biotite.structure.io.pdbx as pdbx
import numpy as np

from datamodules.atom_density import PENG, scattering
from datamodules.jsonl import regular_file
from datamodules.map_entries import Entry
from datamodules.mrc import MapFormatError, MapRecord

log = logging.getLogger(__name__)

ENDINGS = (".cif", ".cif.gz", ".mmcif", ".bcif", ".bcif.gz", ".pdb", ".pdb.gz", ".ent", ".ent.gz")
MARGIN = 2.0  # of the resolution, between the outermost atom and the edge of the box
FIELDS = ["b_factor", "occupancy"]


def find_structures(path: Path | str) -> list[Entry]:
    """An entry for a file, or for every file of a folder, with an ending of `ENDINGS`. Raises FileNotFoundError."""
    path = Path(path)
    files = sorted(path.iterdir()) if path.is_dir() else [regular_file(path)]
    found = [file for file in files if file.name.lower().endswith(ENDINGS)]
    if not found:
        raise FileNotFoundError(f"{path} has no structure ({', '.join(ENDINGS)}): give such a file or folder")
    return [Entry(file.name, file, cluster=file.name.split(".")[0].lower()) for file in found]


def read_structure(path: Path | str) -> structure.AtomArray:
    """The atoms of the first model without water, with `b_factor` and `occupancy`. Raises MapFormatError."""
    path = regular_file(path)
    kind = next((ending for ending in ENDINGS if path.name.lower().endswith(ending)), "")
    try:
        content = gzip.decompress(path.read_bytes()) if kind.endswith(".gz") else path.read_bytes()
        if kind.startswith(".bcif"):
            atoms = pdbx.get_structure(pdbx.BinaryCIFFile.read(io.BytesIO(content)), model=1, extra_fields=FIELDS)
        elif kind.startswith((".cif", ".mmcif")):
            atoms = pdbx.get_structure(pdbx.CIFFile.read(io.StringIO(content.decode())), model=1, extra_fields=FIELDS)
        else:
            atoms = pdb.PDBFile.read(io.StringIO(content.decode())).get_structure(model=1, extra_fields=FIELDS)
    except (EOFError, zlib.error, gzip.BadGzipFile) as error:
        raise MapFormatError(path, f"is a broken or truncated gzip file ({error}): download it again") from error
    except Exception as error:  # parsers of three formats
        what = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise MapFormatError(path, f"is no readable structure ({what}): download it again") from error
    atoms = atoms[~structure.filter_solvent(atoms) & np.isfinite(atoms.coord).all(axis=1)]
    if not len(atoms):
        raise MapFormatError(path, "has no atom: give another structure")
    return atoms


def structure_map(path: Path | str, voxel_size: float, resolution: float) -> MapRecord:
    """The potential of a structure, blurred to a resolution, in a cube that holds it. Lengths in angstrom.

    Elements without scattering factors here count as carbon, with a warning.
    """
    atoms = read_structure(path)
    elements = np.char.upper(atoms.element)
    unknown = ~np.isin(elements, list(PENG))
    if unknown.any():
        log.warning("%s: %s count as carbon", path, ", ".join(sorted(set(elements[unknown]))))
    low, high = atoms.coord.min(axis=0).astype(float), atoms.coord.max(axis=0).astype(float)
    edge = 2 * int(np.ceil((max(high - low) / 2 + MARGIN * resolution) / voxel_size))
    origin = (low + high) / 2 - edge // 2 * voxel_size
    density = scattering(
        atoms.coord.astype(float),
        np.where(unknown, "C", elements).tolist(),
        np.clip(atoms.b_factor, 0, None) + 4 * resolution**2,
        atoms.occupancy,
        (edge,) * 3,
        voxel_size,
        origin,
    )
    x, y, z = origin.tolist()
    return MapRecord(density.astype(np.float32), (voxel_size,) * 3, (x, y, z), path=Path(path))
