"""What stage 1 costs at full size, counted on shapes without running it: operations of its passes, and peak memory.

    python benchmarks/multiview_size.py [--config configs/multiview-full.json] [--dtype float16] [--output REPORT.json]

Operations are those of matrix products, convolutions and attention in a denoising step, with guidance and without.
Memory is weights and live tensors, attention without its matrix (as flash attention computes it), without the workspaces of libraries:
of each network as it works, so that the largest is the peak under `enable_model_cpu_offload`, and with all weights on the device.
"""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path
from unittest.mock import patch

import harness
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from one2345pp.geometry.tile import COLUMNS, ROWS
from one2345pp.models.attention_reference import ReferenceAttention, reference_attention
from one2345pp.training.components import build_text_encoder, build_unet, build_vae, build_vision_encoder


BUILDERS = {
    "text_encoder": build_text_encoder,
    "vision_encoder": build_vision_encoder,
    "vae": build_vae,
    "unet": build_unet,
}
MEBIBYTE = 2**20


def main(argv: Sequence[str] | None = None) -> None:
    parser = harness.make_parser(__doc__, "report")
    parser.add_argument("--config", type=Path, default=Path("configs/multiview-full.json"))
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--reference-size", type=int, default=320, help="pixels along the side of the input picture")
    args = harness.parse(parser, argv)
    config = json.loads(args.config.read_text())
    with torch.device("meta"):
        parts = {name: build(config["components"][name]) for name, build in BUILDERS.items()}
    parts = {name: part.to(getattr(torch, args.dtype)).eval() for name, part in parts.items()}
    with torch.no_grad():
        report = {
            "dtype": args.dtype,
            "operations": count_operations(parts, config, args.reference_size),
            "mebibytes": measure_memory(parts, config, args.reference_size),
        }
    harness.write_report(report, args.output)


def passes_of(
    passes: ReferenceAttention, parts: dict[str, nn.Module], config: dict, side: int
) -> tuple[Callable, Callable]:
    """The passes over the reference and over the tile, to be called with the number of branches."""
    factor = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    unet, view = parts["unet"], config["view_size"] // factor
    tokens = config["components"]["text_encoder"]["max_position_embeddings"]

    def pass_over(work: Callable, height: int, width: int) -> Callable[[int], None]:
        def run(branches: int) -> None:
            empty = {"device": "meta", "dtype": unet.dtype}
            latents = torch.empty(branches, unet.config.in_channels, height, width, **empty)
            context = torch.empty(branches, tokens, unet.config.cross_attention_dim, **empty)
            timestep, label = torch.empty((2, 1), device="meta", dtype=torch.long)
            work(latents, timestep, context, class_labels=label)

        return run

    reference = pass_over(passes.write, side // factor, side // factor)
    return reference, pass_over(passes.read, ROWS * view, COLUMNS * view)


def count_operations(parts: dict[str, nn.Module], config: dict, side: int) -> dict[str, float]:
    """10^12 operations of each pass over the UNet, and of a step."""

    def count(run: Callable, branches: int) -> float:
        with FlopCounterMode(display=False) as counter:
            run(branches)
        return counter.get_total_flops() / 1e12

    figures = {}
    with reference_attention(parts["unet"]) as passes:
        write, read = passes_of(passes, parts, config, side)
        for kind, branches in (("guided", 2), ("not guided", 1)):
            reference, tile = count(write, branches), count(read, branches)
            figures[f"reference pass, {kind}"], figures[f"tile pass, {kind}"] = reference, tile
            figures[f"step, {kind}"] = reference + tile
    return figures


class LiveTensors(TorchDispatchMode):
    """Bytes of tensors that were made inside and are alive, and their peak."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        given = {x.untyped_storage()._cdata for x in tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        result = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(result):
            if isinstance(tensor, torch.Tensor):
                self._count(tensor.untyped_storage(), given)
        return result

    def _count(self, storage, given: set[int]) -> None:
        key = storage._cdata
        if key in self._known or key in given:
            return
        size = storage.nbytes()
        self._known.add(key)
        self.now += size
        self.peak = max(self.peak, self.now)

        def forget():
            self._known.discard(key)
            self.now -= size

        weakref.finalize(storage, forget)


def measure_memory(parts: dict[str, nn.Module], config: dict, side: int) -> dict:
    """MiB of weights and of live tensors of each network at work."""
    vae, unet, dtype = parts["vae"], parts["unet"], parts["unet"].dtype

    def denoise() -> None:
        with reference_attention(unet) as passes:
            for run in passes_of(passes, parts, config, side):
                run(2)

    view = config["view_size"] // 2 ** (len(vae.config.block_out_channels) - 1)
    latents = torch.empty(1, vae.config.latent_channels, ROWS * view, COLUMNS * view, device="meta", dtype=dtype)
    pixels = torch.empty(2, vae.config.in_channels, side, side, device="meta", dtype=dtype)
    work = {
        "unet": (unet, denoise),
        "vae, encoding": (vae, lambda: vae.encode(pixels)),
        "vae, decoding": (vae, lambda: vae.decode(latents)),
    }
    figures = {}
    for name, (model, run) in work.items():
        with patch.object(F, "scaled_dot_product_attention", lambda query, *_, **__: torch.empty_like(query)):
            with LiveTensors() as live:
                run()
        figures[name] = {"weights": size(model), "tensors": live.peak / MEBIBYTE}
    for name in ("text_encoder", "vision_encoder"):
        figures[name] = {"weights": size(parts[name]), "tensors": 0.0}  # one picture, one text: next to nothing
    totals = [sum(figure.values()) for figure in figures.values()]
    weights = sum(size(model) for model in parts.values())
    return figures | {
        "peak with offload": max(totals),
        "peak without": weights + max(figure["tensors"] for figure in figures.values()),
    }


def size(model: nn.Module) -> float:
    return sum(p.numel() * p.element_size() for p in model.parameters()) / MEBIBYTE


if __name__ == "__main__":
    main()
