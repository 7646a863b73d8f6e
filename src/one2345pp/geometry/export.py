"""Meshes to files: GLB, OBJ, PLY, STL, USDZ, in the world's own frame (+Y up, +Z front). Reading lives in `mesh`.

The same mesh gives the same bytes: nothing written depends on time, on the folder or on what was computed before.
"""

from __future__ import annotations

import io
import math
import re
import zipfile
import zlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import trimesh
from PIL import Image

from ..errors import InputError
from .mesh import surface_colors
from .repair import to_rgba8


CREASE = np.cos(np.radians(30.0))  # normals of a cut are joined where the surfaces meet at less than this angle


@dataclass(frozen=True)
class Surface:
    """How a surface takes light. Nothing that leaves the package is metallic unless a texture says so.

    Args:
        roughness: From 0, a mirror, to 1.
        unlit: Colours are shown as they are.
    """

    roughness: float
    unlit: bool


def export_mesh(mesh: trimesh.Trimesh, path: str | Path, roughness: float | None = None, unlit: bool = False) -> Path:
    """Write a mesh; an interrupted write leaves no half file under the final name.

    Vertex colours of a GLB are sRGB bytes, as trimesh and most programs of this kind write and read them; a viewer that takes them for
    linear light, as glTF has it, shows them lighter. A texture leaves no such doubt.

    GLB and USDZ hold the texture; OBJ has an `.mtl` and its texture beside it, see `companions`; PLY has vertex colours,
    read off the texture where there is one, and its vertices joined there; STL has neither.

    Args:
        mesh: With a texture, vertex or face colours, or none.
        path: `.glb`, `.obj`, `.ply`, `.stl` or `.usdz`.
        roughness: In GLB and USDZ, from 0 to 1. By default that of the mesh's material, and 1 without one.
        unlit: GLB only: viewers show the colours as they are (`KHR_materials_unlit`), for textures that have their light in them.

    Returns:
        The path written.

    Raises:
        InputError: If the suffix is not one of these, the mesh is empty or not finite, or the file cannot have such a surface.
    """
    path = Path(path)
    writer = WRITERS.get(path.suffix.lower())
    if writer is None:
        got = path.suffix or "no suffix"
        raise InputError(f"{path}: cannot write a mesh as {got}. Use one of {', '.join(WRITERS)}.")
    if len(mesh.faces) == 0 or not np.isfinite(mesh.vertices).all():
        raise InputError(f"{path}: the mesh has no faces, or vertices that are not finite, so it is not written.")
    if unlit and path.suffix.lower() != ".glb":
        raise InputError(f"{path}: cannot be unlit, only a .glb can. Write one, or do without unlit.")
    if roughness is None:
        own = getattr(getattr(mesh.visual, "material", None), "roughnessFactor", None)
        roughness = 1.0 if own is None else own
    if not 0 <= roughness <= 1:
        raise InputError(f"roughness: got {roughness}, expected 0 to 1.")
    path.parent.mkdir(parents=True, exist_ok=True)
    files = writer(
        _bare(mesh), Surface(float(roughness), unlit), _plain_name(path) if path.suffix.lower() == ".obj" else ""
    )
    for name, data in files.items():  # the mesh itself comes last, so it never names a file that is not there
        target = path if name == "" else path.parent / name
        partial = target.with_name(f".{target.name}.part")
        partial.write_bytes(data)
        partial.replace(target)
    return path


# --- one writer a format: (mesh, surface, stem) to {file name: bytes}, "" for the mesh's own file, last -------------------


def _glb(mesh: trimesh.Trimesh, surface: Surface, stem: str) -> dict[str, bytes]:
    def dress(tree: dict) -> None:
        """Give everything a material: glTF's own default is a metal."""
        primitives = [primitive for one in tree["meshes"] for primitive in one["primitives"]]
        if any("material" not in primitive for primitive in primitives):
            tree.setdefault("materials", []).append({"name": "surface"})
        for primitive in primitives:
            primitive.setdefault("material", len(tree["materials"]) - 1)
        for material in tree["materials"]:
            light = material.setdefault("pbrMetallicRoughness", {})
            if "metallicRoughnessTexture" not in light:
                light.setdefault("metallicFactor", 0.0)
            light["roughnessFactor"] = surface.roughness
            if surface.unlit:
                material["extensions"] = {"KHR_materials_unlit": {}}
        if surface.unlit:
            tree["extensionsUsed"] = [*tree.get("extensionsUsed", []), "KHR_materials_unlit"]

    return {"": trimesh.exchange.gltf.export_glb(mesh, include_normals=True, tree_postprocessor=dress)}


