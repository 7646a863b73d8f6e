"""The chain: image or prompt to mesh with tiny real components; what is swapped is used, what is seeded is repeated."""

import copy
import re
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from diffusers import DDPMScheduler, EulerDiscreteScheduler
from PIL import Image

from one2345pp import (
    CameraRig,
    ConditionEncoder,
    GuideSettings,
    InputError,
    MultiViewTilePipeline,
    One2345PlusPlusPipeline,
    Solid,
    SparseVolumeDiffusionPipeline,
    TextureRefinementPipeline,
    Views,
)
from one2345pp.data.shapes import shape
from one2345pp.geometry.extract import finish_mesh, volume_to_mesh
from one2345pp.geometry.framing import frame_object
from one2345pp.geometry.outline import fit_outline
from one2345pp.geometry.picture_fit import fit_picture, stretch
from one2345pp.geometry.placement import place_picture
from one2345pp.geometry.render import render
from one2345pp.geometry.repair import is_solid
from one2345pp.pipelines.picture.guide import Candidate, PictureGuide, best_candidate
from one2345pp.pipelines.stages import component_names


RIG = CameraRig.named("zero123plus-v1.2")


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
    """Oracle: the stages called by hand, in order, with one generator; the picture is the seventh view of the texture."""
    generator = seeded(3)
    framed = tiny_chain.prepare_image(picture)
    views = tiny_chain.multiview(framed, generator=generator, transparent=True).views[0]
    solid = tiny_chain.volume(views, image=framed, generator=generator)
    fit = fit_picture(solid.meshes[0], framed)
    seven = views + Views([fit.view], fit.camera)
    mesh = tiny_chain.texture(solid.meshes[0], seven, generator=generator, trust=[1] * 6 + [8]).meshes[0]
    out = tiny_chain(picture, generator=seeded(3))
    assert mesh.vertices.tobytes() == out.meshes[0].vertices.tobytes()
    assert np.array_equal(mesh.visual.material.baseColorTexture, out.meshes[0].visual.material.baseColorTexture)


def test_without_a_guide_the_chain_is_the_papers(tiny_chain, picture, tmp_path):
    """Oracle: draw, reconstruct, paint, each once and by the drawn views alone. What only a guide can do is refused."""
    tiny_chain.guide = None
    tiny_chain.save_pretrained(tmp_path)
    chain = One2345PlusPlusPipeline.from_pretrained(tmp_path)
    chain.set_progress_bar_config(disable=True)
    assert chain.guide is None
    generator, framed = seeded(3), chain.prepare_image(picture)
    views = chain.multiview.draw(framed, generator=generator)
    solid = chain.drawn_volume.reconstruct(views, image=framed, generator=generator)
    mesh = chain.texture.paint(solid.mesh, views, generator=generator)
    out = chain(picture, generator=seeded(3))
    assert mesh.vertices.tobytes() == out.meshes[0].vertices.tobytes()
    assert np.array_equal(mesh.visual.material.baseColorTexture, out.meshes[0].visual.material.baseColorTexture)
    assert out.elevations == [None]
    for asked, words in (
        ({"elevation": 10}, "elevation: is for the picture's guide"),
        ({"num_candidates": 2}, "tells the best"),
    ):
        with pytest.raises(InputError, match=words):
            chain(picture, **asked)


def test_a_picture_of_known_elevation_is_one_more_view(tiny_chain, picture):
    """Oracle: the stages called by hand with seven views and cameras, and the seventh's outline; what comes back as views are the six
    that were drawn. A guide that does not shape the volume only stretches the mesh."""
    tiny_chain.guide = GuideSettings(shapes_volume=True)
    generator = seeded(3)
    framed = tiny_chain.prepare_image(picture)
    views = tiny_chain.multiview(framed, generator=generator, transparent=True).views[0]
    placed, camera = place_picture(framed, RIG, 20)
    seven = tiny_chain.volume(views + Views([placed], camera), image=framed, generator=generator)
    mesh = volume_to_mesh(fit_outline(seven.volumes[0], placed, camera))
    out = tiny_chain(picture, elevation=20, refine=False, generator=seeded(3))
    assert len(out.views[0]) == 6 and out.views[0].rig == RIG and out.elevations == [20]
    assert mesh.vertices.tobytes() == out.coarse_meshes[0].vertices.tobytes() != seven.meshes[0].vertices.tobytes()
    stretched = stretch(finish_mesh(mesh, None, False), fit_picture(mesh, framed, 20).factors)
    assert stretched.vertices.tobytes() == out.meshes[0].vertices.tobytes()
    without = tiny_chain(picture, refine=False, generator=seeded(3)).coarse_meshes[0].vertices.tobytes()
    tiny_chain.guide = {"shapes_volume": False}
    six = tiny_chain(picture, elevation=20, refine=False, generator=seeded(3)).coarse_meshes[0].vertices.tobytes()
    assert mesh.vertices.tobytes() != without == six


