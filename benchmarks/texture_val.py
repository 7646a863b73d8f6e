"""Benchmark: what the texture refinement gains on views that it was not fitted to, on held-out objects.

    python benchmarks/texture_val.py --objects OBJECTS --index index.csv --output OUT [--every 4] [--drawn | --exact]

Each object is reconstructed from six true views, or with `--drawn` from those that the first stage draws of one image; the mesh is
compared with the truth before refinement, with the volume's colours, and after it, on a ring of 12 views at elevation 15, unlit on
white. With `--exact` the mesh comes out of the true volume instead, as large as the checkpoint's: what is left is the texture's own.
`psnr` is over all pixels and so mostly says where the silhouettes differ, `psnr_inside` over those that both show.

Refinement keeps the light of its views, and what is compared has none; so the true views that it is fitted to are unlit as well (the
volume stage sees lit ones, as it was trained). Drawn views have the light that the first stage drew, and lose by that.
"""

from __future__ import annotations

import argparse
import csv
import json
from pathlib import Path

import numpy as np
import torch
import trimesh
from PIL import Image
from reconstruct_val import true_pictures

from one2345pp import CameraRig, One2345PlusPlusPipeline, default_checkpoint
from one2345pp.errors import InputError
from one2345pp.evaluation.metrics import MAX_PSNR, image_metrics
from one2345pp.geometry.extract import volume_to_mesh
from one2345pp.geometry.mesh import load_mesh, normalize_to_sphere
from one2345pp.geometry.render import contact_sheet, orbit, render
from one2345pp.geometry.voxelize import SurfaceCloud


RIG = CameraRig.named("zero123plus-v1.2")
SHEET_ROWS = 12


def main() -> None:
    args = parse_arguments()
    torch.set_num_threads(args.threads)
    with args.index.open(newline="") as file:
        names = sorted(row["name"] for row in csv.DictReader(file) if row["split"] == args.split)[:: args.every]
    pipe = One2345PlusPlusPipeline.from_pretrained(args.model)
    pipe.set_progress_bar_config(disable=True)
    rows, sheet = {}, []
    for name in names:
        truth = normalize_to_sphere(load_mesh(args.objects / f"{name}.glb"))
        try:
            before, after = refine(pipe, truth, args)
        except InputError as error:
            print(f"{name}: {error}", flush=True)
            continue
        rig = orbit(12)
        pictures = [render(mesh, rig, args.size, shading="none") for mesh in (truth, before, after)]
        rows[name] = {
            stage: compare(p, pictures[0]) for stage, p in zip(("before", "after"), pictures[1:], strict=True)
        }
        print(f"{name}: {rows[name]}", flush=True)
        if len(sheet) < SHEET_ROWS:
            sheet.append([Image.fromarray(p[view]) for view in (1, 7) for p in pictures])
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "texture.json").write_text(json.dumps(rows, indent=1) + "\n")
    contact_sheet(sheet, 160).save(args.output / "texture.png")
    write_table(rows, args)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--objects", type=Path, required=True, help="folder of NAME.glb")
    parser.add_argument("--index", type=Path, required=True, help="CSV with the columns name, split")
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--split", default="val")
    parser.add_argument("--model", default=str(default_checkpoint()))
    parser.add_argument("--every", type=int, default=1, help="every k-th object in alphabetical order")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--drawn", action="store_true", help="views that the first stage draws")
    source.add_argument("--exact", action="store_true", help="the mesh of the true volume, and true views")
    parser.add_argument("--size", type=int, default=320, help="pixels of true views, and of those compared")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    return parser.parse_args()


def refine(pipe: One2345PlusPlusPipeline, truth: trimesh.Trimesh, args) -> tuple[trimesh.Trimesh, trimesh.Trimesh]:
    """The object's mesh before and after refinement."""
    image, views = true_pictures(truth, RIG, args.size)
    generator = torch.Generator().manual_seed(args.seed)
    if args.drawn:
        out = pipe(image, generator=generator)
        return out.coarse_meshes[0], out.meshes[0]
    if args.exact:
        resolution = 2 * pipe.volume.occupancy_unet.config.sample_size
        coarse = volume_to_mesh(SurfaceCloud.from_mesh(truth).volume(resolution, pipe.volume.config.truncation))
    else:
        coarse = pipe.volume(views, cameras=RIG, image=image, generator=generator).meshes[0]
    unlit = [Image.fromarray(view) for view in render(truth, RIG, args.size, shading="none")]
    return coarse, pipe.texture(coarse, unlit, cameras=RIG, generator=generator).meshes[0]


def compare(found: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """Of renders `[V, S, S, 4]`; `psnr_inside` over the pixels that both cover."""
    whole = image_metrics(found, truth)
    both = (found[..., 3] == 255) & (truth[..., 3] == 255)
    error = np.square(found[both][:, :3] / 255.0 - truth[both][:, :3] / 255.0).mean() if both.any() else 1.0
    return {
        "mask_iou": whole["mask_iou"],
        "psnr": whole["psnr"],
        "psnr_inside": float(min(-10 * np.log10(max(error, 1e-12)), MAX_PSNR)),
    }


def write_table(rows: dict[str, dict], args) -> None:
    columns = ("mask_iou", "psnr", "psnr_inside")
    lines = ["| " + " | ".join(("mesh", *columns)) + " |", "|" + " --- |" * 4]
    for stage in ("before", "after"):
        means = (np.mean([row[stage][column] for row in rows.values()]) for column in columns)
        lines.append(f"| {stage} refinement | " + " | ".join(f"{mean:.3f}" for mean in means) + " |")
    kind = "drawn views" if args.drawn else "true views" + args.exact * " and volumes"
    text = "\n".join(lines) + f"\n\n{len(rows)} objects, {kind}\n"
    (args.output / "texture.md").write_text(text)
    print(text)


if __name__ == "__main__":
    main()
