"""One-2-3-45++ for diffusers: one image or prompt in, one textured mesh out. Public names only, resolved on first use."""

from __future__ import annotations

import importlib


__version__ = "0.1.0"

# Where every public name lives. Nothing heavy is imported before a name is asked for.
MODULE_OF = {
    "MultiViewTilePipeline": "pipelines.pipeline_multiview_tile",
    "SparseVolumeDiffusionPipeline": "pipelines.pipeline_sparse_volume",
    "TextureRefinementPipeline": "pipelines.pipeline_texture_refinement",
    "One2345PlusPlusPipeline": "pipelines.pipeline_one2345plusplus",
    "LogSNRScheduler": "schedulers.scheduling_log_snr",
    "ConditionEncoder": "models.condition_encoder",
    "OccupancyUNet3DModel": "models.unet_occupancy",
    "SparseUNet3DModel": "models.unet_sparse",
    "ElevationEstimator": "models.elevation",
    "ColorField": "models.color_field",
    "GuideSettings": "pipelines.picture.guide",
    "Solid": "pipelines.roles",
    "Views": "geometry.views",
    "CameraRig": "geometry.cameras",
    "SparseVolume": "geometry.volume",
    "InputError": "errors",
    "default_checkpoint": "checkpoints",
}

__all__ = ["__version__", *MODULE_OF]


def __getattr__(name: str):
    if name not in MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
