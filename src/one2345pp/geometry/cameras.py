"""Cameras: named rigs, rigs from matrices, `cameras.json`, projection and rays.

Images, meshes and rendering live elsewhere, what `cameras.json` may say in `camera_files`. Axes: V views, P points, H W pixels.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, replace
from numbers import Integral
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from ..names import RIGS
from .camera_files import read_frames
from .camera_worlds import refuse_other_worlds


@dataclass(frozen=True, eq=False)
class CameraRig:
    """`V` cameras with square images and centred principal points, pinhole or orthographic.

    World: right-handed, +Y up, the object's front is +Z, the object inside the sphere of radius 0.5 about the origin.
    Cameras: OpenGL axes (x right, y up, looking along -z).

    Args:
        camera_to_world: Poses, `[V, 4, 4]`, float32.
        fov: Field of view of each pinhole camera in radians, 0 for an orthographic one, `[V]` or one number.
        name: Name of the rig if it is one of `CameraRig.names()`.
        half_width: Half of the width that each orthographic camera shows, in world units, 0 for a pinhole one, `[V]` or one number.
            By default all are pinhole.

    Raises:
        InputError: If poses are no rigid 4x4 matrices, or a camera has not exactly one of `fov` and `half_width`.
    """

    camera_to_world: Tensor  # [V, 4, 4]
    fov: Tensor  # [V] radians
    name: str | None = None
    half_width: Tensor | None = None  # [V] world units, never None once made

    def __post_init__(self):
        poses = torch.as_tensor(self.camera_to_world, dtype=torch.float32)
        if poses.ndim != 3 or poses.shape[1:] != (4, 4) or len(poses) == 0:
            raise InputError(
                f"camera_to_world: got shape {tuple(poses.shape)}, expected [V, 4, 4] with V of at least 1."
            )
        if not torch.isfinite(poses).all():
            raise InputError("camera_to_world: contains NaN or infinity. Pass finite 4x4 matrices.")
        rotations, identity = poses[:, :3, :3], torch.eye(3, device=poses.device)
        if (rotations.mT @ rotations - identity).abs().max() > 1e-2 or (torch.linalg.det(rotations) < 0).any():
            raise InputError(
                "camera_to_world: the upper left 3x3 blocks must be rotations (orthonormal, determinant +1). "
                "Remove scale and mirroring from the matrices."
            )
        fov = _one_each("fov", self.fov, poses)
        half_width = _one_each("half_width", 0.0 if self.half_width is None else self.half_width, poses)
        if not ((fov >= 0) & (fov < math.pi)).all():
            raise InputError("fov: must lie between 0 and pi radians.")
        if not ((half_width >= 0) & (half_width < math.inf)).all():
            raise InputError("half_width: must be positive and finite, in world units; 0 for a pinhole camera.")
        if ((fov > 0) == (half_width > 0)).any():
            raise InputError(
                "fov, half_width: exactly one must be positive for each camera. Pass a fov (radians) for a pinhole camera, "
                "a half_width (world units) for an orthographic one, and 0 for the other."
            )
        object.__setattr__(self, "camera_to_world", poses)
        object.__setattr__(self, "fov", fov)
        object.__setattr__(self, "half_width", half_width)

    # --- construction -------------------------------------------------------------------------------------------

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names that `CameraRig.named` knows."""
        return tuple(RIGS)

    @classmethod
    def named(cls, name: str) -> CameraRig:
        """One of the rigs of Zero123++: six views, the object sphere just filling each image."""
        if name not in RIGS:
            raise InputError(f"rig: got {name!r}, expected one of {', '.join(RIGS)}, or a CameraRig.")
        spec = RIGS[name]
        fov = math.radians(spec["fov"])
        rig = cls.from_angles(spec["azimuths"], spec["elevations"], fov, 0.5 / math.tan(fov / 2))
        return replace(rig, name=name)

    @classmethod
    def from_angles(cls, azimuths, elevations, fov, distance, half_width=None) -> CameraRig:
        """Cameras on spheres about the origin, looking at it.

        Args:
            azimuths: Degrees, `[V]`; 0 looks at the front (+Z), growing towards the camera's right (+X).
            elevations: Degrees above the horizon, `[V]` or one number.
            fov: Radians, `[V]` or one number; 0 for an orthographic camera.
            distance: World units from the origin, `[V]` or one number.
            half_width: Half of the width that an orthographic camera shows, world units, `[V]` or one number; 0 for a pinhole one.
        """
        azimuths = torch.as_tensor(azimuths, dtype=torch.float64).reshape(-1)
        elevations = torch.as_tensor(elevations, dtype=torch.float64).expand(len(azimuths))
        distance = torch.as_tensor(distance, dtype=torch.float64).expand(len(azimuths))
        a, e = torch.deg2rad(azimuths), torch.deg2rad(elevations)
        zero = torch.zeros_like(a)
        right = torch.stack([a.cos(), zero, -a.sin()], -1)
        back = torch.stack([e.cos() * a.sin(), e.sin(), e.cos() * a.cos()], -1)  # camera +z points away from the object
        poses = torch.eye(4, dtype=torch.float64).repeat(len(a), 1, 1)
        poses[:, :3, 0], poses[:, :3, 1], poses[:, :3, 2] = right, torch.linalg.cross(back, right), back
        poses[:, :3, 3] = back * distance[:, None]
        return cls(poses.float(), torch.as_tensor(fov, dtype=torch.float32), half_width=half_width)

    @classmethod
    def orthographic(cls, azimuths, elevations, width=1.0, distance=1.5) -> CameraRig:
        """Orthographic cameras that look at the origin.

        Args:
            azimuths: Degrees, as `from_angles`, `[V]`.
            elevations: Degrees above the horizon, `[V]` or one number.
            width: What a picture shows from its left to its right border, world units, `[V]` or one number. The object sphere just
                fills a width of 1.
            distance: World units from the origin, `[V]` or one number. Changes no picture; what is behind a camera is not seen.
        """
        return cls.from_angles(azimuths, elevations, 0.0, distance, torch.as_tensor(width, dtype=torch.float32) / 2)

    @classmethod
    def of(cls, rig: CameraRig | str) -> CameraRig:
        """A rig as it is, or by its name."""
        if not isinstance(rig, CameraRig | str):
            raise InputError(
                f"cameras: got {type(rig).__name__}, expected a CameraRig, or the name of one of {', '.join(RIGS)}. "
                "CameraRig(camera_to_world, fov) makes one of matrices."
            )
        return rig if isinstance(rig, CameraRig) else cls.named(rig)

    @classmethod
    def cat(cls, rigs: list[CameraRig]) -> CameraRig:
        """One rig with the cameras of several, in order."""
        poses, fovs, half_widths = (
            torch.cat([getattr(rig, key) for rig in rigs]) for key in ("camera_to_world", "fov", "half_width")
        )
        return cls(poses, fovs, half_width=half_widths)

    # --- files --------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> tuple[CameraRig, list[str]]:
        """Read a `cameras.json` in the NeRF `transforms.json` form, see `camera_files`.

        Args:
            path: The file, or the folder that holds it.

        Returns:
            The rig and the `file_path` of every frame, in the file's order.

        Raises:
            InputError: If there is no such file, it does not have that form, its lenses are not what a rig's are, or its cameras are
                of another world, see `check_frame`.
        """
        path = Path(path)
        path = path / "cameras.json" if path.is_dir() else path
        frames = read_frames(path)
        for frame in frames:
            try:
                cls(frame.pose[None] if frame.pose.ndim == 2 else frame.pose, frame.fov, half_width=frame.half_width)
            except InputError as error:
                raise InputError(f"{path}: {frame.name}: {error}") from None
        fov, half_width = torch.tensor([[frame.fov, frame.half_width] for frame in frames]).T
        rig, names = (
            cls(torch.stack([frame.pose for frame in frames]), fov, half_width=half_width),
            [f.name for f in frames],
        )
        try:
            rig.check_frame(names, torch.tensor([frame.tallness for frame in frames]))
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        return rig, names

    def check_frame(self, names: list[str], tallness: Tensor | float = 1.0) -> None:
        """Refuse cameras that cannot be of this world, in which the object is in the sphere of radius 0.5 about the origin.

        Args:
            names: What to call each camera, `[V]`.
            tallness: Heights of their pictures over their widths, `[V]` or one number.

        Raises:
            InputError: If a camera sees nothing of that sphere (world-to-camera matrices, other axes, a world about another point),
                or all see it too small or too large to show the object (a world of another scale).
        """
        refuse_other_worlds(self.to("cpu"), names, torch.as_tensor(tallness).expand(len(self)))

    def save(self, path: str | Path, file_paths: list[str]) -> None:
        """Write a `cameras.json` naming `file_paths` (one a view, relative to the file); `load` reads it."""
        if len(file_paths) != len(self):
            raise InputError(f"file_paths: got {len(file_paths)}, expected one for each of {len(self)} cameras.")
        lenses = [
            {"ortho_scale": 2 * half_width} if half_width else {"camera_angle_x": fov}
            for fov, half_width in zip(self.fov.tolist(), self.half_width.tolist(), strict=True)
        ]
        same = all(lens == lenses[0] for lens in lenses)
        frames = [
            {"file_path": name, "transform_matrix": pose.tolist(), **({} if same else lens)}
            for name, pose, lens in zip(file_paths, self.camera_to_world, lenses, strict=True)
        ]
        path = Path(path)
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps({**lenses[0], "frames": frames}, indent=1))
        partial.replace(path)

    # --- views of the rig ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.camera_to_world)

    def __eq__(self, other) -> bool:
        """The same cameras in the same order, whatever they are called."""
        if not isinstance(other, CameraRig):
            return NotImplemented
        here = other.to(self.fov.device)
        return all(
            torch.equal(getattr(self, key), getattr(here, key)) for key in ("camera_to_world", "fov", "half_width")
        )

    def __getitem__(self, index) -> CameraRig:
        """The cameras at `index` (an int, slice or list), as a rig."""
        index = [int(index)] if isinstance(index, Integral) else index
        return CameraRig(self.camera_to_world[index], self.fov[index], half_width=self.half_width[index])

    def to(self, device) -> CameraRig:
        return CameraRig(self.camera_to_world.to(device), self.fov.to(device), self.name, self.half_width.to(device))

    def rotated(self, degrees: float) -> CameraRig:
        """Every camera moved by `degrees` of azimuth about the world's up axis."""
        a = math.radians(degrees)
        turn = torch.eye(4)
        turn[0, 0], turn[0, 2], turn[2, 0], turn[2, 2] = math.cos(a), math.sin(a), -math.sin(a), math.cos(a)
        return replace(self, camera_to_world=turn.to(self.camera_to_world) @ self.camera_to_world, name=None)

    @property
    def world_to_camera(self) -> Tensor:
        """`[V, 4, 4]`"""
        rotation = self.camera_to_world[:, :3, :3].mT
        out = self.camera_to_world.clone()
        out[:, :3, :3] = rotation
        out[:, :3, 3] = -(rotation @ self.camera_to_world[:, :3, 3:])[..., 0]
        return out

    @property
    def tan_half_fov(self) -> Tensor:
        """`[V]`, 0 for an orthographic camera."""
        return torch.tan(self.fov / 2)

    @property
    def is_orthographic(self) -> Tensor:
        """`[V]` bool"""
        return self.half_width > 0

    @property
    def positions(self) -> Tensor:
        """Camera centres in the world, `[V, 3]`. Rays of an orthographic camera do not meet there: see `rays`, `directions_to`."""
        return self.camera_to_world[:, :3, 3]

    def half_extent(
        self,
        depth: Tensor,  # [V, ...]
    ) -> Tensor:
        """World units from the middle of the picture to its border, at depths along the optical axis, `[V, ...]`.

        Twice that over the picture's side is how large a pixel is there.
        """
        tangent, half_width = (
            value.view(-1, *[1] * (depth.ndim - 1)) for value in (self.tan_half_fov, self.half_width)
        )
        return depth * tangent + half_width

    def directions_to(
        self,
        points: Tensor,  # [P, 3]
    ) -> Tensor:
        """Unit vectors from points in the world to the eye that sees them, `[V, P, 3]`; one for all in an orthographic view."""
        to_eye = torch.nn.functional.normalize(self.positions[:, None] - points, dim=-1)
        return torch.where(self.is_orthographic[:, None, None], self.camera_to_world[:, None, :3, 2], to_eye)

    def rays(self, height: int, width: int | None = None) -> tuple[Tensor, Tensor]:
        """One ray through the centre of every pixel.

        Returns:
            Origins and unit directions in the world, `[V, H, W, 3]` both. Those of a pinhole camera start at its centre, those of an
            orthographic one side by side in the plane of its centre.
        """
        width = width or height
        y, x = torch.meshgrid(
            1 - (torch.arange(height) + 0.5) / height * 2, (torch.arange(width) + 0.5) / width * 2 - 1, indexing="ij"
        )
        plane, rotation = torch.stack([x, y], -1).to(self.fov), self.camera_to_world[:, :3, :3]
        tilt = plane * self.tan_half_fov[:, None, None, None]  # [V, H, W, 2]
        local = torch.cat([tilt, -torch.ones_like(tilt[..., :1])], -1)
        directions = torch.einsum("vij,vhwj->vhwi", rotation, local)
        offsets = torch.einsum("vij,hwj,v->vhwi", rotation[..., :2], plane, self.half_width)
        return self.positions[:, None, None] + offsets, torch.nn.functional.normalize(directions, dim=-1)


