"""Stage 1 training: what the objectives see, each phase for two steps, and going on. How well it learns is not tested here."""

import copy
import inspect
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from PIL import Image
from training_config import COMPONENTS, SIZE
from transformers import CLIPTextConfig, CLIPTextModel, CLIPVisionConfig, CLIPVisionModelWithProjection

from one2345pp.data import pack
from one2345pp.data.dataset import FORMAT, PreparedDataset
from one2345pp.data.prepare import make_ring
from one2345pp.data.shapes import shape
from one2345pp.errors import InputError
from one2345pp.geometry.cameras import CameraRig
from one2345pp.geometry.render import render
from one2345pp.geometry.tile import composite_on_grey, join_views
from one2345pp.pipelines.multiview.latents import IMAGE_SCALE, scale_latents
from one2345pp.pipelines.pipeline_multiview_tile import MultiViewTilePipeline
from one2345pp.training import encoders, multiview, multiview_data
from one2345pp.training.components import (
    build_components,
    build_unet,
    build_vae,
    build_vision_encoder,
    seeded,
    start_from,
)
from one2345pp.training.denoiser import DenoiserObjective
from one2345pp.training.loop import LoopSettings, train


CONFIGS = Path(__file__).parents[1] / "configs"
RIGS = ["zero123plus-v1.2"]
PHASE = {"minutes": 60, "max_steps": 2, "batch_size": 2, "lr": 1e-3, "warmup_steps": 1}
CONFIG = {
    "view_size": SIZE,
    "default_num_inference_steps": 2,
    "components": COMPONENTS,
    "phases": {"vae": PHASE, "vision": PHASE, "unet": PHASE},
}


