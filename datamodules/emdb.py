"""Cryo-EM density as normalised cubes: maps from files or EMDB, or simulated ones."""

import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
from rich.console import Console
from rich.progress import track
from torch.utils.data import DataLoader

from datamodules import simulated_maps
from datamodules.batches import DensityBatch
from datamodules.emdb_download import download
from datamodules.loaders import batch_loader
from datamodules.map_cache import CachedMap, cached, file_digest
from datamodules.map_crops import ROTATIONS, Cook, Cropping, EvalCrops, Normalisation, TrainCrops, Volume, measured
from datamodules.map_entries import Entry, divided, find_entries
from datamodules.map_processing import TARGETS, VERSION, Processing
from datamodules.mrc import NAN_POLICIES, MapFormatError, NoDensityError
from datamodules.steps import FromStep
from datamodules.structures import find_structures

log = logging.getLogger(__name__)

CHOICES = {
    "rotation": ROTATIONS,
    "target": TARGETS,
    "nan_policy": NAN_POLICIES,
    "on_error": ("stop", "skip"),
    "precision": ("float32", "float16"),
}


class EMDB(L.LightningDataModule):
    """Crops of cryo-EM maps for training, and of every held-out map for evaluation; see `DensityBatch` for the units.

    Maps come from the first place that has them: `path` (a manifest, a folder, files), `accessions` of EMDB,
    `$TESSERA_DATA/emdb`, else they are simulated, with a warning; with `simulated` they are in any case, from bundles
    of helices and strands or from the structures in `path`. Raises FileNotFoundError or ValueError in one sentence.
    """

    serves: ClassVar[tuple[type, ...]] = (DensityBatch,)

    def __init__(
        self,
        path: str | None,
        accessions: Sequence[int | str] | None,
        simulated: bool,
        simulation: dict[str, Any],
        split: Sequence[float],
        voxel_size: float,
        box: int,
        target: str,
        percentile: float,
        clip_negative: bool,
        mean: float | None,
        std: float | None,
        rotation: str,
        shift: int,
        crops_per_map: int,
        eval_crops: int,
        occupied_fraction: float | None,
        threshold: float,
        dilate: int,
        nan_policy: str,
        allow_anisotropic: bool,
        assume_voxel_size: float | None,
        on_error: str,
        precision: str,
        limit: int | None,
        batch_size: int,
        seed: int,
        workers: int,
        cache: str,
    ) -> None:
        super().__init__()
        _check(locals())
        voxel_size = float(voxel_size)  # 3 is the same map as 3.0
        self.voxel_size, self.box, self.batch_size, self.seed, self.workers = voxel_size, box, batch_size, seed, workers
        self.crops_per_map, self.eval_crops, self.on_error = crops_per_map, eval_crops, on_error
        self.cropping = Cropping(box, rotation, shift, occupied_fraction)
        self.processing = Processing(
            voxel_size,
            box,
            target,
            percentile,
            clip_negative and target == "map",  # half maps have noise of both signs
            threshold,
            dilate,
            nan_policy,
            allow_anisotropic,
            assume_voxel_size,
            precision,
            simulation["resolution"],
        )
        self.parts: dict[str, Sequence[Volume]] = {}
        self.name, self.standin = "emdb_sim" if simulated else "emdb", False
        entries, origin = self._entries(path, accessions, simulated, Path(cache))
        if entries:
            self._prepare(entries, origin, split, limit, Path(cache))
        else:
            self._simulate(simulation, limit, asked=simulated)
        self.normalisation = self._measured(mean, std)

    # Where the maps come from

    def _entries(
        self, path: str | None, accessions: Sequence[int | str] | None, simulated: bool, cache: Path
    ) -> tuple[list[Entry], str]:
        """What is there, and where it was found; nothing when maps of bundles are to be made."""
        if path is not None and not Path(path).exists():
            raise FileNotFoundError(
                f"data.path={path} does not exist: correct it, or set data.path=null to look in $TESSERA_DATA/emdb "
                f"({os.environ.get('TESSERA_DATA') or 'not set'}), then simulate maps"
            )
        if path is not None:
            return (find_structures if simulated else find_entries)(path), f"data.path={path}"
        if accessions and not simulated:
            halves = self.processing.target != "map"
            return download(accessions, cache / "downloads", halves), "EMDB"
        root = os.environ.get("TESSERA_DATA")
        if root and (Path(root) / "emdb").exists() and not simulated:
            return find_entries(Path(root) / "emdb"), f"$TESSERA_DATA/emdb in {root}"
        return [], ""

    def _simulate(self, simulation: dict[str, Any], limit: int | None, asked: bool) -> None:
        if not asked:
            self.name, self.standin = "emdb-standin", True
            log.warning(
                "emdb-standin: no maps found, these are simulated from generated helices and strands, and results on "
                "them are not EMDB's"
            )
        settings = {"box": self.box, "voxel_size": self.voxel_size, "resolution": simulation["resolution"]}
        sizes = {part: min(simulation[part], limit or simulation[part]) for part in simulated_maps.PARTS}
        self.parts = {
            part: simulated_maps.bundle_maps(part, size, seed=self.seed, **settings) for part, size in sizes.items()
        }
        self.fingerprint = _digest([simulated_maps.VERSION, sizes, settings, self.seed])
        self.source = SimpleNamespace(origin="simulated bundles of helices and strands")

    def _prepare(
        self, entries: list[Entry], origin: str, split: Sequence[float], limit: int | None, cache: Path
    ) -> None:
        """Process every entry, or find it processed, and divide what can be used."""
        aside: list[str] = []
        maps = {}
        for entry, made in self._each(lambda entry: self._cached(entry, cache), entries):
            if isinstance(made, MapFormatError):
                aside.append(str(made))
            else:
                maps[entry.id] = made
        if aside:
            log.warning("%d of %d maps are left aside: %s", len(aside), len(entries), "; ".join(aside))
        usable = [entry for entry in entries if entry.id in maps]
        if not usable:
            raise ValueError(f"{origin} has no usable map: give others, or correct what the warnings name")
        parts = divided(usable, split, self.seed)
        self.parts = {part: [maps[entry.id] for entry in some][:limit] for part, some in parts.items()}
        log.info("emdb from %s: %s maps", origin, {part: len(some) for part, some in self.parts.items()})
        digests = {
            part: [[entry.id, *(file_digest(file, cache) for file in entry.files)] for entry in some]
            for part, some in parts.items()
        }
        self.fingerprint = _digest([VERSION, asdict(self.processing), digests])
        self.source = SimpleNamespace(origin=origin)

    def _cached(self, entry: Entry, cache: Path) -> CachedMap | MapFormatError:
        """What is damaged stops, unless it is to be skipped; what is sound and no density in a folder is left aside."""
        try:
            return cached(entry, self.processing, cache)
        except NoDensityError as error:
            if self.on_error == "stop" and entry.listed:
                raise
            return error
        except MapFormatError as error:
            if self.on_error == "stop":
                raise
            return error

    def _each(self, make: Callable[[Entry], Any], entries: list[Entry]) -> Iterable[tuple[Entry, Any]]:
        """Results in order, as many at a time as there are workers, with a bar on the first process."""
        console = Console(stderr=True)
        quiet = os.environ.get("RANK", "0") != "0" or not console.is_terminal
        with ThreadPoolExecutor(max(1, self.workers)) as pool:
            try:
                made = track(
                    pool.map(make, entries), "preparing maps", total=len(entries), console=console, disable=quiet
                )
                yield from zip(entries, made)
            except BaseException:
                pool.shutdown(cancel_futures=True)
                raise

    def _measured(self, mean: float | None, std: float | None) -> Normalisation:
        if mean is not None and std is not None:
            return Normalisation(mean, std)
        if not self.parts["train"]:
            raise ValueError("there is no map to train on, so give data.mean and data.std as they were in training")
        found = measured(self.parts["train"], self.cropping, self.seed)
        if not found.std > 0:
            raise ValueError(
                "the training crops are the same in every voxel: lower data.threshold, or look at the maps"
            )
        return Normalisation(found.mean if mean is None else mean, found.std if std is None else std)

    # What a checkpoint keeps, so that other maps are seen as those that were trained on

    def state_dict(self) -> dict[str, float]:
        return {"mean": self.normalisation.mean, "std": self.normalisation.std}

    def load_state_dict(self, state_dict: dict[str, float]) -> None:
        self.normalisation.mean, self.normalisation.std = state_dict["mean"], state_dict["std"]

    # Loaders

    def train_dataloader(self) -> DataLoader:
        crops = TrainCrops(
            Cook(self.parts["train"], self.normalisation),
            self.cropping,
            self.crops_per_map,
            self.batch_size,
            self.seed,
            rank=self.trainer.global_rank,
            world=self.trainer.world_size,
            accumulate=self.trainer.accumulate_grad_batches,
        )
        return batch_loader(crops, FromStep(crops, lambda: self.trainer.global_step), self.workers, self.seed)

    def val_dataloader(self) -> DataLoader:
        return self._whole("val")

    def test_dataloader(self) -> DataLoader:
        return self._whole("test")

    def predict_dataloader(self) -> DataLoader:
        return self._whole("test")

    def _whole(self, part: str) -> DataLoader:
        if not self.parts[part]:
            raise ValueError(f"{self.source.origin} has no map of the split {part}: name one in the manifest")
        world = self.trainer.world_size
        crops = EvalCrops(
            Cook(self.parts[part], self.normalisation),
            Cropping(self.box, occupied=self.cropping.occupied),
            self.eval_crops,
            rows=max(1, self.batch_size // world),
            seed=self.seed,
            purpose=part,
            rank=self.trainer.global_rank,
            world=world,
        )
        return batch_loader(crops, range(len(crops)), self.workers, self.seed)


def _check(given: dict[str, Any]) -> None:
    """Refuse values that mean nothing, before a file is read."""
    for key, allowed in CHOICES.items():
        if given[key] not in allowed:
            raise ValueError(f"data.{key}={given[key]}: there are {', '.join(allowed)}")
    for key in ("box", "crops_per_map", "eval_crops", "limit"):
        if given[key] is not None and given[key] < 1:
            raise ValueError(f"data.{key}={given[key]} must be positive")
    for key in ("shift", "dilate"):
        if given[key] < 0:
            raise ValueError(f"data.{key}={given[key]} must not be negative")
    for key in ("voxel_size", "std", "assume_voxel_size"):
        if given[key] is not None and not 0 < given[key] < float("inf"):
            raise ValueError(f"data.{key}={given[key]} must be above 0")
    fraction, percentile = given["occupied_fraction"], given["percentile"]
    if fraction is not None and not 0 <= fraction <= 1:
        raise ValueError(f"data.occupied_fraction={fraction}: a share from 0 to 1, or null")
    if not 50 < percentile <= 100:
        raise ValueError(f"data.percentile={percentile}: above 50 and up to 100, such as 99.999")
    _check_simulation(given["simulation"], given["box"])


def _check_simulation(simulation: dict[str, Any], box: int) -> None:
    known = {*simulated_maps.PARTS, "resolution"}
    if simulation.keys() != known:
        raise ValueError(f"data.simulation has {sorted(simulation)}: it has {', '.join(sorted(known))}")
    for key, value in simulation.items():
        if not value > 0:
            raise ValueError(f"data.simulation.{key}={value} must be positive")
    if box < 8:
        raise ValueError(f"data.box={box}: at least 8 voxels")


def _digest(known: list) -> str:
    return hashlib.sha256(json.dumps(known, sort_keys=True).encode()).hexdigest()
