"""Rasterising, rendering and surface colours on shapes whose answer is known by hand."""

import math
import sys
import types

import numpy as np
import pytest
import torch
import trimesh
from PIL import Image

from one2345pp.errors import InputError
from one2345pp.geometry.cameras import CameraRig
from one2345pp.geometry.framing import frame_object
from one2345pp.geometry.mesh import load_mesh, normalize_to_sphere, surface_colors
from one2345pp.geometry.rasterize import _say_licence, rasterize
from one2345pp.geometry.render import contact_sheet, render, turntable


@pytest.fixture
def quad():
    """A square on z=0, [-0.25, 0.25]^2, with a texture of red, green above blue, white."""
    vertices = np.array([[-1, -1, 0], [1, -1, 0], [1, 1, 0], [-1, 1, 0]]) / 4
    texture = Image.fromarray(
        np.array([[[255, 0, 0], [0, 255, 0]], [[0, 0, 255], [255, 255, 255]]], np.uint8).repeat(8, 0).repeat(8, 1)
    )
    visual = trimesh.visual.TextureVisuals(
        uv=np.array([[0, 0], [1, 0], [1, 1], [0, 1]]),
        material=trimesh.visual.material.PBRMaterial(baseColorTexture=texture),
    )
    return trimesh.Trimesh(vertices, [[0, 1, 2], [0, 2, 3]], visual=visual, process=False)


FRONT = CameraRig.from_angles([0], [0], math.pi / 2, 0.5)  # sees [-0.5, 0.5]^2 on z=0


def test_fragments_reproduce_the_pixels_points(quad):
    """Oracle: barycentrics of the hit face give the point where the pixel's ray meets the plane, at depth 0.5."""
    fragments = rasterize(quad, FRONT, 16)
    assert fragments.mask[0].sum() == 64
    assert fragments.mask[0, 4:12, 4:12].all()
    rows, columns = np.nonzero(fragments.mask[0])
    corners = quad.vertices[quad.faces[fragments.face_ids[0, rows, columns]]]
    points = np.einsum("pij,pi->pj", corners, fragments.barycentrics[0, rows, columns])
    assert points[:, 0] == pytest.approx((columns + 0.5) / 16 - 0.5, abs=1e-6)
    assert points[:, 1] == pytest.approx(0.5 - (rows + 0.5) / 16, abs=1e-6)
    assert fragments.depth[0, rows, columns] == pytest.approx(0.5, abs=1e-6)
    assert np.isinf(fragments.depth[0][~fragments.mask[0]]).all()


def test_picture_is_upright_and_transparent_outside(quad):
    picture = render(quad, FRONT, 16, shading="none")[0]
    assert picture[5, 5].tolist() == [255, 0, 0, 255]
    assert picture[5, 10].tolist() == [0, 255, 0, 255]
    assert picture[10, 5].tolist() == [0, 0, 255, 255]
    assert (picture[:4, :, 3] == 0).all()


def test_half_covered_pixels_keep_the_surfaces_colour(quad):
    """Alpha is the covered share, colour is not darkened by the empty part."""
    green = np.tile([0, 255, 0, 255], (4, 1)).astype(np.uint8)
    shifted = trimesh.Trimesh(quad.vertices + [1 / 64, 0, 0], quad.faces, vertex_colors=green, process=False)
    pixel = render(shifted, FRONT, 16, supersample=4, shading="none")[0][5, 12]
    assert pixel.tolist() == [0, 255, 0, round(255 / 4)]


def test_texture_repeats_outside_the_unit_square(quad):
    wrapped = quad.copy()
    wrapped.visual.uv = quad.visual.uv + 3
    weights = np.array([[0.8, 0.1, 0.1], [0.1, 0.1, 0.8]])
    ids = np.array([0, 1])
    assert surface_colors(wrapped, ids, weights) == pytest.approx(surface_colors(quad, ids, weights), abs=1e-5)


def test_vertex_face_and_plain_colours():
    mesh = trimesh.creation.box()
    mesh.visual = trimesh.visual.ColorVisuals(mesh, vertex_colors=np.tile([255, 0, 0, 255], (8, 1)))
    assert surface_colors(mesh, np.array([0]), np.full((1, 3), 1 / 3)).tolist() == [[1, 0, 0]]
    mesh.visual = trimesh.visual.ColorVisuals(mesh, face_colors=np.tile([0, 255, 0, 255], (12, 1)))
    assert surface_colors(mesh, np.array([3]), np.full((1, 3), 1 / 3)).tolist() == [[0, 1, 0]]


def test_normalised_mesh_touches_the_sphere_and_is_centred():
    mesh = normalize_to_sphere(trimesh.creation.box((1, 2, 5)).apply_translation([3, 1, 0]))
    assert mesh.bounds.mean(0) == pytest.approx(0, abs=1e-9)
    assert np.linalg.norm(mesh.vertices, axis=1).max() == pytest.approx(0.5)


def test_unusable_meshes_are_refused(tmp_path):
    with pytest.raises(InputError, match="no such"):
        load_mesh(tmp_path / "none.glb")
    (tmp_path / "bad.glb").write_bytes(b"nonsense")
    with pytest.raises(InputError, match="bad.glb"):
        load_mesh(tmp_path / "bad.glb")


def test_unknown_rasterizer_is_refused(quad):
    with pytest.raises(InputError, match="embree"):
        rasterize(quad, FRONT, 8, rasterizer="opengl")


def test_framed_object_is_centred_and_fills_its_share():
    picture = np.zeros((60, 100, 4), np.uint8)
    picture[10:20, 70:100] = [200, 10, 10, 255]
    framed = np.asarray(frame_object(Image.fromarray(picture), 200, fill=0.75))
    rows, columns = np.nonzero(framed[..., 3] > 127)
    assert (columns.min(), columns.max()) == (25, 174)
    assert (rows.min(), rows.max()) == (75, 124)
    assert framed[100, 100].tolist() == [200, 10, 10, 255]


