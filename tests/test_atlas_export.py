"""Atlases and files: every texel shows the right point, and meshes come back from files as they went in."""

import io
import json
import struct
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import trimesh
from PIL import Image

from one2345pp.errors import InputError
from one2345pp.geometry import atlas as atlas_module
from one2345pp.geometry import xatlas_child
from one2345pp.geometry.atlas import pad_texture, texel_samples, unwrap
from one2345pp.geometry.export import companions, export_mesh
from one2345pp.geometry.mesh import load_mesh, surface_colors
from one2345pp.geometry.texels import covered_texels


SIZE = 128


@pytest.fixture(scope="module")
def mesh():
    """A dented ball with its longest reach at +X, then +Y, then +Z: no two axes can be swapped unseen."""
    ball = trimesh.creation.icosphere(subdivisions=3, radius=0.25)
    vertices = np.array(ball.vertices) * [1.0, 0.8, 0.6]
    vertices[vertices[:, 0] > 0, 0] *= 1.8
    vertices[vertices[:, 1] > 0, 1] *= 1.5
    vertices[vertices[:, 2] > 0, 2] *= 1.3
    out = trimesh.Trimesh(vertices, ball.faces, process=False)
    out.visual.vertex_colors = np.c_[np.rint((vertices + 0.5) * 255), np.full(len(vertices), 255)].astype(np.uint8)
    return out


@pytest.fixture(scope="module", params=[120.0, 0.0], ids=["xatlas", "projection"])
def time_limit(request):
    """With time for xatlas, and without any, which leaves box projections."""
    return request.param


@pytest.fixture(scope="module")
def atlas(mesh, time_limit):
    return unwrap(mesh, SIZE, time_limit=time_limit)


@pytest.fixture(scope="module")
def textured(mesh, atlas):
    """The mesh's vertex colours baked into a texture."""
    face_ids, barycentrics, texels = texel_samples(atlas, SIZE)
    texture, mask = np.zeros((SIZE * SIZE, 3)), np.zeros(SIZE * SIZE, bool)
    texture[texels], mask[texels] = surface_colors(mesh, face_ids, barycentrics), True
    texture = pad_texture(texture.reshape(SIZE, SIZE, 3), mask.reshape(SIZE, SIZE))
    return atlas.textured(Image.fromarray(np.rint(texture * 255).astype(np.uint8)))


def surface_points(mesh, count=3000):
    random = np.random.default_rng(0)
    return random.integers(0, len(mesh.faces), count), random.dirichlet(np.ones(3), count)


# --- atlas ------------------------------------------------------------------------------------------------------


def test_unwrapping_cuts_and_does_not_move(mesh, atlas):
    assert np.array_equal(atlas.vertex_map[atlas.faces], mesh.faces)
    assert np.array_equal(atlas.vertices, mesh.vertices[atlas.vertex_map])
    assert atlas.uvs.min() >= 0 and atlas.uvs.max() <= 1


def test_the_same_mesh_gives_the_same_uvs(mesh, atlas, time_limit):
    assert unwrap(mesh, SIZE, time_limit=time_limit).uvs.tobytes() == atlas.uvs.tobytes()


def test_the_time_limit_holds(monkeypatch):
    """Half a minute's work for xatlas, given less time than its process needs to start: box projections come instead, as without
    xatlas, and the log says so."""
    messages = []
    monkeypatch.setattr(atlas_module.logger, "warning", lambda text, *values: messages.append(text % values))
    ball = trimesh.creation.icosphere(subdivisions=6)
    ball = trimesh.Trimesh(ball.vertices, ball.faces[:40000], process=False)
    start = time.process_time()
    atlas = unwrap(ball, 256, time_limit=0.02)
    assert time.process_time() - start < 10 and len(atlas.faces) == 40000
    assert messages == ["unwrap: xatlas was not done in 0.02 s, so charts are box projections."]
    assert atlas.uvs.tobytes() == unwrap(ball, 256, time_limit=0).uvs.tobytes()


@pytest.mark.parametrize("program", [None, "/bin/echo", "/bin/true", "/nowhere/python", "/bin/false"])
def test_without_a_python_to_start_charts_are_box_projections(monkeypatch, program):
    """Where Python is embedded, sys.executable is nothing or another program: what that prints is no atlas, and nothing raises. Of
    nothing, the Python of the path is tried, which may know xatlas."""
    ball = trimesh.creation.icosphere(subdivisions=2)
    monkeypatch.setattr(sys, "executable", program)
    atlas = unwrap(ball, 256)
    assert len(atlas.faces) == len(ball.faces)
    if program is not None:
        assert atlas.uvs.tobytes() == unwrap(ball, 256, time_limit=0).uvs.tobytes()


