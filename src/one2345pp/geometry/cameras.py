"""Cameras: named rigs, rigs from matrices, `cameras.json`, projection and rays.

Images, meshes and rendering live elsewhere. Axes: V views, P points, H W pixels.
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


NAMED_RIGS = {
    # Azimuth relative to the input view, elevation absolute, both in degrees; field of view in degrees.
    "zero123plus-v1.2": {"azimuths": (30, 90, 150, 210, 270, 330), "elevations": (20, -10) * 3, "fov": 30.0},
    "zero123plus-v1.1": {
        "azimuths": (30, 90, 150, 210, 270, 330),
        "elevations": (30, -20) * 3,
        "fov": math.degrees(2 * math.atan(16 / 35)),
    },
}


@dataclass(frozen=True, eq=False)
class CameraRig:
    """`V` pinhole cameras with square images and centred principal points.

    World: right-handed, +Y up, the object's front is +Z, the object inside the sphere of radius 0.5 about the origin.
    Cameras: OpenGL axes (x right, y up, looking along -z).

    Args:
        camera_to_world: Poses, `[V, 4, 4]`, float32.
        fov: Field of view of each camera in radians, `[V]`.
        name: Name of the rig if it is one of `CameraRig.names()`.
    """

    camera_to_world: Tensor  # [V, 4, 4]
    fov: Tensor  # [V] radians
    name: str | None = None

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
        fov = torch.as_tensor(self.fov, dtype=torch.float32, device=poses.device).expand(len(poses)).clone()
        if not ((fov > 0) & (fov < math.pi)).all():
            raise InputError("fov: must lie between 0 and pi radians.")
        object.__setattr__(self, "camera_to_world", poses)
        object.__setattr__(self, "fov", fov)

    # --- construction -------------------------------------------------------------------------------------------

    @staticmethod
    def names() -> tuple[str, ...]:
        """Names that `CameraRig.named` knows."""
        return tuple(NAMED_RIGS)

    @classmethod
    def named(cls, name: str) -> CameraRig:
        """One of the rigs of Zero123++: six views, the object sphere just filling each image."""
        if name not in NAMED_RIGS:
            raise InputError(f"rig: got {name!r}, expected one of {', '.join(NAMED_RIGS)}, or a CameraRig.")
        spec = NAMED_RIGS[name]
        fov = math.radians(spec["fov"])
        rig = cls.from_angles(spec["azimuths"], spec["elevations"], fov, 0.5 / math.tan(fov / 2))
        return replace(rig, name=name)

    @classmethod
    def from_angles(cls, azimuths, elevations, fov, distance) -> CameraRig:
        """Cameras on spheres about the origin, looking at it.

        Args:
            azimuths: Degrees, `[V]`; 0 looks at the front (+Z), growing towards the camera's right (+X).
            elevations: Degrees above the horizon, `[V]` or one number.
            fov: Radians, `[V]` or one number.
            distance: World units from the origin, `[V]` or one number.
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
        return cls(poses.float(), torch.as_tensor(fov, dtype=torch.float32))

    @classmethod
    def of(cls, rig: CameraRig | str) -> CameraRig:
        """A rig as it is, or by its name."""
        if not isinstance(rig, CameraRig | str):
            raise InputError(
                f"cameras: got {type(rig).__name__}, expected a CameraRig, or the name of one of {', '.join(NAMED_RIGS)}. "
                "CameraRig(camera_to_world, fov) makes one of matrices."
            )
        return rig if isinstance(rig, CameraRig) else cls.named(rig)

    @classmethod
    def cat(cls, rigs: list[CameraRig]) -> CameraRig:
        """One rig with the cameras of several, in order."""
        return cls(torch.cat([r.camera_to_world for r in rigs]), torch.cat([r.fov for r in rigs]))

    # --- files --------------------------------------------------------------------------------------------------

    @classmethod
    def load(cls, path: str | Path) -> tuple[CameraRig, list[str]]:
        """Read a `cameras.json` in the NeRF `transforms.json` form.

        Args:
            path: The file, or the folder that holds it.

        Returns:
            The rig and the `file_path` of every frame, in the file's order.

        Raises:
            InputError: If there is no such file, or it does not have that form.
        """
        path = Path(path)
        path = path / "cameras.json" if path.is_dir() else path
        try:
            data = json.loads(path.read_text())
        except FileNotFoundError:
            raise InputError(
                f"{path}: not found. A folder of views needs a cameras.json (NeRF transforms.json form)."
            ) from None
        except (UnicodeDecodeError, json.JSONDecodeError) as error:
            raise InputError(f"{path}: is not JSON ({error}).") from None
        frames = data.get("frames") if isinstance(data, dict) else None
        if not isinstance(frames, list) or not frames:
            raise InputError(f"{path}: has no list 'frames' with at least one frame.")
        names, poses, fovs = [], [], []
        for index, frame in enumerate(frames):
            name = frame.get("file_path", f"frame {index}") if isinstance(frame, dict) else f"frame {index}"
            try:
                pose = torch.tensor(frame["transform_matrix"], dtype=torch.float32)
                fov = float(frame.get("camera_angle_x", data.get("camera_angle_x", "nan")))
                names.append(str(frame["file_path"]))
            except (KeyError, TypeError, ValueError) as error:
                raise InputError(f"{path}: {name}: needs file_path and a 4x4 transform_matrix ({error!r}).") from None
            if math.isnan(fov):
                raise InputError(f"{path}: {name}: has no camera_angle_x (radians), nor has the file.")
            try:
                cls(pose[None] if pose.ndim == 2 else pose, torch.tensor(fov))
            except InputError as error:
                raise InputError(f"{path}: {name}: {error}") from None
            poses.append(pose)
            fovs.append(fov)
        return cls(torch.stack(poses), torch.tensor(fovs)), names

    def save(self, path: str | Path, file_paths: list[str]) -> None:
        """Write a `cameras.json` naming `file_paths` (one a view, relative to the file)."""
        if len(file_paths) != len(self):
            raise InputError(f"file_paths: got {len(file_paths)}, expected one for each of {len(self)} cameras.")
        same = bool((self.fov == self.fov[0]).all())
        frames = [
            {"file_path": name, "transform_matrix": pose.tolist(), **({} if same else {"camera_angle_x": fov.item()})}
            for name, pose, fov in zip(file_paths, self.camera_to_world, self.fov, strict=True)
        ]
        path = Path(path)
        partial = path.with_name(path.name + ".part")
        partial.write_text(json.dumps({"camera_angle_x": self.fov[0].item(), "frames": frames}, indent=1))
        partial.replace(path)

    # --- views of the rig ---------------------------------------------------------------------------------------

    def __len__(self) -> int:
        return len(self.camera_to_world)

    def __eq__(self, other) -> bool:
        """The same cameras in the same order, whatever they are called."""
        if not isinstance(other, CameraRig):
            return NotImplemented
        here = other.to(self.fov.device)
        return torch.equal(self.camera_to_world, here.camera_to_world) and torch.equal(self.fov, here.fov)

    def __getitem__(self, index) -> CameraRig:
        """The cameras at `index` (an int, slice or list), as a rig."""
        index = [int(index)] if isinstance(index, Integral) else index
        return CameraRig(self.camera_to_world[index], self.fov[index])

    def to(self, device) -> CameraRig:
        return CameraRig(self.camera_to_world.to(device), self.fov.to(device), self.name)

    def rotated(self, degrees: float) -> CameraRig:
        """Every camera moved by `degrees` of azimuth about the world's up axis."""
        a = math.radians(degrees)
        turn = torch.eye(4)
        turn[0, 0], turn[0, 2], turn[2, 0], turn[2, 2] = math.cos(a), math.sin(a), -math.sin(a), math.cos(a)
        return CameraRig(turn.to(self.camera_to_world) @ self.camera_to_world, self.fov)

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
        """`[V]`"""
        return torch.tan(self.fov / 2)

    @property
    def positions(self) -> Tensor:
        """Camera centres in the world, `[V, 3]`."""
        return self.camera_to_world[:, :3, 3]

    def rays(self, height: int, width: int | None = None) -> tuple[Tensor, Tensor]:
        """One ray through the centre of every pixel.

        Returns:
            Origins `[V, 3]` and unit directions `[V, H, W, 3]` in the world.
        """
        width = width or height
        y, x = torch.meshgrid(
            1 - (torch.arange(height) + 0.5) / height * 2, (torch.arange(width) + 0.5) / width * 2 - 1, indexing="ij"
        )
        plane = torch.stack([x, y], -1).to(self.fov) * self.tan_half_fov[:, None, None, None]  # [V, H, W, 2]
        local = torch.cat([plane, -torch.ones_like(plane[..., :1])], -1)
        directions = torch.einsum("vij,vhwj->vhwi", self.camera_to_world[:, :3, :3], local)
        return self.positions, torch.nn.functional.normalize(directions, dim=-1)


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
    return project_points(points, rig.world_to_camera, rig.tan_half_fov)


def project_points(
    points: Tensor,  # [..., P, 3]
    world_to_camera: Tensor,  # [V, 4, 4]
    tan_half_fov: Tensor,  # [V]
) -> tuple[Tensor, Tensor]:
    """`project` for cameras given as matrices, which need not be rigid (training perturbs them)."""
    camera_points = torch.einsum("vij,...pj->...vpi", world_to_camera[:, :3, :3], points)
    camera_points = camera_points + world_to_camera[:, None, :3, 3]
    depth = -camera_points[..., 2]  # OpenGL cameras look along -z
    uv = camera_points[..., :2] / (depth.clamp(min=1e-6)[..., None] * tan_half_fov[:, None, None])
    return uv * uv.new_tensor([1.0, -1.0]), depth
