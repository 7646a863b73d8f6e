"""Training of stage 1 from a base model: which weights a phase moves, LoRA, input pictures of random size. Not how well it learns."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from conftest import multiview_components
from PIL import Image
from test_training_multiview import data  # noqa: F401  three objects with random pictures

from one2345pp import MultiViewTilePipeline
from one2345pp.errors import InputError
from one2345pp.training import finetune, multiview


CONFIGS = Path(__file__).parents[1] / "configs"
STEPS = {"minutes": 60, "max_steps": 2, "batch_size": 2, "lr": 1e-2, "warmup_steps": 1, "ema_decay": 0.0}
ATTENTION = ("attn1.to_q", "attn1.to_k", "attn1.to_v", "attn1.to_out.0", "attn2.to_k", "attn2.to_v")


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    pipe = MultiViewTilePipeline(**multiview_components(), ramping_coefficients=[0.1, 0.2, 0.3, 0.4], view_size=16)
    pipe.save_pretrained(folder)
    return folder


def config(base: Path, **changes) -> dict:
    phases = {"attention": {**STEPS, "trainable": "attention"}, "whole": {**STEPS, "trainable": "all"}}
    return {"base": str(base), "phases": phases, **changes}


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return MultiViewTilePipeline.from_pretrained(folder).unet.state_dict()


def moved(a: dict, b: dict) -> set[str]:
    return {name for name in a if not torch.equal(a[name], b[name])}


def tile(pipe, steps: int = 2) -> torch.Tensor:
    pipe.set_progress_bar_config(disable=True)
    image = Image.new("RGB", (20, 20), (200, 40, 30))
    return pipe(image, num_inference_steps=steps, output_type="pt", generator=torch.Generator().manual_seed(0)).images


def test_attention_first_then_everything(base, data, tmp_path):  # noqa: F811
    """Oracle: the weights themselves. Phase 1 moves the matrices that Zero123++ names and no other, phase 2 nearly all; what is not
    the UNet stays, and so do the pipeline's own numbers."""
    multiview.run(config(base), data=data, output=tmp_path, device="cpu")
    first, second, third = weights(base), weights(tmp_path / "attention/pipeline"), weights(tmp_path / "pipeline")
    named = {name for name in first if name.rsplit(".", 1)[0].endswith(ATTENTION)}
    assert moved(first, second) == named
    assert len(moved(second, third)) > 0.9 * len(first)
    before, after = (MultiViewTilePipeline.from_pretrained(folder) for folder in (base, tmp_path / "pipeline"))
    for name in ("vae", "text_encoder", "vision_encoder"):
        assert not moved(getattr(before, name).state_dict(), getattr(after, name).state_dict())
    assert after.config.ramping_coefficients == [0.1, 0.2, 0.3, 0.4]
    assert list((tmp_path / "attention").glob("preview-*.png"))


def test_a_finished_phase_is_not_repeated_and_a_cut_one_goes_on(base, data, tmp_path):  # noqa: F811
    """Oracle: the step counter, and the time of the first phase's files."""
    multiview.run(config(base), data=data, output=tmp_path, device="cpu")
    state = tmp_path / "attention" / "state.pt"
    written = state.stat().st_mtime_ns
    (tmp_path / "whole" / "done").unlink()
    longer = config(base)
    longer["phases"]["whole"]["max_steps"] = 3
    multiview.run(longer, data=data, output=tmp_path, device="cpu")
    assert state.stat().st_mtime_ns == written
    assert torch.load(tmp_path / "whole" / "state.pt", weights_only=True)["step"] == 3


def test_lora(base, data, tmp_path):  # noqa: F811
    """Oracle: the base with the saved LoRA draws what the fused pipeline draws, and not what the base draws."""
    pytest.importorskip("peft")
    phases = {"attention": {**STEPS, "trainable": "attention", "lora_rank": 2}}
    multiview.run(config(base, phases=phases), data=data, output=tmp_path, device="cpu")
    pipe = MultiViewTilePipeline.from_pretrained(base)
    plain = tile(pipe)
    pipe.load_lora_weights(tmp_path / "attention" / "lora")
    torch.testing.assert_close(
        tile(pipe), tile(MultiViewTilePipeline.from_pretrained(tmp_path / "pipeline")), atol=2e-3, rtol=0
    )
    assert (tile(pipe) - plain).abs().max() > 1e-2
    changed = moved(weights(base), weights(tmp_path / "pipeline"))
    assert changed == {name for name in weights(base) if name.endswith(tuple(f"{part}.weight" for part in ATTENTION))}


