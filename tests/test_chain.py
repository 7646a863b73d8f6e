"""The chain: image or prompt to mesh with tiny real components; what is swapped is used, what is seeded is repeated."""

import inspect

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from PIL import Image

from one2345pp import (
    CameraRig,
    InputError,
    MultiViewTilePipeline,
    One2345PlusPlusPipeline,
    SparseVolumeDiffusionPipeline,
    TextureRefinementPipeline,
)
from one2345pp.data.shapes import shape
from one2345pp.geometry.extract import finish_mesh, volume_to_mesh
from one2345pp.geometry.framing import frame_object
from one2345pp.geometry.outline import fit_outline
from one2345pp.geometry.picture_fit import fit_picture, stretch
from one2345pp.geometry.placement import place_picture
from one2345pp.geometry.render import render
from one2345pp.geometry.repair import is_solid
from one2345pp.pipelines import candidates
from one2345pp.pipelines.candidates import best_candidate
from one2345pp.pipelines.pipeline_one2345plusplus import MULTIVIEW_COMPONENTS, VOLUME_COMPONENTS
from one2345pp.pipelines.pipeline_output import SparseVolumePipelineOutput


@pytest.fixture(scope="module")
def picture():
    """A mug on white."""
    rgba = Image.fromarray(render(shape("mug"), CameraRig.from_angles([0], 15, 0.7, 1.6), 64)[0])
    white = Image.new("RGB", rgba.size, (255, 255, 255))
    white.paste(rgba, mask=rgba.getchannel("A"))
    return white


def seeded(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a, b) -> bool:
    """Whether two outputs are equal in every byte that counts."""
    return all(
        x.vertices.tobytes() == y.vertices.tobytes()
        and np.array_equal(x.visual.material.baseColorTexture, y.visual.material.baseColorTexture)
        for x, y in zip(a.meshes, b.meshes, strict=True)
    ) and all(
        np.array_equal(np.asarray(v), np.asarray(w))
        for six, other in zip(a.views, b.views, strict=True)
        for v, w in zip(six, other, strict=True)
    )


def test_image_to_textured_mesh(tiny_chain, picture):
    """The output has what it promises: a mesh with UVs and texture within budget, six RGBA views, volume, coarse mesh."""
    out = tiny_chain(picture, generator=seeded())
    (mesh,), (views,), (volume,), (coarse,) = out.meshes, out.views, out.volumes, out.coarse_meshes
    assert mesh.visual.uv.shape == (len(mesh.vertices), 2) and len(mesh.faces) <= 300
    assert mesh.visual.material.baseColorTexture.size == (64, 64)
    assert [view.mode for view in views] == ["RGBA"] * 6
    assert len(volume) > 0 and volume.resolution == 16
    assert coarse.visual.kind == "vertex"
    assert np.abs(mesh.vertices).max() <= 0.5 + 1 / 16


def test_seed_decides_everything(tiny_chain, picture):
    """The same generator state gives the same bytes even when the global one differs; another seed gives another mesh."""
    torch.manual_seed(1)
    first = tiny_chain(picture, generator=seeded())
    torch.manual_seed(2)
    assert same(first, tiny_chain(picture, generator=seeded()))
    assert not same(first, tiny_chain(picture, generator=seeded(5)))


def test_list_of_images_with_a_generator_each(tiny_chain, picture, tmp_path):
    """A batch is its members: same results as one by one; files and pictures are taken alike."""
    other = Image.fromarray(render(shape("chair"), CameraRig.from_angles([0], 15, 0.7, 1.6), 64)[0])
    other.save(tmp_path / "chair.png")
    both = tiny_chain([picture, str(tmp_path / "chair.png")], generator=[seeded(1), seeded(2)])
    first, second = tiny_chain(picture, generator=seeded(1)), tiny_chain(other, generator=seeded(2))
    assert both.meshes[0].vertices.tobytes() == first.meshes[0].vertices.tobytes()
    assert both.meshes[1].vertices.tobytes() == second.meshes[0].vertices.tobytes()
    assert np.array_equal(np.asarray(both.views[1][3]), np.asarray(second.views[0][3]))


