"""Views that are told apart: given ones, drawn ones, and the picture that they were drawn of. In encoders, pipelines and training."""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from conftest import volume_components
from PIL import Image

from one2345pp import CameraRig, ConditionEncoder, InputError, SparseVolumeDiffusionPipeline
from one2345pp.geometry.placement import place_picture
from one2345pp.models.condition_encoder import ViewBatch, views_to_images
from one2345pp.models.sparse import SparseGrid
from one2345pp.training.components import start_from
from one2345pp.training.views import CHANCES, DEFAULTS, SampleBatch


CONFIG = {
    "resolution": 8,
    "channels": (8, 12),
    "image_size": 16,
    "stem_channels": (8, 8),
    "patch_channels": 0,
    "hidden_channels": 8,
}
RIG = CameraRig.cat([CameraRig.named("zero123plus-v1.2"), CameraRig.from_angles([0], 10, 0.5, 1.9)])
KINDS = ["drawn"] * 6 + ["picture"]


def views(count: int, kinds: list[int] | None) -> ViewBatch:
    """The same random views each time."""
    images = views_to_images(torch.rand(1, 7, 4, 16, 16, generator=torch.Generator().manual_seed(0)))[:, :count]
    batch = ViewBatch.make(images, [RIG[list(range(count))]])
    batch.kinds = None if kinds is None else torch.tensor([kinds])
    return batch


def encoder(**kwargs) -> ConditionEncoder:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return ConditionEncoder(**CONFIG, **kwargs).eval()


def lively(**kwargs) -> ConditionEncoder:
    """One that tells kinds apart, as after training: new weights begin at zero."""
    model = encoder(view_kinds=True, **kwargs)
    with torch.no_grad():
        generator = torch.Generator().manual_seed(1)
        for weight in (model.kind_bias.weight, model.project.weight):
            weight.add_(torch.randn(weight.shape, generator=generator) * 0.3)
    return model


def same(a: list[torch.Tensor], b: list[torch.Tensor]) -> bool:
    return all(torch.allclose(x, y, atol=1e-5) for x, y in zip(a, b, strict=True))


# --- the encoder -----------------------------------------------------------------------------------------------------


def test_an_encoder_begins_as_the_one_it_starts_from(tmp_path):
    """Oracle: with the weights of an encoder that tells nothing apart, views of any kind give its pyramid; a picture adds nothing."""
    old, new = encoder(pooling="max_mean"), encoder(pooling="max_mean", view_kinds=True)
    with torch.no_grad():
        old.project.weight.mul_(1.5)
    old.save_pretrained(tmp_path / "condition")
    start_from(str(tmp_path), "condition", new)
    expected = old(views(6, None))
    assert same(new(views(6, None)), expected)
    assert same(new(views(6, [1] * 6)), expected)
    assert same(new(views(7, [1] * 6 + [2])), expected)
    assert not same(old(views(7, None)), expected), "without kinds a picture is one more view"


def test_kinds_are_told_apart():
    model = lively()
    given = model(views(6, None))
    assert same(model(views(6, [0] * 6)), given), "views that nothing is said of were given"
    drawn = model(views(6, [1] * 6))
    assert not same(drawn, given)
    assert not same(model(views(7, [1] * 6 + [2])), drawn)


def test_the_picture_stands_apart():
    """Oracle: views stay in any order; the picture may stand anywhere, but in no other's stead; absent it is as none at all."""
    model = lively(pooling="max_mean")
    whole = views(7, [1] * 6 + [2])
    order = [6, 2, 1, 0, 5, 4, 3]
    fields = (whole.images, whole.world_to_camera, whole.tan_half_fov, whole.present)
    shuffled = ViewBatch(*(field[:, order] for field in fields), None, whole.kinds[:, order])
    assert same(model(whole), model(shuffled))
    swapped = ViewBatch(*fields, None, whole.kinds[:, order])
    assert not same(model(whole), model(swapped))
    whole.present[:, 6] = False
    assert same(model(whole), model(views(6, [1] * 6)))


def test_sparse_pyramid_equals_the_dense_one():
    dense, sparse = lively(), lively(sparse=True)
    sparse.load_state_dict(dense.state_dict())
    batch = views(7, [1] * 6 + [2])
    grid = SparseGrid(torch.tensor([[0, 3, 3, 3], [0, 4, 4, 3], [0, 4, 5, 4]]), 8, 1)
    _, x, y, z = grid.coords.unbind(1)
    assert torch.allclose(sparse(batch, grid)[0], dense(batch)[0][0, :, x, y, z].T, atol=1e-5)


