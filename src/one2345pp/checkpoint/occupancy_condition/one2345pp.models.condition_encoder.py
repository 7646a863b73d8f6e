"""Stands for ConditionEncoder of the installed package one2345pp (pip install one2345pp)."""

from one2345pp.models.condition_encoder import ConditionEncoder


__all__ = ["ConditionEncoder"]