def test_the_guides_numbers_are_the_chains_config(tiny_chain, picture, tmp_path):
    """What is set decides: trust in the picture changes the texture, the limit the stretch. Unknown names are refused in words."""
    plain = tiny_chain(picture, elevation=20, generator=seeded())
    tiny_chain.guide = GuideSettings(texture_trust=0.01, stretch_limit=1.0)
    tiny_chain.save_pretrained(tmp_path)
    other = One2345PlusPlusPipeline.from_pretrained(tmp_path)
    other.set_progress_bar_config(disable=True)
    assert other.guide == GuideSettings(texture_trust=0.01, stretch_limit=1.0)
    doubted = other(picture, elevation=20, generator=seeded())
    assert np.array_equal(plain.coarse_meshes[0].vertices, doubted.coarse_meshes[0].vertices)
    assert not np.array_equal(plain.meshes[0].bounds, doubted.meshes[0].bounds)
    textures = [np.asarray(out.meshes[0].visual.material.baseColorTexture) for out in (plain, doubted)]
    assert not np.array_equal(*textures)
    with pytest.raises(InputError, match=r"guide_config: got \['trust'\], expected some of num_candidates"):
        tiny_chain.guide = {"trust": 1}


def test_folders_of_the_first_version_load_as_before(tiny_chain_folder, tmp_path):
    """Settings of the guide under their old names, by our class and by diffusers' own."""
    import json
    import shutil

    folder = shutil.copytree(tiny_chain_folder, tmp_path / "old")
    index = json.loads((folder / "model_index.json").read_text())
    del index["guide_config"]
    old = {"default_num_candidates": 3, "believe_picture": True, "tell_kinds": False}
    (folder / "model_index.json").write_text(json.dumps(index | old))
    from diffusers import DiffusionPipeline

    for pipe in (
        One2345PlusPlusPipeline.from_pretrained(folder),
        DiffusionPipeline.from_pretrained(folder, trust_remote_code=True),
    ):
        assert pipe.guide == GuideSettings(num_candidates=3, shapes_volume=True)


def test_swapped_parts_are_used_at_once(tiny_chain):
    """Stages are built when asked for: never stale, and they share modules instead of copying them."""
    tiny_chain.scheduler = EulerDiscreteScheduler.from_config(tiny_chain.scheduler.config)
    tiny_chain.sparse_scheduler = DDPMScheduler.from_config(tiny_chain.sparse_scheduler.config)
    assert tiny_chain.multiview is tiny_chain.multiview
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


def test_what_is_set_on_a_stage_acts(tiny_chain, picture, tmp_path):
    """A component, a setting and the progress bar that are set on a stage are the chain's: used in its calls, seen by its other
    stages of those components, saved."""
    before = tiny_chain(picture, refine=False, generator=seeded())
    stage = tiny_chain.multiview
    stage.scheduler = EulerDiscreteScheduler.from_config(stage.scheduler.config)
    tiny_chain.volume.register_to_config(surface_level=0.2)
    tiny_chain.drawn_volume.register_to_config(fine_level=0.3)
    tiny_chain.texture.set_progress_bar_config(disable=False)
    with pytest.raises(InputError, match=r"volume_config: got \['level'\], expected some of"):
        tiny_chain.volume.register_to_config(level=1)
    tiny_chain.volume.register_modules(sparse_scheduler=DDPMScheduler.from_config(tiny_chain.sparse_scheduler.config))
    assert isinstance(tiny_chain.scheduler, EulerDiscreteScheduler)
    assert isinstance(tiny_chain.sparse_scheduler, DDPMScheduler)
    assert tiny_chain.volume.config.surface_level == tiny_chain.drawn_volume.config.surface_level == 0.2
    assert tiny_chain.config.drawn_volume_config == {"fine_level": 0.3}
    assert tiny_chain.texture._progress_bar_config == {"disable": False}
    assert tiny_chain.volume._progress_bar_config == {"disable": True}
    tiny_chain.save_pretrained(tmp_path)
    again = One2345PlusPlusPipeline.from_pretrained(tmp_path)
    assert isinstance(again.scheduler, EulerDiscreteScheduler) and again.volume.config.surface_level == 0.2
    after = tiny_chain(picture, refine=False, generator=seeded())
    assert not np.array_equal(np.asarray(before.views[0][0]), np.asarray(after.views[0][0]))


