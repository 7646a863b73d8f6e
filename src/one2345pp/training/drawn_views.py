"""Views as the first stage really draws them, for the volume networks to learn from beside true ones. Drawn once and kept on disk."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..data.dataset import PreparedDataset
from ..data.prepare import NADIR
from ..errors import InputError
from ..geometry.cameras import CameraRig
from ..pipelines.elevations import add_picture
from ..pipelines.pipeline_multiview_tile import MultiViewTilePipeline


logger = logging.getLogger(__name__)

BATCH = 16  # tiles drawn at once


class DrawnViewsDataset(Dataset):
    """A `PreparedDataset` of which some items have four more keys.

    `drawn [6, S, S, 4]` (uint8, straight alpha): the views that a first stage draws of input picture number `drawn_input`, cut out of
    their grey as the chain does. `placed [S, S, 4]`: that picture beside them as the chain places it, seen from `placed_elevation`
    degrees, which are off by `elevation_error`, since the chain mostly has an estimate; without both where the views show nothing.

    Args:
        prepared: Samples in the worlds of their input azimuths.
        multiview: Folder of the first stage.
        folder: Keeps the drawn views between runs.
        count: Samples to draw, by the weights of `prepared`.
        steps: Denoising steps.
        elevation_error: Degrees, standard deviation.
    """

    def __init__(
        self,
        prepared: PreparedDataset,
        multiview: str,
        folder: Path,
        count: int,
        steps: int,
        elevation_error: float = 0.0,
        seed: int = 0,
    ):
        self.prepared, self.folder, self.elevation_error = prepared, folder, elevation_error
        self.weights = prepared.weights
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        order = torch.multinomial(self.weights, min(count, len(prepared)), generator=generator).tolist()
        missing = [index for index in order if not self._file(index).exists()]
        if not missing:
            return
        pipe = MultiViewTilePipeline.from_pretrained(multiview)
        pipe.set_progress_bar_config(disable=True)
        for first in tqdm(range(0, len(missing), BATCH), desc="draw views"):
            self._draw(pipe, missing[first : first + BATCH], steps, generator)

    def _file(self, index: int) -> Path:
        return self.folder / self.prepared.files[index].with_suffix(".npz").name

    def _draw(self, pipe: MultiViewTilePipeline, indices: list[int], steps: int, generator: torch.Generator) -> None:
        items = [self.prepared[index] for index in indices]
        picks = [int(torch.randint(len(item["inputs"]), (), generator=generator)) for item in items]
        pictures = [Image.fromarray(item["inputs"][pick].numpy()) for item, pick in zip(items, picks, strict=True)]
        size, rig = pipe.config.view_size, CameraRig.named(pipe.config.rig)
        resized = [picture.resize((size, size), Image.Resampling.BICUBIC) for picture in pictures]
        drawn = pipe(resized, num_inference_steps=steps, generator=generator, transparent=True).views
        for index, item, pick, picture, views in zip(indices, items, picks, pictures, drawn, strict=True):
            sample = {"drawn": np.stack([np.asarray(view) for view in views]), "drawn_input": pick}
            error = self.elevation_error * torch.randn((), generator=generator).item()
            elevation = int(item["elevations"][pick]) + NADIR + error
            try:
                placed = add_picture(picture, views, rig, elevation)[0][-1]
                sample |= {"placed": np.asarray(placed), "placed_elevation": elevation}
            except InputError as problem:
                logger.info("%s: %s", item["name"], problem)
            partial = self._file(index).with_suffix(".part")
            with open(partial, "wb") as file:
                np.savez_compressed(file, **sample)
            partial.replace(self._file(index))

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.prepared[index]
        if self._file(index).exists():
            with np.load(self._file(index)) as data:
                item |= {key: torch.from_numpy(data[key]) for key in data.files}
        return item
