"""Every stage, the engine, cameras and volumes on a pretended GPU: nothing is left on the CPU by mistake, and results are the CPU's.

What `pretend_gpu` can prove is where tensors are. A GPU's own kernels need one.
"""

import numpy as np
import pretend_nvdiffrast
import pytest
import torch
import trimesh
from conftest import build_multiview, multiview_components, tiny_dinov2, volume_components, volume_encoder
from diffusers import (
    DDPMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    UniPCMultistepScheduler,
)
from PIL import Image
from pretend_gpu import PretendTensor, pretend_gpu
from test_elevation import SMALL
from test_multiview_controlnet import make_controlnet
from test_multiview_steps import with_masks, with_rigs
from test_texture_refinement import grey_ball, photograph
from test_volume_variants import fine_components

from one2345pp import (
    CameraRig,
    ConditionEncoder,
    ElevationEstimator,
    SparseVolumeDiffusionPipeline,
    TextureRefinementPipeline,
)
from one2345pp.cli import main
from one2345pp.geometry.cameras import project
from one2345pp.geometry.extract import volume_to_mesh
from one2345pp.geometry.rasterize import rasterize
from one2345pp.geometry.render import render
from one2345pp.geometry.slices import render_slices
from one2345pp.geometry.volume import SparseVolume
from one2345pp.models.sparse import SparseConv3d, SparseDownConv3d, SparseGrid, SparseGroupNorm, SparseUpConv3d


pytestmark = pytest.mark.usefixtures("one_thread")


# --- the pretended GPU ------------------------------------------------------------------------------------------------


def test_tensors_say_where_they_are(cuda):
    there = [
        torch.ones(2, device=cuda),
        torch.ones(2).to("cuda"),
        torch.ones(2).cuda(),
        torch.tensor([1, 2], device="cuda:0"),
    ]
    there += [torch.zeros_like(there[0]), there[0].new_zeros(3), there[0] + 1, torch.arange(3, device=there[0].device)]
    assert all(tensor.device.type == "cuda" and isinstance(tensor, PretendTensor) for tensor in there)
    assert (there[0] + 1).cpu().device.type == "cpu" and (there[0] + 1).cpu().tolist() == [2, 2]


@pytest.mark.parametrize(
    "mistake",
    [
        lambda here, there: here + there,
        lambda here, there: torch.cat([there, here]),
        lambda here, there: here * there.sum(),
        lambda here, there: here[there.long()],
        lambda here, there: there.numpy(),
        lambda here, there: np.asarray(there),
        lambda here, there: torch.nn.Linear(3, 3)(there),
        lambda here, there: torch.randn(3, device="cuda", generator=torch.Generator()),
        lambda here, there: there.normal_(generator=torch.Generator()),
        lambda here, there: there.index_add_(0, torch.zeros(3, dtype=torch.long), there),
    ],
)
def test_what_cuda_refuses_is_refused(cuda, mistake):
    with pytest.raises((RuntimeError, TypeError), match="device|generator"):
        mistake(torch.ones(3), torch.ones(3, device=cuda))


def test_mps_has_no_float64():
    with pretend_gpu("mps") as mps:
        assert torch.ones(2, device=mps).to(torch.float16).device.type == "mps"
        for mistake in (lambda: torch.ones(2, dtype=torch.float64).to(mps), lambda: torch.ones(2, device=mps).double()):
            with pytest.raises(TypeError, match="float64"):
                mistake()


def test_what_cuda_takes_is_taken(cuda):
    """Copies, scalars, lists, indices from the CPU; views share memory; gradients come back to the CPU."""
    there = torch.zeros(3, 2, device=cuda)
    there[0] = 5
    there[:, [1]] += torch.tensor(2.0)
    there[torch.tensor([2])] = torch.ones(2, device=cuda)
    there.view(6)[2:4].copy_(torch.tensor([7.0, 8.0]))
    assert there.tolist() == [[5, 7], [7, 8], [1, 1]]
    assert torch.where(there > 6, there, 0.0).sum().item() == 22
    here = torch.ones(3, requires_grad=True)
    (here.to(cuda) * there[:, 0]).sum().backward()
    assert here.grad.tolist() == [5, 7, 1] and not isinstance(here.grad, PretendTensor)


# --- the engine -------------------------------------------------------------------------------------------------------