# --- the volume pipeline ---------------------------------------------------------------------------------------------


def volume_pipe(**encoder_config) -> SparseVolumeDiffusionPipeline:
    components = volume_components()
    with torch.random.fork_rng():
        torch.manual_seed(0)
        for stage in ("occupancy", "sparse"):
            config = components[f"{stage}_condition"].config
            components[f"{stage}_condition"] = ConditionEncoder.from_config(config, **encoder_config).eval()
            for part in ("condition", "unet"):  # much of what is new is zero
                for parameter in components[f"{stage}_{part}"].parameters():
                    torch.nn.init.normal_(parameter, std=0.3)
    pipe = SparseVolumeDiffusionPipeline(**components, occupancy_level=-2.0)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def pictures(count: int) -> list[Image.Image]:
    generator = torch.Generator().manual_seed(0)
    values = torch.randint(0, 256, (count, 16, 16, 4), generator=generator, dtype=torch.uint8).numpy()
    return [Image.fromarray(value) for value in values]


def run(pipe, **kwargs) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    options = {"num_occupancy_steps": 1, "num_sparse_steps": 1, "output_type": "pt", "generator": generator}
    return pipe(pictures(7), cameras=RIG, **options, **kwargs).volumes


def test_a_call_says_what_kind_each_view_is(tmp_path):
    """Oracle: kinds change what is made by networks that are told, also saved and loaded, and nothing for the others."""
    pipe = volume_pipe(view_kinds=True)
    told = run(pipe, kinds=KINDS)
    assert torch.equal(told, run(pipe, kinds=[KINDS]))
    assert torch.equal(run(pipe), run(pipe, kinds=["given"] * 7))
    assert not torch.equal(told, run(pipe))
    pipe.save_pretrained(tmp_path)
    loaded = SparseVolumeDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert torch.equal(run(loaded, kinds=KINDS), told)
    plain = volume_pipe()
    assert torch.equal(run(plain, kinds=KINDS), run(plain))


def test_samples_of_a_batch_have_kinds_of_their_own():
    """Oracle: a picture beside drawn views in one sample, six given ones in the other: as each alone."""
    pipe = volume_pipe(view_kinds=True)
    options = {"num_occupancy_steps": 1, "num_sparse_steps": 1, "output_type": "pt"}
    generators = [torch.Generator().manual_seed(seed) for seed in (0, 1)]
    batch = [pictures(7), pictures(6)]
    rigs = [RIG, RIG[list(range(6))]]
    kinds = [KINDS, ["given"] * 6]
    both = pipe(batch, cameras=rigs, kinds=kinds, generator=generators, **options).volumes
    for index in range(2):
        alone = {"cameras": rigs[index], "kinds": kinds[index], "generator": torch.Generator().manual_seed(index)}
        assert torch.allclose(pipe(batch[index], **alone, **options).volumes[0], both[index], atol=1e-4)


@pytest.mark.parametrize("kinds", [["drawn"] * 6, ["drawn"] * 6 + ["guess"], ["drawn"] * 5 + ["picture"] * 2, []])
def test_kinds_that_cannot_be_are_refused(kinds):
    with pytest.raises(InputError, match="kinds: got"):
        run(volume_pipe(view_kinds=True), kinds=kinds)


# --- the chain -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("tell", "believe"), [(True, True), (True, False), (False, True)])
def test_the_chain_tells_kinds_where_its_networks_learnt_them(tiny_chain, tell, believe, monkeypatch, tmp_path):
    """Oracle: what the volume stage is called with, by a chain that was saved and loaded; a picture that is believed is a view."""
    tiny_chain.register_to_config(tell_kinds=tell, believe_picture=believe)
    tiny_chain.save_pretrained(tmp_path)
    index = json.loads((tmp_path / "model_index.json").read_text())
    assert index["tell_kinds"] is tell and index["believe_picture"] is believe
    loaded = type(tiny_chain).from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    told = []
    call = SparseVolumeDiffusionPipeline.__call__

    def listen(pipe, views, cameras, kinds=None, **kwargs):
        assert len(views) == len(cameras)
        told.append((len(views), kinds))
        return call(pipe, views, cameras=cameras, kinds=kinds, **kwargs)

    monkeypatch.setattr(SparseVolumeDiffusionPipeline, "__call__", listen)
    picture = Image.new("RGBA", (64, 64))
    picture.paste((200, 60, 40, 255), (16, 8, 48, 56))
    for elevation in (None, 10.0):
        loaded(picture, refine=False, elevation=elevation, generator=torch.Generator().manual_seed(0))
    seen = KINDS if believe else KINDS[:6]
    assert told == [(6, KINDS[:6] if tell else None), (len(seen), seen if tell else None)]