def test_chain_is_its_stages(tiny_chain, picture):
    """Oracle: the stages called by hand, in order, with one generator."""
    from one2345pp.pipelines.preprocess import frame_object, isolate_object, key_background

    generator = seeded(3)
    framed = frame_object(isolate_object(picture))
    views = [key_background(view) for view in tiny_chain.multiview(framed, generator=generator).views[0]]
    solid = tiny_chain.volume(views, cameras=tiny_chain.rig, image=framed, generator=generator)
    fit = fit_picture(solid.meshes[0], framed)
    cameras = CameraRig.cat([tiny_chain.rig, fit.camera])
    mesh = tiny_chain.texture(
        solid.meshes[0], [*views, fit.view], cameras, generator=generator, trust=[1] * 6 + [8]
    ).meshes[0]
    out = tiny_chain(picture, generator=seeded(3))
    assert mesh.vertices.tobytes() == out.meshes[0].vertices.tobytes()
    assert np.array_equal(mesh.visual.material.baseColorTexture, out.meshes[0].visual.material.baseColorTexture)


def test_a_picture_of_known_elevation_is_one_more_view(tiny_chain, picture):
    """Oracle: the stages called by hand with seven views and cameras, and the seventh's outline; what comes back as views are the six
    that were drawn. A chain that does not believe pictures only stretches its mesh."""
    tiny_chain.register_to_config(believe_picture=True)
    generator = seeded(3)
    framed = tiny_chain.prepare_image(picture)
    views = tiny_chain.multiview(framed, generator=generator, transparent=True).views[0]
    placed, camera = place_picture(framed, tiny_chain.rig, 20)
    rig = CameraRig.cat([tiny_chain.rig, camera])
    seven = tiny_chain.volume([*views, placed], cameras=rig, image=framed, generator=generator)
    mesh = volume_to_mesh(fit_outline(seven.volumes[0], placed, camera))
    out = tiny_chain(picture, elevation=20, refine=False, generator=seeded(3))
    assert len(out.views[0]) == 6
    assert mesh.vertices.tobytes() == out.coarse_meshes[0].vertices.tobytes() != seven.meshes[0].vertices.tobytes()
    stretched = stretch(finish_mesh(mesh, None, False), fit_picture(mesh, framed, 20).factors)
    assert stretched.vertices.tobytes() == out.meshes[0].vertices.tobytes()
    without = tiny_chain(picture, refine=False, generator=seeded(3)).coarse_meshes[0].vertices.tobytes()
    tiny_chain.register_to_config(believe_picture=False)
    six = tiny_chain(picture, elevation=20, refine=False, generator=seeded(3)).coarse_meshes[0].vertices.tobytes()
    assert mesh.vertices.tobytes() != without == six


def test_swapped_parts_are_used_at_once(tiny_chain):
    """Stages are built when asked for: never stale, and they share modules instead of copying them."""
    tiny_chain.scheduler = EulerDiscreteScheduler.from_config(tiny_chain.scheduler.config)
    tiny_chain.sparse_scheduler = DDPMScheduler.from_config(tiny_chain.sparse_scheduler.config)
    assert isinstance(tiny_chain.multiview.scheduler, EulerDiscreteScheduler)
    assert isinstance(tiny_chain.volume.sparse_scheduler, DDPMScheduler)
    assert tiny_chain.multiview.unet is tiny_chain.unet
    assert tiny_chain.multiview._progress_bar_config == {"disable": True}
    assert tiny_chain.to(torch.float64).volume.sparse_unet.dtype == torch.float64


def test_saved_chain_is_the_chain(tiny_chain, picture, tmp_path):
    """Swapped scheduler and stage settings survive saving; the optional patch encoder stays absent."""
    tiny_chain.scheduler = EulerDiscreteScheduler.from_config(tiny_chain.scheduler.config)
    tiny_chain.save_pretrained(tmp_path)
    again = One2345PlusPlusPipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.patch_encoder is None
    assert again.multiview.config.view_size == 16 and again.texture.config.hidden == 8
    assert same(tiny_chain(picture, generator=seeded()), again(picture, generator=seeded()))


