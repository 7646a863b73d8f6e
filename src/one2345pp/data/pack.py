"""Samples as small files: a zip that holds pictures as WebP and volumes as xz, each member named after its key, shape and coding.

Pictures lose a little of their colours (42.6 dB over grey, 37.3 dB of the object alone, mean of 17 training objects) and nothing of
their masks. Distances are kept in `LEVELS` steps to either side of the surface, wrong by a twentieth of a cell at most, by a tenth at
the edge of the band.
"""

from __future__ import annotations

import io
import lzma
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image

from .maps import MAPS


PICTURES = ("views", "inputs")
QUALITY = 90  # of WebP colours; alpha and maps are lossless
MODES = {1: "L", 3: "RGB", 4: "RGBA"}  # of pictures by their channels
LEVELS = 31  # the truncation distance in steps: 6 bits with the sign
XZ = {"format": lzma.FORMAT_XZ, "check": lzma.CHECK_CRC32, "preset": 6 | lzma.PRESET_EXTREME}


def write_sample(file: Path, sample: dict[str, np.ndarray]) -> None:
    """Write a sample as `prepare.make_frame` or `make_ring` returns it; the file is there whole or not at all.

    Args:
        file: Path to write.
        sample: `views` and `inputs [..., S, S, 4]`, maps by their names in `MAPS`, `[..., S, S, 1 or 3]`, `sdf [X, Y, Z]` int8, any
            other key; all but `sdf` uint8.
    """
    partial = file.with_name(file.name + ".part")
    with zipfile.ZipFile(partial, "w") as archive:
        for key, array in sample.items():
            shape = "x".join(map(str, array.shape))
            if key in PICTURES or key in MAPS:
                archive.writestr(f"{key}.{shape}.webp", _picture_bytes(array, lossless=key in MAPS))
            else:
                coded = _coarse(array) if key == "sdf" else array
                archive.writestr(f"{key}.{shape}.xz", lzma.compress(coded.tobytes(), **XZ))
    partial.replace(file)


def read_sample(file: Path) -> dict[str, np.ndarray]:
    """What `write_sample` wrote: uint8 arrays, and `sdf` int8 where 127 is the truncation distance."""
    sample = {}
    with zipfile.ZipFile(file) as archive:
        for member in archive.namelist():
            key, sides, coding = member.split(".")
            shape = tuple(map(int, sides.split("x")))
            data = archive.read(member)
            if coding == "webp":
                picture = Image.open(io.BytesIO(data)).convert(MODES[shape[-1]])
                sample[key] = np.array(picture).reshape(shape)
            else:
                array = np.frombuffer(lzma.decompress(data), np.int8 if key == "sdf" else np.uint8).reshape(shape)
                sample[key] = _fine(array) if key == "sdf" else array.copy()
    return sample


def _picture_bytes(
    pictures: np.ndarray,  # [..., S, S, C]
    lossless: bool,
) -> bytes:
    """Pictures one above another as one WebP."""
    column = pictures.reshape(-1, *pictures.shape[-2:])
    buffer = io.BytesIO()
    Image.fromarray(column.squeeze(-1) if column.shape[-1] == 1 else column).save(
        buffer, "WEBP", lossless=lossless, quality=QUALITY, alpha_quality=100, method=4
    )
    return buffer.getvalue()


def _coarse(sdf: np.ndarray) -> np.ndarray:
    """-127..127 to -LEVELS..LEVELS; cells nearer than the truncation distance stay nearer."""
    steps = np.round(sdf.astype(np.float32) * (LEVELS / 127))
    return np.where(np.abs(sdf.astype(np.int16)) < 127, steps.clip(1 - LEVELS, LEVELS - 1), steps).astype(np.int8)


def _fine(steps: np.ndarray) -> np.ndarray:
    return np.round(steps.astype(np.float32) * (127 / LEVELS)).astype(np.int8)
