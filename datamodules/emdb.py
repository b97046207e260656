"""Cryo-EM density as normalised cubes: maps from files or EMDB, or simulated ones."""

import hashlib
import json
import logging
from types import SimpleNamespace
from typing import Any, ClassVar

import lightning as L
import torch
from torch.utils.data import DataLoader, Dataset

from datamodules import simulated_maps
from datamodules.batches import DensityBatch
from datamodules.map_crops import ROTATIONS, Cook, Cropping, EvalCrops, Normalisation, TrainCrops, measured
from datamodules.steps import FromStep

log = logging.getLogger(__name__)


class EMDB(L.LightningDataModule):
    """Crops of cryo-EM maps for training, one after another for evaluation; see `DensityBatch` for their units.

    Raises FileNotFoundError or ValueError in one sentence.
    """

    serves: ClassVar[tuple[type, ...]] = (DensityBatch,)

    def __init__(
        self,
        simulated: bool,
        simulation: dict[str, Any],
        voxel_size: float,
        box: int,
        mean: float | None,
        std: float | None,
        rotation: str,
        shift: int,
        crops_per_map: int,
        eval_crops: int,
        occupied_fraction: float | None,
        limit: int | None,
        batch_size: int,
        seed: int,
        workers: int,
    ) -> None:
        super().__init__()
        if rotation not in ROTATIONS:
            raise ValueError(f"data.rotation={rotation}: there are {', '.join(ROTATIONS)}")
        self.box, self.voxel_size, self.batch_size, self.seed, self.workers = box, voxel_size, batch_size, seed, workers
        self.crops_per_map, self.eval_crops = crops_per_map, eval_crops
        self.cropping = Cropping(box, rotation, shift, occupied_fraction)
        self._simulate(simulation, limit, asked=simulated)
        auto = measured(self.parts["train"], self.cropping, seed)
        self.normalisation = Normalisation(auto.mean if mean is None else mean, auto.std if std is None else std)

    def _simulate(self, simulation: dict[str, Any], limit: int | None, asked: bool) -> None:
        self.name, self.standin = ("emdb_sim", False) if asked else ("emdb-standin", True)
        if not asked:
            log.warning("emdb-standin: no maps found, these are simulated from generated helices and strands")
        settings = {"box": self.box, "voxel_size": self.voxel_size, "resolution": simulation["resolution"]}
        sizes = {part: min(simulation[part], limit or simulation[part]) for part in simulated_maps.PARTS}
        self.parts = {
            part: simulated_maps.bundle_maps(part, size, seed=self.seed, **settings) for part, size in sizes.items()
        }
        known = json.dumps([simulated_maps.VERSION, sizes, settings, self.seed], sort_keys=True)
        self.fingerprint = hashlib.sha256(known.encode()).hexdigest()
        self.source = SimpleNamespace(origin="simulated bundles of helices and strands")

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
        return self._loader(crops, FromStep(crops, lambda: self.trainer.global_step))

    def val_dataloader(self) -> DataLoader:
        return self._whole("val")

    def test_dataloader(self) -> DataLoader:
        return self._whole("test")

    def predict_dataloader(self) -> DataLoader:
        return self._whole("test")

    def _whole(self, part: str) -> DataLoader:
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
        return self._loader(crops, range(len(crops)))

    def _loader(self, crops: Dataset, order: FromStep | range) -> DataLoader:
        return DataLoader(
            crops,
            batch_size=None,
            sampler=order,
            num_workers=self.workers,
            pin_memory=torch.cuda.is_available(),
            # its own: the workers' seeds that a loader draws must not move the generator of the run
            generator=torch.Generator().manual_seed(self.seed),
        )
