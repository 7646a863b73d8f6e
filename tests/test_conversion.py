"""`convert` for first stages: weights come through bit for bit, and what comes out computes."""

import json
import shlex
import shutil
from pathlib import Path

import pytest
import torch
import transformers
from conftest import multiview_components
from diffusers import AutoencoderKL, DiffusionPipeline, PNDMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import infer_diffusers_model_type
from PIL import Image
from safetensors.torch import load_file, save_file

from one2345pp import MultiViewTilePipeline, One2345PlusPlusPipeline, cli
from one2345pp.conversion.folders import Folder
from one2345pp.conversion.ldm import to_ldm
from one2345pp.conversion.single_file import file_from_folder, folder_from_file
from one2345pp.conversion.stable_diffusion import multiview_from_stable_diffusion
from one2345pp.conversion.zero123plus import folder_with_unet


ROOT = Path(__file__).parents[1]
NETWORKS = ("unet", "vae", "text_encoder")
PICTURE = Image.new("RGBA", (16, 16), (200, 60, 40, 255))


# --- what is converted ----------------------------------------------------------------------------------------------


def stable_diffusion_components(seed: int = 0) -> dict:
    """Stable Diffusion 2's forms, small: three levels of different width, two layers each, several text layers. Random weights."""
    torch.manual_seed(seed)
    parts = multiview_components()
    text = transformers.CLIPTextConfig(
        vocab_size=4,
        max_position_embeddings=4,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
        hidden_size=12,
        intermediate_size=10,
        num_hidden_layers=3,
        num_attention_heads=2,
    )
    torch.manual_seed(seed)
    models = {
        "unet": UNet2DConditionModel(
            sample_size=8,
            block_out_channels=(8, 16, 20),
            down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
            layers_per_block=2,
            cross_attention_dim=12,
            attention_head_dim=(1, 2, 4),
            norm_num_groups=4,
            use_linear_projection=True,
        ),
        "vae": AutoencoderKL(
            block_out_channels=(4, 8),
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            layers_per_block=2,
            latent_channels=4,
            norm_num_groups=4,
            sample_size=16,
        ),
        "text_encoder": transformers.CLIPTextModel(text),
    }
    with torch.no_grad():  # many parameters start as zeros or ones, which could be mixed up unseen
        for model in models.values():
            for parameter in model.parameters():
                parameter.normal_()
    scheduler = PNDMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        skip_prk_steps=True,
        steps_offset=1,
    )
    extractor = transformers.CLIPImageProcessor(size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16})
    return {**models, "tokenizer": parts["tokenizer"], "scheduler": scheduler, "feature_extractor": extractor}


def save_stable_diffusion(folder: Path, **components) -> Path:
    pipe = StableDiffusionPipeline(
        **{**stable_diffusion_components(), **components}, safety_checker=None, requires_safety_checker=False
    )
    pipe.save_pretrained(folder)
    return folder


@pytest.fixture
def place(tmp_path, monkeypatch):
    return make_place(tmp_path, monkeypatch)


def make_place(tmp_path: Path, monkeypatch) -> Path:
    """A working folder with `sd2`, `clip` (an image encoder), `multiview` and `unet.bin` (another UNet for it)."""
    monkeypatch.chdir(tmp_path)
    save_stable_diffusion(Path("sd2"))
    parts = multiview_components()
    parts["vision_encoder"].save_pretrained("clip")
    MultiViewTilePipeline(**parts, ramping_coefficients=[0.1, 0.2, 0.3, 0.4], view_size=16).save_pretrained("multiview")
    torch.save({key: torch.randn_like(tensor) for key, tensor in parts["unet"].state_dict().items()}, "unet.bin")
    return tmp_path


def convert(command: str, capsys=None) -> tuple[int, str]:
    """Exit status and stderr of `one2345pp convert ...`."""
    try:
        status = cli.main(["convert", *shlex.split(command), "--quiet"])
    except SystemExit as stop:
        status = stop.code
    return status, capsys.readouterr().err if capsys else ""


