"""The three roles of a chain, by what they do: draw, reconstruct, paint. Whoever does it, from whatever library, fills the slot.

The package's own three pipelines do; how others do is in docs/stages.md.
"""

from __future__ import annotations

from functools import cached_property
from typing import Protocol

import torch
import trimesh
from PIL import Image

from ..errors import InputError
from ..geometry.extract import volume_to_mesh
from ..geometry.views import Views
from ..geometry.volume import SparseVolume


METHODS = {"multiview": "draw", "volume": "reconstruct", "texture": "paint"}  # what the stage of each role does


class Solid:
    """What a reconstructor makes of views: a mesh, a volume, or both.

    Args:
        mesh: In the world's frame, with colours if there are some; by default the volume's surface, extracted once it is asked for.
        volume: Signed distance and colour, if the reconstructor has them.
    """

    def __init__(self, mesh: trimesh.Trimesh | None = None, volume: SparseVolume | None = None):
        if mesh is None and volume is None:
            raise InputError("Solid: got neither a mesh nor a volume, expected at least one of them.")
        if not isinstance(mesh, trimesh.Trimesh | None) or not isinstance(volume, SparseVolume | None):
            raise InputError(
                f"Solid: got {type(mesh).__name__} and {type(volume).__name__}, expected a Trimesh and a SparseVolume."
            )
        self.volume = volume
        if mesh is not None:
            self.mesh = mesh

    def meshed(self) -> Solid:
        """Itself, with its surface extracted. Raises `InputError` where a volume has none."""
        _ = self.mesh
        return self

    @cached_property
    def mesh(self) -> trimesh.Trimesh:
        """The surface, see `volume_to_mesh`."""
        return volume_to_mesh(self.volume)


class Drawer(Protocol):
    """Draws views of the object in a picture."""

    def draw(self, image: Image.Image, *, generator: torch.Generator | None = None, **options) -> Views:
        """Any number of views, from any cameras.

        Args:
            image: `RGBA`, the object centred in a square.
            generator: Source of every random draw.
            options: What the caller of the chain has set, under the chain's names; the rest is left out.
        """
        ...


class Reconstructor(Protocol):
    """Makes a solid of views."""

    def reconstruct(
        self, views: Views, *, image: Image.Image | None = None, generator: torch.Generator | None = None, **options
    ) -> Solid:
        """A mesh or volume in the frame of the views' cameras.

        Args:
            views: Square `RGBA` pictures and their cameras.
            image: The picture that the views were drawn of, if there is one.
            generator, options: As for `Drawer.draw`.
        """
        ...


class Painter(Protocol):
    """Paints a mesh from pictures of it."""

    def paint(
        self, mesh: trimesh.Trimesh, views: Views, *, generator: torch.Generator | None = None, **options
    ) -> trimesh.Trimesh:
        """The same surface in the same place, with a texture.

        Args:
            mesh: With vertex colours, a texture, or none.
            views: Square `RGBA` pictures and their cameras.
            generator, options: As for `Drawer.draw`. `trust`, a number a view, says how much each counts.
        """
        ...
