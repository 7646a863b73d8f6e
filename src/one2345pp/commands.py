"""What the commands of the command line do. Arguments are parsed in `cli`, files are written in `outputs`."""

from __future__ import annotations

import argparse
import contextlib
import importlib.metadata
import importlib.util
import re
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .checkpoints import default_checkpoint
from .errors import InputError
from .files import read_json
from .outputs import Job, attempt, check_file, check_folder, plan, report, run_all


if TYPE_CHECKING:
    import torch
    import trimesh

    from .pipelines.pipeline_one2345plusplus import One2345PlusPlusPipeline


CONFIG_HINT = "Pass a JSON file of settings."
EXTRAS = {"lora": "peft", "background": "rembg", "video": "imageio_ffmpeg"}


# --- commands -------------------------------------------------------------------------------------------------------


def generate(args: argparse.Namespace) -> int:
    """Images, or a prompt, to meshes. One input that fails does not stop the others."""
    if bool(args.images) == (args.prompt is not None):
        raise InputError("generate: pass either images, or --prompt with --text-to-image.")
    if args.prompt is not None and not args.prompt.strip():
        raise InputError("--prompt: is empty, expected text.")
    if args.prompt is not None and args.text_to_image is None:
        raise InputError("--prompt: needs --text-to-image MODEL, a diffusers text-to-image pipeline.")
    jobs = _plan(args.images or [Path(_slug(args.prompt))], args, args.save_intermediates)
    model, statuses = _find_model(args.model), []
    if args.prompt is None:  # know what cannot be used before the model is loaded
        from .pipelines.preprocess import isolate_object

        def check(job: Job) -> None:
            isolate_object(job.source, background=args.background)

        jobs = [job for job in jobs if attempt(job, check, statuses)]
    if not jobs:
        return max(statuses)
    from .geometry.cameras import CameraRig

    pipe = _load_pipeline(model, args)
    rig = pipe.rig if args.rig is None else CameraRig.named(args.rig)
    text_to_image = None if args.prompt is None else _load_text_to_image(args)

    def run(job: Job) -> None:
        out = pipe(
            image=str(job.source) if args.prompt is None else None,
            prompt=args.prompt,
            text_to_image=text_to_image,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            num_occupancy_steps=args.occupancy_steps,
            num_sparse_steps=args.sparse_steps,
            num_texture_steps=args.texture_steps,
            num_candidates=args.candidates,
            texture_size=args.texture_size,
            max_faces=args.faces,
            watertight=args.watertight,
            refine=args.refine,
            background=args.background,
            elevation=args.elevation,
            rig=args.rig,
            generator=_generator(args),
        )
        job.write(out.meshes[0], out.views[0], rig, out.volumes[0], out.coarse_meshes[0])

    return run_all(jobs, run, args.quiet, statuses)


def reconstruct(args: argparse.Namespace) -> int:
    """Views with cameras to a mesh."""
    from .geometry.extract import finish_mesh
    from .pipelines.preprocess import frame_object, isolate_object, load_views

    jobs = _plan([args.views], args, args.save_intermediates)
    model = _find_model(args.model)
    views, rig = load_views(args.views, args.rig)
    image = None if args.image is None else frame_object(isolate_object(args.image))
    pipe = _load_pipeline(model, args)

    def run(job: Job) -> None:
        generator = _generator(args)
        solid = pipe.volume(
            views,
            cameras=rig,
            image=image,
            num_occupancy_steps=args.occupancy_steps,
            num_sparse_steps=args.sparse_steps,
            guidance_scale=args.guidance_scale,
            generator=generator,
        )
        coarse = solid.meshes[0]
        if args.refine:
            mesh = _refined(pipe.texture, coarse, views, rig, args, generator)
        else:
            mesh = finish_mesh(coarse, args.faces, args.watertight)
        job.write(mesh, views, rig, solid.volumes[0], coarse)

    return run_all(jobs, run, args.quiet)


def refine(args: argparse.Namespace) -> int:
    """A mesh and views to the mesh with a texture painted from the views."""
    jobs = _plan([args.mesh], args)
    _hush(args)
    from .geometry.mesh import load_mesh
    from .pipelines.pipeline_one2345plusplus import One2345PlusPlusPipeline
    from .pipelines.pipeline_texture_refinement import TextureRefinementPipeline
    from .pipelines.preprocess import load_views

    mesh, (views, rig) = load_mesh(args.mesh), load_views(args.views, args.rig)
    config = One2345PlusPlusPipeline.load_config(_find_model(args.model))
    texture = TextureRefinementPipeline(**config.get("texture_config", {}))
    texture.set_progress_bar_config(disable=_silent(args))

    def run(job: Job) -> None:
        job.write(_refined(texture, mesh, views, rig, args, _generator(args), rasterizer=args.rasterizer), views, rig)

    return run_all(jobs, run, args.quiet)