def _obj(mesh: trimesh.Trimesh, surface: Surface, stem: str) -> dict[str, bytes]:
    material = getattr(mesh.visual, "material", None)
    if material is not None:
        simple = material.to_simple() if hasattr(material, "to_simple") else material
        black, white = np.array([[0, 0, 0, 255], [255, 255, 255, 255]], np.uint8)
        # trimesh names the picture by the material, and a picture by the mesh's own name may be what the mesh was made from
        simple.name, simple.ambient, simple.specular = f"{stem}_texture", black, black
        if simple.image is not None:
            simple.diffuse = white  # viewers multiply it with the texture
        mesh.visual.material = simple
    small = max(0, -math.floor(math.log10(max(np.abs(mesh.vertices).max(), 1e-30))))  # zeros after the point
    text, extra = trimesh.exchange.obj.export_obj(
        mesh, include_normals=True, return_texture=True, mtl_name=f"{stem}.mtl", header=None, digits=7 + small
    )
    return {**extra, "": text.encode()}


def _ply(mesh: trimesh.Trimesh, surface: Surface, stem: str) -> dict[str, bytes]:
    vertices, faces, colors = np.asarray(mesh.vertices), np.asarray(mesh.faces), _vertex_colors(mesh)
    if _texture(mesh) is not None:  # its cuts mean nothing here, and would make a closed mesh look open
        vertices, first, place = np.unique(vertices, axis=0, return_index=True, return_inverse=True)
        faces, colors = place.reshape(-1)[faces], colors[first]
    plain = trimesh.Trimesh(vertices, faces, process=False)
    plain.visual.vertex_colors = to_rgba8(colors)
    return {"": trimesh.exchange.ply.export_ply(plain, vertex_normal=False)}


def _stl(mesh: trimesh.Trimesh, surface: Surface, stem: str) -> dict[str, bytes]:
    return {"": trimesh.exchange.stl.export_stl(mesh)}


def _usdz(mesh: trimesh.Trimesh, surface: Surface, stem: str) -> dict[str, bytes]:
    """USDA text and the texture in an uncompressed zip, each file's data aligned to 64 bytes (USDZ specification)."""
    image = _texture(mesh)
    # the first file is the one that is opened
    files = {"scene.usda": _usda(mesh, surface.roughness, image is not None).encode()}
    if image is not None:
        buffer = io.BytesIO()
        image.convert("RGB").save(buffer, format="png")
        files["texture.png"] = buffer.getvalue()
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_STORED) as package:
        for name, data in files.items():
            entry = zipfile.ZipInfo(name, date_time=(1980, 1, 1, 0, 0, 0))
            used = archive.tell() + 30 + len(name) + 4  # local header, name, and the head of the padding field
            entry.extra = b"\x86\x19" + (pad := -used % 64).to_bytes(2, "little") + bytes(pad)
            package.writestr(entry, data)
    return {"": archive.getvalue()}


WRITERS = {".glb": _glb, ".obj": _obj, ".ply": _ply, ".stl": _stl, ".usdz": _usdz}


# --- parts ------------------------------------------------------------------------------------------------------


def _bare(mesh: trimesh.Trimesh) -> trimesh.Trimesh:
    """Geometry and looks alone: no metadata (it may hold paths), no cached values, normals smooth across cuts."""
    plain = trimesh.Trimesh(mesh.vertices, mesh.faces, process=False)
    own = np.array(plain.vertex_normals)
    _, place = np.unique(np.asarray(mesh.vertices), axis=0, return_inverse=True)
    weighted = np.zeros((place.max() + 1, 3))
    by_area = mesh.face_normals * mesh.area_faces[:, None]
    np.add.at(weighted, place.reshape(-1)[mesh.faces.ravel()], np.repeat(by_area, 3, 0))
    joined = weighted / np.maximum(np.linalg.norm(weighted, axis=1, keepdims=True), 1e-12)
    joined = joined[place.reshape(-1)]
    smooth = (joined * own).sum(1) > CREASE
    normals = np.where(smooth[:, None], joined, own)
    return trimesh.Trimesh(mesh.vertices, mesh.faces, vertex_normals=normals, visual=mesh.visual.copy(), process=False)


def companions(path: str | Path) -> list[Path]:
    """The files that an OBJ at `path` has beside it; none for other formats."""
    path = Path(path)
    if path.suffix.lower() != ".obj":
        return []
    stem = _plain_name(path)
    return [path.with_name(f"{stem}.mtl"), path.with_name(f"{stem}_texture.png")]


