"""What a `cameras.json` says, frame by frame; lenses that a rig does not have are refused. Rigs live in `cameras`."""

from __future__ import annotations

import json
import math
import warnings
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor

from ..errors import InputError
from .pictures import find_picture


LENS = ("camera_angle_x", "camera_angle_y", "fl_x", "fl_y", "ortho_scale")
DISTORTION = ("k1", "k2", "k3", "k4", "k5", "k6", "p1", "p2", "p3", "p4")
MODELS = ("PINHOLE", "SIMPLE_PINHOLE", "RADIAL", "SIMPLE_RADIAL", "OPENCV", "FULL_OPENCV", "PERSP", "ORTHO")
OFF_CENTRE = 0.005  # of a side, that the principal point may lie off the middle
NOT_SQUARE = 0.01  # that fields of view may differ by which the numbers of one lens say
NO_DISTORTION = 1e-3  # moves no pixel by more than about `OFF_CENTRE`

ORIENTATION = 0x0112  # Exif's


@dataclass(frozen=True)
class Frame:
    """A view that a file names.

    Args:
        name: Its `file_path`, parts joined by `/`.
        pose: Camera to world, `[4, 4]`, OpenGL axes.
        fov: Across the picture, radians; 0 for an orthographic camera.
        half_width: That an orthographic camera shows, world units; 0 for a pinhole camera.
        tallness: Height of the picture over its width; 1 if nothing tells.
    """

    name: str
    pose: Tensor
    fov: float
    half_width: float
    tallness: float


def read_frames(path: Path) -> list[Frame]:
    """Read a file in the NeRF `transforms.json` form; every lens value stands for the whole file, or for one frame in that.

    The field of view is `camera_angle_x` (radians), or follows from `fl_x` and `w` (pixels; without `w`, those of the picture); an
    orthographic camera has Blender's `ortho_scale` instead, the width that it shows in world units. Other lens values are compared
    with that.

    Raises:
        InputError: If there is no such file, it does not have that form, or a lens is not centred, square and undistorted; the
            message names the frame.
    """
    try:
        data = json.loads(path.read_text(encoding="utf-8-sig"))  # editors on Windows put a mark in front
    except FileNotFoundError:
        raise InputError(
            f"{path}: not found. A folder of views needs a cameras.json (NeRF transforms.json form)."
        ) from None
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise InputError(f"{path}: is not JSON ({error}).") from None
    frames = data.get("frames") if isinstance(data, dict) else None
    if not isinstance(frames, list) or not frames:
        raise InputError(f"{path}: has no list 'frames' with at least one frame.")
    read = []
    for index, frame in enumerate(frames):
        name = frame.get("file_path", f"frame {index}") if isinstance(frame, dict) else f"frame {index}"
        try:
            read.append(_read_frame(path.parent, data, frame))
        except InputError as error:
            raise InputError(f"{path}: {name}: {error}") from None
        except (KeyError, TypeError, ValueError) as error:
            raise InputError(f"{path}: {name}: needs file_path and a 4x4 transform_matrix ({error!r}).") from None
    return read


def _read_frame(folder: Path, data: dict, frame: dict) -> Frame:
    name = str(frame["file_path"]).replace("\\", "/")
    pose = torch.tensor(frame["transform_matrix"], dtype=torch.float32)
    if pose.shape == (4, 4) and (pose[3] - torch.tensor([0.0, 0.0, 0.0, 1.0])).abs().max() > 1e-3:
        raise InputError(
            f"transform_matrix: its last row is {pose[3].tolist()}, expected 0, 0, 0, 1. "
            "Transpose matrices that are stored by columns."
        )
    own = {key: value for key, value in frame.items() if value is not None}
    lens_is_own = any(key in own for key in LENS)
    shared = {k: v for k, v in data.items() if v is not None and not (lens_is_own and k in LENS)}
    values = {**shared, **own}
    size = _size(folder, name, values)
    _check_lens(values, size)
    fov, half_width = _field_of_view(values, size)
    return Frame(name, pose, fov, half_width, size[1] / size[0] if size else 1.0)


# --- lenses -----------------------------------------------------------------------------------------------------


def _number(values: dict, key: str) -> float | None:
    """A finite number, or `None` if there is none of that name."""
    if key not in values:
        return None
    try:
        number = float(values[key])
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{key}: got {values[key]!r}, expected a number.")
    return number


