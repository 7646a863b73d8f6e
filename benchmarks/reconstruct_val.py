"""Benchmark: meshes of held-out objects by this package and by baselines without learning, and how close they come to the truth.

    python benchmarks/reconstruct_val.py --objects OBJECTS --index index.csv --output OUT [--model CHECKPOINT]

`OBJECTS` holds NAME.glb, `index.csv` the columns name, split, tier. Methods: `reconstruct` gets six true views, `generate` one image,
`hull` the silhouettes of the six true views, `silhouette` that of the image. A run goes on where the last one stopped: meshes that
exist are kept. To use several processes, start one for each `--shard I/N`; then run once without `--shard` for reports and sheets.
"""

from __future__ import annotations

import argparse
import csv
import json
import math
import time
import zlib
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image, ImageDraw

from one2345pp import default_checkpoint
from one2345pp.errors import InputError
from one2345pp.evaluation.baselines import extruded_silhouette, visual_hull
from one2345pp.evaluation.metrics import image_metrics
from one2345pp.evaluation.report import evaluate
from one2345pp.geometry.cameras import CameraRig
from one2345pp.geometry.export import export_mesh
from one2345pp.geometry.framing import frame_object
from one2345pp.geometry.mesh import load_mesh, normalize_to_sphere
from one2345pp.geometry.render import contact_sheet, orbit, render


