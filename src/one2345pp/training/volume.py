"""What the trainings of the two volume networks share: settings, first weights, dropout, the run. Losses live beside it."""

from __future__ import annotations

from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DDPMScheduler, ModelMixin
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import Dinov2Model

from ..data.dataset import PreparedDataset
from ..errors import InputError
from ..models.condition_encoder import ConditionEncoder, ViewBatch, patch_features
from . import views as training_views
from .components import start_from
from .drawn_views import DrawnViewsDataset
from .global_vector import GlobalVector
from .loop import train


DEFAULTS = {
    "occupancy_threshold": 1.25,  # cells of the fine grid: a coarse cell is occupied when it holds a nearer centre
    "condition_dropout": 0.1,
    "first_step": 0.0,  # probability of pure noise, where sampling starts; else t is uniform. One-step models need little else
    "vector_dropout": 0.2,  # of the global vector alone: views may come without their input picture
    "multiview": None,  # folder of a first stage: its image encoder gives the global vector, and it draws the drawn views
    "drawn_samples": 0,  # samples whose views the first stage draws, see `drawn_views`
    "drawn_steps": 10,  # denoising steps for each
    "patch_encoder": None,  # folder or Hub id of a DINOv2, for condition encoders with patch_channels
    "initial": None,  # folder of a checkpoint whose weights to start from
}


class VolumeObjective:
    """Common ground of the objectives: `modules` holds `condition` and `unet`, `scheduler` noises.

    Args:
        config: Keys `unet`, `condition`, `objective` (see `DEFAULTS`), `views` (see `training.views`) and `training`.
        truncation_cells: The data's truncation distance in cells of its volumes.
        validation: Held-out samples for previews, a `DrawnViewsDataset` to have figures of drawn views, too.
    """

    stage = ""  # components are called STAGE_condition and STAGE_unet
    defaults: dict = {}
    unet_class: type[ModelMixin]

    def __init__(self, config: dict, truncation_cells: float, validation: Dataset | None = None):
        known = {**DEFAULTS, **self.defaults}
        unknown = set(config.get("objective", {})) - set(known)
        if unknown:
            raise InputError(f"config: objective has unknown keys {sorted(unknown)}. Known: {', '.join(known)}.")
        self.settings = {**known, **config.get("objective", {})}
        for key in ("multiview", "occupancy", "initial"):
            folder = self.settings.get(key)
            if folder is not None and not Path(folder).is_dir():
                raise InputError(
                    f"config: objective.{key}: there is no folder {folder}. Train that network first, or null."
                )
        self.augmentation = {**training_views.DEFAULTS, **config.get("views", {})}
        self.threshold = self.settings["occupancy_threshold"] / truncation_cells
        self.validation = validation
        self.global_vector = GlobalVector(self.settings["multiview"])
        self.patch_encoder = None
        if self.settings["patch_encoder"] is not None:
            self.patch_encoder = Dinov2Model.from_pretrained(self.settings["patch_encoder"])
            self.patch_encoder.eval().requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(config.get("training", {}).get("seed", 0))
            condition = ConditionEncoder(**config["condition"], sparse=self.stage == "sparse")
            unet = self.unet_class(**config["unet"])
        self.modules = nn.ModuleDict({"condition": condition, "unet": unet})
        for name, module in self.modules.items():
            start_from(self.settings["initial"], f"{self.stage}_{name}", module)
        self.scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="sample")

    def add_patches(self, views: ViewBatch) -> None:
        """Give views the features of the patch encoder, if there is one and they lack them."""
        if self.patch_encoder is not None and views.patches is None:
            views.patches = patch_features(self.patch_encoder.to(views.images.device), views.images)

    def condition(self, views: ViewBatch, *grid) -> list[Tensor]:
        """The condition pyramid of views."""
        self.add_patches(views)
        return self.modules["condition"](views, *grid)

    def timesteps(self, count: int, generator: torch.Generator, device) -> Tensor:
        """Uniform in [0, 1000), or the last one with the probability `first_step`, `[count]`."""
        drawn = torch.randint(1000, (count,), generator=generator)
        if self.settings["first_step"]:
            drawn[torch.rand(count, generator=generator) < self.settings["first_step"]] = 999
        return drawn.to(device)

    def kept(self, count: int, generator: torch.Generator, device) -> Tensor:
        """0 for samples whose condition is dropped, 1 for the others, `[count]`."""
        return (torch.rand(count, generator=generator) >= self.settings["condition_dropout"]).float().to(device)

    @property
    def held_out_views(self) -> tuple[str, ...]:
        """Endings of the figures' names for what `held_out` can show: nothing for true views, `"_drawn"` for drawn ones."""
        return ("", "_drawn") if isinstance(self.validation, DrawnViewsDataset) else ("",)

    def held_out(self, count: int, generator: torch.Generator, views: str = ""):
        """At most `count` held-out samples, spread over the set, one by one, as their true or drawn views show them."""
        still = {**self.augmentation, **dict.fromkeys(training_views.CHANCES, 0.0)}
        if views:
            still |= {"drawn": 1.0, "picture": 1.0}
        count = min(len(self.validation), count)
        for index in range(count):
            yield training_views.SampleBatch([self.validation[index * len(self.validation) // count]], still, generator)

    def save(self, modules: nn.ModuleDict, output: Path) -> None:
        """`STAGE_condition/` and `STAGE_unet/`."""
        for name, module in modules.items():
            module.save_pretrained(output / f"{self.stage}_{name}")


def run(
    objective_class: type[VolumeObjective],
    config: dict,
    *,
    data: Path,
    output: Path,
    device: str = "auto",
    minutes: float | None = None,
    validation: Path | None = None,
) -> None:
    """Train a volume network from a config such as `configs/occupancy-small.json`.

    Args:
        objective_class: Which network.
        config: See `VolumeObjective`.
        data: Folder that `prepare` wrote.
        output: Folder for the components, logs and checkpoints.
        device: `"auto"`, `"cpu"`, `"cuda"` or `"mps"`.
        minutes: Overrides the config's time limit.
        validation: Prepared folder of held-out objects for previews.
    """
    dataset = PreparedDataset(data)
    cells = dataset.truncation * dataset.meta["resolution"]
    objective = objective_class(config, cells, PreparedDataset(validation) if validation else None)
    settings = objective.settings
    if settings["drawn_samples"]:
        if settings["multiview"] is None:
            raise InputError("config: drawn_samples needs multiview, the folder of a first stage that draws them.")

        processes = PartialState(cpu=device == "cpu")  # one, unless a launcher has started several

        def with_drawn(prepared: PreparedDataset, folder: str, count: int) -> DrawnViewsDataset:
            options = {"steps": settings["drawn_steps"], "device": processes.device}
            return DrawnViewsDataset(prepared, settings["multiview"], Path(output) / folder, count, **options)

        with processes.main_process_first():  # it draws, the others find the files
            dataset = with_drawn(dataset, "drawn", settings["drawn_samples"])
            if objective.validation is not None:
                objective.validation = with_drawn(objective.validation, "drawn-validation", len(objective.validation))
    train(objective, dataset, config.get("training", {}), Path(output), device=device, minutes=minutes)