def prepare(args: argparse.Namespace) -> int:
    """Meshes to a data set."""
    from .data.prepare import prepare as prepare_data

    check_folder(args.output, "-o")
    problems = prepare_data(
        args.meshes,
        args.output,
        frames=args.frames,
        view_size=args.view_size,
        resolution=args.resolution,
        workers=args.workers,
        seed=args.seed or 0,
        table=args.table,
        split=args.split,
        vary=args.vary,
        rings=args.rings,
        shapes=args.shapes,
        normals=args.normals,
    )
    return max((report(InputError(problem)) for problem in problems), default=0)


def train(args: argparse.Namespace) -> int:
    """Train one stage with the settings of a JSON file; options of the command line win."""
    config = read_json(args.config, CONFIG_HINT)
    paths = {"data": config.pop("data", None), "output": config.pop("output", None)}
    paths = {name: getattr(args, name) or (value and Path(value)) for name, value in paths.items()}
    for name, path in paths.items():
        if path is None:
            raise InputError(f"--{name}: is neither given nor set as {name!r} in {args.config}.")
    if not paths["data"].is_dir():
        raise InputError(
            f"{paths['data']}: no such data set. Make one with: one2345pp prepare MESH... -o {paths['data']}"
        )
    check_folder(paths["output"], "-o")
    if args.seed is not None:
        multiview = [config, *config.get("phases", {}).values()]
        for section in multiview if args.stage == "multiview" else [config.setdefault("training", {})]:
            section["seed"] = args.seed
    minutes = config.pop("minutes", None) if args.minutes is None else args.minutes
    if args.validation is not None and args.stage == "multiview":
        config["validation"] = str(args.validation)
    elif args.validation is not None:
        paths["validation"] = args.validation
    stage = importlib.import_module(f".training.{args.stage}", __package__)
    stage.run(config, **paths, device=_device(args.device), minutes=minutes)
    return 0


def convert(args: argparse.Namespace) -> int:
    """Other forms of checkpoints to folders that the pipelines load, and back."""
    if args.kind == "assemble":
        check_folder(args.output, "-o")
        config = {} if args.config is None else read_json(args.config, CONFIG_HINT)
        _hush(args)
        from .conversion.assemble import assemble

        folders = {"fine": args.fine, "elevation": args.elevation}
        assemble(args.multiview, args.occupancy, args.sparse, args.output, **folders, card=args.card, **config)
        return 0
    _hush(args)
    dtype = None if args.dtype is None else _dtype(args.dtype)
    if args.kind == "stable-diffusion":
        from .conversion.stable_diffusion import multiview_from_stable_diffusion as from_stable_diffusion

        sizes = {"view_size": args.view_size, "reference_size": args.reference_size}
        from_stable_diffusion(args.source, args.vision_encoder, args.output, rig=args.rig, dtype=dtype, **sizes)
    elif args.kind == "unet":
        from .conversion.zero123plus import folder_with_unet

        folder_with_unet(args.source, args.into, args.output, dtype=dtype)
    elif args.kind == "single-file":
        from .conversion.single_file import folder_from_file

        folder_from_file(args.source, args.output, like=args.like, dtype=dtype)
    else:
        from .conversion.single_file import file_from_folder

        file_from_folder(args.source, args.output, dtype=dtype)
    return 0


def evaluate(args: argparse.Namespace) -> int:
    """Compare folders of meshes and write the report."""
    for folder in (args.pred, args.gt):
        if not folder.is_dir():
            raise InputError(f"{folder}: no such folder of meshes.")
    if args.output.suffix.lower() == ".json":
        check_file(args.output, "-o")
    else:
        check_folder(args.output, "-o")
    from .evaluation.report import evaluate as compare

    result = compare(args.pred, args.gt, args.output, **({} if args.seed is None else {"seed": args.seed}))
    if not args.quiet:
        sys.stdout.write(result["text"].rstrip() + "\n")
    statuses = [report(InputError(f"{name}: {problem}")) for name, problem in result["failed"].items()]
    return max(statuses, default=0)


