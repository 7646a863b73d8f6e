"""Stage 2 as a pipeline: what diffusers' PipelineTesterMixin asks, schedulers in both slots, views of any rig, errors.

The tiny components of conftest make everything occupied and a box solid, so that there always is a mesh.
"""

import numpy as np
import pytest
import torch
from conftest import volume_components
from diffusers import DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler
from PIL import Image

from one2345pp import CameraRig, LogSNRScheduler, SparseVolumeDiffusionPipeline
from one2345pp.errors import InputError
from one2345pp.pipelines.volume.denoising import guided


BETAS = {"beta_start": 1e-4, "beta_end": 0.02, "beta_schedule": "linear", "prediction_type": "sample"}


@pytest.fixture(scope="module")
def pipe():
    pipe = SparseVolumeDiffusionPipeline(
        **volume_components(), truncation=0.1, default_num_occupancy_steps=2, default_num_sparse_steps=2
    )
    pipe.set_progress_bar_config(disable=True)
    return pipe


@pytest.fixture(scope="module")
def views():
    rng = np.random.default_rng(0)
    pictures = rng.integers(0, 255, (6, 24, 24, 4), np.uint8)
    pictures[..., 3] = 0
    pictures[:, 6:18, 6:18, 3] = 255
    return [Image.fromarray(picture) for picture in pictures]


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


def dense(pipe, views, **kwargs):
    return pipe(views, output_type="pt", generator=kwargs.pop("generator", seeded()), **kwargs).volumes


def test_dict_tuple_outputs_equivalent(pipe, views):
    assert torch.equal(pipe(views, output_type="pt", generator=seeded(), return_dict=False)[0], dense(pipe, views))


def test_same_generator_same_bytes(pipe, views):
    first, second = (pipe(views, generator=seeded()).meshes[0].export(file_type="ply") for _ in range(2))
    assert first == second
    assert not torch.equal(dense(pipe, views), dense(pipe, views, generator=seeded(1)))


def test_global_random_state_is_neither_read_nor_moved(pipe, views):
    torch.manual_seed(0)
    first = dense(pipe, views)
    state = torch.random.get_rng_state()
    torch.manual_seed(1)
    assert torch.equal(first, dense(pipe, views))
    torch.manual_seed(0)
    assert torch.equal(state, torch.random.get_rng_state())


def test_inference_batch_single_identical(pipe, views):
    """A batch of two with a generator each equals two single runs (deterministic schedulers)."""
    ddim = pipe.components | {"occupancy_scheduler": DDIMScheduler(**BETAS), "sparse_scheduler": DDIMScheduler(**BETAS)}
    ddim = SparseVolumeDiffusionPipeline(
        **ddim, truncation=0.1, default_num_occupancy_steps=2, default_num_sparse_steps=2
    )
    ddim.set_progress_bar_config(disable=True)
    other = views[::-1]
    both = dense(ddim, [views, other], generator=[seeded(0), seeded(1)])
    assert torch.allclose(both[:1], dense(ddim, views, generator=seeded(0)), atol=1e-4)
    assert torch.allclose(both[1:], dense(ddim, other, generator=seeded(1)), atol=1e-4)


@pytest.mark.parametrize("scheduler", [LogSNRScheduler, DDPMScheduler, DPMSolverMultistepScheduler])
def test_a_sample_with_its_own_generator_does_not_depend_on_the_others(pipe, views, scheduler):
    """Schedulers that draw noise in every step, or remember steps: alone, or as the second of two, it is the same object."""
    options = {} if scheduler is LogSNRScheduler else BETAS
    parts = pipe.components | {"occupancy_scheduler": scheduler(**options), "sparse_scheduler": scheduler(**options)}
    mixed = SparseVolumeDiffusionPipeline(**parts, truncation=0.1)
    mixed.set_progress_bar_config(disable=True)
    other, steps = views[::-1], {"num_occupancy_steps": 3, "num_sparse_steps": 3}
    both = dense(mixed, [views, other], generator=[seeded(0), seeded(1)], **steps)
    assert torch.allclose(both[1:], dense(mixed, other, generator=[seeded(1)], **steps), atol=1e-4)
    assert torch.allclose(both[:1], dense(mixed, views, generator=[seeded(0)], **steps), atol=1e-4)


