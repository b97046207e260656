"""Finished runs beside each other: a table, and their curves in one figure, seeds as a band.

python -m tools.compare outputs/gpt2/text-standin/*
python -m tools.compare outputs/gpt2/text/* -o optimizers.png
"""

import argparse
import sys
from pathlib import Path

from tessera.comparison import compare
from tessera.folder import RunFolder


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", type=Path, nargs="+", help="run folders")
    parser.add_argument("-o", "--output", type=Path, default=Path("comparison.png"), help="the figure")
    options = parser.parse_args()
    try:
        compare([RunFolder(run) for run in options.runs], options.output)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
