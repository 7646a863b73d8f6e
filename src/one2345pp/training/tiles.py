"""What the first stage learns from: prepared pictures on grey, as tiles, and encoded once. Objectives live in `training.multiview`."""

# B samples, I input pictures a sample, c latent channels, h w latent grid, D width of the text context

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from ..data.dataset import PreparedDataset
from ..errors import InputError
from ..pipelines.pipeline_multiview_tile import BACKGROUND, COLUMNS, IMAGE_SCALE, ROWS, MultiViewTilePipeline


def flatten(views: Tensor, size: int) -> Tensor:
    """RGBA pictures `[..., S, S, 4]` (uint8, straight alpha) on grey, at the size of a view: `[..., 3, size, size]` uint8."""
    rgb, alpha = views[..., :3].float(), views[..., 3:].float() / 255
    flat = (rgb * alpha + rgb.new_tensor(BACKGROUND) * (1 - alpha)).movedim(-1, -3)
    if flat.shape[-1] != size:
        small = F.interpolate(flat.reshape(-1, *flat.shape[-3:]), size=(size, size), mode="bicubic", antialias=True)
        flat = small.reshape(*flat.shape[:-2], size, size)
    return flat.round().clamp(0, 255).byte()


def to_tile(views: Tensor) -> Tensor:
    """Six views `[..., 6, 3, S, S]` as a tile `[..., 3, 3 S, 2 S]`."""
    cells = views.unflatten(-4, (ROWS, COLUMNS))  # [..., rows, columns, 3, S, S]
    return cells.movedim(-3, -5).transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)


def to_pixels(images: Tensor, scale: float = IMAGE_SCALE) -> Tensor:
    """uint8 images as the networks see them: [-1, 1] times `scale`."""
    return (images.float() / 127.5 - 1) * scale


def rig_slice(prepared: PreparedDataset, config: dict) -> slice:
    """Where the rig's six views are among those of a prepared sample."""
    rigs = list(prepared.meta["rigs"])
    if config["rig"] not in rigs:
        raise InputError(
            f"{prepared.path}: was prepared for {', '.join(rigs)}, not for the config's rig {config['rig']!r}."
        )
    first = ROWS * COLUMNS * rigs.index(config["rig"])
    return slice(first, first + ROWS * COLUMNS)


class ImageDataset(Dataset):
    """All pictures of the prepared samples, in memory: `views [V, 3, S, S]` and `inputs [I, 3, S, S]`, uint8 on grey.

    An item also has `object`, a number for all samples of one object. `rig` cuts the config's rig from the views.
    """

    def __init__(self, data: Path, config: dict):
        prepared = PreparedDataset(data)
        self.weights = prepared.weights
        self.rig = rig_slice(prepared, config)
        self.items, names = [], {}
        for item in (prepared[index] for index in range(len(prepared))):
            pictures = {key: flatten(item[key], config["view_size"]) for key in ("views", "inputs")}
            self.items.append({**pictures, "object": torch.tensor(names.setdefault(item["name"], len(names)))})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]


class LatentDataset(Dataset):
    """What the UNet learns from, encoded once: `tile [c, h, w]`, `references [I, c, h', w']` and `embeds [I, D]`, float16.

    Args:
        folder: Keeps the arrays between runs; only new samples would need encoding, so all are encoded again when there are more.
    """

    def __init__(self, data: Path, config: dict, pipeline: MultiViewTilePipeline, folder: Path):
        size = config["view_size"]
        with torch.no_grad():
            grey = pipeline.vae.encode(torch.zeros(1, 3, size, size)).latent_dist.mode()
        self.grey = grey[0]  # latent of the empty image, the reference of the negative branch
        files = {name: folder / f"{name}.npy" for name in ("tile", "references", "embeds", "weights")}
        if not folder.exists():
            partial = folder.with_name(folder.name + ".part")
            partial.mkdir(parents=True, exist_ok=True)
            for name, array in self._encode(ImageDataset(data, config), config, pipeline).items():
                np.save(partial / f"{name}.npy", array)
            partial.rename(folder)
        self.arrays = {name: torch.from_numpy(np.load(file)) for name, file in files.items()}
        self.weights = self.arrays.pop("weights")

    @staticmethod
    @torch.no_grad()
    def _encode(images: ImageDataset, config: dict, pipeline: MultiViewTilePipeline) -> dict[str, np.ndarray]:
        generator = torch.Generator().manual_seed(config["seed"])
        arrays: dict[str, list[np.ndarray]] = {"tile": [], "references": [], "embeds": []}
        for copy in range(1 + config["recolored_copies"]):
            for item in images.items:
                # Another order of the channels teaches colours to come from the reference, not from the object's kind.
                order = torch.randperm(3, generator=generator) if copy else torch.arange(3)
                tile = to_tile(item["views"][images.rig][:, order])
                inputs = item["inputs"][:, order]
                vision_size = pipeline.vision_encoder.config.image_size
                pixels = F.interpolate(inputs.float(), (vision_size, vision_size), mode="bicubic", antialias=True)
                arrays["tile"].append(pipeline.vae.encode(to_pixels(tile[None])).latent_dist.mode()[0].half().numpy())
                reference = pipeline.vae.encode(to_pixels(inputs)).latent_dist.sample(generator)
                arrays["references"].append(reference.half().numpy())
                arrays["embeds"].append(pipeline.vision_encoder(to_pixels(pixels, 1.0)).image_embeds.half().numpy())
        weights = images.weights.repeat(1 + config["recolored_copies"]).numpy()
        return {**{name: np.stack(values) for name, values in arrays.items()}, "weights": weights}

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: array[index] for name, array in self.arrays.items()}


def preview_examples(data: Path, config: dict, count: int = 6) -> list[tuple[Image.Image, Image.Image]]:
    """Input pictures and true tiles of samples spread over a prepared folder."""
    prepared = PreparedDataset(data)
    rig = rig_slice(prepared, config)
    examples = []
    for index in np.linspace(0, len(prepared) - 1, min(count, len(prepared))).astype(int):
        item = prepared[index]
        tile = to_tile(flatten(item["views"][rig], config["view_size"]))
        examples.append((to_pil(flatten(item["inputs"][0], config["view_size"])), to_pil(tile)))
    return examples


def to_pil(image: Tensor) -> Image.Image:
    """`[3, H, W]` uint8"""
    return Image.fromarray(image.permute(1, 2, 0).numpy())
