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
from collections.abc import Sequence

import harness
import numpy as np
import torch
import trimesh

from one2345pp import One2345PlusPlusPipeline
from one2345pp.errors import InputError
from one2345pp.evaluation.metrics import image_metrics
from one2345pp.geometry.extract import volume_to_mesh
from one2345pp.geometry.render import orbit, render
from one2345pp.geometry.views import DEFAULT_RIG
from one2345pp.geometry.voxelize import SurfaceCloud


SHEET_ROWS = 12


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    pipe = harness.load_chain(args.model)
    objects = sorted(harness.held_out_objects(args.objects, args.index), key=lambda one: one.name)
    rows, sheet = {}, []
    for one in objects[:: args.every]:
        truth = one.load()
        try:
            before, after = refine(pipe, truth, args)
        except InputError as error:
            print(f"{one.name}: {error}", flush=True)
            continue
        pictures = [render(mesh, orbit(12), args.size, shading="none") for mesh in (truth, before, after)]
        rows[one.name] = {"before": compare(pictures[1], pictures[0]), "after": compare(pictures[2], pictures[0])}
        print(f"{one.name}: {rows[one.name]}", flush=True)
        if len(sheet) < SHEET_ROWS:
            sheet.append([seen[view] for view in (1, 7) for seen in pictures])
    harness.save_sheet(sheet, args.output / "texture.png", 160)
    means = {stage: harness.mean([row[stage] for row in rows.values()]) for stage in ("before", "after")}
    text = harness.table(["mesh", *means["before"]], [[f"{s} refinement", *m.values()] for s, m in means.items()])
    kind = "drawn views" if args.drawn else "true views" + args.exact * " and volumes"
    harness.write_report(rows, args.output / "texture.json", text + f"\n{len(rows)} objects, {kind}\n")


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = harness.make_parser(__doc__, "objects", "index", "output", "model", "every", "seed", "threads")
    source = parser.add_mutually_exclusive_group()
    source.add_argument("--drawn", action="store_true", help="views that the first stage draws")
    source.add_argument("--exact", action="store_true", help="the mesh of the true volume, and true views")
    parser.add_argument("--size", type=int, default=320, help="pixels of true views, and of those compared")
    return harness.parse(parser, argv)


def refine(
    pipe: One2345PlusPlusPipeline, truth: trimesh.Trimesh, args: argparse.Namespace
) -> tuple[trimesh.Trimesh, trimesh.Trimesh]:
    """The object's mesh before and after refinement."""
    image = harness.front_picture(truth, args.size)
    generator = torch.Generator().manual_seed(args.seed)
    if args.drawn:
        out = pipe(image, background="none", generator=generator)
        return out.coarse_meshes[0], out.meshes[0]
    if args.exact:
        resolution = 2 * pipe.volume.occupancy_unet.config.sample_size
        coarse = volume_to_mesh(SurfaceCloud.from_mesh(truth).volume(resolution, pipe.volume.config.truncation))
    else:
        views = harness.true_views(truth, DEFAULT_RIG, args.size)
        call = {"image": image, "background": "none", "refine": False, "generator": generator}
        coarse = pipe.reconstruct(views, **call).meshes[0]
    unlit = harness.true_views(truth, DEFAULT_RIG, args.size, shading="none")
    return coarse, pipe.texture.paint(coarse, unlit, generator=generator)


def compare(
    found: np.ndarray,  # [V, S, S, 4] uint8
    truth: np.ndarray,  # [V, S, S, 4] uint8
) -> dict[str, float]:
    whole = image_metrics(found, truth)
    return {
        "mask_iou": whole["mask_iou"],
        "psnr": whole["psnr"],
        "psnr_inside": harness.psnr_inside(found, truth),
    }


if __name__ == "__main__":
    main()
