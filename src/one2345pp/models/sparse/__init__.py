"""Sparse 3D convolution in plain torch: grids, functions, layers. Networks live in `one2345pp.models`."""

from .grid import SparseGrid
from .modules import SparseConv3d, SparseDownConv3d, SparseGroupNorm, SparseUpConv3d, set_sparse_backend


__all__ = [
    "SparseConv3d",
    "SparseDownConv3d",
    "SparseGrid",
    "SparseGroupNorm",
    "SparseUpConv3d",
    "set_sparse_backend",
]
