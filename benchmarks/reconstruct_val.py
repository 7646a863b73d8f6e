"""Benchmark: meshes of held-out objects by this package and by baselines without learning, and how close they come to the truth.

    python benchmarks/reconstruct_val.py --objects OBJECTS --index index.csv --output OUT [--model CHECKPOINT]

`OBJECTS` holds NAME.glb, `index.csv` the columns name, split, tier. Methods: `reconstruct` gets six true views, `generate` one image,
`hull` the silhouettes of the six true views, `silhouette` that of the image. A run goes on where the last one stopped: meshes that
exist are kept. `OUT/report.md` has all methods side by side, `OUT/METHOD.json` each object, `OUT/sheets` pictures.
"""

from __future__ import annotations

import argparse
import math
import time
import zlib
from collections.abc import Sequence
from contextlib import suppress

import harness
import numpy as np
import torch
import trimesh
from harness import HeldOut, Results
from PIL import Image, ImageDraw

from one2345pp import CameraRig, One2345PlusPlusPipeline, Views
from one2345pp.errors import InputError
from one2345pp.evaluation.baselines import extruded_silhouette, visual_hull
from one2345pp.evaluation.report import evaluate
from one2345pp.geometry.export import export_mesh
from one2345pp.geometry.framing import frame_object
from one2345pp.geometry.mesh import load_mesh
from one2345pp.geometry.render import orbit, render
from one2345pp.geometry.views import DEFAULT_RIG


METHODS = ("reconstruct", "generate", "hull", "silhouette")
SHEETS, SHEET_SIZE = 12, 192  # about so many objects have one; pixels of a picture


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    objects = harness.spread(harness.held_out_objects(args.objects, args.index), args.limit)
    results = Results(args.output)
    link_truths(objects, results)
    pipe = load(args) if {"reconstruct", "generate"} & set(args.methods) else None
    for one in objects:
        predict(one, pipe, results, args)
    made = [method for method in args.methods if any(results.mesh(method, one.name).exists() for one in objects)]
    reports = {method: measure(method, results, args) for method in made}
    kept = ("settings", "definitions", "counts", "missing_predictions", "failed", "summary", "groups", "front")
    combined = {method: {key: report[key] for key in kept} for method, report in reports.items()}
    harness.write_report(combined, args.output / "report.json", describe(combined))
    for one in objects[:: math.ceil(len(objects) / SHEETS)]:
        draw_sheet(one, made, results, args)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__, "objects", "index", "output", "model", "limit", "seed", "threads")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    rigs = CameraRig.names()
    parser.add_argument("--rig", default=DEFAULT_RIG, choices=(*rigs, "random"), help="cameras of the true views")
    parser.add_argument("--drawn-rig", choices=rigs, help="cameras of drawn views; default: the checkpoint's")
    parser.add_argument("--size", type=int, default=320, help="pixels along a side of the true views")
    parser.add_argument(
        "--input-elevation",
        type=float,
        default=harness.INPUT_ELEVATION,
        metavar="DEG",
        help="from which the image looks",
    )
    parser.add_argument(
        "--elevation",
        choices=("estimated", "told", "unknown"),
        default="estimated",
        help="whether `generate` is told the image's elevation, estimates it if the checkpoint can, or does without",
    )
    parser.add_argument(
        "--refine", action="store_true", help="paint `generate`'s meshes, as the command does; in an output of its own"
    )
    parser.add_argument("--device", default="cpu", help="where the networks compute")
    parser.add_argument("--points", type=int, default=100_000, help="samples of each surface")
    parser.add_argument("--views", type=int, default=12, help="renders compared, 0 for geometry only")
    return harness.parse(parser, argv)


# --- meshes -----------------------------------------------------------------------------------------------------


def link_truths(objects: list[HeldOut], results: Results) -> None:
    """A folder of the true meshes alone, for the evaluation."""
    for one in objects:
        link = results.truth(one.name).path
        link.parent.mkdir(parents=True, exist_ok=True)
        with suppress(FileExistsError):  # from an earlier run
            link.symlink_to(one.path.resolve())


def rig_for(name: str, object_name: str) -> CameraRig:
    """A named rig, or `"random"`: six cameras of each object's own, 60 degrees apart give or take 20, at any height from -20 to 40
    degrees, all with one lens of 25 to 55 degrees that just holds the object."""
    if name != "random":
        return CameraRig.named(name)
    rng = np.random.default_rng(zlib.crc32(object_name.encode()))
    azimuths = rng.uniform(0, 360) + 60 * np.arange(6) + rng.uniform(-20, 20, 6)
    fov = math.radians(rng.uniform(25, 55))
    return CameraRig.from_angles(azimuths.tolist(), rng.uniform(-20, 40, 6).tolist(), fov, 0.5 / math.sin(fov / 2))


def given(one: HeldOut, args: argparse.Namespace) -> tuple[Image.Image, Views]:
    """The input image and the true views of an object."""
    truth = one.load()
    views = harness.true_views(truth, rig_for(args.rig, one.name), args.size)
    return harness.front_picture(truth, args.size, args.input_elevation), views


def load(args: argparse.Namespace) -> One2345PlusPlusPipeline:
    pipe = harness.load_chain(args.model, args.device)
    if args.elevation == "unknown":
        pipe.elevation_estimator = None
    return pipe