def test_sparse_engine(gpu):
    """Oracle: the CPU's values and gradients, through a submanifold, a strided and an upsampling convolution and a norm."""
    rng = torch.Generator().manual_seed(0)
    coords = (torch.rand(2, 8, 8, 8, generator=rng) < 0.2).nonzero()
    layers = torch.nn.ModuleList(
        [SparseConv3d(4, 8), SparseGroupNorm(2, 8), SparseDownConv3d(8, 8), SparseUpConv3d(8, 4)]
    )
    features = torch.randn(len(coords), 4, generator=rng)

    def run(device) -> list[torch.Tensor]:
        layers.to(device)
        grid = SparseGrid(coords.to(device), 8, 2)
        rows = features.detach().to(device).requires_grad_()
        hidden = layers[1](layers[0](rows, grid), grid)
        found = layers[3](layers[2](hidden, grid), grid)
        layers.zero_grad()
        found.square().sum().backward()
        return [found, rows.grad, *(parameter.grad for parameter in layers.parameters())]

    for here, there in zip(run("cpu"), run(gpu), strict=True):
        assert there.device.type == gpu.type
        torch.testing.assert_close(there.cpu(), here, atol=1e-4, rtol=1e-4)


# --- nvdiffrast -------------------------------------------------------------------------------------------------------


def test_nvdiffrast_is_called_as_it_documents(cuda, monkeypatch):
    """Oracle: Embree, on a shape without any symmetry, for pictures that are not square. Away from edges both name the same face, with
    the same place on it and the same depth. The rasteriser itself is a stand-in; the real one has its test in test_geometry."""
    pretend_nvdiffrast.install(monkeypatch)
    mesh = trimesh.util.concatenate(
        [trimesh.creation.box((0.6, 0.2, 0.3)), trimesh.creation.icosphere(1, 0.15).apply_translation([0.2, 0.25, 0.1])]
    )
    rig = CameraRig.named("zero123plus-v1.2")
    ours, theirs = (rasterize(mesh, rig, 48, 40, rasterizer=name) for name in ("embree", "nvdiffrast"))
    assert (ours.mask == theirs.mask).mean() > 0.995
    same = ours.mask & (ours.face_ids == theirs.face_ids)
    assert same.sum() > 0.98 * ours.mask.sum() > 1000
    np.testing.assert_allclose(ours.barycentrics[same], theirs.barycentrics[same], atol=1e-4)
    np.testing.assert_allclose(ours.depth[same], theirs.depth[same], atol=1e-4)
    assert not theirs.barycentrics[~theirs.mask].any() and np.isinf(theirs.depth[~theirs.mask]).all()


# --- cameras and volumes that are on the GPU --------------------------------------------------------------------------


def test_cameras(gpu, tmp_path):
    """Oracle: the CPU's cameras, rays and projections; what draws on the CPU takes cameras from the GPU."""
    here = CameraRig.named("zero123plus-v1.2")
    there = here.to(gpu)
    points = torch.rand(5, 3, generator=torch.Generator().manual_seed(0)) - 0.5
    pairs = zip(
        [
            *there.rays(4, 6),
            *project(points.to(gpu), there),
            there.rotated(30).world_to_camera,
            there[[1, 2]].positions,
        ],
        [*here.rays(4, 6), *project(points, here), here.rotated(30).world_to_camera, here[[1, 2]].positions],
        strict=True,
    )
    for moved, expected in pairs:
        assert moved.device.type == gpu.type
        torch.testing.assert_close(moved.cpu(), expected)
    assert CameraRig.cat([there, there]).fov.device.type == gpu.type
    there.save(tmp_path / "cameras.json", list("abcdef"))
    assert torch.equal(CameraRig.load(tmp_path)[0].camera_to_world, here.camera_to_world)
    assert np.array_equal(rasterize(grey_ball(1), there, 16).depth, rasterize(grey_ball(1), here, 16).depth)
    assert np.array_equal(render(grey_ball(1), there, 16), render(grey_ball(1), here, 16))


def test_volumes(gpu, tmp_path):
    """Oracle: the CPU's file, mesh and pictures."""
    axis = (torch.arange(16) + 0.5) / 16 - 0.5
    coords = torch.cartesian_prod(*[torch.arange(16)] * 3)
    sdf = torch.cartesian_prod(axis, axis, axis).norm(dim=1) - 0.3
    near = sdf.abs() < 0.12
    here = SparseVolume(coords[near], sdf[near], torch.rand(int(near.sum()), 3, generator=seeded()), 16, 0.12)
    there = SparseVolume(here.coords.to(gpu), here.sdf.to(gpu), here.colors.to(gpu), 16, 0.12)
    torch.testing.assert_close(there.dense().cpu(), here.dense())
    torch.testing.assert_close(there.centers.cpu(), here.centers)
    there.save(tmp_path / "there.safetensors")
    assert_same_volume(SparseVolume.load(tmp_path / "there.safetensors"), here)
    assert np.array_equal(volume_to_mesh(there).vertices, volume_to_mesh(here).vertices)
    assert there.to("cpu").sdf.device.type == "cpu" and torch.equal(there.to("cpu").coords, here.coords)
    assert render_slices(there).tobytes() == render_slices(here).tobytes()


