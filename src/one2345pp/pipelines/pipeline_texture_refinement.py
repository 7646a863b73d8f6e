"""Stage 3: a mesh and pictures of it to the same mesh with a texture. Nothing moves; dense meshes are decimated first,
and open ones closed on request.

A colour field is fitted to the views where they see the surface and baked; what no view sees keeps the mesh's colours.
"""

# V views, R raster pixels along an edge, P points

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
import trimesh
from diffusers import DiffusionPipeline
from diffusers.utils import replace_example_docstring
from PIL import Image
from torch import Tensor

from ..errors import InputError
from ..geometry.atlas import Atlas, pad_texture, texel_samples, unwrap
from ..geometry.cameras import CameraRig
from ..geometry.extract import finish_mesh
from ..geometry.mesh import surface_colors
from ..geometry.rasterize import rasterize
from ..geometry.views import Views
from ..geometry.visibility import SurfaceSamples, Visibility
from ..models.color_field import ColorField
from ..names import TEXTURE_SIZES
from .callbacks import end_step, tensor_names
from .hub import SelfContainedMixin
from .picture.isolate import cut_out_views
from .pipeline_output import TextureRefinementPipelineOutput
from .stages import StageMixin, register_arguments
from .texture.samples import enlarged, in_box, pixels_inside, surface_at, weighted_error


BAKED_AT_ONCE = 1 << 16  # texels


EXAMPLE_DOC_STRING = """
    Examples:
        ```py
        >>> import trimesh
        >>> from one2345pp import TextureRefinementPipeline, Views

        >>> views = Views.load("mug")  # a folder with cameras.json
        >>> TextureRefinementPipeline()(trimesh.load_mesh("mug.ply"), views).meshes[0].export("mug.glb")
        ```
"""


