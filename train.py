"""The one entry point: compose the words, check them, build, run the stages. `python train.py --help`."""

import os
import sys
import traceback
from pathlib import Path
from typing import NoReturn

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig

from tessera.compose import CONF, completed
from tessera.words import help_text, problems

# threads that wait must not spin: beside another process on the same cores that costs up to ten times the work
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

FLAGS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "--config-name", "--config-dir", "--info", "-i")


def command_line(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The words, and Hydra's own flags."""
    words, flags = [], []
    for before, argument in zip(["", *arguments], arguments):
        (flags if argument.startswith("-") or before in FLAGS_WITH_VALUE else words).append(argument)
    return words, flags


RECORDS: list[Path] = []  # where the runs of a grid write which folder is theirs


@hydra.main(config_path=str(CONF), config_name="train", version_base="1.3")
def job(config: DictConfig) -> None:
    """One run, in this process or one per device."""
    from tessera import ranks  # torch comes in only here

    words, choices = list(HydraConfig.get().overrides.task), HydraConfig.get().runtime.choices
    if HydraConfig.get().mode == RunMode.MULTIRUN:
        RECORDS.append(Path(HydraConfig.get().runtime.output_dir, "folder.txt").absolute())
        os.environ["TESSERA_RECORD"] = str(RECORDS[-1])
    try:
        from tessera.check import devices_to_start, refuse
        from tessera.run import main

        refuse(config, choices)
        devices = devices_to_start(config)
        status = ranks.launch(words, devices, config.trainer) if devices > 1 else main(words)
    except SystemExit as stopped:
        from tessera.stopping import last_words

        status = last_words(stopped)
    except Exception as error:
        status = report(error, config.traceback)
    if status:
        leave(status)


def report(error: Exception, whole: bool) -> int:
    """Say what went wrong in a sentence, or with everything where debug=full asks for it."""
    from tessera import ranks
    from tessera.run import sentences

    if whole:
        traceback.print_exception(error)
    ranks.report(sentences(error), ranks.follows(error))
    return 1


def beside_each_other(records: list[Path]) -> None:
    """Compare the runs of a grid, where there is something to compare."""
    from tessera.comparison import compare
    from tessera.folder import RunFolder

    try:
        runs = [RunFolder(Path(record.read_text())) for record in records]
        compare(runs, records[0].parent.parent / "comparison.png")
    except ValueError as error:
        print(f"no comparison: {error}", file=sys.stderr)


def leave(status: int) -> NoReturn:
    """Exit; one of several processes at once, without waiting in a collective that a failed one never reaches."""
    sys.stdout.flush()
    sys.stderr.flush()
    (os._exit if "WORLD_SIZE" in os.environ else sys.exit)(status)


def main() -> None:
    """Exit with status 0, with 1 when something was wrong, with 130 after Ctrl-C, with 143 after SIGTERM."""
    words, flags = command_line(sys.argv[1:])
    if {"--help", "-h"} & set(flags):
        print(help_text())
        return
    try:
        found = problems(words, multirun=bool({"-m", "--multirun"} & set(flags)))
        for reason in found:
            print(f"error: {reason}", file=sys.stderr)
        if found:
            leave(1)
        shown = completed(words) if {"--cfg", "-c"} & set(flags) else words
        sys.argv[1:] = [*flags, *shown]  # Hydra wants its flags together
        job()
        if len(RECORDS) > 1:
            beside_each_other(RECORDS)
    except KeyboardInterrupt:  # before anything was begun
        leave(130)


if __name__ == "__main__":
    main()
