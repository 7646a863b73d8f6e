"""Properties that must hold for any volume and any mesh, drawn at random: no crash, no NaN, budgets, UVs, files."""

import mcubes
import numpy as np
import pytest
import torch
import trimesh
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy import ndimage

from one2345pp.errors import InputError
from one2345pp.geometry.atlas import texel_samples, unwrap
from one2345pp.geometry.export import export_mesh
from one2345pp.geometry.extract import finish_mesh, volume_to_mesh
from one2345pp.geometry.mesh import load_mesh
from one2345pp.geometry.repair import decimate, is_solid, repair_mesh, weld
from one2345pp.geometry.volume import SparseVolume


def examples(count):
    return settings(max_examples=count, deadline=None, derandomize=True, database=None)


@st.composite
def volumes(draw):
    """Noise of any smoothness, on a random part of the cells, between all outside and all inside."""
    resolution = draw(st.sampled_from([2, 5, 8, 13, 16]))
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    noise = ndimage.gaussian_filter(random.normal(size=[resolution] * 3), draw(st.sampled_from([0.0, 1.0, 2.0])))
    sdf = (noise / noise.std() + draw(st.floats(-2, 2))) * 0.05
    sdf[random.random(sdf.shape) < draw(st.sampled_from([0.0, 0.1]))] = 0.0
    active = ndimage.gaussian_filter(random.random(sdf.shape), draw(st.sampled_from([0.0, 1.0])))
    coords = np.argwhere(active >= np.quantile(active, draw(st.floats(0, 1))))
    values, colors = sdf[tuple(coords.T)].clip(-0.05, 0.05), random.random((len(coords), 3))
    return SparseVolume(
        torch.from_numpy(coords), torch.from_numpy(values).float(), torch.from_numpy(colors).float(), resolution, 0.05
    )


@st.composite
def meshes(draw):
    """Triangle soups, dented balls and surfaces of noise; some with doubled, flipped, flat and missing faces."""
    random = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    kind = draw(st.sampled_from(["soup", "ball", "noise"]))
    if kind == "soup":
        count = draw(st.integers(1, 60))
        vertices = random.normal(size=(draw(st.integers(3, 40)), 3))
        faces = random.integers(0, len(vertices), (count, 3))
    elif kind == "ball":
        ball = trimesh.creation.icosphere(subdivisions=draw(st.integers(0, 3)))
        vertices = ball.vertices * random.uniform(1 - draw(st.floats(0, 0.9)), 1, (len(ball.vertices), 1))
        faces = ball.faces
    else:
        noise = ndimage.gaussian_filter(random.normal(size=(12, 12, 12)), 1.5)
        vertices, faces = mcubes.marching_cubes(np.pad(noise, 1, constant_values=-1), 0.0)
        faces = faces.astype(np.int64)
    if draw(st.booleans()):
        broken = random.integers(0, len(faces), 3)
        faces = np.concatenate([faces, faces[broken], faces[broken][:, ::-1], faces[broken][:, [0, 0, 1]]])
        faces = faces[random.permutation(len(faces))[: max(1, int(0.95 * len(faces)))]]
    mesh = trimesh.Trimesh(vertices * draw(st.sampled_from([1e-3, 1.0, 1e3])), faces, process=False)
    if draw(st.booleans()):
        mesh.visual.vertex_colors = random.integers(0, 256, (len(vertices), 4)).astype(np.uint8)
    return mesh


def check_mesh(mesh):
    assert np.isfinite(mesh.vertices).all() and len(mesh.faces) > 0
    assert mesh.faces.min() >= 0 and mesh.faces.max() < len(mesh.vertices)


