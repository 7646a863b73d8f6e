"""Stands for ElevationEstimator of the installed package one2345pp (pip install one2345pp)."""

from one2345pp.models.elevation import ElevationEstimator


__all__ = ["ElevationEstimator"]