def _positive(values: dict, key: str, limit: float = math.inf) -> float | None:
    number = _number(values, key)
    if number is not None and not 0 < number < limit:
        expected = "a positive number" if limit == math.inf else "radians between 0 and pi"
        raise InputError(f"{key}: got {number:g}, expected {expected}.")
    return number


def _size(folder: Path, name: str, values: dict) -> tuple[float, float] | None:
    """Width and height of a frame's picture in pixels: as the file says, else as the picture does, if it is there."""
    width, height = _positive(values, "w"), _positive(values, "h")
    if width and height:
        return width, height
    own = _size_of_picture(folder, name)
    if own is None:
        return (width, width) if width else None
    scale = width / own[0] if width else height / own[1] if height else 1
    return own[0] * scale, own[1] * scale


def _size_of_picture(folder: Path, name: str) -> tuple[int, int] | None:
    file = find_picture(folder, name)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            with Image.open(file) as picture:  # reads no pixels
                on_its_side = picture.getexif().get(ORIENTATION, 1) >= 5
                return picture.size[::-1] if on_its_side else picture.size
    except Exception:  # whoever opens the picture says what is wrong with it
        return None


def _check_lens(values: dict, size: tuple[float, float] | None) -> None:
    """Refuse lenses that are not centred, or bend straight lines."""
    model = str(values.get("camera_model", "PINHOLE"))
    if model.upper() not in MODELS or values.get("is_fisheye"):
        model = "fisheye" if values.get("is_fisheye") else model
        raise InputError(f"camera_model: got {model!r}, expected a pinhole camera. Undistort the pictures.")
    bent = [key for key in DISTORTION if abs(_number(values, key) or 0) > NO_DISTORTION]
    if bent:
        said = ", ".join(f"{key} = {_number(values, key):g}" for key in bent)
        raise InputError(f"{said}: the lens distorts. Undistort the pictures, and leave {', '.join(bent)} out.")
    for axis, (key, side) in enumerate((("cx", "w"), ("cy", "h"))):
        value = _number(values, key)
        if value is None:
            continue
        if size is None:
            raise InputError(f"has {key}, but no {side}. Add the pictures' width w and height h in pixels.")
        middle = size[axis] / 2
        if abs(value - middle) > max(OFF_CENTRE * size[axis], 0.5):  # half a pixel is another way to count
            raise InputError(
                f"{key}: is {value:g}, expected the middle of the picture, {middle:g}. "
                "Crop or pad the pictures until the optical axis is in their middle, and leave cx and cy out."
            )


def _field_of_view(values: dict, size: tuple[float, float] | None) -> tuple[float, float]:
    """`fov` and `half_width`; refused if numbers of one lens contradict each other."""
    scale = _positive(values, "ortho_scale")
    angle, upright = (_positive(values, key, math.pi) for key in ("camera_angle_x", "camera_angle_y"))
    across, down = _positive(values, "fl_x"), _positive(values, "fl_y")
    if scale:
        if angle or upright or across or down:
            key = next(key for key in LENS if key in values)
            raise InputError(f"has {key} and ortho_scale. Keep ortho_scale if the camera is orthographic, else {key}.")
        return 0.0, scale / 2
    tangents = {}  # of half the angle from the left to the right border, by what says so
    if angle:
        tangents["camera_angle_x"] = math.tan(angle / 2)
    if size and across:
        tangents["fl_x and w"] = size[0] / 2 / across
    if size and down:
        tangents["fl_y and w"] = size[0] / 2 / down
    if size and upright:
        tangents["camera_angle_y, w and h"] = math.tan(upright / 2) * size[0] / size[1]
    if not tangents:
        raise InputError(
            "has no camera_angle_x (radians), fl_x with w (pixels) or ortho_scale (world units), nor has the file."
        )
    (first, tangent), *others = tangents.items()
    for key, other in others:
        if abs(other / tangent - 1) > NOT_SQUARE:
            a, b = (math.degrees(2 * math.atan(value)) for value in (tangent, other))
            raise InputError(
                f"by {first} its field of view is {a:.4g} degrees wide, by {key} {b:.4g} if pixels are square. "
                "Correct what is wrong, or scale the pictures until their pixels are square."
            )
    return angle or 2 * math.atan(tangent), 0.0
