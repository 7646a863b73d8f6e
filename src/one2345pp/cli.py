"""The command line: arguments and exit status. Parses first and imports late; what the commands do lives in `commands`."""

from __future__ import annotations

import argparse
import math
import sys
from collections.abc import Callable
from pathlib import Path

from . import __version__
from .names import BACKGROUNDS, FIRST_STAGES, RIGS, SHADINGS, TEXTURE_SIZES


INTERRUPTED = 130  # exit status after Ctrl-C, as shells have it


class OneLineParser(argparse.ArgumentParser):
    """Says what is wrong in one line; argparse would print the usage as well."""

    def error(self, message: str):
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def main(argv: list[str] | None = None) -> int:
    """Run a command.

    Returns:
        0 when every output was written, 2 for arguments or input that cannot be used, 1 for a failure inside, 130 after Ctrl-C.
    """
    try:
        args = build_parser().parse_args(argv)
        from . import commands
        from .outputs import library_log, report

        try:
            with library_log(args.quiet):
                return getattr(commands, args.command)(args)
        except Exception as error:
            return report(error)
    except KeyboardInterrupt:
        from .outputs import tell

        tell("one2345pp: interrupted", sys.stderr)
        return INTERRUPTED


def build_parser() -> OneLineParser:
    """All commands and their options."""
    parser = OneLineParser(
        prog="one2345pp", description="One image or prompt in, one textured mesh out.", allow_abbrev=False
    )
    parser.add_argument("--version", action="version", version=f"one2345pp {__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")

    def command(name: str, text: str) -> OneLineParser:
        sub = commands.add_parser(name, help=text, description=text, allow_abbrev=False)
        _add_shared(sub)
        return sub

    generate = command("generate", "images, or a prompt, to textured meshes")
    generate.add_argument("images", nargs="*", type=Path, metavar="IMAGE", help="pictures of one object each")
    _add_output(generate)
    generate.add_argument("--prompt", help="text instead of images; needs --text-to-image")
    generate.add_argument(
        "--text-to-image", metavar="MODEL", help="folder or Hub id of a diffusers text-to-image pipeline"
    )
    text = "degrees above the horizon from which the image looks, if known; otherwise the model estimates it, if it can"
    generate.add_argument("--elevation", type=within(-90, 90, float), metavar="DEG", help=text)
    generate.add_argument("--background", choices=BACKGROUNDS, default="auto", help="how the object is cut out")
    generate.add_argument("--steps", type=positive, metavar="N", help="denoising steps of the six views")
    text = (
        "draw and reconstruct the object so many times, and keep the mesh that agrees best with its views and the image"
    )
    generate.add_argument("--candidates", type=positive, metavar="N", help=text)
    generate.add_argument("--rig", choices=RIGS, help="cameras of the six views, of those that the model can draw")
    text = f"another first stage: folder, Hub id, {' or '.join(FIRST_STAGES)}; the rest comes from --model"
    generate.add_argument("--multiview", metavar="MODEL", help=text)
    text = "LoRA weights of the views, and how much they count; again for several"
    generate.add_argument("--lora", action="append", metavar="FILE[:WEIGHT]", help=text)
    generate.add_argument("--scheduler", metavar="NAME", help="scheduler class of diffusers for the views")
    text = "keep models in main memory but for the one that works, or but for the layer"
    generate.add_argument("--offload", choices=("model", "sequential"), help=text)
    _add_sampling(generate)
    _add_mesh(generate)

    reconstruct = command("reconstruct", "views with cameras to a textured mesh")
    _add_views(reconstruct)
    _add_output(reconstruct)
    reconstruct.add_argument("--image", type=Path, help="picture of the front, for models that look at it")
    _add_sampling(reconstruct)
    _add_mesh(reconstruct)

    refine = command("refine", "paint a mesh anew from views")
    refine.add_argument("mesh", type=Path, metavar="MESH", help="mesh file")
    _add_views(refine)
    _add_output(refine)
    refine.add_argument("--rasterizer", default="auto", metavar="NAME", help="auto, embree or nvdiffrast")
    _add_mesh(refine)

    prepare = command("prepare", "meshes to a data set for training")
    prepare.add_argument("meshes", nargs="*", type=Path, metavar="MESH", help="mesh files, or folders of them")
    prepare.add_argument("-o", "--output", type=Path, required=True, metavar="DATASET", help="folder of the data set")
    prepare.add_argument(
        "--frames", type=positive, default=2, metavar="N", help="azimuths of the input view, for each mesh"
    )
    prepare.add_argument("--view-size", type=positive, default=96, metavar="N", help="pixels")
    prepare.add_argument(
        "--resolution", type=positive, default=64, metavar="N", help="cells along an edge of the volume"
    )
    prepare.add_argument("--workers", type=positive, metavar="N", help="processes; defaults to one for each core")
    prepare.add_argument("--table", type=Path, metavar="CSV", help="columns name, tier, split: sampling by tier")
    prepare.add_argument("--split", metavar="NAME", help="only meshes of this split of the table")
    text = "for train multiview: only views of this rig, six azimuths of the input view in each frame; given again, rigs take turns"
    prepare.add_argument(
        "--shapes", type=whole, default=0, metavar="N", help="random procedural objects, beside meshes"
    )
    help_maps = "frames hold this map of the views, too (normals); again for several"
    prepare.add_argument("--maps", action="append", metavar="NAME", help=help_maps)
    prepare.add_argument("--vary", action="store_true", help="all frames but the fronts: stretched and recoloured")
    prepare.add_argument("--rings", action="append", choices=RIGS, metavar="RIG", help=text)

    train = command("train", "train one stage")
    train.add_argument("stage", choices=("multiview", "occupancy", "sparse", "elevation"))
    train.add_argument("config", type=Path, metavar="CONFIG", help="JSON file of settings")
    train.add_argument("--data", type=Path, metavar="DATASET", help="data set that prepare wrote")
    train.add_argument("-o", "--output", type=Path, metavar="DIR", help="folder for checkpoints")
    train.add_argument("--minutes", type=float, help="stop after this long")
    train.add_argument("--validation", type=Path, metavar="DATASET", help="held-out data set, for previews and figures")

    evaluate = command("evaluate", "compare meshes with true ones, paired by file stem")
    evaluate.add_argument("--pred", type=Path, required=True, metavar="DIR", help="folder of meshes")
    evaluate.add_argument("--gt", type=Path, required=True, metavar="DIR", help="folder of true meshes")
    evaluate.add_argument("-o", "--output", type=Path, required=True, metavar="REPORT", help=".json file, or a folder")

    text = "checkpoints in, folders for the Hub out"
    convert = commands.add_parser("convert", help=text, description=text, allow_abbrev=False)
    kinds = convert.add_subparsers(dest="kind", required=True, metavar="KIND")
    text = "the outputs of the trainings to one folder"
    join = kinds.add_parser("assemble", help=text, description=text, allow_abbrev=False)
    _add_shared(join)
    join.add_argument("--multiview", type=Path, required=True, metavar="DIR", help="folder of a first stage")
    join.add_argument("--occupancy", type=Path, required=True, metavar="DIR", help="output of train occupancy")
    join.add_argument("--sparse", type=Path, required=True, metavar="DIR", help="output of train sparse")
    join.add_argument("--fine", type=Path, metavar="DIR", help="output of train sparse at twice the resolution")
    join.add_argument("--elevation", type=Path, metavar="DIR", help="output of train elevation")
    text = (
        "folder of the first stage whose image encoder the volume networks were trained with; defaults to --multiview"
    )
    join.add_argument("--volume-encoder", type=Path, metavar="DIR", help=text)
    join.add_argument(
        "--config",
        type=Path,
        metavar="JSON",
        help="settings of the stages and of the guide: volume, drawn_volume, texture, guide",
    )
    join.add_argument("--card", type=Path, metavar="MD", help="model card")
    join.add_argument("-o", "--output", type=Path, required=True, metavar="DIR")
    _add_first_stages(kinds)

    command("info", "versions, devices, extras and the default checkpoint")
    return parser


