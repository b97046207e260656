"""A checkpoint's policy as a folder that `AutoModelForCausalLM.from_pretrained` loads as it is.

python -m tools.export outputs/dqo/gsm8k/<run>                          its newest valid checkpoint
python -m tools.export outputs/dqo/gsm8k/<run>/checkpoints/best.ckpt -o best_policy
"""

import argparse
import sys
from pathlib import Path

import transformers
from hydra.utils import instantiate
from omegaconf import OmegaConf

from tessera.checkpoints import newest_valid, read

PREFIX = "policy."


def export(source: Path, target: Path | None) -> Path:
    """Write the policy of a run folder or of a checkpoint in it; returns the folder.

    Raises ValueError when there is no valid checkpoint, or no configuration beside it, or no policy in it.
    """
    whole_run = source.is_dir() and source.suffix != ".ckpt"
    run = source if whole_run else source.parent.parent
    checkpoint, passed_over = newest_valid(run / "checkpoints") if whole_run else (source, [])
    for reason in passed_over:
        print(f"warning: passed over: {reason}", file=sys.stderr)
    if checkpoint is None:
        raise ValueError(f"{source} has no valid checkpoint")
    if not (run / "config.yaml").exists():
        raise ValueError(f"{run} has no config.yaml: give a run folder or a checkpoint inside of one")
    state = read(checkpoint)["state_dict"]
    weights = {name.removeprefix(PREFIX): value for name, value in state.items() if name.startswith(PREFIX)}
    if not weights:
        raise ValueError(f"{checkpoint} holds no policy: only language policies are exported this way")
    config = OmegaConf.load(run / "config.yaml")
    if (run / "export").exists():
        config.policy_weights = str(run / "export")  # the same architecture, wherever the run started from
    transformers.logging.disable_progress_bar()
    policy = instantiate(config.policy)
    policy.load_state_dict(weights)
    return policy.export(target or run / f"export-{checkpoint.stem}")


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="run folder or checkpoint")
    parser.add_argument("-o", "--output", type=Path, help="folder to write")
    options = parser.parse_args()
    try:
        print(export(options.source, options.output))
    except (ValueError, OSError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
