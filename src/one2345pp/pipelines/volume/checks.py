"""What a call of the stage 2 pipeline may be given beside views."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from PIL import Image

from ...errors import InputError
from ...geometry.views import Views
from ...models.condition_encoder import ConditionEncoder
from ..checks import check_counts, check_generators


OUTPUT_TYPES = ("mesh", "volume", "pt", "latent")


def check_inputs(
    *,
    views: list[Views],
    image: Image.Image | Sequence[Image.Image] | None,
    num_occupancy_steps: int | None,
    num_sparse_steps: int | None,
    generator,
    output_type: str,
) -> list[Image.Image] | None:
    """Input images as a list with one a sample, if there are some; raises `InputError` for what cannot be used."""
    if output_type not in OUTPUT_TYPES:
        raise InputError(f"output_type: got {output_type!r}, expected 'mesh', 'volume', 'pt' or 'latent'.")
    check_counts(num_occupancy_steps=num_occupancy_steps, num_sparse_steps=num_sparse_steps)
    check_generators(generator, len(views), "a sample")
    images = None if image is None else list(image) if isinstance(image, list | tuple) else [image]
    if images is not None and len(images) != len(views):
        raise InputError(f"image: got {len(images)} input images for {len(views)} samples.")
    return images


def check_maps(
    maps: Mapping[str, Sequence[Image.Image]] | Sequence[Mapping[str, Sequence[Image.Image]]] | None,
    views: list[Views],
    encoders: Sequence[ConditionEncoder | None],
) -> list[dict[str, list[Image.Image]]]:
    """For each sample a picture a view of every map that the encoders take, and of no other; padded as the views are."""
    needed = {name for encoder in encoders if encoder is not None for name in encoder.config.maps or ()}
    each = [{}] * len(views) if maps is None else [maps] if isinstance(maps, Mapping) else list(maps)
    if len(each) != len(views):
        raise InputError(f"maps: got {len(each)}, expected one dictionary a sample: {len(views)}.")
    for sample, given in zip(views, each, strict=True):
        if set(given) != needed:
            known = f"take {', '.join(sorted(needed))}" if needed else "take none"
            raise InputError(f"maps: got {sorted(given)}, but these condition encoders {known}.")
        for name, pictures in given.items():
            if len(pictures) != len(sample):
                raise InputError(f"maps: got {len(pictures)} pictures of {name}, expected one a view: {len(sample)}.")
    return [
        {name: list(Views(pictures, sample.rig).squared()) for name, pictures in given.items()}
        for sample, given in zip(views, each, strict=True)
    ]


def check_vector_width(vision_encoder, **unets) -> None:
    """Networks take a global vector as wide as the image encoder makes it, or none."""
    if vision_encoder is None:
        return
    width = vision_encoder.config.projection_dim
    for name, unet in unets.items():
        taken = 0 if unet is None else unet.config.global_channels
        if taken not in (0, width):
            raise InputError(
                f"vision_encoder: makes vectors of {width} numbers, but {name} takes {taken}. Pass the image encoder that the volume "
                "networks were trained with, or None to do without the vector."
            )