def _add_first_stages(kinds) -> None:
    """What `convert` does with first stages; outputs that exist are not replaced, weights keep their dtype."""

    def kind(name: str, source: str, form: str, output: str, text: str) -> OneLineParser:
        sub = kinds.add_parser(name, help=text, description=text, allow_abbrev=False)
        _add_shared(sub, dtype=None)
        sub.add_argument("source", type=Path, metavar=source, help=form)
        sub.add_argument("-o", "--output", type=Path, required=True, metavar=output, help="must not exist yet")
        return sub

    text = "Stable Diffusion 2 to a first stage that is ready to be trained"
    base = kind("stable-diffusion", "FOLDER", "in diffusers' form, with v-prediction", "DIR", text)
    text = "CLIP whose projection is as wide as the text context"
    base.add_argument("--vision-encoder", type=Path, required=True, metavar="FOLDER", help=text)
    base.add_argument("--rig", choices=RIGS, default=next(iter(RIGS)), help="cameras of the views")
    base.add_argument("--view-size", type=positive, default=320, metavar="N", help="pixels")
    text = "pixels of the input image, as views attend to it"
    base.add_argument("--reference-size", type=positive, default=512, metavar="N", help=text)

    text = "a checkpoint that is one file to a folder"
    form = "in the original layout of Stable Diffusion 2 (.safetensors .ckpt)"
    single = kind("single-file", "FILE", form, "DIR", text)
    text = "folder of the same architecture: configs, tokenizer and what FILE lacks are taken from it"
    single.add_argument("--like", type=Path, metavar="FOLDER", help=text)

    text = "a UNet that was published alone into a first stage's folder"
    alone = kind("unet", "UNET", "file in diffusers' layout (.safetensors .bin .ckpt), or its folder", "DIR", text)
    alone.add_argument(
        "--into", type=Path, required=True, metavar="FOLDER", help="first stage, or a whole chain; copied"
    )

    text = "a folder to one file in the original layout of Stable Diffusion 2"
    kind("to-single-file", "FOLDER", "first stage, Stable Diffusion 2, or a whole chain", "FILE", text)