# --- the stages -------------------------------------------------------------------------------------------------------


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def picture(size: int = 20, seed: int = 0) -> Image.Image:
    """Noise, with a square of it opaque."""
    pixels = np.random.default_rng(seed).integers(0, 255, (size, size, 4), np.uint8)
    pixels[..., 3] = 0
    pixels[size // 4 : -size // 4, size // 4 : -size // 4, 3] = 255
    return Image.fromarray(pixels)


def assert_same_volume(there, here) -> None:
    assert torch.equal(there.coords.cpu(), here.coords)
    torch.testing.assert_close(there.sdf.cpu(), here.sdf, atol=1e-3, rtol=1e-3)
    torch.testing.assert_close(there.colors.cpu(), here.colors, atol=1e-3, rtol=1e-3)


def with_controlnet() -> dict:
    parts = multiview_components()
    return parts | {"controlnet": make_controlnet(parts["unet"])}


def with_scheduler(scheduler: type) -> dict:
    return multiview_components() | {"scheduler": scheduler(prediction_type="v_prediction")}


EMBEDS = torch.linspace(-1, 1, 48).reshape(1, 4, 12)
FIRST_STAGE = {  # components, settings, arguments
    "plain": (multiview_components, {}, {"guidance_scale": 1.0}),
    "guided": (multiview_components, {}, {"prompt": "a", "negative_prompt": "a a", "guidance_interval": (0.0, 0.5)}),
    "embeds": (multiview_components, {}, {"prompt": None, "prompt_embeds": EMBEDS, "negative_prompt_embeds": -EMBEDS}),
    "batch": (multiview_components, {}, {"image": [picture(), picture(24, 1)], "generator": [seeded(), seeded(1)]}),
    "several": (multiview_components, {}, {"num_images_per_prompt": 2, "output_type": "np"}),
    "clean": (multiview_components, {"clean_reference": True, "tile_positions": True}, {}),
    "ramp": (multiview_components, {"ramping_coefficients": [0.1, 0.2, 0.3, 0.4]}, {}),
    "control": (with_controlnet, {}, {"control_image": Image.new("RGB", (32, 48), "red"), "control_guidance_end": 0.5}),
    "rigs": (with_rigs, {"rigs": ["zero123plus-v1.2", "zero123plus-v1.1"]}, {"rig": "zero123plus-v1.1"}),
    "ancestral": (lambda: with_scheduler(EulerAncestralDiscreteScheduler), {}, {}),
    "unipc": (lambda: with_scheduler(UniPCMultistepScheduler), {}, {}),
    "ddpm": (lambda: with_scheduler(DDPMScheduler), {}, {}),
}


@pytest.mark.parametrize("name", FIRST_STAGE)
def test_first_stage(gpu, name):
    """Oracle: the CPU's tile."""
    make, settings, arguments = FIRST_STAGE[name]
    pipe = build_multiview(make(), **settings)

    def draw() -> torch.Tensor:
        fresh = {"generator": seeded()} if "generator" not in arguments else {"generator": [seeded(), seeded(1)]}
        return torch.as_tensor(pipe(**{"image": picture(), "output_type": "pt"} | arguments | fresh).images)

    expected = draw()
    pipe.to(gpu)
    torch.testing.assert_close(draw().cpu(), expected, atol=1e-3, rtol=1e-3)


def test_first_stage_cuts_out(gpu):
    """Oracle: the CPU's views, by drawn masks that are on the GPU."""
    pipe = build_multiview(with_masks())
    here = np.stack(pipe.draw(picture(), generator=seeded()).images).astype(int)
    there = np.stack(pipe.to(gpu).draw(picture(), generator=seeded()).images).astype(int)
    assert len(np.unique(here[..., 3])) > 10 and np.abs(here[..., 3] - there[..., 3]).max() <= 1


def with_normals() -> dict:
    parts = volume_components()
    for name in ("occupancy_condition", "sparse_condition"):
        parts[name] = ConditionEncoder.from_config(parts[name].config, maps={"normals": 3})
    return parts


def with_scheduler_of_x0(scheduler: type, **settings) -> dict:
    betas = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "sample"}
    return volume_components() | {
        f"{slot}_scheduler": scheduler(**betas, **settings) for slot in ("occupancy", "sparse")
    }


def with_patches_and_vector() -> dict:
    """DINOv2 patch features of the views, and CLIP's vector of the input picture."""
    parts = volume_components()
    for name in ("occupancy_condition", "sparse_condition"):
        parts[name] = ConditionEncoder.from_config(parts[name].config, patch_channels=8)
    return parts | volume_encoder() | {"patch_encoder": tiny_dinov2()}