def weights(folder: Path, name: str) -> dict[str, torch.Tensor]:
    """Tensors of a component as they lie on disk, without the level of names that only some versions of transformers have."""
    (file,) = (path for path in (Path(folder) / name).iterdir() if path.suffix == ".safetensors")
    return {key.removeprefix("text_model."): tensor for key, tensor in load_file(file).items()}


def assert_same(first: dict, second: dict) -> None:
    """The same tensors: names, dtypes, bits."""
    assert first.keys() == second.keys()
    for key, tensor in first.items():
        assert tensor.dtype == second[key].dtype and torch.equal(tensor, second[key]), key


def texts(folder: Path) -> dict[str, str]:
    """Everything in a folder that is not weights: configs, tokenizer, code."""
    paths = (path for path in Path(folder).rglob("*") if path.is_file() and path.suffix != ".safetensors")
    return {path.relative_to(folder).as_posix(): path.read_text() for path in paths}


# --- Stable Diffusion to a first stage ------------------------------------------------------------------------------


def test_stable_diffusion_becomes_a_first_stage(place):
    """Oracle: the weights of the source on disk, and Zero123++'s published settings. The folder draws a tile, elsewhere too."""
    assert convert("stable-diffusion sd2 --vision-encoder clip --view-size 16 --reference-size 32 -o out") == (0, "")
    for name in NETWORKS:
        assert_same(weights("sd2", name), weights("out", name))
    assert_same(weights("clip", ""), weights("out", "vision_encoder"))
    index = json.loads(Path("out/model_index.json").read_text())
    assert index["ramping_coefficients"] == [0, 0.25, 0.5, 0.75]
    assert (index["view_size"], index["rig"]) == (16, "zero123plus-v1.2")
    scheduler = json.loads(Path("out/scheduler/scheduler_config.json").read_text())
    published = json.loads((ROOT / "configs" / "multiview-full.json").read_text())["components"]["scheduler"]
    assert {name: scheduler[name] for name in published} == published
    pixels = json.loads(Path("out/feature_extractor_vae/preprocessor_config.json").read_text())
    assert (pixels["crop_size"]["height"], pixels["image_std"], pixels["resample"]) == (32, [0.8] * 3, 2)
    assert json.loads(Path("out/feature_extractor_clip/preprocessor_config.json").read_text())["resample"] == 3

    tiles = []
    for cls, kwargs in ((MultiViewTilePipeline, {}), (DiffusionPipeline, {"trust_remote_code": True})):
        pipe = cls.from_pretrained("out", **kwargs)
        pipe.set_progress_bar_config(disable=True)
        call = {"num_inference_steps": 2, "guidance_scale": 2.0, "output_type": "np"}
        tiles.append(pipe(PICTURE, **call, generator=torch.Generator().manual_seed(0)).images)
    assert tiles[0].shape == (1, 48, 32, 3) and (tiles[0] == tiles[1]).all()


def test_image_half_of_a_whole_clip_is_taken(place):
    """Oracle: the weights of the whole CLIP. Its projection's width is a fact of the whole config, its pixels lie beside it."""
    vision = multiview_components()["vision_encoder"].config.to_dict() | {"projection_dim": 512}
    text = stable_diffusion_components()["text_encoder"].config.to_dict()
    config = transformers.CLIPConfig(text_config=text, vision_config=vision, projection_dim=12)
    whole = transformers.CLIPModel(config)
    whole.save_pretrained("whole")
    extractor = transformers.CLIPImageProcessor(image_mean=[0.1] * 3, resample=2)
    extractor.save_pretrained("whole")
    multiview_from_stable_diffusion("sd2", "whole", "out", view_size=16, reference_size=16)
    found = MultiViewTilePipeline.from_pretrained("out")
    assert_same(
        {k: v for k, v in whole.state_dict().items() if k.startswith(("vision_model.", "visual_projection."))},
        found.vision_encoder.state_dict(),
    )
    assert list(found.feature_extractor_clip.image_mean) == [0.1] * 3
    assert found.feature_extractor_clip.crop_size["height"] == 16, "the encoder's own size"


