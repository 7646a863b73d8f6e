"""Training of the dense occupancy diffusion and its condition encoder. The loop lives in `training.loop`."""

from __future__ import annotations

import json
from pathlib import Path

import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from torch import Tensor, nn

from ..data.dataset import PreparedDataset
from ..geometry.render import contact_sheet
from ..models.condition_encoder import ConditionEncoder
from ..models.unet_occupancy import OccupancyUNet3DModel
from . import views as training_views
from .global_vector import GlobalVector
from .loop import step_generator, train


DEFAULTS = {
    "occupancy_threshold": 1.25,  # cells of the fine grid: a coarse cell is occupied when it holds a nearer centre
    "condition_dropout": 0.1,
    "vector_dropout": 0.2,  # of the global vector alone: views may come without their input picture
    "self_condition": 0.5,  # probability of a first prediction fed back (LAS-Diffusion)
    "multiview": None,  # folder of a first stage, whose image encoder gives the global vector
}


def shell_occupancy(
    sdf: Tensor,  # [B, X, Y, Z] units of the truncation distance
    threshold: float,
) -> Tensor:
    """Coarse cells with a fine centre nearer to the surface than `threshold`, `[B, X/2, Y/2, Z/2]` bool."""
    return F.max_pool3d((sdf.abs() < threshold).float()[:, None], 2)[:, 0] > 0.5


class OccupancyObjective:
    """||f(x_t, t, c) - x_0||^2 on the shell occupancy in {-1, 1}, t uniform (One-2-3-45++ section 3.2)."""

    def __init__(self, config: dict, truncation_cells: float, validation: PreparedDataset | None = None):
        self.settings = {**DEFAULTS, **config.get("objective", {})}
        self.augmentation = {**training_views.DEFAULTS, **config.get("views", {})}
        self.threshold = self.settings["occupancy_threshold"] / truncation_cells
        self.validation = validation
        self.global_vector = GlobalVector(self.settings["multiview"])
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.get("training", {}).get("seed", 0))
            condition = ConditionEncoder(**config["condition"])
            unet = OccupancyUNet3DModel(**config["unet"])
        self.modules = nn.ModuleDict({"condition": condition, "unet": unet})
        self.scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="sample")

    def collate(self, items: list[dict], generator: torch.Generator) -> dict:
        batch = training_views.SampleBatch(items, self.augmentation, generator)
        target = shell_occupancy(batch.sdf, self.threshold)[:, None].float() * 2 - 1
        return {"views": batch.views, "target": target, "inputs": batch.inputs}

    def loss(self, batch: dict, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        unet, target = self.modules["unet"], batch["target"]
        size, device = len(target), target.device
        noise = torch.randn(target.shape, generator=generator).to(device)
        timesteps = torch.randint(1000, (size,), generator=generator).to(device)
        noisy = self.scheduler.add_noise(target, noise, timesteps)
        keep = (torch.rand(size, generator=generator) >= self.settings["condition_dropout"]).float().to(device)
        pyramid = [level * keep.view(-1, 1, 1, 1, 1) for level in self.modules["condition"](batch["views"])]
        vector = self.global_vector.dropped(batch["inputs"], keep, self.settings["vector_dropout"], generator)
        previous = None
        if torch.rand((), generator=generator).item() < self.settings["self_condition"]:
            with torch.no_grad():
                previous = unet(noisy, timesteps, pyramid, vector).sample
        prediction = unet(noisy, timesteps, pyramid, vector, previous).sample
        loss = F.mse_loss(prediction, target)
        return loss, {"iou": _iou(prediction.detach() > 0, target > 0)}

    def preview(self, modules: nn.ModuleDict, path: Path) -> None:
        """Shell IoU of one-step predictions on held-out objects, and a sheet of their projections beside the truth."""
        if self.validation is None:
            return
        generator = step_generator(0, 0)
        quiet = {
            **self.augmentation,
            **dict.fromkeys(("mirror", "recolor", "rekey", "blur", "drop_view", "perturb"), 0.0),
        }
        ious, rows = [], []
        for index in range(min(len(self.validation), 64)):
            batch = training_views.SampleBatch([self.validation[index]], quiet, generator)
            target = shell_occupancy(batch.sdf, self.threshold)[:, None]
            noise = torch.randn(target.shape, generator=generator)
            device = modules["unet"].device
            vector = self.global_vector(batch.inputs.to(device))
            pyramid = modules["condition"](batch.views.to(device))
            prediction = modules["unet"](noise.to(device), 999, pyramid, vector).sample.cpu() > 0
            ious.append(_iou(prediction, target))
            if index < 6:
                shades = [grid[0, 0].float().mean(axis).T.flip(0) for grid in (target, prediction) for axis in range(3)]
                rows.append([(255 * (1 - s / s.max().clamp(min=1e-3))).byte().numpy() for s in shades])
        contact_sheet(rows, 128).save(path)
        with open(path.with_name("validation.jsonl"), "a") as log:
            log.write(json.dumps({"step": int(path.stem.split("-")[-1]), "shell_iou": sum(ious) / len(ious)}) + "\n")

    def save(self, modules: nn.ModuleDict, output: Path) -> None:
        modules["condition"].save_pretrained(output / "occupancy_condition")
        modules["unet"].save_pretrained(output / "occupancy_unet")


def _iou(a: Tensor, b: Tensor) -> float:
    return ((a & b).sum() / (a | b).sum().clamp(min=1)).item()


def run(
    config: dict,
    *,
    data: Path,
    output: Path,
    device: str = "auto",
    minutes: float | None = None,
    validation: Path | None = None,
) -> None:
    """Train the occupancy network from a config with keys `unet`, `condition`, `objective`, `views`, `training`.

    Args:
        config: See `configs/occupancy-small.json`.
        data: Folder that `prepare` wrote.
        output: Folder for the components `occupancy_unet` and `occupancy_condition`, logs and checkpoints.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"mps"`.
        minutes: Overrides the config's time limit.
        validation: Prepared folder of held-out objects for previews.
    """
    dataset = PreparedDataset(data)
    cells = dataset.truncation * dataset.meta["resolution"]
    objective = OccupancyObjective(config, cells, PreparedDataset(validation) if validation else None)
    train(objective, dataset, config.get("training", {}), Path(output), device=device, minutes=minutes)
