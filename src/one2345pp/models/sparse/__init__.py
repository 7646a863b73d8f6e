"""Sparse 3D convolution in plain torch: grids, functions, layers. Networks live in `one2345pp.models`."""

from .modules import SparseConv3d, SparseDownConv3d, SparseGroupNorm, SparseUpConv3d, set_sparse_backend
from .tensor import SparseGrid, SparseTensor


__all__ = [
    "SparseConv3d",
    "SparseDownConv3d",
    "SparseGrid",
    "SparseGroupNorm",
    "SparseTensor",
    "SparseUpConv3d",
    "set_sparse_backend",
]