@pytest.mark.slow
def test_any_diffusers_program_runs_the_chain(tiny_chain_folder, fresh_python):
    """A program that knows diffusers only loads the folder and gets meshes; our own schedulers can be overridden there."""
    code = """
import sys, torch, diffusers
from PIL import Image
scheduler = diffusers.DDIMScheduler.from_pretrained(sys.argv[1], subfolder="sparse_scheduler")
pipe = diffusers.DiffusionPipeline.from_pretrained(sys.argv[1], trust_remote_code=True, occupancy_scheduler=scheduler)
image = Image.new("RGBA", (64, 64)); image.paste((200, 30, 30, 255), (16, 16, 48, 48))
out = pipe(image, generator=torch.Generator().manual_seed(0), refine=False)
print(type(pipe).__module__, type(pipe.occupancy_scheduler).__name__, len(out.meshes[0].faces) > 0)
"""
    module, scheduler, good = fresh_python(code, tiny_chain_folder).split()
    assert (module, scheduler, good) == (One2345PlusPlusPipeline.__module__, "DDIMScheduler", "True")


def test_from_stages_shares_and_keeps_settings(tiny_chain, picture):
    """A chain put together from stages computes what the original computes, on the same modules."""
    chain = One2345PlusPlusPipeline.from_stages(tiny_chain.multiview, tiny_chain.volume, tiny_chain.texture)
    chain.set_progress_bar_config(disable=True)
    assert chain.unet is tiny_chain.unet and chain.occupancy_unet is tiny_chain.occupancy_unet
    for name in ("multiview_config", "volume_config", "texture_config"):
        assert dict(chain.config[name]).items() >= dict(tiny_chain.config[name]).items()
    assert same(tiny_chain(picture, generator=seeded()), chain(picture, generator=seeded()))
    assert One2345PlusPlusPipeline.from_stages(tiny_chain.multiview, tiny_chain.volume).config.texture_config


def test_drawn_views_may_have_settings_of_their_own(tiny_chain, picture, tmp_path):
    """Oracle: the volume of the same drawn views, less the level; what `volume` makes of given views stays. Both survive saving."""
    level = {"surface_level": 0.1}
    chain = One2345PlusPlusPipeline.from_stages(
        tiny_chain.multiview, tiny_chain.volume, drawn_volume_config=level, default_num_candidates=2
    )
    chain.save_pretrained(tmp_path)
    chain = One2345PlusPlusPipeline.from_pretrained(tmp_path)
    chain.set_progress_bar_config(disable=True)
    assert chain.config.default_num_candidates == 2
    assert chain.volume.config.surface_level == 0 and chain.drawn_volume.config.surface_level == 0.1
    plain = tiny_chain(picture, refine=False, generator=seeded()).volumes[0]
    thick = chain(picture, num_candidates=1, refine=False, generator=seeded()).volumes[0]
    cut = plain.truncation
    torch.testing.assert_close(thick.sdf, (plain.sdf - 0.1 * cut).clamp(-cut, cut))
    with pytest.raises(InputError, match=r"drawn_volume_config: got \['level'\]"):
        One2345PlusPlusPipeline.from_stages(chain.multiview, chain.volume, drawn_volume_config={"level": 1})


