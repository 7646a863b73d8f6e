"""Which meshes a data set is made of, what their objects are called, and their tiers. Rendering them lives in `data.prepare`."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from ..files import read_table


SUFFIXES = (".glb", ".obj", ".ply", ".stl")  # what is taken from folders: `load_mesh` reads all of them


def find_sources(
    paths: Sequence[str | Path], table: Path | None = None, split: str | None = None, shapes: int = 0
) -> tuple[dict[str, Path | None], dict[str, str | None]]:
    """What a data set is made of, by the names of the objects.

    Args:
        paths: See `find_meshes`.
        table: See `read_tiers`.
        split: Only the meshes of this split of the table.
        shapes: So many procedural objects beside the meshes.

    Returns:
        Mesh files, `None` for procedural objects, and tiers, `None` for meshes that the table lacks.

    Raises:
        InputError: As `find_meshes`, and if the split has none of the meshes, or one is called as a procedural object is.
    """
    if split is not None and table is None:
        raise InputError(
            f"split: {split!r} needs a table, whose column split says which mesh is in it. Pass --table CSV."
        )
    found = find_meshes(paths)
    tiers = {} if table is None else read_tiers(table, split)
    meshes = {name: file for name, file in found.items() if split is None or name in tiers}
    if found and not meshes:
        raise InputError(f"split: {table} has none of the {len(found)} meshes in {split!r}. Check its name and split.")
    names = [f"procedural_{number:05d}" for number in range(shapes)]
    if taken := sorted(meshes.keys() & set(names)):
        raise InputError(f"{meshes[taken[0]]}: is called as a procedural object is. Rename it, or ask for no shapes.")
    sources = {**meshes, **dict.fromkeys(names)}
    return sources, {name: tiers.get(name) for name in meshes} | dict.fromkeys(names, "procedural")


def find_meshes(paths: Sequence[str | Path]) -> dict[str, Path]:
    """Mesh files by the names of their objects.

    An object is called as its file's stem where no other file has it, and after the way to it from the folder that was passed where
    one has: `shoe/meshes/model.obj` and `pot/meshes/model.obj` are `shoe__meshes__model` and `pot__meshes__model`.

    Args:
        paths: Mesh files, or folders, which are searched to the bottom.

    Raises:
        InputError: If a path does not exist, none holds a mesh, or two files would still have one name.
    """
    below: dict[Path, Path] = {}  # each file's way from what was passed
    for path in map(Path, paths):
        if not path.exists():
            raise InputError(f"{path}: no such file or folder.")
        inside = [path]
        if path.is_dir():
            inside = sorted(file for file in path.rglob("*") if file.suffix.lower() in SUFFIXES and file.is_file())
        for file in inside:
            below.setdefault(file.absolute(), file.relative_to(path if path.is_dir() else path.parent))
    if paths and not below:
        raise InputError(f"{', '.join(map(str, paths))}: holds no mesh files ({', '.join(SUFFIXES)}).")
    stems = Counter(way.stem for way in below.values())
    meshes: dict[str, Path] = {}
    for file, way in below.items():
        name = way.stem if stems[way.stem] == 1 else "__".join(way.with_suffix("").parts)
        if name in meshes:
            raise InputError(
                f"{meshes[name]} and {file}: both would be called {name!r}, expected one file a name. Rename one, or pass the "
                "folder that holds both: their ways from it are their names then."
            )
        meshes[name] = file
    return meshes


def read_tiers(table: Path, split: str | None = None) -> dict[str, str]:
    """Tiers of the objects in a CSV with the columns `name` and `tier`; only those whose column `split` says so, if it is given."""
    columns = ("name", "tier") if split is None else ("name", "tier", "split")
    return {row["name"]: row["tier"] for row in read_table(table, columns) if split in (None, row.get("split"))}