@pytest.mark.parametrize("stage", ["occupancy", "sparse"])
def test_an_interrupt_ends_each_diffusion_with_its_last_prediction(pipe, views, stage):
    """Noise is never taken for a surface: the volume is that of as many steps' predictions as were made."""
    last, predicted = {"occupancy": 0, "sparse": 3}[stage], {}

    def stop(stage_pipe, step, timestep, tensors):
        if step == last:
            stage_pipe._interrupt = True
        return tensors

    def watch(name):
        def keep(module, arguments, output):
            predicted.setdefault(name, []).append(output.sample)

        return getattr(pipe, name).register_forward_hook(keep)

    hooks = [watch("occupancy_unet"), watch("sparse_unet")]
    volume = pipe(
        views,
        output_type="volume",
        num_occupancy_steps=3,
        num_sparse_steps=3,
        generator=seeded(),
        callback_on_step_end=stop,
    ).volumes[0]
    for hook in hooks:
        hook.remove()
    assert len(predicted["occupancy_unet"]) == {"occupancy": 1, "sparse": 3}[stage]
    assert len(predicted["sparse_unet"]) == 1
    assert len(volume) == 8 * (predicted["occupancy_unet"][-1] > 0).sum()
    assert torch.equal(volume.sdf, predicted["sparse_unet"][0][:, 0].clamp(-1, 1) * volume.truncation)


@pytest.mark.parametrize(
    "scheduler", [DDIMScheduler, DDPMScheduler, DPMSolverMultistepScheduler, UniPCMultistepScheduler]
)
def test_stock_schedulers_run_in_both_slots(pipe, views, scheduler):
    kwargs = {} if scheduler in (DDIMScheduler, DDPMScheduler) else {"solver_order": 1}
    components = pipe.components | {
        name: scheduler(**BETAS, **kwargs) for name in ("occupancy_scheduler", "sparse_scheduler")
    }
    swapped = SparseVolumeDiffusionPipeline(**components, truncation=0.1)
    swapped.set_progress_bar_config(disable=True)
    out = swapped(views, num_occupancy_steps=3, num_sparse_steps=3, generator=seeded())
    assert torch.isfinite(out.volumes[0].sdf).all()
    assert len(out.meshes[0].faces) > 0


def test_scheduler_that_predicts_noise_is_refused(pipe, views):
    components = pipe.components | {"occupancy_scheduler": DDIMScheduler()}
    with pytest.raises(InputError, match="prediction_type"):
        SparseVolumeDiffusionPipeline(**components)(views)


