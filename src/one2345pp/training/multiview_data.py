"""What the first stage learns from: prepared pictures on grey, as tiles, and encoded once. What it learns lives elsewhere."""

# B samples, I input pictures a sample, c latent channels, h w latent grid, D width of the text context

from __future__ import annotations

from collections.abc import Sequence
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
from ..geometry.tile import BACKGROUND, COLUMNS, ROWS, join_views, remove_grey
from ..pipelines.multiview.latents import IMAGE_SCALE
from ..pipelines.pipeline_multiview_tile import MultiViewTilePipeline


def flatten(views: Tensor, size: int) -> Tensor:
    """RGBA pictures `[..., S, S, 4]` (uint8, straight alpha) at a view's size: colours on grey, masks, `[..., 4, size, size]`."""
    rgb, alpha = views[..., :3].float(), views[..., 3:].float() / 255
    flat = rgb * alpha + rgb.new_tensor(BACKGROUND) * (1 - alpha)
    flat = torch.cat([flat, alpha * 255], -1).movedim(-1, -3)
    if flat.shape[-1] != size:
        small = F.interpolate(flat.reshape(-1, *flat.shape[-3:]), size=(size, size), mode="bicubic", antialias=True)
        flat = small.reshape(*flat.shape[:-2], size, size)
    return flat.round().clamp(0, 255).byte()


def to_pixels(images: Tensor, scale: float = IMAGE_SCALE) -> Tensor:
    """uint8 images as the networks see them: [-1, 1] times `scale`."""
    return (images.float() / 127.5 - 1) * scale