def test_projections_are_few_whole_and_apart():
    """A box is six rectangles; unmirrored, and as far from each other as asked."""
    box = trimesh.creation.box([1.0, 0.6, 0.3])
    atlas = unwrap(box, SIZE, padding=6, time_limit=0)
    corners = atlas.uvs[atlas.faces]
    assert (np.linalg.det(corners[:, 1:] - corners[:, :1]) > 0).all()
    assert len(atlas.vertices) == 24
    boxes = [(piece.min((0, 1)), piece.max((0, 1))) for piece in corners[np.array(box.facets)]]
    for i, (low, high) in enumerate(boxes):
        for other_low, other_high in boxes[:i]:
            gap = np.maximum(low - other_high, other_low - high).max() * SIZE
            assert gap > 6 - 1e-6


def test_projections_that_overlap_are_taken_apart():
    """A spiral ramp of two turns lies over itself as seen from above: no texel's centre is covered twice."""
    turns = np.linspace(0, 4 * np.pi, 200)
    ring = np.stack([np.cos(turns), 0.05 * turns, np.sin(turns)], 1)
    vertices = np.concatenate([ring * [0.5, 1, 0.5], ring])
    i = np.arange(199)
    faces = np.concatenate([np.stack([i, i + 1, i + 201], 1), np.stack([i, i + 201, i + 200], 1)])
    atlas = unwrap(trimesh.Trimesh(vertices, faces, process=False), SIZE, time_limit=0)
    count = np.zeros(SIZE * SIZE, int)
    corners = np.stack([atlas.uvs[atlas.faces][..., 0], 1 - atlas.uvs[atlas.faces][..., 1]], -1) * SIZE - 0.5
    for texel, _, nearest in covered_texels(corners, SIZE):
        np.add.at(count, texel[nearest > 1e-6], 1)
    assert count.max() == 1


def test_the_child_that_unwraps_imports_no_torch():
    """Starting it must be cheap: only numpy and xatlas, not the package."""
    child = Path(xatlas_child.__file__)
    done = subprocess.run([sys.executable, "-X", "importtime", str(child)], input=b"", capture_output=True)
    assert b"xatlas" in done.stderr
    assert b"torch" not in done.stderr and b"one2345pp." not in done.stderr


def test_charts_do_not_overlap_and_keep_their_distance(mesh, atlas):
    """Oracle: the areas of the faces in UV space add up to the texels they cover, and no texel belongs to two charts."""
    corners = atlas.uvs[atlas.faces]
    edges = corners[:, 1:] - corners[:, :1]
    area = np.abs(np.linalg.det(edges)).sum() / 2
    fine = 8 * SIZE
    face_ids, barycentrics, texels = texel_samples(atlas, fine)
    chart = trimesh.graph.connected_component_labels(
        trimesh.graph.face_adjacency(atlas.faces), node_count=len(atlas.faces)
    )
    image = np.full(fine * fine, -1)
    image[texels] = chart[face_ids]
    ring = 2 * np.sqrt(area * fine * fine * np.pi) * 6  # a border several times a disc's, two texels wide
    assert area * fine * fine <= len(texels) <= area * fine * fine + ring
    coarse = image.reshape(SIZE, 8, SIZE, 8).transpose(0, 2, 1, 3).reshape(SIZE, SIZE, 64)
    touched = [set(np.unique(cell)) - {-1} for cell in coarse.reshape(-1, 64)]
    assert max(map(len, touched)) == 1  # no texel of the real size belongs to two charts


