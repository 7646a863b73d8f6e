"""Trained stages to one self-contained checkpoint folder. Reading other projects' checkpoints lives in the other modules here."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from ..errors import InputError
from ..geometry.volume import TRUNCATION_CELLS
from ..models.condition_encoder import ConditionEncoder
from ..models.elevation import ElevationEstimator
from ..models.unet_occupancy import OccupancyUNet3DModel
from ..models.unet_sparse import SparseUNet3DModel
from ..pipelines.pipeline_multiview_tile import MultiViewTilePipeline
from ..pipelines.pipeline_one2345plusplus import One2345PlusPlusPipeline
from ..pipelines.pipeline_sparse_volume import SparseVolumeDiffusionPipeline
from ..pipelines.pipeline_texture_refinement import TextureRefinementPipeline
from ..pipelines.stages import make_stage
from ..schedulers.scheduling_log_snr import LogSNRScheduler


logger = logging.getLogger(__name__)


def assemble(
    multiview: Path,
    occupancy: Path,
    sparse: Path,
    output: Path,
    *,
    fine: Path | None = None,
    elevation: Path | None = None,
    volume: dict | None = None,
    drawn_volume: dict | None = None,
    texture: dict | None = None,
    guide: dict | None = None,
    volume_encoder: Path | None = None,
    sign_step_threshold: float | None = None,
    card: Path | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Write the folder of a `One2345PlusPlusPipeline` from what the trainings wrote.

    Args:
        multiview: Folder of a `MultiViewTilePipeline` (`train multiview` writes it as `pipeline`).
        occupancy: Output of `train occupancy`: `occupancy_unet` and `occupancy_condition`.
        sparse: Output of `train sparse`: `sparse_unet` and `sparse_condition`.
        output: Folder to write; replaced when it is whole.
        fine: Output of another `train sparse` at twice the resolution, for the volume stage's third network.
        elevation: Output of `train elevation`: `elevation_estimator`.
        volume: Scalar arguments of `SparseVolumeDiffusionPipeline`, such as its default steps.
        drawn_volume: Those that are others for views that the first stage drew.
        texture: Scalar arguments of `TextureRefinementPipeline`.
        guide: Settings of the chain's guide, see `GuideSettings`.
        volume_encoder: Folder of the first stage whose image encoder the volume networks were trained with; `multiview` by default.
        sign_step_threshold: Of the occupancy scheduler; LAS-Diffusion has 0.7, the small checkpoint does better without on `val`.
        card: Model card, copied as `README.md`.
        dtype: Of the weights on disk.
    """
    for folder in (multiview, occupancy, sparse, fine, elevation, volume_encoder):
        if folder is not None and not Path(folder).is_dir():
            raise InputError(f"{folder}: no such folder. Pass the outputs of the trainings.")
    sparse_unet = SparseUNet3DModel.from_pretrained(Path(sparse) / "sparse_unet")
    first = MultiViewTilePipeline.from_pretrained(multiview)
    seen = first if volume_encoder is None else MultiViewTilePipeline.from_pretrained(volume_encoder)
    parts = dict(
        occupancy_condition=ConditionEncoder.from_pretrained(Path(occupancy) / "occupancy_condition"),
        occupancy_unet=OccupancyUNet3DModel.from_pretrained(Path(occupancy) / "occupancy_unet"),
        occupancy_scheduler=LogSNRScheduler(sign_step_threshold=sign_step_threshold),
        sparse_condition=ConditionEncoder.from_pretrained(Path(sparse) / "sparse_condition"),
        sparse_unet=sparse_unet,
        sparse_scheduler=LogSNRScheduler(clip_sample=True),
        vision_encoder=seen.vision_encoder,
        feature_extractor_clip=seen.feature_extractor_clip,
        fine_condition=None if fine is None else ConditionEncoder.from_pretrained(Path(fine) / "sparse_condition"),
        fine_unet=None if fine is None else SparseUNet3DModel.from_pretrained(Path(fine) / "sparse_unet"),
    )
    settings = {"truncation": TRUNCATION_CELLS / sparse_unet.config.sample_size, **(volume or {})}
    second = make_stage(SparseVolumeDiffusionPipeline, parts, settings, "volume")
    third = make_stage(TextureRefinementPipeline, {}, texture or {}, "texture")
    estimator = None
    if elevation is not None:
        estimator = ElevationEstimator.from_pretrained(Path(elevation) / "elevation_estimator")
    chain = One2345PlusPlusPipeline.from_stages(
        first,
        second,
        third,
        drawn_volume_config=drawn_volume,
        guide_config=guide or {},
        elevation_estimator=estimator,
    )
    chain.to(dtype=dtype)
    output = Path(output)
    partial = output.with_name(output.name + ".part")
    shutil.rmtree(partial, ignore_errors=True)
    chain.save_pretrained(partial)
    if card is not None:
        shutil.copyfile(card, partial / "README.md")
    shutil.rmtree(output, ignore_errors=True)
    partial.rename(output)
    size = sum(file.stat().st_size for file in output.rglob("*") if file.is_file())
    logger.info("%s: %.1f MB", output, size / 1e6)