class TextureRefinementPipeline(StageMixin, SelfContainedMixin, DiffusionPipeline):
    r"""Paint a mesh from pictures of it, by fitting a TensoRF colour field to the visible surface and baking it.

    It has no learned weights; each call fits its own field.

    Args:
        resolution (`int`, defaults to 96), components (`int`, defaults to 16), feature_channels (`int`, defaults to 12),
            hidden (`int`, defaults to 64): Size of the [`ColorField`]; TensoRF's is several times that.
        batch_size (`int`, defaults to 4096): Visible points a step.
        grid_lr (`float`, defaults to 0.1), mlp_lr (`float`, defaults to 0.02): Learning rates, decaying to a tenth. TensoRF
            has 0.02 and 0.001, for many thousand steps.
        tv_weight (`float`, defaults to 0.01): Weight of the field's total variation.
        prior_weight (`float`, defaults to 0.1): Weight of the mesh's own colours where no view sees.
        facing_power (`float`, defaults to 2.0): Trust in a pixel is the cosine of its viewing angle to this power.
        silhouette (`float`, defaults to 1.0): View pixels over which trust rises from 0 at silhouettes.
        full_confidence (`float`, defaults to 0.05): Summed trust from which the views alone decide.
        stall_steps (`int`, defaults to 25), stall_gain (`float`, defaults to 0.01): The fit stops early if the mean loss of
            this many steps is not this share below that of as many before; 0 steps are never enough to tell.
        default_num_inference_steps (`int`, defaults to 100), default_texture_size (`int`, defaults to 1024),
            default_max_faces (`int`, defaults to 16000): Used when a call does not say.

    Source: One-2-3-45++ section 3.3; weights, prior and blending are this package's choice.
    """

    _callback_tensor_inputs = ["loss"]

    def __init__(
        self,
        resolution: int = 96,
        components: int = 16,
        feature_channels: int = 12,
        hidden: int = 64,
        batch_size: int = 4096,
        grid_lr: float = 0.1,
        mlp_lr: float = 0.02,
        tv_weight: float = 0.01,
        prior_weight: float = 0.1,
        facing_power: float = 2.0,
        silhouette: float = 1.0,
        full_confidence: float = 0.05,
        stall_steps: int = 25,
        stall_gain: float = 0.01,
        default_num_inference_steps: int = 100,
        default_texture_size: int = 1024,
        default_max_faces: int = 16000,
    ):
        super().__init__()
        register_arguments(self, locals())

    # --- the role of a stage ------------------------------------------------------------------------------------

    def paint(
        self, mesh: trimesh.Trimesh, views: Views, *, generator: torch.Generator | None = None, **options
    ) -> trimesh.Trimesh:
        """One mesh with a texture from its views; options as those of a call."""
        return self(mesh, views, generator=generator, **options).meshes[0]

    # --- steps of a call, in order ------------------------------------------------------------------------------

    def check_inputs(
        self,
        *,
        meshes: Sequence[trimesh.Trimesh],
        views: Sequence[Views],
        trust: Sequence[float] | None = None,
        num_inference_steps: int | None = None,
        texture_size: int | None = None,
        generator: torch.Generator | None = None,
    ) -> None:
        """Raise `InputError` for anything that cannot be used, before any work."""
        if len(meshes) != len(views):
            raise InputError(f"views: got {len(views)} lists of views for {len(meshes)} meshes. Pass one list a mesh.")
        if num_inference_steps is not None and num_inference_steps < 0:
            raise InputError(f"num_inference_steps: got {num_inference_steps}, expected 0 or more.")
        if texture_size is not None and not TEXTURE_SIZES[0] <= texture_size <= TEXTURE_SIZES[1]:
            raise InputError(
                f"texture_size: got {texture_size}, expected {TEXTURE_SIZES[0]} to {TEXTURE_SIZES[1]} pixels."
            )
        if isinstance(generator, list | tuple):
            raise InputError("generator: got several, expected one, which serves all meshes in turn.")
        for mesh, one in zip(meshes, views, strict=True):
            if not isinstance(mesh, trimesh.Trimesh) or len(mesh.faces) == 0 or not np.isfinite(mesh.vertices).all():
                raise InputError("mesh: expected a trimesh.Trimesh with faces and finite vertices.")
            if trust is not None and (len(trust) != len(one) or min(trust) <= 0):
                raise InputError(f"trust: got {list(trust)}, expected {len(one)} positive numbers, one a view.")

    def observe(
        self,
        mesh: trimesh.Trimesh,
        views: Views,  # square, RGBA
        rasterizer: str = "auto",
        trust: Sequence[float] | None = None,
    ) -> tuple[Visibility, SurfaceSamples]:
        """Rasterise the mesh once and read the views where they show it.

        Returns:
            Maps to look visibility up in, and one sample for each raster pixel that has any weight.
        """
        rig, largest = views.rig.to("cpu"), max(view.width for view in views)
        size = largest * max(1, -(-256 // largest))  # small views are looked at several times a pixel
        fragments = rasterize(mesh, rig, size, rasterizer=rasterizer)
        weights, seen = np.zeros(fragments.mask.shape, np.float32), []
        for index, view in enumerate(views):
            rgb, alpha = enlarged(view, size)
            mask, depth = fragments.mask[index], fragments.depth[index]
            points, normals = surface_at(mesh, fragments.face_ids[index][mask], fragments.barycentrics[index][mask])
            directions = rig[index].directions_to(points)[0]
            facing = torch.zeros(mask.shape)
            facing[torch.from_numpy(mask)] = (normals * directions).sum(-1).clamp(min=0)
            pixel = 2 * rig[index].half_extent(torch.from_numpy(depth)[None])[0].numpy() / size
            inside = pixels_inside(mask & (alpha.numpy() > 0.5), depth, pixel)
            rise = np.clip(inside * view.width / size / max(self.config.silhouette, 1e-6), 0, 1)
            weights[index] = facing.numpy() ** self.config.facing_power * rise
            trusted = torch.from_numpy(weights[index][mask])
            colors = rgb[torch.from_numpy(mask)]
            keep = trusted > 1e-3
            trusted = trusted * (1.0 if trust is None else trust[index])
            seen.append([tensor[keep] for tensor in (points, normals, directions, colors, trusted)])
        samples = SurfaceSamples(*(torch.cat(column) for column in zip(*seen, strict=True)))
        if len(samples) == 0:
            raise InputError(
                "views: none of them shows any of the mesh. Check that mesh and cameras share one frame "
                "(+Y up, +Z front, object about the origin), that its faces look outwards, and that the views are not empty."
            )
        return Visibility(rig, torch.from_numpy(weights), torch.from_numpy(fragments.depth)), samples

    def sample_prior(
        self, mesh: trimesh.Trimesh, visibility: Visibility, generator: torch.Generator | None, count: int = 30000
    ) -> SurfaceSamples:
        """The mesh's own colours at random points of its surface, weighted by how little the views see there."""
        areas = torch.from_numpy(np.array(mesh.area_faces, np.float32))
        face_ids = torch.multinomial(areas, count, replacement=True, generator=generator).numpy()
        u, v = torch.rand(2, count, generator=generator)
        u, v = torch.where(u + v > 1, 1 - u, u), torch.where(u + v > 1, 1 - v, v)
        barycentrics = torch.stack([1 - u - v, u, v], -1).numpy()
        points, normals = surface_at(mesh, face_ids, barycentrics)
        colors = torch.from_numpy(surface_colors(mesh, face_ids, barycentrics)).float()
        weights = 1 - self.blend_weight(visibility.confidence(points, normals))
        return SurfaceSamples(points, normals, normals, colors, weights)

    def fit(
        self,
        mesh: trimesh.Trimesh,
        seen: SurfaceSamples,
        prior: SurfaceSamples,
        num_inference_steps: int,
        generator: torch.Generator | None = None,
        device: torch.device | str = "cpu",
        on_step: Callable[[int, Tensor], None] | None = None,
    ) -> ColorField:
        """Fit a colour field to the samples by weighted least squares.

        Half of each batch is asked with the surface normal in place of the viewing direction, because that is how the
        field is baked, and with few views hardly any sees a point along its normal.
        """
        config = self.config
        # tensors made under a caller's inference_mode could not be trained
        with torch.inference_mode(False), torch.enable_grad():
            field = ColorField(config.resolution, config.components, config.feature_channels, config.hidden)
            field.initialize(generator).start_at(seen.mean_color()).to(device)
            seen, prior = seen.to(device), prior.to(device)
            optimizer = torch.optim.Adam(
                [
                    {"params": [field.planes, field.lines], "lr": config.grid_lr},
                    {"params": [*field.basis.parameters(), *field.mlp.parameters()], "lr": config.mlp_lr},
                ],
                betas=(0.9, 0.99),
                fused=True,
            )
            decay = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.1 ** (1 / max(num_inference_steps, 1)))
            losses: list[Tensor] = []
            for step in self.progress_bar(range(num_inference_steps)):
                batch = seen.sample(config.batch_size, generator)
                half = config.batch_size // 2
                directions = torch.cat([batch.normals[:half], batch.directions[half:]])
                loss = weighted_error(field(in_box(mesh, batch.points), directions), batch)
                unseen = prior.sample(config.batch_size // 4, generator)
                loss = loss + config.prior_weight * weighted_error(
                    field(in_box(mesh, unseen.points), unseen.normals), unseen
                )
                loss = loss + config.tv_weight * field.total_variation()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                decay.step()
                losses.append(loss.detach())
                if on_step is not None:
                    on_step(step, loss.detach())
                if self.interrupt or self.has_stalled(losses):
                    break
        return field.requires_grad_(False).eval()

    def has_stalled(self, losses: Sequence[Tensor]) -> bool:
        """Whether the loss has stopped falling; looked at every `stall_steps` steps, because single losses are noise."""
        window = self.config.stall_steps
        if window <= 0 or len(losses) < 2 * window or len(losses) % window:
            return False
        before, last = torch.stack(list(losses[-2 * window :])).view(2, window).mean(1).tolist()
        return last > (1 - self.config.stall_gain) * before

    def bake(
        self,
        mesh: trimesh.Trimesh,
        atlas: Atlas,
        field: ColorField | None,
        visibility: Visibility,
        texture_size: int,
    ) -> trimesh.Trimesh:
        """Write a texture: the field seen along the surface normal, and the mesh's own colours where no view sees."""
        face_ids, barycentrics, texels = texel_samples(atlas, texture_size)
        texture = np.zeros((texture_size**2, 3), np.uint8)
        for first in range(0, len(texels), BAKED_AT_ONCE):
            piece = slice(first, first + BAKED_AT_ONCE)
            colors = torch.from_numpy(surface_colors(mesh, face_ids[piece], barycentrics[piece])).float()
            if field is not None:
                points, normals = surface_at(mesh, face_ids[piece], barycentrics[piece])
                painted = field(in_box(mesh, points).to(field.device), normals.to(field.device)).cpu()
                share = self.blend_weight(visibility.confidence(points, normals))[:, None]
                colors = share * painted + (1 - share) * colors
            texture[texels[piece]] = (colors.clamp(0, 1) * 255).round().byte().numpy()
        covered = np.zeros(texture_size**2, bool)
        covered[texels] = True
        square = (texture_size, texture_size)
        return atlas.textured(Image.fromarray(pad_texture(texture.reshape(*square, 3), covered.reshape(square))))

    def blend_weight(self, confidence: Tensor) -> Tensor:
        """Share of the views in a point's colour: a smooth step that reaches 1 at `full_confidence`."""
        x = (confidence / self.config.full_confidence).clamp(0, 1)
        return x * x * (3 - 2 * x)

    @replace_example_docstring(EXAMPLE_DOC_STRING)
    def __call__(
        self,
        mesh: trimesh.Trimesh | list[trimesh.Trimesh],
        views: Views | list[Image.Image] | list[Views] | list[list[Image.Image]],
        cameras: CameraRig | str | None = None,
        trust: Sequence[float] | None = None,
        num_inference_steps: int | None = None,
        texture_size: int | None = None,
        max_faces: int | None = None,
        watertight: bool = False,
        rasterizer: str = "auto",
        device: torch.device | str = "cpu",
        generator: torch.Generator | None = None,
        callback_on_step_end: Callable[[Any, int, int, dict], dict] | None = None,
        callback_on_step_end_tensor_inputs: list[str] | None = None,
        return_dict: bool = True,
    ) -> TextureRefinementPipelineOutput | tuple:
        """Paint meshes.

        Args:
            mesh: One mesh or a list, with vertex colours, a texture or neither (grey).
            views: [`Views`] or pictures of the mesh, or a list of them for each mesh: `RGBA`, or `RGB` on a plain background.
                Transparent pixels are ignored.
            cameras: The cameras of pictures, or a rig's name, by default `"zero123plus-v1.2"`.
            trust: How much each view counts where several see a point, `V` positive numbers; all alike by default.
            num_inference_steps: Most optimiser steps, fewer if the loss stalls; 0 only bakes the mesh's own colours.
            texture_size: Side of the texture in pixels.
            max_faces: Meshes with more faces are decimated to this many.
            watertight: Close meshes that are open, for printing. The cuts of the texture do not count.
            rasterizer: `"auto"`, `"embree"` or `"nvdiffrast"`.
            device: Where the field is fitted.
            generator: Source of every random draw, on the CPU. The same one gives the same mesh.
            callback_on_step_end: Called after each step as `callback(pipe, step, step, {"loss": float})`. If it sets
                `_interrupt` of the pipeline, as far as the fit has come is baked.
            callback_on_step_end_tensor_inputs: What it is given, see `callbacks.tensor_names`.
            return_dict: Whether to return a [`TextureRefinementPipelineOutput`] rather than a tuple.

        Examples:

        Returns:
            Meshes with UVs and a base colour texture, in the same frame and places.

        Raises:
            InputError: If the meshes, views, cameras or numbers cannot be used, or a mesh cannot be closed or decimated as asked.
        """
        # 1. Check inputs
        names = tensor_names(callback_on_step_end, callback_on_step_end_tensor_inputs, self._callback_tensor_inputs)
        meshes = mesh if isinstance(mesh, (list, tuple)) else [mesh]
        views, config = Views.batch(views, cameras), self.config
        self.check_inputs(
            meshes=meshes,
            views=views,
            trust=trust,
            num_inference_steps=num_inference_steps,
            texture_size=texture_size,
            generator=generator,
        )
        steps = config.default_num_inference_steps if num_inference_steps is None else num_inference_steps
        texture_size = config.default_texture_size if texture_size is None else texture_size
        max_faces = config.default_max_faces if max_faces is None else max_faces
        self._interrupt, painted = False, []

        def on_step(step: int, loss: Tensor) -> None:
            if callback_on_step_end is not None:
                end_step(self, callback_on_step_end, names, step, step, {"loss": loss.item()})

        for one_mesh, one in zip(meshes, [cut_out_views(one) for one in views], strict=True):
            # 2. Close it if asked to, decimate to the budget, and cut into charts
            one_mesh = finish_mesh(one_mesh, max_faces, watertight)
            atlas = unwrap(one_mesh, texture_size)
            # 3. Find what each view sees
            visibility, seen = self.observe(one_mesh, one, rasterizer, trust)
            # 4. Fit the colour field
            prior = self.sample_prior(one_mesh, visibility, generator)
            field = self.fit(one_mesh, seen, prior, steps, generator, device, on_step)
            # 5. Bake it, keeping the mesh's colours where no view sees
            painted.append(self.bake(one_mesh, atlas, field if steps else None, visibility, texture_size))
        return TextureRefinementPipelineOutput(meshes=painted) if return_dict else (painted,)