def info(args: argparse.Namespace) -> int:
    """Versions, devices, extras and the default checkpoint."""
    import torch

    packages = ("torch", "diffusers", "transformers", "accelerate", "numpy", "trimesh")
    rows = {"one2345pp": __version__, "python": sys.version.split()[0]}
    rows |= {name: importlib.metadata.version(name) for name in packages}
    rows["device"] = _device(args.device)
    rows["cores"] = str(torch.get_num_threads())
    for extra, module in EXTRAS.items():
        rows[f"[{extra}]"] = "installed" if importlib.util.find_spec(module) else f"pip install 'one2345pp[{extra}]'"
    try:
        rows["checkpoint"] = str(default_checkpoint())
    except InputError as error:
        rows["checkpoint"] = str(error)
    for name, value in rows.items():
        sys.stdout.write(f"{name:<14}{value}\n")
    return 0


# --- models ---------------------------------------------------------------------------------------------------------


def _find_model(model: str | None) -> str:
    """Folder or Hub id of the model; refuses what can be neither."""
    if model is None:
        return str(default_checkpoint())
    if Path(model).is_dir():
        if not (Path(model) / "model_index.json").is_file():
            raise InputError(f"--model {model}: has no model_index.json. Pass a folder that save_pretrained wrote.")
    elif not re.fullmatch(r"[\w.-]+/[\w.-]+", model):
        raise InputError(f"--model {model}: is neither a folder nor a Hub id (OWNER/NAME).")
    return model


@contextlib.contextmanager
def _loading(option: str, model: str) -> Iterator[None]:
    try:
        yield
    except InputError:
        raise
    except (OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise InputError(f"{option} {model}: cannot be loaded ({reason})") from error


def _load_pipeline(model: str, args: argparse.Namespace) -> One2345PlusPlusPipeline:
    """The chain on the device that was asked for."""
    device = _device(args.device)
    _hush(args)
    from .pipelines.pipeline_one2345plusplus import One2345PlusPlusPipeline

    with _loading("--model", model):
        pipe = One2345PlusPlusPipeline.from_pretrained(model, dtype=_dtype(args.dtype))
    pipe.set_progress_bar_config(disable=_silent(args))
    return pipe.to(device)


def _load_text_to_image(args: argparse.Namespace):
    from diffusers import DiffusionPipeline

    with _loading("--text-to-image", args.text_to_image):
        pipe = DiffusionPipeline.from_pretrained(args.text_to_image, dtype=_dtype(args.dtype))
    pipe.set_progress_bar_config(disable=_silent(args))
    return pipe.to(_device(args.device))


def _device(name: str) -> str:
    import torch

    there = {"cuda": torch.cuda.is_available(), "mps": torch.backends.mps.is_available(), "cpu": True}
    if name == "auto":
        return next(device for device, found in there.items() if found)
    if not there[name]:
        raise InputError(f"--device {name}: this machine has none that PyTorch can use. Pass cpu or auto.")
    return name


def _dtype(name: str) -> torch.dtype:
    import torch

    return getattr(torch, name)


def _generator(args: argparse.Namespace) -> torch.Generator:
    """A fresh generator for each input, so that results do not depend on the order of inputs."""
    import torch

    return torch.Generator().manual_seed(args.seed or 0)


def _silent(args: argparse.Namespace) -> bool:
    return args.quiet or not sys.stderr.isatty()


def _hush(args: argparse.Namespace) -> None:
    """Libraries may only speak of errors: warnings about their own future are nothing the person can mend."""
    warnings.simplefilter("ignore")
    import diffusers.utils.logging
    import transformers

    for logging in (diffusers.utils.logging, transformers.utils.logging):
        logging.set_verbosity_error()
        if _silent(args):
            logging.disable_progress_bar()


# --- small ----------------------------------------------------------------------------------------------------------


def _plan(sources: list[Path], args: argparse.Namespace, intermediates: Path | None = None) -> list[Job]:
    """Where the outputs go, and what the options say of them."""
    named = (getattr(args, name, None) for name in ("views", "image"))
    inputs = [path for path in named if path is not None]
    return plan(sources, args.output, args.preview, intermediates, args.unlit, args.shading, inputs)


def _refined(texture, mesh, views, rig, args: argparse.Namespace, generator, **kwargs) -> trimesh.Trimesh:
    """The mesh with a texture painted from the views, as the options say."""
    return texture(
        mesh,
        views,
        rig,
        num_inference_steps=args.texture_steps,
        texture_size=args.texture_size,
        max_faces=args.faces,
        watertight=args.watertight,
        generator=generator,
        device=_device(args.device),
        **kwargs,
    ).meshes[0]


def _slug(text: str) -> str:
    """A prompt as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "prompt"