def test_settings_given_at_loading_leave_the_others(tiny_chain, tmp_path):
    """One setting of a stage or of the guide is replaced and the rest is the folder's; a name that no stage has, and one without its
    stage, are refused in words."""
    tiny_chain.volume.register_to_config(surface_level=0.2)
    tiny_chain.guide = {"num_candidates": 3}
    tiny_chain.save_pretrained(tmp_path)
    given = {"volume_config": {"max_voxels": 9}, "guide_config": {"shapes_volume": True}}
    pipe = One2345PlusPlusPipeline.from_pretrained(tmp_path, **given)
    assert dict(pipe.config.volume_config) == {**tiny_chain.config.volume_config, "max_voxels": 9}
    assert pipe.volume.config.surface_level == 0.2 and pipe.volume.config.max_voxels == 9
    assert pipe.guide == GuideSettings(num_candidates=3, shapes_volume=True)
    assert One2345PlusPlusPipeline.from_pretrained(tmp_path, guide_config=None).guide is None
    for wrong, words in (
        ({"volume_config": {"voxels": 9}}, r"volume_config: got \['voxels'\], expected some of default_guidance_scale"),
        ({"max_voxels": 9}, r"max_voxels: is a setting of a stage. Pass volume_config=\{'max_voxels': ...\}"),
    ):
        with pytest.raises(InputError, match=words):
            One2345PlusPlusPipeline.from_pretrained(tmp_path, **wrong)


def test_a_first_stage_of_another_width(tiny_chain, picture, tmp_path):
    """The volume stage keeps its own image encoder, also in a saved chain: its vectors are 18 numbers, those of the first stage 12.
    A width that does not fit is refused in words."""
    assert tiny_chain.vision_encoder.config.projection_dim == 12
    chain = One2345PlusPlusPipeline.from_stages(tiny_chain.multiview, tiny_chain.volume, tiny_chain.texture)
    chain.save_pretrained(tmp_path)
    chain = One2345PlusPlusPipeline.from_pretrained(tmp_path)
    chain.set_progress_bar_config(disable=True)
    assert chain.volume.vision_encoder.config.projection_dim == 18
    assert chain.multiview.vision_encoder.config.projection_dim == 12
    assert same(tiny_chain(picture, generator=seeded()), chain(picture, generator=seeded()))
    parts = {name: getattr(tiny_chain.volume, name) for name in component_names(SparseVolumeDiffusionPipeline)}
    with pytest.raises(InputError, match="vision_encoder: makes vectors of 12 numbers, but occupancy_unet takes 18"):
        SparseVolumeDiffusionPipeline(**parts | {"vision_encoder": tiny_chain.vision_encoder})
    alone = SparseVolumeDiffusionPipeline(**parts | {"vision_encoder": None})
    with pytest.raises(InputError, match="makes vectors of 12 numbers"):
        One2345PlusPlusPipeline.from_stages(tiny_chain.multiview, alone)


def test_a_full_size_first_stage_brings_its_settings(tiny_chain, tmp_path):
    """Views of 320 pixels are like those of Zero123++: one candidate, no outline, the settings of the volume for true views. A small
    first stage leaves the chain's settings; what is given at loading counts more."""
    from conftest import build_multiview

    tiny_chain.guide = {"num_candidates": 4, "shapes_volume": True}
    tiny_chain.drawn_volume.register_to_config(surface_level=0.3)
    small, large = build_multiview(), build_multiview(view_size=320)
    assert tiny_chain.with_stages(multiview=small).guide == tiny_chain.guide
    chain = tiny_chain.with_stages(multiview=large)
    assert chain.guide == GuideSettings(num_candidates=1, shapes_volume=False)
    assert chain.drawn_volume.config.surface_level == chain.volume.config.surface_level == 0
    tiny_chain.save_pretrained(tmp_path)
    given = {"guide_config": {"num_candidates": 2}, "drawn_volume_config": {"surface_level": 0.1}}
    chain = One2345PlusPlusPipeline.from_pretrained(tmp_path, multiview=large, **given)
    assert chain.guide == GuideSettings(num_candidates=2, shapes_volume=False)
    assert chain.drawn_volume.config.surface_level == 0.1


