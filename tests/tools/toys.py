"""A method that says what every process trains with."""

import json
import os
import sys
from pathlib import Path

from lightning_modules.alignment.sft import SFT


class Witness(SFT):
    """SFT that writes each process's words and learning rate into the run's folder."""

    def on_train_start(self) -> None:
        super().on_train_start()
        said = {"words": sys.argv[1:], "lr": self.trainer.optimizers[0].defaults["lr"], "pid": os.getpid()}
        Path(self.trainer.default_root_dir, f"process-{self.global_rank}.json").write_text(json.dumps(said))