@pytest.mark.parametrize("stored, asked", [("float16", None), ("float32", "float16"), ("bfloat16", "float32")])
def test_dtype_is_the_sources_or_as_asked(place, stored, asked):
    """Oracle: the source's weights, cast by PyTorch. Half weights stay half on disk, and load as float32 like any folder of ours."""
    parts = stable_diffusion_components()
    halves = {name: parts[name].to(getattr(torch, stored)) for name in NETWORKS}
    save_stable_diffusion(Path("stored"), **halves)
    option = f"--dtype {asked}" if asked else ""
    command = f"stable-diffusion stored --vision-encoder clip --view-size 16 --reference-size 16 -o out {option}"
    assert convert(command)[0] == 0
    for name in NETWORKS:
        expected = {key: tensor.to(getattr(torch, asked or stored)) for key, tensor in weights("stored", name).items()}
        assert_same(expected, weights("out", name))
    vision = weights("out", "vision_encoder").values()
    assert {tensor.dtype for tensor in vision} == {getattr(torch, asked or "float32")}
    assert MultiViewTilePipeline.from_pretrained("out").text_encoder.dtype == torch.float32


def test_folders_of_older_versions_are_read(place):
    """Oracle: the same weights under today's names. Older folders have other names in attention, a level more in the text encoder, a
    buffer that nobody needs, and pickles; all of it is as in what was published as Stable Diffusion 2."""
    shutil.copytree("sd2", "old")
    names = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    tensors = {}
    for key, tensor in weights("sd2", "vae").items():
        for new, old in names.items():
            key = key.replace(f"attentions.0.{new}.", f"attentions.0.{old}.")
        tensors[key] = tensor
    assert any("query" in key for key in tensors)
    Path("old/vae/diffusion_pytorch_model.safetensors").unlink()
    torch.save(tensors, "old/vae/diffusion_pytorch_model.bin")
    text = {f"text_model.{key}": tensor for key, tensor in weights("sd2", "text_encoder").items()}
    text["text_model.embeddings.position_ids"] = torch.arange(4)[None]
    Path("old/text_encoder/model.safetensors").unlink()
    torch.save(text, "old/text_encoder/pytorch_model.bin")
    multiview_from_stable_diffusion("old", "clip", "out", view_size=16, reference_size=16)
    file_from_folder("old", "old.safetensors")
    file_from_folder("sd2", "new.safetensors")
    for name in NETWORKS:
        assert_same(weights("sd2", name), weights("out", name))
    assert_same(load_file("new.safetensors"), load_file("old.safetensors"))


def test_a_setting_that_is_a_list_of_two_is_no_component(place, tmp_path):
    """A first stage that knows two rigs: its index has their names where components have library and class."""
    parts = multiview_components()
    parts["unet"] = UNet2DConditionModel.from_config(parts["unet"].config, num_class_embeds=2)
    rigs = ["zero123plus-v1.2", "zero123plus-v1.1"]
    MultiViewTilePipeline(**parts, view_size=16, rigs=rigs).save_pretrained("two")
    assert "rigs" not in Folder.open("two").components
    assert convert("to-single-file two -o two.safetensors") == (0, "")
    assert convert("single-file two.safetensors -o back") == (0, "")
    assert MultiViewTilePipeline.from_pretrained("back").rigs == rigs


# --- one file -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("folder", ["sd2", "multiview"])
def test_folder_to_file_and_back(place, folder):
    """Oracle: the folder itself. Weights bit for bit, every other file byte for byte, without a second folder to take them from."""
    assert convert(f"to-single-file {folder} -o all.safetensors") == (0, "")
    assert convert("single-file all.safetensors -o back") == (0, "")
    assert texts(folder) == texts("back")
    for name in Folder.open(folder).models:
        assert_same(weights(folder, name), weights("back", name))


