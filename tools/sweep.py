"""Carry out a W&B sweep file without W&B, by one or more agents that share a study on the disk.

python -m tools.sweep conf/sweep/dqo.yaml --agents 2 --trials 50
python -m tools.sweep conf/sweep/dqo.yaml --report            what it found: table, figures, the best command

The same command goes on with a sweep that was interrupted; given elsewhere for the same folder, it joins. The file also
works with `wandb sweep` and `wandb agent`. docs/sweeps.md says more.
"""

import argparse
import sys
from datetime import datetime
from pathlib import Path

from tools.sweep_format import Sweep, read


def main() -> int:
    """The command line; 0 when the sweep is complete, 1 with a sentence, 130 and 143 after Ctrl-C and SIGTERM."""
    options = _options()
    try:
        if options.agents < 1 or (options.trials is not None and options.trials < 1):
            raise ValueError("--agents and --trials are numbers from 1 on")
        sweep = read(options.file)
        return _carried_out(sweep, options)
    except ImportError as error:
        if error.name != "optuna":
            raise
        print("error: sweeps need Optuna: pip install 'tessera[sweep]'", file=sys.stderr)
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
    return 1


def _options() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="python -m tools.sweep", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("file", type=Path, help="a sweep file in W&B's format")
    parser.add_argument("--agents", type=int, default=1, help="trials at the same time (1)")
    parser.add_argument("--trials", type=int, help="trials of the study, over all agents and commands")
    parser.add_argument("--folder", type=Path, help="of the study (outputs/sweeps/<name>-<hash of the file>)")
    parser.add_argument("--report", action="store_true", help="only show what was found so far")
    return parser.parse_args()


def _carried_out(sweep: Sweep, options: argparse.Namespace) -> int:
    from tools.sweep_report import report  # Optuna comes in only here
    from tools.sweep_study import StudyFolder
    from tools.sweep_watch import Agents

    folder = options.folder or Path("outputs/sweeps", f"{sweep.name}-{sweep.digest[:8]}")
    if options.report and not (folder / "journal.log").exists():
        raise ValueError(f"{sweep.path}: {folder} has no study yet; leave out --report, or give its --folder")
    limit = None if options.report else _limit(sweep, options.trials)
    home = StudyFolder(sweep, folder, limit, datetime.now())
    status = 0 if options.report else Agents(home, options.agents).watch()
    if status == 0:
        report(home)
    return status


def _limit(sweep: Sweep, trials: int | None) -> int:
    bounds = [bound for bound in (trials, sweep.run_cap, sweep.grid_size) if bound is not None]
    if not bounds:
        raise ValueError(f"{sweep.path}: run_cap is missing, and {sweep.method} never ends by itself; give --trials 50")
    return min(bounds)


if __name__ == "__main__":
    sys.exit(main())