# --- training --------------------------------------------------------------------------------------------------------


def item(drawn: bool) -> dict:
    """A prepared sample as `PreparedDataset` and `DrawnViewsDataset` give it, of 16 px views."""
    generator = torch.Generator().manual_seed(0)

    def random_pictures(*shape):
        return torch.randint(0, 256, (*shape, 16, 16, 4), generator=generator, dtype=torch.uint8)

    sdf = torch.randint(-127, 128, (8, 8, 8), generator=generator).to(torch.int8)
    coords = (sdf.abs() < 127).nonzero()
    colors = torch.randint(0, 256, (len(coords), 3), generator=generator, dtype=torch.uint8)
    own = {"views": random_pictures(12), "inputs": random_pictures(2), "sdf": sdf, "coords": coords, "colors": colors}
    own["elevations"] = torch.tensor([100, 115], dtype=torch.uint8)
    return own | {"drawn": random_pictures(6), "drawn_input": torch.tensor(1)} if drawn else own


QUIET = {**DEFAULTS, **dict.fromkeys(CHANCES, 0.0), "image_size": 16, "elevation_error": 0.0}
DRAWN = {**QUIET, "drawn": 1.0, "picture": 1.0}


def batch(items: list[dict], config: dict, seed: int = 0) -> SampleBatch:
    return SampleBatch(items, config, torch.Generator().manual_seed(seed))


def test_a_batch_shows_the_picture_beside_views_that_were_drawn_of_it():
    """Oracle: `place_picture`, as the chain calls it, from where the sample says; a sample without one has an absent view there."""
    views = batch([item(True), item(False)], DRAWN).views
    assert views.kinds.tolist() == [[1] * 6 + [2], [0] * 7]
    assert views.present.tolist() == [[True] * 7, [True] * 6 + [False]]
    picture = Image.fromarray(item(True)["inputs"][1].numpy())
    drawn = CameraRig.named("zero123plus-v1.2")
    placed, camera = place_picture(picture, drawn, 25.0)
    rig = CameraRig.cat([drawn, camera])
    expected = views_to_images(torch.from_numpy(np.array(placed)).movedim(-1, 0)[None].float() / 255)
    torch.testing.assert_close(views.images[0, 6:], expected)
    torch.testing.assert_close(views.world_to_camera[0], rig.world_to_camera)
    torch.testing.assert_close(views.tan_half_fov[0], rig.tan_half_fov)
    without = batch([item(True)], {**DRAWN, "picture": 0.0}).views
    assert without.kinds.tolist() == [[1] * 6]


def test_the_elevation_of_the_picture_is_as_uncertain_as_an_estimate():
    """Oracle: over many draws, its mean and its spread."""
    found = []
    for seed in range(60):
        matrix = batch([item(True)], {**DRAWN, "elevation_error": 6.0}, seed).views.world_to_camera[0, 6]
        position = -matrix[:3, :3].T @ matrix[:3, 3]
        found.append(math.degrees(math.asin(position[1] / position.norm())))
    assert abs(np.mean(found) - 25) < 2.5 and 4 < np.std(found) < 8


def test_the_picture_is_mirrored_and_recoloured_with_its_views():
    """Oracle: a point and its mirror image lie on the same pixels; all seven pictures have their channels in the same order."""
    still, mirrored = batch([item(True)], DRAWN).views, batch([item(True)], {**DRAWN, "mirror": 1.0}).views
    torch.testing.assert_close(mirrored.images.flip(-1), still.images)
    seen = [
        views.sample(views.images[0, :, 3:], torch.tensor([[x, 0.1, -0.3]]), 0)
        for views, x in ((still, 0.2), (mirrored, -0.2))
    ]
    assert seen[0].shape == (7, 1, 1)
    torch.testing.assert_close(*seen, atol=1e-4, rtol=0)
    recolored = batch([item(True)], {**DRAWN, "recolor": 1.0}).views
    orders = [[*order, 3] for order in itertools.permutations(range(3))]
    assert any(torch.allclose(recolored.images, still.images[:, :, order]) for order in orders)