def test_a_guide_that_was_chosen_stays(tiny_chain, tmp_path):
    """A full-size first stage changes the number of tries and the outline, and nothing else: no guide stays none, trust stays. What is
    said at loading counts, in every form."""
    from conftest import build_multiview

    large = build_multiview(view_size=320)
    tiny_chain.guide = GuideSettings(num_candidates=4, shapes_volume=True, texture_trust=2.0)
    assert tiny_chain.with_stages(multiview=large).guide == GuideSettings(texture_trust=2.0)
    tiny_chain.save_pretrained(tmp_path)
    for said, guide in (
        (None, None),
        (GuideSettings(num_candidates=5), GuideSettings(num_candidates=5)),
        ({"num_candidates": 5}, GuideSettings(num_candidates=5, texture_trust=2.0)),
    ):
        assert One2345PlusPlusPipeline.from_pretrained(tmp_path, multiview=large, guide_config=said).guide == guide
    tiny_chain.guide = None
    assert tiny_chain.with_stages(multiview=large).guide is None
    with pytest.raises(InputError, match=r"guide_config: got \['bogus'\]"):
        One2345PlusPlusPipeline.from_pretrained(tmp_path, guide_config={"bogus": 1})


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (8, "guide: got int, expected GuideSettings"),
        ({"num_candidates": "8"}, "num_candidates: got '8', expected a whole number"),
        ({"num_candidates": 0}, "num_candidates: got 0"),
        ({"texture_trust": -1}, "texture_trust: got -1, expected a positive number"),
        ({"stretch_limit": 0}, "stretch_limit: got 0, expected a positive number of at least 1"),
    ],
)
def test_what_is_no_guide_is_refused(tiny_chain, settings, words):
    with pytest.raises(InputError, match=words):
        tiny_chain.guide = settings


def test_the_volume_stages_own_encoder_is_its_own(tiny_chain):
    """Where both stages share one, a new one for the volume stage leaves the first stage's, and none at all is refused in words."""
    from conftest import volume_encoder

    volume_part = tiny_chain.volume.vision_encoder
    first = tiny_chain.vision_encoder
    tiny_chain.volume.vision_encoder = (new := volume_encoder()["vision_encoder"])
    assert tiny_chain.volume.vision_encoder is new is not volume_part and tiny_chain.vision_encoder is first
    with pytest.raises(InputError, match="vision_encoder: cannot be None"):
        tiny_chain.volume.vision_encoder = None
    assert tiny_chain.multiview.vision_encoder is first


def test_wrong_stages_are_refused_at_once(tiny_chain):
    """What plays no role, a role that nobody plays, and a solid that is none."""
    for stages, words in (
        ({"multiview": "folder"}, "multiview: got str, expected a stage with a method 'draw'"),
        ({"multiview": None}, "multiview: got NoneType"),
        ({"volume": Turntable()}, "volume: got Turntable, expected a stage with a method 'reconstruct'"),
        ({"painter": Painter()}, r"with_stages: got \['painter'\], expected some of multiview, volume, texture"),
    ):
        with pytest.raises(InputError, match=words):
            tiny_chain.with_stages(**stages)
    with pytest.raises(InputError, match="Solid: got int and NoneType"):
        Solid(mesh=5)


def test_candidates_and_cameras_fit_objects(tiny_chain, picture):
    """Rigs are paired with objects, not with tries; several tries need a guide, and nobody has none."""
    mug, framed = views_of(shape("mug")), tiny_chain.prepare_image(picture)
    with pytest.raises(InputError, match="num_candidates: the picture's guide tells the best, and this call has none"):
        tiny_chain.reconstruct([[mug, mug]])
    other = CameraRig.named("zero123plus-v1.1")
    out = tiny_chain.reconstruct(
        [[list(mug)] * 2, [list(mug)] * 2], [RIG, other], [framed] * 2, background="none", drawn=True, refine=False,
        generator=seeded(),
    )  # fmt: skip
    assert [views.rig for views in out.views] == [RIG, other]
    for views, cameras in (([[]], None), ([[list(mug)] * 3, [list(mug)] * 3], [RIG]), ([], None)):
        with pytest.raises(InputError, match="views: "):
            tiny_chain.reconstruct(views, cameras)


def test_a_volume_stage_that_needs_maps_is_refused_at_assembly(tiny_chain):
    """No first stage draws normals, so such networks are for calls of their own stage alone, and the chain says so at once."""
    volume = tiny_chain.volume
    volume.sparse_condition = ConditionEncoder.from_config({**volume.sparse_condition.config, "maps": {"normals": 3}})
    with pytest.raises(
        InputError, match=r"volume: its networks need maps of the views \(normals\), which no first stage draws"
    ):
        One2345PlusPlusPipeline.from_stages(tiny_chain.multiview, volume)


