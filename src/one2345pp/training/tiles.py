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
from ..data.prepare import RING
from ..errors import InputError
from ..pipelines.pipeline_multiview_tile import (
    BACKGROUND,
    COLUMNS,
    IMAGE_SCALE,
    ROWS,
    MultiViewTilePipeline,
    remove_grey,
)


def flatten(views: Tensor, size: int) -> Tensor:
    """RGBA pictures `[..., S, S, 4]` (uint8, straight alpha) at a view's size: colours on grey, masks, `[..., 4, size, size]`."""
    rgb, alpha = views[..., :3].float(), views[..., 3:].float() / 255
    flat = rgb * alpha + rgb.new_tensor(BACKGROUND) * (1 - alpha)
    flat = torch.cat([flat, alpha * 255], -1).movedim(-1, -3)
    if flat.shape[-1] != size:
        small = F.interpolate(flat.reshape(-1, *flat.shape[-3:]), size=(size, size), mode="bicubic", antialias=True)
        flat = small.reshape(*flat.shape[:-2], size, size)
    return flat.round().clamp(0, 255).byte()


def to_tile(views: Tensor) -> Tensor:
    """Six views `[..., 6, C, S, S]` as a tile `[..., C, 3 S, 2 S]`."""
    cells = views.unflatten(-4, (ROWS, COLUMNS))  # [..., rows, columns, C, S, S]
    return cells.movedim(-3, -5).transpose(-3, -2).flatten(-4, -3).flatten(-2, -1)


def to_pixels(images: Tensor, scale: float = IMAGE_SCALE) -> Tensor:
    """uint8 images as the networks see them: [-1, 1] times `scale`."""
    return (images.float() / 127.5 - 1) * scale


class Frames:
    """Which pictures of a prepared item make which tile.

    Attributes:
        views: For each frame its six views, `[F, 6]` indices into `pictures(...)["views"]`.
        inputs: Its input pictures, `[F, I]` indices into `pictures(...)["inputs"]`.

    Args:
        config: Keys `view_size`, and `rigs` (those to learn, in the order of their labels) or `rig` (the only one).
    """

    def __init__(self, prepared: PreparedDataset, config: dict):
        self.rigs, self.size = list(prepared.meta["rigs"]), config["view_size"]
        self.known = config.get("rigs") or [config["rig"]]
        self.rings = prepared.meta.get("rings", False)
        count = prepared.meta["inputs"]
        there = [rig for rig in self.known if rig in self.rigs]
        if not there or (self.rings and set(self.rigs) - set(self.known)):
            raise InputError(
                f"{prepared.path}: was prepared for {', '.join(self.rigs)}, the config is for {', '.join(self.known)}."
            )
        first = ROWS * COLUMNS * torch.tensor([self.rigs.index(rig) for rig in there])
        self.views = first[:, None] + torch.arange(ROWS * COLUMNS)
        self.inputs = torch.arange(count).expand(len(there), -1)
        self._labels = torch.tensor([self.known.index(rig) for rig in there])
        if self.rings:
            j, k = torch.arange(RING), torch.arange(RING)[:, None]
            # View j of frame k looks from 60 (k + j) + 30 degrees; in the mirror, left and right of the front change places.
            views = [j % 2 * RING + (k + j) % RING, 2 * RING + j % 2 * RING + (k + RING - 1 - j) % RING]
            self.views = torch.cat(views)
            self.inputs = torch.arange(2 * RING * count).view(2 * RING, count)

    def labels(self, item: dict) -> Tensor:
        """Which of the config's rigs each frame of an item is of, `[F]`."""
        if not self.rings:
            return self._labels
        rig = self.rigs[int(item["rig"])] if "rig" in item else self.rigs[0]
        return torch.tensor(self.known.index(rig)).expand(len(self.views))

    def pictures(self, item: dict) -> dict[str, Tensor]:
        """`views [V, 4, S, S]` and `inputs [I, 4, S, S]` of an item, see `flatten`; of a ring also mirrored, after the others."""
        pictures = {}
        for key in ("views", "inputs"):
            flat = flatten(item[key], self.size).reshape(-1, 4, self.size, self.size)
            pictures[key] = torch.cat([flat, flat.flip(-1)]) if self.rings else flat
        return pictures

    def input_pictures(self, item: dict, frame: int) -> Tensor:
        """`inputs [I, 4, S, S]` of one frame alone, see `pictures`."""
        side = item["inputs"].shape[-2]
        raw = item["inputs"].reshape(-1, side, side, 4)
        index = self.inputs[frame]
        flat = flatten(raw[index % len(raw)], self.size)
        return flat.flip(-1) if index[0] >= len(raw) else flat


class ImageDataset(Dataset):
    """All pictures of the prepared samples, in memory; see `Frames.pictures`. An item also has the `labels [F]` of its frames, and
    `object`, one number an object.
    """

    def __init__(self, data: Path, config: dict):
        prepared = PreparedDataset(data)
        self.weights = prepared.weights
        self.frames = Frames(prepared, config)
        self.items, names = [], {}
        for item in (prepared[index] for index in range(len(prepared))):
            number = torch.tensor(names.setdefault(item["name"], len(names)))
            self.items.append({**self.frames.pictures(item), "labels": self.frames.labels(item), "object": number})

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]


