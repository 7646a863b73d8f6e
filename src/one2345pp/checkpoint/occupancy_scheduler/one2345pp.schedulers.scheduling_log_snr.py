"""Stands for LogSNRScheduler of the installed package one2345pp (pip install one2345pp)."""

from one2345pp.schedulers.scheduling_log_snr import LogSNRScheduler


__all__ = ["LogSNRScheduler"]