def test_another_first_stage_and_the_rest_of_a_chain(tiny_chain, picture):
    """`with_stages` changes what is drawn, and nothing else: settings, guide and encoders are those of the chain."""
    from conftest import build_multiview, multiview_components

    components = multiview_components()
    with torch.no_grad():
        components["unet"].conv_out.weight.add_(0.1)
    tiny_chain.guide = {"num_candidates": 2}
    chain = tiny_chain.with_stages(multiview=build_multiview(components, default_num_inference_steps=1))
    chain.set_progress_bar_config(disable=True)
    assert chain.guide == tiny_chain.guide and chain.volume.config == tiny_chain.volume.config
    assert chain.volume.vision_encoder is tiny_chain.volume.vision_encoder
    assert chain.unet is components["unet"] is not tiny_chain.unet
    assert len(chain(picture, refine=False, generator=seeded()).meshes[0].faces)


class WithMore(MultiViewTilePipeline):
    """Somebody's first stage: ours with a component and a setting more, in the whole signature that diffusers wants."""

    def __init__(self, vae, text_encoder, tokenizer, unet, scheduler, vision_encoder, feature_extractor_clip,
                 feature_extractor_vae, extra, controlnet=None, ramping_coefficients=None, view_size=320,
                 rig="zero123plus-v1.2", rigs=None, clean_reference=False, tile_positions=False,
                 default_num_inference_steps=28, default_guidance_scale=4.0, strength=0.5):  # fmt: skip
        super().__init__(vae, text_encoder, tokenizer, unet, scheduler, vision_encoder, feature_extractor_clip,
                         feature_extractor_vae, controlnet, ramping_coefficients, view_size, rig, rigs, clean_reference,
                         tile_positions, default_num_inference_steps, default_guidance_scale)  # fmt: skip
        self.register_modules(extra=extra)
        self.register_to_config(strength=strength)


class Sunny(TextureRefinementPipeline):
    """Somebody's painter: ours, brighter."""

    def paint(self, mesh, views, **options):
        return super().paint(
            mesh, views.map(lambda view: Image.blend(view, Image.new("RGBA", view.size, "white"), 0.1)), **options
        )


def test_subclasses_of_stages_stay_what_they_are(tiny_chain, picture, tmp_path):
    """One that takes the same is rebuilt from the chain's components as its base is; one that takes more is held as it is."""
    parts = {name: getattr(tiny_chain, name) for name in component_names(MultiViewTilePipeline)}
    more = WithMore(**parts, extra=DDPMScheduler(), strength=0.7, **tiny_chain.config.multiview_config)
    assert more.config.strength == 0.7 and more.config.view_size == 16 and isinstance(more.extra, DDPMScheduler)
    sunny = Sunny(**tiny_chain.config.texture_config)
    chain = tiny_chain.with_stages(multiview=more, texture=sunny)
    chain.set_progress_bar_config(disable=True)
    assert chain.multiview is more and type(chain.texture) is Sunny and chain.texture is not sunny
    plain, bright = tiny_chain(picture, generator=seeded()), chain(picture, generator=seeded())
    assert np.array_equal(np.asarray(plain.views[0][0]), np.asarray(bright.views[0][0]))
    assert not same(plain, bright)
    with pytest.raises(InputError, match=r"multiview \(WithMore\)"):
        chain.save_pretrained(tmp_path)


def test_threads_may_share_a_pipeline(tiny_chain, picture):
    """Oracle: the results of calls one after the other. Two threads call the first stage and the chain, and one call fails in the
    middle; afterwards the UNet has its own attention and the chain computes what it did. A copy has a lock of its own."""
    framed, own = tiny_chain.prepare_image(picture), dict(tiny_chain.unet.attn_processors)
    alone = [tiny_chain.multiview.draw(framed, num_inference_steps=3, generator=seeded(seed)) for seed in range(6)]
    whole = tiny_chain(picture, refine=False, generator=seeded())

    def fail(stage, step, timestep, tensors):
        raise RuntimeError("stopped")

    def job(number: int):
        if number == 6:
            return tiny_chain(picture, refine=False, generator=seeded())
        if number == 7:
            with pytest.raises(RuntimeError, match="stopped"):
                tiny_chain.multiview(framed, callback_on_step_end=fail)
            return None
        return tiny_chain.multiview.draw(framed, num_inference_steps=3, generator=seeded(number))

    with ThreadPoolExecutor(2) as pool:
        *views, mesh, _ = pool.map(job, range(8))
    for six, others in zip(views, alone, strict=True):
        assert all(np.array_equal(np.asarray(a), np.asarray(b)) for a, b in zip(six, others, strict=True))
    assert mesh.meshes[0].vertices.tobytes() == whole.meshes[0].vertices.tobytes()
    assert tiny_chain.unet.attn_processors == own
    copied = copy.deepcopy(tiny_chain)
    assert vars(copied.unet)["_call_lock"] is not vars(tiny_chain.unet)["_call_lock"]
    assert (
        copied(picture, refine=False, generator=seeded()).meshes[0].vertices.tobytes()
        == whole.meshes[0].vertices.tobytes()
    )


