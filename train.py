"""The one entry point: compose the words, check them, build, run the stages. `python train.py --help`."""

import os
import sys
import traceback

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from tessera.words import Refusal, help_text, problems

FLAGS_WITH_VALUE = ("--cfg", "-c", "--package", "-p", "--config-path", "--config-name", "--config-dir", "--info", "-i")


def command_line(arguments: list[str]) -> tuple[list[str], list[str]]:
    """The words, and Hydra's own flags."""
    words, flags = [], []
    for before, argument in zip(["", *arguments], arguments):
        (flags if argument.startswith("-") or before in FLAGS_WITH_VALUE else words).append(argument)
    return words, flags


@hydra.main(config_path="conf", config_name="train", version_base="1.3")
def job(config: DictConfig) -> None:
    """One run, in this process or one per device."""
    words = list(HydraConfig.get().overrides.task)
    from tessera import ranks  # torch comes in only here

    try:
        from tessera.check import devices_to_start
        from tessera.run import main

        devices = devices_to_start(config)
        status = ranks.launch(words, devices) if devices > 1 else main(words)
    except KeyboardInterrupt:
        print(
            "\ninterrupted: the same command continues from the last checkpoint and the answers sampled so far",
            file=sys.stderr,
        )
        status = 130
    except Exception as error:
        status = report(error, config.traceback)
    sys.stdout.flush()
    sys.stderr.flush()
    if status:
        # torchrun's children must not hang in a collective that the failed rank will never reach
        os._exit(status)


def report(error: Exception, whole: bool) -> int:
    """Say what went wrong in a sentence, or with everything where debug=full asks for it."""
    if whole:
        traceback.print_exception(error)
    else:
        from tessera.run import sentence

        print(f"error: {sentence(error)}", file=sys.stderr)
    return 1


def main() -> int:
    words, flags = command_line(sys.argv[1:])
    if {"--help", "-h"} & set(flags):
        print(help_text())
        return 0
    found = problems(words, multirun=bool({"-m", "--multirun"} & set(flags)))
    if found:
        print("\n".join(f"error: {reason}" for reason in Refusal(found).reasons), file=sys.stderr)
        return 1
    job()
    return 0


if __name__ == "__main__":
    sys.exit(main())