def predict(one: HeldOut, pipe: One2345PlusPlusPipeline | None, results: Results, args: argparse.Namespace) -> None:
    """Write the meshes of an object that do not exist yet."""
    missing = [method for method in args.methods if not results.mesh(method, one.name).exists()]
    if not missing:
        return
    image, views = given(one, args)
    for method in missing:
        start, path = time.perf_counter(), results.mesh(method, one.name)
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            mesh, drawn = make_mesh(method, pipe, image, views, args)
        except InputError as error:  # counted as missing by the evaluation
            print(f"{one.name}: {method}: {error}", flush=True)
            continue
        export_mesh(mesh, path.with_suffix(".glb") if args.refine and method == "generate" else path)
        if drawn is not None:
            harness.save_sheet([list(drawn)], results.drawn_views(one.name), drawn[0].width, gap=0)
        print(f"{one.name}: {method}: {time.perf_counter() - start:.1f} s", flush=True)


def make_mesh(
    method: str,
    pipe: One2345PlusPlusPipeline | None,
    image: Image.Image,
    views: Views,
    args: argparse.Namespace,
) -> tuple[trimesh.Trimesh, Views | None]:
    """A method's mesh, and the views if it drew some."""
    call = {"background": "none", "generator": torch.Generator().manual_seed(args.seed)}
    if method == "reconstruct":
        return pipe.reconstruct(views, image=image, refine=False, **call).meshes[0], None
    if method == "generate":
        told = args.input_elevation if args.elevation == "told" else None
        out = pipe(image, elevation=told, rig=args.drawn_rig, refine=args.refine, **call)
        return out.meshes[0], out.views[0]
    if method == "hull":
        pictures = np.stack([np.asarray(view, np.float32) / 255 for view in views])
        return visual_hull(pictures[..., 3], views.rig, images=pictures[..., :3]), None
    return extruded_silhouette(np.asarray(image)), None


# --- figures ----------------------------------------------------------------------------------------------------


def measure(method: str, results: Results, args: argparse.Namespace) -> dict:
    """The method's own report, with `front`, the mean of `compare_fronts`."""
    folder, report = results.meshes(method), results.folder / f"{method}.json"
    settings = {"points": args.points, "views": args.views, "seed": args.seed}
    figures = evaluate(folder, results.folder / "gt", report, groups=args.index, workers=args.threads, **settings)
    fronts = [
        compare_fronts(load_mesh(results.mesh(method, name)), results.truth(name).load(), args.input_elevation)
        for name in figures["objects"]
    ]
    return figures | {"front": harness.mean(fronts)}


def compare_fronts(
    mesh: trimesh.Trimesh, truth: trimesh.Trimesh, elevation: float, size: int = 160
) -> dict[str, float]:
    """IoU of the silhouettes seen by the input image's camera, as they `stand`, and `framed` as the image is, which says nothing of
    size and place."""
    camera = harness.front_camera(elevation)
    seen = [render(one, camera, size, supersample=1, shading="none")[0] for one in (mesh, truth)]
    try:
        framed = harness.iou(*(harness.mask(frame_object(Image.fromarray(picture))) for picture in seen))
    except InputError:  # edge-on there may be nothing to see
        framed = 0.0
    return {"stand": harness.iou(*map(harness.mask, seen)), "framed": framed}


def describe(reports: dict[str, dict]) -> str:
    """All methods side by side."""
    rows, columns = [], []
    for method, report in reports.items():
        for alignment, summary in report["summary"].items():
            groups = {"all": {"objects": report["counts"]["measured"]} | summary["mean"], **report["groups"][alignment]}
            columns = list(summary["mean"])
            for tier, means in groups.items():
                rows.append([method, alignment, tier, means["objects"], *(means[column] for column in columns)])
    rows.sort(key=lambda row: (row[2] != "all", row[2], row[1]))
    fronts = [[method, *report["front"].values()] for method, report in reports.items()]
    return "\n".join(
        [
            harness.table(["method", "alignment", "tier", "objects", *columns], rows, digits=4),
            "Means over the objects measured; each method's own report says which are missing, how, and what each number is.",
            "",
            "IoU of the silhouettes seen by the input image's camera, as they stand and each in its frame:",
            "",
            harness.table(["method", "as they stand", "in frame"], fronts, digits=4),
        ]
    )


# --- sheets -----------------------------------------------------------------------------------------------------


def draw_sheet(one: HeldOut, methods: list[str], results: Results, args: argparse.Namespace) -> None:
    """The pictures of an object, then the truth and each method from four sides."""
    image, views = given(one, args)
    rows = [[label("image, true views"), image, *views]]
    if (strip := results.drawn_views(one.name)).exists():
        rows.append([label("drawn views"), *harness.split_row(Image.open(strip))])
    paths = {method: results.mesh(method, one.name) for method in methods}
    meshes = {"truth": one.load()} | {method: load_mesh(path) for method, path in paths.items() if path.exists()}
    rows += [[label(name), *render(mesh, orbit(4), SHEET_SIZE)] for name, mesh in meshes.items()]
    harness.save_sheet(rows, args.output / "sheets" / f"{one.name}.png", SHEET_SIZE)


def label(text: str) -> Image.Image:
    picture = Image.new("RGBA", (SHEET_SIZE, SHEET_SIZE))
    ImageDraw.Draw(picture).text((8, 84), text, fill="black", font_size=20)
    return picture


if __name__ == "__main__":
    main()
