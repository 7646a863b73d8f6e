"""The multi-view local condition: views and cameras to a pyramid of 3D features, computed once a sample. The UNets consume it.

Axes: B samples, V views, S side of a view, P points, N active voxels, C channels, X Y Z grid.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..errors import InputError
from ..geometry.volume import cell_centers
from .sparse import SparseDownConv3d, SparseGrid
from .unet_sparse import ProjectedPixels
from .view_batch import RGBA, ViewBatch


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEW_FEATURES = ("local", "global", "none")


@torch.no_grad()
def patch_features(
    encoder: nn.Module,
    images: Tensor,  # [B, V, C, S, S] in [-1, 1]
) -> Tensor:
    """Feature maps of a frozen DINOv2 of the colours on grey, `[B, V, C, h, w]`; `S` is a multiple of its patch."""
    patch = encoder.config.patch_size
    if images.shape[-1] % patch:
        raise InputError(f"image_size: {images.shape[-1]} is no multiple of the patch encoder's {patch} pixels.")
    rgb = (images[:, :, :3].flatten(0, 1) + 1) / 2
    mean, std = rgb.new_tensor(IMAGENET_MEAN).view(3, 1, 1), rgb.new_tensor(IMAGENET_STD).view(3, 1, 1)
    tokens = encoder(((rgb - mean) / std).to(encoder.dtype)).last_hidden_state[:, 1:]
    return tokens.mT.unflatten(-1, (images.shape[-1] // patch,) * 2).unflatten(0, images.shape[:2])


class ViewStem(nn.Module):
    """Small convolutional pyramid over a view; details and context meet at half its resolution. `[B, I, S, S] -> [B, C, S/2, S/2]`."""

    def __init__(self, in_channels: int, channels: tuple[int, ...]):
        super().__init__()
        widths = (in_channels, *channels)
        self.down = nn.ModuleList(
            nn.Sequential(
                nn.Conv2d(c_in, c_out, 3, stride=2, padding=1),
                nn.GroupNorm(4, c_out),
                nn.SiLU(),
                nn.Conv2d(c_out, c_out, 3, padding=1),
                nn.SiLU(),
            )
            for c_in, c_out in zip(widths[:-1], widths[1:], strict=True)
        )
        self.up = nn.ModuleList(
            nn.Conv2d(deep + shallow, shallow, 3, padding=1)
            for deep, shallow in zip(channels[:0:-1], channels[-2::-1], strict=True)
        )

    def forward(self, x: Tensor) -> Tensor:
        skips = []
        for block in self.down:
            x = block(x)
            skips.append(x)
        skips.pop()
        for merge in self.up:
            skip = skips.pop()
            x = F.interpolate(x, size=skip.shape[-2:], mode="bilinear", align_corners=False)
            x = F.silu(merge(torch.cat([x, skip], 1)))
        return x


class ConditionEncoder(ModelMixin, ConfigMixin):
    """Features of every view, projected per voxel, through a shared MLP, pooled over views, then a pyramid for every UNet level.

    The first layer of the MLP is linear, so it is applied in image space, before sampling: the result is the same and a view has fewer
    pixels than the grid has voxels.

    Args:
        resolution: Cells along an edge at the finest level.
        channels: Channels of the pyramid, finest level first.
        sparse: Whether the levels are the active voxels of a `SparseGrid` or dense grids.
        image_size: Side the views are resized to, in pixels.
        stem_channels: Widths of the trained convolutional stem, strides 2, 4, ...; empty for none.
        patch_channels: Channels of a pre-trained encoder's patch features (768 for DINOv2-B/14); 0 for none.
        hidden_channels: Width of the shared MLP.
        pooling: `"max"` over views (the paper), or `"max_mean"` for both side by side.
        maps: Extra maps of the views beside RGBA, their channels by name, such as `{"normals": 3}`, the paper's own future work.
        view_features: `"local"`, each voxel's projection (the paper); for ablations `"global"`, the mean over each whole view, the
            same for every voxel, or `"none"`, the voxel's place alone.

    Source: One-2-3-45++ section 3.2, "local condition"; ablations: Table 4.
    """

    _supports_gradient_checkpointing = False

    @register_to_config
    def __init__(
        self,
        resolution: int = 64,
        channels: tuple[int, ...] = (32, 64, 128, 256, 256),
        sparse: bool = False,
        image_size: int = 336,
        stem_channels: tuple[int, ...] = (),
        patch_channels: int = 768,
        hidden_channels: int = 64,
        pooling: str = "max",
        maps: dict[str, int] | None = None,
        view_features: str = "local",
    ):
        super().__init__()
        if view_features not in VIEW_FEATURES:
            raise InputError(f"view_features: got {view_features!r}, expected one of {', '.join(VIEW_FEATURES)}.")
        if pooling not in ("max", "max_mean"):
            raise InputError(f"pooling: got {pooling!r}, expected 'max' or 'max_mean'.")
        self.stem = ViewStem(self.view_channels, tuple(stem_channels)) if stem_channels else None
        # pixels reach the MLP beside the stem's features, so that silhouettes stay sharp
        self.from_pixels = nn.Conv2d(
            self.view_channels + (stem_channels[0] if stem_channels else 0), hidden_channels, 1
        )
        self.from_patches = nn.Conv2d(patch_channels, hidden_channels, 1, bias=False) if patch_channels else None
        self.shared = nn.Linear(hidden_channels, hidden_channels)
        pooled = hidden_channels * (2 if pooling == "max_mean" else 1)
        self.project = nn.Linear(pooled + 3, channels[0])
        down = SparseDownConv3d if sparse else _DenseDown
        self.down = nn.ModuleList(down(a, b) for a, b in zip(channels[:-1], channels[1:], strict=True))

    @classmethod
    def extract_init_dict(cls, config_dict, **kwargs):
        """As `ConfigMixin`'s, also for configs from before maps had names: `view_channels` 7 was RGBA and normals.

        Raises:
            InputError: For an encoder that was told view kinds, which no longer exist, or had other channels.
        """
        config = dict(config_dict)
        channels, kinds = config.pop("view_channels", RGBA), config.pop("view_kinds", False)
        if kinds or channels not in (RGBA, RGBA + 3):
            raise InputError(
                f"ConditionEncoder: its config has view_kinds {kinds} and view_channels {channels}, expected false and {RGBA} or "
                f"{RGBA + 3}. Train it again with this version."
            )
        if channels != RGBA:
            config["maps"] = {"normals": 3}
        return super().extract_init_dict(config, **kwargs)

    @property
    def view_channels(self) -> int:
        """Channels of a view: RGBA, then the maps in the order of their names."""
        return RGBA + sum((self.config.maps or {}).values())

    def forward(self, views: ViewBatch, grid: SparseGrid | None = None) -> list[Tensor]:
        """
        Args:
            views: Views of `B` samples at `image_size`.
            grid: For a sparse encoder, the active voxels of the finest level.

        Returns:
            For each level `[B, C_l, X_l, Y_l, Z_l]`, or `[N_l, C_l]` for a sparse encoder.
        """
        features = self.image_features(views)
        if self.config.sparse:
            points = cell_centers(grid.coords[:, 1:], self.config.resolution)
            rows = _rows_by_sample(grid)
            pooled = [self.pool(features, views, points[index], b) for b, index in enumerate(rows)]
            levels = [F.relu(self.project(_in_callers_order(pooled, rows)))]
            for down in self.down:
                levels.append(F.relu(down(levels[-1], grid)))
                grid = grid.coarser
            return levels
        points, inside = self._grid_points(views.images.device)
        pooled = torch.stack([self.pool(features, views, points, b) for b in range(len(views))])
        finest = F.relu(self.project(pooled))  # [B, P, C]
        volume = finest.new_zeros(len(views), len(inside), finest.shape[-1])
        volume[:, inside] = finest
        levels = [volume.mT.unflatten(-1, [self.config.resolution] * 3)]  # a view: channels last
        for down in self.down:
            levels.append(F.relu(down(levels[-1])))
        return levels

    def image_features(self, views: ViewBatch) -> list[Tensor]:
        """The MLP's first layer in image space: features `[B, V, hidden, h, w]`, to be sampled and summed."""
        channels = views.images.shape[2]
        if channels != self.view_channels:
            raise InputError(
                f"views: have {channels} channels, this encoder takes {self.view_channels}: {RGBA} of colour and alpha, then maps "
                f"{self.config.maps or 'none'}."
            )
        images = views.images.to(self.dtype).flatten(0, 1)
        pixels = images
        if self.stem is not None:
            stem = self.stem(images)
            pixels = torch.cat([F.interpolate(images, size=stem.shape[-2:], mode="area"), stem], 1)
        features = [self.from_pixels(pixels)]
        if self.from_patches is not None:
            if views.patches is None:
                raise InputError("patches: this encoder needs patch features. Give the pipeline its patch_encoder.")
            features.append(self.from_patches(views.patches.to(self.dtype).flatten(0, 1)))
        return [one.unflatten(0, views.images.shape[:2]) for one in features]

    def pool(self, features: list[Tensor], views: ViewBatch, points: Tensor, index: int) -> Tensor:
        """Sample, finish the MLP and pool over the views of one sample: `[P, 3] -> [P, pooled + 3]`, the place last."""
        present, places = views.present[index], points.to(features[0].dtype)
        if self.config.view_features == "none":
            return F.pad(places, (self.project.in_features - 3, 0))
        # channels before points, as `grid_sample` leaves them: no copies, and the MLP is a convolution of size 1
        if self.config.view_features == "local":
            hidden = [views.sample(one[index], points, index).mT for one in features]  # [V, hidden, P] each
        else:
            hidden = [one[index].mean((-2, -1))[..., None].expand(-1, -1, len(points)) for one in features]
        hidden = hidden[0] if len(hidden) == 1 else sum(hidden)
        hidden = F.relu(F.conv1d(F.relu(hidden), self.shared.weight[..., None], self.shared.bias))
        hidden = hidden if present.all() else hidden[present]
        pooled = [hidden.amax(0).mT]
        if self.config.pooling == "max_mean":
            pooled.append(hidden.mean(0).mT)
        return torch.cat([*pooled, places], -1)

    def _grid_points(self, device) -> tuple[Tensor, Tensor]:
        """Centres of the cells that the object's sphere reaches, `[P, 3]`, and which of all cells (x, y, z order) they are."""
        side = self.config.resolution
        axis = torch.arange(side, device=device)
        points = cell_centers(torch.cartesian_prod(axis, axis, axis), side)
        inside = points.norm(dim=-1) < 0.5 + 1 / side
        return points[inside], inside


