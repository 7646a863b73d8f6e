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
from ..pipelines.pipeline_multiview_tile import MultiViewTilePipeline


logger = logging.getLogger(__name__)

BATCH = 16  # tiles drawn at once


class DrawnViewsDataset(Dataset):
    """A `PreparedDataset` of which some items have two more keys.

    `drawn [6, S, S, 4]` (uint8, straight alpha): the views that a first stage draws of input picture number `drawn_input`, cut out of
    their grey as the chain does.

    Args:
        prepared: Samples in the worlds of their input azimuths.
        multiview: Folder of the first stage.
        folder: Keeps the drawn views between runs.
        count: Samples to draw, by the weights of `prepared`.
        steps: Denoising steps.
    """

    def __init__(self, prepared: PreparedDataset, multiview: str, folder: Path, count: int, steps: int, seed: int = 0):
        self.prepared, self.folder = prepared, folder
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
        inputs = [self.prepared[index]["inputs"] for index in indices]
        picks = [int(torch.randint(len(pictures), (), generator=generator)) for pictures in inputs]
        size = pipe.config.view_size
        pictures = [
            Image.fromarray(own[pick].numpy()).resize((size, size), Image.Resampling.BICUBIC)
            for own, pick in zip(inputs, picks, strict=True)
        ]
        drawn = pipe(pictures, num_inference_steps=steps, generator=generator, transparent=True).views
        for index, pick, views in zip(indices, picks, drawn, strict=True):
            pictures = np.stack([np.asarray(view) for view in views])
            partial = self._file(index).with_suffix(".part")
            with open(partial, "wb") as file:
                np.savez_compressed(file, drawn=pictures, drawn_input=pick)
            partial.replace(self._file(index))

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.prepared[index]
        if self._file(index).exists():
            with np.load(self._file(index)) as data:
                item |= {key: torch.from_numpy(data[key]) for key in data.files}
        return item
