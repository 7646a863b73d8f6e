"""What the commands of the command line do. Arguments are parsed in `cli`, files are written in `outputs`."""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import re
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from . import __version__
from .checkpoints import default_checkpoint
from .errors import InputError
from .files import read_json
from .loading import (
    dtype_of,
    find_device,
    find_model,
    find_multiview,
    hush,
    is_silent,
    load_pipeline,
    load_text_to_image,
)
from .outputs import Job, attempt, check_file, check_folder, plan, report, run_all, tell


if TYPE_CHECKING:
    import torch
    from PIL.Image import Image


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
    model, multiview, statuses = find_model(args.model), find_multiview(args.multiview), []
    pictures: dict[Path, Image] = {}
    if args.prompt is None:  # know what cannot be used before the model is loaded
        from .geometry.framing import frame_object
        from .pipelines.picture.isolate import isolate_object

        def cut_out(job: Job) -> None:
            pictures[job.mesh] = frame_object(isolate_object(job.source, background=args.background))

        jobs = [job for job in jobs if attempt(job, cut_out, statuses)]
    if not jobs:
        return max(statuses)
    pipe = load_pipeline(model, args, multiview)
    text_to_image = None if args.prompt is None else load_text_to_image(args)

    def run(job: Job) -> None:
        picture = pictures.pop(job.mesh, None)
        out = pipe(
            image=picture,
            prompt=args.prompt,
            text_to_image=text_to_image,
            elevation=args.elevation,
            background=args.background if picture is None else "none",
            rig=args.rig,
            num_inference_steps=args.steps,
            guidance_scale=args.guidance_scale,
            num_candidates=args.candidates,
            generator=_generator(args),
            **_volume_options(args),
            **_mesh_options(args),
        )
        (degrees,) = out.elevations
        if degrees is not None and args.elevation is None:
            job.note = f"seen from about {degrees:.0f} degrees above the horizon (--elevation tells it)"
        job.write(out.meshes[0], out.views[0], out.volumes[0], out.coarse_meshes[0])

    return run_all(jobs, run, args.quiet, statuses)


def reconstruct(args: argparse.Namespace) -> int:
    """Views with cameras to a mesh."""
    from .geometry.views import Views
    from .pipelines.picture.isolate import cut_out_views

    jobs = _plan([args.views], args, args.save_intermediates)
    model = find_model(args.model)
    views = cut_out_views(Views.load(args.views, args.rig))
    pipe = load_pipeline(model, args)
    image = None if args.image is None else pipe.prepare_image(args.image)

    def run(job: Job) -> None:
        out = pipe.reconstruct(
            views,
            image=image,
            background="none",
            guidance_scale=args.guidance_scale,
            generator=_generator(args),
            **_volume_options(args),
            **_mesh_options(args),
        )
        job.write(out.meshes[0], views, out.volumes[0], out.coarse_meshes[0])

    return run_all(jobs, run, args.quiet)


def refine(args: argparse.Namespace) -> int:
    """A mesh and views to the mesh with a texture painted from the views."""
    from .geometry.rasterize import check_rasterizer

    check_rasterizer(args.rasterizer)
    jobs = _plan([args.mesh], args)
    hush(args)
    from .geometry.mesh import load_mesh
    from .geometry.views import Views
    from .pipelines.pipeline_one2345plusplus import One2345PlusPlusPipeline
    from .pipelines.pipeline_texture_refinement import TextureRefinementPipeline

    mesh, views = load_mesh(args.mesh), Views.load(args.views, args.rig)
    config = One2345PlusPlusPipeline.load_config(find_model(args.model))
    texture = TextureRefinementPipeline(**config.get("texture_config", {}))
    texture.set_progress_bar_config(disable=is_silent(args))

    def run(job: Job) -> None:
        options = {"num_inference_steps": args.texture_steps, "texture_size": args.texture_size}
        options |= {"max_faces": args.faces, "watertight": args.watertight, "rasterizer": args.rasterizer}
        job.write(
            texture.paint(mesh, views, generator=_generator(args), device=find_device(args.device), **options), views
        )

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
        maps=args.maps or (),
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
    stage.run(config, **paths, device=find_device(args.device), minutes=minutes)
    return 0


def convert(args: argparse.Namespace) -> int:
    """Other forms of checkpoints to folders that the pipelines load, and back."""
    if args.kind == "assemble":
        check_folder(args.output, "-o")
        config = {} if args.config is None else read_json(args.config, CONFIG_HINT)
        hush(args)
        from .conversion.assemble import assemble

        if unknown := sorted(set(config) - {"volume", "drawn_volume", "texture", "guide", "sign_step_threshold"}):
            known = "volume, drawn_volume, texture, guide, sign_step_threshold"
            raise InputError(f"{args.config}: got {unknown}, expected some of {known}.")
        folders = {"fine": args.fine, "elevation": args.elevation, "volume_encoder": args.volume_encoder}
        assemble(args.multiview, args.occupancy, args.sparse, args.output, **folders, card=args.card, **config)
        return 0
    hush(args)
    dtype = None if args.dtype is None else dtype_of(args.dtype)
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
        tell(result["text"].rstrip(), sys.stdout)
    statuses = [report(InputError(f"{name}: {problem}")) for name, problem in result["failed"].items()]
    return max(statuses, default=0)


def info(args: argparse.Namespace) -> int:
    """Versions, devices, extras and the default checkpoint."""
    import torch

    packages = ("torch", "diffusers", "transformers", "accelerate", "numpy", "trimesh")
    rows = {"one2345pp": __version__, "python": sys.version.split()[0]}
    rows |= {name: importlib.metadata.version(name) for name in packages}
    rows["device"] = find_device(args.device)
    rows["cores"] = str(torch.get_num_threads())
    for extra, module in EXTRAS.items():
        rows[f"[{extra}]"] = "installed" if importlib.util.find_spec(module) else f"pip install 'one2345pp[{extra}]'"
    try:
        rows["checkpoint"] = str(default_checkpoint())
    except InputError as error:
        rows["checkpoint"] = str(error)
    for name, value in rows.items():
        tell(f"{name:<14}{value}", sys.stdout)
    return 0


# --- small ----------------------------------------------------------------------------------------------------------


def _plan(sources: list[Path], args: argparse.Namespace, intermediates: Path | None = None) -> list[Job]:
    """Where the outputs go, and what the options say of them."""
    named = (getattr(args, name, None) for name in ("views", "image"))
    inputs = [path for path in named if path is not None]
    return plan(sources, args.output, args.preview, intermediates, args.unlit, args.shading, inputs)


def _volume_options(args: argparse.Namespace) -> dict:
    return {"num_occupancy_steps": args.occupancy_steps, "num_sparse_steps": args.sparse_steps}


def _mesh_options(args: argparse.Namespace) -> dict:
    names = {"num_texture_steps": "texture_steps", "max_faces": "faces"}
    names |= {name: name for name in ("texture_size", "watertight", "refine")}
    return {name: getattr(args, option) for name, option in names.items()}


def _generator(args: argparse.Namespace) -> torch.Generator:
    """A fresh generator for each input, so that results do not depend on the order of inputs."""
    import torch

    return torch.Generator().manual_seed(args.seed or 0)


def _slug(text: str) -> str:
    """A prompt as a file name."""
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")[:60] or "prompt"