def test_chains_that_share_a_network_wait_for_each_other(tiny_chain, picture):
    """Oracle: calls one after the other. Another chain, and a stage taken out of one, on the same UNet and scheduler, in threads."""
    other = tiny_chain.with_stages(texture=tiny_chain.texture)
    taken = MultiViewTilePipeline.from_pipe(tiny_chain)
    for pipe in other, taken:
        pipe.set_progress_bar_config(disable=True)
    framed = tiny_chain.prepare_image(picture)
    stages = [tiny_chain.multiview, other.multiview, taken]
    assert all(stage.unet is tiny_chain.unet for stage in stages)

    def draw(number: int) -> bytes:
        six = stages[number % 3].draw(framed, num_inference_steps=2 + number % 2, generator=seeded(number))
        return b"".join(view.tobytes() for view in six)

    alone = [draw(number) for number in range(9)]
    with ThreadPoolExecutor(3) as pool:
        assert list(pool.map(draw, range(9))) == alone


# --- stages of others -------------------------------------------------------------------------------------------------


class Turntable:
    """Somebody's first stage: four orthographic views of a house, whatever it is asked for."""

    def draw(self, image, *, generator=None, **options) -> Views:
        rig = CameraRig.orthographic([0, 90, 180, 270], 0)
        return Views([Image.fromarray(view) for view in render(shape("house"), rig, 64)], rig)


class Reconstructor:
    """Somebody's reconstructor: a mesh, no volume."""

    def reconstruct(self, views, *, image=None, generator=None, **options) -> Solid:
        self.seen = views
        return Solid(mesh=shape("house"))


class Painter:
    """Somebody's painter: one colour."""

    def paint(self, mesh, views, *, generator=None, **options):
        mesh = mesh.copy()
        mesh.visual.vertex_colors = (10, 200, 30, 255)
        return mesh


def test_anybodys_stages_fill_the_roles(tiny_chain, picture, tmp_path):
    """Each alone beside the package's own, and all together: any number of views, cameras of another kind, meshes without volumes.
    What cannot be saved says so."""
    settings = {"num_texture_steps": 2, "texture_size": 64}
    chain = One2345PlusPlusPipeline.from_stages(Turntable(), tiny_chain.volume, tiny_chain.texture)
    chain.set_progress_bar_config(disable=True)
    out = chain(picture, generator=seeded(), **settings)
    assert len(out.views[0]) == 4 and out.volumes[0].resolution == 16 and out.meshes[0].visual.uv is not None
    chain = One2345PlusPlusPipeline.from_stages(tiny_chain.multiview, Reconstructor(), tiny_chain.texture)
    chain.set_progress_bar_config(disable=True)
    for guide in GuideSettings(shapes_volume=True), None:
        chain.guide = guide
        out = chain(picture, generator=seeded(), **settings)
        assert out.volumes == [None] and len(chain.volume.seen) == 6
        assert np.array_equal(np.unique(out.coarse_meshes[0].faces), np.unique(shape("house").faces))
    chain = One2345PlusPlusPipeline.from_stages(Turntable(), Reconstructor(), Painter())
    out = chain(picture, elevation=20)
    assert (out.meshes[0].visual.vertex_colors == (10, 200, 30, 255)).all() and out.elevations == [20]
    with pytest.raises(InputError, match="multiview \\(Turntable\\), volume .*cannot be saved"):
        chain.save_pretrained(tmp_path / "chain")
    assert not (tmp_path / "chain").exists()


