"""What is in MRC, CCP4 and EMDB maps, and what is odd about them; of several, whether they lie on one grid.

python -m tools.map_info emd_3488.map.gz
python -m tools.map_info half1.mrc half2.mrc mask.mrc
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from rich.console import Console
from rich.table import Table

from datamodules.map_entries import check_same_grid
from datamodules.mrc import MapFormatError, MapRecord, read_map


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("maps", type=Path, nargs="+", help="files, plain or .gz or .bz2")
    options = parser.parse_args()
    records, failed = [], False
    for path in options.maps:
        try:
            records.append(read_map(path, allow_anisotropic=True, nan_policy="zero"))
            Console().print(table(records[-1]))
        except (ValueError, OSError) as error:
            failed = True
            print(f"error: {error}", file=sys.stderr)
    for other in records[1:]:
        try:
            check_same_grid(records[0], other)
            print(f"{other.path} lies on the grid of {records[0].path}")
        except MapFormatError as error:
            failed = True
            print(f"error: {error}", file=sys.stderr)
    return int(failed)


def table(record: MapRecord) -> Table:
    """One row for every property, and for everything that was odd."""
    found = Table(title=str(record.path), title_justify="left", show_header=False)
    voxels = record.voxels
    extent = [size * edge for size, edge in zip(record.voxel_sizes, voxels.shape[::-1])]
    rows = {
        "voxels (x, y, z)": " x ".join(map(str, voxels.shape[::-1])),
        "voxel size": f"{triple(record.voxel_sizes)} A",
        "box": f"{triple(extent)} A",
        "first voxel at": f"{triple(record.offset)} A (origin {triple(record.origin)}, start {record.nstart})",
        "axes of columns, rows, sections": ", ".join("?xyz"[axis] for axis in record.axes),
        "mode, space group": f"{record.mode}, {record.space_group}",
        "min, max": f"{voxels.min():.6g}, {voxels.max():.6g}",
        "mean, std": f"{voxels.mean(dtype=np.float64):.6g}, {voxels.std(dtype=np.float64):.6g}",
        "99.999th percentile": f"{np.percentile(voxels, 99.999):.6g}",
        "labels": "\n".join(record.labels) or "none",
    }
    for name, value in rows.items():
        found.add_row(name, value)
    for odd in record.warnings:
        found.add_row("[yellow]odd[/yellow]", odd)
    return found


def triple(values: object) -> str:
    """Three numbers, or one when they are the same."""
    numbers = [f"{value:.6g}" for value in values]
    return numbers[0] if len(set(numbers)) == 1 and float(numbers[0]) else f"({', '.join(numbers)})"


if __name__ == "__main__":
    sys.exit(main())
