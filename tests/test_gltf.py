"""GLB files against the rules of the glTF 2.0 specification that viewers stumble over, and how their surfaces take light."""

import io
import json
import struct

import numpy as np
import pytest
import trimesh
from PIL import Image

from one2345pp.errors import InputError
from one2345pp.geometry.atlas import unwrap
from one2345pp.geometry.export import export_mesh
from one2345pp.geometry.mesh import load_mesh


COMPONENTS = {5121: np.uint8, 5123: np.uint16, 5125: np.uint32, 5126: np.float32}
WIDTHS = {"SCALAR": 1, "VEC2": 2, "VEC3": 3, "VEC4": 4}
ATTRIBUTES = {  # what the specification allows of those that are written: type, component type and whether it is normalised
    "POSITION": {("VEC3", 5126, False)},
    "NORMAL": {("VEC3", 5126, False)},
    "TEXCOORD_0": {("VEC2", 5126, False)},
    "COLOR_0": {("VEC4", 5121, True)},
}


def parse(data):
    """The tree and the binary chunk of a GLB, whose frame is checked."""
    magic, version, length = struct.unpack_from("<4sII", data)
    assert (magic, version, length) == (b"glTF", 2, len(data))
    size, kind = struct.unpack_from("<I4s", data, 12)
    assert kind == b"JSON" and size % 4 == 0
    rest, kind = struct.unpack_from("<I4s", data, 20 + size)
    assert kind == b"BIN\0" and rest % 4 == 0 and 28 + size + rest == length
    return json.loads(data[20 : 20 + size]), data[28 + size :]


def read(tree, binary, index):
    """An accessor's values, `[count, width]`; its place in the buffer is checked."""
    accessor = tree["accessors"][index]
    view = tree["bufferViews"][accessor["bufferView"]]
    dtype, width = np.dtype(COMPONENTS[accessor["componentType"]]), WIDTHS[accessor["type"]]
    start = view.get("byteOffset", 0) + accessor.get("byteOffset", 0)
    stride = view.get("byteStride", dtype.itemsize * width)
    assert start % dtype.itemsize == 0 and stride == dtype.itemsize * width  # nothing here is interleaved
    assert accessor.get("byteOffset", 0) + stride * accessor["count"] <= view["byteLength"]
    return np.frombuffer(binary, dtype, accessor["count"] * width, start).reshape(-1, width)


def check_gltf(data):
    """Raise AssertionError for whatever breaks a rule; return the tree."""
    tree, binary = parse(data)
    assert tree["asset"]["version"] == "2.0" and set(tree.get("extensionsUsed", [])) <= {"KHR_materials_unlit"}
    (buffer,) = tree["buffers"]
    assert len(binary) - 3 <= buffer["byteLength"] <= len(binary)
    for view in tree["bufferViews"]:
        assert view["buffer"] == 0 and view["byteLength"] > 0
        assert view.get("byteOffset", 0) + view["byteLength"] <= buffer["byteLength"]
    for index, accessor in enumerate(tree["accessors"]):
        values = read(tree, binary, index)
        assert np.isfinite(values).all()
        assert np.array_equal(np.float32(accessor["min"]), np.float32(values.min(0)))
        assert np.array_equal(np.float32(accessor["max"]), np.float32(values.max(0)))
    for mesh in tree["meshes"]:
        for primitive in mesh["primitives"]:
            check_primitive(tree, binary, primitive)
    for material in tree["materials"]:
        check_material(tree, material)
    for image in tree.get("images", []):
        view = tree["bufferViews"][image["bufferView"]]
        picture = Image.open(io.BytesIO(binary[view.get("byteOffset", 0) :][: view["byteLength"]]))
        assert image["mimeType"] == f"image/{picture.format.lower()}" and picture.format in ("PNG", "JPEG")
    check_nodes(tree)
    return tree


