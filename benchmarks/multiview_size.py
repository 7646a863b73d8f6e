"""What stage 1 costs at full size, counted on shapes without running it: operations of its modes, and peak memory.

    python benchmarks/multiview_size.py [--config configs/multiview-full.json] [--dtype float16] [--output REPORT.json]

Operations are those of matrix products, convolutions and attention in the denoising loop; modes as in `benchmarks/multiview.py`.
Memory is weights and live tensors, attention without its matrix (as flash attention computes it), without the workspaces of libraries:
of each network as it works, so that the largest is the peak under `enable_model_cpu_offload`, and with all weights on the device.
"""

from __future__ import annotations

import argparse
import json
import weakref
from collections.abc import Callable
from pathlib import Path
from unittest.mock import patch

import torch
import torch.nn.functional as F
from multiview import whole_reference_pass
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from one2345pp.models.attention_reference import reference_attention
from one2345pp.pipelines.tiles import COLUMNS, ROWS
from one2345pp.training.components import build_text_encoder, build_unet, build_vae, build_vision_encoder


MEBIBYTE = 2**20


def main() -> None:
    args = parse_arguments()
    config = json.loads(args.config.read_text())
    with torch.device("meta"):
        parts = {
            name: build(config).to(getattr(torch, args.dtype)).eval()
            for name, build in {
                "text_encoder": build_text_encoder,
                "vision_encoder": build_vision_encoder,
                "vae": build_vae,
                "unet": build_unet,
            }.items()
        }
    with torch.no_grad():
        report = {
            "dtype": args.dtype,
            "operations": count_operations(parts, config, args.reference_size),
            "mebibytes": measure_memory(parts, config, args.reference_size),
        }
    print(json.dumps(report, indent=1))
    if args.output is not None:
        args.output.write_text(json.dumps(report, indent=1) + "\n")


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=Path("configs/multiview-full.json"))
    parser.add_argument("--dtype", default="float16")
    parser.add_argument("--reference-size", type=int, default=320, help="pixels along the side of the input picture")
    parser.add_argument("--output", type=Path, help="also write the figures as JSON")
    return parser.parse_args()


def inputs(parts: dict[str, nn.Module], config: dict, side: int) -> tuple[Callable, Callable]:
    """Arguments of the UNet on the reference and on the tile, for so many branches."""
    factor = 2 ** (len(parts["vae"].config.block_out_channels) - 1)
    channels, width = parts["unet"].config.in_channels, parts["unet"].config.cross_attention_dim
    tokens, dtype = config["components"]["text_encoder"]["max_position_embeddings"], parts["unet"].dtype
    view = config["view_size"] // factor

    def make(height: int, wide: int, branches: int):
        empty = {"device": "meta", "dtype": dtype}
        step = torch.empty((), device="meta", dtype=torch.long)
        return (
            torch.empty(branches, channels, height, wide, **empty),
            step,
            torch.empty(branches, tokens, width, **empty),
        )

    return lambda n: make(side // factor, side // factor, n), lambda n: make(ROWS * view, COLUMNS * view, n)


def count_operations(parts: dict[str, nn.Module], config: dict, side: int) -> dict:
    """10^12 operations of each pass, and of a step in each mode as a share of the plain loop's."""
    reference, tile = inputs(parts, config, side)

    def count(run: Callable) -> float:
        with FlopCounterMode(display=False) as counter:
            run()
        return counter.get_total_flops() / 1e12

    with reference_attention(parts["unet"]) as passes:
        write = count(lambda: passes.write(*reference(2)))
        both, one = (count(lambda n=n: passes.read(*tile(n))) for n in (2, 1))
        with whole_reference_pass():
            whole = count(lambda: passes.write(*reference(2)))
    plain = whole + both
    shares = {"plain": 1.0, "exact": (write + both) / plain}
    shares |= {f"reuse {n}": (write + both + (n - 1) * one) / (n * plain) for n in (2, 3, 4)}
    return {
        "reference pass": write,
        "reference pass to its end": whole,
        "tile pass, both branches": both,
        "tile pass, one": one,
        "shares": shares,
    }


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
    reference, tile = inputs(parts, config, side)
    vae, unet, dtype = parts["vae"], parts["unet"], parts["unet"].dtype

    def denoise():
        with reference_attention(unet) as passes:
            passes.write(*reference(2))
            passes.read(*tile(2))

    latents = tile(1)[0]
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