TWO_PROCESSES = """
import json, sys, torch
from accelerate import PartialState
from one2345pp.training import loop, multiview

torch.set_num_threads(1)
data, folder = sys.argv[1:]
steps, sums, rate, train = [], [], loop._rate, loop.train
loop._rate = lambda *args: steps.append(args[1]) or rate(*args)


def watch(objective, *args, **kwargs):
    train(objective, *args, **kwargs)
    sums.append(sum(p.double().sum().item() for p in objective.modules.parameters()))


multiview.train = watch
multiview.run(json.load(open(folder + "/config.json")), data=data, output=folder + "/run", device="cpu")
print(json.dumps([len(steps), sums]), file=open(f"{folder}/{PartialState().process_index}.json", "w"))
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    """A prepared folder of three objects, random pictures of 24 pixels, six views of one rig."""
    folder = tmp_path_factory.mktemp("prepared")
    rng = np.random.default_rng(0)
    meta = {"format": FORMAT, "rigs": ["zero123plus-v1.2"], "inputs": 2, "tiers": {}, "truncation": 0.05}
    (folder / "index.json").write_text(json.dumps(meta))
    for name in "abc":
        pictures = {key: rng.integers(0, 255, (n, 24, 24, 4), np.uint8) for key, n in (("views", 6), ("inputs", 2))}
        pack.write_sample(folder / f"{name}.0.zip", pictures)
    return folder


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory) -> Path:
    """The output of one whole run."""
    output = tmp_path_factory.mktemp("run")
    multiview.run(CONFIG, data=data, output=output, device="cpu")
    return output


def test_every_setting_reaches_what_it_is_for(data, trained, tmp_path, monkeypatch):
    """Oracle: what the parts of a run are made with; no value is a default, and no two phases have one rate."""
    seen = {}

    def watch(name: str, make) -> None:
        def made(*args, **kwargs):
            seen.setdefault(name, []).append(inspect.signature(make).bind(*args, **kwargs).arguments)
            return make(*args, **kwargs)

        monkeypatch.setattr(multiview, name, made)

    watched = ("seeded", "build_components", "start_from", "AutoencoderObjective", "VisionObjective", "LatentDataset")
    for name in (*watched, "DenoiserObjective", "preview_examples", "train"):
        watch(name, getattr(multiview, name))
    watch("initialize_with_colors", lambda vae: None)  # which a network as small as this one has no room for
    settings = {"kl_weight": 1e-4, "edge_weight": 0.25, "temperature": 0.3, "initial": str(trained / "pipeline")}
    settings |= {"condition_dropout": 0.2, "min_snr_gamma": 4.0, "color_init": True, "recolored_copies": 1, "seed": 3}
    settings |= {"validation": str(data), "rigs": [*RIGS], "default_guidance_scale": 7.5}
    phases = {name: PHASE | {"lr": rate} for name, rate in (("vae", 1e-3), ("vision", 2e-3), ("unet", 3e-3))}
    multiview.run(CONFIG | settings | {"phases": phases}, data=data, output=tmp_path, device="cpu")

    def of(name: str, *keys: str) -> list[tuple]:
        return [tuple(made[key] for key in keys) for made in seen[name]]

    assert of("AutoencoderObjective", "kl_weight", "edge_weight") == [(1e-4, 0.25)]
    assert of("VisionObjective", "temperature") == [(0.3,)]
    assert of("LatentDataset", "recolored_copies", "seed") == [(1, 3)]
    assert of("DenoiserObjective", "condition_dropout", "min_snr_gamma") == [(0.2, 4.0)]
    assert of("start_from", "folder", "name") == [
        (settings["initial"], name) for name in ("vae", "vision_encoder", "unet")
    ]
    assert of("seeded", "seed") == [(3,)] * 2 and of("build_components", "view_size", "seed") == [(SIZE, 3)]
    assert of("preview_examples", "data", "rigs", "size") == [(str(data), RIGS, SIZE)]
    assert [made["settings"].lr for made in seen["train"]] == [1e-3, 2e-3, 3e-3]
    assert len(seen["initialize_with_colors"]) == 1
    assert MultiViewTilePipeline.load_config(tmp_path / "pipeline")["default_guidance_scale"] == 7.5


def files(folder: Path) -> dict[str, float]:
    return {str(file): file.stat().st_mtime_ns for file in sorted(folder.rglob("*")) if file.is_file()}


def test_a_run_makes_a_pipeline_that_draws(trained):
    pipe = MultiViewTilePipeline.from_pretrained(trained / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    tile = pipe(Image.new("RGB", (20, 20)), generator=torch.Generator().manual_seed(0)).images[0]
    assert tile.size == (2 * SIZE, 3 * SIZE)
    assert list(trained.glob("preview-*.png"))
    assert pipe.tokenizer("a mug").input_ids[0] == 512 and pipe.tokenizer("a mug").input_ids[-1] == 513


def test_two_processes_train_one_model(data, tmp_path):
    """Oracle: after a whole run, stopped by the clock, both have the same weights and have taken the same steps."""
    phase = {**PHASE, "minutes": 0.02, "max_steps": 1000}
    config = {**CONFIG, "phases": dict.fromkeys(("vae", "vision", "unet"), phase)}
    (tmp_path / "config.json").write_text(json.dumps(config))
    program = tmp_path / "program.py"
    program.write_text(TWO_PROCESSES)
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2", str(program)]
    environment = {**os.environ, "ACCELERATE_USE_CPU": "true"}
    done = subprocess.run(
        [*command, str(data), str(tmp_path)], env=environment, capture_output=True, text=True, timeout=300
    )
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    assert one == other and one[0] >= 3
    MultiViewTilePipeline.from_pretrained(tmp_path / "run" / "pipeline")


def test_finished_phases_are_not_repeated_and_the_unet_goes_on(data, trained):
    """Oracle: the files of the first phases keep their times; the step counter goes on from 2 to 3."""
    config = copy.deepcopy(CONFIG)
    config["phases"]["unet"]["max_steps"] = 3
    done = [trained / name for name in ("vae", "vision_encoder", "latents", "vae-training", "vision-training")]
    before = [files(folder) for folder in done]
    multiview.run(config, data=data, output=trained, device="cpu")
    assert [files(folder) for folder in done] == before
    assert torch.load(trained / "state.pt", weights_only=True)["step"] == 3


def test_folding_standardises_latents_and_changes_no_picture(data):
    """Oracle: reconstructions before and after, posterior noise included; the statistics that the scaling factor promises."""
    images = multiview_data.ImageDataset(data, RIGS, SIZE)
    vae = seeded(build_vae, COMPONENTS["vae"], 0)
    pixels = multiview_data.to_pixels(torch.cat([item["views"][:, :3] for item in images.items]))

    def reconstruct() -> torch.Tensor:
        posterior = vae.encode(pixels).latent_dist
        return vae.decode(posterior.sample(torch.Generator().manual_seed(0))).sample

    with torch.no_grad():
        before = reconstruct()
        encoders.standardize_latents(vae, images)
        torch.testing.assert_close(reconstruct(), before, atol=1e-3, rtol=1e-3)
        latents = vae.encode(pixels).latent_dist.mode() * vae.config.scaling_factor
    torch.testing.assert_close(latents.mean((0, 2, 3)), torch.zeros(4), atol=1e-3, rtol=0)
    torch.testing.assert_close(latents.std((0, 2, 3)), torch.ones(4), atol=1e-2, rtol=0)


def test_frames_of_a_ring_are_what_the_rig_sees(tmp_path, monkeypatch):
    """Oracle: each of the twelve tiles drawn anew: the mesh, or its mirror image, before the rig turned to the frame's azimuth."""
    mesh = shape("mug")
    sample = make_ring(mesh, 40.0, np.random.default_rng(0), view_size=16)
    coded = pack._picture_bytes
    monkeypatch.setattr(pack, "_picture_bytes", lambda pictures, lossless: coded(pictures, lossless=True))
    pack.write_sample(tmp_path / "mug.0.zip", sample)
    meta = {"format": FORMAT, "rigs": ["zero123plus-v1.2"], "inputs": 2, "rings": True, "tiers": {}, "truncation": 0.05}
    (tmp_path / "index.json").write_text(json.dumps(meta))
    prepared = PreparedDataset(tmp_path)
    frames = multiview_data.Frames(prepared, RIGS, 16)
    pictures = frames.pictures(prepared[0])
    assert frames.views.shape == (12, 6) and frames.inputs.shape == (12, 2)
    mirrored = mesh.copy()
    mirrored.apply_transform(np.diag([-1.0, 1, 1, 1]))
    for k in range(12):
        assert torch.equal(frames.input_pictures(prepared[0], k), pictures["inputs"][frames.inputs[k]])
        # Seen in a mirror, turning the camera by an angle is turning it by minus that angle.
        azimuth = 40 + 60 * k if k < 6 else -(40 + 60 * (k - 6))
        rig = CameraRig.named("zero123plus-v1.2").rotated(azimuth)
        drawn = multiview_data.flatten(torch.from_numpy(render(mirrored if k >= 6 else mesh, rig, 16)), 16)
        error = (pictures["views"][frames.views[k]].float() - drawn.float()).abs()
        # Light comes over the left shoulder, also in the mirror world; so shades differ there, outlines do not.
        assert error.mean() < (0.5 if k < 6 else 6), k
        shown = (pictures["views"][frames.views[k]].float() - 127).abs().amax(1) > 30
        assert (shown != ((drawn.float() - 127).abs().amax(1) > 30)).float().mean() < 0.02