def check_primitive(tree, binary, primitive):
    assert primitive.get("mode", 4) == 4 and 0 <= primitive["material"] < len(tree["materials"])
    counts = set()
    for name, index in primitive["attributes"].items():
        accessor = tree["accessors"][index]
        assert (
            accessor["type"],
            accessor["componentType"],
            accessor.get("normalized", False),
        ) in ATTRIBUTES[name]
        assert (
            accessor["count"] * WIDTHS[accessor["type"]] * COMPONENTS[accessor["componentType"]]().itemsize
        ) % 4 == 0
        counts.add(accessor["count"])
    (count,) = counts
    accessor = tree["accessors"][primitive["indices"]]
    assert (accessor["type"], accessor["count"] % 3) == ("SCALAR", 0) and accessor["componentType"] in (5123, 5125)
    assert read(tree, binary, primitive["indices"]).max() < count
    normals = read(tree, binary, primitive["attributes"]["NORMAL"])
    np.testing.assert_allclose(np.linalg.norm(normals, axis=1), 1, atol=5e-4)


def check_material(tree, material):
    allowed = {"name", "pbrMetallicRoughness", "alphaMode", "doubleSided", "emissiveFactor", "extensions"}
    assert set(material) <= allowed and material.get("alphaMode", "OPAQUE") == "OPAQUE"
    light = material["pbrMetallicRoughness"]
    factors = {"metallicFactor", "roughnessFactor"}
    assert factors <= set(light) <= factors | {"baseColorTexture", "baseColorFactor"}
    assert all(0 <= light[name] <= 1 for name in factors)
    assert set(material.get("extensions", {})) <= set(tree.get("extensionsUsed", []))
    if "baseColorTexture" in light:
        texture = tree["textures"][light["baseColorTexture"]["index"]]
        assert 0 <= texture["source"] < len(tree["images"])


def check_nodes(tree):
    """The nodes are a forest, the scene holds its roots, every mesh is shown, and nothing turns or scales it."""
    parents = [child for node in tree["nodes"] for child in node.get("children", [])]
    assert len(parents) == len(set(parents))
    roots = tree["scenes"][tree["scene"]]["nodes"]
    assert set(roots) | set(parents) == set(range(len(tree["nodes"]))) and not set(roots) & set(parents)
    shown = [node["mesh"] for node in tree["nodes"] if "mesh" in node]
    assert sorted(shown) == list(range(len(tree["meshes"])))
    for node in tree["nodes"]:
        assert not {"rotation", "scale", "translation"} & set(node)
        assert np.array_equal(node.get("matrix", np.eye(4).ravel()), np.eye(4).ravel())


def wedge():
    """Longest at +X, then +Y, then +Z, coloured by position."""
    ball = trimesh.creation.icosphere(subdivisions=2, radius=0.25)
    vertices = np.where(ball.vertices > 0, ball.vertices * [1.8, 1.5, 1.2], ball.vertices)
    out = trimesh.Trimesh(vertices, ball.faces, process=False)
    out.visual.vertex_colors = np.c_[np.rint((vertices + 0.5) * 255), np.full(len(vertices), 255)].astype(np.uint8)
    return out


def textured(roughness=1.0, mode="RGB"):
    atlas = unwrap(wedge(), 32, time_limit=0)
    return atlas.textured(Image.effect_noise((32, 32), 40).convert(mode), roughness)


def faces_colored():
    mesh = wedge()
    mesh.visual = trimesh.visual.ColorVisuals(mesh, face_colors=np.arange(4 * len(mesh.faces)).reshape(-1, 4) % 251)
    return mesh


def from_obj():
    """A mesh with the material that an OBJ file leaves."""
    mesh = textured()
    mesh.visual = trimesh.visual.TextureVisuals(uv=mesh.visual.uv, image=mesh.visual.material.baseColorTexture)
    return mesh


def bare():
    return trimesh.Trimesh(wedge().vertices, wedge().faces, process=False)