@given(volumes())
@examples(60)
def test_any_volume_gives_a_closed_outward_mesh_or_says_why_not(volume):
    """No volume crashes the extraction; what comes out is closed, solid, finite, and inside the grid."""
    try:
        mesh = volume_to_mesh(volume)
    except InputError:
        return
    check_mesh(mesh)
    directed = mesh.faces[:, [0, 1, 1, 2, 2, 0]].reshape(-1, 2)
    _, count = np.unique(np.sort(directed, 1), axis=0, return_counts=True)
    assert (count % 2 == 0).all() and mesh.is_winding_consistent  # no border
    assert mesh.volume > 0
    assert np.abs(mesh.vertices).max() <= 0.5 + 0.5 / volume.resolution
    assert mesh.nondegenerate_faces().all()
    assert len(mesh.visual.vertex_colors) == len(mesh.vertices)


@given(meshes())
@examples(80)
def test_any_mesh_is_repaired_or_refused(mesh):
    """Afterwards no vertex stands twice in one place, no face lacks an area, and nothing new lies outside the old bounds."""
    try:
        whole = repair_mesh(mesh)
    except InputError:
        return
    check_mesh(whole)
    assert len(np.unique(whole.vertices, axis=0)) == len(whole.vertices)
    assert (whole.area_faces > 0).all()
    assert (whole.bounds[0] >= mesh.bounds[0] - 1e-9).all() and (whole.bounds[1] <= mesh.bounds[1] + 1e-9).all()


@given(meshes(), st.integers(4, 600))
@examples(80)
def test_budgets_are_met_within_a_hundredth_or_refused(mesh, budget):
    try:
        small = decimate(mesh, budget)
    except InputError:
        return
    check_mesh(small)
    assert len(small.faces) <= budget
    if len(mesh.faces) > budget and len(weld(mesh).faces) > budget:
        assert len(small.faces) >= min(0.99 * budget, budget - 2)


@given(volumes(), st.integers(50, 3000))
@examples(30)
def test_any_extracted_mesh_is_made_watertight_within_its_budget_or_refused(volume, budget):
    """Oracle: every edge has two faces, wound alike; parts that touch along an edge, which noise has many of, included."""
    try:
        mesh = finish_mesh(volume_to_mesh(volume), budget, watertight=True)
    except InputError:
        return
    check_mesh(mesh)
    assert is_solid(mesh) and len(mesh.faces) <= budget


@given(meshes(), st.sampled_from([16, 64, 256]), st.integers(0, 4))
@examples(60)
def test_projected_uvs_lie_inside_the_atlas_and_cut_without_moving(mesh, size, padding):
    """Every UV in [0, 1], every face in its place; and every texel of the atlas shows a point of the surface."""
    check_atlas(mesh, size, padding, time_limit=0)


@given(meshes())
@examples(6)
def test_uvs_of_xatlas_lie_inside_the_atlas_too(mesh):
    check_atlas(mesh, 64, 2, time_limit=20)


def check_atlas(mesh, size, padding, time_limit):
    try:
        atlas = unwrap(mesh, size, padding, time_limit=time_limit)
    except InputError:
        assert mesh.area == 0
        return
    assert atlas.uvs.min() >= 0 and atlas.uvs.max() <= 1
    assert np.array_equal(atlas.vertex_map[atlas.faces], mesh.faces)
    face_ids, barycentrics, _ = texel_samples(atlas, size)
    assert np.isfinite(barycentrics).all() and (barycentrics >= 0).all()
    assert face_ids.min(initial=0) >= 0


@pytest.mark.parametrize("suffix", [".glb", ".obj", ".ply", ".stl"])
def test_files_reload_equal(suffix, tmp_path_factory):
    """The same faces in the same order with the same corners, and the same vertices as far as the format has them."""
    path = tmp_path_factory.mktemp("files") / f"a{suffix}"

    @given(meshes())
    @examples(25)
    def check(mesh):
        loaded = load_mesh(export_mesh(mesh, path))
        np.testing.assert_allclose(loaded.triangles, mesh.triangles, atol=1e-6 * np.abs(mesh.vertices).max())
        if suffix == ".obj":  # trimesh reads only vertices that faces use
            assert len(loaded.vertices) == len(np.unique(mesh.faces))
        elif suffix != ".stl":  # which has corners only
            np.testing.assert_array_equal(loaded.faces, mesh.faces)
            assert len(loaded.vertices) == len(mesh.vertices)

    check()