def test_sheet_and_turntable_are_written(quad, tmp_path):
    sheet = contact_sheet([[render(quad, FRONT, 16)[0]] * 3] * 2, 32, gap=2)
    assert sheet.size == (3 * 34 + 2, 2 * 34 + 2)
    turntable(quad, tmp_path / "turn.gif", frames=3, size=16)
    assert Image.open(tmp_path / "turn.gif").n_frames == 3
    turntable(quad, tmp_path / "pair.gif", frames=2, size=16, shadings=("none", "wireframe"))
    assert Image.open(tmp_path / "pair.gif").size == (32, 16)
    with pytest.raises(InputError, match="gif"):
        turntable(quad, tmp_path / "turn.avi", frames=1, size=16)


def test_normals_are_those_of_the_camera(quad):
    """Oracle: a square that faces the camera is (0, 0, 1), turned by 60 degrees about y (sin 60, 0, cos 60), as n / 2 + 1 / 2."""
    angle = math.radians(60)
    turned = quad.copy()
    turned.apply_transform(trimesh.transformations.rotation_matrix(angle, [0, 1, 0]))
    for mesh, normal in ((quad, [0, 0, 1]), (turned, [math.sin(angle), 0, math.cos(angle)])):
        pixel = render(mesh, FRONT, 16, shading="normal")[0][8, 8, :3]
        assert pixel == pytest.approx((np.array(normal) + 1) * 127.5, abs=1)


def test_wireframe_draws_the_edges_in_sight_and_nothing_else(quad):
    """Oracle: the square's border and its one diagonal, a pixel wide; a hidden square behind it shows no line through."""
    behind = trimesh.creation.box([0.3, 0.3, 0.01]).apply_translation([0, 0, -0.2])
    plain = trimesh.Trimesh(quad.vertices, quad.faces, process=False)
    for mesh in (plain, trimesh.util.concatenate([plain, behind])):
        picture = render(mesh, FRONT, 64, shading="wireframe")[0].astype(int)
        rows, columns = np.nonzero(picture[..., 3])
        assert (rows.min(), rows.max(), columns.min(), columns.max()) == (16, 47, 16, 47)
        dark = picture[16:48, 16:48, 0] < 140
        i, j = np.indices(dark.shape)
        border = (np.minimum(i, j) == 0) | (np.maximum(i, j) == 31)
        assert dark[border].all() and dark[(i + j) == 31].all()
        assert not dark[~border & (np.abs(i + j - 31) > 1)].any()
        assert (picture[..., 0] == picture[..., 2]).all()  # grey, whatever the texture


def test_dense_wireframes_stay_readable():
    """Faces smaller than a line do not turn the surface black."""
    ball = trimesh.creation.icosphere(subdivisions=6, radius=0.4)
    picture = render(ball, FRONT, 32, shading="wireframe")[0]
    assert picture[picture[..., 3] == 255][:, 0].mean() > 120


def test_mp4_gets_every_frame(quad, tmp_path, monkeypatch):
    """Oracle: the calls that imageio-ffmpeg documents: a start, then frames of width x height x 3 bytes, then the end."""
    frames = []

    def write_frames(path, size, fps):
        assert size == (32, 16) and fps == 18
        with open(path, "wb"):
            while True:
                frames.append((yield))

    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", types.SimpleNamespace(write_frames=write_frames))
    turntable(quad, tmp_path / "turn.mp4", frames=3, size=16, shadings=("soft", "normal"))
    assert [len(np.ascontiguousarray(frame).tobytes()) for frame in frames] == [32 * 16 * 3] * 3
    assert [path.name for path in tmp_path.iterdir()] == ["turn.mp4"]
    monkeypatch.setitem(sys.modules, "imageio_ffmpeg", None)
    with pytest.raises(InputError, match=r"one2345pp\[video\]"):
        turntable(quad, tmp_path / "other.mp4", frames=1, size=16)


def test_a_real_mp4_is_written(quad, tmp_path):
    """Oracle: the encoder reads back the size and the number of frames."""
    ffmpeg = pytest.importorskip("imageio_ffmpeg")
    turntable(quad, tmp_path / "turn.mp4", frames=6, size=32)
    reader = ffmpeg.read_frames(str(tmp_path / "turn.mp4"))
    assert next(reader)["size"] == (32, 32) and len(list(reader)) == 6


def test_the_licence_of_nvdiffrast_is_said_once(caplog):
    _say_licence.cache_clear()
    for _ in range(2):
        _say_licence()
    (said,) = caplog.messages
    assert "research and evaluation only" in said


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_nvdiffrast_sees_what_embree_sees():
    """Oracle: Embree. Away from edges both name the same face, with the same place on it and the same depth."""
    pytest.importorskip("nvdiffrast.torch", reason="nvdiffrast is optional")
    mesh = trimesh.creation.icosphere(subdivisions=3, radius=0.4)
    rig = CameraRig.named("zero123plus-v1.2")
    ours, theirs = (rasterize(mesh, rig, 128, rasterizer=name) for name in ("embree", "nvdiffrast"))
    assert (ours.mask == theirs.mask).mean() > 0.995
    same = ours.mask & (ours.face_ids == theirs.face_ids)
    assert same.sum() > 0.98 * ours.mask.sum()
    np.testing.assert_allclose(ours.barycentrics[same], theirs.barycentrics[same], atol=2e-3)
    np.testing.assert_allclose(ours.depth[same], theirs.depth[same], atol=1e-3)
