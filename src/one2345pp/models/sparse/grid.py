"""Active voxels with the maps that convolutions read. Arithmetic lives in `functional`.

Axes: N active voxels, M active voxels on the next coarser level, B samples, C channels.
"""

from __future__ import annotations

from functools import cached_property

import torch
from torch import Tensor

from ...errors import InputError


TABLE_CELLS = 2**26  # above this many cells a dense lookup table (int32) gives way to a search in sorted keys


class SparseGrid:
    """The active voxels of a batch on one level, with maps that are built when first read and then kept.

    The maps depend on coordinates only: one grid serves every layer and every denoising step. Rows keep the order of the
    caller; rows sorted by coordinate are gathered fastest.

    Args:
        coords: Rows `(sample, x, y, z)`, `[N, 4]`, integers, no row twice.
        resolution: Voxels along an edge of the cube.
        batch_size: Number of samples; samples without any voxel are allowed. Defaults to the largest sample in `coords` plus one.

    Raises:
        InputError: Wrong shape or type, a coordinate outside the cube, a voxel given twice.
    """

    def __init__(self, coords: Tensor, resolution: int, batch_size: int | None = None):
        if coords.ndim != 2 or coords.shape[1] != 4 or coords.is_floating_point() or coords.dtype == torch.bool:
            got = f"{coords.dtype} {tuple(coords.shape)}"
            raise InputError(f"coords: got {got}, expected integers [N, 4] with columns sample, x, y, z.")
        if batch_size is None:
            batch_size = int(coords[:, 0].max()) + 1 if len(coords) else 1
        self.coords = coords.long()
        self.resolution = resolution
        self.batch_size = batch_size
        self.backend_maps: dict[str, object] = {}  # what other backends keep of these voxels
        limits = self.coords.new_tensor([batch_size, resolution, resolution, resolution])
        if not ((self.coords >= 0) & (self.coords < limits)).all():
            raise InputError(
                f"coords: some lie outside {batch_size} samples of {resolution}^3 voxels. "
                "Pass the resolution and the batch size that the coordinates were made for."
            )
        if len(torch.unique(self._keys)) != len(self):
            raise InputError("coords: some voxels are given twice. Pass unique rows, for example coords.unique(dim=0).")

    @classmethod
    def cat(cls, coords: list[Tensor], resolution: int) -> SparseGrid:
        """One batch from the voxels of each sample, `[N_i, 3]`."""
        rows = [torch.nn.functional.pad(xyz.long(), (1, 0), value=index) for index, xyz in enumerate(coords)]
        return cls(torch.cat(rows), resolution, len(coords))

    def __len__(self) -> int:
        return len(self.coords)

    @property
    def device(self) -> torch.device:
        return self.coords.device

    def to(self, device: torch.device | str) -> SparseGrid:
        """The same voxels on another device; maps are built again there."""
        coords = self.coords.to(device)
        return self if coords is self.coords else SparseGrid(coords, self.resolution, self.batch_size)

    def where(self, kept: Tensor) -> SparseGrid:
        """The voxels that a mask `[N]` keeps."""
        return SparseGrid(self.coords[kept], self.resolution, self.batch_size)

    def subdivided(self) -> SparseGrid:
        """The eight children of every voxel, at twice the resolution, rows sorted by coordinate."""
        cells, side = torch.cartesian_prod(*[torch.arange(2, device=self.device)] * 3), 2 * self.resolution
        fine = self.coords.repeat_interleave(8, 0)
        fine[:, 1:] = 2 * fine[:, 1:] + cells.repeat(len(self), 1)
        sample, x, y, z = fine.unbind(1)
        return SparseGrid(fine[(((sample * side + x) * side + y) * side + z).argsort()], side, self.batch_size)

    def levels(self, count: int) -> list[SparseGrid]:
        """This grid and the `count - 1` coarser ones below it."""
        levels = [self]
        while len(levels) < count:
            levels.append(levels[-1].coarser)
        return levels

    # --- samples ------------------------------------------------------------------------------------------------

    @property
    def sample_index(self) -> Tensor:
        """Sample of every voxel, `[N]`."""
        return self.coords[:, 0]

    @cached_property
    def counts(self) -> Tensor:
        """Active voxels of every sample, `[B]`."""
        return self.membership.sum(1).long()

    @cached_property
    def membership(self) -> Tensor:
        """1 where a voxel belongs to a sample, `[B, N]` float32. Sums over samples as a matrix product are deterministic."""
        samples = torch.arange(self.batch_size, device=self.device)
        return (samples[:, None] == self.sample_index).float()

    def mean(self, features: Tensor) -> Tensor:
        """Mean of each sample's voxels, `[N, C] -> [B, C]` in float32; zero for a sample without voxels."""
        return self.membership @ features.float() / self.counts.clamp(min=1)[:, None]

    def spread(self, values: Tensor) -> Tensor:
        """Each sample's values to its voxels, `[B, C] -> [N, C]` (or `[1, C]` for a single sample, to broadcast)."""
        return values if self.batch_size == 1 else self.membership.to(values.dtype).mT @ values

    # --- neighbours ---------------------------------------------------------------------------------------------

    @cached_property
    def neighbors(self) -> Tensor:
        """Row of each of the 27 neighbours, `[N, 27]` int32; `N` where there is none. Kernel cells in x, y, z order."""
        steps = torch.arange(-1, 2, device=self.device)
        side = self._side
        offsets = (steps[:, None, None] * side + steps[:, None]) * side + steps
        return self._rows_of(self._keys[:, None] + offsets.reshape(1, 27))

    @property
    def _side(self) -> int:
        return self.resolution + 2  # an empty rim, so that a neighbour's key never wraps into another row or sample

    @property
    def _keys(self) -> Tensor:
        sample, x, y, z = self.coords.unbind(1)
        side = self._side
        return ((sample * side + x + 1) * side + y + 1) * side + z + 1

    def _rows_of(self, keys: Tensor) -> Tensor:
        """Rows that hold `keys`, int32; `N` where none does."""
        rows = torch.arange(len(self), dtype=torch.int32, device=self.device)
        cells = self.batch_size * self._side**3
        if cells <= TABLE_CELLS:
            table = rows.new_full((cells,), len(self))
            table[self._keys] = rows
            return table[keys]
        known, order = self._keys.sort()
        place = torch.searchsorted(known, keys).clamp(max=max(len(self) - 1, 0))
        return torch.where(known[place] == keys, rows[order][place], len(self))

    # --- the next coarser level ---------------------------------------------------------------------------------

    @property
    def coarser(self) -> SparseGrid:
        """The parents, at half the resolution (rounded up); rows are sorted by coordinate."""
        return self._coarsened[0]

    @property
    def slots(self) -> Tensor:
        """`8 * parent row + child cell` of every voxel, `[N]`; child cells in x, y, z order."""
        return self._coarsened[1]

    @cached_property
    def children(self) -> Tensor:
        """Row of each of the 8 children of every parent, `[M, 8]` int32; `N` where there is none."""
        children = torch.full((8 * len(self.coarser),), len(self), dtype=torch.int32, device=self.device)
        children[self.slots] = torch.arange(len(self), dtype=torch.int32, device=self.device)
        return children.view(-1, 8)

    @cached_property
    def _coarsened(self) -> tuple[SparseGrid, Tensor]:
        side = (self.resolution + 1) // 2
        sample, x, y, z = self.coords.unbind(1)
        keys = ((sample * side + x // 2) * side + y // 2) * side + z // 2
        keys, parents = torch.unique(keys, return_inverse=True)
        coords = torch.stack([keys // side**3, keys // side**2 % side, keys // side % side, keys % side], 1)
        cells = (x % 2 * 2 + y % 2) * 2 + z % 2
        return SparseGrid(coords, side, self.batch_size), parents * 8 + cells