class _DenseDown(nn.Conv3d):
    """The dense twin of `SparseDownConv3d`."""

    def __init__(self, in_channels: int, out_channels: int):
        super().__init__(in_channels, out_channels, 2, stride=2)


def project_pixels(views: ViewBatch, grid: SparseGrid, image_weight: Tensor | None = None) -> ProjectedPixels:
    """The colour every view shows at every active voxel, for the sparse UNet's last layer.

    Args:
        views: `B` samples of `V` views.
        grid: `N` voxels of those samples.
        image_weight: `[B]`, multiplies the validity (0 drops the condition of a sample).
    """
    colors, directions, valid, rows = [], [], [], _rows_by_sample(grid)
    for b, index in enumerate(rows):
        points = cell_centers(grid.coords[index, 1:], grid.resolution)
        seen = views.sample(views.images[b], points, b)  # [V, P, C]; outside an image all are 0
        alpha = ((seen[..., 3] + 1) / 2).clamp(0, 1)
        inside = views.sample(torch.ones_like(views.images[b, :, :1]), points, b)[..., 0]
        alpha = alpha * inside * views.present[b, :, None]
        colors.append((seen[..., :3] / alpha[..., None].clamp(min=0.1)).clamp(-1, 1).transpose(0, 1))
        directions.append(views.directions(points, b).transpose(0, 1))
        valid.append(alpha.mT if image_weight is None else alpha.mT * image_weight[b])
    return ProjectedPixels(*(_in_callers_order(parts, rows) for parts in (colors, directions, valid)))


def _rows_by_sample(grid: SparseGrid) -> list[Tensor]:
    """The rows of each sample's voxels, `[N_b]` indices each."""
    return [(grid.sample_index == b).nonzero()[:, 0] for b in range(grid.batch_size)]


def _in_callers_order(parts: list[Tensor], rows: list[Tensor]) -> Tensor:
    """What was computed a sample, `[N_b, ...]` each, as rows of the grid; without a copy more where those are sorted by sample."""
    values, rows = torch.cat(parts), torch.cat(rows)
    return values if (rows.diff() > 0).all() else values[rows.argsort()]
