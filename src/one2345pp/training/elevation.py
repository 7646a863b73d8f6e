"""Training of the elevation estimator on the input pictures of prepared samples. The loop lives in `training.loop`."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..data.dataset import PreparedDataset
from ..data.prepare import NADIR
from ..errors import InputError
from ..geometry.render import contact_sheet
from ..models.elevation import ElevationEstimator
from .config import arguments_of, check_keys, read
from .loop import LoopSettings, log_validation, step_generator, train


SHEET = 6  # held-out pictures across and down a preview


@dataclass(frozen=True)
class ElevationSettings:
    """How pictures are chosen and changed."""

    pictures: int = 6  # of each sample in a batch, where it has so many
    mirror: float = 0.5  # probability
    recolor: float = 0.5  # probability of permuting the colour channels
    gain: float = 0.3  # most that colours are multiplied or their gamma changed by, as a share
    zoom: float = 0.12  # most that the object is larger or smaller than framed, as a share
    shift: float = 0.06  # most that it lies beside the middle, in half sides


@dataclass(frozen=True)
class ElevationConfig:
    """A config of the elevation estimator."""

    estimator: dict  # arguments of `ElevationEstimator`
    objective: ElevationSettings = field(default_factory=ElevationSettings)
    training: LoopSettings = field(default_factory=LoopSettings)


class ElevationObjective:
    """Cross-entropy with the two elevations nearest to the true one, weighted such that they average to it.

    Args:
        config: The keys of `ElevationConfig`, as JSON has them.
        validation: Held-out samples for figures and previews.
    """

    def __init__(self, config: dict, validation: PreparedDataset | None = None):
        self.config = read(ElevationConfig, config)
        self.settings = self.config.objective
        check_keys(self.config.estimator, arguments_of(ElevationEstimator), "config.estimator")
        self.validation = validation
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.training.seed)
            self.modules = nn.ModuleDict({"elevation_estimator": ElevationEstimator(**self.config.estimator)})

    def collate(self, items: list[dict], generator: torch.Generator) -> dict:
        pictures, elevations = [], []
        for item in items:
            own, angles = labelled_pictures(item)
            chosen = torch.randperm(len(own), generator=generator)[: self.settings.pictures]
            pictures.append(own[chosen])
            elevations.append(angles[chosen])
        pictures = self.resized(torch.cat(pictures))
        return {"pictures": self.augmented(pictures, generator), "elevations": torch.cat(elevations)}

    def resized(
        self,
        pictures: Tensor,  # [B, S, S, 4] uint8
    ) -> Tensor:
        """Pictures as the network takes them, `[B, 4, S, S]` in [0, 1]."""
        return to_size(pictures, self.modules["elevation_estimator"].config.image_size)

    def augmented(
        self,
        pictures: Tensor,  # [B, 4, S, S]
        generator: torch.Generator,
    ) -> Tensor:
        """Copies, mirrored, recoloured, lighter or darker, not quite framed: what changes a picture and not its elevation."""
        count, settings = len(pictures), self.settings

        def uniform(*shape: int) -> Tensor:
            return 2 * torch.rand(count, *shape, generator=generator) - 1

        def some(share: float) -> Tensor:
            return torch.rand(count, generator=generator) < share

        pictures = pictures.clone()
        mirrored, recolored = some(settings.mirror), some(settings.recolor)
        pictures[mirrored] = pictures[mirrored].flip(-1)
        order = [*torch.randperm(3, generator=generator).tolist(), 3]
        pictures[recolored] = pictures[recolored][:, order]
        gain, gamma = 1 + settings.gain * uniform(1, 1, 1), 1 + settings.gain * uniform(1, 1, 1)
        alpha = pictures[:, 3:]
        rgb = (gain * pictures[:, :3].clamp(1e-3, 1) ** gamma).clamp(0, 1) * alpha
        affine = torch.zeros(count, 2, 3)
        affine[:, [0, 1], [0, 1]] = 1 + settings.zoom * uniform(1)
        affine[:, :, 2] = settings.shift * uniform(2)
        grid = F.affine_grid(affine, list(pictures.shape), align_corners=False)
        moved = F.grid_sample(torch.cat([rgb, alpha], 1), grid, align_corners=False)
        return torch.cat([moved[:, :3] / moved[:, 3:].clamp(min=1e-3), moved[:, 3:]], 1)

    def loss(self, batch: dict, generator: torch.Generator) -> tuple[Tensor, dict[str, float]]:
        estimator, elevations = self.modules["elevation_estimator"], batch["elevations"]
        logits = estimator(batch["pictures"])
        loss = F.cross_entropy(logits, estimator.targets(elevations))
        error = logits.detach().float().softmax(-1) @ estimator.bins.to(elevations) - elevations
        return loss, {"degrees": error.abs().mean().item()}

    def preview(self, modules: nn.ModuleDict, path: Path) -> None:
        """Mean error on held-out pictures, and a sheet of some of them in the order of their estimates, lowest first."""
        if self.validation is None:
            return
        estimator = modules["elevation_estimator"]
        pictures, elevations, estimates = [], [], []
        for index in range(len(self.validation)):
            own, angles = labelled_pictures(self.validation[index])
            estimates.append(estimator.estimate(self.resized(own).to(estimator.device)).cpu())
            elevations.append(angles)
            pictures.append(own)
        estimates, elevations, pictures = torch.cat(estimates), torch.cat(elevations), torch.cat(pictures)
        errors = estimates - elevations
        shown = torch.randperm(len(errors), generator=step_generator(0, 0))[: SHEET**2]
        shown = shown[estimates[shown].argsort()].tolist()
        rows = [[pictures[i].numpy() for i in shown[j : j + SHEET]] for j in range(0, len(shown), SHEET)]
        contact_sheet(rows, 128).save(path)
        guess = (elevations.median() - elevations).abs().mean().item()  # of somebody who does not look
        log_validation(path, degrees=errors.abs().mean().item(), degrees_of_the_median=guess)

    def save(self, modules: nn.ModuleDict, output: Path) -> None:
        """`elevation_estimator/`."""
        modules["elevation_estimator"].save_pretrained(output / "elevation_estimator")


def labelled_pictures(item: dict) -> tuple[Tensor, Tensor]:
    """Input pictures of a prepared frame or ring, `[I, S, S, 4]` uint8, and the elevation of each in degrees, `[I]`."""
    if "elevations" not in item:
        raise InputError(f"{item['name']}: its sample says no elevations. Make the data set again: one2345pp prepare")
    return item["inputs"].flatten(0, -4), item["elevations"].flatten().float() + NADIR


def to_size(pictures: Tensor, size: int) -> Tensor:
    """RGBA pictures `[B, S, S, 4]` uint8 as `[B, 4, size, size]` in [0, 1], straight alpha."""
    pictures = pictures.movedim(-1, 1).float() / 255
    if pictures.shape[-1] != size:
        alpha = pictures[:, 3:]
        # Premultiplied, so that colours of transparent pixels do not bleed into the edge.
        whole = torch.cat([pictures[:, :3] * alpha, alpha], 1)
        whole = F.interpolate(whole, size=(size, size), mode="bilinear", antialias=True, align_corners=False)
        pictures = torch.cat([whole[:, :3] / whole[:, 3:].clamp(min=1e-3), whole[:, 3:]], 1).clamp(0, 1)
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
    """Train an estimator from a config such as `configs/elevation-small.json`; arguments as those of `volume_objective.run`."""
    objective = ElevationObjective(config, PreparedDataset(validation) if validation else None)
    train(objective, PreparedDataset(data), objective.config.training, Path(output), device=device, minutes=minutes)