def test_given_views_go_through_the_same_door(tiny_chain):
    """`reconstruct` is the volume stage and the texture stage called by hand, on views with alpha or on a plain background; a list of
    objects is its members."""
    rgba = views_of(shape("mug"))
    solid = tiny_chain.volume(rgba, generator=(generator := seeded(4)))
    mesh = tiny_chain.texture(solid.meshes[0], rgba, generator=generator).meshes[0]
    out = tiny_chain.reconstruct(rgba, generator=seeded(4))
    assert mesh.vertices.tobytes() == out.meshes[0].vertices.tobytes()
    assert np.array_equal(mesh.visual.material.baseColorTexture, out.meshes[0].visual.material.baseColorTexture)
    house = views_of(shape("house"))
    both = tiny_chain.reconstruct([list(rgba), list(house)], RIG, generator=[seeded(4), seeded(5)])
    assert both.meshes[0].vertices.tobytes() == out.meshes[0].vertices.tobytes()
    assert both.views[1].rig == RIG and both.elevations == [None, None]
    white = rgba.map(lambda view: Image.alpha_composite(Image.new("RGBA", view.size, "white"), view).convert("RGB"))
    kept = tiny_chain.reconstruct(white, refine=False, generator=seeded(4)).views[0]
    for view, truth in zip(kept, rgba, strict=True):
        agree = (np.asarray(view)[..., 3] > 127) == (np.asarray(truth)[..., 3] > 127)
        assert agree.mean() > 0.97
    with pytest.raises(InputError, match="elevation: is for the picture's guide"):
        tiny_chain.reconstruct(rgba, elevation=3)


def test_what_contradicts_its_views_is_told(tiny_chain, caplog):
    """Oracle: a reconstructor that makes a house of everything. Views of a house, of any sizes, are not worth a word; with those of a
    rocket, or three of them, a warning says how little agrees and names the views that do least."""
    chain = tiny_chain.with_stages(volume=Reconstructor())
    house, rocket = views_of(shape("house")), views_of(shape("rocket"))

    def told(views) -> str:
        caplog.clear()
        chain.reconstruct(views, refine=False)
        return caplog.text

    assert told(house) == told(Views([*list(house)[:5], house[5].resize((30, 30))], RIG)) == ""
    assert re.search(r"agrees with only 4\d% .* least in number .*order of their cameras", told(rocket))
    mixed = told(Views([*list(house)[:3], *list(rocket)[3:]], RIG))
    assert re.search(r"least in number 4, 6\.", mixed)


def test_drawn_views_may_be_looked_at_before_they_are_reconstructed(tiny_chain, picture):
    """A call in two: draw, then `reconstruct` with `drawn`; the result is that of one call."""
    generator, framed = seeded(3), tiny_chain.prepare_image(picture)
    tries = [tiny_chain.multiview.draw(framed, generator=generator) for _ in range(2)]
    out = tiny_chain.reconstruct([tries], image=framed, background="none", drawn=True, generator=generator)
    assert same(out, tiny_chain(picture, num_candidates=2, generator=seeded(3)))


def test_steps_work_alone_on_a_fresh_chain(tiny_chain, picture):
    """Every public step of a call, by itself, before any call."""
    framed = tiny_chain.prepare_image(picture)
    assert (
        tiny_chain.check_inputs(
            image=picture,
            prompt=None,
            text_to_image=None,
            generator=None,
            elevation=None,
            rig=None,
            num_candidates=None,
        )
        == 1
    )
    (guide,) = tiny_chain.prepare_guides([framed], 10)
    best = tiny_chain.reconstruct_best([views_of(shape("mug"))], framed, guide, seeded(), drawn=True)
    mesh = tiny_chain.paint(best, guide, seeded(), num_inference_steps=1, texture_size=64)
    assert mesh.visual.uv is not None and best.score > 0


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
        tiny_chain.multiview, tiny_chain.volume, drawn_volume_config=level, guide_config={"num_candidates": 2}
    )
    chain.save_pretrained(tmp_path)
    chain = One2345PlusPlusPipeline.from_pretrained(tmp_path)
    chain.set_progress_bar_config(disable=True)
    assert chain.guide.num_candidates == 2
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
    views = [tiny_chain.multiview.draw(framed, generator=generator) for _ in range(3)]
    solids = [tiny_chain.volume(six, image=framed, generator=generator) for six in views]
    assert not torch.equal(solids[0].volumes[0].sdf, solids[1].volumes[0].sdf)
    count = iter(range(3))

    def judge(guide, candidate):
        return Candidate(candidate.views, candidate.solid, fit_picture(shape("mug"), framed), float(next(count) == 1))

    monkeypatch.setattr(PictureGuide, "judge", judge)
    out = tiny_chain(picture, num_candidates=3, refine=False, generator=seeded(3))
    assert len(out.meshes) == len(out.views) == len(out.volumes) == 1
    assert out.coarse_meshes[0].vertices.tobytes() == solids[1].meshes[0].vertices.tobytes()
    assert torch.equal(out.volumes[0].sdf, solids[1].volumes[0].sdf)
    assert np.array_equal(np.asarray(out.views[0][2]), np.asarray(views[1][2]))


def views_of(mesh) -> Views:
    return Views([Image.fromarray(view) for view in render(mesh, RIG, 48)], RIG)


