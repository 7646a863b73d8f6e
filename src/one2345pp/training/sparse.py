"""Training of the sparse signed-distance and colour diffusion and its condition encoder. The loop lives in `training.loop`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor, nn

from ..errors import InputError
from ..geometry.render import contact_sheet
from ..models.condition_encoder import project_pixels
from ..models.sparse import SparseGrid
from ..models.unet_sparse import SparseUNet3DModel
from . import volume_objective
from .loop import log_validation, step_generator, to_device
from .occupancy import OccupancyPrediction, shell_occupancy
from .views import SampleBatch
from .volume_objective import VolumeConfig, VolumeObjective, VolumeSettings


DISTANCE_LOSSES = {"l2": torch.square, "l1": torch.abs}


@dataclass(frozen=True)
class SparseSettings(VolumeSettings):
    """What the sparse network is taught."""

    support_noise: float = 0.3  # each cell's threshold is off by up to this share (LAS-Diffusion)
    color_weight: float = 1.0
    distance_loss: Literal["l2", "l1"] = "l2"  # l1: the median of what views allow, its zero as often too far in as out
    predicted_support: float = 0.0  # probability that the support is what an occupancy network sees in the same views
    occupancy: str | None = None  # folder of that network, `occupancy_condition` and `occupancy_unet`
    support_levels: tuple[float, float] = (-0.8, -0.2)  # cells above a level drawn from here are the support


@dataclass(frozen=True)
class SparseConfig(VolumeConfig):
    """A config of the sparse network."""

    objective: SparseSettings = field(default_factory=SparseSettings)


def subdivide(
    occupied: Tensor,  # [B, x, y, z] bool
) -> SparseGrid:
    """The eight children of every occupied cell, as the active voxels of the next finer grid."""
    return SparseGrid(occupied.nonzero(), occupied.shape[-1], len(occupied)).subdivided()


class SparseObjective(VolumeObjective):
    """||f(x_t, t, c) - x_0||^2 on the children of occupied cells, t uniform, mean over each sample's voxels (One-2-3-45++ 3.2)."""

    stage = "sparse"
    same_shapes = False
    folders = (*VolumeObjective.folders, "occupancy")
    config_class = SparseConfig
    unet_class = SparseUNet3DModel

    def __init__(self, config: dict, *args, **kwargs):
        super().__init__(config, *args, **kwargs)
        if self.settings.predicted_support:
            self.occupancy = OccupancyPrediction(self.settings.occupancy, self)

    def _check(self) -> None:
        super()._check()
        if self.settings.predicted_support and self.settings.occupancy is None:
            raise InputError(
                "config.objective: predicted_support needs occupancy, the folder of a trained occupancy network."
            )

    def collate(self, items: list[dict], generator: torch.Generator) -> dict:
        batch = self.samples(items, self.config.views, generator)
        low, high = self.settings.support_levels
        predicted = torch.rand(len(items), generator=generator) < self.settings.predicted_support
        levels = low + (high - low) * torch.rand(len(items), generator=generator)
        return self.batch(batch, self.settings.support_noise, generator, levels.where(predicted, torch.inf))

    def batch(
        self, batch: SampleBatch, support_noise: float, generator: torch.Generator, levels: Tensor | None = None
    ) -> dict:
        """Support, and the target on it: `target [N, 4]` in [-1, 1], `known [N]` where a colour exists.

        Samples with a finite level, `levels [B]`, have the predicted occupancy above it as support, the others the true one.
        """
        wobble = 1 + support_noise * (2 * torch.rand(batch.sdf.shape, generator=generator) - 1)
        occupied = shell_occupancy(batch.sdf / wobble, self.threshold)
        if levels is not None and levels.isfinite().any():
            predicted = self.occupancy(batch, generator) > levels.view(-1, 1, 1, 1)
            usable = predicted.flatten(1).any(1)
            occupied = torch.where(usable.view(-1, 1, 1, 1), predicted, occupied)
        grid = subdivide(occupied)
        sample, x, y, z = grid.coords.unbind(1)
        sdf = batch.sdf[sample, x, y, z]
        colors = batch.colors[sample, :, x, y, z]
        known = (sdf.abs() < 0.995).float()
        return {
            "views": batch.views,
            "grid": grid,
            "target": torch.cat([sdf[:, None], colors], 1),
            "known": known,
            "inputs": batch.inputs,
        }

    def loss(self, batch: dict, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        grid, target, known = batch["grid"], batch["target"], batch["known"][:, None]
        device = target.device
        noise = torch.randn(target.shape, generator=generator).to(device)
        timesteps = self.timesteps(grid.batch_size, generator, device)
        noisy = self.scheduler.add_noise(target, noise, timesteps[grid.sample_index])
        keep = self.kept(grid.batch_size, generator, device)
        vector = self.dropped_vector(batch["inputs"], keep, generator)
        prediction = self.predict(noisy, timesteps, batch, keep, vector)
        error = prediction - target
        sdf = grid.mean(DISTANCE_LOSSES[self.settings.distance_loss](error[:, :1])).mean()
        color = (grid.mean(error[:, 1:].square() * known).mean(1) / grid.mean(known)[:, 0].clamp(min=1e-3)).mean()
        return sdf + self.settings.color_weight * color, {"sdf": sdf.item(), "color": color.item()}

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: dict, keep: Tensor, vector: Tensor | None) -> Tensor:
        """The clean sample, with the condition of samples whose `keep [B]` is 0 dropped."""
        grid, views = batch["grid"], batch["views"]
        pyramid = self.condition(views, grid)
        levels = grid.levels(len(pyramid))
        pyramid = [features * level.spread(keep[:, None]) for features, level in zip(pyramid, levels, strict=True)]
        pixels = project_pixels(views, grid, keep) if self.modules["unet"].config.pixel_channels else None
        return self.modules["unet"](noisy, timesteps, grid, pyramid, vector, pixels).sample

    def preview(self, modules: nn.ModuleDict, path: Path) -> None:
        """Errors of one-step predictions on held-out objects, on the true and the predicted support, and a sheet of middle slices."""
        if self.validation is None:
            return
        level = torch.tensor([sum(self.settings.support_levels) / 2])
        supports = {"": None, "_predicted": level} if self.settings.predicted_support else {"": None}
        figures, rows = {}, []
        for views in self.held_out_views:
            generator = step_generator(0, 0)
            for index, sample in enumerate(self.held_out(16, generator, views)):
                for support, levels in supports.items():
                    batch, prediction = self._one_step(modules, sample, levels, generator)
                    known, target = batch["known"] > 0, batch["target"]
                    sdf = (prediction[:, 0] - target[:, 0]).abs().mean().item()
                    mse = (prediction[known, 1:] - target[known, 1:]).div(2).square().mean()
                    figures.setdefault("sdf_error" + support + views, []).append(sdf)
                    figures.setdefault("color_psnr" + support + views, []).append(-10 * mse.log10().item())
                if index < 6:
                    rows.append(_slices(batch["grid"], batch["target"]) + _slices(batch["grid"], prediction))
        contact_sheet(rows, 128).save(path)
        log_validation(path, **{name: sum(values) / len(values) for name, values in figures.items()})

    def _one_step(self, modules: nn.ModuleDict, sample: SampleBatch, levels: Tensor | None, generator) -> tuple:
        """Batch and prediction, `[N, 4]`, of one held-out sample from pure noise."""
        device = modules["unet"].device
        batch = to_device(self.batch(sample, 0.0, generator, levels), device)
        noise = torch.randn(batch["target"].shape, generator=generator).to(device)
        steps, keep = torch.full((1,), 999, device=device), torch.ones(1, device=device)
        return batch, self.predict(noise, steps, batch, keep, self.vector(batch["inputs"], device))


def _slices(grid: SparseGrid, values: Tensor) -> list:
    """Pictures of the signed distance and the colour on the middle slice across z."""
    side = grid.resolution
    rows = grid.coords[:, 3] == side // 2
    x, y = grid.coords[rows, 1].cpu(), grid.coords[rows, 2].cpu()
    pictures = []
    for channels in (values[rows, :1].expand(-1, 3), values[rows, 1:]):
        picture = torch.ones(side, side, 3)
        picture[side - 1 - y, x] = (channels.cpu().clamp(-1, 1) + 1) / 2
        pictures.append((picture * 255).byte().numpy())
    return pictures


def run(config: dict, **options) -> None:
    """`volume_objective.run` of the sparse network."""
    volume_objective.run(SparseObjective, config, **options)
