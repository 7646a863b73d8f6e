"""Weights that draw the views of more than one rig: how a call says which, how they learn it, what comes of it in the chain."""

import json

import numpy as np
import pytest
import torch
from conftest import build_multiview, multiview_components
from diffusers import ControlNetModel, UNet2DConditionModel
from PIL import Image
from training_config import COMPONENTS, SIZE

from one2345pp import CameraRig, InputError, MultiViewTilePipeline, SparseVolumeDiffusionPipeline
from one2345pp.data.dataset import PreparedDataset
from one2345pp.data.prepare import RIGS, make_ring, prepare
from one2345pp.data.shapes import shape
from one2345pp.geometry.render import render
from one2345pp.training import multiview
from one2345pp.training.components import build_unet, seeded, start_from
from one2345pp.training.denoiser import DenoiserObjective
from one2345pp.training.multiview_data import Frames, LatentDataset


PHASE = {"minutes": 60, "max_steps": 2, "batch_size": 8, "lr": 1e-3, "warmup_steps": 1}


def components() -> dict:
    """Those of the tests, the UNet with a class a rig."""
    parts = multiview_components()
    torch.manual_seed(0)
    parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, num_class_embeds=2).eval()
    return parts


@pytest.fixture(scope="module")
def pipe() -> MultiViewTilePipeline:
    return build_multiview(components(), rigs=list(RIGS))


@pytest.fixture(scope="module")
def picture() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))


def draw(pipe, image, **kwargs) -> torch.Tensor:
    return pipe(image, generator=torch.Generator().manual_seed(0), output_type="latent", **kwargs).images


def test_a_call_chooses_the_rig(pipe, picture):
    """Oracle: the labels that both passes of the UNet get; the default is the config's `rig`, and rigs differ."""
    seen = []
    hook = pipe.unet.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    drawn = [draw(pipe, picture, num_inference_steps=1, rig=rig) for rig in (None, *RIGS)]
    hook.remove()
    assert seen == [[0], [0], [0], [0], [1], [1]]
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.allclose(drawn[0], drawn[2], atol=1e-4)


def test_rigs_are_saved(pipe, picture, tmp_path):
    pipe.save_pretrained(tmp_path)
    again = MultiViewTilePipeline.from_pretrained(tmp_path)
    again.set_progress_bar_config(disable=True)
    assert again.rigs == list(RIGS)
    torch.testing.assert_close(
        draw(again, picture, rig=RIGS[1]), draw(pipe, picture, rig=RIGS[1]), atol=1e-4, rtol=1e-4
    )


def test_what_the_weights_do_not_know_is_refused(pipe, picture, tiny_chain):
    with pytest.raises(InputError, match="rig: got 'fisheye', the weights know zero123plus-v1.2 and zero123plus-v1.1"):
        pipe(picture, rig="fisheye")
    with pytest.raises(InputError, match="rig: got 'zero123plus-v1.1', the weights know zero123plus-v1.2."):
        tiny_chain("nowhere.png", rig=RIGS[1])
    with pytest.raises(InputError, match="num_class_embeds=2, this one has None"):
        build_multiview(rigs=list(RIGS))
    with pytest.raises(InputError, match="num_class_embeds=1, this one has 2"):
        build_multiview(components())
    with pytest.raises(InputError, match="rig: got 'fisheye'"):
        build_multiview(components(), rigs=list(RIGS), rig="fisheye")


def test_texts_are_encoded_without_a_unet(pipe):
    """Proves that rigs are not held against a UNet that was left out."""
    alone = build_multiview({**components(), "unet": None}, rigs=list(RIGS))
    assert torch.equal(alone.encode_prompt("a")[0], pipe.encode_prompt("a")[0])


def test_a_controlnet_is_told_the_rig(picture):
    """Oracle: a network made of such a UNet refuses to run without labels; its label is that of the UNet."""
    parts = components()
    network = ControlNetModel.from_unet(parts["unet"], conditioning_embedding_out_channels=(4, 8)).eval()
    pipe, seen = build_multiview({**parts, "controlnet": network}, rigs=list(RIGS)), []
    network.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["class_labels"].tolist()), with_kwargs=True
    )
    draw(pipe, picture, num_inference_steps=1, rig=RIGS[1], control_image=Image.new("RGB", (32, 48)))
    assert seen == [[1]]


def test_the_chain_reconstructs_with_the_cameras_of_the_rig(tiny_chain, monkeypatch):
    """Oracle: the cameras that the volume stage gets are those of the rig that the views were drawn for, and go with them."""
    tiny_chain.register_modules(unet=components()["unet"])
    tiny_chain.register_to_config(multiview_config={**tiny_chain.config.multiview_config, "rigs": list(RIGS)})
    given, reconstruct = [], SparseVolumeDiffusionPipeline.reconstruct

    def look(stage, views, **options):
        given.append(views)
        return reconstruct(stage, views, **options)

    monkeypatch.setattr(SparseVolumeDiffusionPipeline, "reconstruct", look)
    image = Image.new("RGBA", (64, 64))
    image.paste((200, 60, 40, 255), (16, 10, 50, 54))
    for rig in RIGS:
        out = tiny_chain(image, rig=rig, refine=False, generator=torch.Generator().manual_seed(0))
        for views in (given[-1], out.views[0]):
            assert torch.equal(views.rig.camera_to_world, CameraRig.named(rig).camera_to_world)


