"""Prepared samples as a torch dataset. Making them lives in `data.prepare`; turning them into batches is each objective's own."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from torch.utils.data import Dataset

from ..errors import InputError
from .pack import read_sample


FORMAT = 2  # of folders: samples are those of `data.pack`
# 87% of the objects at hand are low-poly.
TIER_WEIGHTS = {"scan": 4.0, "textured": 4.0, "lowpoly": 1.0, "procedural": 1.0}


class PreparedDataset(Dataset):
    """Azimuth frames of objects, as `prepare` wrote them.

    An item is a dict: `name` and `tier` (str), `views [V, S, S, 4]` (six of each rig) and `inputs [I, S, S, 4]` (uint8, straight
    alpha), `elevations [I]` of the inputs (uint8, degrees above the nadir), `sdf [X, Y, Z]` (int8, 127 is the truncation distance
    `truncation` in world units), `coords [N, 3]` (int64) and `colors [N, 3]` (uint8) of the cells with |sdf| < 127, and maps of the
    views by their names in `MAPS`, `[V, S, S, C]` (uint8), if it was made with some. Rings have
    `views [2, 6, S, S, 4]`, `inputs [6, I, S, S, 4]`, `elevations [6, I]`, `rig [1]` (which of `meta["rigs"]`) and no volume; see
    `prepare.make_ring`.

    Args:
        path: Folder that `prepare` wrote, possibly still writing.
        names: Only these objects.
    """

    def __init__(self, path: str | Path, names: set[str] | None = None):
        self.path = Path(path)
        try:
            self.meta = json.loads((self.path / "index.json").read_text())
        except FileNotFoundError:
            raise InputError(
                f"{path}: is not a prepared dataset (no index.json). Make one with: one2345pp prepare"
            ) from None
        if (found := self.meta.get("format")) != FORMAT:
            raise InputError(
                f"{path}: has format {found}, this version reads {FORMAT}. Make it again: one2345pp prepare"
            )
        files = sorted(self.path.glob("*.zip"), key=lambda f: (int(f.name.split(".")[-2]), f.name))
        self.files = [f for f in files if names is None or f.name.rsplit(".", 2)[0] in names]
        if not self.files:
            raise InputError(f"{path}: holds no samples.")
        self.truncation: float = self.meta["truncation"]

    def __len__(self) -> int:
        return len(self.files)

    @property
    def weights(self) -> torch.Tensor:
        """Sampling weight of every item by its tier, `[len]`."""
        tiers = [self.meta["tiers"].get(f.name.rsplit(".", 2)[0], "lowpoly") for f in self.files]
        return torch.tensor([TIER_WEIGHTS.get(t, 1.0) for t in tiers], dtype=torch.float64)

    def __getitem__(self, index: int) -> dict:
        file = self.files[index]
        name = file.name.rsplit(".", 2)[0]
        item = {key: torch.from_numpy(array) for key, array in read_sample(file).items()}
        if "sdf" in item:
            item["coords"] = (item["sdf"].abs() < 127).nonzero()
        return {"name": name, "tier": self.meta["tiers"].get(name, "lowpoly"), **item}