class Frames:
    """Which pictures of a prepared item make which tile.

    Attributes:
        views: For each frame its six views, `[F, 6]` indices into `pictures(...)["views"]`.
        inputs: Its input pictures, `[F, I]` indices into `pictures(...)["inputs"]`.

    Args:
        prepared: The samples.
        rigs: Names of those to learn, in the order of their labels.
        size: Side of a view in pixels.
    """

    def __init__(self, prepared: PreparedDataset, rigs: Sequence[str], size: int):
        self.rigs, self.known, self.size = list(prepared.meta["rigs"]), list(rigs), size
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

    def __init__(self, data: Path, rigs: Sequence[str], size: int):
        prepared = PreparedDataset(data)
        self.weights = prepared.weights
        self.frames = Frames(prepared, rigs, size)
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

    Views are encoded one by one and laid out as tiles afterwards, since the frames of a ring share them. Latents stay on disk.

    Args:
        data: Folder of prepared samples.
        pipeline: Its autoencoder and image encoder encode views of its size, of the rigs that it knows.
        folder: Keeps the arrays between runs. Delete it when there are more samples.
        device: Where they compute if there is something to encode; then they are as before.
        recolored_copies: Of each sample, with colour channels in another order.
        seed: Decides noise and orders.
    """

    def __init__(
        self,
        data: Path,
        pipeline: MultiViewTilePipeline,
        folder: Path,
        device: str | torch.device = "cpu",
        recolored_copies: int = 0,
        seed: int = 0,
    ):
        with torch.no_grad():
            empty, _ = pipeline.prepare_pixels([Image.new("RGBA", [pipeline.config.view_size] * 2)])
            self.empty = pipeline.vae.encode(empty).latent_dist.mode()[0]  # the reference of the negative branch
        if not folder.exists():
            partial = folder.with_name(folder.name + ".part")
            partial.mkdir(parents=True, exist_ok=True)
            home = pipeline.vae.device
            pipeline.vae.to(device, memory_format=torch.channels_last)  # twice as fast on a CPU
            pipeline.vision_encoder.to(device)
            self._encode(PreparedDataset(data), pipeline, partial, recolored_copies, seed)
            # As in a run that finds all encoded: a layout, too, decides the last bits of what is computed.
            pipeline.vae.to(home, memory_format=torch.contiguous_format)
            pipeline.vision_encoder.to(home)
            partial.rename(folder)
        self.folder = folder
        self.weights = torch.from_numpy(np.load(folder / "weights.npy"))
        self._open()

    def _open(self) -> None:
        names = ("views", "references", "embeds", "view_ids", "input_ids", "labels")
        self.arrays = {name: np.load(self.folder / f"{name}.npy", mmap_mode="r") for name in names}

    def __getstate__(self) -> dict:
        """Without the arrays: pickled they would be in memory, once in every worker."""
        return {name: value for name, value in self.__dict__.items() if name != "arrays"}

    def __setstate__(self, state: dict) -> None:
        self.__dict__.update(state)
        self._open()

    @staticmethod
    @torch.no_grad()
    def _encode(
        prepared: PreparedDataset, pipeline: MultiViewTilePipeline, folder: Path, recolored_copies: int, seed: int
    ) -> None:
        """Write all arrays. One sample's pictures are in memory at a time: those of a ring are 19.7 MB at 320 pixels."""
        generator = torch.Generator().manual_seed(seed)
        vae, vision = pipeline.vae, pipeline.vision_encoder
        size, total = vision.config.image_size, (1 + recolored_copies) * len(prepared)
        frames, labels = Frames(prepared, pipeline.rigs, pipeline.config.view_size), []
        arrays: dict[str, np.ndarray] = {}

        def encode(images: Tensor):
            pixels = to_pixels(images[:, : vae.config.in_channels]).to(vae.device)
            return vae.encode(pixels.contiguous(memory_format=torch.channels_last)).latent_dist

        def put(name: str, number: int, value: Tensor) -> None:
            value, count = value.half().cpu().numpy(), len(value)
            if name not in arrays:
                shape = (total * count, *value.shape[1:])
                arrays[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", value.dtype, shape)
            arrays[name][number * count : (number + 1) * count] = value

        def add(number: int) -> None:
            copy, index = divmod(number, len(prepared))
            item = prepared[index]
            labels.append(frames.labels(item))
            # Another order of the channels teaches colours to come from the reference, not from the object's kind.
            order = torch.cat([torch.randperm(3, generator=generator) if copy else torch.arange(3), torch.tensor([3])])
            views, inputs = (pictures[:, order] for pictures in frames.pictures(item).values())
            small = F.interpolate(inputs[:, :3].float(), (size, size), mode="bicubic", antialias=True)
            put("views", number, encode(views).mode())
            put("references", number, encode(inputs).sample(generator))
            put("embeds", number, vision(to_pixels(small, 1.0).to(vision.device)).image_embeds)

        for number in range(total):
            add(number)  # which returns, so that its pictures are gone before the next ones are read
        for name, own, of in (("view_ids", frames.views, "views"), ("input_ids", frames.inputs, "references")):
            firsts = len(arrays[of]) // total * torch.arange(total).view(-1, 1, 1)  # of each sample's rows
            np.save(folder / f"{name}.npy", (own + firsts).flatten(0, 1).numpy())
        np.save(folder / "labels.npy", torch.cat(labels).numpy())
        weights = prepared.weights.repeat(total // len(prepared)).repeat_interleave(len(frames.views))
        np.save(folder / "weights.npy", weights.numpy())

    def __len__(self) -> int:
        return len(self.weights)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        views, inputs = self.arrays["view_ids"][index], self.arrays["input_ids"][index]
        return {
            "tile": join_views(torch.from_numpy(self.arrays["views"][views])),
            "references": torch.from_numpy(self.arrays["references"][inputs]),
            "embeds": torch.from_numpy(self.arrays["embeds"][inputs]),
            "label": torch.tensor(self.arrays["labels"][index]),
        }


def preview_examples(
    data: Path, rigs: Sequence[str], size: int, count: int = 6
) -> list[tuple[Image.Image, Image.Image, str]]:
    """Input pictures (`RGBA`), true tiles (on grey) and their rigs' names, of samples spread over a prepared folder."""
    prepared = PreparedDataset(data)
    frames = Frames(prepared, rigs, size)
    examples = []
    for index in np.linspace(0, len(prepared) - 1, min(count, len(prepared))).astype(int):
        item = prepared[index]
        pictures, rig = frames.pictures(item), frames.known[int(frames.labels(item)[0])]
        tile = join_views(pictures["views"][frames.views[0]])
        examples.append((to_pil(pictures["inputs"][frames.inputs[0, 0]]), to_pil(tile[:3]), rig))
    return examples


def to_pil(image: Tensor) -> Image.Image:
    """`[3, H, W]` uint8, or `[4, H, W]`: colours on grey and a mask, which becomes the alpha."""
    picture = Image.fromarray(image[:3].permute(1, 2, 0).numpy())
    return picture if len(image) == 3 else remove_grey(picture, Image.fromarray(image[3].numpy()))
