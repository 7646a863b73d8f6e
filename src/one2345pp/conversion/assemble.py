"""Trained stages to one self-contained checkpoint folder. Reading other projects' checkpoints lives in the other modules here."""

from __future__ import annotations

import logging
import shutil
from pathlib import Path

import torch

from ..errors import InputError
from ..models.condition_encoder import ConditionEncoder
from ..models.elevation import ElevationEstimator
from ..models.unet_occupancy import OccupancyUNet3DModel
from ..models.unet_sparse import SparseUNet3DModel
from ..pipelines.pipeline_multiview_tile import MultiViewTilePipeline
from ..pipelines.pipeline_one2345plusplus import One2345PlusPlusPipeline
from ..pipelines.pipeline_sparse_volume import SparseVolumeDiffusionPipeline
from ..pipelines.pipeline_texture_refinement import TextureRefinementPipeline
from ..schedulers.scheduling_log_snr import LogSNRScheduler


logger = logging.getLogger(__name__)

TRUNCATION_CELLS = 3.2


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
    candidates: int = 1,
    tell_kinds: bool = False,
    believe_picture: bool = False,
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
        candidates: `default_num_candidates` of the chain.
        tell_kinds: Of the chain: the volume networks learnt with the views that this first stage draws.
        believe_picture: Of the chain: a picture is one more view, and the volume takes its outline.
        sign_step_threshold: Of the occupancy scheduler; LAS-Diffusion has 0.7, the small checkpoint does better without on `val`.
        card: Model card, copied as `README.md`.
        dtype: Of the weights on disk.
    """
    for folder in (multiview, occupancy, sparse, fine, elevation):
        if folder is not None and not Path(folder).is_dir():
            raise InputError(f"{folder}: no such folder. Pass the outputs of the trainings.")
    sparse_unet = SparseUNet3DModel.from_pretrained(Path(sparse) / "sparse_unet")
    first = MultiViewTilePipeline.from_pretrained(multiview)
    second = SparseVolumeDiffusionPipeline(
        occupancy_condition=ConditionEncoder.from_pretrained(Path(occupancy) / "occupancy_condition"),
        occupancy_unet=OccupancyUNet3DModel.from_pretrained(Path(occupancy) / "occupancy_unet"),
        occupancy_scheduler=LogSNRScheduler(sign_step_threshold=sign_step_threshold),
        sparse_condition=ConditionEncoder.from_pretrained(Path(sparse) / "sparse_condition"),
        sparse_unet=sparse_unet,
        sparse_scheduler=LogSNRScheduler(clip_sample=True),
        vision_encoder=first.vision_encoder,
        feature_extractor_clip=first.feature_extractor_clip,
        fine_condition=None if fine is None else ConditionEncoder.from_pretrained(Path(fine) / "sparse_condition"),
        fine_unet=None if fine is None else SparseUNet3DModel.from_pretrained(Path(fine) / "sparse_unet"),
        **{"truncation": TRUNCATION_CELLS / sparse_unet.config.sample_size, **(volume or {})},
    )
    third = TextureRefinementPipeline(**(texture or {}))
    estimator = None
    if elevation is not None:
        estimator = ElevationEstimator.from_pretrained(Path(elevation) / "elevation_estimator")
    chain = One2345PlusPlusPipeline.from_stages(
        first,
        second,
        third,
        drawn_volume_config=drawn_volume,
        default_num_candidates=candidates,
        tell_kinds=tell_kinds,
        believe_picture=believe_picture,
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