def test_chain_to_file_and_back(place, tiny_chain_folder):
    """Oracle: the folder itself; networks of this package go along, and the chain loads."""
    file_from_folder(tiny_chain_folder, "all.safetensors")
    folder_from_file("all.safetensors", "back")
    assert texts(tiny_chain_folder) == texts("back")
    for name in Folder.open(tiny_chain_folder).models:
        assert_same(weights(tiny_chain_folder, name), weights("back", name))
    One2345PlusPlusPipeline.from_pretrained("back")


def test_names_are_those_of_stable_diffusion_2():
    """Oracle: diffusers, which tells Stable Diffusion 2 by its file, and names and shapes as they are in the published one."""
    config = json.loads((ROOT / "configs" / "multiview-full.json").read_text())["components"]
    with torch.device("meta"):
        models = {
            "unet": UNet2DConditionModel.from_config(config["unet"]),
            "vae": AutoencoderKL.from_config(config["vae"]),
            "text_encoder": transformers.CLIPTextModel(transformers.CLIPTextConfig(**config["text_encoder"])),
        }
    shapes = {key: tuple(tensor.shape) for key, tensor in to_ldm(models).items()}
    assert infer_diffusers_model_type({key: torch.empty(shape, device="meta") for key, shape in shapes.items()}) == "v2"
    unet, vae, text = "model.diffusion_model.", "first_stage_model.", "cond_stage_model.model."
    counts = {prefix: sum(key.startswith(prefix) for key in shapes) for prefix in (unet, vae, text)}
    assert counts == {unet: 686, vae: 248, text: 23 * 12 + 4}
    known = {
        f"{unet}input_blocks.3.0.op.weight": (320, 320, 3, 3),
        f"{unet}input_blocks.4.0.skip_connection.weight": (640, 320, 1, 1),
        f"{unet}input_blocks.11.0.out_layers.3.bias": (1280,),
        f"{unet}middle_block.1.transformer_blocks.0.attn2.to_k.weight": (1280, 1024),
        f"{unet}output_blocks.2.1.conv.weight": (1280, 1280, 3, 3),
        f"{unet}output_blocks.5.2.conv.weight": (1280, 1280, 3, 3),
        f"{unet}output_blocks.11.1.transformer_blocks.0.norm1.bias": (320,),
        f"{vae}encoder.down.1.block.0.nin_shortcut.weight": (256, 128, 1, 1),
        f"{vae}encoder.down.2.downsample.conv.weight": (512, 512, 3, 3),
        f"{vae}decoder.up.0.block.0.nin_shortcut.weight": (128, 256, 1, 1),
        f"{vae}decoder.up.3.upsample.conv.weight": (512, 512, 3, 3),
        f"{vae}decoder.mid.attn_1.proj_out.weight": (512, 512, 1, 1),
        f"{text}transformer.resblocks.22.attn.in_proj_weight": (3072, 1024),
        f"{text}positional_embedding": (77, 1024),
    }
    assert {key: shapes.get(key) for key in known} == known


