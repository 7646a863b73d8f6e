"""Draws the learning curves in docs/curves/*.csv as docs/images/curves.png, a panel for each figure.

    python benchmarks/plot_curves.py [--curves FOLDER] [--output PNG]

A run begins where the run that it `follows` ended. Hollow points belong to runs whose weights were not kept.
"""

from __future__ import annotations

import csv
import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import harness
from PIL import Image, ImageDraw, ImageFont


DOCS = Path(__file__).parents[1] / "docs"
PANELS = (  # network, metric, title
    ("autoencoder", "psnr_train_db", "Autoencoder: PSNR of training views, dB"),
    ("tile UNet", "training_loss", "Tile UNet: training loss (v)"),
    ("occupancy", "shell_iou", "Occupancy: shell IoU, held-out"),
    ("elevation estimator", "training_loss", "Elevation estimator: training loss"),
    ("sparse", "distance_error_true_support", "Sparse: distance error, true supports, held-out"),
    ("sparse", "distance_error_predicted_support", "Sparse: distance error, predicted supports, held-out"),
)
COLORS = ("#1f77b4", "#d95f02", "#2ca02c", "#9467bd", "#8c564b", "#e377c2")
DROPPED = "#8a8a8a"  # runs whose weights were not kept
SCALE = 2  # drawn larger, then reduced: Pillow's lines have hard edges
PANEL, COLUMNS = (500, 320), 2
LEFT, TOP, RIGHT, BOTTOM, LINE = 56, 34, 16, 44, 17  # pixels around the axes, and of a line of the legend


def samples(rows: list[dict[str, str]], step: int) -> int:
    """How many samples a run had seen at a step; its batch may change on the way."""
    seen = last = 0
    for number, batch in sorted({(int(row["step"]), int(row["batch"])) for row in rows}):
        seen, last = seen + max(min(number, step) - last, 0) * batch, max(last, min(number, step))
    return seen


def start(runs: dict, network: str, name: str) -> int:
    """Samples seen before a run, by all runs that led to it."""
    parent = runs[network, name][0]["follows"]
    return start(runs, network, parent) + samples(runs[network, parent], 10**9) if parent else 0


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers that span a range."""
    step = 10 ** math.floor(math.log10((high - low) / count))
    step *= min((m for m in (1, 2, 5, 10) if (high - low) / (m * step) <= count), default=10)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [round(i * step, 10) for i in range(first, last + 1)]


def draw_panel(runs: dict, network: str, metric: str, title: str) -> Image.Image:
    """Axes, ticks, one line for each run and a legend."""
    lines = {}
    for (owner, name), rows in runs.items():
        chosen = [row for row in rows if owner == network and row["metric"] == metric]
        if chosen:
            before = start(runs, owner, name)
            lines[name] = [(before + samples(rows, int(row["step"])), float(row["value"])) for row in chosen]
    xs, ys = zip(*(point for line in lines.values() for point in line), strict=True)
    rising = ys[0] < ys[-1]
    share = 0 if rising else LINE * len(lines) / (PANEL[1] - TOP - BOTTOM)  # the legend's, above the points
    across, up = ticks(0, max(xs)), ticks(min(ys), min(ys) + (max(ys) - min(ys)) / (1 - share))
    digits = max(len(f"{y:g}".partition(".")[2]) for y in up)
    width, height = (SCALE * side for side in PANEL)
    left, top, right, bottom = SCALE * LEFT, SCALE * TOP, width - SCALE * RIGHT, height - SCALE * BOTTOM
    panel = Image.new("RGB", (width, height), "white")
    draw, small, large = ImageDraw.Draw(panel), ImageFont.load_default(12 * SCALE), ImageFont.load_default(14 * SCALE)

    def place(x: float, y: float) -> tuple[float, float]:
        part = (x - across[0]) / (across[-1] - across[0]), (y - up[0]) / (up[-1] - up[0])
        return left + part[0] * (right - left), bottom - part[1] * (bottom - top)

    for x in across:
        at = place(x, up[0])[0]
        draw.line([(at, top), (at, bottom + 4 * SCALE)], "#e4e4e4", SCALE)
        draw.text((at, bottom + 6 * SCALE), f"{x / 1000:g}", "#333333", small, "ma")
    for y in up:
        at = place(across[0], y)[1]
        draw.line([(left - 4 * SCALE, at), (right, at)], "#e4e4e4", SCALE)
        draw.text((left - 7 * SCALE, at), f"{y:.{digits}f}", "#333333", small, "rm")
    draw.line([(left, top), (left, bottom), (right, bottom)], "#333333", SCALE)
    draw.text(((left + width) / 2, 6 * SCALE), title, "black", large, "ma")
    draw.text(((left + right) / 2, bottom + 22 * SCALE), "samples seen, thousands", "#333333", small, "ma")
    legend = bottom - (6 + LINE * len(lines)) * SCALE if rising else top + 4 * SCALE
    legend_left = right - max(draw.textlength(name, small) for name in lines) - 40 * SCALE
    for color, (name, line) in zip(COLORS, lines.items(), strict=False):
        kept = runs[network, name][0]["kept"] == "yes"
        color = color if kept else DROPPED
        spots = [place(x, y) for x, y in line]
        draw.line(spots, color, 2 * SCALE)
        spots.append((legend_left + 12 * SCALE, legend + 8 * SCALE))
        draw.line([(legend_left, spots[-1][1]), (legend_left + 24 * SCALE, spots[-1][1])], color, 2 * SCALE)
        for x, y in spots:
            box = [x - 4 * SCALE, y - 4 * SCALE, x + 4 * SCALE, y + 4 * SCALE]
            draw.ellipse(box, color if kept else "white", color, SCALE)
        draw.text((legend_left + 32 * SCALE, legend + 8 * SCALE), name, "#333333", small, "lm")
        legend += LINE * SCALE
    return panel


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.make_parser(__doc__)
    parser.add_argument("--curves", type=Path, default=DOCS / "curves", help="folder of CSV files, one a network")
    parser.add_argument("--output", type=Path, default=DOCS / "images" / "curves.png")
    args = harness.parse(parser, argv)
    runs = defaultdict(list)  # rows of all files by network and run
    for path in sorted(args.curves.glob("*.csv")):
        for row in csv.DictReader(path.read_text().splitlines()):
            runs[row["network"], row["run"]].append(row)
    sheet = Image.new("RGB", (COLUMNS * PANEL[0], math.ceil(len(PANELS) / COLUMNS) * PANEL[1]), "white")
    for i, panel in enumerate(PANELS):
        picture = draw_panel(runs, *panel).resize(PANEL, Image.Resampling.LANCZOS)
        sheet.paste(picture, (i % COLUMNS * PANEL[0], i // COLUMNS * PANEL[1]))
    sheet.quantize(128, Image.Quantize.FASTOCTREE).save(args.output, optimize=True)


if __name__ == "__main__":
    main()
