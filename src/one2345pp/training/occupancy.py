"""Training of the dense occupancy diffusion and its condition encoder. The loop lives in `training.loop`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..geometry.render import contact_sheet
from ..models.condition_encoder import ConditionEncoder
from ..models.unet_occupancy import OccupancyUNet3DModel
from . import volume_objective
from .loop import log_validation, step_generator
from .views import SampleBatch
from .volume_objective import VolumeConfig, VolumeObjective, VolumeSettings


@dataclass(frozen=True)
class OccupancySettings(VolumeSettings):
    """What the occupancy network is taught."""

    self_condition: float = 0.5  # probability of a first prediction fed back (LAS-Diffusion)


@dataclass(frozen=True)
class OccupancyConfig(VolumeConfig):
    """A config of the occupancy network."""

    objective: OccupancySettings = field(default_factory=OccupancySettings)


def shell_occupancy(
    sdf: Tensor,  # [B, X, Y, Z] units of the truncation distance
    threshold: float,
) -> Tensor:
    """Coarse cells with a fine centre nearer to the surface than `threshold`, `[B, X/2, Y/2, Z/2]` bool."""
    return F.max_pool3d((sdf.abs() < threshold).float()[:, None], 2)[:, 0] > 0.5


class OccupancyObjective(VolumeObjective):
    """||f(x_t, t, c) - x_0||^2 on the shell occupancy in {-1, 1}, t uniform (One-2-3-45++ section 3.2)."""

    stage = "occupancy"
    config_class = OccupancyConfig
    unet_class = OccupancyUNet3DModel

    def collate(self, items: list[dict], generator: torch.Generator) -> dict:
        batch = self.samples(items, self.config.views, generator)
        target = shell_occupancy(batch.sdf, self.threshold)[:, None].float() * 2 - 1
        return {"views": batch.views, "target": target, "inputs": batch.inputs}

    def loss(self, batch: dict, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        unet, target = self.modules["unet"], batch["target"]
        size, device = len(target), target.device
        noise = torch.randn(target.shape, generator=generator).to(device)
        timesteps = self.timesteps(size, generator, device)
        noisy = self.scheduler.add_noise(target, noise, timesteps)
        keep = self.kept(size, generator, device)
        pyramid = [level * keep.view(-1, 1, 1, 1, 1) for level in self.condition(batch["views"])]
        vector = self.dropped_vector(batch["inputs"], keep, generator)
        previous = None
        if torch.rand((), generator=generator).item() < self.settings.self_condition:
            with torch.no_grad():
                previous = unet(noisy, timesteps, pyramid, vector).sample
        prediction = unet(noisy, timesteps, pyramid, vector, previous).sample
        loss = F.mse_loss(prediction, target)
        return loss, {"iou": _iou(prediction.detach() > 0, target > 0)}

    def preview(self, modules: nn.ModuleDict, path: Path) -> None:
        """Shell IoU of one-step predictions on held-out objects, and a sheet of their projections beside the truth."""
        if self.validation is None:
            return
        figures, rows = {}, []
        for views in self.held_out_views:
            generator = step_generator(0, 0)
            ious = []
            for index, batch in enumerate(self.held_out(64, generator, views)):
                target = shell_occupancy(batch.sdf, self.threshold)[:, None]
                noise = torch.randn(target.shape, generator=generator)
                device = modules["unet"].device
                vector = self.vector(batch.inputs, device)
                pyramid = self.condition(batch.views.to(device))
                prediction = modules["unet"](noise.to(device), 999, pyramid, vector).sample.cpu() > 0
                ious.append(_iou(prediction, target))
                if index < 6:
                    pairs = [(grid[0, 0].float(), axis) for grid in (target, prediction) for axis in range(3)]
                    shades = [grid.mean(axis).T.flip(0) for grid, axis in pairs]
                    rows.append([(255 * (1 - s / s.max().clamp(min=1e-3))).byte().numpy() for s in shades])
            figures["shell_iou" + views] = sum(ious) / len(ious)
        contact_sheet(rows, 128).save(path)
        log_validation(path, **figures)


class OccupancyPrediction:
    """What a frozen occupancy network sees in the views of a batch: one step from noise.

    Args:
        folder: Holds `occupancy_condition` and `occupancy_unet`.
        objective: Has the encoders that it shares: of the input pictures, and of patches.
    """

    def __init__(self, folder: str, objective: VolumeObjective):
        self.objective = objective
        self.condition = ConditionEncoder.from_pretrained(folder, subfolder="occupancy_condition")
        self.unet = OccupancyUNet3DModel.from_pretrained(folder, subfolder="occupancy_unet")
        for module in (self.condition, self.unet):
            module.eval().requires_grad_(False)

    @torch.no_grad()
    def __call__(self, batch: SampleBatch, generator: torch.Generator) -> Tensor:
        """`[B, x, y, z]`, about -1 (empty) to 1 (shell), on the CPU; computed where the trained network is."""
        device, side = self.objective.modules["unet"].device, self.unet.config.sample_size
        noise = torch.randn(len(batch.sdf), 1, side, side, side, generator=generator)
        batch.views = batch.views.to(device)
        self.objective.add_patches(batch.views)
        vector = self.objective.vector(batch.inputs, device)
        condition = self.condition.to(device)(batch.views)
        return self.unet.to(device)(noise.to(device), 999, condition, vector).sample[:, 0].cpu()


def _iou(a: Tensor, b: Tensor) -> float:
    return ((a & b).sum() / (a | b).sum().clamp(min=1)).item()


def run(config: dict, **options) -> None:
    """`volume_objective.run` of the occupancy network."""
    volume_objective.run(OccupancyObjective, config, **options)