def test_output_types(pipe, views):
    volume = pipe(views, output_type="volume", generator=seeded()).volumes[0]
    occupancy = pipe(views, output_type="latent", generator=seeded()).volumes
    assert occupancy.shape == (1, 1, 8, 8, 8)
    assert torch.equal(dense(pipe, views)[0], volume.dense())
    parents = torch.unique(volume.coords // 2, dim=0)
    assert torch.equal(parents, (occupancy[0, 0] > 0).nonzero()), "the support is the children of the occupied cells"
    assert volume.sdf.abs().max() <= volume.truncation
    assert ((volume.colors >= 0) & (volume.colors <= 1)).all()


def test_callback_sees_and_changes_both_stages(pipe, views):
    shapes = []

    def callback(pipeline, step, timestep, tensors):
        shapes.append((step, tensors["latents"].ndim))
        return {"latents": torch.zeros_like(tensors["latents"])} if step == 3 else {}

    out = pipe(views, output_type="volume", generator=seeded(), callback_on_step_end=callback)
    assert shapes == [(0, 5), (1, 5), (2, 2), (3, 2)]
    assert (out.volumes[0].sdf == 0).all()


def test_guidance_is_its_formula():
    """By hand: a network that says 2 c + v + 1 of condition c and vector v says 1 of neither, so scale 3 gives 1 + 3 (2 c + v)."""
    condition, vector = [torch.tensor([0.5, -1.0])], torch.tensor([2.0, 4.0])

    def network(levels, vector, pixels):
        return 2 * levels[0] + vector + 1

    assert guided(network, 3.0, condition, vector).tolist() == [10.0, 7.0]
    assert guided(network, 1.0, condition, vector).tolist() == [4.0, 3.0]


def test_guidance_changes_the_result_and_one_is_without(pipe, views):
    plain = dense(pipe, views, guidance_scale=1.0)
    assert torch.equal(plain, dense(pipe, views))
    assert not torch.equal(plain, dense(pipe, views, guidance_scale=3.0))


def test_any_rig_and_number_of_views(pipe, views):
    """One to nine views of any rig; samples of a batch may differ in their number, which changes nothing for either."""
    nine = CameraRig.from_angles([0, 40, 80, 120, 160, 200, 240, 280, 320], 10, 0.6, 1.8)
    single = CameraRig.from_angles([0], 10, 0.6, 1.8)
    many = (views + views)[:9]
    together = pipe([views[:1], many], [single, nine], output_type="latent", generator=[seeded(0), seeded(1)]).volumes
    alone = pipe(views[:1], single, output_type="latent", generator=[seeded(0)]).volumes
    assert torch.allclose(together[:1], alone, atol=1e-4)


def test_24_views_of_mixed_sizes(pipe, views):
    """Oracle: pixels repeated two and three times shrink back to what they were."""
    rig = CameraRig.from_angles(list(range(0, 360, 15)), 10, 0.6, 1.8)
    small = [view.resize((16, 16), Image.Resampling.NEAREST) for view in views * 4]
    mixed = [view.resize((16 * (1 + i % 3),) * 2, Image.Resampling.NEAREST) for i, view in enumerate(small)]
    assert torch.allclose(dense(pipe, mixed, cameras=rig), dense(pipe, small, cameras=rig), atol=0.02)


def test_views_on_a_plain_background_equal_their_rgba(pipe, views):
    """RGB views are keyed by their border colour."""
    flat = Image.new("RGB", (24, 24), (255, 255, 255))
    red = Image.new("RGBA", (24, 24))
    for picture, color in ((flat, (200, 0, 0)), (red, (200, 0, 0, 255))):
        picture.paste(color, (6, 6, 18, 18))
    assert torch.allclose(dense(pipe, [flat] * 6), dense(pipe, [red] * 6), atol=0.05)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"cameras": "zero"}, "zero123plus-v1.2"),
        ({"cameras": CameraRig.from_angles([0, 90], 0, 0.5, 2.0)}, "rig of 2 cameras"),
        ({"output_type": "np"}, "output_type"),
        ({"num_sparse_steps": 0}, "at least 1"),
        ({"image": [None, None]}, "2 input images for 1"),
        (
            {"generator": [torch.Generator(), torch.Generator()]},
            "generator: got 2, expected one, or a list of 1, one a sample",
        ),
    ],
)
def test_bad_arguments_are_refused(pipe, views, arguments, said):
    with pytest.raises(InputError, match=said):
        pipe(views, **arguments)


def test_number_of_views_names_the_rig(pipe, views):
    with pytest.raises(InputError, match="got 5 images for rig 'zero123plus-v1.2', which has 6 cameras"):
        pipe(views[:5])


def test_nothing_found_says_what_to_check(pipe, views):
    components = volume_components()
    with torch.no_grad():
        components["occupancy_unet"].conv_out.bias -= 6
    with pytest.raises(InputError, match="no surface was found in sample 0"):
        SparseVolumeDiffusionPipeline(**components)(views, generator=seeded())


def test_save_load_local(pipe, views, tmp_path):
    pipe.save_pretrained(tmp_path)
    loaded = SparseVolumeDiffusionPipeline.from_pretrained(tmp_path)
    loaded.set_progress_bar_config(disable=True)
    assert isinstance(loaded.occupancy_scheduler, LogSNRScheduler)
    assert torch.equal(dense(loaded, views), dense(pipe, views))


def test_components_survive_a_call(pipe, views):
    before = dict(pipe.components)
    dense(pipe, views)
    assert all(pipe.components[name] is component for name, component in before.items())
