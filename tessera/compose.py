"""From words to a configuration."""

from pathlib import Path

from hydra import compose as hydra_compose
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf, open_dict

from datamodules.places import shared

CONF = Path(__file__).resolve().parent.parent / "conf"


def compose(words: list[str]) -> tuple[DictConfig, dict[str, str]]:
    """The configuration that command-line words make, and the choice taken in every group.

    Works inside and outside of `hydra.main`. Raises Hydra's own errors: `tessera.words` turns them into sentences.
    """
    full, choices = _composed(words)
    added = _for_real_rows(full.data, choices)
    return _composed([*words, *added]) if added else (full, choices)


def completed(words: list[str]) -> list[str]:
    """The words, and those that `compose` adds."""
    full, choices = _composed(words)
    return [*words, *_for_real_rows(full.data, choices)]


def _for_real_rows(data: DictConfig, choices: dict[str, str]) -> list[str]:
    """The word of `conf/recipe/real/<data>_<policy>.yaml`, where there is one and the rows are not generated."""
    recipe = f"{choices['data']}_{choices['policy']}"
    known = (CONF / "recipe" / "real" / f"{recipe}.yaml").exists()
    return [f"recipe/real={recipe}"] if known and (data.path or shared(data.name)) else []


def _composed(words: list[str]) -> tuple[DictConfig, dict[str, str]]:
    if GlobalHydra.instance().is_initialized():
        full = hydra_compose("train", overrides=words, return_hydra_config=True)
    else:
        with initialize_config_dir(str(CONF), version_base="1.3"):
            full = hydra_compose("train", overrides=words, return_hydra_config=True)
    choices = OmegaConf.to_container(full.hydra.runtime.choices)
    with open_dict(full):
        del full["hydra"]
    return full, choices