def _plain_name(path: Path) -> str:
    """A name for the files beside an OBJ, which cannot name one with a space; not that of another OBJ's in the folder."""
    plain = re.sub(r"[^\w.-]", "_", path.stem)
    taken = any(
        re.sub(r"[^\w.-]", "_", one.stem) == plain for one in path.parent.glob("*.obj") if one.name != path.name
    )
    return f"{plain}-{zlib.crc32(path.name.encode()):08x}" if taken else plain


def _texture(mesh: trimesh.Trimesh) -> Image.Image | None:
    """The base colour image, if the mesh has one."""
    material = getattr(mesh.visual, "material", None)
    return getattr(material, "baseColorTexture", None) or getattr(material, "image", None)


def _vertex_colors(mesh: trimesh.Trimesh) -> np.ndarray:
    """sRGB `[V, 3]` in [0, 1]: the surface's colour at each vertex, 0 at vertices that no face uses."""
    used, corner = np.unique(mesh.faces.ravel(), return_index=True)
    colors = np.zeros((len(mesh.vertices), 3), np.float32)
    colors[used] = surface_colors(mesh, corner // 3, np.eye(3)[corner % 3])
    return colors


def _usda(mesh: trimesh.Trimesh, roughness: float, textured: bool) -> str:
    """A USD stage with one mesh and a UsdPreviewSurface material; without a texture it shows the vertex colours."""
    if textured:
        output, shaders = "rgb", USDA_TEXTURE
        looks = f'texCoord2f[] primvars:st = {_tuples(mesh.visual.uv)} (interpolation = "vertex")'
    else:
        output, shaders = "result", USDA_VERTEX_COLORS
        colors = _tuples(_to_linear(_vertex_colors(mesh)))
        looks = f'color3f[] primvars:displayColor = {colors} (interpolation = "vertex")'
    return USDA.format(
        counts=", ".join(["3"] * len(mesh.faces)),
        indices=", ".join(map(str, mesh.faces.ravel())),
        points=_tuples(mesh.vertices),
        normals=_tuples(mesh.vertex_normals),
        extent=_tuples(mesh.bounds),
        looks=looks,
        roughness=f"{roughness:g}",
        output=output,
        shaders=shaders,
    )


def _to_linear(srgb: np.ndarray) -> np.ndarray:
    """sRGB to linear light, which is what USD's colours are in."""
    return np.where(srgb <= 0.04045, srgb / 12.92, ((srgb + 0.055) / 1.055) ** 2.4)


def _tuples(values: np.ndarray) -> str:
    return "[" + ", ".join("(" + ", ".join(f"{x:.6g}" for x in row) + ")" for row in np.asarray(values)) + "]"


USDA = """#usda 1.0
(
    defaultPrim = "Object"
    metersPerUnit = 1
    upAxis = "Y"
)

def Xform "Object" (kind = "component")
{{
    def Mesh "Mesh" (prepend apiSchemas = ["MaterialBindingAPI"])
    {{
        float3[] extent = {extent}
        int[] faceVertexCounts = [{counts}]
        int[] faceVertexIndices = [{indices}]
        point3f[] points = {points}
        normal3f[] normals = {normals} (interpolation = "vertex")
        {looks}
        uniform token subdivisionScheme = "none"
        rel material:binding = </Object/Material>
    }}

    def Material "Material"
    {{
        token outputs:surface.connect = </Object/Material/Surface.outputs:surface>

        def Shader "Surface"
        {{
            uniform token info:id = "UsdPreviewSurface"
            color3f inputs:diffuseColor.connect = </Object/Material/Color.outputs:{output}>
            float inputs:metallic = 0
            float inputs:roughness = {roughness}
            token outputs:surface
        }}
{shaders}
    }}
}}
"""

USDA_TEXTURE = """
        def Shader "Color"
        {
            uniform token info:id = "UsdUVTexture"
            asset inputs:file = @texture.png@
            token inputs:sourceColorSpace = "sRGB"
            float2 inputs:st.connect = </Object/Material/Coordinates.outputs:result>
            float3 outputs:rgb
        }

        def Shader "Coordinates"
        {
            uniform token info:id = "UsdPrimvarReader_float2"
            string inputs:varname = "st"
            float2 outputs:result
        }"""

USDA_VERTEX_COLORS = """
        def Shader "Color"
        {
            uniform token info:id = "UsdPrimvarReader_float3"
            string inputs:varname = "displayColor"
            float3 outputs:result
        }"""
