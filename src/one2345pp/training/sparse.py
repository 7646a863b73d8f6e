"""Training of the sparse signed-distance and colour diffusion and its condition encoder. The loop lives in `training.loop`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ..data.dataset import PreparedDataset
from ..geometry.render import contact_sheet
from ..models.condition_encoder import ConditionEncoder, project_pixels
from ..models.sparse import SparseGrid
from ..models.unet_sparse import SparseUNet3DModel
from . import views as training_views
from .global_vector import GlobalVector
from .loop import step_generator, train
from .occupancy import shell_occupancy


DEFAULTS = {
    "occupancy_threshold": 1.25,  # as in the occupancy stage
    "support_noise": 0.3,  # each cell's threshold is off by up to this share (LAS-Diffusion)
    "condition_dropout": 0.1,
    "vector_dropout": 0.2,  # of the global vector alone: views may come without their input picture
    "color_weight": 1.0,
    "multiview": None,  # folder of a first stage, whose image encoder gives the global vector
}


def subdivide(
    occupied: Tensor,  # [B, x, y, z] bool
) -> SparseGrid:
    """The eight children of every occupied cell, as the active voxels of the next finer grid."""
    fine = occupied.repeat_interleave(2, 1).repeat_interleave(2, 2).repeat_interleave(2, 3)
    return SparseGrid(fine.nonzero(), fine.shape[-1], len(fine))


class SparseObjective:
    """||f(x_t, t, c) - x_0||^2 on the children of occupied cells, t uniform, mean over each sample's voxels (One-2-3-45++ 3.2)."""

    def __init__(self, config: dict, truncation_cells: float, validation: PreparedDataset | None = None):
        self.settings = {**DEFAULTS, **config.get("objective", {})}
        self.augmentation = {**training_views.DEFAULTS, **config.get("views", {})}
        self.threshold = self.settings["occupancy_threshold"] / truncation_cells
        self.validation = validation
        self.global_vector = GlobalVector(self.settings["multiview"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.get("training", {}).get("seed", 0))
            condition = ConditionEncoder(**config["condition"], sparse=True)
            unet = SparseUNet3DModel(**config["unet"])
        self.modules = nn.ModuleDict({"condition": condition, "unet": unet})
        self.scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="sample")

    def collate(self, items: list[dict], generator: torch.Generator) -> dict:
        batch = training_views.SampleBatch(items, self.augmentation, generator)
        return self.batch(batch, self.settings["support_noise"], generator)

    def batch(self, batch: training_views.SampleBatch, support_noise: float, generator: torch.Generator) -> dict:
        """Support, and the target on it: `target [N, 4]` in [-1, 1], `known [N]` where a colour exists."""
        wobble = 1 + support_noise * (2 * torch.rand(batch.sdf.shape, generator=generator) - 1)
        grid = subdivide(shell_occupancy(batch.sdf / wobble, self.threshold))
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
        timesteps = torch.randint(1000, (grid.batch_size,), generator=generator).to(device)
        noisy = self.scheduler.add_noise(target, noise, timesteps[grid.sample_index])
        keep = (
            (torch.rand(grid.batch_size, generator=generator) >= self.settings["condition_dropout"]).float().to(device)
        )
        vector = self.global_vector.dropped(batch["inputs"], keep, self.settings["vector_dropout"], generator)
        prediction = self.predict(noisy, timesteps, batch, keep, vector)
        error = (prediction - target).square()
        sdf = grid.mean(error[:, :1]).mean()
        color = (grid.mean(error[:, 1:] * known).mean(1) / grid.mean(known)[:, 0].clamp(min=1e-3)).mean()
        return sdf + self.settings["color_weight"] * color, {"sdf": sdf.item(), "color": color.item()}

    def predict(self, noisy: Tensor, timesteps: Tensor, batch: dict, keep: Tensor, vector: Tensor | None) -> Tensor:
        """The clean sample, with the condition of samples whose `keep [B]` is 0 dropped."""
        grid, views = batch["grid"], batch["views"]
        pyramid = self.modules["condition"](views, grid)
        levels = grid.levels(len(pyramid))
        pyramid = [features * level.spread(keep[:, None]) for features, level in zip(pyramid, levels, strict=True)]
        pixels = project_pixels(views, grid, keep)
        return self.modules["unet"](noisy, timesteps, grid, pyramid, vector, pixels).sample

    def preview(self, modules: nn.ModuleDict, path: Path) -> None:
        """Errors of one-step predictions on held-out objects with true occupancy, and a sheet of middle slices beside the truth."""
        if self.validation is None:
            return
        generator = step_generator(0, 0)
        quiet = {
            **self.augmentation,
            **dict.fromkeys(("mirror", "recolor", "rekey", "blur", "drop_view", "perturb"), 0.0),
        }
        device = modules["unet"].device
        errors, rows = [], []
        for index in range(min(len(self.validation), 32)):
            sample = training_views.SampleBatch([self.validation[index]], quiet, generator)
            batch = self.batch(sample, 0.0, generator)
            batch = {k: v.to(device) for k, v in batch.items()}
            noise = torch.randn(batch["target"].shape, generator=generator).to(device)
            steps, keep = torch.full((1,), 999, device=device), torch.ones(1, device=device)
            prediction = self.predict(noise, steps, batch, keep, self.global_vector(batch["inputs"]))
            known = batch["known"] > 0
            sdf = (prediction[:, 0] - batch["target"][:, 0]).abs().mean().item()
            mse = (prediction[known, 1:] - batch["target"][known, 1:]).div(2).square().mean()
            errors.append((sdf, -10 * mse.log10().item()))
            if index < 6:
                rows.append(_slices(batch["grid"], batch["target"]) + _slices(batch["grid"], prediction))
        contact_sheet(rows, 128).save(path)
        means = [sum(column) / len(errors) for column in zip(*errors, strict=True)]
        figures = {"step": int(path.stem.split("-")[-1]), "sdf_error": means[0], "color_psnr": means[1]}
        with open(path.with_name("validation.jsonl"), "a") as log:
            log.write(json.dumps(figures) + "\n")

    def save(self, modules: nn.ModuleDict, output: Path) -> None:
        modules["condition"].save_pretrained(output / "sparse_condition")
        modules["unet"].save_pretrained(output / "sparse_unet")


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


def run(
    config: dict,
    *,
    data: Path,
    output: Path,
    device: str = "auto",
    minutes: float | None = None,
    validation: Path | None = None,
) -> None:
    """Train the sparse network from a config with keys `unet`, `condition`, `objective`, `views`, `training`.

    Args:
        config: See `configs/sparse-small.json`.
        data: Folder that `prepare` wrote.
        output: Folder for the components `sparse_unet` and `sparse_condition`, logs and checkpoints.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"mps"`.
        minutes: Overrides the config's time limit.
        validation: Prepared folder of held-out objects for previews.
    """
    dataset = PreparedDataset(data)
    cells = dataset.truncation * dataset.meta["resolution"]
    objective = SparseObjective(config, cells, PreparedDataset(validation) if validation else None)
    train(objective, dataset, config.get("training", {}), Path(output), device=device, minutes=minutes)
