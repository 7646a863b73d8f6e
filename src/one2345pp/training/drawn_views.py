"""Views as the first stage really draws them, for the volume networks to learn from beside true ones. Drawn once and kept on disk."""

from __future__ import annotations

import zlib
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset
from tqdm.auto import tqdm

from ..data.dataset import PreparedDataset
from ..pipelines.pipeline_multiview_tile import MultiViewTilePipeline


BATCH = 16  # tiles drawn at once


class DrawnViewsDataset(Dataset):
    """A `PreparedDataset` of which some items have two more keys.

    `drawn [6, S, S, 4]` (uint8, straight alpha): the views that a first stage draws of input picture number `drawn_input`, cut out of
    their grey as the chain does. The picture and noise of a sample depend on the seed and its name alone, so a cut run goes on
    exactly.

    Args:
        prepared: Samples in the worlds of their input azimuths.
        multiview: Folder of the first stage.
        folder: Keeps the drawn views between runs.
        count: Samples to draw, by the weights of `prepared`.
        steps: Denoising steps.
        seed: Decides which samples are drawn and, with a sample's name, its picture and noise.
        device: Where the first stage draws.
    """

    def __init__(
        self,
        prepared: PreparedDataset,
        multiview: str,
        folder: Path,
        count: int,
        steps: int,
        seed: int = 0,
        device: str | torch.device = "cpu",
    ):
        self.prepared, self.folder = prepared, folder
        self.weights = prepared.weights
        folder.mkdir(parents=True, exist_ok=True)
        generator = torch.Generator().manual_seed(seed)
        order = torch.multinomial(self.weights, min(count, len(prepared)), generator=generator).tolist()
        # Whole batches, also where some are there: a product's last bits depend on the number of its rows.
        batches = [order[first : first + BATCH] for first in range(0, len(order), BATCH)]
        missing = [batch for batch in batches if not all(self._file(index).exists() for index in batch)]
        if not missing:
            return
        pipe = MultiViewTilePipeline.from_pretrained(multiview).to(device)
        pipe.set_progress_bar_config(disable=True)
        for batch in tqdm(missing, desc="draw views"):
            self._draw(pipe, batch, steps, seed)

    def _file(self, index: int) -> Path:
        return self.folder / self.prepared.files[index].with_suffix(".npz").name

    def _draw(self, pipe: MultiViewTilePipeline, indices: list[int], steps: int, seed: int) -> None:
        size, pictures, picks, generators = pipe.config.view_size, [], [], []
        for index in indices:
            number = zlib.crc32(f"{seed} {self._file(index).stem}".encode())
            generators.append(torch.Generator().manual_seed(number))
            inputs = self.prepared[index]["inputs"]
            picks.append(int(torch.randint(len(inputs), (), generator=generators[-1])))
            picture = Image.fromarray(inputs[picks[-1]].numpy())
            pictures.append(picture.resize((size, size), Image.Resampling.BICUBIC))
        drawn = pipe(pictures, num_inference_steps=steps, generator=generators, transparent=True).views
        for index, pick, views in zip(indices, picks, drawn, strict=True):
            if self._file(index).exists():
                continue
            partial = self._file(index).with_suffix(".part")
            with open(partial, "wb") as file:
                np.savez_compressed(file, drawn=np.stack([np.asarray(view) for view in views]), drawn_input=pick)
            partial.replace(self._file(index))

    def __len__(self) -> int:
        return len(self.prepared)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = self.prepared[index]
        if self._file(index).exists():
            with np.load(self._file(index)) as data:
                item |= {key: torch.from_numpy(data[key]) for key in data.files}
        return item
