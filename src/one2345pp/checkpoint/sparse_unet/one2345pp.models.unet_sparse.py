"""Stands for SparseUNet3DModel of the installed package one2345pp (pip install one2345pp)."""

from one2345pp.models.unet_sparse import SparseUNet3DModel


__all__ = ["SparseUNet3DModel"]