METHODS = ("reconstruct", "generate", "hull", "silhouette")
INPUT_ELEVATION = 10.0  # degrees


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    objects = select(args)
    link_truths(objects, args)
    predict(objects, args)
    if args.shard == (0, 1):
        reports = {m: r for m in args.methods if (r := measure(m, args)) is not None}
        write_tables(reports, {method: front_view(method, args) for method in reports}, args.output)
        draw_sheets(objects, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=Path, required=True, help="folder of NAME.glb")
    parser.add_argument("--index", type=Path, required=True, help="CSV with the columns name, split, tier")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--model", help="checkpoint folder or Hub id; default: the checkpoint in the package")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument(
        "--rig", default="zero123plus-v1.2", choices=(*CameraRig.names(), "random"), help="cameras of the true views"
    )
    parser.add_argument(
        "--drawn-rig",
        choices=CameraRig.names(),
        help="cameras of the views that `generate` draws; default: the checkpoint's",
    )
    parser.add_argument("--size", type=int, default=320, help="pixels along a side of the true views")
    parser.add_argument("--limit", type=int, help="only so many objects, spread over the tiers")
    parser.add_argument(
        "--shard", type=shard, default=(0, 1), metavar="I/N", help="every N-th object from the I-th, meshes only"
    )
    parser.add_argument("--sheets", type=int, default=12, help="objects on contact sheets, about")
    parser.add_argument(
        "--input-elevation", type=float, default=INPUT_ELEVATION, metavar="DEG", help="of the image's camera"
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
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--threads", type=int, default=1, help="threads of torch")
    parser.add_argument("--workers", type=int, default=1, help="processes of the evaluation")
    parser.add_argument("--points", type=int, default=100_000, help="samples of each surface")
    parser.add_argument("--views", type=int, default=12, help="renders compared, 0 for geometry only")
    return parser.parse_args()


def shard(text: str) -> tuple[int, int]:
    index, count = map(int, text.split("/"))
    if not 0 <= index < count:
        raise argparse.ArgumentTypeError(f"{text}: expected I/N with 0 <= I < N")
    return index, count


def select(args: argparse.Namespace) -> list[dict]:
    """Rows of the split, sorted by tier and name; with `--limit`, spread evenly over that order."""
    with args.index.open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["split"] == args.split]
    rows.sort(key=lambda row: (row["tier"], row["name"]))
    if not args.limit or args.limit >= len(rows):
        return rows
    return [rows[i * len(rows) // args.limit] for i in range(args.limit)]


def link_truths(objects: list[dict], args: argparse.Namespace) -> None:
    folder = args.output / "gt"
    folder.mkdir(parents=True, exist_ok=True)
    for row in objects:
        link = folder / f"{row['name']}.glb"
        with suppress(FileExistsError):  # from an earlier run, or another shard
            link.symlink_to((args.objects / link.name).resolve())


def rig_for(name: str, object_name: str) -> CameraRig:
    """A named rig, or `"random"`: six cameras of each object's own, 60 degrees apart give or take 20, at any height from -20 to 40
    degrees, all with one lens of 25 to 55 degrees that just holds the object."""
    if name != "random":
        return CameraRig.named(name)
    rng = np.random.default_rng(zlib.crc32(object_name.encode()))
    azimuths = rng.uniform(0, 360) + 60 * np.arange(6) + rng.uniform(-20, 20, 6)
    fov = math.radians(rng.uniform(25, 55))
    return CameraRig.from_angles(azimuths.tolist(), rng.uniform(-20, 40, 6).tolist(), fov, 0.5 / math.sin(fov / 2))


def true_pictures(
    mesh: trimesh.Trimesh, rig: CameraRig, size: int, elevation: float = INPUT_ELEVATION
) -> tuple[Image.Image, list[Image.Image]]:
    """The input image, and the views of the rig, both RGBA."""
    views = [Image.fromarray(view) for view in render(mesh, rig, size)]
    return frame_object(Image.fromarray(render(mesh, front_camera(elevation), size)[0])), views


def front_camera(elevation: float) -> CameraRig:
    """The camera of the input image: azimuth 0, the field of view and distance of `zero123plus-v1.2`."""
    fov = math.radians(30)
    return CameraRig.from_angles([0.0], elevation, fov, 0.5 / math.tan(fov / 2))


def predict(objects: list[dict], args: argparse.Namespace) -> None:
    """Write the meshes that do not exist yet."""
    index, count = args.shard
    pipe = None
    for row in objects[index::count]:
        suffixes = {m: ".glb" if args.refine and m == "generate" else ".ply" for m in args.methods}
        targets = {m: args.output / "pred" / m / (row["name"] + suffix) for m, suffix in suffixes.items()}
        missing = {m: path for m, path in targets.items() if not path.exists()}
        if not missing:
            continue
        if pipe is None and {"reconstruct", "generate"} & missing.keys():
            pipe = load_pipeline(args)
        truth = normalize_to_sphere(load_mesh(args.output / "gt" / f"{row['name']}.glb"))
        rig = rig_for(args.rig, row["name"])
        image, views = true_pictures(truth, rig, args.size, args.input_elevation)
        for method, path in missing.items():
            start = time.perf_counter()
            path.parent.mkdir(parents=True, exist_ok=True)
            try:
                export_mesh(predict_one(method, pipe, image, views, rig, args, path.stem), path)
                print(f"{path.stem}: {method}: {time.perf_counter() - start:.1f} s", flush=True)
            except InputError as error:  # counted as missing by the evaluation
                print(f"{path.stem}: {method}: {error}", flush=True)


def mesh_file(output: Path, method: str, name: str) -> Path:
    """Where the mesh of a method is, if there is one: as GLB with a texture, or as PLY with colours of its vertices."""
    painted = output / "pred" / method / f"{name}.glb"
    return painted if painted.exists() else painted.with_suffix(".ply")


def load_pipeline(args: argparse.Namespace):
    from one2345pp import One2345PlusPlusPipeline

    pipe = One2345PlusPlusPipeline.from_pretrained(args.model or default_checkpoint()).to(args.device)
    pipe.set_progress_bar_config(disable=True)
    if args.elevation == "unknown":
        pipe.elevation_estimator = None
    return pipe


def predict_one(method, pipe, image: Image.Image, views: list, rig: CameraRig, args, name: str) -> trimesh.Trimesh:
    generator = torch.Generator().manual_seed(args.seed)
    pictures = np.stack([np.asarray(view, np.float32) / 255 for view in views])
    if method == "reconstruct":
        return pipe.volume(views, cameras=rig, image=image, generator=generator).meshes[0]
    if method == "generate":
        told = args.input_elevation if args.elevation == "told" else None
        out = pipe(image, refine=args.refine, generator=generator, elevation=told, rig=args.drawn_rig)
        folder = args.output / "generated_views"
        folder.mkdir(exist_ok=True)
        contact_sheet([out.views[0]], gap=0).save(folder / f"{name}.png")
        return out.meshes[0]
    if method == "hull":
        return visual_hull(pictures[..., 3], rig, images=pictures[..., :3])
    return extruded_silhouette(np.asarray(image))


def meshes_in(folder: Path) -> list[Path]:
    return sorted([*folder.glob("*.ply"), *folder.glob("*.glb")], key=lambda path: path.stem)


def measure(method: str, args: argparse.Namespace) -> dict | None:
    """The method's own report, or `None` if it made no mesh."""
    pred = args.output / "pred" / method
    if not meshes_in(pred):
        print(f"{method}: made no mesh", flush=True)
        return None
    settings = {"points": args.points, "views": args.views, "seed": args.seed}
    return evaluate(
        pred, args.output / "gt", args.output / f"{method}.json", groups=args.index, workers=args.workers, **settings
    )


def front_view(method: str, args: argparse.Namespace, size: int = 160) -> dict[str, float]:
    """IoU of the mesh's silhouette and the truth's, seen by the input image's camera, mean over the meshes.

    `front_iou` as they stand; `front_iou_framed` each in its frame, as the input image is, which says nothing of size and place.
    """
    figures, camera = [], front_camera(args.input_elevation)
    for path in meshes_in(args.output / "pred" / method):
        meshes = load_mesh(path), normalize_to_sphere(load_mesh(args.output / "gt" / f"{path.stem}.glb"))
        pictures = [Image.fromarray(render(mesh, camera, size, supersample=1, shading="none")[0]) for mesh in meshes]
        try:
            framed = overlap(*map(frame_object, pictures))
        except InputError:  # edge-on there may be nothing to see
            framed = 0.0
        figures.append([overlap(*pictures), framed])
    plain, framed = np.mean(figures, 0)
    return {"front_iou": float(plain), "front_iou_framed": float(framed)}


def overlap(a: Image.Image, b: Image.Image) -> float:
    """Intersection over union of two pictures' masks."""
    return image_metrics(np.asarray(a)[None], np.asarray(b)[None])["mask_iou"]


def write_tables(reports: dict[str, dict], fronts: dict[str, dict[str, float]], output: Path) -> None:
    """All methods side by side: `report.md` and `report.json`."""
    rows, columns = [], []
    for method, report in reports.items():
        for alignment, summary in report["summary"].items():
            groups = {"all": {"objects": report["counts"]["measured"]} | summary["mean"], **report["groups"][alignment]}
            columns = list(summary["mean"])
            for tier, means in groups.items():
                numbers = [f"{means[column]:.4f}" for column in columns]
                rows.append([method, alignment, tier, str(means["objects"]), *numbers])
    rows.sort(key=lambda row: (row[2] != "all", row[2], row[1]))
    header = ["method", "alignment", "tier", "objects", *columns]
    lines = ["| " + " | ".join(row) + " |" for row in [header, *rows]]
    lines.insert(1, "|" + " --- |" * len(header))
    lines += [
        "",
        "Means over the objects measured; each method's own report says which are missing, how, and what each number is.",
        "",
        "Silhouettes seen by the input image's camera, as they stand and each in its frame:",
        "",
        *(f"- {m}: {f['front_iou']:.4f}, {f['front_iou_framed']:.4f}" for m, f in fronts.items()),
    ]
    (output / "report.md").write_text("\n".join(lines) + "\n")
    kept = ("settings", "definitions", "counts", "missing_predictions", "failed", "summary", "groups")
    combined = {method: fronts[method] | {key: report[key] for key in kept} for method, report in reports.items()}
    (output / "report.json").write_text(json.dumps(combined, indent=1) + "\n")


def draw_sheets(objects: list[dict], args: argparse.Namespace) -> None:
    """One sheet an object, for every k-th name of each tier: the pictures, then the truth and each method from four sides."""
    step = math.ceil(len(objects) / max(args.sheets, 1))
    tiers: dict[str, list[str]] = {}
    for row in objects:
        tiers.setdefault(row["tier"], []).append(row["name"])
    folder = args.output / "sheets"
    folder.mkdir(exist_ok=True)
    for name in [name for names in tiers.values() for name in sorted(names)[::step]]:
        truth = normalize_to_sphere(load_mesh(args.output / "gt" / f"{name}.glb"))
        image, views = true_pictures(truth, rig_for(args.rig, name), args.size, args.input_elevation)
        rows = [[label("image, true views"), image, *views], [label("truth"), *render(truth, orbit(4), 192)]]
        generated = args.output / "generated_views" / f"{name}.png"
        if generated.exists():
            rows.insert(1, [label("generated views"), *cut(Image.open(generated))])
        for method in args.methods:
            path = mesh_file(args.output, method, name)
            if path.exists():
                rows.append([label(method), *render(load_mesh(path), orbit(4), 192)])
        contact_sheet(rows, size=192).save(folder / f"{name}.png")


def cut(strip: Image.Image) -> list[Image.Image]:
    """The square pictures of a row."""
    side = strip.height
    return [strip.crop((x, 0, x + side, side)) for x in range(0, strip.width, side)]


def label(text: str) -> Image.Image:
    picture = Image.new("RGBA", (192, 192))
    ImageDraw.Draw(picture).text((8, 84), text, fill="black", font_size=20)
    return picture


if __name__ == "__main__":
    main()