def guide_of(picture, elevation=None) -> PictureGuide:
    return PictureGuide(picture, elevation, GuideSettings())


def test_the_candidate_that_agrees_with_its_pictures_is_kept():
    """Oracle: of meshes and views of a mug and a house, those that fit each other; of two that do, the one that the picture shows."""
    mug, house = shape("mug"), shape("house")
    camera = CameraRig.from_angles([0], 15, 0.7, 1.6)
    pictures = [frame_object(Image.fromarray(render(mesh, camera, 64)[0])) for mesh in (mug, house)]
    pairs = [(mug, house), (mug, mug), (house, mug), (house, house)]  # what is there, and what its views show
    views = [views_of(shown) for _, shown in pairs]
    solids = {id(one): Solid(mesh=mesh) for one, (mesh, _) in zip(views, pairs, strict=True)}
    for elevation in (None, 15.0):
        for picture, index, other in zip(pictures, (1, 3), (house, mug), strict=True):
            best = best_candidate(lambda one: solids[id(one)], views, guide_of(picture, elevation))
            assert best.views is views[index] and best.fit.likeness > 0.85
            assert fit_picture(other, picture, elevation).likeness < best.fit.likeness


def test_a_candidate_without_a_surface_does_not_stop_the_others(tiny_chain, picture):
    """The others are tried; if none has a surface, the first one's error is told."""
    framed, views, tried = tiny_chain.prepare_image(picture), [views_of(shape("mug")) for _ in range(2)], []

    def first_fails(one):
        tried.append(one)
        if len(tried) % 2:
            raise InputError(f"views: no surface was found, try {len(tried)}.")
        return Solid(mesh=shape("mug"))

    assert best_candidate(first_fails, views, guide_of(framed)).views is views[1]
    tried.clear()
    with pytest.raises(InputError, match="no surface was found, try 1"):
        best_candidate(lambda one: first_fails(one) and first_fails(one), views[:1] * 2, None)
    with pytest.raises(InputError, match="num_candidates: got 0, expected at least 1"):
        tiny_chain(picture, num_candidates=0)


def test_stages_save_and_load_alone(tiny_chain, tmp_path):
    """Each stage is a pipeline of its own on disk, also the one without components and with absent optional ones."""
    needed = set(component_names(SparseVolumeDiffusionPipeline)) - set(
        SparseVolumeDiffusionPipeline._optional_components
    )
    bare = SparseVolumeDiffusionPipeline(
        **{name: getattr(tiny_chain, name) for name in needed}, **tiny_chain.config.volume_config
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


def test_a_chains_components_are_those_of_its_stages():
    """A component added to a stage and forgotten in the chain would be silently absent; offload order names every network."""
    own = {"volume_vision_encoder", "volume_feature_extractor_clip", "elevation_estimator"}
    names = {name for stage in One2345PlusPlusPipeline.STAGES.values() for name in component_names(stage)}
    assert set(component_names(One2345PlusPlusPipeline)) == names | own
    order = One2345PlusPlusPipeline.model_cpu_offload_seq.split("->")
    data = {"tokenizer", "controlnet", *(name for name in names if "scheduler" in name or "extractor" in name)}
    assert set(order) == (names - data) | {"volume_vision_encoder", "elevation_estimator"} and len(order) == len(
        set(order)
    )
    assert order.index("unet") < order.index("vae") < order.index("occupancy_unet") < order.index("sparse_unet")


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
    meshes, views, volumes, coarse, elevations = tiny_chain(
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


def test_callbacks_say_what_they_need(tiny_chain, picture):
    """Named tensors reach the stages that have them, the others get none of them; what no stage has is refused before any work. A
    callback's own `tensor_inputs` count where nothing is named."""
    seen = {}

    class Callback:
        tensor_inputs = ["prompt_embeds", "loss"]

        def __call__(self, stage, step, timestep, tensors):
            seen.setdefault(type(stage).__name__, set()).update(tensors)
            return {}

    expected = {"MultiViewTilePipeline": {"prompt_embeds"}, "SparseVolumeDiffusionPipeline": set()}
    for names in None, ["prompt_embeds", "loss"]:
        seen.clear()
        tiny_chain(
            picture, generator=seeded(), callback_on_step_end=Callback(), callback_on_step_end_tensor_inputs=names
        )
        assert seen == expected | {"TextureRefinementPipeline": {"loss"}}
    with pytest.raises(InputError, match=r"callback_on_step_end_tensor_inputs: got \['noise'\]"):
        tiny_chain(picture, callback_on_step_end=Callback(), callback_on_step_end_tensor_inputs=["noise"])


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
