"""What a call of the whole chain may be given. The stages check their own arguments."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from PIL import Image

from ...errors import InputError
from ...geometry.cameras import CameraRig
from ...geometry.views import Views
from ...names import TEXTURE_SIZES
from ..checks import check_generators
from ..picture.guide import check_elevation
from ..stages import settings_of
from ..volume.checks import check_vector_width


# four triangles are the smallest closed mesh
LIMITS = {"max_faces": (4, None), "texture_size": TEXTURE_SIZES, "num_texture_steps": (0, None)}


def check_inputs(
    *,
    image,
    prompt: str | list[str] | None,
    text_to_image,
    generator,
    elevation: float | list[float | None] | None,
    guided: bool,
    **counts: int | None,
) -> int:
    """Raise `InputError` for anything the call could not use; return the number of objects asked for."""
    if (image is None) == (prompt is None):
        raise InputError(f"image, prompt: got {'neither' if image is None else 'both'}, expected exactly one of them.")
    if prompt is not None and text_to_image is None:
        raise InputError("prompt: needs text_to_image, a diffusers text-to-image pipeline to draw the first image.")
    if prompt is not None and not all(isinstance(text, str) and text.strip() for text in as_list(prompt)):
        raise InputError(f"prompt: got {prompt!r}, expected text, or a list of texts.")
    number = len(as_list(image if prompt is None else prompt))
    if number == 0:
        raise InputError("image: got an empty list, expected at least one image.")
    check_object_inputs(number, generator, elevation, guided, **counts)
    return number


def check_object_inputs(number: int, generator, elevation, guided: bool, **counts: int | None) -> None:
    """What all calls for `number` objects have in common: one of everything or one an object, and counts within their limits."""
    check_generators(generator, number, "an object")
    check_elevation(elevation, number)
    if not guided and any(degrees is not None for degrees in as_list(elevation)):
        raise InputError("elevation: is for the picture's guide, which this call does without. Leave it out.")
    for name, count in counts.items():
        least, most = LIMITS.get(name, (1, None))
        if count is not None and count < least:
            raise InputError(f"{name}: got {count}, expected at least {least}.")
        if count is not None and most is not None and count > most:
            raise InputError(f"{name}: got {count}, expected at most {most}.")
    if not guided and (counts.get("num_candidates") or 1) > 1:
        raise InputError(
            "num_candidates: the picture's guide tells the best, and this call has none. Pass one candidate."
        )


def check_volume_stage(volume, drawn_config: Mapping, vision_encoder) -> None:
    """Refuse a volume stage that a chain could not use: with other settings for drawn views, maps that nobody draws, another width.

    Args:
        vision_encoder: The first stage's, which serves the volume stage if that has none.
    """
    known = settings_of(volume)
    if unknown := sorted(set(drawn_config) - set(known)):
        raise InputError(
            f"drawn_volume_config: got {unknown}, expected settings of the volume stage: {', '.join(sorted(known))}."
        )
    encoders = (volume.occupancy_condition, volume.sparse_condition, volume.fine_condition)
    if maps := sorted({name for encoder in encoders if encoder is not None for name in encoder.config.maps or ()}):
        raise InputError(
            f"volume: its networks need maps of the views ({', '.join(maps)}), which no first stage draws. Use the volume stage "
            "alone, and pass maps to its call."
        )
    unets = {name: getattr(volume, name) for name in ("occupancy_unet", "sparse_unet", "fine_unet")}
    check_vector_width(volume.vision_encoder or vision_encoder, **unets)


def check_prepared(image) -> Image.Image:
    """An image that is cut out, centred and square already."""
    if not isinstance(image, Image.Image) or image.mode != "RGBA" or image.width != image.height:
        raise InputError("image: with background='none' expected a square RGBA picture, as `prepare_image` makes it.")
    return image


def one_each(name: str, value, number: int) -> list:
    """One for each of `number` objects, or `None` for each."""
    values = [None] * number if value is None else as_list(value)
    if len(values) != number:
        raise InputError(f"{name}: got {len(values)} for {number} objects, expected one an object.")
    return values


def callbacks_of(stages: Mapping[str, Any], callback, names: Sequence[str] | None) -> dict[str, dict]:
    """Arguments of each stage for a callback of the whole chain: of the tensors asked for, those that the stage has."""
    if callback is None:
        return {role: {} for role in stages}
    if names is None:  # diffusers' own callbacks say what they need
        names = getattr(callback, "tensor_inputs", None)
    known = {role: list(getattr(stage, "_callback_tensor_inputs", names or [])) for role, stage in stages.items()}
    everything = list(dict.fromkeys(name for own in known.values() for name in own))
    if unknown := [name for name in names or [] if name not in everything]:
        raise InputError(f"callback_on_step_end_tensor_inputs: got {unknown}, expected some of {everything}.")
    return {
        role: {"callback_on_step_end": callback}
        | ({} if names is None else {"callback_on_step_end_tensor_inputs": [name for name in names if name in own]})
        for role, own in known.items()
    }


def as_candidates(
    views: Views | Sequence, cameras: CameraRig | str | Sequence[CameraRig | str] | None
) -> list[list[Views]]:
    """Views of each object, `[B][N]`: of one object, of a list of objects, or a list of candidates for each object."""
    nested = isinstance(views, list | tuple) and len(views) > 0 and isinstance(views[0], list | tuple)
    if not nested or (len(views[0]) > 0 and isinstance(views[0][0], Image.Image)):
        return [[one] for one in Views.batch(views, cameras)]
    rigs = list(cameras) if isinstance(cameras, list | tuple) else [cameras] * len(views)
    if len(rigs) != len(views) or not all(len(candidates) for candidates in views):
        raise InputError(
            f"views: got {[len(each) for each in views]} candidates and {len(rigs)} rigs, expected one rig an object."
        )
    return [Views.batch(list(candidates), rig) for candidates, rig in zip(views, rigs, strict=True)]


def with_guide_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """A chain's config whose settings of the guide are `guide_config`, as they were not in folders of version 0.1.0."""
    old = {"default_num_candidates": "num_candidates", "believe_picture": "shapes_volume"}
    guide = {new: config[name] for name, new in old.items() if name in config}
    rest = {name: value for name, value in config.items() if name not in (*old, "tell_kinds")}
    return rest | ({"guide_config": guide} if guide else {})


def as_list(value) -> list:
    """A list as it is, anything else as a list of one."""
    return list(value) if isinstance(value, list | tuple) else [value]


def given(**options) -> dict:
    """The options that are not `None`."""
    return {name: value for name, value in options.items() if value is not None}