def test_candidates_are_the_stages_called_again(tiny_chain, picture, monkeypatch):
    """Oracle: the stages called by hand, all views before all volumes; the second candidate is kept, whatever it looks like."""
    generator, framed = seeded(3), tiny_chain.prepare_image(picture)
    views = [tiny_chain.multiview(framed, generator=generator, transparent=True).views[0] for _ in range(3)]
    solids = [tiny_chain.volume(six, image=framed, generator=generator) for six in views]
    assert not torch.equal(solids[0].volumes[0].sdf, solids[1].volumes[0].sdf)

    def second(solids, views, *others):
        assert len(solids) == len(views) == 3
        return 1, best_candidate(solids[1:2], views[1:2], *others)[1]

    monkeypatch.setattr(candidates, "best_candidate", second)
    out = tiny_chain(picture, num_candidates=3, refine=False, generator=seeded(3))
    assert len(out.meshes) == len(out.views) == len(out.volumes) == 1
    assert out.coarse_meshes[0].vertices.tobytes() == solids[1].meshes[0].vertices.tobytes()
    assert torch.equal(out.volumes[0].sdf, solids[1].volumes[0].sdf)
    assert np.array_equal(np.asarray(out.views[0][2]), np.asarray(views[1][2]))


def views_of(mesh) -> list[Image.Image]:
    return [Image.fromarray(view) for view in render(mesh, CameraRig.named("zero123plus-v1.2"), 48)]


def test_the_candidate_that_agrees_with_its_pictures_is_kept(tiny_chain):
    """Oracle: of meshes and views of a mug and a house, those that fit each other; of two that do, the one that the picture shows."""
    mug, house = shape("mug"), shape("house")
    camera = CameraRig.from_angles([0], 15, 0.7, 1.6)
    pictures = [frame_object(Image.fromarray(render(mesh, camera, 64)[0])) for mesh in (mug, house)]
    pairs = [(mug, house), (mug, mug), (house, mug), (house, house)]  # what is there, and what its views show
    solids = [SparseVolumePipelineOutput([None], [mesh]) for mesh, _ in pairs]
    views = [views_of(shown) for _, shown in pairs]
    for elevation in (None, 15.0):
        for picture, index, other in zip(pictures, (1, 3), (house, mug), strict=True):
            best, fit = best_candidate(solids, views, tiny_chain.rig, picture, elevation)
            assert best == index and fit.likeness > 0.85
            assert fit_picture(other, picture, elevation).likeness < fit.likeness


def test_a_candidate_without_a_surface_does_not_stop_the_others(tiny_chain, picture):
    framed, views = tiny_chain.prepare_image(picture), views_of(shape("mug"))
    solid = tiny_chain(picture, refine=False, generator=seeded())
    error = InputError("views: no surface was found in sample 0.")
    assert best_candidate([error, solid], [views] * 2, tiny_chain.rig, framed, None)[0] == 1
    with pytest.raises(InputError, match="no surface"):
        best_candidate([error, error], [views] * 2, tiny_chain.rig, framed, None)
    with pytest.raises(InputError, match="num_candidates: got 0, expected at least 1"):
        tiny_chain(picture, num_candidates=0)


def test_stages_save_and_load_alone(tiny_chain, tmp_path):
    """Each stage is a pipeline of its own on disk, also the one without components and with absent optional ones."""
    bare = SparseVolumeDiffusionPipeline(
        **{name: getattr(tiny_chain, name) for name in VOLUME_COMPONENTS[:6]}, **tiny_chain.config.volume_config
    )
    for name, stage in {"m": tiny_chain.multiview, "v": tiny_chain.volume, "b": bare, "t": tiny_chain.texture}.items():
        stage.save_pretrained(tmp_path / name)
        again = type(stage).from_pretrained(tmp_path / name)
        assert set(again.components) == set(stage.components)
        assert {k: v for k, v in again.config.items() if k[0] != "_"} == {
            k: v for k, v in stage.config.items() if k[0] != "_"
        }
    with pytest.raises(InputError, match="holds a SparseVolumeDiffusionPipeline"):
        MultiViewTilePipeline.from_pretrained(tmp_path / "v")


def test_component_lists_are_the_stages_signatures():
    """A component added to a stage and forgotten in the chain would be silently absent."""
    for stage, names in (
        (MultiViewTilePipeline, MULTIVIEW_COMPONENTS),
        (SparseVolumeDiffusionPipeline, VOLUME_COMPONENTS),
    ):
        parameters = inspect.signature(stage.__init__).parameters
        components = [n for n, p in parameters.items() if p.default is p.empty or n in stage._optional_components]
        assert sorted(components) == sorted(["self", *names])
    assert {"self"} == {
        n for n, p in inspect.signature(TextureRefinementPipeline.__init__).parameters.items() if p.default is p.empty
    }