def within(low: float, high: float = math.inf, kind: type = int) -> Callable[[str], float]:
    """A reader of numbers from `low` to `high`, for argparse."""

    def number(text: str) -> float:
        value = kind(text)
        if not low <= value <= high:
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise argparse.ArgumentTypeError(f"{text} is not {limits}")
        return value

    return number


positive, whole = within(1), within(0, 2**63 - 1)  # seeds have 63 bits


def _add_shared(parser: argparse.ArgumentParser, dtype: str | None = "float32") -> None:
    group = parser.add_argument_group("shared options")
    group.add_argument("--model", help="folder or Hub id; defaults to the checkpoint in the package")
    group.add_argument("--seed", type=whole, help="of every random draw, for each input anew; defaults to 0")
    group.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    text = "of the stored weights; defaults to that of the source" if dtype is None else None
    group.add_argument("--dtype", choices=("float32", "float16", "bfloat16"), default=dtype, help=text)
    group.add_argument("--quiet", action="store_true", help="say nothing but errors")


def _add_output(parser: argparse.ArgumentParser) -> None:
    text = "mesh file (.glb .obj .ply .stl .usdz), or a folder"
    parser.add_argument("-o", "--output", type=Path, required=True, metavar="OUT", help=text)


def _add_views(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "views", type=Path, metavar="VIEWS", help="folder with cameras.json, or a tile image with --rig"
    )
    parser.add_argument("--rig", choices=RIGS, help="cameras of a tile image")


def _add_sampling(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("sampling")
    group.add_argument(
        "--guidance-scale", type=float, metavar="S", help="how closely the first diffusion follows its input"
    )
    group.add_argument("--occupancy-steps", type=positive, metavar="N", help="denoising steps of the coarse volume")
    group.add_argument("--sparse-steps", type=positive, metavar="N", help="denoising steps of the fine volume")
    group.add_argument("--no-refine", dest="refine", action="store_false", help="keep vertex colours, paint no texture")
    text = "also write views, cameras.json, volume and coarse mesh; several inputs: a folder each"
    group.add_argument("--save-intermediates", type=Path, metavar="DIR", help=text)


def _add_mesh(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("mesh")
    group.add_argument("--faces", type=positive, metavar="N", help="most triangles")
    group.add_argument("--watertight", action="store_true", help="close the mesh, for printing")
    group.add_argument("--unlit", action="store_true", help="a .glb whose colours viewers show as they are")
    group.add_argument("--texture-steps", type=positive, metavar="N", help="steps of the texture refinement")
    group.add_argument("--texture-size", type=within(*TEXTURE_SIZES), metavar="N", help="pixels")
    text = "also write a picture (.png) or a turntable (.gif .mp4); several inputs: FILE-<stem>"
    group.add_argument("--preview", type=Path, metavar="FILE", help=text)
    text = "how the preview shows the mesh; given several times, a row or column for each; defaults to soft"
    group.add_argument("--shading", action="append", choices=SHADINGS, help=text)


if __name__ == "__main__":
    sys.exit(main())
