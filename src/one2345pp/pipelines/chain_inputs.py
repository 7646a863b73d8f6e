"""What a call of the whole chain may be given. The stages check their own arguments."""

from __future__ import annotations

from ..errors import InputError
from .elevations import check_elevation
from .multiview_inputs import check_generators
from .pipeline_texture_refinement import TEXTURE_SIZES


LEAST = {"max_faces": 4, "texture_size": TEXTURE_SIZES[0]}  # four triangles are the smallest closed mesh
MOST = {"texture_size": TEXTURE_SIZES[1]}


def check_call(image, prompt, text_to_image, generator, elevation, **counts: int | None) -> int:
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
    check_generators(generator, number, "an object")
    check_elevation(elevation, number)
    for name, count in counts.items():
        least = LEAST.get(name, 1)
        if count is not None and count < least:
            raise InputError(f"{name}: got {count}, expected at least {least}.")
        if name in MOST and count is not None and count > MOST[name]:
            raise InputError(f"{name}: got {count}, expected at most {MOST[name]}.")
    return number


def as_list(value) -> list:
    """A list as it is, anything else as a list of one."""
    return list(value) if isinstance(value, (list, tuple)) else [value]