def test_every_setting_reaches_what_it_is_for(base, data, tmp_path, monkeypatch):  # noqa: F811
    """Oracle: what a phase is made with, no value a default; a setting of the pipeline is that of the result, also of a fused LoRA."""
    pytest.importorskip("peft")
    made, make, seeds, select = [], finetune.FinetuneObjective, [], finetune.select_trainable

    def watched(*args, **kwargs):
        made.append((args[3:], kwargs))
        return make(*args, **kwargs)

    monkeypatch.setattr(finetune, "FinetuneObjective", watched)
    monkeypatch.setattr(finetune, "select_trainable", lambda *args: seeds.append(args[1:]) or select(*args))
    settings = {"condition_dropout": 0.3, "min_snr_gamma": 2.0, "reference_sizes": [10, 30], "seed": 6}
    phases = {"attention": {**STEPS, "max_steps": 1, "trainable": "attention", "lora_rank": 2}}
    changed = config(base, phases=phases, default_guidance_scale=7.5, **settings)
    multiview.run(changed, data=data, output=tmp_path, device="cpu")
    assert made == [((0.3, 2.0), {"reference_sizes": (10, 30)})] and seeds == [("attention", 2, 6)]
    assert MultiViewTilePipeline.load_config(tmp_path / "pipeline")["default_guidance_scale"] == 7.5


@pytest.fixture(scope="module")
def objective(base, data, tmp_path_factory):  # noqa: F811
    pipe = MultiViewTilePipeline.from_pretrained(base)
    dataset = finetune.FinetuneDataset(data, pipe, tmp_path_factory.mktemp("latents") / "latents", has_inputs=True)
    return finetune.FinetuneObjective(pipe, dataset.empty, [], 0.5, 5.0, reference_sizes=(10, 30)), dataset


def test_references_have_random_sizes(objective):
    """Oracle: sides between the limits in steps that the UNet can halve; dropped ones are the empty picture of the pipeline; a loss
    comes out of each size."""
    learner, dataset = objective
    sides = set()
    for seed in range(12):
        generator = torch.Generator().manual_seed(seed)
        batch = learner.collate([dataset[0], dataset[1]] * 4, generator)
        pixels = batch["reference"]
        sides.add(pixels.shape[-1])
        blank = (pixels == learner.blank).flatten(1).all(1)
        plain = learner.pipeline.encode_texts([""])[0]
        assert torch.equal(blank, (batch["context"] == plain).flatten(1).all(1))
        assert learner.loss(batch, generator)[0].isfinite()
    assert len(sides) > 2 and all(side % learner.step == 0 and 10 <= side < 30 + learner.step for side in sides)


def test_every_token_takes_its_share_of_the_image(objective):
    """Oracle: the base's own coefficients times the image feature, which the pipeline adds to the empty text."""
    learner, dataset = objective
    batch = learner.collate([dataset[0]] * 32, torch.Generator().manual_seed(0))
    plain = learner.pipeline.encode_texts([""])[0].detach()
    shares = torch.tensor([0.1, 0.2, 0.3, 0.4])[:, None]
    told = torch.stack([plain, *(plain + shares * embed.float() for embed in dataset[0]["embeds"])])
    distance = (batch["context"][:, None] - told).abs().amax((2, 3))  # [B, 3]
    assert distance.amin(1).max() < 1e-6 and distance.argmin(1).unique().tolist() == [0, 1, 2]


def test_a_reference_at_its_own_size_is_what_the_pipeline_reads(objective, data):  # noqa: F811
    """Oracle: the pipeline's own latents of the same picture, from the same draw."""
    learner, dataset = objective
    item = dataset[0]
    flat = item["inputs"][0]
    picture = Image.fromarray(np.uint8(flat[:3].permute(1, 2, 0)))
    learner.pipeline._guided_steps = [False]
    expected = learner.pipeline.prepare_reference([picture], 1, torch.Generator().manual_seed(1))
    learner.reference_sizes = (16, 16)
    pick, dropped = torch.tensor([0]), torch.tensor([False])
    pixels = learner.collate_references([item], pick, dropped, torch.Generator())
    got = learner.encode_references(pixels, torch.Generator().manual_seed(1))
    torch.testing.assert_close(got, expected, atol=1e-4, rtol=1e-4)


def test_what_cannot_be_trained_is_refused(base, data, tmp_path):  # noqa: F811
    for changes, message in (
        ({"phases": {}}, "config.phases: is empty"),
        ({"phases": {"a": {**STEPS, "trainable": "heads"}}}, "expected 'all' or 'attention'"),
        ({"phases": {"a": {**STEPS, "trainable": "all", "lora_rank": 4}}}, "lora_rank: is for"),
        ({"recolored_copies": 1}, "recolored_copies"),
    ):
        with pytest.raises(InputError, match=message):
            multiview.run(config(base, **changes), data=data, output=tmp_path, device="cpu")
    phases = {"a": {key: value for key, value in STEPS.items() if key != "minutes"}}
    with pytest.raises(InputError, match="minutes of its own"):
        multiview.run(config(base, phases=phases), data=data, output=tmp_path, device="cpu", minutes=1)


def test_the_config_in_the_repository_has_the_published_numbers():
    """Oracle: rates, warm-up, gamma, sizes of the input."""
    settings = json.loads((CONFIGS / "multiview-finetune.json").read_text())
    rates = [(phase["lr"], phase["warmup_steps"]) for phase in settings["phases"].values()]
    assert rates == [(7e-5, 1000), (5e-6, 2000)] and settings["min_snr_gamma"] == 5
    assert settings["reference_sizes"] == [128, 512]