# --- learning -------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def rings(tmp_path_factory):
    """Two rings of a mesh and of a procedural shape, of both rigs in turn."""
    folder = tmp_path_factory.mktemp("rings")
    shape("house").export(folder / "house.glb")
    options = {"view_size": 16, "workers": 1, "rings": list(RIGS), "shapes": 1}
    assert prepare([folder / "house.glb"], folder / "data", frames=2, **options) == []
    with pytest.raises(InputError, match="the first 2 frame"):
        prepare([folder / "house.glb"], folder / "varied", frames=2, vary=True, **options)
    return folder / "data"


def test_rings_of_both_rigs_take_turns(rings):
    """Oracle: the front tile of each rig, drawn anew from the mesh."""
    data = PreparedDataset(rings)
    frames = Frames(data, RIGS, 16)
    for item in (data[i] for i in range(len(data)) if data[i]["name"] == "house"):
        label = frames.labels(item)
        assert label.shape == (12,) and len(set(label.tolist())) == 1
        rig = CameraRig.named(RIGS[label[0]])
        ring = make_ring(shape("house"), 0.0, np.random.default_rng(0), 16, RIGS, int(label[0]))
        assert ring["rig"].tolist() == [label[0]]
        drawn = render(shape("house"), rig, 16)
        assert np.array_equal(np.stack([ring["views"][j % 2, j] for j in range(6)]), drawn)
        views = frames.pictures(item)["views"][frames.views[0]].movedim(1, -1).numpy()
        assert np.abs(views[..., 3].astype(int) - drawn[..., 3]).mean() < 1
    assert sorted(int(frames.labels(data[i])[0]) for i in range(len(data))) == [0, 0, 1, 1]
    with pytest.raises(InputError, match="was prepared for zero123plus-v1.2, zero123plus-v1.1, the config is for"):
        Frames(data, RIGS[:1], 16)


def test_frames_hold_a_tile_of_each_rig():
    """Oracle: the order of the views in a frame, six of each of its rigs."""

    class Prepared:
        meta, path = {"rigs": RIGS, "inputs": 2}, "data"

    frames = Frames(Prepared(), [RIGS[1], RIGS[0]], 16)
    assert frames.views.tolist() == [list(range(6, 12)), list(range(6))] and frames.inputs.tolist() == [[0, 1]] * 2
    assert frames.labels({}).tolist() == [0, 1]


def test_training_tells_the_rigs_apart(rings, tmp_path):
    """Oracle: labels of a batch beside those of its samples; after two steps both classes have moved, each by its own gradient."""
    config = {
        "view_size": SIZE,
        "rigs": list(RIGS),
        "default_num_inference_steps": 2,
        "components": {**COMPONENTS, "unet": {**COMPONENTS["unet"], "num_class_embeds": 2}},
        "phases": {"vae": PHASE, "vision": PHASE, "unet": PHASE},
        "recolored_copies": 1,
    }
    multiview.run(config, data=rings, output=tmp_path, device="cpu")
    pipe = MultiViewTilePipeline.from_pretrained(tmp_path / "pipeline")
    assert pipe.rigs == list(RIGS) and json.loads((tmp_path / "pipeline" / "model_index.json").read_text())["rigs"]
    latents = LatentDataset(rings, pipe, tmp_path / "latents")
    labels = [int(latents[i]["label"]) for i in range(len(latents))]
    assert labels == [0] * 24 + [1] * 24 + [0] * 24 + [1] * 24  # files by frame, then a copy in other colours
    objective = DenoiserObjective(pipe, latents.empty, [])
    batch = objective.collate([latents[0], latents[30]], torch.Generator().manual_seed(0))
    assert batch["labels"].tolist() == [0, 1]
    objective.loss(batch, torch.Generator().manual_seed(0))[0].backward()
    gradient = pipe.unet.class_embedding.weight.grad
    assert (gradient.abs().amax(1) > 0).all() and not torch.allclose(gradient[0], gradient[1])


def test_new_classes_begin_by_adding_nothing(tmp_path):
    """Oracle: the UNet without classes, from which one with two starts: the same prediction for both."""
    source = seeded(build_unet, COMPONENTS["unet"], 0)
    source.save_pretrained(tmp_path / "unet")
    more = {**COMPONENTS["unet"], "num_class_embeds": 2}
    model = seeded(build_unet, more, 1)
    start_from(str(tmp_path), "unet", model)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, source.config.in_channels, 12, 8, generator=generator)
    context = torch.randn(1, 3, source.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        expected = source(sample, 7, context).sample
        for label in (0, 1):
            drawn = model(sample, 7, context, class_labels=torch.tensor([label])).sample
            assert (drawn - expected).abs().max() < 1e-5
