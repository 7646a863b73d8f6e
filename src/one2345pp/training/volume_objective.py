"""What the trainings of the two volume networks share: settings, first weights, conditions, dropout, the run. Losses are their own."""

# B samples, G channels of the global vector

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import torch
from accelerate import PartialState
from diffusers import DDPMScheduler, ModelMixin
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import Dataset
from transformers import CLIPImageProcessor, CLIPVisionModelWithProjection, Dinov2Model

from ..data.dataset import PreparedDataset
from ..data.maps import MAPS
from ..errors import InputError
from ..models.condition_encoder import ConditionEncoder, patch_features
from ..models.global_vector import global_vector
from ..models.view_batch import ViewBatch
from .components import start_from
from .config import arguments_of, check_keys, read
from .drawn_views import DrawnViewsDataset
from .loop import LoopSettings, train
from .views import SampleBatch, ViewSettings


@dataclass(frozen=True)
class VolumeSettings:
    """What both networks are taught."""

    occupancy_threshold: float = 1.25  # cells of the fine grid: a coarse cell is occupied when it holds a nearer centre
    condition_dropout: float = 0.1
    first_step: float = 0.0  # probability of pure noise, where sampling starts; one-step models need little else
    vector_dropout: float = 0.2  # of the global vector alone: views may come without their input picture
    multiview: str | None = None  # folder of a first stage: it draws, and its image encoder gives the global vector
    drawn_samples: int = 0  # samples whose views the first stage draws, see `drawn_views`
    drawn_steps: int = 10  # denoising steps for each
    patch_encoder: str | None = None  # folder or Hub id of a DINOv2, for condition encoders with patch_channels
    initial: str | None = None  # folder of a checkpoint whose weights to start from


@dataclass(frozen=True)
class VolumeConfig:
    """A config of either network."""

    unet: dict  # arguments of the network
    condition: dict  # arguments of its `ConditionEncoder`, but for `sparse`
    objective: VolumeSettings = field(default_factory=VolumeSettings)
    views: ViewSettings = field(default_factory=ViewSettings)
    training: LoopSettings = field(default_factory=LoopSettings)