SECOND_STAGE = {
    "plain": (volume_components, {}, {}),
    "guided": (volume_components, {}, {"guidance_scale": 2.0}),
    "patches and vector": (with_patches_and_vector, {}, {"image": picture(), "guidance_scale": 2.0}),
    "normals": (with_normals, {}, {"maps": {"normals": [picture(24, seed).convert("RGB") for seed in range(6)]}}),
    "fine": (fine_components, {"fine_level": 0.9}, {}),
    "ddpm": (lambda: with_scheduler_of_x0(DDPMScheduler), {}, {}),
    "dpm": (lambda: with_scheduler_of_x0(DPMSolverMultistepScheduler, solver_order=1), {}, {}),
    "unipc": (lambda: with_scheduler_of_x0(UniPCMultistepScheduler, solver_order=1), {}, {}),
}


@pytest.mark.parametrize("name", SECOND_STAGE)
def test_second_stage(gpu, name):
    """Oracle: the CPU's distances and colours at the same voxels."""
    make, settings, arguments = SECOND_STAGE[name]
    steps = {"default_num_occupancy_steps": 2, "default_num_sparse_steps": 2}
    pipe = SparseVolumeDiffusionPipeline(**make(), truncation=0.1, **steps, **settings)
    pipe.set_progress_bar_config(disable=True)
    views = [picture(24, seed) for seed in range(6)]
    here = pipe(views, generator=seeded(), output_type="volume", **arguments).volumes[0]
    pipe.to(gpu)
    rig = CameraRig.named("zero123plus-v1.2").to(gpu)
    there = pipe(views, rig, generator=seeded(), output_type="volume", **arguments).volumes[0]
    assert_same_volume(there, here)


def test_third_stage(gpu):
    """Oracle: the CPU's texture; the fit is a few dozen steps of Adam, so a few levels of 255 are allowed."""
    steps = {"default_num_inference_steps": 30, "default_texture_size": 64}
    field = {"resolution": 16, "components": 4, "feature_channels": 8, "hidden": 16, "batch_size": 512}
    pipe = TextureRefinementPipeline(**field, **steps)
    pipe.set_progress_bar_config(disable=True)
    rig, ball = CameraRig.named("zero123plus-v1.2"), grey_ball(2)
    views = photograph(ball, rig)
    here, there = (
        pipe(ball, views, rig.to(device), generator=seeded(), device=device).meshes[0] for device in ("cpu", gpu)
    )
    a, b = (np.asarray(mesh.visual.material.baseColorTexture, float) for mesh in (here, there))
    assert np.abs(a - b).mean() < 2


def check_chain(chain, move) -> None:
    """Oracle: the CPU's volume, with an elevation estimator, two candidates and a picture that shapes the volume."""
    chain.guide = {"shapes_volume": True}
    chain.elevation_estimator = ElevationEstimator(**SMALL).eval()
    here = chain(picture(40), num_candidates=2, generator=seeded())
    move()
    there = chain(picture(40), num_candidates=2, generator=seeded())
    assert_same_volume(there.volumes[0], here.volumes[0])
    assert len(there.meshes[0].faces) > 0


def test_chain(gpu, tiny_chain):
    check_chain(tiny_chain, lambda: tiny_chain.to(gpu))


def test_chain_with_offloading(cuda, tiny_chain):
    """Models come to the GPU one after another."""
    check_chain(tiny_chain, lambda: tiny_chain.enable_model_cpu_offload(device="cuda"))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=["float16", "bfloat16"])
def test_chain_in_half_precision(gpu, tiny_chain, dtype):
    """The formats that people choose on a GPU: all of it runs, and what comes out is finite."""
    tiny_chain.elevation_estimator = ElevationEstimator(**SMALL).eval()
    tiny_chain.to(gpu, dtype)
    out = tiny_chain(picture(40), num_candidates=2, generator=seeded())
    assert out.volumes[0].sdf.isfinite().all() and out.volumes[0].colors.isfinite().all()
    assert len(out.meshes[0].faces) > 0


def test_commands(cuda, tiny_chain_folder, monkeypatch, tmp_path):
    """`--device cuda`, and `auto`, where there is one."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    picture(40).save(tmp_path / "picture.png")
    common = ["--model", str(tiny_chain_folder), "--quiet"]
    for device in ("cuda", "auto"):
        mesh = tmp_path / f"{device}.glb"
        assert main(["generate", str(tmp_path / "picture.png"), "-o", str(mesh), "--device", device, *common]) == 0
        assert mesh.stat().st_size > 0
    assert (tmp_path / "cuda.glb").read_bytes() == (tmp_path / "auto.glb").read_bytes()
