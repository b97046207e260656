"""From words to a configuration."""

from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

CONF = Path(__file__).resolve().parent.parent / "conf"


def compose(words: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """The configuration that command-line words make, and the choice taken in every group.

    Works inside and outside of `hydra.main`. Raises Hydra's own errors: `tessera.words` turns them into sentences.
    """
    if GlobalHydra.instance().is_initialized():
        full = hydra_compose("train", overrides=words, return_hydra_config=True)
    else:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            full = hydra_compose("train", overrides=words, return_hydra_config=True)
    choices = OmegaConf.to_container(full.hydra.runtime.choices)
    with open_dict(full):
        del full["hydra"]
    return full, choices