def test_training_pixels_are_those_of_the_feature_extractors():
    """Oracle: a picture of the right size, through both ways, is the same tensor."""
    components = build_components(COMPONENTS, SIZE, seed=0)
    picture = torch.randint(0, 255, (SIZE, SIZE, 4), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    picture[..., 3] = 255
    flat = multiview_data.flatten(picture, SIZE)
    for name, scale in (("feature_extractor_vae", IMAGE_SCALE), ("feature_extractor_clip", 1.0)):
        expected = components[name]([multiview_data.to_pil(flat[:3])], return_tensors="pt").pixel_values[0]
        torch.testing.assert_close(multiview_data.to_pixels(flat[:3], scale), expected, atol=1e-5, rtol=1e-5)


def test_transparent_training_pixels_are_grey():
    clear = torch.zeros(2, 24, 24, 4, dtype=torch.uint8)
    flat = multiview_data.flatten(clear, SIZE)
    assert (flat[:, :3] == 127).all() and (flat[:, 3] == 0).all()


@pytest.fixture(scope="module")
def masked(data, trained, tmp_path_factory):
    """The pipeline of a run whose autoencoder carries masks, started from the weights of one without."""
    output = tmp_path_factory.mktemp("masked")
    vae = {**COMPONENTS["vae"], "in_channels": 4, "out_channels": 4}
    config = {**CONFIG, "components": {**COMPONENTS, "vae": vae}, "initial": str(trained / "pipeline")}
    multiview.run(config, data=data, output=output, device="cpu")
    pipe = MultiViewTilePipeline.from_pretrained(output / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_an_autoencoder_with_masks_sees_what_it_was_trained_on(masked):
    """Oracle: the pixels of training, for a picture with soft edges; an opaque picture on grey is cut out first."""
    y, x = np.mgrid[-1 : 1 : SIZE * 1j, -1 : 1 : SIZE * 1j]
    alpha = (np.clip(0.8 - np.hypot(x, y), 0, 0.2) * 5 * 255).round()
    picture = np.dstack([np.full((SIZE, SIZE, 3), (200, 30, 60)), alpha]).astype(np.uint8)
    empty, pixels = masked.prepare_pixels([Image.fromarray(picture)])
    flat = multiview_data.to_pixels(multiview_data.flatten(torch.from_numpy(picture), SIZE))
    assert pixels.shape == (1, 4, SIZE, SIZE) and (pixels[0] - flat).abs().max() <= 1.01 * 0.625 / 127.5
    assert (empty[:, :3] == 0).all() and (empty[:, 3] == -0.625).all()
    on_grey = composite_on_grey(Image.fromarray(picture))
    _, keyed = masked.prepare_pixels([on_grey])
    assert ((keyed[0, 3] > 0) != (pixels[0, 3] > 0)).float().mean() < 0.05


def test_views_are_cut_out_by_the_drawn_masks(masked, monkeypatch):
    """Oracle: decoded colours and masks that are known; colours come back without the grey they were blended with."""
    mask = torch.linspace(-1, 1, 6).view(1, 1, 3, 2).repeat_interleave(SIZE, 2).repeat_interleave(SIZE, 3)
    cover = (mask + 1) / 2
    decoded = torch.cat([cover * torch.tensor([1.0, -1.0, 0.0]).view(1, 3, 1, 1), mask], 1)
    monkeypatch.setattr(masked, "decode_latents", lambda latents: decoded)
    out = masked(Image.new("RGB", (20, 20)), transparent=True, generator=torch.Generator().manual_seed(0))
    assert out.images[0].mode == "RGB" and [view.mode for view in out.views[0]] == ["RGBA"] * 6
    for number, view in enumerate(out.views[0]):
        pixels = np.asarray(view).reshape(-1, 4)
        assert (pixels[:, 3] == round(51 * number)).all()
        assert np.abs(pixels[:, :3].astype(int) - ((255, 0, 127) if number else 127)).max() <= 8
    assert masked(Image.new("RGB", (20, 20)), transparent=False).views[0][0].mode == "RGB"


def test_weights_are_taken_over_as_far_as_they_reach(trained):
    """Oracle: the trained arrays themselves, beside channels that stay as they were drawn."""
    vae = {**COMPONENTS["vae"], "in_channels": 4, "out_channels": 4}
    model = seeded(build_vae, vae, 0)
    before = model.encoder.conv_in.weight[:, 3:].clone()
    start_from(str(trained), "vae", model)
    source = AutoencoderKL.from_pretrained(trained / "vae")
    assert torch.equal(model.encoder.conv_in.weight[:, :3], source.encoder.conv_in.weight)
    assert torch.equal(model.encoder.conv_in.weight[:, 3:], before)
    assert torch.equal(model.decoder.conv_out.bias[:3], source.decoder.conv_out.bias)
    assert torch.equal(model.quant_conv.weight, source.quant_conv.weight)


def test_new_attention_begins_by_adding_nothing(trained):
    """Oracle: the trained UNet; one with attention on every level, started from it, predicts the same at first."""
    source = UNet2DConditionModel.from_pretrained(trained / "pipeline", subfolder="unet")
    levels = len(source.config.block_out_channels)
    more = {
        **COMPONENTS["unet"],
        "down_block_types": ["CrossAttnDownBlock2D"] * levels,
        "up_block_types": ["CrossAttnUpBlock2D"] * levels,
    }
    model = seeded(build_unet, more, 1)
    start_from(str(trained / "pipeline"), "unet", model)
    assert len(model.attn_processors) > len(source.attn_processors)
    generator = torch.Generator().manual_seed(0)
    sample = torch.randn(1, source.config.in_channels, 12, 8, generator=generator)
    context = torch.randn(1, 3, source.config.cross_attention_dim, generator=generator)
    with torch.no_grad():
        assert (model(sample, 7, context).sample - source(sample, 7, context).sample).abs().max() < 1e-5


@pytest.fixture(scope="module")
def denoiser(data, trained):
    """The objective of the UNet over the latents of the run."""
    pipe = MultiViewTilePipeline.from_pretrained(trained / "pipeline")
    latents = multiview_data.LatentDataset(data, pipe, trained / "latents")
    return DenoiserObjective(pipe, latents.empty, [], condition_dropout=0.5), latents


def test_dropped_conditions_are_the_negative_branch_of_the_pipeline(denoiser):
    """Oracle: the pipeline's negative text context, and its reference of an empty image."""
    objective, latents = denoiser
    batch = objective.collate([latents[0]] * 32, torch.Generator().manual_seed(0))
    plain = objective.pipeline.encode_texts([""])[0].detach()
    dropped = (batch["context"] == plain).flatten(1).all(1)
    assert 0 < dropped.sum() < 32
    empty = objective.pipeline.vae.encode(torch.zeros(1, 3, SIZE, SIZE)).latent_dist.mode()[0]
    assert (batch["reference"][dropped] - empty).abs().max() < 1e-5
    assert (batch["reference"][~dropped] - empty).abs().amax((1, 2, 3)).min() > 1e-3


def test_latents_decode_to_the_tile(data, denoiser):
    """Oracle: what the UNet learns, taken back as the pipeline does, is the autoencoder's picture of the true views' latents."""
    objective, latents = denoiser
    pipe, images = objective.pipeline, multiview_data.ImageDataset(data, RIGS, SIZE)
    with torch.no_grad():
        true = pipe.vae.encode(multiview_data.to_pixels(images[0]["views"][:, :3])).latent_dist.mode()
        expected = pipe.vae.decode(join_views(true)[None]).sample / IMAGE_SCALE
        learned = scale_latents(latents[0]["tile"].float()[None] * pipe.vae.config.scaling_factor)
        drawn = pipe.decode_latents(learned / 0.75 + 0.22)
    torch.testing.assert_close(drawn, expected, atol=1e-2, rtol=1e-2)


def test_a_perfect_prediction_has_no_loss(denoiser):
    """Oracle: the v from which the sampler's x0 = alpha x - sigma v is the clean tile, put in place of the UNet's output."""
    objective, latents = denoiser
    batch = objective.collate([latents[0]] * 4, torch.Generator().manual_seed(0))
    signal = objective.noise_scheduler.alphas_cumprod[batch["timesteps"]].view(-1, 1, 1, 1)
    alpha, sigma = signal.sqrt(), (1 - signal).sqrt()
    noised = alpha * batch["latents"] + sigma * batch["noise"]
    perfect = (alpha * noised - batch["latents"]) / sigma
    hook = objective.pipeline.unet.register_forward_hook(lambda *_: (perfect,))
    loss = objective.loss(batch, None)[0]
    hook.remove()
    assert loss < 1e-6 < objective.loss(batch, None)[0]


def test_denoiser_learns_one_sample(denoiser):
    """Oracle: the loss on one sample falls by a quarter, so gradients reach the weights."""
    objective, latents = copy.copy(denoiser[0]), denoiser[1]
    objective.condition_dropout = 0.0
    optimizer = torch.optim.AdamW(objective.modules.parameters(), lr=5e-3)
    losses = []
    for step in range(80):
        generator = torch.Generator().manual_seed(step)
        loss, _ = objective.loss(objective.collate([latents[0]] * 8, generator), generator)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert np.mean(losses[-10:]) < 0.75 * np.mean(losses[:3])


def test_compiled_training_is_the_same_training(denoiser, tmp_path):
    """Oracle: the UNet after two steps, both its passes compiled; on a GPU another backend compiles the same graphs."""
    states = []
    for backend in (None, "aot_eager"):
        objective = DenoiserObjective(copy.deepcopy(denoiser[0].pipeline), denoiser[0].empty, [], 0.5)
        objective.preview = lambda modules, path: None
        train(objective, denoiser[1], LoopSettings(**PHASE, compile=backend), tmp_path / str(backend), device="cpu")
        states.append(torch.load(tmp_path / str(backend) / "state.pt", weights_only=True)["modules"])
    for name, weight in states[0].items():
        torch.testing.assert_close(states[1][name], weight, atol=1e-4, rtol=1e-3, msg=name)


def test_every_size_is_compiled_for_itself(denoiser, tmp_path):
    """Proves that no graph has symbolic sizes, though the passes differ in theirs: inductor cannot order strides of those."""
    graphs = []

    def backend(graph, inputs):
        graphs.append([value for value in inputs if isinstance(value, torch.SymInt)])
        return graph

    objective = DenoiserObjective(copy.deepcopy(denoiser[0].pipeline), denoiser[0].empty, [], 0.5)
    objective.preview = lambda modules, path: None
    train(objective, denoiser[1], LoopSettings(**PHASE, compile=backend), tmp_path, device="cpu")
    assert len(graphs) >= 2 and not any(graphs)


def test_training_in_bfloat16_is_about_the_same(denoiser, tmp_path):
    """Oracle: the first step in float32: its loss, and weights that go the same way; attention in plain products."""
    losses, fused, moves = [], [], []
    for precision in ("no", "bf16"):
        objective = DenoiserObjective(copy.deepcopy(denoiser[0].pipeline), denoiser[0].empty, [], 0.5)

        def loss(*args, own=objective.loss):
            fused.append(torch.backends.cuda.flash_sdp_enabled())
            losses.append(own(*args))
            return losses[-1]

        objective.loss, objective.preview = loss, lambda modules, path: None
        first = {name: weight.clone() for name, weight in objective.modules.state_dict().items()}
        phase = LoopSettings(**PHASE | {"max_steps": 1, "optimizer": "muon", "mixed_precision": precision})
        train(objective, denoiser[1], phase, tmp_path / precision, device="cpu")
        last = torch.load(tmp_path / precision / "state.pt", weights_only=True)["modules"]
        assert all(weight.dtype == torch.float32 for weight in last.values())
        moves.append(torch.cat([(last[name] - first[name]).flatten() for name in first]))
    assert losses[1][0].item() == pytest.approx(losses[0][0].item(), rel=0.02)
    assert fused == [True, False] and torch.cosine_similarity(*moves, dim=0) > 0.8


def test_min_snr_weighs_clean_steps_less(denoiser):
    """Oracle: at the cleanest step 1 / (SNR + 1) is the first beta, so the weight is gamma times beta."""
    objective, latents = copy.copy(denoiser[0]), denoiser[1]
    batch = objective.collate([latents[0]], torch.Generator().manual_seed(0))
    batch["timesteps"] = torch.tensor([0])  # its SNR is 1 / 0.00085 - 1
    plain = objective.loss(batch, None)[0]
    objective.min_snr_gamma = 5.0
    torch.testing.assert_close(objective.loss(batch, None)[0], plain * 5 * 0.00085, rtol=1e-3, atol=0)


def test_other_samples_of_an_object_are_no_counterexamples(data):
    """Oracle: with one object only there is nothing to tell apart, and the loss is zero."""
    objective = encoders.VisionObjective(seeded(build_vision_encoder, COMPONENTS["vision_encoder"], 0))
    images = multiview_data.ImageDataset(data, RIGS, SIZE)
    items = [{**item, "object": torch.tensor(0)} for item in images.items]
    loss, _ = objective.loss(objective.collate(items, torch.Generator().manual_seed(0)), None)
    assert loss.item() == pytest.approx(0, abs=1e-6)


def test_other_rigs_and_phases_without_minutes_are_refused(data, tmp_path):
    with pytest.raises(InputError, match="was prepared for"):
        multiview.run({**CONFIG, "rig": "zero123plus-v1.1"}, data=data, output=tmp_path)
    endless = {**CONFIG, "phases": CONFIG["phases"] | {"vision": {"max_steps": 2}}}
    with pytest.raises(InputError, match="needs minutes of its own, and vision has none"):
        multiview.run(endless, data=data, output=tmp_path, minutes=1)


def test_full_size_components_have_the_published_sizes():
    """Oracle: parameter counts of the Zero123++ v1.2 components (SD2 UNet and VAE, ViT-H towers)."""
    parts = json.loads((CONFIGS / "multiview-full.json").read_text())["components"]
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel.from_config(parts["unet"]),
            "vae": AutoencoderKL.from_config(parts["vae"]),
            "text_encoder": CLIPTextModel(CLIPTextConfig(**parts["text_encoder"])),
            "vision_encoder": CLIPVisionModelWithProjection(CLIPVisionConfig(**parts["vision_encoder"])),
        }
    sizes = {name: sum(parameter.numel() for parameter in model.parameters()) for name, model in models.items()}
    assert sizes == {
        "unet": 865_910_724,
        "vae": 83_653_863,
        "text_encoder": 340_387_840,
        "vision_encoder": 632_076_800,
    }


def test_small_config_fits_the_pipeline():
    """Oracle: sizes that must agree between components, and the UNet's limit of 14.1 million parameters."""
    config = json.loads((CONFIGS / "multiview-small.json").read_text())
    components = build_components(config["components"], config["view_size"], config["seed"])
    unet, vae = components["unet"], components["vae"]
    assert unet.config.in_channels == vae.config.latent_channels
    assert unet.config.cross_attention_dim == components["text_encoder"].config.hidden_size
    assert unet.config.cross_attention_dim == components["vision_encoder"].config.projection_dim
    assert unet.num_parameters() <= 14_100_000