@pytest.mark.parametrize("make", [wedge, textured, faces_colored, from_obj, bare], ids=lambda make: make.__name__)
@pytest.mark.parametrize("unlit", [False, True])
def test_glb_keeps_the_rules(make, unlit, tmp_path):
    """Oracle: the glTF 2.0 specification; a file spoiled below does not pass. Nothing is metallic, whatever it was made of."""
    mesh = make()
    path = export_mesh(mesh, tmp_path / "a.glb", unlit=unlit)
    tree = check_gltf(path.read_bytes())
    (material,) = tree["materials"]
    assert material["pbrMetallicRoughness"]["metallicFactor"] == 0
    assert ("KHR_materials_unlit" in material.get("extensions", {})) == unlit
    np.testing.assert_allclose(load_mesh(path).triangles, mesh.triangles, atol=1e-6)


def assemble(tree, binary):
    """A GLB of a changed tree."""
    text = json.dumps(tree).encode()
    text += b" " * (-len(text) % 4)
    head = struct.pack("<4sIII4s", b"glTF", 2, 28 + len(text) + len(binary), len(text), b"JSON")
    return head + text + struct.pack("<I4s", len(binary), b"BIN\0") + binary


@pytest.mark.parametrize(
    "spoil",
    [
        lambda tree: tree["accessors"][1]["max"].__setitem__(0, 9.0),
        lambda tree: tree["accessors"][0].update(count=tree["accessors"][0]["count"] + 3),
        lambda tree: tree["accessors"][1].update(count=3),
        lambda tree: tree["bufferViews"][1].update(byteOffset=2),
        lambda tree: tree["images"][0].update(mimeType="image/jpeg"),
        lambda tree: tree["materials"][0]["pbrMetallicRoughness"].update(roughnessFactor=2),
        lambda tree: tree["scenes"][0].update(nodes=[]),
        lambda tree: tree["nodes"][0].update(scale=[1, 1, -1]),
    ],
    ids=["max", "more indices", "fewer vertices", "misaligned", "image", "roughness", "nodes", "mirror"],
)
def test_the_check_finds_what_is_broken(spoil, tmp_path):
    tree, binary = parse(export_mesh(textured(), tmp_path / "a.glb").read_bytes())
    check_gltf(assemble(tree, binary))
    spoil(tree)
    with pytest.raises(AssertionError):
        check_gltf(assemble(tree, binary))


def test_roughness_is_as_set(tmp_path):
    """In GLB and USDZ: that of the material, or that which was asked for; integers are no reason to drop it."""
    for mesh, asked, expected in ((textured(0.25), None, 0.25), (textured(0.25), 0.75, 0.75), (textured(1), None, 1)):
        tree, _ = parse(export_mesh(mesh, tmp_path / "a.glb", roughness=asked).read_bytes())
        assert tree["materials"][0]["pbrMetallicRoughness"]["roughnessFactor"] == expected
        stage = export_mesh(mesh, tmp_path / "a.usdz", roughness=asked).read_bytes()
        assert f"float inputs:roughness = {expected:g}\n".encode() in stage
    with pytest.raises(InputError, match="roughness: got 2"):
        export_mesh(bare(), tmp_path / "b.glb", roughness=2)


def test_only_glb_can_be_unlit(tmp_path):
    with pytest.raises(InputError, match="only a .glb"):
        export_mesh(wedge(), tmp_path / "a.obj", unlit=True)
    assert list(tmp_path.iterdir()) == []


def test_vertex_colors_beside_a_plain_material_are_read(tmp_path):
    """Oracle: the specification's product of vertex colour and base colour factor."""
    path = export_mesh(wedge(), tmp_path / "a.glb")
    tree, binary = parse(path.read_bytes())
    tree["materials"][0]["pbrMetallicRoughness"]["baseColorFactor"] = [1.0, 0.2, 0.6, 1.0]
    path.write_bytes(assemble(tree, binary))
    found = np.asarray(load_mesh(path).visual.vertex_colors)[:, :3]
    expected = np.asarray(wedge().visual.vertex_colors)[:, :3] * [1.0, 0.2, 0.6]
    np.testing.assert_allclose(found, expected, atol=1)