def project(
    points: Tensor,  # [..., P, 3]
    rig: CameraRig,
) -> tuple[Tensor, Tensor]:
    """Project world points into every view of a rig.

    Args:
        points: World points, `[..., P, 3]`, in units of the object sphere's diameter.
        rig: `V` cameras.

    Returns:
        `uv [..., V, P, 2]` in [-1, 1] (x right, y down, the convention of `grid_sample` with `align_corners=False`), and
        `depth [..., V, P]` along the optical axis, in world units. Points behind a camera have `depth <= 0` and unusable `uv`.

    Source: pinhole model; One-2-3-45++ section 3.2 ("local condition").
    """
    return project_points(points, rig.world_to_camera, rig.tan_half_fov, rig.half_width)


def project_points(
    points: Tensor,  # [..., P, 3]
    world_to_camera: Tensor,  # [V, 4, 4]
    tan_half_fov: Tensor,  # [V], 0 for an orthographic camera
    half_width: Tensor | None = None,  # [V] world units, 0 for a pinhole camera; None: all are
) -> tuple[Tensor, Tensor]:
    """`project` for cameras given as matrices, which need not be rigid (training perturbs them)."""
    camera_points = torch.einsum("vij,...pj->...vpi", world_to_camera[:, :3, :3], points)
    camera_points = camera_points + world_to_camera[:, None, :3, 3]
    depth = -camera_points[..., 2]  # OpenGL cameras look along -z
    extent = depth.clamp(min=1e-6)[..., None] * tan_half_fov[:, None, None]
    if half_width is not None:
        extent = extent + half_width[:, None, None]
    return camera_points[..., :2] / extent * camera_points.new_tensor([1.0, -1.0]), depth


def _one_each(name: str, values, poses: Tensor) -> Tensor:
    """A number a camera, `[V]` float32, of one for each or one for all."""
    values = torch.as_tensor(values, dtype=torch.float32, device=poses.device)
    if values.shape not in ((), (1,), (len(poses),)):
        raise InputError(
            f"{name}: got shape {tuple(values.shape)}, expected one number, or one for each of {len(poses)} cameras."
        )
    return values.expand(len(poses)).clone()