def test_texels_show_the_points_that_their_uvs_say(mesh, atlas):
    """Oracle: the sampled point's own UV, interpolated from the corners, is its texel's centre, or near it in the ring."""
    face_ids, barycentrics, texels = texel_samples(atlas, SIZE)
    assert (barycentrics >= 0).all() and np.allclose(barycentrics.sum(1), 1, atol=1e-5)
    assert (np.diff(texels) > 0).all()
    uv = np.einsum("pij,pi->pj", atlas.uvs[atlas.faces[face_ids]], barycentrics)
    center = np.stack([texels % SIZE + 0.5, SIZE - (texels // SIZE + 0.5)], -1)  # v grows upwards, rows downwards
    distance = np.linalg.norm(uv * SIZE - center, axis=1)
    assert (distance < 1e-3).mean() > 0.6
    assert distance.max() < 3


def test_every_texel_that_lookups_read_is_covered(atlas):
    """Oracle: random surface points; all four texels of a bilinear lookup at their UV must be among the samples."""
    covered = np.zeros((SIZE, SIZE), bool)
    covered.reshape(-1)[texel_samples(atlas, SIZE)[2]] = True
    face_ids, barycentrics = surface_points(atlas)
    uv = np.einsum("pij,pi->pj", atlas.uvs[atlas.faces[face_ids]], barycentrics)
    columns, rows = np.floor(uv[:, 0] * SIZE - 0.5).astype(int), np.floor((1 - uv[:, 1]) * SIZE - 0.5).astype(int)
    for i in (0, 1):
        for j in (0, 1):
            assert covered[(rows + i).clip(0, SIZE - 1), (columns + j).clip(0, SIZE - 1)].all()


def test_baked_texture_looks_like_the_vertex_colors(mesh, textured):
    """Any seam that bled, any flipped axis of the texture, any wrong face would differ by far more than rounding."""
    face_ids, barycentrics = surface_points(mesh)
    error = np.abs(surface_colors(textured, face_ids, barycentrics) - surface_colors(mesh, face_ids, barycentrics))
    assert error.max() < 0.03 and error.mean() < 0.004


def test_padding_takes_the_nearest_texel_and_stops():
    texture, mask = np.zeros((5, 5, 1)), np.zeros((5, 5), bool)
    texture[2, 2], mask[2, 2] = 7, True
    assert (pad_texture(texture, mask) == 7).all()
    near = pad_texture(texture, mask, iterations=1)[..., 0]
    assert np.array_equal(near == 7, [[abs(i - 2) + abs(j - 2) <= 1 for j in range(5)] for i in range(5)])


# --- files ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply", ".stl"])
def test_files_come_back_in_the_same_frame(textured, tmp_path, suffix):
    """Oracle: the mesh's bounds, whose six numbers all differ, and its faces in order."""
    loaded = load_mesh(export_mesh(textured, tmp_path / f"a{suffix}"))
    assert len({round(abs(x), 3) for x in textured.bounds.ravel()}) == 6
    np.testing.assert_allclose(loaded.triangles, textured.triangles, atol=1e-6)


@pytest.mark.parametrize("suffix", [".glb", ".obj"])
def test_textures_come_back(textured, tmp_path, suffix):
    loaded = load_mesh(export_mesh(textured, tmp_path / f"a{suffix}"))
    face_ids, barycentrics = surface_points(textured)
    expected = surface_colors(textured, face_ids, barycentrics)
    np.testing.assert_allclose(surface_colors(loaded, face_ids, barycentrics), expected, atol=1e-4)


def test_ply_has_the_textures_colors_at_its_vertices(mesh, textured, tmp_path):
    loaded = load_mesh(export_mesh(textured, tmp_path / "a.ply"))
    expected = (loaded.vertices + 0.5) * 255
    error = np.abs(np.asarray(loaded.visual.vertex_colors)[:, :3] - expected)
    assert error.mean() < 1 and error.max() < 20  # a texel of this small texture spans about 4 levels


def test_vertex_colors_survive_without_a_texture(mesh, tmp_path):
    for suffix in (".glb", ".obj", ".ply"):
        loaded = load_mesh(export_mesh(mesh, tmp_path / f"a{suffix}"))
        difference = np.asarray(loaded.visual.vertex_colors, int) - np.asarray(mesh.visual.vertex_colors, int)
        assert np.abs(difference).max() <= 1, suffix


def test_glb_material_is_rough_and_not_metallic(textured, tmp_path):
    data = export_mesh(textured, tmp_path / "a.glb").read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    tree = json.loads(data[20 : 20 + length])
    surface = tree["materials"][0]["pbrMetallicRoughness"]
    assert surface["metallicFactor"] == 0.0 and surface["roughnessFactor"] == 1.0 and "baseColorTexture" in surface
    assert "NORMAL" in tree["meshes"][0]["primitives"][0]["attributes"]


def test_normals_are_smooth_across_cuts_and_hard_at_edges(textured, tmp_path):
    """Cut vertices of a smooth surface share a normal; those of a box, whose faces are apart, keep the face's."""
    positions, normals = stored(export_mesh(textured, tmp_path / "a.glb"))
    _, place = np.unique(positions, axis=0, return_inverse=True)
    mean = np.zeros((place.max() + 1, 3))
    np.add.at(mean, place.ravel(), normals)
    spread = np.linalg.norm(mean, axis=1) / np.bincount(place.ravel())
    assert (spread > 0.999).mean() > 0.98
    box = trimesh.creation.box()
    apart = trimesh.Trimesh(box.triangles.reshape(-1, 3), np.arange(36).reshape(-1, 3), process=False)
    normals = stored(export_mesh(apart, tmp_path / "box.glb"))[1]
    np.testing.assert_allclose(np.abs(normals).max(1), 1, atol=1e-6)


def stored(path):
    """Positions and normals `[V, 3]` as they stand in a GLB, whatever a loader would make of them."""
    data = path.read_bytes()
    length = struct.unpack("<I", data[12:16])[0]
    tree, binary = json.loads(data[20 : 20 + length]), data[28 + length :]

    def read(name):
        accessor = tree["accessors"][tree["meshes"][0]["primitives"][0]["attributes"][name]]
        start = tree["bufferViews"][accessor["bufferView"]].get("byteOffset", 0)
        return np.frombuffer(binary, "<f4", accessor["count"] * 3, start).reshape(-1, 3)

    return read("POSITION"), read("NORMAL")


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply", ".stl", ".usdz"])
def test_the_same_mesh_gives_the_same_bytes(textured, tmp_path, suffix):
    """Neither the folder, nor what was computed of the mesh before, nor its metadata, may show."""
    first = export_mesh(textured, tmp_path / "one" / f"a{suffix}")
    other = textured.copy()
    other.metadata["file_path"] = "/home/somebody/a.glb"
    assert other.vertex_normals is not None and other.face_normals is not None
    second = export_mesh(other, tmp_path / "two" / f"a{suffix}")
    for path in first.parent.iterdir():
        data = path.read_bytes()
        assert data == (second.parent / path.name).read_bytes()
        assert b"somebody" not in data and str(tmp_path).encode() not in data
    assert {path.name for path in first.parent.iterdir()} == {path.name for path in second.parent.iterdir()}


def test_obj_parts_are_named_after_it_and_spaces_do_no_harm(textured, tmp_path):
    path = export_mesh(textured, tmp_path / "my mug.obj")
    assert {p.name for p in tmp_path.iterdir()} == {"my mug.obj", "my_mug.mtl", "my_mug_texture.png"}
    assert {path, *companions(path)} == set(tmp_path.iterdir())
    assert "map_Kd my_mug_texture.png" in (tmp_path / "my_mug.mtl").read_text()
    assert load_mesh(path).visual.kind == "texture"


def test_two_obj_do_not_share_their_parts(textured, tmp_path):
    """Names that differ in a space alone: each keeps its own texture, in whichever order they are written, and written again."""
    red = textured.copy()
    red.visual.material.baseColorTexture = Image.new("RGB", (8, 8), (200, 0, 0))
    for one, other in (("a b.obj", "a_b.obj"), ("c_d.obj", "c d.obj")):
        for _ in range(2):
            first, second = export_mesh(red, tmp_path / one), export_mesh(textured, tmp_path / other)
        colors = [np.asarray(load_mesh(path).visual.material.image.convert("RGB")) for path in (first, second)]
        assert (colors[0] == (200, 0, 0)).all() and not (colors[1] == (200, 0, 0)).all()


def test_usdz_is_an_aligned_package_with_the_mesh(textured, tmp_path):
    """Oracle: the USDZ specification: no compression, data on 64 bytes, the stage first; and the mesh's own numbers in it."""
    path = export_mesh(textured, tmp_path / "a.usdz")
    raw = path.read_bytes()
    with zipfile.ZipFile(path) as package:
        assert package.testzip() is None
        entries = package.infolist()
        assert [entry.filename for entry in entries] == ["scene.usda", "texture.png"]
        for entry in entries:
            name, extra = struct.unpack("<HH", raw[entry.header_offset + 26 : entry.header_offset + 30])
            assert entry.compress_type == zipfile.ZIP_STORED
            assert (entry.header_offset + 30 + name + extra) % 64 == 0
        stage = package.read("scene.usda").decode()
        assert Image.open(io.BytesIO(package.read("texture.png"))).size == (SIZE, SIZE)
    assert stage.startswith("#usda 1.0") and 'upAxis = "Y"' in stage and stage.count("{") == stage.count("}")
    points = stage.split("point3f[] points = [")[1].split("]")[0].strip("()").split("), (")
    np.testing.assert_allclose([[float(x) for x in p.split(",")] for p in points], textured.vertices, atol=1e-5)


def test_what_cannot_be_written_says_so(textured, tmp_path):
    with pytest.raises(InputError, match=r"\.glb, \.obj, \.ply, \.stl, \.usdz"):
        export_mesh(textured, tmp_path / "a.fbx")
    with pytest.raises(InputError, match="no suffix"):
        export_mesh(textured, tmp_path / "a")
    with pytest.raises(InputError, match="no faces"):
        export_mesh(trimesh.Trimesh(), tmp_path / "a.glb")
    assert list(tmp_path.iterdir()) == []
