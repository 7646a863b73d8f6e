"""Stands for OccupancyUNet3DModel of the installed package one2345pp (pip install one2345pp)."""

from one2345pp.models.unet_occupancy import OccupancyUNet3DModel


__all__ = ["OccupancyUNet3DModel"]
