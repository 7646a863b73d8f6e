"""What the tile UNet learns from: how latents are made and kept. What is in a tile is tested in `test_training_multiview`."""

import pickle
import weakref

import pytest
import torch
from conftest import build_multiview
from torch.utils.data import DataLoader

from one2345pp.data.prepare import RIGS, prepare
from one2345pp.geometry.tile import join_views
from one2345pp.training import multiview_data


SEED = 4


@pytest.fixture(scope="module")
def rings(tmp_path_factory):
    """Rings of two procedural objects and both rigs, of 20 pixels."""
    folder = tmp_path_factory.mktemp("rings")
    prepare([], folder, shapes=2, frames=2, view_size=20, rings=list(RIGS), workers=1)
    return folder


def pipeline():
    """A first stage of 16 pixels that knows both rigs."""
    pipe = build_multiview()
    pipe.register_to_config(rigs=list(RIGS))
    return pipe


def encode(rings, pipe, folder):
    return multiview_data.LatentDataset(rings, pipe, folder, recolored_copies=1, seed=SEED)


@pytest.fixture
def latents(rings, tmp_path):
    return encode(rings, pipeline(), tmp_path / "latents")


def test_latents_are_those_of_all_pictures_at_once(rings, latents):
    """Oracle: all pictures in memory, encoded a sample at a time by a pipeline of the same weights, with one generator's noise: the
    same to the last bit."""
    images, vae = (
        multiview_data.ImageDataset(rings, RIGS, 16),
        build_multiview().vae.to(memory_format=torch.channels_last),
    )
    generator = torch.Generator().manual_seed(SEED)

    def encoded(pictures):
        pixels = multiview_data.to_pixels(pictures[:, :3]).contiguous(memory_format=torch.channels_last)
        return vae.encode(pixels).latent_dist

    assert len(latents) == 2 * 12 * len(images) == 96
    for sample in range(len(images)):
        with torch.no_grad():
            views, inputs = encoded(images[sample]["views"]), encoded(images[sample]["inputs"])
        views, inputs = views.mode().half(), inputs.sample(generator).half()
        for frame, (own, pictures) in enumerate(zip(images.frames.views, images.frames.inputs, strict=True)):
            item = latents[12 * sample + frame]
            assert torch.equal(item["tile"], join_views(views[own]))
            assert torch.equal(item["references"], inputs[pictures])
            assert item["label"] == images[sample]["labels"][frame]
    assert torch.equal(latents.weights[:48], images.weights.repeat_interleave(12))


def test_one_samples_pictures_are_in_memory_at_a_time(rings, tmp_path, monkeypatch):
    """Oracle: when the next pictures are made, no tensor of those before is alive."""
    alive, make = weakref.WeakSet(), multiview_data.Frames.pictures

    def pictures(frames, item):
        assert not alive
        made = make(frames, item)
        alive.update(made.values())
        return made

    monkeypatch.setattr(multiview_data.Frames, "pictures", pictures)
    encode(rings, pipeline(), tmp_path / "latents")


def test_workers_read_the_files_themselves(latents):
    """Oracle: items of two worker processes, and of a copy that was pickled, as for workers that are not forked; it has no array."""
    there = pickle.dumps(latents)
    assert len(there) < 5000 < latents.arrays["views"].nbytes
    copied = pickle.loads(there)
    loader = DataLoader(latents, batch_size=1, num_workers=2, collate_fn=list)
    for index, (item,) in enumerate(loader):
        for key, value in latents[index].items():
            assert torch.equal(item[key], value) and torch.equal(copied[index][key], value)


def test_encoding_leaves_the_pipeline_as_it_was(rings, tmp_path):
    """Oracle: the layout of the weights, on which the last bits of what they compute depend, is as with nothing to encode."""
    pipe = pipeline()
    before = [weight.stride() for name in ("vae", "vision_encoder") for weight in getattr(pipe, name).parameters()]
    encode(rings, pipe, tmp_path / "latents")
    after = [weight.stride() for name in ("vae", "vision_encoder") for weight in getattr(pipe, name).parameters()]
    assert after == before
