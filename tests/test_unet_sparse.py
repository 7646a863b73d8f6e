"""SparseUNet3DModel: symmetry, conditions, gradients, files. The convolutions under it are proved in `test_sparse_engine`."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from one2345pp.errors import InputError
from one2345pp.models.embeddings import ConditionedTimeEmbedding
from one2345pp.models.sparse import SparseGrid
from one2345pp.models.unet_sparse import PixelBlend, ProjectedPixels, SparseUNet3DModel


ROOT = Path(__file__).parents[1]
CONFIG = {
    "sample_size": 8,
    "block_out_channels": (8, 12, 16),
    "condition_channels": (3, 4, 5),
    "global_channels": 6,
    "pixel_channels": 8,
    "norm_num_groups": 4,
}


pytestmark = pytest.mark.usefixtures("one_thread")


def make_model(**changes) -> SparseUNet3DModel:
    """A tiny model whose zero-initialised layers are drawn too, so that every path matters."""
    torch.manual_seed(0)
    model = SparseUNet3DModel(**CONFIG | changes).eval()
    rng = torch.Generator().manual_seed(0)
    for parameter in model.parameters():
        parameter.data += torch.randn(parameter.shape, generator=rng) * 0.1
    return model


def make_inputs(batch_size: int = 2, seed: int = 0) -> dict:
    """Inputs of the first `batch_size` of two fixed samples of unequal size."""
    rng = torch.Generator().manual_seed(seed)
    coords = [(torch.rand(8, 8, 8, generator=rng) < density).nonzero() for density in (0.3, 0.1)]
    both = SparseGrid.cat(coords, 8)
    return rows_of({"grid": both, "timestep": torch.tensor([700.0, 20.0])} | conditions(both, rng), range(batch_size))


def conditions(grid: SparseGrid, rng) -> dict:
    n = len(grid)
    return {
        "sample": torch.randn(n, 4, generator=rng),
        "condition": [
            torch.randn(len(level), c, generator=rng) for level, c in zip(grid.levels(3), (3, 4, 5), strict=True)
        ],
        "global_vector": torch.randn(2, 6, generator=rng),
        "pixels": ProjectedPixels(
            torch.rand(n, 5, 3, generator=rng) * 2 - 1,
            F.normalize(torch.randn(n, 5, 3, generator=rng), dim=-1),
            (torch.rand(n, 5, generator=rng) < 0.7).float(),
        ),
    }


def rows_of(inputs: dict, samples) -> dict:
    """The part of a batch that belongs to `samples`."""
    samples = list(samples)
    levels = inputs["grid"].levels(3)
    keep = [torch.isin(level.sample_index, torch.tensor(samples)) for level in levels]
    coords = levels[0].coords[keep[0]] - torch.tensor([samples[0], 0, 0, 0])
    return {
        "grid": SparseGrid(coords, 8, len(samples)),
        "timestep": inputs["timestep"][samples],
        "sample": inputs["sample"][keep[0]],
        "condition": [features[k] for features, k in zip(inputs["condition"], keep, strict=True)],
        "global_vector": inputs["global_vector"][samples],
        "pixels": ProjectedPixels(*(p[keep[0]] for p in inputs["pixels"])),
    }


def test_permuting_voxels_permutes_the_output():
    """Proves that no row depends on its place: shuffled rows, across samples too, give shuffled outputs."""
    model, inputs = make_model(), make_inputs()
    order = torch.randperm(len(inputs["grid"]), generator=torch.Generator().manual_seed(1))
    shuffled = inputs | {
        "grid": SparseGrid(inputs["grid"].coords[order], 8, 2),
        "sample": inputs["sample"][order],
        "condition": [
            inputs["condition"][0][order],
            *inputs["condition"][1:],
        ],  # coarser levels are sorted by coordinate
        "pixels": ProjectedPixels(*(p[order] for p in inputs["pixels"])),
    }
    with torch.no_grad():
        torch.testing.assert_close(model(**shuffled).sample, model(**inputs).sample[order], atol=1e-4, rtol=1e-4)


def test_a_batch_of_two_equals_two_single_runs():
    """Proves that neither norms, times nor conditions leak between samples."""
    model, inputs = make_model(), make_inputs()
    with torch.no_grad():
        alone = [model(**rows_of(inputs, [index])).sample for index in range(2)]
        torch.testing.assert_close(model(**inputs).sample, torch.cat(alone), atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", ["sample", "timestep", "condition", "global_vector", "pixels"])
def test_every_input_matters(name):
    """Proves that each input reaches the output: replaced by another draw it changes the prediction."""
    model, inputs = make_model(), make_inputs()
    other = conditions(inputs["grid"], torch.Generator().manual_seed(5)) | {"timestep": torch.tensor([100.0, 500.0])}
    with torch.no_grad():
        difference = model(**inputs).sample - model(**inputs | {name: other[name]}).sample
    assert difference.abs().amax(0).min() > 1e-3  # in every output channel


@pytest.mark.parametrize("level", range(3))
def test_every_level_of_the_condition_matters(level):
    model, inputs = make_model(), make_inputs()
    changed = list(inputs["condition"])
    changed[level] = changed[level] + 1
    with torch.no_grad():
        assert (model(**inputs).sample - model(**inputs | {"condition": changed}).sample).abs().max() > 1e-4


def test_gradients_reach_every_parameter_and_input():
    """Proves that no layer is left out of the graph; layers that start at zero are drawn."""
    model, inputs = make_model(), make_inputs()
    leaves = [inputs["sample"], inputs["global_vector"], inputs["pixels"].colors, *inputs["condition"]]
    for leaf in leaves:
        leaf.requires_grad_()
    model(**inputs).sample.square().mean().backward()
    dead = [name for name, p in model.named_parameters() if p.grad is None or p.grad.abs().max() == 0]
    # the softmax over views does not see what is added to all logits
    assert dead in ([], ["pixel_blend.logit.bias"])
    assert all(leaf.grad.abs().max() > 0 for leaf in leaves)


def test_gradient_checkpointing_gives_the_same_gradients():
    """Oracle: the same model without checkpointing; sums of several gradients may come in another order."""
    inputs, gradients = make_inputs(), []
    for checkpointing in (False, True):
        model = make_model().train()
        if checkpointing:
            model.enable_gradient_checkpointing()
        model(**inputs).sample.square().mean().backward()
        gradients.append([p.grad for p in model.parameters()])
    torch.testing.assert_close(*gradients)


def test_new_model_predicts_the_blended_colour():
    """Proves the start of training: distance 0, colour the blend, which lies among the colours of the views."""
    inputs = make_inputs()
    model = SparseUNet3DModel(**CONFIG)
    with torch.no_grad():
        sample = model(**inputs).sample
    colors, valid = inputs["pixels"].colors, inputs["pixels"].valid.bool()[..., None]
    assert torch.equal(sample[:, 0], torch.zeros(len(sample)))
    seen = valid.any(1)[:, 0]
    low, high = colors.masked_fill(~valid, 9).amin(1), colors.masked_fill(~valid, -9).amax(1)
    inside = (sample[:, 1:] > low - 1e-4) & (sample[:, 1:] < high + 1e-4)
    assert inside[seen].all() and seen.any()
    assert torch.equal(sample[~seen, 1:], torch.zeros(int((~seen).sum()), 3))


def test_pixel_blend_ignores_invalid_views_and_the_order_of_views():
    """Proves that an invalid view's colour has no weight, and that views are a set."""
    blend = PixelBlend(8, 8)
    rng = torch.Generator().manual_seed(0)
    hidden, (colors, directions, valid) = torch.randn(9, 8, generator=rng), make_inputs()["pixels"]
    colors, directions, valid = colors[:9], directions[:9], valid[:9].clone()
    valid[:, 0] = 1
    with torch.no_grad():
        before = blend(hidden, colors, directions, valid)
        noise = torch.randn(colors.shape, generator=rng).clamp(-1, 1)
        changed = torch.where(valid[..., None].bool(), colors, noise)
        torch.testing.assert_close(blend(hidden, changed, directions, valid), before, atol=1e-4, rtol=0)
        torch.testing.assert_close(blend(hidden, colors.flip(1), directions.flip(1), valid.flip(1)), before)


