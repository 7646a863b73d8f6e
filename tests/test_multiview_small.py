"""What a small first stage may do otherwise than Zero123++: a clean reference, places in the tile. Else: test_multiview_pipeline."""

import numpy as np
import pytest
import torch
from conftest import build_multiview, multiview_components
from PIL import Image

from one2345pp.models.attention_reference import reference_attention, tile_positions
from one2345pp.pipelines.pipeline_multiview_tile import MultiViewTilePipeline


@pytest.fixture
def image() -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 255, (16, 16, 3), np.uint8))


def draw(pipe, image, **kwargs):
    kwargs = {"num_inference_steps": 3, "guidance_scale": 2.0, "output_type": "latent"} | kwargs
    return pipe(image, generator=torch.Generator().manual_seed(0), **kwargs).images


def test_a_clean_reference_is_read_once_without_noise(image):
    """Oracle: the latents that the UNet sees: the tile once a step, and before it the reference, as the VAE's posterior drew it, at
    timestep 0. Where guidance begins, both branches' references are read; where it ends, nothing is."""
    pipe = build_multiview(clean_reference=True)
    seen = []
    hook = pipe.unet.register_forward_pre_hook(lambda module, args: seen.append((args[0], args[1])))
    draw(pipe, image)
    sizes = [tuple(sample.shape[-2:]) for sample, _ in seen]
    assert sizes == [(8, 8)] + [(24, 16)] * 3
    pipe._guidance_scale = 2.0
    pixels = pipe.prepare_reference([image], 1, torch.Generator().manual_seed(0))
    torch.testing.assert_close(seen[0][0], pixels)
    assert seen[0][1].sum() == 0 and seen[1][1] == pipe.scheduler.timesteps[0]
    for interval, expected in (((0.0, 0.5), [2]), ((0.5, 1.0), [1, 2])):
        seen.clear()
        draw(pipe, image, guidance_interval=interval)
        references = [sample for sample, _ in seen if sample.shape[-1] == 8]
        assert [len(reference) for reference in references] == expected
    torch.testing.assert_close(references[0], references[1][1:])
    hook.remove()


def test_a_changed_reference_is_read_anew(image):
    """Oracle: a callback that hands back the same reference changes nothing, one that hands back another changes the tile."""
    pipe = build_multiview(clean_reference=True)

    def change(factor):
        def callback(pipe, step, timestep, tensors):
            return {"reference_latents": tensors["reference_latents"] * factor}

        options = {"callback_on_step_end_tensor_inputs": ["reference_latents"]}
        return draw(pipe, image, callback_on_step_end=callback, **options)

    plain = draw(pipe, image)
    torch.testing.assert_close(change(1.0), plain)
    assert not torch.allclose(change(0.0), plain, atol=1e-3)


def test_with_another_text_the_reference_is_read_anew(image):
    """Oracle: what the UNet sees, `R` the reference and `T` the tile, and the text that it is told; what is kept of the reference was
    read beside the old text."""
    pipe, seen = build_multiview(clean_reference=True), []

    def look(module, args, kwargs):
        name = "R" if args[0].shape[-1] == 8 else "T"
        seen.append((name, kwargs["encoder_hidden_states"]))

    def change(pipe, step, timestep, tensors):
        return {"prompt_embeds": tensors["prompt_embeds"] + 1} if step == 1 else {}

    hook = pipe.unet.register_forward_pre_hook(look, with_kwargs=True)
    names = ["prompt_embeds"]
    draw(pipe, image, num_inference_steps=4, callback_on_step_end=change, callback_on_step_end_tensor_inputs=names)
    hook.remove()
    assert "".join(name for name, _ in seen) == "RTTRTT"
    texts = [text for _, text in seen]
    assert all(torch.equal(text, texts[0] + (index > 2)) for index, text in enumerate(texts))


def test_places_tell_every_token_of_a_tile_from_every_other():
    """Oracle: pairwise distances. Tokens at one place of different views agree in the first half, views differ in the second; the
    reference is at the same places, in no view."""
    tile = tile_positions((12, 8), 32, (3, 2)).unflatten(0, (3, 4, 2, 4))  # [row, y, column, x, C]
    reference = tile_positions((4, 4), 32, None).unflatten(0, (4, 4))
    for row in range(3):
        for column in range(2):
            torch.testing.assert_close(tile[row, :, column, :, :16], reference[..., :16])
    assert not reference[..., 16:].any()
    rows = tile.flatten(0, 3)
    distances = (rows[:, None] - rows).norm(dim=-1)
    distances.fill_diagonal_(1)
    assert distances.min() > 0.2


def test_places_reach_self_attention_of_both_passes():
    """Oracle: the first tokens that are kept are those of a pass without places, plus the places; the output changes, too."""
    unet = multiview_components()["unet"].eval()
    captured, outputs = {}, []
    sample, timestep, context = torch.zeros(1, 4, 24, 16), torch.tensor([5]), torch.zeros(1, 4, 12)
    with torch.no_grad():
        for tile in (None, (3, 2)):
            with reference_attention(unet, tile) as passes:
                passes.write(torch.zeros(1, 4, 8, 8), timestep, context)
                captured[tile] = next(iter(passes.tokens.values()))
                outputs.append(passes.read(sample, timestep, context))
    placed = captured[(3, 2)] - captured[None]
    torch.testing.assert_close(placed[0], tile_positions((8, 8), placed.shape[-1], None), atol=1e-5, rtol=0)
    assert not torch.allclose(outputs[0], outputs[1], atol=1e-5)


def test_both_settings_are_saved_and_off_by_default(tmp_path):
    build_multiview(clean_reference=True, tile_positions=True).save_pretrained(tmp_path)
    config = MultiViewTilePipeline.from_pretrained(tmp_path).config
    assert config.clean_reference and config.tile_positions
    config = build_multiview().config
    assert not config.clean_reference and not config.tile_positions