@pytest.mark.parametrize("suffix", [".ckpt", ".safetensors"])
def test_files_of_others_need_a_folder_like_them(place, capsys, suffix):
    """Oracle: the folder the file was made of. A file without configs takes them from a folder, whose own weights do not matter and
    need not be there; what else is in the file, such as averaged weights, is left out."""
    file_from_folder("sd2", "all.safetensors")
    tensors = load_file("all.safetensors") | {"model_ema.decay": torch.ones(()), "betas": torch.ones(3)}
    # diffusers drops the last layer
    tensors["cond_stage_model.model.transformer.resblocks.23.ln_1.weight"] = torch.ones(12)
    if suffix == ".ckpt":
        torch.save({"state_dict": tensors, "global_step": 7}, "other.ckpt")
    else:
        save_file(tensors, "other.safetensors")
    status, err = convert(f"single-file other{suffix} -o out", capsys)
    assert status == 2 and "--like FOLDER" in err and not Path("out").exists()

    shutil.copytree("sd2", "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    assert convert(f"single-file other{suffix} --like bare -o out") == (0, "")
    assert texts("out") == texts("sd2")
    for name in NETWORKS:
        assert_same(weights("sd2", name), weights("out", name))


def test_file_goes_into_a_first_stage(place):
    """Oracle: the file's three networks and the folder's image encoder; the dtype that was asked for is that of all."""
    parts = multiview_components()
    with torch.no_grad():
        for name in NETWORKS:
            for parameter in parts[name].parameters():
                parameter.normal_()
    other = save_stable_diffusion(Path("other"), **{name: parts[name] for name in NETWORKS})
    file_from_folder(other, "other.safetensors")
    folder_from_file("other.safetensors", "out", like="multiview", dtype=torch.float16)
    assert texts("out") == texts("multiview")
    for name, source in {**dict.fromkeys(NETWORKS, other), "vision_encoder": "multiview"}.items():
        assert_same({key: tensor.half() for key, tensor in weights(source, name).items()}, weights("out", name))


# --- a UNet alone ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("prefix", ["", "unet.", "state.unet.unet."])
def test_unet_goes_in_and_comes_out(place, prefix):
    """Oracle: the UNet's file, and the folder for all else. ControlNets and other networks beside the UNet are left out."""
    tensors = torch.load("unet.bin", weights_only=True)
    beside = {"controlnet.conv_in.weight": torch.ones(1), "vae.encoder.conv_in.weight": torch.ones(1)} if prefix else {}
    torch.save({"state_dict": {prefix + key: tensor for key, tensor in tensors.items()} | beside}, "named.ckpt")
    assert convert("unet named.ckpt --into multiview -o out") == (0, "")
    assert_same(tensors, weights("out", "unet"))
    assert texts("out") == texts("multiview")
    for name in ("vae", "text_encoder", "vision_encoder"):
        assert (Path("out") / name / "config.json").is_file()
        assert_same(weights("multiview", name), weights("out", name))
    assert_same(tensors, MultiViewTilePipeline.from_pretrained("out").unet.state_dict())
    assert convert("unet multiview/unet --into out -o back") == (0, "")
    assert_same(weights("multiview", "unet"), weights("back", "unet"))


def test_unet_goes_into_a_chain(place, tiny_chain_folder):
    """Oracle: the UNet's file. The chain stays a chain; its card, which is of other weights, is not copied."""
    shutil.copytree(tiny_chain_folder, "chain")
    Path("chain/README.md").write_text("# a card\n")
    folder_with_unet("unet.bin", "chain", "out", dtype=torch.bfloat16)
    expected = {key: tensor.bfloat16() for key, tensor in torch.load("unet.bin", weights_only=True).items()}
    assert_same(expected, weights("out", "unet"))
    assert {t.dtype for t in weights("out", "occupancy_unet").values()} == {torch.bfloat16}
    assert not Path("out/README.md").exists()
    One2345PlusPlusPipeline.from_pretrained("out")


@pytest.mark.parametrize("kind", ["", "stable-diffusion", "single-file", "unet", "to-single-file"])
def test_help_imports_nothing_heavy(fresh_python, kind):
    """Every form explains itself without PyTorch."""
    code = """
import sys
from one2345pp.cli import main
try:
    main(["convert", *sys.argv[1:], "--help"])
except SystemExit as stop:
    assert stop.code == 0
assert not {"torch", "diffusers", "transformers"} & set(sys.modules)
"""
    text = fresh_python(code, *([kind] if kind else []))
    assert "usage: one2345pp convert" in text and (not kind or "--dtype" in text)