def test_prompt_goes_through_the_text_to_image_pipeline(tiny_chain, picture):
    """The prompt's picture is what the chain works on, drawn with the same generator; nothing is drawn for an image."""
    seen = []

    def text_to_image(prompt, generator):
        seen.append((prompt, generator.initial_seed()))
        return type("Output", (), {"images": [picture]})

    out = tiny_chain(prompt="a red mug", text_to_image=text_to_image, generator=seeded(7))
    assert seen == [("a red mug", 7)]
    assert same(out, tiny_chain(picture, generator=seeded(7)))


def test_without_refinement(tiny_chain, picture):
    """Vertex colours stay, the face budget is kept, and tuples come on request."""
    meshes, views, volumes, coarse = tiny_chain(
        picture, refine=False, max_faces=300, generator=seeded(), return_dict=False
    )
    assert meshes[0].visual.kind == "vertex"
    assert len(meshes[0].faces) <= 300 < len(coarse[0].faces)


@pytest.mark.parametrize("refine", [False, True])
def test_watertight_meshes_on_request(tiny_chain, picture, refine):
    """Noise of random weights, closed within its budget; the coarse mesh of the volume stays what it was."""
    out = tiny_chain(picture, refine=refine, watertight=True, max_faces=600, generator=seeded())
    assert is_solid(out.meshes[0]) and len(out.meshes[0].faces) <= 600
    assert len(out.coarse_meshes[0].faces) > 600


def test_callback_sees_every_stage(tiny_chain, picture):
    """Called in each step of each stage with the stage that runs."""
    calls = []

    def callback(stage, step, timestep, tensors):
        calls.append(type(stage).__name__)
        assert ("loss" if isinstance(stage, TextureRefinementPipeline) else "latents") in tensors
        return {}

    tiny_chain(picture, num_inference_steps=3, num_occupancy_steps=4, num_sparse_steps=2, num_texture_steps=2,
               generator=seeded(), callback_on_step_end=callback)  # fmt: skip
    stages = {"MultiViewTilePipeline": 3, "SparseVolumeDiffusionPipeline": 6, "TextureRefinementPipeline": 2}
    assert calls == [name for name, count in stages.items() for _ in range(count)]


@pytest.mark.parametrize(
    "arguments, words",
    [
        ({}, "got neither"),
        ({"image": Image.new("RGB", (8, 8)), "prompt": "x"}, "got both"),
        ({"prompt": "x"}, "text_to_image"),
        ({"prompt": " ", "text_to_image": print}, "expected text"),
        ({"image": []}, "empty list"),
        ({"image": Image.new("RGB", (64, 64), (9, 9, 9))}, "flat colour"),
        ({"image": "nowhere.png"}, "nowhere.png: no such file"),
        ({"image": "x.png", "generator": [torch.Generator()] * 2}, "generator: got 2"),
        ({"image": "x.png", "num_inference_steps": 0}, "num_inference_steps: got 0"),
        ({"image": "x.png", "elevation": 91}, "elevation: got 91, expected degrees"),
        ({"image": ["x.png", "y.png"], "elevation": [None, -91]}, "elevation: got -91, expected degrees"),
        ({"image": "x.png", "elevation": [1, 2]}, "elevation: got 2, expected one, or a list of 1"),
        ({"image": "x.png", "max_faces": 3}, "max_faces: got 3, expected at least 4"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_what_cannot_be_used_is_refused_before_any_work(tiny_chain, arguments, words):
    """An InputError that says what; no diffusion step is taken."""

    def never(*args):
        raise AssertionError("a step was taken")

    with pytest.raises(InputError, match=words):
        tiny_chain(**arguments, callback_on_step_end=never)
