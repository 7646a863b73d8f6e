"""The multi-view local condition: views and cameras to a pyramid of 3D features, computed once a sample. The UNets consume it.

Axes: B samples, V views, S side of a view, P points, N active voxels, C channels, X Y Z grid.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from diffusers import ConfigMixin, ModelMixin
from diffusers.configuration_utils import register_to_config
from torch import Tensor, nn

from ..errors import InputError
from ..geometry.cameras import CameraRig, project_points
from ..geometry.volume import cell_centers
from .sparse import SparseDownConv3d, SparseGrid
from .unet_sparse import ProjectedPixels


IMAGENET_MEAN, IMAGENET_STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)
VIEW_FEATURES = ("local", "global", "none")
GIVEN, DRAWN, PICTURE = VIEW_KINDS = ("given", "drawn", "picture")


@dataclass
class ViewBatch:
    """Views of a batch of samples with their cameras.

    Args:
        images: `[B, V, C, S, S]` in [-1, 1]: colour composited on mid grey (0), then alpha, then what else the encoder's
            `view_channels` are: normals, 0 outside the object.
        world_to_camera: `[B, V, 4, 4]`
        tan_half_fov: `[B, V]`
        present: `[B, V]` bool, false for padding.
        patches: Feature maps of a pre-trained encoder (DINOv2), `[B, V, C, h, w]`, or `None`.
        kinds: What each view is, a number in `VIEW_KINDS`, `[B, V]` int64: a picture of the object that was given, one that a first
            stage drew, or the input picture that it drew them of. `None`: all were given.
    """

    images: Tensor
    world_to_camera: Tensor
    tan_half_fov: Tensor
    present: Tensor
    patches: Tensor | None = None
    kinds: Tensor | None = None

    @classmethod
    def make(cls, images: Tensor, rigs: list[CameraRig], patches: Tensor | None = None) -> ViewBatch:
        """All views present, one rig a sample."""
        return cls(
            images,
            torch.stack([rig.world_to_camera for rig in rigs]).to(images.device),
            torch.stack([rig.tan_half_fov for rig in rigs]).to(images.device),
            torch.ones(images.shape[:2], dtype=torch.bool, device=images.device),
            patches,
        )

    def __len__(self) -> int:
        return len(self.images)

    @property
    def kind_numbers(self) -> Tensor:
        """`kinds`, or those of views that all were given."""
        return torch.zeros_like(self.present, dtype=torch.long) if self.kinds is None else self.kinds

    def to(self, device) -> ViewBatch:
        return ViewBatch(*(None if value is None else value.to(device) for value in vars(self).values()))

    def sample(self, maps: Tensor, points: Tensor, index: int) -> Tensor:
        """Read feature maps of sample `index` where its cameras see points: `[V, C, h, w]`, `[P, 3]` to `[V, P, C]`; 0 outside."""
        uv, depth = project_points(points, self.world_to_camera[index], self.tan_half_fov[index])
        uv = torch.where(depth[..., None] > 0, uv, 2.0)  # behind a camera is outside its image
        precise = torch.promote_types(maps.dtype, torch.float32)  # in half precision a place would be half a pixel off
        values = F.grid_sample(maps.to(precise), uv[:, None].to(precise), align_corners=False)
        return values[:, :, 0].mT.to(maps.dtype)


def views_to_images(views: Tensor) -> Tensor:
    """Straight-alpha RGBA in [0, 1], and normals in the same range if any, `[..., 4 or 7, S, S]`, to the encoder's images."""
    alpha = views[..., 3:4, :, :]
    values = (views * 2 - 1) * alpha
    return torch.cat([values[..., :3, :, :], alpha * 2 - 1, values[..., 4:, :, :]], -3)


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
        view_channels: 4 for RGBA, 7 with the views' normals, the paper's own future work.
        view_kinds: Whether what kind each view is, see `ViewBatch`, is told: by a bias of each kind in the shared MLP, and the input
            picture, the only view that is no guess where the others are, is not pooled with them but stands apart. Not of the paper.
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
        view_channels: int = 4,
        view_features: str = "local",
        view_kinds: bool = False,
    ):
        super().__init__()
        if view_features not in VIEW_FEATURES:
            raise InputError(f"view_features: got {view_features!r}, expected one of {', '.join(VIEW_FEATURES)}.")
        if pooling not in ("max", "max_mean"):
            raise InputError(f"pooling: got {pooling!r}, expected 'max' or 'max_mean'.")
        self.stem = ViewStem(view_channels, tuple(stem_channels)) if stem_channels else None
        # pixels reach the MLP beside the stem's features, so that silhouettes stay sharp
        self.from_pixels = nn.Conv2d(view_channels + (stem_channels[0] if stem_channels else 0), hidden_channels, 1)
        self.from_patches = nn.Conv2d(patch_channels, hidden_channels, 1, bias=False) if patch_channels else None
        self.shared = nn.Linear(hidden_channels, hidden_channels)
        pooled = hidden_channels * (2 if pooling == "max_mean" else 1)
        # kinds and the picture come last and begin at zero, so that weights that were trained without begin as good as they were
        self.kind_bias = nn.Embedding(len(VIEW_KINDS), 2 * hidden_channels) if view_kinds else None
        self.project = nn.Linear(pooled + 3 + (hidden_channels if view_kinds else 0), channels[0])
        if view_kinds:
            nn.init.zeros_(self.kind_bias.weight)
            nn.init.zeros_(self.project.weight[:, pooled + 3 :])
        down = SparseDownConv3d if sparse else _DenseDown
        self.down = nn.ModuleList(down(a, b) for a, b in zip(channels[:-1], channels[1:], strict=True))

    def forward(self, views: ViewBatch, grid: SparseGrid | None = None) -> list[Tensor]:
        """
        Args:
            views: Views of `B` samples at `image_size`.
            grid: For a sparse encoder, the active voxels of the finest level.

        Returns:
            For each level `[B, C_l, X_l, Y_l, Z_l]`, or `[N_l, C_l]` for a sparse encoder.
        """
        maps = self.feature_maps(views)
        if self.config.sparse:
            points = cell_centers(grid.coords[:, 1:], self.config.resolution)
            rows = _rows_by_sample(grid)
            pooled = [self.pool(maps, views, points[index], b) for b, index in enumerate(rows)]
            levels = [F.relu(self.project(_in_callers_order(pooled, rows)))]
            for down in self.down:
                levels.append(F.relu(down(levels[-1], grid)))
                grid = grid.coarser
            return levels
        points, inside = self._grid_points(views.images.device)
        pooled = torch.stack([self.pool(maps, views, points, b) for b in range(len(views))])
        features = F.relu(self.project(pooled))  # [B, P, C]
        volume = features.new_zeros(len(views), len(inside), features.shape[-1])
        volume[:, inside] = features
        levels = [volume.mT.unflatten(-1, [self.config.resolution] * 3)]  # a view: channels last
        for down in self.down:
            levels.append(F.relu(down(levels[-1])))
        return levels

    def feature_maps(self, views: ViewBatch) -> list[Tensor]:
        """The MLP's first layer in image space: maps `[B, V, hidden, h, w]`, to be sampled and summed."""
        channels = views.images.shape[2]
        if channels != self.config.view_channels:
            raise InputError(
                f"views: have {channels} channels, this encoder takes {self.config.view_channels}: 4 are colour and alpha, "
                "7 have normals, too."
            )
        images = views.images.to(self.dtype).flatten(0, 1)
        pixels = images
        if self.stem is not None:
            features = self.stem(images)
            pixels = torch.cat([F.interpolate(images, size=features.shape[-2:], mode="area"), features], 1)
        maps = [self.from_pixels(pixels)]
        if self.from_patches is not None:
            if views.patches is None:
                raise InputError("patches: this encoder needs patch features. Give the pipeline its patch_encoder.")
            maps.append(self.from_patches(views.patches.to(self.dtype).flatten(0, 1)))
        maps = [m.unflatten(0, views.images.shape[:2]) for m in maps]
        if self.kind_bias is not None:
            maps[0] = maps[0] + self.kind_bias(views.kind_numbers).chunk(2, -1)[0][..., None, None]
        return maps

    def pool(self, maps: list[Tensor], views: ViewBatch, points: Tensor, index: int) -> Tensor:
        """Sample, finish the MLP and pool over the views of one sample, for `project`: `[P, 3] -> [P, pooled + 3 (+ hidden)]`.

        The pooled views, the place, and where kinds are told the picture, zero without one.
        """
        present, places = views.present[index], points.to(maps[0].dtype)
        if self.config.view_features == "none":
            features = F.pad(places, (self.config.hidden_channels * (2 if self.config.pooling == "max_mean" else 1), 0))
            return F.pad(features, (0, self.project.in_features - features.shape[-1]))
        # channels before points, as `grid_sample` leaves them: no copies, and the MLP is a convolution of size 1
        if self.config.view_features == "local":
            hidden = [views.sample(m[index], points, index).mT for m in maps]  # [V, hidden, P] each
        else:
            hidden = [m[index].mean((-2, -1))[..., None].expand(-1, -1, len(points)) for m in maps]
        hidden = hidden[0] if len(hidden) == 1 else sum(hidden)
        hidden = F.conv1d(F.relu(hidden), self.shared.weight[..., None], self.shared.bias)
        picture = []
        if self.kind_bias is not None:
            kinds = views.kind_numbers[index]
            hidden = hidden + self.kind_bias(kinds).chunk(2, -1)[1][..., None]
            is_picture = kinds == VIEW_KINDS.index(PICTURE)
            picture = [F.relu(hidden[present & is_picture]).sum(0).mT]  # of one at most
            present = present & ~is_picture
        hidden = F.relu(hidden if present.all() else hidden[present])
        pooled = [hidden.amax(0).mT]
        if self.config.pooling == "max_mean":
            pooled.append(hidden.mean(0).mT)
        return torch.cat([*pooled, places, *picture], -1)

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
        seen = views.sample(views.images[b], points, b)  # [V, P, 4]; outside an image all are 0
        alpha = ((seen[..., 3] + 1) / 2).clamp(0, 1)
        inside = views.sample(torch.ones_like(views.images[b, :, :1]), points, b)[..., 0]
        alpha = alpha * inside * views.present[b, :, None]
        rotation, translation = views.world_to_camera[b, :, :3, :3], views.world_to_camera[b, :, :3, 3]
        position = -torch.einsum("vij,vi->vj", rotation, translation)
        direction = F.normalize(position[:, None] - points, dim=-1)
        colors.append((seen[..., :3] / alpha[..., None].clamp(min=0.1)).clamp(-1, 1).transpose(0, 1))
        directions.append(direction.transpose(0, 1))
        valid.append(alpha.mT if image_weight is None else alpha.mT * image_weight[b])
    return ProjectedPixels(*(_in_callers_order(parts, rows) for parts in (colors, directions, valid)))


def _rows_by_sample(grid: SparseGrid) -> list[Tensor]:
    """The rows of each sample's voxels, `[N_b]` indices each."""
    return [(grid.sample_index == b).nonzero()[:, 0] for b in range(grid.batch_size)]


def _in_callers_order(parts: list[Tensor], rows: list[Tensor]) -> Tensor:
    """What was computed a sample, `[N_b, ...]` each, as rows of the grid; without a copy more where those are sorted by sample."""
    values, rows = torch.cat(parts), torch.cat(rows)
    return values if (rows.diff() > 0).all() else values[rows.argsort()]