def test_time_embedding_starts_without_effect_of_the_vector_and_then_multiplies():
    """Proves `h * mlp(c) + mlp(t)`: the vector changes the scale alone, the time the shift alone."""
    embedding = ConditionedTimeEmbedding(8, 6)
    time, vector = torch.tensor([3.0, 900.0]), torch.randn(2, 6, generator=torch.Generator().manual_seed(0))
    shift, scale = embedding(time, vector)
    assert torch.equal(scale, torch.ones(2, 8))
    torch.nn.init.ones_(embedding.condition[-1].weight)
    shift_again, scale = embedding(time, vector)
    assert torch.equal(shift, shift_again) and not torch.equal(scale, torch.ones(2, 8))
    assert (shift[0] - shift[1]).abs().max() > 1e-3
    assert torch.equal(embedding(time, None)[1], torch.ones(2, 8))


def test_plain_coordinates_and_one_time_for_all():
    """Proves the plain tensor entry: same numbers as with a grid, tuple output, a number for the time."""
    model, inputs = make_model(), make_inputs()
    with torch.no_grad():
        expected = model(**inputs | {"timestep": torch.tensor([250.0, 250.0])}).sample
        (out,) = model(**inputs | {"grid": inputs["grid"].coords, "timestep": 250}, return_dict=False)
    assert torch.equal(out, expected)


