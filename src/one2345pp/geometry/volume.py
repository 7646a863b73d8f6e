"""The sparse volume: signed distance and colour on the active cells of a cubic grid. Meshing lives in `extract`.

Grid: `resolution`^3 cells over [-0.5, 0.5]^3. Cell `(i, j, k)` is centred at `((i, j, k) + 0.5) / resolution - 0.5`, axes x, y, z.
Axes: N active cells, X Y Z grid.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError


TRUNCATION_CELLS = 3.2  # LAS-Diffusion clips the distance at 0.05 of a half-extent of 1: 3.2 cells of 128


def cell_centers(
    coords: Tensor,  # [..., 3] integer
    resolution: int,
) -> Tensor:
    """World positions of cell centres, `[..., 3]`."""
    return (coords.float() + 0.5) / resolution - 0.5


@dataclass
class SparseVolume:
    """Signed distance and colour near a surface (One-2-3-45++ section 3.2).

    Args:
        coords: Active cells, `[N, 3]`, integers in [0, resolution), ordered x, y, z.
        sdf: Signed distance at the centres, `[N]`, world units, negative inside, clipped to +-`truncation`.
        colors: sRGB colour of the nearest outer surface point, `[N, 3]`, in [0, 1].
        resolution: Cells along an edge of the cube.
        truncation: Largest distance held, in world units.
    """

    coords: Tensor  # [N, 3] int64
    sdf: Tensor  # [N]
    colors: Tensor  # [N, 3]
    resolution: int
    truncation: float

    def __len__(self) -> int:
        return len(self.coords)

    def to(self, device: torch.device | str) -> SparseVolume:
        """The same volume with its tensors on a device."""
        moved = {name: getattr(self, name).to(device) for name in ("coords", "sdf", "colors")}
        return replace(self, **moved)

    @property
    def centers(self) -> Tensor:
        """World positions of the active cells, `[N, 3]`."""
        return cell_centers(self.coords, self.resolution)

    def dense(self) -> Tensor:
        """`[4, X, Y, Z]`: signed distance and colour; cells that are not active hold `+truncation` and grey 0.5."""
        grid = torch.full((4, *[self.resolution] * 3), 0.5)
        grid[0] = self.truncation
        x, y, z = self.coords.cpu().unbind(-1)
        grid[0, x, y, z] = self.sdf.cpu().float()
        grid[1:, x, y, z] = self.colors.cpu().float().T
        return grid

    def save(self, path: str | Path) -> None:
        """Write a safetensors file that `SparseVolume.load` reads."""
        from safetensors.torch import save_file

        path = Path(path)
        partial = path.with_name(path.name + ".part")
        tensors = {"coords": self.coords.to(torch.int16), "sdf": self.sdf.float(), "colors": self.colors.float()}
        metadata = {"resolution": str(self.resolution), "truncation": repr(float(self.truncation))}
        save_file({k: v.cpu().contiguous() for k, v in tensors.items()}, partial, metadata=metadata)
        partial.replace(path)

    @classmethod
    def load(cls, path: str | Path) -> SparseVolume:
        """Read what `save` wrote.

        Raises:
            InputError: If there is no such file, or it is none of those.
        """
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(str(path), framework="pt") as file:
                meta = file.metadata() or {}
                if not {"resolution", "truncation"} <= meta.keys():
                    raise InputError(f"{path}: is not a volume: its metadata lacks resolution and truncation.")
                tensors = {key: file.get_tensor(key) for key in ("coords", "sdf", "colors")}
        except (OSError, SafetensorError) as error:
            raise InputError(
                f"{path}: cannot be read as a volume ({error}). Pass what SparseVolume.save wrote."
            ) from error
        return cls(
            tensors["coords"].long(),
            tensors["sdf"],
            tensors["colors"],
            int(meta["resolution"]),
            float(meta["truncation"]),
        )