class VolumeObjective:
    """Common ground of the objectives: `modules` holds `condition` and `unet`, `scheduler` noises.

    Args:
        config: The keys of `config_class`, as JSON has them.
        truncation_cells: The data's truncation distance in cells of its volumes.
        validation: Held-out samples for previews, a `DrawnViewsDataset` to have figures of drawn views, too.
    """

    stage = ""  # components are called STAGE_condition and STAGE_unet
    folders: tuple[str, ...] = ("multiview", "initial")  # settings that name one
    config_class: type[VolumeConfig]
    unet_class: type[ModelMixin]

    def __init__(self, config: dict, truncation_cells: float, validation: Dataset | None = None):
        self.config = read(self.config_class, config)
        self.settings = self.config.objective
        self._check()
        self.threshold = self.settings.occupancy_threshold / truncation_cells
        self.validation = validation
        self.vision_encoder = self.feature_extractor = self.patch_encoder = None
        if (folder := self.settings.multiview) is not None:
            self.vision_encoder = CLIPVisionModelWithProjection.from_pretrained(folder, subfolder="vision_encoder")
            self.vision_encoder.eval().requires_grad_(False)
            self.feature_extractor = CLIPImageProcessor.from_pretrained(folder, subfolder="feature_extractor_clip")
        if self.settings.patch_encoder is not None:
            self.patch_encoder = Dinov2Model.from_pretrained(self.settings.patch_encoder)
            self.patch_encoder.eval().requires_grad_(False)
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(self.config.training.seed)
            condition = ConditionEncoder(**self.config.condition, sparse=self.stage == "sparse")
            unet = self.unet_class(**self.config.unet)
        self.modules = nn.ModuleDict({"condition": condition, "unet": unet})
        for name, module in self.modules.items():
            start_from(self.settings.initial, f"{self.stage}_{name}", module)
        self.scheduler = DDPMScheduler(beta_start=1e-4, beta_end=0.02, beta_schedule="linear", prediction_type="sample")

    def _check(self) -> None:
        """Raise `InputError` for what the config's types do not say."""
        check_keys(self.config.unet, arguments_of(self.unet_class), "config.unet")
        check_keys(self.config.condition, set(arguments_of(ConditionEncoder)) - {"sparse"}, "config.condition")
        for name, channels in (self.config.condition.get("maps") or {}).items():
            if name not in MAPS or MAPS[name].channels != channels:
                known = ", ".join(f"{name} of {known.channels}" for name, known in MAPS.items())
                raise InputError(f"config.condition.maps: got {name} of {channels} channels, expected some of {known}.")
            if self.settings.drawn_samples:
                raise InputError(
                    f"config.condition.maps: drawn views have no {name}. Set drawn_samples to 0, or maps to null."
                )
        for key in self.folders:
            folder = getattr(self.settings, key)
            if folder is not None and not Path(folder).is_dir():
                raise InputError(
                    f"config.objective.{key}: there is no folder {folder}. Train that network first, or null."
                )
        if self.settings.drawn_samples and self.settings.multiview is None:
            raise InputError(
                "config.objective: drawn_samples needs multiview, the folder of a first stage that draws them."
            )

    def samples(self, items: list[dict], settings: ViewSettings, generator: torch.Generator) -> SampleBatch:
        """Items as the condition encoder takes them."""
        taken = self.modules["condition"].config
        return SampleBatch(items, settings, taken.image_size, taken.maps or {}, generator)

    def condition(self, views: ViewBatch, *grid) -> list[Tensor]:
        """The condition pyramid of views."""
        self.add_patches(views)
        return self.modules["condition"](views, *grid)

    def add_patches(self, views: ViewBatch) -> None:
        """Give views the features of the patch encoder, if there is one and they lack them."""
        if self.patch_encoder is not None and views.patches is None:
            views.patches = patch_features(self.patch_encoder.to(views.images.device), views.images)

    def vector(self, pictures: list[Image.Image], device: torch.device) -> Tensor | None:
        """The global vectors of input pictures, `[B, G]`, or `None` without an image encoder."""
        if self.vision_encoder is None:
            return None
        return global_vector(self.vision_encoder.to(device), self.feature_extractor, pictures, device)

    def dropped_vector(
        self,
        pictures: list[Image.Image],
        keep: Tensor,  # [B]
        generator: torch.Generator,
    ) -> Tensor | None:
        """The vectors, zero where the whole condition is dropped and for a share `vector_dropout` of the others."""
        vector = self.vector(pictures, keep.device)
        if vector is None:
            return None
        own = (torch.rand(len(keep), generator=generator) >= self.settings.vector_dropout).to(keep)
        return vector * (keep * own)[:, None]

    def timesteps(self, count: int, generator: torch.Generator, device) -> Tensor:
        """Uniform in [0, 1000), or the last one with the probability `first_step`, `[count]`."""
        drawn = torch.randint(1000, (count,), generator=generator)
        if self.settings.first_step:
            drawn[torch.rand(count, generator=generator) < self.settings.first_step] = 999
        return drawn.to(device)

    def kept(self, count: int, generator: torch.Generator, device) -> Tensor:
        """0 for samples whose condition is dropped, 1 for the others, `[count]`."""
        return (torch.rand(count, generator=generator) >= self.settings.condition_dropout).float().to(device)

    @property
    def held_out_views(self) -> tuple[str, ...]:
        """Endings of the figures' names for what `held_out` can show: nothing for true views, `"_drawn"` for drawn ones."""
        return ("", "_drawn") if isinstance(self.validation, DrawnViewsDataset) else ("",)

    def held_out(self, count: int, generator: torch.Generator, views: str = ""):
        """At most `count` held-out samples, spread over the set, one by one, as their true or drawn views show them."""
        still, count = self.config.views.still(drawn=bool(views)), min(len(self.validation), count)
        for index in range(count):
            yield self.samples([self.validation[index * len(self.validation) // count]], still, generator)

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
        config: See `VolumeConfig`.
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
    if settings.drawn_samples:
        processes = PartialState(cpu=device == "cpu")  # one, unless a launcher has started several

        def with_drawn(prepared: PreparedDataset, folder: str, count: int) -> DrawnViewsDataset:
            options = {"steps": settings.drawn_steps, "device": processes.device}
            return DrawnViewsDataset(prepared, settings.multiview, Path(output) / folder, count, **options)

        with processes.main_process_first():  # it draws, the others find the files
            dataset = with_drawn(dataset, "drawn", settings.drawn_samples)
            if objective.validation is not None:
                objective.validation = with_drawn(objective.validation, "drawn-validation", len(objective.validation))
    train(objective, dataset, objective.config.training, Path(output), device=device, minutes=minutes)