def test_absent_conditions_are_zeros():
    """Proves what `None` means: no condition is a pyramid of zeros, no pixels are pixels that nobody sees."""
    model, inputs = make_model(), make_inputs()
    zeros = inputs | {
        "condition": [torch.zeros_like(c) for c in inputs["condition"]],
        "pixels": inputs["pixels"]._replace(valid=torch.zeros_like(inputs["pixels"].valid)),
    }
    with torch.no_grad():
        none = model(**inputs | {"condition": None, "pixels": None}).sample
        torch.testing.assert_close(model(**zeros).sample, none)


def test_a_model_without_conditions():
    model = SparseUNet3DModel(sample_size=8, block_out_channels=(8, 8), norm_num_groups=4)
    inputs = make_inputs()
    assert model(inputs["sample"], 5, inputs["grid"]).sample.shape == inputs["sample"].shape
    with pytest.raises(InputError, match="pixel_channels"):
        model(inputs["sample"], 5, inputs["grid"], pixels=inputs["pixels"])
    with pytest.raises(InputError, match="global_channels"):
        model(inputs["sample"], 5, inputs["grid"], global_vector=inputs["global_vector"])
    with pytest.raises(InputError, match="condition_channels"):
        model(inputs["sample"], 5, inputs["grid"], condition=inputs["condition"])


def test_unusable_inputs_are_named():
    model, inputs = make_model(), make_inputs()
    with pytest.raises(InputError, match="one row for each voxel"):
        model(**inputs | {"sample": inputs["sample"][1:]})
    with pytest.raises(InputError, match="condition_channels"):
        model(**inputs | {"condition": inputs["condition"][::-1]})
    with pytest.raises(InputError, match="block_out_channels"):
        SparseUNet3DModel(block_out_channels=(8, 8), condition_channels=(4,))


def test_save_and_load_round_trip(tmp_path):
    """Proves that files hold everything: configuration and weights give the same bytes of output."""
    model, inputs = make_model(), make_inputs()
    model.save_pretrained(tmp_path)
    loaded = SparseUNet3DModel.from_pretrained(tmp_path)
    with torch.no_grad():
        assert torch.equal(loaded(**inputs).sample, model(**inputs).sample)
        half = SparseUNet3DModel.from_pretrained(tmp_path, torch_dtype=torch.bfloat16)
        coarse = half(**inputs | {"sample": inputs["sample"].bfloat16()}).sample
    assert coarse.dtype == torch.bfloat16
    torch.testing.assert_close(coarse.float(), model(**inputs).sample, atol=0.15, rtol=0.15)


def test_lora_adapter_reaches_linear_layers():
    """Proves that the model takes LoRA weights as other diffusers models do, and that new ones change nothing."""
    peft = pytest.importorskip("peft")
    model, inputs = make_model(), make_inputs()
    with torch.no_grad():
        before = model(**inputs).sample
        model.add_adapter(peft.LoraConfig(r=2, target_modules=["proj_out", "shortcut"]))
        torch.testing.assert_close(model(**inputs).sample, before)
    assert any("lora_A" in name for name, _ in model.named_parameters())


def test_full_size_exists_on_the_meta_device():
    """Proves that the published full-size configuration builds, without its memory."""
    config = json.loads((ROOT / "configs" / "sparse-full.json").read_text())["unet"]
    with torch.device("meta"):
        model = SparseUNet3DModel(**config)
    assert 1e8 < sum(p.numel() for p in model.parameters()) < 5e8
    assert all(p.is_meta for p in model.parameters())


def test_a_few_steps_of_training_reduce_the_loss():
    """Proves that the pieces learn together: overfitting one batch brings the loss well down."""
    torch.manual_seed(0)
    model, inputs = SparseUNet3DModel(**CONFIG).train(), make_inputs()
    target = torch.randn(len(inputs["grid"]), 4, generator=torch.Generator().manual_seed(2))
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = F.mse_loss(model(**inputs).sample, target)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    assert losses[-1] < 0.7 * losses[0]