class LatentDataset(Dataset):
    """What the UNet learns from, encoded once: `tile [c, h, w]`, `references [I, c, h', w']` and `embeds [I, D]`, float16, and the
    `label []` of the tile's rig.

    Views are encoded one by one and laid out as tiles afterwards, since the frames of a ring share them.

    Args:
        folder: Keeps the arrays between runs. Delete it when there are more samples.
    """

    def __init__(self, data: Path, config: dict, pipeline: MultiViewTilePipeline, folder: Path):
        with torch.no_grad():
            empty, _ = pipeline.prepare_pixels([Image.new("RGBA", [config["view_size"]] * 2)])
            self.empty = pipeline.vae.encode(empty).latent_dist.mode()[0]  # the reference of the negative branch
        names = ("views", "references", "embeds", "view_ids", "input_ids", "labels", "weights")
        if not folder.exists():
            partial = folder.with_name(folder.name + ".part")
            partial.mkdir(parents=True, exist_ok=True)
            for name, array in self._encode(ImageDataset(data, config), config, pipeline).items():
                np.save(partial / f"{name}.npy", array)
            partial.rename(folder)
        self.arrays = {name: torch.from_numpy(np.load(folder / f"{name}.npy")) for name in names}
        self.weights = self.arrays["weights"]

    @staticmethod
    @torch.no_grad()
    def _encode(images: ImageDataset, config: dict, pipeline: MultiViewTilePipeline) -> dict[str, np.ndarray]:
        generator = torch.Generator().manual_seed(config["seed"])
        vision_size = pipeline.vision_encoder.config.image_size
        pipeline.vae.to(memory_format=torch.channels_last)  # twice as fast on a CPU

        def encode(images: Tensor):
            pixels = to_pixels(images[:, : pipeline.vae.config.in_channels]).contiguous(
                memory_format=torch.channels_last
            )
            return pipeline.vae.encode(pixels).latent_dist

        total = (1 + config["recolored_copies"]) * len(images)
        # Made whole at once: small ones that are kept between large ones leave gaps of memory unused.
        arrays: dict[str, Tensor] = {}

        def put(name: str, number: int, value: Tensor) -> None:
            if name not in arrays:
                arrays[name] = torch.empty(total, *value.shape, dtype=torch.float16)
            arrays[name][number] = value

        for number in range(total):
            copy, index = divmod(number, len(images))
            item = images[index]
            # Another order of the channels teaches colours to come from the reference, not from the object's kind.
            order = torch.cat([torch.randperm(3, generator=generator) if copy else torch.arange(3), torch.tensor([3])])
            views, inputs = item["views"][:, order], item["inputs"][:, order]
            small = F.interpolate(inputs[:, :3].float(), (vision_size, vision_size), mode="bicubic", antialias=True)
            put("views", number, encode(views).mode())
            put("references", number, encode(inputs).sample(generator))
            put("embeds", number, pipeline.vision_encoder(to_pixels(small, 1.0)).image_embeds)
        frames = images.frames
        tables = {
            name: (own + arrays[of].shape[1] * torch.arange(total).view(-1, 1, 1)).flatten(0, 1)
            for name, own, of in (("view_ids", frames.views, "views"), ("input_ids", frames.inputs, "references"))
        }
        tables["weights"] = images.weights.repeat(total // len(images)).repeat_interleave(len(frames.views))
        tables["labels"] = torch.cat([item["labels"] for item in images.items]).repeat(total // len(images))
        flat = {name: array.flatten(0, 1) for name, array in arrays.items()}
        return {name: array.numpy() for name, array in {**flat, **tables}.items()}

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        views, inputs = self.arrays["view_ids"][index], self.arrays["input_ids"][index]
        return {
            "tile": to_tile(self.arrays["views"][views]),
            "references": self.arrays["references"][inputs],
            "embeds": self.arrays["embeds"][inputs],
            "label": self.arrays["labels"][index],
        }


def preview_examples(data: Path, config: dict, count: int = 6) -> list[tuple[Image.Image, Image.Image, str]]:
    """Input pictures (`RGBA`), true tiles (on grey) and their rigs' names, of samples spread over a prepared folder."""
    prepared = PreparedDataset(data)
    frames = Frames(prepared, config)
    examples = []
    for index in np.linspace(0, len(prepared) - 1, min(count, len(prepared))).astype(int):
        item = prepared[index]
        pictures, rig = frames.pictures(item), frames.known[int(frames.labels(item)[0])]
        tile = to_tile(pictures["views"][frames.views[0]])
        examples.append((to_pil(pictures["inputs"][frames.inputs[0, 0]]), to_pil(tile[:3]), rig))
    return examples


def to_pil(image: Tensor) -> Image.Image:
    """`[3, H, W]` uint8, or `[4, H, W]`: colours on grey and a mask, which becomes the alpha."""
    picture = Image.fromarray(image[:3].permute(1, 2, 0).numpy())
    return picture if len(image) == 3 else remove_grey(picture, Image.fromarray(image[3].numpy()))
